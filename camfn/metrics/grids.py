"""Grids of inputs of different classes: how much of a map lies in the cell of its class."""

import math
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from camfn import _compat
from camfn._errors import CamError
from camfn.metrics.pixels import rectified, rows
from camfn.metrics.scoring import is_count


def grid_of(inputs: Float[Tensor, "n cells c h w"]) -> Float[Tensor, "n c gh gw"]:
    """Tile g x g inputs to one, row by row: the input of the grid pointing game.

    **Arguments**

    - `inputs`: `(..., g*g, c, h, w)`, inputs of different classes that the model is sure of.

    **Returns** `(..., c, g*h, g*w)`. The model must take this size, as one with global pooling does.

    **Raises** `CamError` if the number of inputs is no square of 2 or more.

    >>> import torch
    >>> grid_of(torch.arange(4.0).reshape(4, 1, 1, 1))
    tensor([[[0., 1.],
             [2., 3.]]])

    Böhle et al., Convolutional Dynamic Alignment Networks, CVPR 2021 (arXiv 2104.00032), section 4.2.
    """
    cells = inputs.shape[-4] if inputs.ndim >= 4 else 0
    side = math.isqrt(cells)
    if side < 2 or side * side != cells:
        raise CamError(f"inputs have shape {tuple(inputs.shape)}: they must be (..., g*g, c, h, w), with g of 2 or more")
    *lead, _, channels, height, width = inputs.shape
    cut = inputs.reshape(*lead, side, side, channels, height, width)
    return cut.movedim((-5, -4), (-4, -2)).reshape(*lead, channels, side * height, side * width)


def cell_energy(maps: Float[Tensor, "... h w"], *, cells: int = 2) -> Float[Tensor, "... cells"]:
    """The share of a map's energy in each cell of a grid of inputs.

    **Arguments**

    - `maps`: `(..., h, w)`, of an input of `grid_of`. Negative values count as 0. A map keeps its own size: a position that
      lies in two cells counts in each by its area.
    - `cells`: the number of cells along each side, g.

    **Returns** `(..., g*g)`, row by row, float32 or wider. It is NaN for a map that is nowhere positive or not finite.

    **Raises** `CamError` if there are not two cells or more along a side.

    >>> import torch
    >>> cell_energy(torch.tensor([[3.0, 0.0, 1.0]] * 3)).tolist()
    [0.375, 0.125, 0.375, 0.125]

    Böhle et al., Convolutional Dynamic Alignment Networks, CVPR 2021 (arXiv 2104.00032), section 4.2.
    """
    if not is_count(cells, 2):
        raise CamError(f"cells={cells!r} must be an int of 2 or more along each side")
    energy = rectified(rows(maps, 2)).reshape(maps.shape)
    fine = energy.repeat_interleave(cells, -2).repeat_interleave(cells, -1)
    *lead, height, width = energy.shape
    parts = fine.reshape(*lead, cells, height, cells, width).sum((-3, -1)).flatten(-2)
    return parts / parts.sum(-1, keepdim=True)


def grid_pointing_game(maps: Float[Tensor, "..."], cell: Int[Tensor, "..."], *, cells: int = 2) -> Float[Tensor, "..."]:
    """The grid pointing game: the share of a map's energy in the cell of its class. Higher is better; chance is `1 / g^2`.

    The grid has inputs of different classes (`grid_of`), and the map is that of the class of one cell. A map that does not
    depend on the class scores chance, however well it lies on objects.

    **Arguments**

    - `maps`, `cells`: as in `cell_energy`. Give raw maps: min-max normalization adds an offset.
    - `cell`: the number of the right cell of each map, row by row, from 0: an integer tensor of the maps' leading axes.

    **Returns** the leading axes, float32 or wider. It is NaN for a map that is nowhere positive or not finite.

    **Raises** `CamError` if `cell` has another shape, or no cell has this number.

    >>> import torch
    >>> grid_pointing_game(torch.tensor([[[3.0, 1.0], [0.0, 0.0]]]), torch.tensor([0]))
    tensor([0.7500])

    Böhle et al., Convolutional Dynamic Alignment Networks, CVPR 2021 (arXiv 2104.00032), section 4.2.
    """
    energy = cell_energy(maps, cells=cells)
    if cell.shape != energy.shape[:-1]:
        raise CamError(f"cell has shape {tuple(cell.shape)}, and the maps need {tuple(energy.shape[:-1])}: a cell for each map")
    if not _compat.transformed() and bool(((cell < 0) | (cell >= cells**2)).any()):
        raise CamError(f"cell must number the {cells**2} cells from 0; found {int(cell.min())} to {int(cell.max())}")
    return energy.gather(-1, cell.to(energy.device).long()[..., None])[..., 0]


class DiFull(nn.Module):
    """A network that sees each cell of a grid apart, so that only one cell can have caused a logit.

        logits[i * classes + k] = head_k(A_i),   A_i = features(cell i),   grid = the tiled A_i

    On a plain grid, evidence for a class can lie in any cell. Here it lies in one: no other cell changes the logit. Explain the
    layer `grid` with the target `cell * classes + class`, and measure the maps with `grid_pointing_game`. A method that scores
    1 gives no weight to what cannot matter.

    The two parts are a network cut in two at the layer to explain. A softmax over the logits is one over all classes of all
    cells.

    **Arguments**

    - `features`: a module from inputs `(b, c, h, w)` to activations `(b, channels, fh, fw)`.
    - `head`: a module from these to logits `(b, classes)`.
    - `cells`: the number of cells along each side, g.

    **Returns** a module from grids `(n, c, g*h, g*w)`, as of `grid_of`, to logits `(n, g*g * classes)`, cells row by row. Its
    layer `grid` has shape `(n, channels, g*fh, g*fw)`. It is in eval mode if both parts are.

    **Raises** `CamError` if there are not two cells or more along a side, the grid has no whole cells, or a part returns
    anything but a tensor of these axes.

    >>> import torch, camfn
    >>> from camfn import demo, metrics
    >>> network = demo.network()
    >>> apart = metrics.DiFull(network[:3], network[3:])
    >>> x = torch.stack([demo.preprocess(demo.scene(seed).image) for seed in range(4)])
    >>> classes = torch.tensor([[demo.scene(cell).classes[0] + 8 * cell for cell in range(4)]])
    >>> maps = camfn.hires_cam(apart, "grid", metrics.grid_of(x[None]), classes, normalize=False)
    >>> metrics.grid_pointing_game(maps, torch.arange(4)[None])
    tensor([[1., 1., 1., 1.]])

    Rao et al., Towards Better Understanding Attribution Methods, CVPR 2022 (arXiv 2205.10435), section 3.
    """

    def __init__(self, features: nn.Module, head: nn.Module, *, cells: int = 2) -> None:
        super().__init__()
        if not is_count(cells, 2):
            raise CamError(f"cells={cells!r} must be an int of 2 or more along each side")
        self.features, self.head, self.grid, self.cells = features, head, nn.Identity(), cells
        self.training = self.grid.training = features.training or head.training  # the parts' own modes stay

    def forward(self, x: Float[Tensor, "n c gh gw"]) -> Float[Tensor, "n logits"]:
        found = _tensor(self.features(_apart(x, self.cells)), "features", 4)
        grid = self.grid(grid_of(found.unflatten(0, (len(x), self.cells**2))))
        return _tensor(self.head(_apart(grid, self.cells)), "head", 2).unflatten(0, (len(x), self.cells**2)).flatten(1)


def _tensor(output: Any, name: str, ndim: int) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != ndim:
        kind = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise CamError(f"{name} returns {kind}: DiFull needs a tensor with {ndim} axes")
    return output


def _apart(grid: Float[Tensor, "n c gh gw"], cells: int) -> Float[Tensor, "m c h w"]:
    """The cells of grids as a batch, the inverse of `grid_of`."""
    if grid.ndim != 4 or any(side % cells for side in grid.shape[2:]):
        raise CamError(f"the grid has shape {tuple(grid.shape)}: it must be (n, c, h, w), of {cells} x {cells} whole cells")
    count, channels, *size = grid.shape
    height, width = (side // cells for side in size)
    cut = grid.reshape(count, channels, cells, height, cells, width)
    return cut.movedim((2, 4), (1, 2)).reshape(-1, channels, height, width)

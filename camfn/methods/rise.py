"""RISE, which uses no layer, only the scores of masked inputs."""

import torch
from torch import nn

from camfn import layouts
from camfn._errors import CamError
from camfn._types import Inputs, Layers, Layout, Size, State, Target, wide
from camfn.formulas import maps, noise
from camfn.formulas.masks import Variation
from camfn.methods._common import Drawing, check_noise, checked_size, drawn, explained, with_sweep, without_layer
from camfn.methods.registry import Cost, Need, Outcome, method
from camfn.model.forward import look, without_graph
from camfn.model.inputs import Key
from camfn.sweep.options import Sweep
from camfn.sweep.scoring import sweep_in_full
from camfn.targets import as_probabilities


@method(maps.rise, (Need.MASKED_INPUTS,), Cost(masked=4000))
def rise(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    num_samples: int = 4000,
    cells: int = 7,
    probability: float = 0.5,
    seed: int | torch.Generator = 0,
    masked: Key = None,
    sweep: Sweep = Sweep(),
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """RISE: average random masks, each weighted by the score of the input masked with it.

    `L = sum_i s(x * M_i) M_i / (N p)` over N random masks.

    A mask starts as a grid of `cells` cells along each axis. Each cell is 1 with probability p and 0 otherwise. Linear
    upsampling stretches the grid to `cells + 1` cell widths, and a crop at a random position has the input's size. The method
    uses no layer, so it can serve as a reference for those that do. The cost is N forward passes, for any number of targets.
    The masks are generated in chunks, so few of them are in memory at the input's size.

    An integer target means the probability of that class, as in the paper. Use `camfn.targets.logit(c)` for the raw
    output.

    **Arguments**

    - `layer`: must be `None`.
    - `num_samples`: N. The defaults are the paper's for VGG-16. The paper uses N = 8000 for ResNet-50, and its code
      `cells=8, probability=0.1`.
    - `cells`: the number of cells along each axis.
    - `probability`: p.
    - `seed`: an int, or a `torch.Generator`, which is copied and not advanced. The i-th mask depends on nothing else. All
      images share it, on every device.
    - `size`: the size of the map. `None` means the input's size.
    - `layout`: has no effect.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`. `sweep` must not set a dtype.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.rise(model, None, torch.randn(2, 3, 8, 8), num_samples=100).shape
    torch.Size([2, 8, 8])

    Petsiuk et al., RISE: Randomized Input Sampling for Explanation of Black-box Models, BMVC 2018 (arXiv 1806.07421).
    """
    without_layer("rise", layer)
    check_noise("rise", num_samples, 0.0, seed)
    if not isinstance(cells, int) or cells < 1 or not 0 < probability <= 1:
        raise CamError(f"rise needs a whole number of cells >= 1 and a probability in (0, 1]; found {cells!r}, {probability!r}")
    forward = look(model, None, x, state, masked, axes, masks=True, taps=False)
    with without_graph(x, state):
        image, spatial = forward.image, tuple(forward.image.shape[2:])
        checked_size(size, forward.batch, len(spatial))
        found = explained(forward, as_probabilities(target), Drawing(relu, size, normalize, layout, axes))
        drawn_cells, shifts = noise.rise(seed, num_samples, cells, spatial, probability)
        some = drawn_cells.to(image.device, wide(image.dtype))
        rows = layouts.read(some.expand(forward.n, *some.shape), "channels_first", spatial, "", forward.n)
        (swept,) = sweep_in_full("rise", forward, found.score, [rows], Variation(form="shifted", shifts=shifts), sweep)
        summed = maps.rise(swept.scores, some, shifts.to(image.device), spatial, probability)
        return with_sweep(drawn(found, [summed], [spatial]), [swept])

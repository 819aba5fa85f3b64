"""Targets for segmentation models: a class's logits over the pixels of a mask."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from camfn import _compat
from camfn._axes import Axes, checked_axes
from camfn._errors import CamError
from camfn._types import Target, wide
from camfn.targets.algebra import Named
from camfn.targets.classes import resolve_classes
from camfn.targets.outputs import logits_of, other_targets
from camfn.targets.scores import Clean, Kind, Score, read_logits, tensor_of

Reduce = Literal["mean", "sum"]


@dataclasses.dataclass(frozen=True)
class Segmentation(Named):
    """The logits of a class over the pixels of a mask."""

    mask: Any
    classes: Any
    reduce: Reduce
    axes: str | None

    def resolve(self, clean: Clean) -> Score:
        """Find the classes and masks. The rows are the classes `(n, t)` and masks `(n, t, *grid)` or `(n, 1, *grid)`."""
        clean.refuse_probabilities("targets.segmentation")
        y = clean.tensor(logits_of)
        if self.axes is not None:
            y = checked_axes(self.axes, y.ndim, "the output").first(y)
        if y.ndim < 3 or y.shape[0] != clean.n:
            raise CamError(
                f"targets.segmentation wants logits (n={clean.n}, classes, *grid), and the model's have shape {tuple(y.shape)}"
                f"{other_targets(clean.output) if y.ndim < 3 else ''}"
            )
        best, dtype = y.detach().argmax(1, keepdim=True), wide(y.dtype)
        masks = None if self.mask is None else _masks(self.mask, clean.n, y.shape[2:], y.device, dtype)
        votes = torch.ones_like(best, dtype=dtype) if masks is None else masks
        counts = torch.zeros(y.shape[:2], dtype=dtype, device=y.device).scatter_add(1, best.flatten(1), votes.flatten(1))
        classes, single = resolve_classes(self.classes, counts, clean.n)
        if masks is None:
            there = best == classes.reshape(*classes.shape, *[1] * (y.ndim - 2)) if y.shape[1] > 1 else y > 0
            masks = there.to(dtype)
            if not _compat.transformed() and not bool(masks.flatten(2).any(-1).all()):
                image, t = (~masks.flatten(2).any(-1)).nonzero()[0].tolist()
                raise CamError(f"class {int(classes[image, t])} is predicted nowhere on image {image}: pass a mask=")
        kind = Kind(read_logits, _of_segmentation, _names_of_segmentation, (self.reduce, self.axes), clean.way)
        return Score(kind, (classes, masks), single, classes)


def segmentation(mask: Any = None, c: Any = None, *, reduce: Reduce = "mean", axes: str | None = None) -> Target:
    """The mean logit of class `c` over the pixels of a mask.

        sum_p m_p y_cp / sum_p m_p

    - `mask`: `(*grid)` for all images, `(n, *grid)`, or n masks, one per image. Values are booleans or weights in [0, 1]. A
      mask of another size is averaged down to the output's grid; its aspect ratio must be that of the grid. `None` takes the
      pixels at which the clean output predicts `c` (for a single channel: at which it is positive).
    - `c`: the class; see `logit`. `None` is the class predicted at most pixels of the mask. Several classes, as with
      `top(k)`, share a given mask.
    - `reduce`: `"mean"`, or `"sum"` for the sum without the division. Gradient methods give the same normalized map for
      both. Methods that take a softmax over scores, such as Score-CAM, need the mean: the softmax of sums over thousands of
      pixels gives one channel all the weight.
    - `axes`: the order of the axes of the logits, such as `"nhwc"`; the letters are those of `camfn.score_cam`. `None` is
      `(n, classes, *grid)`. Masks have the order t, d, h, w.

    Raises `CamError` if `reduce` or `axes` is invalid, or later if `axes` does not fit the logits, or if the mask is empty, not
    in [0, 1], or of another shape than the grid.

    Vinogradova et al., Seg-Grad-CAM, AAAI 2020 (arXiv 2002.11434), use the sum, and so does pytorch-grad-cam.

    >>> import camfn, torch
    >>> y = torch.tensor([[[[1.0, 3.0]], [[0.0, 2.0]]]])
    >>> target = camfn.targets.segmentation(torch.tensor([[True, True]]), 1)
    >>> score = camfn.targets.resolve(target, y, 1, y.device)
    >>> camfn.targets.score_rows(score.of, y, score.rows)
    tensor([[1.]])
    """
    if reduce not in ("mean", "sum"):
        raise CamError(f'targets.segmentation with reduce={reduce!r}: it must be "mean" or "sum"')
    if axes is not None:
        checked_axes(axes, len(str(axes)), "the output")
    return Segmentation(mask, c, reduce, axes)


# ------------------------------------------------------------------------------------------------------- the masks


def _masks(given: Any, n: int, grid: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the masks of all images at the output's grid, `(n, 1, *grid)`."""
    axes = len(grid)
    if isinstance(given, (list, tuple)):
        each = [tensor_of(mask, "mask").to(device) for mask in given]
        wrong = len(each) != n or any(mask.ndim != axes for mask in each)
        found = f"{len(each)} masks of shapes {[tuple(mask.shape) for mask in each]}"
    else:
        mask = tensor_of(given, "mask").to(device)
        wrong = mask.ndim not in (axes, axes + 1) or (mask.ndim == axes + 1 and mask.shape[0] != n)
        each, found = [mask] if mask.ndim == axes else mask.unbind(0) if mask.ndim else [], f"shape {tuple(mask.shape)}"
    if wrong:
        raise CamError(
            f"targets.segmentation wants a mask with {axes} axes, like the output's grid {tuple(grid)}, or n={n} of them; "
            f"found {found}"
        )
    _check_masks(each)
    return torch.stack([_at_grid(mask.to(dtype), grid) for mask in each]).expand(n, *grid)[:, None].contiguous()


def _check_masks(masks: Sequence[Tensor]) -> None:
    if _compat.transformed():
        return
    for image, mask in enumerate(masks):
        if not bool(((mask >= 0) & (mask <= 1)).all()):  # NaN is neither
            raise CamError(
                f"mask {image} has values from {float(mask.min()):g} to {float(mask.max()):g}: a mask is boolean or has "
                "weights in [0, 1] (from a label map: labels == c)"
            )
        if not bool(mask.any()):
            raise CamError(f"mask {image} is empty: no pixel is marked")


def _at_grid(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """Average a mask over each cell of the grid."""
    if mask.shape == tuple(grid):
        return mask
    ratios = [cells / pixels for cells, pixels in zip(grid, mask.shape)]
    if any(abs(ratio * pixels - cells) >= 1 for ratio in ratios for cells, pixels in zip(grid, mask.shape)):
        raise CamError(
            f"the mask's size {tuple(mask.shape)} and the output's grid {tuple(grid)} differ in shape: crop and resize the "
            "mask as the input was"
        )
    return F.interpolate(mask[None, None], size=tuple(grid), mode="area")[0, 0]


def _of_segmentation(reduce: Reduce, axes: str | None, y: Tensor, row: tuple[Tensor, Tensor]) -> Tensor:
    classes, masks = row
    y = y if axes is None else Axes(axes).first(y[None])[0]
    if masks.shape[1:] != y.shape[1:]:  # the input may be a resized one, as in CAMERAS
        masks = F.interpolate(masks[None], size=y.shape[1:], mode="area")[0]
    scores = (y.to(wide(y.dtype)).index_select(0, classes) * masks).flatten(1).sum(1)
    return scores / masks.flatten(1).sum(1) if reduce == "mean" else scores


def _names_of_segmentation(reduce: Reduce, axes: str | None, row: tuple[Tensor, Tensor]) -> list[str]:
    classes, masks = row
    pixels = masks.flatten(1).sum(1).expand(len(classes)).tolist()
    return [f"{reduce} of logit {c} over {size:.4g} pixels" for c, size in zip(classes.tolist(), pixels)]

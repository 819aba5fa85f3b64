"""Metrics of localization: how well a map lies on the object. Functions of tensors.

The object has a mask. Boxes become masks by `boxes_to_masks`; `camfn.metrics.boxes` judges the boxes that a map gives.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from camfn._errors import CamError
from camfn.metrics.pixels import known_of, known_where, on_pixels, ranks, rectified
from camfn.metrics.scoring import is_count


def energy_pointing_game(
    maps: Float[Tensor, "..."], masks: Bool[Tensor, "..."], *, spatial_ndim: int = 2
) -> Float[Tensor, "..."]:
    """The energy-based pointing game: the share of a map's energy that lies inside the object, from 0 to 1. Higher is better.

        sum_(p in mask) L_p / sum_p L_p

    **Arguments**

    - `maps`: `(..., *grid)`, resized to the masks' size (multilinear). Negative values count as 0. The scale of a map does
      not matter, but an offset does, and min-max normalization adds one: give raw maps (`relu=False, normalize=False`).
    - `masks`: bools `(..., *size)` with the same leading axes, true inside the object (the paper uses its bounding box).
    - `spatial_ndim`: the number of spatial axes, which come last.

    **Returns** `(...)`, float32 or wider. The value is NaN if a map is nowhere positive or not finite, or a mask is empty.
    For a constant map it is the object's share of the picture, which is the baseline.

    **Raises** `CamError` if the masks are not bools or the leading axes differ.

    >>> import torch
    >>> left = torch.tensor([[True, True, False, False]] * 4)
    >>> energy_pointing_game(torch.tensor([[3.0, 1.0]]), left)
    tensor(0.6875)

    Wang et al., Score-CAM, CVPR workshops 2020 (arXiv 1910.01279), section 4.3.
    """
    energy, inside = on_pixels(maps, masks, spatial_ndim)
    energy = rectified(energy)
    return known_where(inside.any(-1), (energy * inside).sum(-1) / energy.sum(-1))


def pointing_game(
    maps: Float[Tensor, "..."], masks: Bool[Tensor, "..."], *, tolerance: int = 0, spatial_ndim: int = 2
) -> Float[Tensor, "..."]:
    """The pointing game: 1 if the map's maximum is on the object, else 0. The mean over images is the accuracy.

    **Arguments**

    - `maps`, `masks`, `spatial_ndim`: as in `energy_pointing_game`. Raw and normalized maps have the same maximum.
    - `tolerance`: the number of pixels beyond the object, along each axis, that still count as a hit (the paper uses a circle
      of 15).

    **Returns** `(...)`, float32 or wider. If several pixels share the maximum, the value is the share of them that are hits.
    A flat map therefore scores like a random pixel. The value is NaN if a mask is empty or a map is not finite.

    **Raises** `CamError` as `energy_pointing_game` does, or if the tolerance is negative.

    >>> import torch
    >>> left = torch.tensor([[True, True, False, False]] * 4)
    >>> pointing_game(torch.tensor([[3.0, 1.0]]), left), pointing_game(torch.zeros(1, 2), left)
    (tensor(1.), tensor(0.5000))

    Zhang et al., Top-down Neural Attention by Excitation Backprop, 2016 (arXiv 1608.00507), section 4.1.
    """
    if not is_count(tolerance, 0):
        raise CamError(f"tolerance={tolerance!r} must be an integer number of pixels, 0 or more")
    values, inside = on_pixels(maps, masks, spatial_ndim, tolerance, compared=True)
    highest = (values == values.amax(-1, keepdim=True)).to(values.dtype)
    return known_where(inside.any(-1), (highest * inside).sum(-1) / highest.sum(-1))


def pixel_auc(maps: Float[Tensor, "..."], masks: Bool[Tensor, "..."], *, spatial_ndim: int = 2) -> Float[Tensor, "..."]:
    """The pixel AUC: the probability that a pixel of the object has a higher value than one outside. Higher is better.

        P(L_p > L_q) + P(L_p = L_q) / 2   for p in the mask and q outside

    It is the area under the ROC curve, by the statistic of Mann and Whitney. Only the order of values matters. A map that is
    high where objects tend to be scores well without any class: compare with `controls.centered_gaussian`.

    **Arguments**

    - `maps`, `masks`, `spatial_ndim`: as in `energy_pointing_game`. Negative values count as they are.

    **Returns** `(...)`, float32 or wider, from 0 to 1. It is 1/2 for a flat map, and NaN if a mask is empty or covers the
    picture, or a map is not finite.

    **Raises** `CamError` as `energy_pointing_game` does.

    >>> import torch
    >>> mask = torch.tensor([[True, False, False]])
    >>> pixel_auc(torch.tensor([[2.0, 2.0, 1.0]]), mask), pixel_auc(torch.zeros(1, 3), mask)
    (tensor(0.7500), tensor(0.5000))

    Fawcett, An introduction to ROC analysis, 2006 (doi 10.1016/j.patrec.2005.10.010), section 7.
    """
    values, inside = on_pixels(maps, masks, spatial_ndim, compared=True)
    count = inside.sum(-1).double()
    pairs = count * (~inside).sum(-1)
    above = (ranks(values) * inside).sum(-1) - count * (count + 1) / 2
    return known_of(known_where(pairs > 0, above / pairs), values).to(values.dtype)


def iou(
    maps: Float[Tensor, "..."], masks: Bool[Tensor, "..."], *, threshold: float = 0.5, spatial_ndim: int = 2
) -> Float[Tensor, "..."]:
    """The intersection over union of the object and the pixels above a share of the map's maximum. Higher is better.

        |{p: L_p > threshold * max L} & mask| / |{...} | mask|

    The best threshold differs greatly between methods. A fixed one compares ranges of values rather than places: choose it
    for each method over the data, as `max_box_acc` does.

    **Arguments**

    - `maps`, `masks`, `spatial_ndim`: as in `energy_pointing_game`.
    - `threshold`: a share of the map's maximum, from 0 to less than 1.

    **Returns** `(...)`, float32 or wider, from 0 to 1. A map that is nowhere positive has no pixels above, and scores 0. A
    constant one has them all. The value is NaN if a mask is empty or a map is not finite.

    **Raises** `CamError` as `energy_pointing_game` does, or if the threshold is out of range.

    >>> import torch
    >>> iou(torch.tensor([[1.0, 3.0, 4.0]]), torch.tensor([[True, True, False]]))
    tensor(0.3333)

    Everingham et al., The Pascal visual object classes, 2010 (doi 10.1007/s11263-009-0275-4), section 4.2.
    """
    if not 0 <= threshold < 1:
        raise CamError(f"threshold={threshold!r} must be a share of the map's maximum, from 0 to less than 1")
    values, inside = on_pixels(maps, masks, spatial_ndim, compared=True)
    above = values > threshold * values.amax(-1, keepdim=True)
    shared, either = (above & inside).sum(-1), (above | inside).sum(-1)
    return known_of(known_where(inside.any(-1), shared.to(values.dtype) / either), values)

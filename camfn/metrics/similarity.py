"""How alike two maps are: by the order of their values, and by their structure. Functions of tensors."""

from jaxtyping import Float
from torch import Tensor

from camfn._errors import CamError
from camfn._types import wide
from camfn.formulas.resampling import blur
from camfn.formulas.scaling import normalize
from camfn.metrics.pixels import correlation, known_of, ranks, rows

_WINDOW = (11, 1.5)
"""The width and deviation of the window of SSIM, in positions."""
_STEADY = (0.01**2, 0.03**2)
"""The two constants of SSIM, for values in [0, 1]."""


def rank_correlation(a: Float[Tensor, "..."], b: Float[Tensor, "..."], *, spatial_ndim: int = 2) -> Float[Tensor, "..."]:
    """Spearman's rank correlation of two maps: 1 if they order positions alike, -1 if in reverse. Equal values share a rank.

    For the maps of two classes, of a network and one with a permuted classifier, or before and after its weights are drawn
    anew, lower is better: a map that stays the same does not depend on what was changed.

    **Arguments**

    - `a`, `b`: `(..., *grid)`, of the same shape. Any rescaling that keeps the order, such as min-max, changes nothing. A
      ReLU changes the order: give raw maps (`relu=False`).
    - `spatial_ndim`: the number of spatial axes, which come last.

    **Returns** `(...)`, float32 or wider. Two flat maps are equal, and give 1. A flat map and another give 0.
    The value is NaN if one of the maps is not finite.

    **Raises** `CamError` if the shapes differ, or the maps are not floating-point.

    >>> import torch
    >>> rank_correlation(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.0, 0.5, 9.0]]))
    tensor(1.)

    Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018 (arXiv 1810.03292), section 3.
    """
    one, other = _pair(a, b, spatial_ndim)
    return known_of(correlation(ranks(one), ranks(other)), one, other).to(wide(a.dtype))


def ssim(a: Float[Tensor, "..."], b: Float[Tensor, "..."], *, spatial_ndim: int = 2) -> Float[Tensor, "..."]:
    """The structural similarity of two maps, each scaled to [0, 1] by min-max: 1 if they are equal then.

        mean over windows of (2 m_a m_b + c_1)(2 s_ab + c_2) / ((m_a^2 + m_b^2 + c_1)(s_a^2 + s_b^2 + c_2))

    The window is a Gaussian of 11 positions with a deviation of 1.5, mirrored at the border; `c = (0.01^2, 0.03^2)`.
    SSIM depends on the size of the maps: compare maps of one size.

    **Arguments**

    - `a`, `b`, `spatial_ndim`: as in `rank_correlation`.

    **Returns** `(...)`, float32 or wider, from -1 to 1. A flat map counts as zeros. The value is NaN if one of the
    maps is not finite.

    **Raises** `CamError` as `rank_correlation` does.

    >>> import torch
    >>> ramp = torch.arange(6.0)[None].expand(6, 6)
    >>> ssim(ramp, 2 * ramp + 1), ssim(ramp, -ramp) < 0
    (tensor(1.), tensor(True))

    Wang et al., Image Quality Assessment, IEEE TIP 2004 (doi 10.1109/TIP.2003.819861), section III.B.
    """
    flat = (normalize(row).reshape(a.shape) for row in _pair(a, b, spatial_ndim))
    one, other = (values.double() for values in flat)  # a variance is a small difference of squares
    mean_a, mean_b, square_a, square_b, product = (
        blur(values, *_WINDOW, spatial_ndim) for values in (one, other, one * one, other * other, one * other)
    )
    spread = square_a - mean_a**2 + square_b - mean_b**2
    luminance = (2 * mean_a * mean_b + _STEADY[0]) / (mean_a**2 + mean_b**2 + _STEADY[0])
    structure = (2 * (product - mean_a * mean_b) + _STEADY[1]) / (spread + _STEADY[1])
    return (luminance * structure).flatten(-spatial_ndim).mean(-1).to(wide(a.dtype))


def _pair(a: Tensor, b: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape:
        raise CamError(f"the maps have shapes {tuple(a.shape)} and {tuple(b.shape)}: they must be the same")
    return rows(a, axes), rows(b, axes)

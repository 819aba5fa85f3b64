"""`maps` and `weights` against closed forms."""

import pytest
import torch
from torch.autograd import gradcheck

from camfn import CamError, maps, weights
from tests.oracles.closeness import assert_close, close


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_flat_up_to_rounding_becomes_zeros_in_any_dtype(dtype):
    one = torch.tensor(0.6, dtype=dtype)
    below = (
        torch.nextafter(one.float(), torch.tensor(0.0)) if dtype == torch.float32 else one * (1 - torch.finfo(dtype).eps / 2)
    )
    flat = torch.stack([one, one, below.to(dtype)])
    assert maps.normalize(flat).tolist() == [0, 0, 0]
    assert maps.normalize(torch.zeros(3, dtype=dtype)).tolist() == [0, 0, 0]
    small = torch.tensor([0, 1, 2], dtype=dtype) * torch.finfo(dtype).tiny
    assert maps.normalize(small).tolist() == [0, 0.5, 1], "a small range is a range: no epsilon in the denominator"


def test_normalize_is_over_the_axes_given():
    m = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    low, high = m.amin((-2, -1), keepdim=True), m.amax((-2, -1), keepdim=True)
    close(maps.normalize(m, (-2, -1)), (m - low) / (high - low))


def test_normalize_differentiates_where_it_is_flat_too():
    m = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(maps.normalize(m).square().sum(), m)
    assert torch.isfinite(gradient).all()
    assert gradcheck(maps.normalize, torch.tensor([[1.0, 3.0, 2.2]], dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_combine_sums_in_float32(dtype):
    w, a = torch.full((1, 1, 4096), 1 / 4096, dtype=dtype), torch.ones(1, 4096, 3, dtype=dtype)
    assert maps.combine(w, a).dtype == torch.float32
    assert_close(maps.combine(w, a), torch.ones(1, 1, 3), 1e-6)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_resize_is_separable_linear_interpolation(dims):
    ramp = torch.arange(4.0, dtype=torch.float64)
    grid = sum(ramp.reshape(*(4 if i == j else 1 for j in range(dims))) * 10**i for i in range(dims))
    up = maps.resize(grid[None], (8,) * dims)[0]
    at = ((torch.arange(8, dtype=torch.float64) + 0.5) / 2 - 0.5).clamp(0, 3)  # half-pixel centres
    expected = sum(at.reshape(*(8 if i == j else 1 for j in range(dims))) * 10**i for i in range(dims))
    close(up, expected)
    assert maps.resize(grid, (4,) * dims) is grid


def test_resize_refuses_four_axes():
    with pytest.raises(CamError, match=r"size has 4 axes, maps have shape \(1, 2, 2, 2, 2\)"):
        maps.resize(torch.zeros(1, 2, 2, 2, 2), (4, 4, 4, 4))


def test_fuse_is_the_maximum_after_resizing_to_the_largest_side_of_each_axis():
    a, b = torch.rand(2, 4, 3, dtype=torch.float64), torch.rand(2, 2, 6, dtype=torch.float64)
    expected = torch.maximum(maps.resize(a, (4, 6)), maps.resize(b, (4, 6)))
    assert_close(maps.fuse([a, b]), expected, 0)
    assert_close(maps.fuse((b, a)), expected, 0)
    assert_close(maps.fuse([a, b], (5, 5)), torch.maximum(maps.resize(a, (5, 5)), maps.resize(b, (5, 5))), 0)
    several = maps.fuse([torch.stack([a, a], 1), torch.stack([b, a.mT.reshape(2, 2, 6)], 1)])
    close(several[:, 0], expected)
    assert_close(maps.fuse([a]), a, 0)


def test_weights():
    scores = torch.randn(2, 5, 3, dtype=torch.float64)
    w = weights.score_cam(scores)
    assert w.shape == (2, 3, 5)
    close(w.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    close(w[1, 2], torch.exp(scores[1, :, 2]) / torch.exp(scores[1, :, 2]).sum())
    assert_close(weights.score_cam(scores, "score"), scores.mT, 0)


def test_effective_channels():
    from camfn.formulas.diagnostics import about_weights, effective_channels

    w = torch.tensor([[[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]])
    assert_close(effective_channels(w), torch.tensor([[4.0, 1.0]]), 1e-6)
    assert "nearly equal" in about_weights((w[:, :1],), ("layer",))[0].sentence
    assert "one channel at layer 'layer' has 100% of the weight" in about_weights((w[:, 1:],), ("layer",))[0].sentence
    assert about_weights((torch.tensor([[[0.6, 0.3, 0.1]]]),), ("layer",)) == ()

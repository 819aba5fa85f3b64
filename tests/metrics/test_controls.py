"""The controls: closed forms, and what all of them keep to."""

import math

import numpy as np
import pytest
import torch

import camfn
from camfn import CamError, metrics


def inputs(*size: int, n: int = 3) -> torch.Tensor:
    return torch.rand(n, 2, *size, generator=torch.Generator().manual_seed(0))


def test_controls_are_functions_and_methods():
    assert [*metrics.CONTROLS] == ["centered_gaussian", "random_pixels", "input_edges", "all_ones"]
    assert set(metrics.CONTROL_METHODS) <= set(camfn.METHODS)


@pytest.mark.parametrize("name", metrics.CONTROLS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_controls_have_one_signature(name, axes):
    control, x, grid = metrics.CONTROLS[name], inputs(*(8, 6, 5)[:axes]), (4, 3, 2)[:axes]
    maps = control(x, grid, 0)
    assert maps.shape == (3, *grid)
    assert maps.dtype == torch.float32
    assert (maps >= 0).all()
    assert torch.equal(maps, control(x, grid, 0))
    assert torch.equal(control(x[:2], grid, 0), maps[:2])  # whatever is beside it
    assert control(x.double(), grid, 0).dtype == torch.float64
    assert torch.equal(control(x, grid, 1), maps) == (name != "random_pixels")


def test_a_gaussian_in_the_middle():
    map = metrics.centered_gaussian(inputs(8, 8).double(), (3, 5), 0)[0]
    for r in range(3):
        for c in range(5):
            y, x = (r + 0.5) / 3 - 0.5, (c + 0.5) / 5 - 0.5
            assert float(map[r, c]) == pytest.approx(math.exp(-(y * y + x * x) / (2 * 0.25**2)), abs=1e-12)


def test_edges_are_those_of_sobels_filters():
    x = inputs(6, 7).double()
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    expected = torch.zeros(3, 6, 7, dtype=torch.float64)
    for i in range(3):
        for r in range(6):
            for c in range(7):
                near = padded[i, :, r : r + 3, c : c + 3]
                expected[i, r, c] = ((near * sobel).sum((1, 2)) ** 2 + (near * sobel.T).sum((1, 2)) ** 2).sum().sqrt()
    assert torch.allclose(metrics.input_edges(x, (6, 7), 0), expected)
    cells = expected.reshape(3, 2, 3, 1, 7).mean((2, 4))
    assert torch.allclose(metrics.input_edges(x, (2, 1), 0), cells)
    assert metrics.input_edges(torch.ones(1, 3, 5, 5), (5, 5), 0).sum() == 0


def test_random_pixels_are_uniform_and_leave_the_global_state():
    before = torch.get_rng_state()
    maps = metrics.random_pixels(inputs(4, 4), (100, 100), 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(maps[0], maps[1])
    assert float(maps.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(maps.std()) == pytest.approx(1 / math.sqrt(12), abs=0.01)


@pytest.mark.parametrize("name", metrics.CONTROLS)
def test_a_grid_is_a_sequence(name):
    with pytest.raises(CamError, match="grid=7 must be a sequence of sides"):
        metrics.CONTROLS[name](inputs(8, 8), 7, 0)
    for grid in ((2.5, 3), (True, 3), (0, 3)):
        with pytest.raises(CamError, match="must have sides that are ints of 1 or more"):
            metrics.CONTROLS[name](inputs(8, 8), grid, 0)
    assert metrics.CONTROLS[name](inputs(8, 8), np.array([2, 3]), 0).shape == (3, 2, 3)


def test_a_grid_has_the_axes_of_the_input():
    with pytest.raises(CamError, match=r"grid=\(4,\) has 1 axes, and the input \(3, 2, 8, 8\) has 2 spatial ones"):
        metrics.input_edges(inputs(8, 8), (4,), 0)

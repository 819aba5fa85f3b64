"""Grids against loops, and a network that sees each cell apart against closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import camfn
from camfn import CamError, metrics

RAW = {"relu": False, "normalize": False}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("side", [2, 3])
def test_a_grid_has_its_inputs_row_by_row(side):
    inputs = random(2, side * side, 3, 4, 5)
    grid = metrics.grid_of(inputs)
    assert grid.shape == (2, 3, side * 4, side * 5)
    for cell in range(side * side):
        row, column = divmod(cell, side)
        assert torch.equal(grid[:, :, row * 4 : row * 4 + 4, column * 5 : column * 5 + 5], inputs[:, cell])


@given(seed=st.integers(0, 999), height=st.integers(1, 8), width=st.integers(1, 8), cells=st.integers(2, 3))
@settings(max_examples=30, deadline=None)
def test_a_position_counts_in_each_cell_by_its_area(seed, height, width, cells):
    map = random(height, width, seed=seed) - 0.2
    expected = [0.0] * cells**2
    for y in range(height):
        for x in range(width):
            for row in range(cells):
                for column in range(cells):
                    tall = min((y + 1) / height, (row + 1) / cells) - max(y / height, row / cells)
                    wide = min((x + 1) / width, (column + 1) / cells) - max(x / width, column / cells)
                    area = max(0.0, tall) * max(0.0, wide)
                    expected[row * cells + column] += area * max(0.0, float(map[y, x]))
    found = metrics.cell_energy(map, cells=cells)
    total = sum(expected)
    if total == 0:
        assert found.isnan().all()
    else:
        assert found.tolist() == pytest.approx([part / total for part in expected], abs=1e-12)


def test_a_flat_map_scores_chance_and_none_is_not_a_number():
    assert metrics.grid_pointing_game(torch.ones(1, 7, 7), torch.tensor([3])) == 0.25
    assert metrics.grid_pointing_game(torch.ones(1, 7, 7), torch.tensor([8]), cells=3) == pytest.approx(1 / 9)
    assert metrics.grid_pointing_game(-torch.ones(1, 7, 7), torch.tensor([3])).isnan()


def test_what_grids_do_not_take():
    with pytest.raises(CamError, match=r"they must be \(\.\.\., g\*g, c, h, w\)"):
        metrics.grid_of(random(1, 3, 3, 4, 4))
    with pytest.raises(CamError, match=r"they must be \(\.\.\., g\*g, c, h, w\)"):
        metrics.grid_of(random(1, 3, 4, 4))
    for cells in (1, 2.5, True):
        with pytest.raises(CamError, match="must be an int of 2 or more"):
            metrics.cell_energy(random(4, 4), cells=cells)
    with pytest.raises(CamError, match=r"cell has shape \(\), and the maps need \(2,\)"):
        metrics.grid_pointing_game(random(2, 4, 4), torch.tensor(1))
    with pytest.raises(CamError, match="found 0 to 4"):
        metrics.grid_pointing_game(random(2, 4, 4), torch.tensor([0, 4]))


# ------------------------------------------------------------------------------------------------------ cells seen apart


def parts(seed: int = 0, pooled: int = 1) -> tuple[nn.Module, nn.Module]:
    """Features and a head of three classes. Padding and a batch norm would leak if cells were not apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        features = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1), nn.Tanh()
        )
        head = nn.Sequential(nn.AdaptiveAvgPool2d(pooled), nn.Flatten(), nn.Linear(4 * pooled**2, 3))
    return features.double().eval(), head.double().eval()


@pytest.mark.parametrize("cells", [2, 3])
def test_each_cell_is_seen_apart(cells):
    features, head = parts()
    inputs = random(2, cells**2, 2, 8, 6)
    apart = metrics.DiFull(features, head, cells=cells)
    seen = []
    apart.grid.register_forward_hook(lambda module, given, kept: seen.append(kept))
    logits = apart(metrics.grid_of(inputs))
    expected = torch.stack([torch.cat([head(features(each[None]))[0] for each in row]) for row in inputs])
    assert torch.allclose(logits, expected, atol=1e-12)
    assert torch.allclose(seen[0][:, :, :4, :3], features(inputs[:, 0]), atol=1e-12)
    assert seen[0].shape == (2, 4, cells * 4, cells * 3)


@pytest.mark.parametrize("name", ["hires_cam", "layer_cam", "grad_cam_elementwise"])
def test_products_with_the_gradient_leave_other_cells_out(name):
    features, head = parts(pooled=2)
    target = torch.tensor([[0, 4, 8, 10]]).expand(3, -1)
    x = metrics.grid_of(random(3, 4, 2, 8, 8))
    maps = camfn.METHODS[name].function(metrics.DiFull(features, head), "grid", x, target, **RAW)
    found = metrics.grid_pointing_game(maps, torch.arange(4).expand(3, 4))
    assert found[~found.isnan()].tolist() == pytest.approx([1.0] * int((~found.isnan()).sum()), abs=1e-9)
    assert not found.isnan().all()


def test_grad_cam_gives_other_cells_weight():
    """Its weights are means over the whole grid: in closed form a quarter of those of the cell, times each cell's channels."""
    features, head = parts()
    inputs = random(1, 4, 2, 8, 8)
    maps = camfn.grad_cam(metrics.DiFull(features, head), "grid", metrics.grid_of(inputs), torch.tensor([[4]]), **RAW)
    each = torch.stack([features(one[None])[0] for one in inputs[0]])
    weights = head[2].weight[1] / each[0, 0].numel() / 4
    expected = metrics.grid_of(torch.einsum("c,nchw->nhw", weights, each)[None, :, None])[:, 0]
    assert torch.allclose(maps[:, 0], expected, atol=1e-12)


def test_the_modes_of_the_parts_stay():
    features, head = parts()
    assert not metrics.DiFull(features, head).training
    head.train()
    assert metrics.DiFull(features, head).training
    assert head.training
    assert not features.training


def test_what_a_network_of_cells_does_not_take():
    features, head = parts()
    for cells in (1, 2.5, True):
        with pytest.raises(CamError, match=f"cells={cells} must be an int of 2 or more"):
            metrics.DiFull(features, head, cells=cells)
    for shape in ((1, 2, 8, 9), (2, 8, 8), (8,), (1, 2, 8, 8, 8)):
        with pytest.raises(CamError, match=r"the grid has shape .*: it must be \(n, c, h, w\), of 2 x 2 whole cells"):
            metrics.DiFull(features, head)(random(*shape))


class InATuple(nn.Module):
    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x):
        return (self.part(x),)


def test_parts_that_return_no_tensor_of_a_batch():
    features, head = parts()
    x = random(1, 2, 8, 8)
    with pytest.raises(CamError, match="features returns a tuple: DiFull needs a tensor with 4 axes"):
        metrics.DiFull(InATuple(features), head)(x)
    with pytest.raises(CamError, match=r"features returns a tensor of shape \(4, 3\): DiFull needs a tensor with 4 axes"):
        metrics.DiFull(nn.Sequential(features, head), head)(x)
    with pytest.raises(CamError, match="head returns a tuple: DiFull needs a tensor with 2 axes"):
        metrics.DiFull(features, InATuple(head))(x)

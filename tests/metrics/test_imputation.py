"""Noisy linear imputation and ROAD, against a dense solution, closed forms and pytorch-grad-cam."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import camfn
from camfn import CamError, metrics
from camfn.metrics import imputation
from tests.oracles.closeness import assert_close, close
from tests.oracles.libraries import grad_cam

EXACT = 1e-5
"""The error of the solution, as a share of the range of x."""


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def masks(kind: str, n: int, size: tuple[int, int]) -> Tensor:
    values = random(n, *size, seed=3) if kind == "pixels" else camfn.maps.resize(random(n, 3, 3, seed=3), size)
    thresholds = torch.quantile(values.flatten(1), torch.linspace(0.1, 0.9, n, dtype=values.dtype), 1).diagonal()
    return values >= thresholds[:, None, None]


def dense(x: Tensor, removed: Tensor) -> Tensor:
    """The linear system of one picture, written out and solved."""
    rows, columns = removed.shape
    at = {place: i for i, place in enumerate((removed).nonzero().tolist()) for place in [tuple(place)]}
    matrix, right = torch.zeros(len(at), len(at), dtype=x.dtype), torch.zeros(len(at), len(x), dtype=x.dtype)
    for (i, j), row in at.items():
        for di, dj in itertools.product((-1, 0, 1), repeat=2):
            if (di, dj) == (0, 0) or not (0 <= i + di < rows and 0 <= j + dj < columns):
                continue
            weight = 1 / 6 if di == 0 or dj == 0 else 1 / 12
            matrix[row, row] += weight
            if (i + di, j + dj) in at:
                matrix[row, at[i + di, j + dj]] -= weight
            else:
                right[row] += weight * x[:, i + di, j + dj]
    found = x.clone()
    found[:, removed] = torch.linalg.solve(matrix, right).T
    return found


@pytest.mark.parametrize("size", [(16, 16), (13, 21), (1, 9), (2, 2)])
@pytest.mark.parametrize("kind", ["pixels", "blobs"])
def test_imputation_solves_the_linear_system(kind, size):
    x, removed = random(5, 2, *size) * 4 - 2, masks(kind, 5, size)
    removed[:, 0, 0] = False
    found = metrics.linear_imputation(x, removed)
    for image in range(5):
        assert_close(found[image], dense(x[image], removed[image]), 4 * EXACT)
    assert torch.equal(found.where(~removed[:, None], 0), x.where(~removed[:, None], 0))


def test_imputation_along_one_axis_is_a_straight_line():
    x = torch.tensor([[[0.0, 9, 9, 9, 4, 9, 6, 9, 9]]])
    found = metrics.linear_imputation(x, x[:, 0] == 9)
    assert_close(found, torch.tensor([[[0.0, 1, 2, 3, 4, 5, 6, 6, 6]]]), 9 * EXACT)


def test_imputation_without_a_known_pixel_is_the_mean():
    x = random(2, 3, 8, 8)
    removed = torch.stack([torch.ones(8, 8, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)])
    found = metrics.linear_imputation(x, removed)
    close(found[0], x[0].mean((1, 2), keepdim=True).expand(3, 8, 8))
    assert torch.equal(found[1], x[1])


def test_imputation_keeps_planes_and_constants():
    """A plane is harmonic, away from the border."""
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    plane = (2 * rows - columns)[None, None]
    removed = torch.zeros(1, 20, 20, dtype=torch.bool)
    removed[:, 3:17, 2:18] = True
    assert_close(metrics.linear_imputation(plane, removed), plane, 60 * EXACT)
    constant = torch.full((1, 1, 20, 20), 3.0)
    close(metrics.linear_imputation(constant, removed), constant)


def test_imputation_does_not_depend_on_neighbors():
    x, removed = random(5, 2, 40, 40), masks("blobs", 5, (40, 40))
    found = metrics.linear_imputation(x, removed)
    for image in range(5):
        close(
            metrics.linear_imputation(x[image : image + 1], removed[image : image + 1]), found[image : image + 1], units=2**12
        )


def test_what_a_removed_pixel_was_does_not_matter():
    x, removed = random(2, 2, 16, 16), masks("blobs", 2, (16, 16))
    for value in (torch.nan, torch.inf):
        broken = torch.where(removed[:, None], value, x)
        assert torch.equal(metrics.linear_imputation(broken, removed), metrics.linear_imputation(x, removed))


def test_imputation_has_no_graph():
    x, removed = random(2, 2, 16, 16), masks("blobs", 2, (16, 16))
    found = metrics.linear_imputation(x.clone().requires_grad_(), removed)
    assert not found.requires_grad
    assert torch.equal(found, metrics.linear_imputation(x, removed))


def test_noise_is_that_of_the_seed_on_removed_pixels():
    x, removed = random(2, 3, 16, 16), masks("blobs", 2, (16, 16))
    plain, noisy = (metrics.linear_imputation(x, removed, noise=noise, seed=1) for noise in (0.0, 0.5))
    off = (noisy - plain) / 0.5
    drawn = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    close(off, torch.where(removed[:, None], drawn, 0))
    assert torch.equal(noisy, metrics.linear_imputation(x, removed, noise=0.5, seed=1))
    assert not torch.equal(noisy, metrics.linear_imputation(x, removed, noise=0.5, seed=2))


def test_the_preconditioner_is_symmetric_and_saves_iterations(monkeypatch):
    unknown = torch.nn.functional.pad(masks("blobs", 3, (62, 62)), (1, 1, 1, 1))[:, None].double()
    levels = imputation._levels(unknown, torch.nn.functional.pad(torch.ones_like(unknown[..., 1:-1, 1:-1]), (1, 1, 1, 1)))
    assert len(levels) > 3
    a, b = random(3, 1, 64, 64) * unknown, random(3, 1, 64, 64, seed=1) * unknown
    close(*((one * imputation._preconditioned(levels, other)).sum((1, 2, 3)) for one, other in ((a, b), (b, a))))
    coarse = random(3, 1, 32, 32, seed=2)
    close((imputation._interpolated(coarse) * a).sum((1, 2, 3)), (coarse * imputation._restricted(a)).sum((1, 2, 3)))
    x, removed = random(3, 1, 62, 62), unknown[:, 0, 1:-1, 1:-1] > 0
    monkeypatch.setattr(imputation, "_MOST", 40)
    metrics.linear_imputation(x, removed)
    monkeypatch.setattr(imputation, "_LEVELS", 1)
    with pytest.raises(CamError, match="did not converge"):
        metrics.linear_imputation(x, removed)


def test_what_imputation_does_not_take():
    x = random(2, 3, 8, 8)
    for removed in (torch.zeros(2, 8, 8), torch.zeros(2, 8, 7, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)):
        with pytest.raises(CamError, match="removed is torch"):
            metrics.linear_imputation(x, removed)
    with pytest.raises(CamError, match=r"x is torch\.uint8: .* needs floating-point inputs"):
        metrics.linear_imputation(x.to(torch.uint8), torch.zeros(2, 8, 8, dtype=torch.bool))
    with pytest.raises(CamError, match=r"needs .* with one or two spatial axes"):
        metrics.linear_imputation(random(1, 1, 4, 4, 4), torch.zeros(1, 4, 4, 4, dtype=torch.bool))


# -------------------------------------------------------------------------------------------------- pytorch-grad-cam


peers_warnings = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")


@peers_warnings
@pytest.mark.parametrize("size", [(32, 32), (30, 47), (96, 96)])
@pytest.mark.parametrize("kind", ["pixels", "blobs"])
def test_imputation_is_that_of_pytorch_grad_cam(kind, size):
    grad_cam()
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    x, removed = (random(3, 3, *size) * 4 - 2).float(), masks(kind, 3, size)
    found = metrics.linear_imputation(x, removed)
    theirs = torch.stack([NoisyLinearImputer(0.0)(x[i], (~removed[i]).float()) for i in range(3)])
    assert_close(found, theirs, 1e-4)


@pytest.fixture
def classifier() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 5)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return model


@peers_warnings
def test_road_is_that_of_pytorch_grad_cam(classifier, monkeypatch):
    """Its noise is left out, since it has no seed. The maps have the input's size, and no ties."""
    grad_cam()
    from pytorch_grad_cam.metrics import road
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    monkeypatch.setattr(road.NoisyLinearImputer.__init__, "__defaults__", (0.0, road.neighbors_weights))
    x, map = (random(2, 3, 32, 32) * 4 - 2).float(), camfn.maps.resize(random(2, 5, 5, seed=2), (32, 32)).float()
    classes = classifier(x).argmax(1).tolist()
    score = metrics.score_function(classifier, x, camfn.targets.probability())
    theirs = {
        "combined": road.ROADCombined(),
        "morf": road.ROADMostRelevantFirstAverage(),
        "lerf": road.ROADLeastRelevantFirstAverage(),
    }
    for order, metric in theirs.items():
        wanted = metric(x, map.numpy(), [ClassifierOutputSoftmaxTarget(c) for c in classes], classifier)
        found = metrics.road(map, x, score, order=order, noise=0.0)
        assert_close(found, torch.from_numpy(np.asarray(wanted)), 1e-4, order)
        assert found.abs().min() > 1e-3, "the test needs scores that move"


# ---------------------------------------------------------------------------------------------------------------- ROAD


def seen(inputs: Tensor) -> Tensor:
    """The detail in a corner, which imputation smooths."""
    return inputs[:, 0, :4, :4].flatten(1).std(1, keepdim=True)


def test_road_is_better_for_the_pixels_that_the_score_reads():
    x = random(2, 1, 8, 8)
    right = random(2, 8, 8, seed=1)
    right[:, :4, :4] += 1
    for order, sign in (("combined", 1), ("morf", -1), ("lerf", 1)):
        good, bad = (sign * metrics.road(map, x, seen, order=order, noise=0.0) for map in (right, -right))
        assert (good > bad + 0.05).all(), order


def test_road_of_the_reversed_map_is_its_negative():
    x, map = random(2, 1, 16, 16), random(2, 16, 16, seed=1)
    close(metrics.road(-map, x, seen), -metrics.road(map, x, seen), size=1.0)


def test_road_of_a_flat_map_is_0():
    x = random(2, 1, 16, 16)
    assert metrics.road(torch.ones(2, 4, 4), x, seen).tolist() == [0, 0]
    x, flat = random(2, 1, 32, 32), torch.full((2, 7, 7), 0.3)
    assert metrics.road(flat, x, seen).tolist() == [0, 0]


def test_road_is_the_mean_over_percentiles_and_of_both_orders():
    x, map = random(2, 1, 16, 16), random(2, 4, 4, seed=1)
    each = [metrics.road(map, x, seen, percentiles=[p]) for p in (20, 50)]
    close(metrics.road(map, x, seen, percentiles=[20, 50]), sum(each) / 2)
    least, most = (metrics.road(map, x, seen, order=order) for order in ("lerf", "morf"))
    close(metrics.road(map, x, seen), (least - most) / 2, size=1.0)


def test_percentiles_are_numpys():
    values, asked = random(2, 3, 50), [0, 3, 10, 50, 99.5, 100]
    found = imputation._percentiles(values, asked)
    close(found, torch.from_numpy(np.percentile(values.numpy(), asked, axis=-1)))


def test_what_road_does_not_take():
    x, map = random(2, 1, 16, 16), random(2, 4, 4, seed=1)
    for options, message in [
        ({"order": "both"}, "order='both'"),
        ({"percentiles": []}, "percentiles="),
        ({"percentiles": [101]}, "percent"),
        ({"percentiles": 50}, "percentiles=50 must be a sequence of numbers from 0 to 100"),
    ]:
        with pytest.raises(CamError, match=message):
            metrics.road(map, x, seen, **options)

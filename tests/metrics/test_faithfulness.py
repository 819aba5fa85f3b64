"""The metrics of faithfulness, against closed forms on a few pixels, loops, and their laws."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import camfn
from camfn import CamError, metrics
from tests.oracles.closeness import assert_close, close

BASELINES = ["zero", "mean", "blur", "linear"]
CURVES = [metrics.deletion_curve, metrics.insertion_curve]
AREAS = [metrics.deletion, metrics.insertion]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(inputs: Tensor) -> Tensor:
    return inputs.flatten(1).sum(1, keepdim=True)


def bent(inputs: Tensor) -> Tensor:
    """Two scores that no sum over pixels gives."""
    flat = inputs.flatten(1)
    weights = torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)
    return torch.stack([torch.tanh(flat @ weights), (flat.square() @ weights.flip(0)).cos()], 1)


def first(inputs: Tensor) -> Tensor:
    return bent(inputs)[:, :1]


# -------------------------------------------------------------------------------------------------------- closed forms


def test_two_pixels():
    """The score is the sum: 4 whole, 1 without the first pixel, 3 without the second, 0 without both."""
    x = torch.tensor([[[3.0, 1.0]]], dtype=torch.float64)
    values = {
        (metrics.deletion, "morf"): (4 + 1) / 4 + (1 + 0) / 4,
        (metrics.deletion, "lerf"): (4 + 3) / 4 + (3 + 0) / 4,
        (metrics.insertion, "morf"): (0 + 3) / 4 + (3 + 4) / 4,
        (metrics.insertion, "lerf"): (0 + 1) / 4 + (1 + 4) / 4,
        (metrics.deletion, "difference"): 1.0,
        (metrics.insertion, "difference"): 1.0,
    }
    for (metric, order), value in values.items():
        assert metric(x[:, 0], x, total, order=order, baseline="zero").tolist() == [value], (metric, order)


def test_the_mean_is_that_of_each_channel_and_input():
    x = random(2, 3, 4, 4)
    found = metrics.deletion_curve(x.mean(1), x, lambda inputs: inputs[:, 1:2, 0, 0], baseline="mean").scores
    close(found[:, 0], x[:, 1, 0, 0])
    close(found[:, -1], x[:, 1].mean((1, 2)))


def removed_loop(map: Tensor, x: Tensor, score, counts: list[int], *, inserts: bool, fill: Tensor) -> list[float]:
    """By the definition: rank the cells, fill the pixels of each, one forward at a time. Without ties."""
    rows, columns = map.shape
    ranked = sorted(itertools.product(range(rows), range(columns)), key=lambda at: -float(map[at]))
    found = []
    for count in counts:
        made = (fill if inserts else x).clone()
        for row, column in ranked[:count]:
            for i, j in itertools.product(range(x.shape[1]), range(x.shape[2])):
                if i * rows // x.shape[1] == row and j * columns // x.shape[2] == column:
                    made[:, i, j] = (x if inserts else fill)[:, i, j]
        found.append(float(score(made[None])[0, 0]))
    return found


@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
@pytest.mark.parametrize("inserts", [False, True])
def test_a_curve_is_the_loop_over_cells(inserts, size):
    x, map = random(2, 3, *size), random(2, 3, 4, seed=1)
    counts = [0, 2, 5, 7, 10, 12]
    found = CURVES[inserts](map, x, first, baseline="mean", steps=5)
    close(found.fractions.double(), torch.tensor(counts) / 12, units=2**30)
    for image in range(2):
        fill = x[image].mean((1, 2), keepdim=True).expand(3, *size)
        wanted = removed_loop(map[image], x[image], first, counts, inserts=inserts, fill=fill)
        close(found.scores[image], torch.tensor(wanted, dtype=x.dtype))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_curves_in_one_to_three_axes(axes):
    """Along the last axis alone, the cells are those of one axis."""
    x, map = random(2, 3, 6), random(2, 3, seed=1)
    long = x.reshape(2, 3, *(1,) * (axes - 1), 6)
    found = metrics.deletion_curve(map.reshape(2, *(1,) * (axes - 1), 3), long, first, baseline="zero")
    close(found.scores, metrics.deletion_curve(map, x, first, baseline="zero").scores)


def test_area_is_by_trapezoids():
    x, map = random(2, 3, 6, 8), random(2, 3, 4, seed=1)
    curve = metrics.deletion_curve(map, x, first, steps=5)
    close(metrics.deletion(map, x, first, steps=5), torch.from_numpy(np.trapezoid(curve.scores, curve.fractions)))


def test_torchcams_numbers_where_the_steps_are_even():
    """torchcam ranks pixels at the input's size, which the map here has, with a baseline of zero. Steps divide the pixels."""
    torchcam = pytest.importorskip("torchcam.metrics")

    class Extractor:
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 48, 4, dtype=torch.float64))

        def __call__(self, *args, **kwargs):
            return [map]

        def fuse_cams(self, cams):
            return cams[0]

        def _hooks_off(self):
            return torch.no_grad()

    torch.nn.init.normal_(Extractor.model[1].weight, generator=torch.Generator().manual_seed(0))
    x, map, extractor = random(3, 3, 6, 8), random(3, 6, 8, seed=1), Extractor()
    theirs = torchcam.DeletionInsertionMetric(extractor, lambda y: torch.softmax(y, -1), steps=12)
    theirs.update(x)
    score = metrics.score_function(extractor.model, x, camfn.targets.probability())
    ours = {f"{metric.__name__}_auc": float(metric(map, x, score, steps=12, baseline="zero").mean()) for metric in AREAS}
    assert ours == pytest.approx(theirs.summary(), rel=1e-6)  # torchcam's fractions are float32


# ---------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("order", ["morf", "lerf", "random"])
def test_deletion_of_nothing_and_insertion_of_everything_are_the_clean_score(order, baseline):
    x, map = random(3, 2, 8, 8), random(3, 4, 4, seed=1)
    deleted, inserted = (curve(map, x, first, order=order, baseline=baseline, steps=4).scores for curve in CURVES)
    clean = first(x)[:, 0]
    close(deleted[:, 0], clean, size=1.0)
    close(inserted[:, -1], clean, size=1.0)
    close(deleted[:, -1], inserted[:, 0], size=1.0)


@pytest.mark.parametrize("baseline", BASELINES)
def test_insertion_in_one_order_is_deletion_in_the_other(baseline):
    x, map = random(3, 2, 8, 8), random(3, 4, 4, seed=1).round(decimals=1)
    deleted = metrics.deletion_curve(map, x, first, order="lerf", baseline=baseline, steps=8)
    inserted = metrics.insertion_curve(map, x, first, order="morf", baseline=baseline, steps=8)
    close(inserted.scores, deleted.scores.flip(-1))
    both = [metric(map, x, first, order="difference", baseline=baseline, steps=8) for metric in AREAS]
    close(*both, size=1.0)


@given(scale=st.floats(1e-3, 1e3), offset=st.floats(-10, 10), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_rescaling_that_keeps_the_order_changes_no_ranking_metric(scale, offset, seed):
    x, map = random(2, 2, 8, 8), random(2, 3, 4, seed=seed)
    for metric in (*AREAS, metrics.road):
        found = metric(map, x, first)
        assert torch.equal(metric(scale * map + offset, x, first), found), metric
        if metric is not metrics.road:  # which resizes: a bend would change the order of its pixels
            assert torch.equal(metric(map.exp(), x, first), found), metric


@pytest.mark.parametrize("metric", [*AREAS, metrics.road, metrics.infidelity, metrics.sensitivity_n])
def test_a_permuted_axis_of_targets_permutes_the_values(metric):
    x, maps = random(3, 2, 8, 8), random(3, 2, 4, 4, seed=1)
    found = metric(maps, x, bent)
    assert found.shape == (3, 2)
    close(metric(maps.flip(1), x, lambda inputs: bent(inputs).flip(1)), found.flip(1))
    for target in range(2):
        close(metric(maps[:, target], x, lambda inputs, t=target: bent(inputs)[:, t : t + 1]), found[:, target])


OPTIONS = {
    "deletion": (metrics.deletion, {"minus_random": 2}),
    "insertion": (metrics.insertion, {"minus_random": 2, "baseline": "linear"}),
    "difference": (metrics.deletion, {"order": "difference"}),
    "road": (metrics.road, {}),
    "road of one order": (metrics.road, {"order": "lerf"}),
    "infidelity": (metrics.infidelity, {}),
    "infidelity by noise": (metrics.infidelity, {"perturbation": "noise"}),
    "sensitivity_n": (metrics.sensitivity_n, {}),
}


@pytest.mark.parametrize(("metric", "options"), OPTIONS.values(), ids=OPTIONS)
def test_values_do_not_depend_on_neighbors_and_are_the_same_for_a_seed(metric, options):
    x, map = random(3, 2, 8, 8), random(3, 4, 4, seed=1).round(decimals=1)
    found = metric(map, x, first, **options)
    assert found.shape == (3,)
    assert torch.equal(metric(map, x, first, **options), found)
    for image in range(3):
        close(metric(map[image : image + 1], x[image : image + 1], first, **options), found[image : image + 1], size=1.0)
    if metric is not metrics.road:  # its noise moves the score by little
        assert not torch.equal(metric(map, x, first, seed=1, **options), found)


@pytest.mark.parametrize(("metric", "options"), OPTIONS.values(), ids=OPTIONS)
def test_pieces_change_nothing(metric, options, monkeypatch):
    x, map = random(2, 2, 8, 8), random(2, 4, 4, seed=1)
    found = metric(map, x, first, **options)
    monkeypatch.setattr(camfn.metrics.scoring, "_PIXELS", 700)
    close(metric(map, x, first, **options), found, size=1.0)


@pytest.mark.parametrize("metric", [*AREAS, metrics.road, metrics.infidelity, metrics.sensitivity_n])
def test_a_score_that_is_nan_makes_its_map_nan_alone(metric):
    x, map = random(3, 2, 8, 8), random(3, 4, 4, seed=1)

    def broken(inputs):
        image = (torch.arange(len(inputs)) % 3)[:, None]
        return torch.where(image == 1, torch.nan, first(inputs))

    found, expected = metric(map, x, broken), metric(map, x, first)
    expected[1] = torch.nan
    close(found.nan_to_num(7), expected.nan_to_num(7))


def test_torchs_random_state_is_left():
    x, map = random(2, 2, 8, 8), random(2, 4, 4, seed=1)
    before = torch.get_rng_state()
    for metric, options in OPTIONS.values():
        metric(map, x, first, **options)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------- random orders and ties


def test_a_flat_map_is_a_random_order_that_all_share():
    x = random(1, 2, 8, 8).expand(3, -1, -1, -1)
    flat = torch.full((3, 4, 4), 0.3)
    found = [metrics.deletion(flat, x, first, seed=seed) for seed in range(3)]
    for one in found:
        close(one, one[:1].expand(3))
    assert len({float(one[0]) for one in found}) == 3
    close(metrics.deletion(0 * flat, x, first), found[0])


def test_a_random_order_of_equal_cells_is_the_straight_line():
    """Each cell has the same share of the score: any order has the area 1/2, and less a random order 0."""
    x, map = torch.ones(2, 1, 8, 8, dtype=torch.float64), random(2, 4, 4)
    close(metrics.deletion(map, x, total, baseline="zero"), torch.full((2,), 32.0, dtype=x.dtype))
    for metric in AREAS:
        close(metric(map, x, total, baseline="zero", minus_random=3), torch.zeros(2, dtype=x.dtype), size=32.0)


def test_minus_random_is_less_the_mean_of_curves_in_random_orders():
    x, map = random(2, 2, 8, 8), random(2, 4, 4, seed=1)
    plain, less = metrics.deletion(map, x, first), metrics.deletion(map, x, first, minus_random=1)
    close(plain - less, metrics.deletion_curve(map, x, first, order="random").area, size=1.0)
    two = metrics.deletion(map, x, first, minus_random=2)
    assert not torch.equal(two, less), "the second order is another one"


def test_random_orders_do_not_depend_on_the_map():
    x = random(2, 2, 8, 8)
    curves = [metrics.deletion_curve(random(2, 4, 4, seed=s), x, first, order="random").scores for s in range(2)]
    assert torch.equal(*curves)


# --------------------------------------------------------------------------------------------------- grids, baselines


def test_a_coarser_grid_has_the_means_of_the_map():
    x, map = random(2, 2, 8, 8), random(2, 8, 8, seed=1)
    means = map.reshape(2, 4, 2, 4, 2).mean((2, 4))
    assert torch.equal(metrics.deletion(map, x, first, grid=(4, 4)), metrics.deletion(means, x, first))
    cells = np.array([4, 4])
    assert torch.equal(metrics.deletion(map, x, first, grid=cells), metrics.deletion(means, x, first))
    finer = metrics.deletion(means, x, first, grid=(8, 8))
    assert torch.equal(finer, metrics.deletion(camfn.maps.resize(means, (8, 8)), x, first))


@pytest.mark.parametrize("grid", [(10, 14), (3, 3)])
def test_another_grid_keeps_the_ties_of_a_flat_map(grid):
    """Means and interpolated values round differently from cell to cell, and ties are broken by the random order."""
    x = random(2, 2, 20, 28)
    found = metrics.deletion(torch.full((2, 7, 7), 0.3), x, first, grid=grid)
    assert torch.equal(found, metrics.deletion(torch.zeros(2, 7, 7), x, first, grid=grid))


def test_a_map_that_is_finer_than_the_input_is_brought_to_its_pixels():
    x, map = random(2, 2, 4, 4), random(2, 8, 8, seed=1)
    assert torch.equal(metrics.deletion(map, x, first), metrics.deletion(map, x, first, grid=(4, 4)))


def test_a_tensor_is_a_baseline():
    x, map = random(2, 3, 8, 8), random(2, 4, 4, seed=1)
    assert torch.equal(
        metrics.deletion(map, x, first, baseline=torch.zeros(3, 1, 1)), metrics.deletion(map, x, first, baseline="zero")
    )
    mean = x.mean((2, 3), keepdim=True)
    assert torch.equal(metrics.deletion(map, x, first, baseline=mean), metrics.deletion(map, x, first, baseline="mean"))


def test_blur_hides_the_detail_and_keeps_the_mean():
    x = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    x[..., ::2] = 1
    curve = metrics.deletion_curve(random(1, 4, 4), x, lambda inputs: inputs.flatten(1).std(1, keepdim=True), baseline="blur")
    assert curve.scores[0, -1] < 0.1 * curve.scores[0, 0]
    close(metrics.deletion_curve(random(1, 4, 4), x, total, baseline="blur").scores[0, -1:], total(x)[0], units=2**40)


# ------------------------------------------------------------------------------------------- infidelity, sensitivity-n


def test_infidelity_of_the_weights_of_a_linear_model_is_0():
    x, weights = random(2, 3, 8, 8), random(2, 8, 8, seed=1) - 0.5

    def score(inputs):
        return (inputs.sum(1) * weights.repeat(len(inputs) // 2, 1, 1)).sum((1, 2))[:, None]

    for perturbation in ("square", "noise"):
        for scaled in (True, False):
            found = metrics.infidelity(weights, x, score, perturbation=perturbation, scaled=scaled)
            close(found, torch.zeros(2, dtype=x.dtype), size=100.0)
        twice = metrics.infidelity(2 * weights, x, score, perturbation=perturbation, scaled=False)
        nothing = metrics.infidelity(0 * weights, x, score, perturbation=perturbation)
        close(twice, nothing)  # (2 - 1)^2 and (0 - 1)^2 times the mean square of the change
        assert (nothing > 1e-3).all()


def test_infidelity_is_the_loop_over_squares():
    x, map = random(2, 3, 6, 5), random(2, 6, 5, seed=1)
    generator = torch.Generator().manual_seed(4)
    tops, lefts = (torch.randint(0, side - 2 + 1, (20,), generator=generator).tolist() for side in (6, 5))
    for image in range(2):
        told, change = [], []
        for top, left in zip(tops, lefts):
            made = x[image].clone()
            made[:, top : top + 2, left : left + 2] = 0
            told.append(float((map[image] * (x[image] - made).sum(0)).sum()))
            change.append(float(first(x[image : image + 1]) - first(made[None])))
        best = sum(a * b for a, b in zip(told, change)) / sum(a * a for a in told)
        for scaled, factor in ((True, best), (False, 1)):
            wanted = sum((factor * a - b) ** 2 for a, b in zip(told, change)) / 20
            found = metrics.infidelity(map, x, first, samples=20, share=0.4, seed=4, scaled=scaled)[image]
            assert float(found) == pytest.approx(wanted, rel=1e-9)


def test_the_best_scale_is_best():
    x, map = random(2, 3, 8, 8), random(2, 4, 4, seed=1)
    best = metrics.infidelity(map, x, first)
    close(metrics.infidelity(7 * map, x, first), best)
    for factor in (-1, 1e-3, 1e-2, 0.1, 1):
        assert (metrics.infidelity(factor * map, x, first, scaled=False) >= best).all()


def test_sensitivity_n_of_a_sum_over_cells_is_1():
    x = random(2, 1, 4, 4)
    for cells in (1, 5, 15):
        close(metrics.sensitivity_n(x[:, 0], x, total, cells=cells, baseline="zero"), torch.ones(2, dtype=x.dtype), units=2**12)
        close(
            metrics.sensitivity_n(-x[:, 0], x, total, cells=cells, baseline="zero"), -torch.ones(2, dtype=x.dtype), units=2**12
        )


def test_sensitivity_n_is_numpys_correlation_over_the_sets():
    x, map = random(1, 3, 4, 4), random(1, 4, 4, seed=1)
    generator = torch.Generator().manual_seed(2)
    sets = [torch.randperm(16, generator=generator).argsort() < 4 for _ in range(30)]
    sums = [float(map.flatten()[chosen].sum()) for chosen in sets]
    drops = [float(first(x) - first(x * ~chosen.reshape(4, 4))) for chosen in sets]
    found = metrics.sensitivity_n(map, x, first, subsets=30, baseline="zero", seed=2)
    assert float(found) == pytest.approx(np.corrcoef(sums, drops)[0, 1], abs=1e-12)


def test_sensitivity_n_of_a_flat_map_or_a_constant_score_is_0():
    x = random(2, 1, 4, 4)
    assert metrics.sensitivity_n(torch.full((2, 4, 4), 0.3), x, first).tolist() == [0, 0]
    assert metrics.sensitivity_n(x[:, 0], x, lambda inputs: torch.ones(len(inputs), 1)).tolist() == [0, 0]


# -------------------------------------------------------------------------------------------------------------- errors


def test_what_metrics_do_not_take():
    x, map = random(2, 3, 8, 8), random(2, 4, 4)
    wrong = [
        ({"order": "most"}, "order='most' must be"),
        ({"steps": 0}, "steps=0 must be a positive int"),
        ({"baseline": "black"}, "baseline='black' must be"),
        ({"baseline": torch.zeros(5)}, r"baseline has shape \(5,\), which does not fit x"),
        ({"grid": (9, 4)}, r"grid=\(9, 4\) must give a number of cells"),
        ({"grid": (4,)}, r"grid=\(4,\) must give a number of cells"),
        ({"grid": (2.5, 4)}, r"grid=\(2\.5, 4\) must give a number of cells"),
        ({"grid": 7}, r"grid=7 must be a sequence of cells along each axis"),
        ({"minus_random": -1}, "minus_random=-1 must be a number of random orders"),
        ({"minus_random": 1, "order": "difference"}, "has no use for minus_random="),
    ]
    for options, message in wrong:
        for metric in AREAS:
            with pytest.raises(CamError, match=message):
                metric(map, x, first, **options)
    for options, message in [
        ({"share": 0.0}, "share="),
        ({"samples": 0}, "samples=0"),
        ({"perturbation": "x"}, "perturbation="),
    ]:
        with pytest.raises(CamError, match=message):
            metrics.infidelity(map, x, first, **options)
    for options in ({"cells": 0}, {"cells": 17}, {"subsets": 0}):
        with pytest.raises(CamError, match=next(iter(options))):
            metrics.sensitivity_n(map, x, first, **options)


@pytest.mark.parametrize("metric", [*AREAS, metrics.road, metrics.infidelity, metrics.sensitivity_n])
def test_shapes_that_do_not_fit(metric):
    x, map = random(2, 3, 8, 8), random(2, 4, 4)
    for maps in (map[:1], map[0], map[:, :0]):
        with pytest.raises(CamError, match="maps have shape"):
            metric(maps, x, first)
    with pytest.raises(CamError, match=r"the score has shape .* and maps have 1 target"):
        metric(map, x, bent)
    with pytest.raises(CamError, match=r"maps are torch\.complex128: they must be real"):
        metric(map.to(torch.complex128), x, first)
    with pytest.raises(CamError, match="maps have 1 NaN or infinite values"):
        metric(
            map.index_fill(0, torch.tensor([0]), 0).index_put((torch.tensor(0),) * 3, torch.tensor(math.nan).double()), x, first
        )


EVERY = [
    *(*AREAS, metrics.road, metrics.infidelity, metrics.sensitivity_n),
    *(metrics.average_drop, metrics.increase_in_confidence, metrics.average_gain),
    lambda map, x, score: metrics.coherency(map, x, lambda inputs: map),
    lambda map, x, score: metrics.maximum_sensitivity(lambda inputs: inputs.float().mean(1), x),
]


@pytest.mark.parametrize("metric", EVERY)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_inputs_that_are_changed_are_floating_point(metric, dtype):
    """Of integers, a mask of 0.9 would be 0, and small noise would be nothing."""
    x, map = (255 * random(2, 3, 8, 8)).to(dtype), random(2, 4, 4)
    with pytest.raises(CamError, match=rf"x is {dtype}: .* needs floating-point inputs \(x\.float\(\)\)"):
        metric(map, x, lambda inputs: inputs.float().mean((1, 2, 3))[:, None] / 255)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_values_are_float32_or_wider(dtype):
    x, map = random(2, 3, 8, 8).float(), random(2, 4, 4).to(dtype)
    for metric in (*AREAS, metrics.infidelity, metrics.sensitivity_n):
        assert metric(map, x, first).dtype in (torch.float32, torch.float64)


def test_circular_pairs_are_of_names_that_exist():
    assert set(metrics.CIRCULAR) <= set(metrics.__all__)
    for methods in metrics.CIRCULAR.values():
        assert methods <= set(camfn.METHODS)
        assert {"opti_cam", "rise", "score_cam"} <= methods
        assert all("masked inputs" in camfn.METHODS[name].needs for name in methods)


# ------------------------------------------------------------------------------------------------------------- Quantus


class Plain(torch.nn.Module):
    """Two logits that no sum over pixels gives."""

    def forward(self, x):
        return bent(x)


def quantus_values(metric, x: Tensor, map: Tensor) -> Tensor:
    given = {"x_batch": x.numpy(), "y_batch": np.zeros(len(x), dtype=int), "a_batch": map[:, None].numpy()}
    return torch.tensor(np.asarray(metric(model=Plain().eval(), **given, softmax=False, device="cpu"), dtype=float))


AS_IT_IS = {"abs": False, "normalise": False, "disable_warnings": True, "perturb_baseline": 0.0}
"""Quantus divides maps by their largest value by default, and runs models in float32. Its features are the
pixels of each channel: here there is one."""


def test_pixel_flipping_of_quantus_is_deletion_without_its_first_step():
    """Departures: it leaves out the score of the whole input, orders pixels and not cells, and breaks ties by their place."""
    quantus = pytest.importorskip("quantus")
    x, map = random(3, 1, 8, 8), random(3, 8, 8, seed=1)
    theirs = quantus_values(quantus.PixelFlipping(features_in_step=4, **AS_IT_IS), x, map)
    close(metrics.deletion_curve(map, x, first, steps=16, baseline="zero").scores[:, 1:], theirs, dtype=torch.float32)


def test_infidelity_of_quantus_where_one_square_is_the_input():
    """Departures: its patches lie on a lattice, and stay removed when the next one is. Its map has no best factor."""
    quantus = pytest.importorskip("quantus")
    x, map = random(3, 1, 8, 8), random(3, 8, 8, seed=1)
    theirs = quantus_values(quantus.Infidelity(perturb_patch_sizes=[8], n_perturb_samples=1, **AS_IT_IS), x, map)
    close(metrics.infidelity(map, x, first, share=1.0, samples=1, scaled=False), theirs, dtype=torch.float32)


def test_linear_imputation_of_quantus():
    """Its ROAD is another metric: the share of inputs whose class stays. Its `SensitivityN` removes cells in the map's order,
    where the source draws random sets."""
    perturb = pytest.importorskip("quantus.functions.perturb_func")
    x, removed = random(2, 3, 16, 16), random(2, 16, 16, seed=1) > 0.4
    theirs = [
        perturb.noisy_linear_imputation(x[i].numpy(), removed[i].flatten().nonzero()[:, 0].numpy(), 0.0) for i in range(2)
    ]
    assert_close(metrics.linear_imputation(x, removed), torch.from_numpy(np.stack(theirs)), 1e-5)


# ------------------------------------------------------------------------------------------------------- OpenVINO-XAI


def test_openvino_xais_numbers_by_its_formula():
    """Its formula for one input: pixels in 30 steps, zeros for both, the trapezoid rule over equal steps, and the difference
    insertion - deletion as `delta`. Where the steps divide the pixels, its areas are those of camfn."""
    x, map = random(1, 3, 6, 10), random(1, 6, 10, seed=1)
    order = np.argsort(-map[0].numpy().flatten(), kind="stable")
    areas = {}
    for name in ("insertion", "deletion"):
        scores = []
        for count in range(0, 61, 2):
            keep = np.full(60, name == "deletion")
            keep[order[:count]] = name == "insertion"
            scores.append(float(first(x * torch.from_numpy(keep.reshape(6, 10)))))
        areas[name] = sum((a + b) / 2 for a, b in itertools.pairwise(scores)) / 30
    for metric in AREAS:
        assert float(metric(map, x, first, steps=30, baseline="zero")) == pytest.approx(areas[metric.__name__], rel=1e-6)
    delta = areas["insertion"] - areas["deletion"]
    assert float(metrics.deletion(map, x, first, steps=30, baseline="zero", order="difference")) == pytest.approx(
        delta, rel=1e-6
    )

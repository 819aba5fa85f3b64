"""The metrics of confidence, against closed forms, plain forwards, and the peers' formulas."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import camfn
from camfn import CamError, metrics
from tests.oracles.closeness import close
from tests.oracles.libraries import grad_cam

SCORED = [metrics.average_drop, metrics.increase_in_confidence, metrics.average_gain]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probabilities(inputs: Tensor) -> Tensor:
    """Two of three probabilities."""
    flat = inputs.flatten(1)
    weights = torch.linspace(-1, 1, 3 * flat.shape[1], dtype=flat.dtype).sin().reshape(-1, 3)
    return torch.softmax(flat @ weights, 1)[:, :2]


def one(inputs: Tensor) -> Tensor:
    return probabilities(inputs)[:, :1]


def energy(inputs: Tensor) -> Tensor:
    """A method: the mean square over the channels, at half the resolution, by its maximum."""
    values = torch.nn.functional.avg_pool2d(inputs.square().mean(1, keepdim=True), 2)[:, 0]
    return values / values.amax((1, 2), keepdim=True)


# -------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("before", "after", "drop", "increase", "gain"),
    [
        (0.8, 0.2, 0.75, 0, 0),
        (0.2, 0.8, 0, 1, 0.75),
        (0.5, 0.5, 0, 0, 0),
        (0, 0.5, 0, 1, 0.5),
        (1, 0.5, 0.5, 0, 0),
        (0, 0, 0, 0, 0),
    ],
)
def test_two_pixels(before, after, drop, increase, gain):
    """The score is `before` for the whole input, and `after` for one that is multiplied by the map."""
    x = torch.ones(1, 1, 2, dtype=torch.float64)

    def score(inputs):
        return after + (inputs[:, 0, 1:] == 1) * (before - after)

    found = [float(metric(torch.tensor([[1.0, 0.0]]), x, score)) for metric in SCORED]
    assert found == pytest.approx([drop, increase, gain], abs=1e-12)


def test_the_input_is_multiplied_by_the_map_as_it_is():
    x, map = random(2, 3, 8, 8), 0.25 + 0.5 * random(2, 4, 4, seed=1)
    masked = x * camfn.maps.resize(map, (8, 8))[:, None]
    before, after = one(x)[:, 0], one(masked)[:, 0]
    close(metrics.average_drop(map, x, one), ((before - after) / before).clamp(min=0), size=1.0)
    close(metrics.average_gain(map, x, one), ((after - before) / (1 - before)).clamp(min=0), size=1.0)
    assert torch.equal(metrics.increase_in_confidence(map, x, one), (after > before).double())


# ---------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize(("side", "size"), [(1, 8), (3, 8), (8, 8), (8, 14)])
def test_a_map_of_ones_drops_nothing(side, size):
    x, ones = random(3, 3, size, size), torch.ones(3, side, side)
    for metric in SCORED:
        assert metric(ones, x, one).tolist() == [0, 0, 0], metric
    assert metrics.l1_complexity(ones, x).tolist() == [1, 1, 1]
    assert metrics.adcc(ones, x, one, lambda inputs: ones).tolist() == [0, 0, 0]


def test_a_map_of_zeros_is_the_score_of_nothing():
    x = random(3, 3, 8, 8)
    wanted = ((one(x) - one(0 * x)) / one(x)).clamp(min=0)[:, 0]
    close(metrics.average_drop(torch.zeros(3, 4, 4), x, one), wanted)


def test_gain_needs_increase_and_drop_excludes_it():
    x, map = random(20, 3, 8, 8) - 0.5, random(20, 4, 4, seed=1)
    drop, increase, gain = (metric(map, x, one) for metric in SCORED)
    assert 0 < increase.mean() < 1
    assert (gain <= increase).all()
    assert (drop <= 1 - increase).all()


@pytest.mark.parametrize("metric", SCORED)
def test_a_permuted_axis_of_targets_permutes_the_values(metric):
    x, maps = random(5, 3, 8, 8) - 0.5, random(5, 2, 4, 4, seed=1)
    found = metric(maps, x, probabilities)
    close(metric(maps.flip(1), x, lambda inputs: probabilities(inputs).flip(1)), found.flip(1), size=1.0)
    for target in range(2):
        close(
            metric(maps[:, target], x, lambda inputs, t=target: probabilities(inputs)[:, t : t + 1]), found[:, target], size=1.0
        )


def test_values_do_not_depend_on_neighbors():
    x = random(3, 3, 8, 8)
    map = energy(x)
    whole = {"adcc": metrics.adcc(map, x, one, energy), "arcc": metrics.arcc(map, x, one, energy)}
    for image in range(3):
        part = slice(image, image + 1)
        close(metrics.adcc(map[part], x[part], one, energy), whole["adcc"][part])
        close(metrics.arcc(map[part], x[part], one, energy), whole["arcc"][part], units=2**16)


@pytest.mark.parametrize("metric", [*SCORED, lambda map, x, score: metrics.adcc(map, x, score, energy)])
def test_a_score_that_is_nan_makes_its_map_nan_alone(metric):
    x = random(3, 3, 8, 8)

    def broken(inputs):
        return torch.where((torch.arange(len(inputs)) % 3)[:, None] == 1, torch.nan, one(inputs))

    assert metric(energy(x), x, broken).isnan().tolist() == [False, True, False]


# ------------------------------------------------------------------------------------------------ coherency and its means


def test_coherency_is_numpys_correlation_with_the_map_of_the_masked_input():
    x = random(3, 3, 8, 8)
    map = energy(x)
    again = energy(x * camfn.maps.resize(map, (8, 8))[:, None])
    wanted = [(np.corrcoef(map[i].flatten(), again[i].flatten())[0, 1] + 1) / 2 for i in range(3)]
    close(metrics.coherency(map, x, energy), torch.tensor(wanted))


def test_coherency_of_several_targets_multiplies_each_input_by_its_own_map():
    x = random(3, 3, 8, 8)

    def explain(inputs):
        return torch.stack([energy(inputs), energy(inputs.flip(-1))], 1)

    found = metrics.coherency(explain(x), x, explain)
    assert found.shape == (3, 2)
    close(found[:, 0], metrics.coherency(energy(x), x, energy))
    close(found[:, 1], metrics.coherency(energy(x.flip(-1)), x, lambda inputs: energy(inputs.flip(-1))))


def test_coherency_of_a_map_that_stays_or_turns_or_is_flat():
    x, map = random(3, 3, 8, 8), random(3, 4, 4, seed=1)
    close(metrics.coherency(map, x, lambda inputs: map), torch.ones(3, dtype=x.dtype))
    close(metrics.coherency(map, x, lambda inputs: 1 - map), torch.zeros(3, dtype=x.dtype), size=1.0)
    assert metrics.coherency(map, x, lambda inputs: torch.full_like(map, 0.3)).tolist() == [0.5] * 3


def test_adcc_is_the_harmonic_mean_in_either_order():
    x = random(6, 3, 8, 8) - 0.5
    map = energy(x)
    parts = [
        metrics.coherency(map, x, energy), 1 - metrics.l1_complexity(map, x), 1 - metrics.average_drop(map, x, one)
    ]  # fmt: skip
    each = 3 / sum(1 / part for part in parts)
    first = 3 / sum(1 / part.mean(0) for part in parts)
    close(metrics.adcc(map, x, one, energy), each)
    close(metrics.adcc(map, x, one, energy, means_first=True), first)
    assert abs(float(first - each.mean())) > 1e-4, "the orders differ"
    gathered = [metrics.adcc_parts(map[i : i + 2], x[i : i + 2], one, energy).values for i in (0, 2, 4)]
    whole = metrics.confidence.Parts(tuple(map_torch(gathered)))
    close(whole.mean(means_first=True), first)


def map_torch(batches):
    return [torch.cat(part) for part in zip(*batches)]


def test_arcc_is_the_harmonic_mean_with_road():
    x = random(6, 3, 8, 8) * 2 - 1

    def bright(inputs):
        return torch.sigmoid(9 * inputs.square().flatten(1).mean(1, keepdim=True) - 3)

    map = energy(x)
    removed = (2 * metrics.road(map, x, bright, percentiles=[20, 40, 60, 80])).clamp(0, 1)
    assert (removed > 0).all()
    parts = [metrics.coherency(map, x, energy), 1 - metrics.l1_complexity(map, x), removed]
    close(metrics.arcc(map, x, bright, energy), 3 / sum(1 / part for part in parts))
    assert metrics.arcc(1 - map, x, bright, energy).tolist() == [0] * 6, "ROAD below 0 counts as 0"


# --------------------------------------------------------------------------------------------------------------- peers


@pytest.fixture
def classifier() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 5)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return model


def test_torchcams_numbers(classifier):
    """It adds 1e-7 to the score that it divides by, and takes the mean over the inputs."""
    torchcam = pytest.importorskip("torchcam.metrics")
    x, map = random(8, 3, 12, 12).float() * 4 - 2, random(8, 4, 4, seed=1).float()

    class Extractor:
        model = classifier

        def __call__(self, *args, **kwargs):
            return [map]

        def fuse_cams(self, cams):
            return cams[0]

        def _hooks_off(self):
            return torch.no_grad()

    theirs = torchcam.ClassificationMetric(Extractor(), lambda y: torch.softmax(y, -1))
    theirs.update(x)
    score = metrics.score_function(classifier, x, camfn.targets.probability())
    ours = {
        "avg_drop": float(metrics.average_drop(map, x, score).mean()),
        "conf_increase": float(metrics.increase_in_confidence(map, x, score).mean()),
    }
    assert ours == pytest.approx(theirs.summary(), abs=1e-6)
    assert 0 < ours["conf_increase"] < 1


def test_pytorch_grad_cams_numbers(classifier):
    """Its drop in confidence is not divided by the score. Its correlations have 1e-8 in the denominator, ARCC in each part."""
    grad_cam()
    from pytorch_grad_cam.metrics import arcc, cam_mult_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    x = random(6, 3, 12, 12).float() * 4 - 2

    def explain(inputs):
        return camfn.maps.resize(energy(inputs), (12, 12))

    map, targets = explain(x), [ClassifierOutputSoftmaxTarget(c) for c in classifier(x).argmax(1).tolist()]
    score = metrics.score_function(classifier, x, camfn.targets.probability())
    given = x, map[:, None].numpy(), targets, classifier  # with an axis that broadcasts over the channels
    drop = metrics.average_drop(map, x, score) * score.clean[:, 0]
    close(drop, torch.from_numpy(cam_mult_image.DropInConfidence()(*given)), size=1.0)
    increase = torch.from_numpy(cam_mult_image.IncreaseInConfidence()(*given))
    assert torch.equal(metrics.increase_in_confidence(map, x, score), increase)
    close(metrics.l1_complexity(map, x), torch.from_numpy(arcc.Complexity()(map.numpy())))
    coherent = arcc.Coherency()(
        x, map.numpy(), targets, classifier, lambda input_tensor, targets: explain(input_tensor).numpy()
    )
    close(metrics.coherency(map, x, explain), torch.from_numpy(coherent), units=2**10)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("metric", SCORED)
def test_what_metrics_of_confidence_do_not_take(metric):
    x, map = random(2, 3, 8, 8), random(2, 4, 4)
    with pytest.raises(CamError, match=r"maps have values from .* they must lie in \[0, 1\]"):
        metric(3 * map, x, one)
    with pytest.raises(CamError, match=r"maps have values from .* they must lie in \[0, 1\]"):
        metric(map - 1, x, one)
    for wrong in (lambda inputs: -one(inputs), lambda inputs: 2 + one(inputs)):
        with pytest.raises(CamError, match=r"this metric wants probabilities; give score_function the target"):
            metric(map, x, wrong)
    with pytest.raises(CamError, match="maps have shape"):
        metric(map[:1], x, one)
    with pytest.raises(CamError, match=r"the score has shape \(2, 2\) for 2 inputs"):
        metric(map, x, probabilities)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_map_of_bools_or_ints_is_a_mask(dtype):
    x, map = random(2, 3, 8, 8), random(2, 4, 4) > 0.5
    assert torch.equal(metrics.average_drop(map.to(dtype), x, one), metrics.average_drop(map.float(), x, one))


def test_explain_must_give_maps_of_the_same_shape():
    x, map = random(2, 3, 8, 8), random(2, 4, 4)
    with pytest.raises(CamError, match=r"explain gives maps of shape \(2, 8, 8\), and maps have shape \(2, 4, 4\)"):
        metrics.coherency(map, x, lambda inputs: inputs[:, 0])

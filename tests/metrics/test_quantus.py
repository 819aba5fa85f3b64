"""Parity with Quantus 0.6, where conventions coincide, and each difference with its reason. Skipped where it is missing.

The arithmetic of Quantus is called as it is, on arrays (`evaluate_batch`): its own `__call__` normalizes maps by default.

Not compared: its model-parameter randomization redraws modules in the order of registration, by each layer's `reset_parameters`
and the global random state. Ours goes by the order of execution, from the output downwards, with normal numbers that have the
spread of the trained ones: raw parameters have no such method, and that of a batch norm returns constants.
"""

import math
import warnings

import numpy as np
import pytest
import torch

from camfn import metrics
from camfn.formulas.noise import uniform

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    quantus = pytest.importorskip("quantus")

pytestmark = pytest.mark.filterwarnings("ignore")


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(5, 12, 12, generator=generator, dtype=torch.float64)
    return maps, torch.rand(5, 12, 12, generator=generator) > 0.6


def theirs(name: str, maps: torch.Tensor, masks: torch.Tensor | None = None) -> np.ndarray:
    metric = getattr(quantus, name)(disable_warnings=True)
    given = {"a_batch": maps.numpy().copy()[:, None]}
    given |= {"x_batch": given["a_batch"].copy()} if masks is None else {"s_batch": masks.numpy()[:, None]}
    return np.asarray(metric.evaluate_batch(**given), dtype=float)


LOCALIZATION = {
    "RelevanceMassAccuracy": metrics.energy_pointing_game,
    "PointingGame": metrics.pointing_game,
    "AUC": metrics.pixel_auc,
}


@pytest.mark.parametrize("name", LOCALIZATION)
def test_localization_of_positive_maps(name):
    maps, masks = drawn()
    assert LOCALIZATION[name](maps, masks).tolist() == pytest.approx(theirs(name, maps, masks).tolist(), abs=1e-12)


def test_auc_of_signed_maps_with_ties():
    maps, masks = drawn()
    maps = (10 * maps - 3).round()
    assert metrics.pixel_auc(maps, masks).tolist() == pytest.approx(theirs("AUC", maps, masks).tolist(), abs=1e-12)


def test_complexity_of_positive_maps():
    """Theirs adds 1e-12 to the logarithm, and 1e-7 to each value."""
    maps, _ = drawn()
    assert metrics.entropy(maps).tolist() == pytest.approx(theirs("Complexity", maps).tolist(), abs=1e-9)
    assert metrics.gini(maps).tolist() == pytest.approx(theirs("Sparseness", maps).tolist(), abs=1e-6)


def test_rank_correlation():
    from quantus.functions.similarity_func import correlation_spearman

    maps, other = drawn()[0], drawn(1)[0]
    expected = correlation_spearman(maps.flatten(1).numpy(), other.flatten(1).numpy(), batched=True)
    assert metrics.rank_correlation(maps, other).tolist() == pytest.approx(np.asarray(expected).tolist(), abs=1e-12)


def test_maximum_sensitivity_with_the_same_noise():
    """Theirs draws from NumPy's global state, noise of its own for each image, in [-r, r]: ours on inputs of range 1."""
    from quantus.functions.norm_func import fro_norm
    from quantus.functions.similarity_func import difference

    x = drawn()[0][:, None]
    x = (x - x.amin((2, 3), keepdim=True)) / (x.amax((2, 3), keepdim=True) - x.amin((2, 3), keepdim=True))
    noise = 0.02 * (2 * uniform(0, 10 * 144) - 1).reshape(10, 1, 12, 12)

    def flat(values: torch.Tensor) -> np.ndarray:
        return values.square().flatten(1).numpy()

    sizes = fro_norm(flat(x))
    ratios = [fro_norm(difference(a=flat(x), b=flat(x + unit))) / sizes for unit in noise]
    found = metrics.maximum_sensitivity(lambda x: x[:, 0].square(), x)
    assert found.tolist() == pytest.approx(np.max(ratios, 0).tolist(), rel=1e-9)


# -------------------------------------------------------------------------------------------------------- differences


def test_energy_of_signed_maps():
    """Theirs sums signed values: negative ones take from the object and from the total, and a share leaves [0, 1]. Ours counts
    them as 0, as the paper does, whose maps have a ReLU."""
    map, mask = torch.tensor([[[4.0, -3.0]]]), torch.tensor([[[True, False]]])
    assert theirs("RelevanceMassAccuracy", map, mask) == pytest.approx([4.0])
    assert metrics.energy_pointing_game(map, mask).tolist() == [1.0]


def test_the_pointing_game_on_an_empty_mask():
    """Theirs writes NaN into bools, which makes a hit of it. Ours is NaN."""
    map, mask = torch.tensor([[[4.0, 3.0]]]), torch.tensor([[[False, False]]])
    assert theirs("PointingGame", map, mask) == [1.0]
    assert metrics.pointing_game(map, mask).isnan().all()


def test_the_pointing_game_of_shared_maxima():
    """Theirs is a hit if any maximum is on the object, so that a flat map always hits. Ours is the share of them."""
    map, mask = torch.ones(1, 1, 4), torch.tensor([[[True, False, False, False]]])
    assert theirs("PointingGame", map, mask) == [1.0]
    assert metrics.pointing_game(map, mask).tolist() == [0.25]


def test_entropy_of_signed_maps():
    """Theirs takes magnitudes before (`abs=True`), ours the positive part: what speaks against the class is no energy."""
    map = torch.tensor([[[1.0, 1.0, -1.0, -1.0]]], dtype=torch.float64)
    assert theirs("Complexity", map.abs()) == pytest.approx([math.log(4)])
    assert metrics.entropy(map).tolist() == pytest.approx([math.log(2)])


def test_complexity_of_a_map_of_zeros():
    """Theirs divides 0 by 0 in the entropy. Ours takes the map for a flat one in both."""
    zeros = torch.zeros(1, 2, 2, dtype=torch.float64)
    assert np.isnan(theirs("Complexity", zeros)).all()
    assert metrics.entropy(zeros).tolist() == pytest.approx([math.log(4)])
    assert theirs("Sparseness", zeros) == pytest.approx([0.0])
    assert metrics.gini(zeros).tolist() == [0.0]


def test_rank_correlation_of_flat_maps():
    """Theirs is NaN. Ours is 1 for two flat maps, which are alike, and 0 for one."""
    from quantus.functions.similarity_func import correlation_spearman

    flat, map = torch.zeros(1, 2, 2, dtype=torch.float64), drawn()[0][:1, :2, :2]
    assert np.isnan(correlation_spearman(flat.flatten().numpy(), map.flatten().numpy()))
    assert metrics.rank_correlation(flat, map).tolist() == [0.0]
    assert metrics.rank_correlation(flat, flat).tolist() == [1.0]


def test_ssim_has_another_window():
    """Theirs is scikit-image's default: flat windows of 7, without the border, and the range of both maps together. Ours is the
    paper's Gaussian, and each map has its own range, so that it does not read the scale of a map."""
    from quantus.functions.similarity_func import ssim

    map = drawn()[0][0]
    assert float(ssim(map.numpy(), 5 * map.numpy())) < 0.9
    assert float(metrics.ssim(map, 5 * map)) == pytest.approx(1)

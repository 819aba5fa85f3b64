"""Removal of objects: the protocols on small tables, and on the shipped scenes."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import camfn
from camfn import CamError, demo, metrics


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- tables


@given(seed=st.integers(0, 999), levels=st.sampled_from([3, 10_000]))
@settings(max_examples=20, deadline=None)
def test_single_deletion_is_a_correlation(seed, levels):
    stats = pytest.importorskip("scipy.stats")
    shares, drops = ((random(7, seed=seed + k) * levels).floor() for k in (0, 1000))
    if len(shares.unique()) == 1 or len(drops.unique()) == 1:
        return
    for ranked, expected in ((True, stats.spearmanr), (False, stats.pearsonr)):
        found = float(metrics.single_deletion(shares, drops, ranked=ranked))
        assert found == pytest.approx(expected(shares.numpy(), drops.numpy()).statistic, abs=1e-12)


def test_equal_shares_say_nothing():
    drops = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [3.0, 1.0, 2.0]])
    shares = torch.tensor([[0.2, 0.2, 0.2], [0.2, 0.2, 0.2], [0.2, torch.nan, 0.4]])
    for ranked in (True, False):
        found = metrics.single_deletion(shares, drops, ranked=ranked)
        assert found[:2].tolist() == [0, 0]
        assert found[2].isnan()


@pytest.mark.parametrize("ranked", [True, False])
def test_shares_and_drops_that_are_not_finite_have_no_correlation(ranked):
    known, lost = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.2, torch.inf, 0.5])
    assert metrics.single_deletion(lost, known, ranked=ranked).isnan()
    assert metrics.single_deletion(known, lost, ranked=ranked).isnan()


def test_checks_look_up_the_set_of_removed_objects():
    held = random(3, 8, seed=3) > 0.5
    for important in itertools.product([0.0, 0.5], repeat=3):
        shares = torch.tensor(important).expand(3, 3)
        removed = sum(2**j for j, share in enumerate(important) if share > 0.1)
        assert torch.equal(metrics.preservation_check(shares, held), held[:, 7 - removed].float())
        assert torch.equal(metrics.deletion_check(shares, held), (~held[:, removed]).float())


def test_a_map_on_everything_preserves_and_one_on_nothing_deletes_nothing():
    held = torch.tensor([[True, False, False, False]])
    for share in (0.0, torch.nan):
        shares = torch.tensor([[share, 0.8]])
        assert metrics.preservation_check(shares, held) == 0  # the first object is removed, in either case
    everything, nothing = torch.tensor([[0.5, 0.4]]), torch.tensor([[torch.nan, 0.0]])
    assert metrics.preservation_check(everything, held) == 1
    assert metrics.preservation_check(nothing, held) == 0
    assert metrics.deletion_check(nothing, held) == 0


def test_target_sensitivity_counts_pairs_that_the_model_tells_apart():
    shares = torch.tensor([[0.5, 0.1, 0.6], [0.2, 0.5, 0.0], [0.55, 0.2, 0.4]])
    drops = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]])
    # s_00 > s_10, s_11 > s_01, s_11 > s_21, s_22 > s_12; but neither s_00 > s_20 nor s_22 > s_02
    assert metrics.target_sensitivity(shares, drops) == pytest.approx(4 / 6)
    drops[2, 0] = 9.0  # the model itself takes object 0 for more of class 2 than object 2 is
    assert metrics.target_sensitivity(shares, drops) == pytest.approx(4 / 4)
    assert metrics.target_sensitivity(shares, torch.zeros(3, 3)).isnan()
    assert metrics.target_sensitivity(torch.full((3, 3), 0.3), torch.eye(3)) == 0
    assert metrics.target_sensitivity(torch.ones(1, 1), torch.ones(1, 1)).isnan()


def test_irrelevant_objects_take_little_of_the_score_or_raise_it():
    drops = torch.tensor([[0.04, 0.06, -2.0], [0.04, 0.06, -2.0]])
    clean = torch.tensor([1.0, -2.0])
    assert metrics.irrelevant(drops, clean).tolist() == [[True, False, True], [True, True, True]]
    assert metrics.background_independence(drops, clean).tolist() == pytest.approx([2 / 3, 1])
    shares = torch.tensor([[0.5, 0.0, 0.0], [0.5, 0.5, 0.5]])
    assert metrics.distractibility(shares, drops, clean).tolist() == [0.5, 0]
    assert metrics.distractibility(shares[:1], 0 * drops[:1] + 1, clean[:1]).isnan()


def test_what_removal_metrics_do_not_take():
    with pytest.raises(CamError, match="pass at least two objects, and the same shape"):
        metrics.single_deletion(random(2, 3), random(2, 2))
    with pytest.raises(CamError, match="pass at least two objects, and the same shape"):
        metrics.single_deletion(random(2, 1), random(2, 1))
    with pytest.raises(CamError, match=r"held is torch\.float64 of shape \(2, 8\): it must be bools \(2, 8\)"):
        metrics.preservation_check(random(2, 3), random(2, 8))
    with pytest.raises(CamError, match=r"it must be bools \(2, 8\), one for each set of the 3 objects"):
        metrics.deletion_check(random(2, 3), random(2, 4) > 0.5)
    for check in (metrics.preservation_check, metrics.deletion_check):
        with pytest.raises(CamError, match=r"shares have shape \(\): they must be \(\.\.\., k\)"):
            check(torch.tensor(0.5), torch.tensor(True))
    for metric in (metrics.irrelevant, metrics.background_independence):
        for drops, clean in ((random(2, 3), random(3)), (random(2, 3), random(2, 1)), (torch.tensor(0.5), torch.tensor(0.5))):
            with pytest.raises(CamError, match=r"they must be \(\.\.\., k\) and \(\.\.\.\)"):
                metric(drops, clean)
    with pytest.raises(CamError, match=r"both must be \(\.\.\., k, k\)"):
        metrics.target_sensitivity(torch.tensor(0.5), torch.tensor(0.5))
    with pytest.raises(CamError, match=r"both must be \(\.\.\., k, k\)"):
        metrics.target_sensitivity(random(2, 3), random(2, 3))
    with pytest.raises(CamError, match="the last without the axis of objects"):
        metrics.distractibility(random(2, 3), random(2, 3), random(3))


# --------------------------------------------------------------------------------------------------------- the scenes


@functools.cache
def removed() -> dict[str, torch.Tensor]:
    """What the shipped network says of twelve scenes of three objects and a distractor without each of them, by class."""
    pytest.importorskip("safetensors")
    network, found = demo.network(), [demo.interventions(seed, 3, distractors=1, grounds=2) for seed in range(12)]
    classes = torch.tensor([one.classes for one in found])

    def scores(pictures: list[torch.Tensor]) -> torch.Tensor:
        """`(n, t, pictures)`: the scores of each image's classes."""
        with torch.no_grad():
            logits = network(demo.preprocess(torch.cat(pictures))).unflatten(0, (len(found), -1))
        return logits.gather(2, classes[:, None].expand(-1, logits.shape[1], -1)).mT

    sets = scores([one.without for one in found])
    clean = sets[..., 0]
    return {
        "x": torch.stack([demo.preprocess(one.image) for one in found]),
        "classes": classes,
        "masks": torch.stack([one.masks for one in found]),
        "bars": torch.stack([one.distractors for one in found]),
        "clean": clean,
        "drops": clean[..., None] - sets[..., [1, 2, 4]],
        "bar drops": clean[..., None] - scores([one.undistracted for one in found]),
        "ground drops": clean[..., None] - scores([one.grounds for one in found]),
    }


def shares_of(name: str, masks: str = "masks") -> torch.Tensor:
    facts = removed()
    method = camfn.METHODS[name].function
    maps = method(demo.network(), "features", facts["x"], facts["classes"], relu=False, normalize=False)
    return metrics.object_energy(maps if maps.ndim == 4 else maps[:, None].expand(-1, 3, -1, -1), facts[masks])


def test_what_a_removal_takes_is_where_the_map_of_a_class_lies():
    """Lesson 6: the correlation is high with the class, and none without."""
    drops = removed()["drops"].flatten(1)
    grad, mean = (
        metrics.single_deletion(shares_of(name).flatten(1), drops, ranked=False).nanmean() for name in ("grad_cam", "mean_cam")
    )
    assert grad > 0.8
    assert abs(mean) < 0.25
    assert metrics.target_sensitivity(shares_of("grad_cam"), removed()["drops"]).nanmean() > 0.9
    assert metrics.target_sensitivity(shares_of("mean_cam"), removed()["drops"]).nanmean() == 0


def test_what_is_idle_is_less_important_with_the_class():
    facts = removed()
    drops = torch.cat([facts["drops"], facts["bar drops"]], -1)
    grad, mean = (
        metrics.distractibility(torch.cat([shares_of(name), shares_of(name, "bars")], -1), drops, facts["clean"]).nanmean()
        for name in ("grad_cam", "mean_cam")
    )
    assert grad > 0.8 > 0.4 > mean
    independent = metrics.background_independence(facts["ground drops"], facts["clean"])
    assert independent.shape == (12, 3)
    assert 0 < independent.mean() < 1

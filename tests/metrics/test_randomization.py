"""Model-parameter randomization: what stays the same when weights are drawn anew, on small and on the shipped network."""

import pytest
import torch
from torch import nn

import camfn
from camfn import CamError, demo, metrics
from tests.oracles.networks import inputs, small_net


def explained(model: nn.Module, name: str, x: torch.Tensor, classes):
    method = camfn.METHODS[name].function
    return lambda state: method(model, "features", x, classes, relu=False, normalize=False, state=state)


@pytest.mark.parametrize("cascading", [True, False])
def test_it_is_the_similarity_with_the_map_of_each_state(cascading):
    model, x = small_net().eval(), inputs()
    explain = explained(model, "grad_cam", x, [1, 2])
    found = metrics.model_randomization(model, x, explain, cascading=cascading, seed=3)
    clean = explain(camfn.state_of(model))
    states = dict(metrics.randomized_states(model, x, cascading=cascading, seed=3))
    assert found.layers == (*states,)
    assert found.rank_correlation.shape == found.ssim.shape == (4, 2)
    for number, state in enumerate(states.values()):
        assert torch.equal(found.rank_correlation[number], metrics.rank_correlation(clean, explain(state)))
        assert torch.equal(found.ssim[number], metrics.ssim(clean, explain(state)))


def test_only_what_lies_below_the_layer_changes_a_map_without_a_class():
    model, x = small_net().eval(), inputs()
    found = metrics.model_randomization(model, x, explained(model, "mean_cam", x, None), cascading=False)
    same = dict(zip(found.layers, (found.rank_correlation == 1).all(1).tolist()))
    assert same == {"fc": True, "features": False, "stem.1": False, "stem.0": False}


def test_a_map_that_does_not_read_the_weights_stays():
    model, x = small_net().eval(), inputs()
    edges = metrics.input_edges(x, (4, 4))
    found = metrics.model_randomization(model, x, lambda state: edges)
    assert torch.allclose(found.rank_correlation, torch.ones(4, 2, dtype=torch.float64))
    assert torch.allclose(found.ssim, torch.ones(4, 2, dtype=torch.float64))


def test_a_map_that_is_not_finite_has_no_similarity():
    model, x = small_net().eval(), inputs()
    maps = torch.rand(2, 3, 4, 4)
    maps[1, 2, 0, 0] = torch.nan
    found = metrics.model_randomization(model, x, lambda state: maps, layers=["fc"])
    assert found.ssim.isnan().nonzero().tolist() == found.rank_correlation.isnan().nonzero().tolist() == [[0, 1, 2]]


def test_a_clean_map_that_is_not_finite_has_no_similarity():
    model, x = small_net().eval(), inputs()
    trained, maps = camfn.state_of(model), torch.rand(2, 3, 4, 4)
    broken = maps.clone()
    broken[1, 2, 0, 0] = torch.nan

    def explain(state):
        return broken if all(torch.equal(state[name], trained[name]) for name in trained) else maps

    found = metrics.model_randomization(model, x, explain, layers=["fc"])
    assert found.ssim.isnan().nonzero().tolist() == found.rank_correlation.isnan().nonzero().tolist() == [[0, 1, 2]]


def test_there_is_something_to_draw():
    with pytest.raises(CamError, match="no parameters to draw anew"):
        metrics.model_randomization(nn.ReLU(), inputs(), lambda state: inputs()[:, 0])


def test_on_the_shipped_network_the_classifier_matters_to_grad_cam_alone():
    pytest.importorskip("safetensors")
    network, scenes = demo.network(), [demo.scene(seed) for seed in range(6)]
    x = torch.stack([demo.preprocess(scene.image) for scene in scenes])
    classes = [scene.classes[0] for scene in scenes]
    found = {
        name: metrics.model_randomization(network, x, explained(network, name, x, classes), layers=["classify", "features"])
        for name in ("grad_cam", "mean_cam")
    }
    assert found["grad_cam"].rank_correlation[0].mean() < 0.6
    assert (found["mean_cam"].rank_correlation[0] > 1 - 1e-6).all()
    assert found["mean_cam"].ssim[1].mean() < 0.9

"""Opti-CAM against a loop with `torch.optim.Adam` and a plain hook, and what it must do whatever the loop says."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

import camfn
from tests.oracles.closeness import assert_close, close
from tests.oracles.networks import inputs, small_net

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def seen_at(net: nn.Module, layer: str, x: Tensor) -> Tensor:
    kept = []
    handle = net.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out.detach().clone()))
    with torch.no_grad():
        net(x)
    handle.remove()
    return kept[0]


def loop(net: nn.Module, layer: str, x: Tensor, target, steps: int, rate: float) -> tuple[Tensor, Tensor]:
    """Weights `(n, c)` and signed maps of each image; `target` of one image's output."""
    axes, weights, maps = x.ndim - 2, [], []
    for image, a in zip(x.split(1), seen_at(net, layer, x).split(1)):
        u = torch.zeros(a.shape[1], dtype=x.dtype, requires_grad=True)
        optimiser = torch.optim.Adam([u], lr=rate)

        def map_of(u: Tensor = u, a: Tensor = a) -> Tensor:
            return (u.softmax(0).reshape(-1, *[1] * axes) * a[0]).sum(0)

        for _ in range(steps):
            optimiser.zero_grad()
            mask = F.interpolate(map_of()[None, None], image.shape[2:], mode=MODES[axes], align_corners=False)[0, 0]
            mask = (mask - mask.min()) / (mask.max() - mask.min())
            (-target(net(image * mask)[0])).backward()
            optimiser.step()
        weights.append(u.detach().softmax(0))
        maps.append(map_of().detach())
    return torch.stack(weights), torch.stack(maps)


@pytest.mark.parametrize(("dims", "dense"), [(1, False), (2, True), (3, False)])
@pytest.mark.parametrize(("steps", "rate"), [(1, 0.1), (7, 0.3)])
def test_weights_are_what_adam_finds(dims, dense, steps, rate):
    net, x = small_net(dims=dims, dense=dense, side=6).eval(), inputs(2, dims=dims, side=6)
    weights, maps = loop(net, "act", x, lambda y: y[1] - y[2], steps, rate)
    card = camfn.explain(net, "act", x, lambda y: y[1] - y[2], method="opti_cam", steps=steps, rate=rate, normalize=False)
    assert_close(card.weights[0][:, 0], weights, 1e-9, "weights")
    assert_close(card.maps, maps, 1e-9, "maps")
    assert (weights - 1 / 6).abs().max() > 0.01, "it has moved"
    assert (card.forwards, card.backwards) == (2 + 2 * steps, 2 * steps)


def test_every_image_and_target_has_weights_of_its_own():
    net, x = small_net().eval(), inputs(3)
    together = camfn.explain(net, "act", x, "all", method="opti_cam", steps=5).weights[0]
    for i, c in itertools.product(range(3), range(5)):
        alone, _ = loop(net, "act", x[i : i + 1], lambda y, c=c: y[c], 5, 0.1)
        assert_close(together[i, c], alone[0], 1e-9, f"image {i}, class {c}")
    close(together.sum(-1), torch.ones_like(together[..., 0]))


def test_the_masked_input_scores_the_higher_the_longer_it_is_optimised():
    net, x = small_net().eval(), inputs(2)
    scores = []
    for steps in (1, 10, 50):
        mask = camfn.opti_cam(net, "act", x, 1, steps=steps, normalize=False, size="input")
        with torch.no_grad():
            scores.append(net(x * camfn.maps.normalize(mask, (1, 2))[:, None])[:, 1])
    assert (scores[1] > scores[0]).all()
    assert (scores[2] > scores[1]).all()


@pytest.mark.parametrize("sweep", [{"chunk": 1}, {"chunk": 4}, {"fold": False}, {"memory": 1}, {"compile": True}], ids=str)
def test_how_it_is_run_does_not_matter(sweep):
    net, x = small_net().eval(), inputs(3)
    expected = camfn.opti_cam(net, "act", x, "all", steps=3, normalize=False)
    found = camfn.opti_cam(net, "act", x, "all", steps=3, normalize=False, sweep=camfn.Sweep(**sweep))
    close(found, expected)


def test_under_a_transform_it_is_the_same():
    net, x = small_net().eval(), inputs(3)
    expected = camfn.opti_cam(net, "act", x, 1, steps=3, normalize=False)
    found = vmap(lambda one: camfn.opti_cam(net, "act", one[None], 1, steps=3, normalize=False)[0])(x)
    close(found, expected)


def test_channels_without_a_part_keep_their_weight_and_no_gradient_is_lost():
    net, x = small_net().eval(), inputs(2)
    with torch.no_grad():
        net.features.weight[2], net.features.bias[2] = 0, 0
    card = camfn.explain(net, "act", x, 1, method="opti_cam", steps=4)
    weights, _ = loop(net, "act", x, lambda y: y[1], 4, 0.1)
    assert_close(card.weights[0][:, 0], weights, 1e-9)
    gradient = torch.func.grad(lambda x: camfn.opti_cam(net, "act", x, 1, steps=4, normalize=False).sum())(x)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 1e-6


def test_progress_tells_every_forward():
    told = []
    sweep = camfn.Sweep(chunk=2, progress=lambda done, total: told.append((done, total)))
    card = camfn.explain(small_net(), "act", inputs(3), [0, 1, 2], method="opti_cam", steps=4, sweep=sweep)
    assert told == [(8, 12), (12, 12)]
    assert card.forwards == 3 + 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "whole number of steps >= 1, found 0"),
        ({"steps": True}, "whole number of steps >= 1, found True"),
        ({"steps": 2.5}, "whole number of steps >= 1, found 2.5"),
        ({"rate": 0}, "finite rate > 0, found 0"),
        ({"rate": float("inf")}, "finite rate > 0, found inf"),
        ({"rate": "fast"}, "finite rate > 0, found 'fast'"),
    ],
)
def test_wrong_steps_and_rates(options, words):
    with pytest.raises(camfn.CamError, match=words):
        camfn.opti_cam(small_net(), "act", inputs(), 1, **options)


def test_a_score_without_a_finite_slope_is_an_error():
    with pytest.raises(camfn.CamError, match="opti_cam came to scores that are not finite"):
        camfn.opti_cam(small_net(), "act", inputs(), lambda y: (y[0] - y[0]).sqrt(), steps=2)

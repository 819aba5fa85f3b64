"""The noise of SS-CAM: what it depends on (seed, draw, channel) and what it does not (all else)."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import camfn
from tests.oracles.closeness import assert_close, close
from tests.oracles.networks import inputs, small_net

NOISES = ("mask", "activation", "input")
DRAWS, STD = 3, 0.5
RAW_SCORES = camfn.Recipe(weights="score")  # the weights are the scores themselves: one channel's does not move another's
CHANNELS, CLASSES = 5, 4
SEEN: list[Tensor] = []


class Reader(nn.Module):
    """Logits linear in the input, so that scores show the noise; two layers beside it, of equal shape, have no part in it."""

    def __init__(self, side: int = 8, flat: int | None = None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1)
        self.second = nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1)
        self.fc = nn.Linear(3 * side * side, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)
            if flat is not None:
                self.first.weight[flat] = 0.0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x)
        self.first(x), self.second(x)
        return self.fc(x.flatten(1))


def scores(x: Tensor, model: nn.Module | None = None, layer="first", target=1, recipe=RAW_SCORES, **options) -> Tensor:
    """`S_k` of every channel, `(n, c)`; for a tuple of layers, a list."""
    options = {"num_samples": DRAWS, "std": STD, "noise": "mask", "seed": 3} | options
    outcome = camfn.METHODS["ss_cam"].run(model or Reader(x.shape[-1]), layer, x, target, recipe=recipe, **options)
    found = [weights[:, 0] for weights in outcome.weights]
    return found if isinstance(layer, tuple) else found[0]


# ------------------------------------------------------------------------------------------------------------ the seed


@pytest.mark.parametrize("noise", NOISES)
def test_the_same_seed_gives_the_same_map_to_the_bit_and_another_another(noise):
    x = inputs(2)
    again = [scores(x, noise=noise, seed=seed) for seed in (3, 3, 4, 0, 2**31)]
    assert torch.equal(again[0], again[1])
    for i, one in enumerate(again[1:]):
        for other in again[i + 2 :]:
            assert float((one - other).abs().min()) > 1e-6  # in every channel of every image


def test_the_default_seed_is_zero():
    model, x = Reader(), inputs(1)
    maps = [camfn.ss_cam(model, "first", x, 1, num_samples=2, **seed) for seed in ({}, {"seed": 0})]
    assert torch.equal(*maps)


@pytest.mark.parametrize("noise", NOISES)
def test_a_generator_counts_as_the_seed_it_was_given(noise):
    x = inputs(2)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(scores(x, noise=noise, seed=generator), scores(x, noise=noise, seed=3))


@pytest.mark.parametrize("noise", NOISES)
def test_a_generator_is_copied_where_it_stands_and_not_advanced(noise):
    x = inputs(2)
    generator = torch.Generator().manual_seed(3)
    torch.randn(17, generator=generator)  # an odd number leaves half a pair of normal numbers behind
    state = generator.get_state()
    one, other = (scores(x, noise=noise, seed=generator) for _ in range(2))
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(one, other)
    assert not torch.allclose(one, scores(x, noise=noise, seed=3))


def test_a_generator_gives_the_numbers_that_it_would_have_given():
    x = inputs(1)
    generator = torch.Generator().manual_seed(3)
    torch.randn(32, generator=generator)
    found = scores(x, seed=generator) - scores(x, std=0.0)
    expected = of_noise(x, torch.randn(DRAWS, CHANNELS, 8, 8, generator=generator) * STD)
    close(found, expected)


def of_noise(x: Tensor, noise: Tensor, target: int = 1) -> Tensor:
    """What noise on the mask, `(draws, channels, *size)`, adds to the scores: the linear logit of `x * mean noise`."""
    row = Reader(x.shape[-1]).fc.weight[target].detach().reshape(x.shape[1:])
    return torch.einsum("khw,nihw,ihw->nk", noise.double().mean(0), x, row)


@pytest.mark.parametrize("noise", NOISES)
def test_the_global_random_state_neither_counts_nor_moves(noise):
    x, model = inputs(1), Reader()
    state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = scores(x, model, noise=noise)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy)  # noqa: NPY002
    try:
        torch.manual_seed(123)
        assert torch.equal(scores(x, model, noise=noise), first)
    finally:
        torch.set_rng_state(state)


# ------------------------------------------------------------------------------------------ what it does not depend on


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("side", [8, 5])
def test_noise_does_not_depend_on_the_chunk(side, noise, chunk):
    """Of a mask of 25 pixels too, where numbers drawn together are not those drawn one by one."""
    x = inputs(2, side=side)
    found = scores(x, noise=noise, sweep=camfn.Sweep(chunk=chunk, compile=False))
    close(found, scores(x, noise=noise))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("side", [8, 5])
@pytest.mark.parametrize("flat", [0, 2])
def test_noise_does_not_depend_on_channels_that_are_skipped(flat, side, noise):
    """A flat channel that a recipe leaves out is drawn for all the same: the others keep their scores."""
    x, skip = inputs(2, side=side), RAW_SCORES._replace(flat="skip")
    others = [k for k in range(CHANNELS) if k != flat]
    full = scores(x, noise=noise)
    for recipe in (skip, RAW_SCORES):
        found = scores(x, Reader(side, flat=flat), noise=noise, recipe=recipe)
        close(found[:, others], full[:, others])
        assert float((found[:, flat] - full[:, flat]).abs().min()) > 1e-6
    assert torch.equal(scores(x, Reader(side, flat=flat), noise=noise, recipe=skip)[:, flat], torch.zeros(2).double())


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("side", [8, 5])
def test_noise_does_not_depend_on_the_other_images(side, noise):
    x = inputs(3, side=side)
    together = scores(x, noise=noise, target=[1, 0, 3])
    alone = torch.cat([scores(x[i : i + 1], noise=noise, target=c) for i, c in enumerate([1, 0, 3])])
    close(together, alone)


@pytest.mark.parametrize("noise", NOISES)
def test_images_share_the_noise(noise):
    x = inputs(1).expand(3, -1, -1, -1)
    found = scores(x, noise=noise)
    close(found, found[:1].expand(3, -1))


def test_an_image_with_flat_channels_leaves_its_neighbours_noise_alone():
    x, skip = inputs(2), RAW_SCORES._replace(flat="skip")
    x[0] = 0.0  # every channel flat inside the padding: only the border is left
    model = Reader()
    with torch.no_grad():
        model.first.weight[1:3] = 0.0
    alone = scores(x[1:], model, recipe=skip)
    close(scores(x, model, recipe=skip)[1:], alone)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("side", [8, 5])
def test_every_layer_starts_again_from_the_seed(side, noise):
    x = inputs(2, side=side)
    generator = torch.Generator().manual_seed(3)
    for seed in (3, generator):
        for layer, found in zip(("first", "second"), scores(x, layer=("first", "second"), noise=noise, seed=seed)):
            close(found, scores(x, layer=layer, noise=noise, seed=seed), layer)


def test_two_layers_have_the_same_noise():
    """What the noise adds is the noise's own, whatever the mask."""
    x = inputs(2)
    noisy, clean = (scores(x, layer=("first", "second"), std=std) for std in (STD, 0.0))
    assert float((clean[0] - clean[1]).abs().min()) > 1e-6
    close(noisy[0] - clean[0], noisy[1] - clean[1])


@pytest.mark.parametrize("target", [camfn.targets.top(2), "all", torch.tensor([[0, 1], [2, 3]])], ids=["top", "all", "tensor"])
def test_noise_does_not_depend_on_the_targets(target):
    x, model = inputs(2), Reader()
    outcome = camfn.METHODS["ss_cam"].run(model, "first", x, target, num_samples=DRAWS, std=STD, seed=3, recipe=RAW_SCORES)
    for t in range(outcome.classes.shape[1]):
        close(outcome.weights[0][:, t], scores(x, target=outcome.classes[:, t]))


@pytest.mark.parametrize("side", [8, 5])
def test_noise_of_a_draw_does_not_depend_on_how_many_there_are(side):
    """Draws are outermost: the first of three are those of two."""
    x = inputs(1, side=side)
    sums = [scores(x, num_samples=draws, target="all") * draws for draws in (1, 2, 3)]
    drawn = [noise_seen(x, draws) for draws in (1, 2, 3)]
    assert torch.equal(drawn[2][: 2 * CHANNELS], drawn[1])
    assert torch.equal(drawn[1][:CHANNELS], drawn[0])
    steps = [sums[0], sums[1] - sums[0], sums[2] - sums[1]]
    assert all(float((steps[i] - steps[j]).abs().min()) > 1e-6 for i, j in ((0, 1), (0, 2), (1, 2)))


def noise_seen(x: Tensor, draws: int) -> Tensor:
    """The rows that the model saw beside the clean input, one channel after the other, draws outermost."""
    SEEN.clear()
    scores(x, num_samples=draws, sweep=camfn.Sweep(chunk=32, fold=True, compile=False))
    return torch.cat(SEEN)[1:]


@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_noise_is_proportional_to_the_deviation(scale):
    x = inputs(2)
    clean = scores(x, std=0.0)
    close(scores(x, std=scale) - clean, (scores(x, std=1.0) - clean) * scale)


def test_noise_does_not_depend_on_the_type_of_the_model():
    """Drawn in float32 whatever the model runs in; float32 rounds the scores, of size 10, by some 1e-6 each."""
    x = inputs(1)
    found = scores(x.float(), Reader().float())
    assert_close(found.double(), scores(x), 1e-4)


# --------------------------------------------------------------------------------------------------- under transforms


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("side", [8, 5])
def test_noise_is_the_same_under_vmap_over_images(side, noise):
    x, model = inputs(3, side=side), small_net(side=side)
    options = {"num_samples": 2, "std": STD, "seed": 3, "noise": noise, "normalize": False}

    def one(image: Tensor) -> Tensor:
        return camfn.ss_cam(model, "features", image[None], 1, **options)[0]

    close(vmap(one)(x), camfn.ss_cam(model, "features", x, 1, **options))


@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_the_same_for_every_state_under_vmap(noise):
    x, models = inputs(2), [small_net(seed) for seed in (0, 1)]
    states = [camfn.state_of(model) for model in models]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    options = {"num_samples": 2, "std": STD, "seed": 3, "noise": noise, "normalize": False}
    found = vmap(lambda state: camfn.ss_cam(models[0], "features", x, 1, state=state, **options))(stacked)
    for model, ours in zip(models, found):
        close(ours, camfn.ss_cam(model, "features", x, 1, **options))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("side", [8, 5])
def test_noise_is_the_same_under_grad(side, noise):
    x, model = inputs(2, side=side), small_net(side=side)
    options = {"num_samples": 2, "std": STD, "seed": 3, "noise": noise, "normalize": False}

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        maps = camfn.ss_cam(model, "features", x, 1, **options)
        return maps.sum(), maps

    _, maps = torch.func.grad(loss, has_aux=True)(x)
    close(maps, camfn.ss_cam(model, "features", x, 1, **options))

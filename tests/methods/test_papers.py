"""The seed methods against plain loops written from the papers and their authors' code, and against closed forms.

Nothing of camfn computes an expected value here: the layer is read by a hook on a copy, channels and draws are loops.
"""

import math

import pytest
import torch
from torch import Tensor, nn

import camfn
from tests.oracles.closeness import close
from tests.oracles.loops import DIMS, activation_of, frozen, is_flat, min_max, upsampled
from tests.oracles.networks import inputs, net_with_flat_channels, small_net

RECIPES = ("torchcam", "pytorch-grad-cam", "authors", "paper")


def mask_by(recipe: str, channel: Tensor, size) -> Tensor:
    if recipe == "torchcam":
        return upsampled(min_max(channel, 1e-8), size, False)
    if recipe == "pytorch-grad-cam":
        return min_max(upsampled(channel, size, True), 1e-8)
    return min_max(upsampled(channel, size, False), 0.0)


def score_by(recipe: str, model: nn.Module, masked: Tensor, c: int) -> float:
    logits = frozen(model)(masked[None])[0]
    return float(logits.softmax(0)[c] if recipe == "authors" else logits[c])


def weights_by(recipe: str, scores: list[float | None]) -> Tensor:
    """The authors weigh by the score itself; the others by a softmax, over all channels."""
    if recipe == "authors":
        return torch.tensor([0.0 if s is None else s for s in scores], dtype=torch.float64)
    total = sum(math.exp(s) for s in scores)
    return torch.tensor([math.exp(s) / total for s in scores], dtype=torch.float64)


def map_by(weights: Tensor, channels: Tensor) -> Tensor:
    total = torch.zeros(channels.shape[1:], dtype=torch.float64)
    for weight, channel in zip(weights.tolist(), channels):
        total += weight * channel
    return total.clamp(min=0)


def score_cam_loop(model, layer: str, x: Tensor, classes: list[int], recipe: str) -> Tensor:
    """Algorithm 1 of the paper without its baseline, or the authors' loop, at the layer's grid; raw."""
    maps = []
    for image, channels, c in zip(x, activation_of(model, layer, x), classes):
        scores = []
        for channel in channels:
            if recipe == "authors" and is_flat(channel):
                scores.append(None)
                continue
            scores.append(score_by(recipe, model, image * mask_by(recipe, channel, image.shape[1:]), c))
        maps.append(map_by(weights_by(recipe, scores), channels))
    return torch.stack(maps)


# ---------------------------------------------------------------------------------------------------------- Score-CAM


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("layer", ["stem", "features"])
def test_score_cam_is_the_loop_over_channels(layer, dims, recipe):
    model, x, classes = net_with_flat_channels(dims), inputs(2, dims), [3, 1]
    found = camfn.score_cam(model, layer, x, classes, recipe=recipe, normalize=False)
    close(found, score_cam_loop(model, layer, x, classes, recipe), recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_score_cam_is_the_loop_where_the_grid_does_not_divide_the_input(recipe):
    model, x = small_net(), inputs(1, side=9)[..., :7]
    found = camfn.score_cam(model, "features", x, 2, recipe=recipe, normalize=False)
    close(found, score_cam_loop(model, "features", x, [2], recipe), recipe)


def test_the_authors_loop_at_the_size_of_the_input():
    """Their code sums upsampled maps, weighed by probabilities, then ReLU and min-max: ours resizes the sum."""
    model, x, c = net_with_flat_channels(2), inputs(1), 3
    total = torch.zeros(8, 8, dtype=torch.float64)
    for channel in activation_of(model, "act", x)[0]:
        raw = upsampled(channel, (8, 8), False)
        if is_flat(raw):
            continue
        probability = frozen(model)(x * (raw - raw.min()) / (raw.max() - raw.min())).softmax(1)[0, c]
        total += probability * raw
    total = total.clamp(min=0)
    expected = (total - total.min()) / (total.max() - total.min())
    close(camfn.score_cam(model, "act", x, c, recipe="authors", size="input"), expected[None])


def test_the_papers_algorithm_with_its_baseline():
    """`S_k = f(x * M_k) - f(0)`: a constant, which the softmax takes away."""
    model, x, c = small_net(), inputs(1), 3
    net, channels = frozen(model), activation_of(model, "features", x)[0]
    baseline = net(torch.zeros_like(x))[0, c]
    masks = [upsampled(channel, (8, 8), False) for channel in channels]
    masks = [(mask - mask.min()) / (mask.max() - mask.min()) for mask in masks]
    scores = torch.stack([net(x * mask)[0, c] - baseline for mask in masks])
    alpha = scores.exp() / scores.exp().sum()
    expected = sum(a * channel for a, channel in zip(alpha, channels)).clamp(min=0)[None]
    assert float(baseline.abs()) > 0.01
    close(camfn.score_cam(model, "features", x, c, recipe="paper", normalize=False), expected)


def test_each_recipe_is_its_own():
    """No two of them agree on this network: a recipe that took the place of another would be seen."""
    model, x = net_with_flat_channels(2), inputs(1)
    maps = [camfn.score_cam(model, "features", x, 3, recipe=recipe, normalize=False) for recipe in RECIPES]
    for i, one in enumerate(maps):
        for other in maps[i + 1 :]:
            assert float((one - other).abs().max()) > 1e-3


@pytest.mark.parametrize("recipe", RECIPES)
def test_options_of_the_map_come_after_the_sum(recipe):
    """Combine, ReLU, resize, normalise: each on the loop's own numbers."""
    model, x = small_net(), inputs(1)
    channels = activation_of(model, "features", x)[0]
    size = x.shape[2:]
    scores = [score_by(recipe, model, x[0] * mask_by(recipe, channel, size), 3) for channel in channels]
    signed = torch.einsum("k,khw->hw", weights_by(recipe, scores), channels)
    assert float(signed.min()) < 0 < float(signed.max())
    resized = upsampled(signed.clamp(min=0), (5, 11), False)
    for options, expected in (
        ({"relu": False, "normalize": False}, signed),
        ({"relu": False}, (signed - signed.min()) / (signed.max() - signed.min())),
        ({"size": (5, 11), "normalize": False}, resized),
        ({"size": (5, 11)}, (resized - resized.min()) / (resized.max() - resized.min())),
    ):
        found = camfn.score_cam(model, "features", x, 3, recipe=recipe, **options)
        close(found, expected[None], f"{recipe} {options}")


# -------------------------------------------------------------------------------------------------------------- SS-CAM


def noise_like_one_draw(shape, seed: int, std: float) -> Tensor:
    """All of it drawn at once: `(draws, channels, ...)`; equal to pieces where each has a multiple of 16 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def noisy_input(noise: str, recipe: str, image: Tensor, channel: Tensor, e: Tensor) -> Tensor:
    """The three forms. `e` has deviation `std`."""
    size = image.shape[1:]
    if noise == "mask":
        return image * (mask_by(recipe, channel, size) + e)
    if noise == "activation":
        aligned, eps = recipe == "pytorch-grad-cam", 1e-8 if recipe in ("torchcam", "pytorch-grad-cam") else 0.0
        return image * min_max(upsampled(channel, size, aligned) + e, eps)
    masked = image * mask_by(recipe, channel, size)
    span = float(masked.max() - masked.min())
    # The deviation is std / span; the authors' code passes its square.
    return masked + e.double() / span if span > 0 else masked


def ss_cam_loop(model, layer: str, x: Tensor, c: int, recipe: str, noise: str, draws: int, std: float, seed: int) -> Tensor:
    maps = []
    for image, channels in zip(x, activation_of(model, layer, x)):
        shape = image.shape if noise == "input" else image.shape[1:]
        e = noise_like_one_draw((draws, len(channels), *shape), seed, std)
        scores = []
        for k, channel in enumerate(channels):
            if recipe == "authors" and is_flat(channel):
                scores.append(None)
                continue
            rows = [noisy_input(noise, recipe, image, channel, e[i, k]) for i in range(draws)]
            scores.append(sum(score_by(recipe, model, row, c) for row in rows) / draws)
        maps.append(map_by(weights_by(recipe, scores), channels))
    return torch.stack(maps)


@pytest.mark.parametrize("noise", ["mask", "activation", "input"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dims", DIMS)
def test_ss_cam_is_the_loop_over_draws_and_channels(dims, recipe, noise):
    model, x = net_with_flat_channels(dims), inputs(2, dims, side=16 if dims == 1 else 8)
    options = {"noise": noise, "std": 0.4, "seed": 5}
    found = camfn.ss_cam(model, "features", x, 3, recipe=recipe, num_samples=3, normalize=False, **options)
    expected = ss_cam_loop(model, "features", x, 3, recipe, draws=3, **options)
    close(found, expected, f"{recipe} {noise}")


@pytest.mark.parametrize("noise", ["mask", "activation", "input"])
def test_ss_cam_without_deviation_is_score_cam(noise):
    """With the noise on the activation that is the recipe which upsamples first."""
    model, x, recipe = small_net(), inputs(2), "paper" if noise == "activation" else "torchcam"
    found = camfn.ss_cam(model, "features", x, 3, noise=noise, std=0.0, num_samples=2, recipe=recipe, normalize=False)
    close(found, score_cam_loop(model, "features", x, [3, 3], recipe))


# -------------------------------------------------------------------------------------------------------------- IS-CAM


def coefficients(path: str, draws: int) -> list[float]:
    """The authors add `i / N` to a running coefficient: 0.1, 0.3, 0.6 ... 5.5 for ten."""
    if path == "linear":
        return [(i + 1) / draws for i in range(draws)]
    running, found = 0.0, []
    for i in range(draws):
        running += (i + 1) / draws
        found.append(running)
    return found


@pytest.mark.parametrize("path", ["cumulative", "linear"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dims", DIMS)
def test_is_cam_is_the_loop_along_the_path(dims, recipe, path):
    model, x, draws = net_with_flat_channels(dims), inputs(2, dims), 4
    maps = []
    for image, channels in zip(x, activation_of(model, "features", x)):
        scores = []
        for channel in channels:
            if recipe == "authors" and is_flat(channel):
                scores.append(None)
                continue
            masked = image * mask_by(recipe, channel, image.shape[1:])
            scores.append(sum(score_by(recipe, model, c * masked, 3) for c in coefficients(path, draws)) / draws)
        maps.append(map_by(weights_by(recipe, scores), channels))
    found = camfn.is_cam(model, "features", x, 3, recipe=recipe, path=path, num_samples=draws, normalize=False)
    close(found, torch.stack(maps), f"{recipe} {path}")


def test_is_cam_by_default_takes_the_ten_coefficients_of_the_authors_code():
    model, x, published = small_net(), inputs(1), [0.1, 0.3, 0.6, 1.0, 1.5, 2.1, 2.8, 3.6, 4.5, 5.5]
    channels = activation_of(model, "features", x)[0]
    masks = [mask_by("torchcam", channel, x.shape[2:]) for channel in channels]
    scores = [sum(score_by("torchcam", model, a * x[0] * mask, 3) for a in published) / 10 for mask in masks]
    expected = map_by(weights_by("torchcam", scores), channels)[None]
    close(camfn.is_cam(model, "features", x, 3, normalize=False), expected)


# ------------------------------------------------------------------------------------------------- CAM, and closed forms


@pytest.mark.parametrize("dims", DIMS)
def test_cam_is_the_sum_of_activations_weighed_by_the_row_of_the_class(dims):
    model, x, classes = small_net(dims=dims), inputs(2, dims), [3, 1]
    channels = activation_of(model, "act", x)
    expected = torch.zeros(2, *channels.shape[2:], dtype=torch.float64)
    for i, c in enumerate(classes):
        for k in range(channels.shape[1]):
            expected[i] += float(model.fc.weight[c, k].detach()) * channels[i, k]
    assert float(expected.min()) < 0  # the paper has no ReLU
    found = camfn.cam(model, "act", x, classes, fc="fc", normalize=False)
    close(found, expected)


@pytest.mark.parametrize("dims", DIMS)
def test_the_mean_of_cam_is_the_logit_less_its_bias(dims):
    model, x = small_net(dims=dims), inputs(3, dims)
    maps = camfn.cam(model, "act", x, "all", fc="fc", normalize=False)
    logits = frozen(model)(x)
    close(maps.flatten(2).mean(2), logits - model.fc.bias.detach())


class LinearInInput(nn.Module):
    """The score is linear in the input, and the layer, beside it, has no part in it: `S_k = <W_c, x * M_k> + b_c`."""

    def __init__(self, dims: int = 2, channels: int = 5, classes: int = 4, side: int = 8, kernel: int = 3):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.layer = conv(3, channels, kernel, padding=kernel // 2).double()
        self.fc = nn.Linear(3 * side**dims, classes).double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)
            self.fc.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return self.fc(x.flatten(1))


def linear_scores(model: LinearInInput, x: Tensor, c: int) -> Tensor:
    """`<W_c, x * M_k> + b_c`, with the layer's grid the input's own: no upsampling."""
    channels = model.layer(x).detach()
    low, high = channels.flatten(2).amin(2), channels.flatten(2).amax(2)
    lead = (..., *(None,) * (x.ndim - 2))
    masks = (channels - low[lead]) / (high - low)[lead]
    row = model.fc.weight[c].detach().reshape(x.shape[1:])
    return torch.einsum("nkp,nip,ip->nk", masks.flatten(2), x.flatten(2), row.flatten(1)) + float(model.fc.bias[c].detach())


def weights_of(method: str, *args, **options) -> Tensor:
    return camfn.METHODS[method].run(*args, **options).weights[0][:, 0]


@pytest.mark.parametrize("dims", DIMS)
def test_score_cam_of_a_score_linear_in_the_input(dims):
    model, x = LinearInInput(dims), inputs(2, dims)
    scores = linear_scores(model, x, 2)
    assert float(scores.std()) > 0.1
    close(weights_of("score_cam", model, "layer", x, 2, recipe="paper"), scores.softmax(1))


@pytest.mark.parametrize("path", ["cumulative", "linear"])
@pytest.mark.parametrize("draws", [1, 4, 10])
def test_is_cam_of_a_score_linear_in_the_input_multiplies_it_by_the_mean_coefficient(path, draws):
    """`(N + 1)(N + 2) / 6N` along the authors' path, `(N + 1) / 2N` along the linear one."""
    model, x = LinearInInput(), inputs(2)
    mean = (draws + 1) * (draws + 2) / (6 * draws) if path == "cumulative" else (draws + 1) / (2 * draws)
    expected = (mean * linear_scores(model, x, 2)).softmax(1)
    found = weights_of("is_cam", model, "layer", x, 2, recipe="paper", path=path, num_samples=draws)
    close(found, expected)


def test_is_cam_of_a_network_without_biases_multiplies_the_scores():
    """ReLU networks without biases have `s(a x) = a s(x)` for a > 0: the logarithm of the weights is 2.2 times as wide."""
    model, x = small_net(), inputs(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("bias", "running_mean")):
                tensor.zero_()

    def centred(method):
        logarithm = weights_of(method, model, "features", x, 3).log()
        return logarithm - logarithm.mean(1, keepdim=True)

    assert float(centred("score_cam").std()) > 0.1
    close(centred("is_cam"), 2.2 * centred("score_cam"))


@pytest.mark.parametrize("draws", [1, 6])
def test_ss_cam_of_a_score_linear_in_the_input_adds_the_score_of_the_mean_noise(draws):
    """Noise on the mask: `S_k = <W_c, x * (M_k + mean_i e_ik)> + b_c`."""
    model, x, c = LinearInInput(), inputs(2), 2
    e = noise_like_one_draw((draws, 5, 8, 8), 9, 0.7).double().mean(0)
    added = torch.einsum("khw,nihw,ihw->nk", e, x, model.fc.weight[c].detach().reshape(3, 8, 8))
    expected = (linear_scores(model, x, c) + added).softmax(1)
    found = weights_of("ss_cam", model, "layer", x, c, recipe="paper", num_samples=draws, std=0.7, seed=9)
    close(found, expected)


@pytest.mark.parametrize("method", ["score_cam", "ss_cam", "is_cam"])
def test_equal_scores_give_the_mean_activation(method):
    model, x = small_net(), inputs(2)
    with torch.no_grad():
        model.fc.weight.zero_()
    expected = activation_of(model, "features", x).mean(1).clamp(min=0)
    close(getattr(camfn, method)(model, "features", x, 3, normalize=False), expected)


def test_score_cam_of_a_sharper_score_tends_to_the_best_channel():
    """Logits times a factor: the softmax goes to the arg max, and the map to that channel alone."""
    model, x = LinearInInput(), inputs(2)
    best = linear_scores(model, x, 2).argmax(1)
    with torch.no_grad():
        model.fc.weight.mul_(1e4)
    expected = model.layer(x).detach()[torch.arange(2), best].clamp(min=0)
    close(camfn.score_cam(model, "layer", x, 2, normalize=False), expected)

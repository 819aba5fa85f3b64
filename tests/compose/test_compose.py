"""Methods made of methods, against plain loops with hooks, closed forms, and the peers.

Nothing of camfn computes an expected value in a loop, but the noise; where a composition of camfn's own maps is the point (one
class for all draws, nesting), these are asked for one by one.
"""

import copy
import functools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camfn
from tests.oracles.closeness import assert_close, close
from tests.oracles.libraries import torchvision_models
from tests.oracles.loops import activation_of, blurred, frozen, gradient_of
from tests.oracles.networks import SmallNet, inputs, small_net

T = camfn.targets


def grad_cam_loop(model: nn.Module, layer: str, image: Tensor, c: int) -> Tensor:
    """Raw, of one image."""
    a, g = activation_of(model, layer, image[None])[0], gradient_of(model, layer, image[None], lambda y: y[c])
    return torch.einsum("k,k...->...", g.flatten(1).mean(1), a).clamp(min=0)


def unit(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min())


def varied(found: Tensor) -> Tensor:
    """That no expected map is flat, or all zeros but for one position."""
    assert float(found.std()) > 1e-3
    return found


# -------------------------------------------------------------------------------------------------------------- smooth


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_smooth_is_the_mean_of_normalised_maps_of_noisy_inputs(dims):
    model, x, classes = small_net(dims=dims), inputs(2, dims, side=16 if dims == 1 else 8), [3, 4]
    e = torch.randn(3, *x.shape[1:], generator=torch.Generator().manual_seed(5)).double() * 0.4
    maps = [[unit(grad_cam_loop(model, "features", image + noise, c)) for noise in e] for image, c in zip(x, classes)]
    expected = varied(torch.stack([sum(some) / 3 for some in maps]))
    method = camfn.smooth(camfn.grad_cam, num_samples=3, std=0.4, seed=5, units="input")
    close(method(model, "features", x, classes, normalize=False), expected)
    close(method(model, "features", x, classes), torch.stack(list(map(unit, expected))))


def test_smooth_by_default_has_four_draws_of_a_twentieth_of_the_range():
    model, x = small_net(), inputs()
    explicit = camfn.smooth(camfn.grad_cam, num_samples=4, std=0.05, seed=0, units="range")
    assert torch.equal(camfn.smooth(camfn.grad_cam)(model, "features", x), explicit(model, "features", x))


def test_a_share_of_the_range_is_of_each_images_own():
    """Each image alone, with the same deviation in units of the input."""
    model, x = small_net(), inputs(2) * torch.tensor([1.0, 20.0]).double().reshape(2, 1, 1, 1)
    found = camfn.smooth(camfn.grad_cam, std=0.1)(model, "features", x, 3)
    for image, one in zip(x, found):
        own = camfn.smooth(camfn.grad_cam, std=0.1 * float(image.max() - image.min()), units="input")
        close(one[None], own(model, "features", image[None], 3))
    shared = camfn.smooth(camfn.grad_cam, std=0.1, units="input")(model, "features", x, 3)
    assert (found - shared).abs().amax((1, 2)).min() > 1e-3


def test_a_share_of_the_range_does_not_depend_on_the_units_of_the_input():
    class Bytes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return self.net(x / 255)

    x, method = inputs(2), camfn.smooth(camfn.grad_cam)
    close(method(small_net(), "features", x, 3), method(Bytes(), "net.features", 255 * x, 3))


def test_without_noise_smooth_is_the_method():
    model, x = small_net(), inputs()
    for method in (camfn.grad_cam, camfn.score_cam):
        close(camfn.smooth(method, std=0.0)(model, "features", x, "all"), method(model, "features", x, "all"))


# ----------------------------------------------------------------------------------------------------------- integrate


@pytest.mark.parametrize("baseline", [0.0, 0.7, "blurred"])
def test_integrate_is_the_mean_of_raw_maps_along_the_path(baseline):
    """Integrated Grad-CAM, the authors' sum with its ReLU inside, one step later."""
    model, x, classes = small_net(), inputs(2), [2, 1]
    start = blurred(x, 5, 2.0) if baseline == "blurred" else torch.full_like(x, baseline)
    expected = torch.zeros(2, 4, 4, dtype=x.dtype)
    for i, c in enumerate(classes):
        for step in (1, 2, 3, 4, 5):
            expected[i] += grad_cam_loop(model, "features", start[i] + (x[i] - start[i]) * step / 5, c) / 5
    method = camfn.integrate(camfn.grad_cam, steps=5, baseline=start if baseline == "blurred" else baseline)
    close(method(model, "features", x, classes, normalize=False), varied(expected))
    close(method(model, "features", x, classes), torch.stack(list(map(unit, expected))))


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_of_a_network_without_biases_the_path_gives_the_mean_coefficient(steps):
    """`s(a x) = a s(x)`: activations grow with a, gradients stay, so the mean is `(N + 1) / 2N` times the map."""
    model, x = small_net(), inputs()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("bias", "running_mean")):
                tensor.zero_()
    once = camfn.grad_cam(model, "features", x, 3, relu=False, normalize=False)
    found = camfn.integrate(camfn.grad_cam, steps)(model, "features", x, 3, relu=False, normalize=False)
    close(found, (steps + 1) / (2 * steps) * once)


# ------------------------------------------------------------------------------------------------------------- augment


def test_augment_is_the_mean_over_flips_and_factors_flipped_back():
    model, x, classes = small_net(), inputs(2), [3, 1]
    expected = torch.zeros(2, 4, 4, dtype=x.dtype)
    for i, c in enumerate(classes):
        for axes in ((), (1,), (2,), (1, 2)):
            for factor in (0.8, 1.3):
                found = unit(grad_cam_loop(model, "features", torch.flip(x[i], axes) * factor, c))
                expected[i] += torch.flip(found, [axis - 1 for axis in axes]) / 8
    method = camfn.augment(camfn.grad_cam, flips=(-1, -2), factors=(0.8, 1.3))
    close(method(model, "features", x, classes, normalize=False), varied(expected))


def test_without_flips_and_factors_augment_is_the_method():
    model, x = small_net(), inputs()
    method = camfn.augment(camfn.score_cam, flips=(), factors=(1.0,))
    assert torch.equal(method(model, "features", x, "all"), camfn.score_cam(model, "features", x, "all"))


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_the_map_of_a_flipped_input_is_flipped_where_all_flips_are_taken(axis):
    model, x = small_net(dims=3, side=6), inputs(dims=3, side=6)
    method = camfn.augment(camfn.grad_cam, flips=(axis,), factors=(1.0,))
    here, there = (method(model, "features", some, 2) for some in (x, x.flip(axis)))
    close(there, here.flip(axis))
    assert (camfn.grad_cam(model, "features", x.flip(axis), 2).flip(axis) - camfn.grad_cam(model, "features", x, 2)).any()


def test_augment_is_the_aug_smooth_of_pytorch_grad_cam():
    torchvision_models()
    grad_cam = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = small_net(dtype=torch.float32), inputs(dtype=torch.float32)
    with torch.no_grad():
        model.fc.weight.mul_(100)  # its maximum is far above the 1e-7 that it adds
    peer_model = copy.deepcopy(model)
    peer = grad_cam.GradCAM(model=peer_model, target_layers=[peer_model.features])
    expected = torch.from_numpy(peer(x, [ClassifierOutputTarget(c) for c in (3, 1)], aug_smooth=True))
    found = camfn.augment(camfn.grad_cam)(model, "features", x, [3, 1], size="input", normalize=False)
    assert_close(found, varied(expected), 1e-5)


# --------------------------------------------------------------------------------------------------------- multi_scale


def sess_loop(model: nn.Module, layer: str, image: Tensor, c: int, sizes, blur) -> Tensor:
    """The authors' code for one image: patches, maps times probabilities, put back; the mean of what is positive."""
    height, width = image.shape[1:]
    maps, scores = [], []
    for size in sizes:
        large = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
        for top in dict.fromkeys([*range(0, size[0] - height, height), size[0] - height]):
            for left in dict.fromkeys([*range(0, size[1] - width, width), size[1] - width]):
                patch = large[:, top : top + height, left : left + width]
                raw = grad_cam_loop(model, layer, patch, c)
                found = unit(F.interpolate(raw[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0])
                scores.append(float(frozen(model)(patch[None])[0].softmax(0)[c]))
                canvas = torch.zeros(size, dtype=image.dtype)
                canvas[top : top + height, left : left + width] = found * scores[-1]
                maps.append(F.interpolate(canvas[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0])
    stacked = torch.stack(maps) / max(scores)
    count = (stacked > 0).sum(0)
    mean = torch.where(count > 0, stacked.sum(0) / count.clamp(min=1), 0)
    return mean if blur is None else blurred(mean[None, None], *blur)[0, 0]


@pytest.mark.parametrize("blur", [None, (3, 1.0)])
def test_multi_scale_is_the_authors_loop(blur):
    model, x, classes, sizes = small_net(), inputs(2), [3, 1], [(8, 8), (12, 12), (13, 20)]
    with torch.no_grad():
        model.fc.weight.mul_(0.1)
    expected = varied(torch.stack([sess_loop(model, "features", image, c, sizes, blur) for image, c in zip(x, classes)]))
    method = camfn.multi_scale(camfn.grad_cam, [8, 12, (13, 20)], blur=blur)
    close(method(model, "features", x, classes, normalize=False), expected)
    close(method(model, "features", x, classes), torch.stack(list(map(unit, expected))))
    several = method(model, "features", x, torch.tensor([[0, 3], [1, 2]]), normalize=False)
    close(several[[0, 1], [1, 0]], expected, "several targets")


def test_at_the_inputs_own_size_multi_scale_is_the_method():
    model, x = small_net(), inputs()
    found = camfn.multi_scale(camfn.grad_cam, [8], blur=None)(model, "features", x, "all")
    close(found, camfn.grad_cam(model, "features", x, "all", size="input"))


def test_multi_scale_by_default_blurs_by_eleven_pixels():
    model, x = small_net(side=24), inputs(1, side=24)
    sharp = camfn.multi_scale(camfn.grad_cam, [24, 30], blur=None)(model, "features", x, 2, normalize=False)
    found = camfn.multi_scale(camfn.grad_cam, [24, 30])(model, "features", x, 2, normalize=False)
    close(found, blurred(sharp[None], 11, 5.0)[0])


# --------------------------------------------------------------------------------------------------------- fuse_layers


LAYERS = ["stem", "features", "act"]


def of_layers(model, x, classes) -> Tensor:
    """Normalised maps at the largest grid: `(l, n, h, w)`."""
    found = [[unit(grad_cam_loop(model, layer, image, c)) for image, c in zip(x, classes)] for layer in LAYERS]
    return torch.stack([F.interpolate(torch.stack(m)[None], (8, 8), mode="bilinear", align_corners=False)[0] for m in found])


def winsor(model, x, classes, percentile) -> Tensor:
    """`(l, n)`, by the authors' code: with zeros left out of the percentile."""
    shares = torch.zeros(len(LAYERS), len(x), dtype=x.dtype)
    for i, c in enumerate(classes):
        means = [float(gradient_of(model, layer, x[i : i + 1], lambda y, c=c: y[c]).mean()) for layer in LAYERS]
        kept = {k: mean for k, mean in enumerate(means) if mean > 0}
        bound = np.percentile(list(kept.values()), percentile)
        cut = {k: min(mean, bound) for k, mean in kept.items()}
        low, high = min(cut.values()), max(cut.values())
        for k, value in cut.items():
            shares[k, i] = 0.1 + 0.9 * (value - low) / (high - low) if high > low else 1.0
    return shares


@pytest.mark.parametrize("how", ["max", "mean", "product", "winsorized"])
def test_fused_layers_are_a_loop_over_layers(how):
    model, x, classes = small_net(4), inputs(2), [1, 4]
    found = of_layers(model, x, classes)
    if how == "winsorized":
        shares = winsor(model, x, classes, 60.0)
        assert int((shares == 0).sum()) > 0  # a layer that does not count,
        assert int(((shares > 0.1) & (shares < 1)).sum() + (shares == 0.1).sum()) > 0  # and those that count otherwise
        expected = (shares[..., None, None] * found).sum(0)
    else:
        expected = {"max": found.amax(0), "mean": found.mean(0), "product": found.prod(0)}[how]
    method = camfn.fuse_layers(camfn.grad_cam, LAYERS, how, percentile=60.0)
    close(method(model, None, x, classes, normalize=False), varied(expected))
    close(method(model, None, x, classes), torch.stack(list(map(unit, expected))))
    several = method(model, None, x, torch.tensor([[1, 0], [4, 2]]), normalize=False)
    close(several[:, 0], expected, "several targets")


@pytest.mark.parametrize("how", ["max", "mean", "product", "winsorized"])
def test_of_one_layer_the_fused_map_is_the_layers(how):
    model, x, classes = small_net(), inputs(2), [1, 4]
    for i, c in enumerate(classes):  # or Winsor-CAM has nothing of it
        assert float(gradient_of(model, "features", x[i : i + 1], lambda y, c=c: y[c]).mean()) > 0
    expected = camfn.grad_cam(model, "features", x, classes)
    close(camfn.fuse_layers(camfn.grad_cam, ["features"], how)(model, None, x, classes), expected)


def test_the_maximum_over_layers_is_what_maps_fuse_gives():
    model, x = small_net(), inputs()
    found = camfn.fuse_layers(camfn.grad_cam, ["stem", "features"])(model, None, x, "all", normalize=False)
    assert torch.equal(found, camfn.maps.fuse(camfn.grad_cam(model, ("stem", "features"), x, "all")))


def test_the_product_is_torchcams_refine_cam():
    """Of its Grad-CAM: that of its Grad-CAM++ is of its own weights."""
    methods = pytest.importorskip("torchcam.methods")
    if not hasattr(methods, "RefineCAM"):
        pytest.skip("this torchcam has no RefineCAM")
    model, x = small_net(), inputs(1)
    peer_model = copy.deepcopy(model).eval()
    with methods.RefineCAM(peer_model, ["stem", "features"], input_shape=(3, 8, 8), base_method=methods.GradCAM) as peer:
        scores = peer_model(x)
        (expected,) = peer(3, scores, normalized=False)
    found = camfn.fuse_layers(camfn.grad_cam, ["stem", "features"], "product")(model, None, x, 3, normalize=False)
    assert_close(found, varied(expected.detach()), 1e-6)  # it adds 1e-8 to each map's range


def test_layers_that_count_the_same_or_not_at_all():
    model, x = small_net(), inputs(2)
    with torch.no_grad():
        model.fc.weight[2].zero_()
    method = camfn.fuse_layers(camfn.grad_cam, ["stem", "features"], "winsorized")
    with pytest.warns(camfn.CamWarning, match="flat"):
        assert not method(model, None, x, 2).any()
    twice = camfn.fuse_layers(camfn.grad_cam, ["act", "act"], "winsorized")
    once = camfn.fuse_layers(camfn.grad_cam, ["act"], "winsorized")
    close(twice(model, None, x, normalize=False), 2 * once(model, None, x, normalize=False))


# ------------------------------------------------------------------------------------------------------------ ensemble


def test_an_ensemble_is_the_mean_of_its_methods_at_the_largest_grid():
    model, x = small_net(), inputs()
    rise = functools.partial(camfn.rise, num_samples=30, cells=3)
    method = camfn.ensemble([camfn.grad_cam, camfn.score_cam, rise])
    a, b, c = camfn.grad_cam(model, "features", x, 1), camfn.score_cam(model, "features", x, 1), rise(model, None, x, 1)
    a, b = (F.interpolate(m[None], (8, 8), mode="bilinear", align_corners=False)[0] for m in (a, b))
    close(method(model, "features", x, 1, normalize=False), (a + b + c) / 3)
    pairs = (camfn.grad_cam, "act"), (camfn.score_cam, "act"), (rise, None)
    sized = [one(model, layer, x, 1, size=(5, 6)) for one, layer in pairs]
    close(method(model, "act", x, 1, size=(5, 6), normalize=False), sum(sized) / 3)


def test_an_ensemble_of_one_is_the_method_and_of_layers_has_one_map_for_each():
    model, x = small_net(), inputs()
    assert torch.equal(camfn.ensemble([camfn.score_cam])(model, "features", x), camfn.score_cam(model, "features", x))
    rise = functools.partial(camfn.rise, num_samples=30, cells=3)
    method = camfn.ensemble([camfn.grad_cam, rise])
    for layer, found in zip(("stem", "features"), method(model, ("stem", "features"), x, "all")):
        close(found, method(model, layer, x, "all"))
    close(camfn.ensemble([rise])(model, None, x), rise(model, None, x))


# ------------------------------------------------------------------------------------------------------- what they share


class Torn(SmallNet):
    """The class that it predicts on the clean input is not the one it predicts on most others."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        odd = (x.flatten(1)[:, 0] != CLEAN)[:, None]
        return y + odd * torch.tensor([0.0, 0.0, 0.0, 0.0, 1e3], dtype=x.dtype)


CLEAN = 0.125
OTHERS = {
    "smooth": camfn.smooth(camfn.grad_cam),
    "integrate": camfn.integrate(camfn.grad_cam, 3),
    "augment": camfn.augment(camfn.grad_cam),
    "multi_scale": camfn.multi_scale(camfn.grad_cam, [8, 11], blur=None),
    "two": camfn.augment(camfn.smooth(camfn.grad_cam), factors=(0.9,)),
}


def torn() -> tuple[nn.Module, Tensor]:
    model, x = Torn().double(), inputs()
    model.load_state_dict(small_net().state_dict())
    x[:, 0, 0, 0] = CLEAN
    return model, x


@pytest.mark.parametrize("name", OTHERS)
def test_the_target_is_resolved_once_on_the_clean_input(name):
    model, x = torn()
    y = frozen(model)(x)
    predicted, second, near = y.argmax(1), y.topk(2, 1).indices, (y - y[:, 1:2]).abs().topk(3, 1, largest=False).indices[:, 1:]
    assert (predicted != 4).all()
    assert (frozen(model)(x * 0.9).argmax(1) == 4).all()
    method = functools.partial(OTHERS[name], model, "features", x)
    assert torch.equal(method(None), method(predicted))
    assert torch.equal(method(T.top(2)), method(second))
    assert torch.equal(method(T.log_probability()), method(T.log_probability(predicted)))
    close(method(T.contrast(1, top=2)), method(T.contrast(1, near)))
    close(method(T.top(2) - T.logit(0)), method(T.logit(second) - T.logit(0)))
    assert torch.equal(method([None, 3]), method([int(predicted[0]), 3]))
    assert not torch.equal(method(None), method(4))


def test_a_plain_class_stands_for_what_the_method_has_it_stand_for():
    model, x = small_net(), inputs()
    rise = functools.partial(camfn.rise, num_samples=30, cells=3)
    for method in (rise, functools.partial(camfn.score_cam, recipe="authors")):
        composed, layer = camfn.smooth(method, std=0.0), None if method is rise else "features"
        close(composed(model, layer, x), method(model, layer, x))
        close(composed(model, layer, x, T.probability()), method(model, layer, x))
        close(composed(model, layer, x, [None, 2]), method(model, layer, x, [None, 2]))
    with pytest.raises(camfn.CamError, match=r"scores by probabilities.*a target settled on another input"):
        camfn.smooth(camfn.score_cam)(model, "features", x, T.contrast(), recipe="authors")


@pytest.mark.parametrize("name", OTHERS)
def test_the_options_that_all_methods_share_pass_through(name):
    model, other, x = small_net(), small_net(7), inputs()
    method = functools.partial(OTHERS[name], model, "features", x, 1)
    assert torch.equal(method(state=camfn.state_of(other)), OTHERS[name](other, "features", x, 1))
    assert not torch.equal(method(relu=False), method())
    assert method(size=(5, 6)).shape == (2, 5, 6)
    with pytest.raises(camfn.CamError, match="layout must be"):
        method(layout="sideways")
    with pytest.raises(camfn.CamError, match="size='half'"):
        method(size="half")
    raw, scaled = method(normalize=False, relu=False), method(relu=False)
    close(scaled, torch.stack(list(map(unit, raw))))


def test_options_of_the_method_pass_through_too():
    model, x = small_net(), inputs()
    method = camfn.integrate(camfn.score_cam, 2)
    found = method(model, "features", x, recipe="paper", sweep=camfn.Sweep(chunk=3))
    close(found, camfn.integrate(functools.partial(camfn.score_cam, recipe="paper"), 2)(model, "features", x))
    assert (found - method(model, "features", x)).abs().max() > 1e-6
    with pytest.raises(TypeError, match="colour"):
        method(model, "features", x, colour="red")


def test_which_of_several_inputs_is_changed_is_said_by_masked():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, a, b):
            return self.net(a) + b.mean((1, 2, 3))[:, None].clamp(max=0.1)

    model, a, b = Two(), inputs(seed=1), inputs(seed=2)
    noisy = a + (torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)).double() * 0.3)
    once = camfn.smooth(camfn.grad_cam, num_samples=1, std=0.3, units="input")
    close(once(model, "net.features", (a, b), 1, masked=0), camfn.grad_cam(model.net, "features", noisy, 1))
    with pytest.raises(camfn.CamError, match="masked= must say which input"):
        once(model, "net.features", (a, b), 1)
    swept = camfn.smooth(camfn.score_cam, num_samples=1, std=0.3, units="input")
    close(swept(model, "net.features", (a, b), 1, masked=0), camfn.score_cam(model.net, "features", noisy, 1))


PASSED = []


def test_what_a_composition_costs_is_what_went_through():
    model, x = small_net(), inputs()
    model.stem.register_forward_pre_hook(lambda module, given: PASSED.append(len(given[0])))
    nested = camfn.ensemble([OTHERS["two"], camfn.fuse_layers(camfn.grad_cam, ["stem", "features"])])
    for method, layer in (*((m, "features") for m in OTHERS.values()), (nested, "features")):
        PASSED.clear()
        outcome = method.run(model, layer, x, T.top(2))
        assert outcome.forwards == sum(PASSED)
        assert outcome.scores.shape == outcome.classes.shape == (2, 2)
    # 2 axes x (clean + 4 draws) and the clean one of augment, for both images; and one for both layers
    assert outcome.forwards == 2 * (2 * 5 + 1) + 2
    assert outcome.backwards == 2 * 2 * (2 * 4 + 1)


def test_what_is_to_be_said_of_the_maps_is_said_once():
    model, x = small_net(), inputs()
    with torch.no_grad():
        model.features.weight.zero_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        camfn.smooth(camfn.grad_cam)(model, "features", x)
    assert len(caught) == 1
    assert "2 of 2 maps at layer 'features' are flat" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_a_composition_has_a_name_and_says_its_arguments():
    method = camfn.augment(camfn.smooth(functools.partial(camfn.ss_cam, num_samples=2)))
    assert method.__name__ == "augment(smooth(ss_cam))"
    assert "augment(smooth(ss_cam))" in method.__doc__


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: camfn.smooth(torch.relu), "is no method: give one of camfn"),
        (lambda: camfn.smooth("grad_cam"), "'grad_cam' is no method"),
        (lambda: camfn.smooth(camfn.grad_cam, num_samples=0), "smooth needs a whole num_samples >= 1, found 0"),
        (lambda: camfn.smooth(camfn.grad_cam, std=-1.0), "smooth needs a finite std >= 0, found -1.0"),
        (lambda: camfn.smooth(camfn.grad_cam, units="std"), 'units must be "range" .* or "input", found \'std\''),
        (lambda: camfn.smooth(camfn.grad_cam, seed="a"), "seed must be an int or a torch.Generator, found 'a'"),
        (lambda: camfn.integrate(camfn.grad_cam, steps=0), "integrate needs a whole num_samples >= 1, found 0"),
        (lambda: camfn.integrate(camfn.grad_cam, baseline="black"), "baseline must be a number or a tensor, found str"),
        (lambda: camfn.augment(camfn.grad_cam, flips=(1,)), r"flips=\(1,\) must be different negative axes"),
        (lambda: camfn.augment(camfn.grad_cam, flips=(-1, -1)), r"flips=\(-1, -1\) must be different"),
        (lambda: camfn.augment(camfn.grad_cam, factors=()), "factors is empty"),
        (lambda: camfn.multi_scale(camfn.grad_cam, []), "sizes is empty"),
        (lambda: camfn.multi_scale(camfn.grad_cam, [8], blur=(2, 1.0)), r"blur=\(2, 1.0\) must be an odd"),
        (lambda: camfn.fuse_layers(camfn.grad_cam, "features"), "layers must be a sequence.*found 'features'"),
        (lambda: camfn.fuse_layers(camfn.grad_cam, []), r"layers must be a sequence.*found \[\]"),
        (lambda: camfn.fuse_layers(camfn.grad_cam, ["act"], "sum"), "how='sum' must be one of 'max', 'mean'"),
        (lambda: camfn.fuse_layers(camfn.grad_cam, ["act"], percentile=101), "percentile=101 must be from 0 to 100"),
        (lambda: camfn.ensemble([]), "methods is empty"),
    ],
)
def test_what_cannot_be_composed(make, words):
    with pytest.raises(camfn.CamError, match=words):
        make()


@pytest.mark.parametrize(
    ("method", "layer", "options", "words"),
    [
        (OTHERS["multi_scale"], "features", {"x": inputs(side=9)[..., :8]}, None),
        (camfn.multi_scale(camfn.grad_cam, [7]), "features", {}, r"sizes has 7 for an input of \(8, 8\)"),
        (camfn.multi_scale(camfn.grad_cam, [(9, 9, 9)]), "features", {}, r"sizes has \(9, 9, 9\).*or 2 whole numbers"),
        (camfn.augment(camfn.grad_cam, flips=(-3,)), "features", {}, r"flips=\(-3,\) of an input with 2 spatial axes"),
        (camfn.integrate(camfn.grad_cam, baseline=torch.zeros(5)), "features", {}, r"baseline has shape \(5,\)"),
        (camfn.fuse_layers(camfn.grad_cam, ["act"]), "act", {}, r"fuse_layers\(grad_cam\) takes no layer: pass layer=None"),
        (camfn.fuse_layers(camfn.rise, ["act"]), None, {}, "rise takes no layer"),
        (camfn.fuse_layers(OTHERS["smooth"], ["act"], "winsorized"), None, {}, "needs weights of channels"),
        (camfn.ensemble([camfn.rise]), "act", {}, r"ensemble\(rise\) takes no layer"),
        (camfn.ensemble([camfn.ss_cam]), "act", {"std": 1.0}, "has no option std: functools.partial"),
    ],
)
def test_what_a_composition_cannot_explain(method, layer, options, words):
    options = {"x": inputs(), **options}
    if words is None:
        assert method(small_net(), layer, **options).shape == (2, 9, 8)
        return
    with pytest.raises(camfn.CamError, match=words):
        method(small_net(), layer, **options)


def test_flips_where_the_map_has_not_the_axes_of_the_input():
    class Spectrum(nn.Module):
        """From sound to a picture of it."""

        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.unflatten(2, (8, 8)))

    model, x = Spectrum(), inputs().flatten(2)
    with pytest.raises(camfn.CamError, match="1 spatial axes and its map 2: which of them is flipped"):
        camfn.augment(camfn.grad_cam)(model, "net.features", x)
    plain = camfn.augment(camfn.grad_cam, flips=())(model, "net.features", x, [1, 2])
    close(plain, camfn.augment(camfn.grad_cam, flips=())(model.net, "features", inputs(), [1, 2]))

"""Poly-CAM against a plain loop written from the paper and its authors' code, and against closed forms.

Nothing of camfn computes an expected value here: layers are read by hooks on a copy, channels are loops, percentiles NumPy's.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camfn
from tests.oracles.closeness import close
from tests.oracles.libraries import torchvision_models
from tests.oracles.loops import DIMS, MODES, activation_of, frozen, is_flat
from tests.oracles.networks import inputs, net_with_flat_channels, small_net, softer

FIRST = "channels_first"
VARIANTS = ("+", "-", "+-")
LAYERS = ("stem", "features")


def linear(values: Tensor, size) -> Tensor:
    """`(*grid)` at another size."""
    return F.interpolate(values[None, None], tuple(size), mode=MODES[values.ndim], align_corners=False)[0, 0]


def mask_of(channel: Tensor, percentile: float) -> Tensor:
    """Where all between the percentiles is one value, what is above it, as the authors' division by 1e-12 has it."""
    low, high = (float(np.percentile(channel.numpy(), at)) for at in (percentile, 100 - percentile))
    return ((channel - low) / max(high - low, 1e-12)).clamp(0, 1) if not is_flat(channel) else torch.zeros_like(channel)


def weights_of(model, image: Tensor, activation: Tensor, of, variant: str, percentile: float) -> list[float]:
    """One layer's, of one image."""

    def scored(masked: Tensor) -> float:
        return float(of(frozen(model)(masked)[0]))

    clean, found = scored(image), []
    for channel in activation:
        mask = linear(mask_of(channel, percentile), image.shape[2:])
        kept, fall = scored(image * mask), clean - scored(image * (1 - mask))
        found.append({"+": kept, "-": max(0.0, fall), "+-": max(0.0, kept + fall)}[variant])
    return found


def poly_cam_loop(model, layers, x: Tensor, of, variant: str, percentile: float) -> list[Tensor]:
    """The maps `(n, *grid)` of each layer and those after it, after the ReLU, not scaled."""
    maps = []
    for i in range(len(x)):
        image, above = x[i : i + 1], None
        for layer in reversed(layers):
            activation = activation_of(model, layer, image)[0]
            w = weights_of(model, image, activation, lambda y, i=i: of(y, i), variant, percentile)
            own = sum(weight * channel for weight, channel in zip(w, activation)).clamp(min=0)
            if above is not None:
                around = linear(linear(own, above.shape), own.shape)
                own = torch.where(around > 0, own / around, 0) * linear(above, own.shape)
            above = own
            maps.append(own)
    return [torch.stack(maps[len(layers) - 1 - at :: len(layers)]) for at in range(len(layers))]


@pytest.mark.filterwarnings("ignore:1 of 2 maps at layer '(stem|features)' are flat")
@pytest.mark.parametrize("percentile", [0, 0.1, 20])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dims", DIMS)
def test_poly_cam_is_the_authors_loop(dims, variant, percentile):
    model, x = softer(net_with_flat_channels(dims)), inputs(2, dims)
    classes = frozen(model)(x).argmax(1)  # which fall where something is taken away
    options = {"variant": variant, "percentile": percentile}
    expected = poly_cam_loop(model, LAYERS, x, lambda y, i: y.softmax(0)[classes[i]], **options)
    assert float((expected[0] > 0).double().mean()) > 0.05
    found = camfn.poly_cam(model, LAYERS, x, classes, layout=FIRST, normalize=False, **options)
    for ours, theirs, layer in zip(found, expected, LAYERS, strict=True):
        close(ours, theirs, layer)
    close(camfn.poly_cam(model, "features", x, classes, normalize=False, **options), expected[1])


def test_by_default_both_changes_count_and_a_thousandth_is_cut_at_both_ends():
    model, x = softer(small_net()), inputs(2)
    found = camfn.poly_cam(model, LAYERS, x, 2, normalize=False)
    for ours, theirs in zip(found, poly_cam_loop(model, LAYERS, x, lambda y, i: y.softmax(0)[2], "+-", 0.1)):
        close(ours, theirs)
    for other in ({"variant": "+"}, {"variant": "-"}, {"percentile": 0}, {"target": camfn.targets.logit(2)}):
        others = camfn.poly_cam(model, LAYERS, x, **{"target": 2, "normalize": False, **other})
        assert all((a - b).abs().max() > 1e-6 for a, b in zip(found, others))


class Chain(nn.Module):
    """Three grids, 12, 4 and 2 along each axis, and a head with a hidden layer; its layers' widths are no number of classes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        self.one, self.two, self.three = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3, 3), nn.Conv2d(4, 5, 2, 2)
        self.hidden, self.fc = nn.Linear(20, 6), nn.Linear(6, 2)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.three(F.relu(self.two(torch.tanh(self.one(x))))))
        return self.fc(F.relu(self.hidden(h.flatten(1))))


@pytest.mark.filterwarnings(r"ignore:\d of 4 maps at layer")
@pytest.mark.parametrize("variant", VARIANTS)
def test_three_layers_with_grids_that_differ_by_more_than_two_and_several_targets(variant):
    model, x, layers = Chain(), inputs(2, side=12), ("one", "two", "three")
    found = camfn.poly_cam(model, layers, x, "all", variant=variant, normalize=False)
    assert all(float(ours.max()) > 1e-3 for ours in found)
    for c in range(2):
        expected = poly_cam_loop(model, layers, x, lambda y, i, c=c: y.softmax(0)[c], variant, 0.1)
        for ours, theirs in zip(found, expected, strict=True):
            close(ours[:, c], theirs, f"class {c}")


# -------------------------------------------------------------------------------------------------------- closed forms


class Pixels(nn.Module):
    """Linear in its input; its layer shows the input, and a coarser one its means over cells of two."""

    def __init__(self, side: int):
        super().__init__()
        self.shown, self.coarse = nn.Identity(), nn.AvgPool2d(2)
        self.fc = nn.Linear(3 * side * side, 4, bias=False).double()
        nn.init.normal_(self.fc.weight, generator=torch.Generator().manual_seed(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.shown(x)
        self.coarse(h)
        return self.fc(h.flatten(1))


def test_of_a_linear_score_a_fall_is_what_the_mask_keeps():
    """`s(x) - s(x (1 - M)) = s(x M)`: weights of "-" are the positive ones of "+", and of "+-" these doubled."""
    model, x = Pixels(6), inputs(2, side=6)
    kept, fall, both = (
        camfn.explain(model, "coarse", x, camfn.targets.logit("all"), method="poly_cam", variant=variant, layout=FIRST).weights[
            0
        ]
        for variant in VARIANTS
    )
    assert 0 < int((kept < 0).sum()) < kept.numel()
    close(fall, kept.clamp(min=0))
    close(both, 2 * kept.clamp(min=0))


def test_of_one_channel_that_the_masks_keep_whole_the_fine_map_shares_out_the_coarse_one():
    """Of one positive channel, whose mean over cells is the coarse layer: `S / U(D S)` cancels what U and the weight do."""

    class Gray(nn.Module):
        def __init__(self):
            super().__init__()
            self.shown, self.coarse = nn.Identity(), nn.AvgPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.shown(x)
            return torch.stack([self.coarse(h).mean((1, 2, 3)), h.mean((1, 2, 3)) * 0], 1)

    x = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    card = camfn.explain(Gray(), ("shown", "coarse"), x, 0, method="poly_cam", variant="+", normalize=False)
    weight = card.weights[1][:, 0, 0].reshape(2, 1, 1)
    close(card.maps[1], weight * F.avg_pool2d(x, 2)[:, 0])
    # Both layers' sums are this channel: what is around a position in the one is the other there.
    close(card.maps[0], weight * x[:, 0])


def test_where_nothing_is_around_the_factor_is_zero_and_has_a_derivative():
    """D of a factor of three reads the middle of a cell: what is beside it only is lost, and not divided by zero."""
    model = Chain()
    x = inputs(1, side=12)
    with torch.no_grad():
        model.one.weight.zero_()
        model.one.bias.zero_()
        model.one.weight[0, 0, 1, 1] = 1
        model.two.weight.abs_()
    x[0, 0] = 0
    x[0, 0, 0, 0] = 2.0  # the corner of a cell whose middle is zero

    def finest(x: Tensor) -> Tensor:
        return camfn.poly_cam(model, ("one", "two"), x, 1, variant="+", percentile=0, normalize=False)[0]

    coarsest = camfn.poly_cam(model, "two", x, 1, variant="+", percentile=0, normalize=False)
    assert float(camfn.poly_cam(model, "one", x, 1, variant="+", percentile=0, normalize=False)[0, 0, 0]) > 1e-3
    assert float(coarsest[0, 0, 0]) > 1e-3
    with pytest.warns(camfn.CamWarning, match="1 of 2 maps at layers? .*flat|1 of 1 maps at layer '(one|two)' are flat"):
        assert float(finest(x).abs().max()) == 0
    assert torch.isfinite(torch.func.grad(lambda x: finest(x).sum())(x)).all()


def test_a_channel_that_is_above_its_lowest_value_at_one_position_alone_is_a_mask_of_it():
    """Both percentiles are that value then, and min-max between them is 0 / 0."""
    model, x = Pixels(40), inputs(1, side=40)
    x[0, 0] = -0.5
    x[0, 0, 7, 3] = 4.0
    card = camfn.explain(model, "shown", x, camfn.targets.logit(1), method="poly_cam", variant="+")
    expected = (model.fc.weight[1].detach().reshape(3, 40, 40) * x[0])[:, 7, 3].sum()
    close(card.weights[0][0, 0, 0], expected)


# ------------------------------------------------------------------------------------------------- what is run, and not


@pytest.mark.parametrize(("variant", "rows"), [("+", 1), ("-", 1), ("+-", 2)])
def test_flat_channels_share_one_forward_and_leave_the_clean_input(variant, rows):
    """Their mask of zeros is one for all, and the input less nothing has been seen."""
    model, x = softer(net_with_flat_channels(2)), inputs(2)
    seen = activation_of(model, "act", x).flatten(2)
    live = seen.amax(2) > seen.amin(2)
    assert live.all(0).tolist() == [True, False, True, True, False, True]
    card = camfn.explain(model, "act", x, "all", method="poly_cam", variant=variant)
    assert card.forwards == 2 + 2 + rows * int(live.sum())
    with torch.no_grad():
        none, clean = frozen(model)(x * 0).softmax(1), frozen(model)(x).softmax(1)
    close(card.scores, clean)
    close(card.weights[0][:, :, 4], none if variant != "-" else none * 0)


def test_without_a_layer_the_last_of_each_size_are_taken_and_the_finest_map_comes_back():
    model, x = Chain(), inputs(2, side=12)
    with pytest.warns(camfn.CamWarning, match=r"layer=None: 'one', 'two', 'three' were chosen"):
        card = camfn.explain(model, None, x, 1, method="poly_cam")
    assert card.layers == ("one", "two", "three")
    assert card.grids == ((12, 12), (4, 4), (2, 2))
    named = camfn.explain(model, card.layers, x, 1, method="poly_cam")
    assert torch.equal(card.maps, named.maps[0])
    assert card.forwards == named.forwards + 2


STAGES = {
    "resnet18": ("relu", "layer1", "layer2", "layer3", "layer4"),
    "resnet50": ("relu", "layer1", "layer2", "layer3", "layer4"),
    "mobilenet_v2": ("features.1", "features.3", "features.6", "features.13", "features"),
    "densenet121": ("features.relu0", *(f"features.denseblock{i}" for i in (1, 2, 3)), "features"),
}


@pytest.mark.parametrize("name", STAGES)
def test_of_torchvisions_networks_these_are_the_ends_of_stages(name):
    model = getattr(torchvision_models(), name)().eval()
    shape = torch.randn(1, 3, 96, 96)
    candidates = {each.name: each.grid for each in camfn.candidate_layers(model, shape)}
    from camfn.model.layers import stages
    from camfn.model.task import begin

    found = stages(begin(model, shape, None))
    assert found == STAGES[name]
    assert [candidates[layer] for layer in found] == [(side, side) for side in (48, 24, 12, 6, 3)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "±"}, r'variant must be "\+", "-" or "\+-", found \'±\''),
        ({"percentile": 50}, "percentile=50 must be from 0 to less than 50"),
        ({"percentile": "a"}, "percentile='a' must be"),
        ({"layer": ("features", "stem")}, r"in the order of execution; found 'features' of \(4, 4\) before 'stem' of \(8, 8\)"),
        ({"sweep": camfn.Sweep(dtype=torch.bfloat16)}, "is not for poly_cam.*leave dtype= out"),
    ],
)
def test_what_poly_cam_cannot_do(options, words):
    with pytest.raises(camfn.CamError, match=words):
        camfn.poly_cam(small_net(), **{"layer": "features", "x": inputs(), **options})

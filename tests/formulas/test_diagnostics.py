"""NaN and infinity in a layer's output are told by every method, whether or not the map shows them."""

import functools
import math
import re
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import camfn
from camfn.formulas.diagnostics import about_maps
from tests.oracles.exceptions import unless
from tests.oracles.networks import CHEAP, LAYERED

VALUES = (math.nan, math.inf, -math.inf)
METHODS = [name for name in LAYERED if camfn.METHODS[name].of_layer]
OPTIONS = {**CHEAP, "cam": {"fc": "6"}}
X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class One(nn.Module):
    """One value of the first image's first channel is replaced."""

    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        spot = torch.zeros(x.shape, dtype=torch.bool)
        spot[0, 0, 2, 2] = True
        return torch.where(spot, self.value, x)


class Repaired(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nan_to_num(x, 0, 0, 0)


class Dropped(nn.Module):
    """Channels but the first, which has the value."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:]


def net(value: float, after: type[nn.Module] = Repaired) -> nn.Sequential:
    """The value is in layer "2", and not in the score."""
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5 if after is Dropped else 6, 5)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), One(value), after(), *head).eval()


def told(call) -> tuple[Tensor | None, str]:
    """The maps, and all that is said: of an error, nothing and its message."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", camfn.CamWarning)
        try:
            maps = call()
        except camfn.CamError as error:
            return None, str(error)
    return maps, "\n".join(str(each.message) for each in caught if each.category is camfn.CamWarning)


def call_of(method: str, model: nn.Module, layer="2", x: Tensor = X):
    return functools.partial(camfn.METHODS[method].function, model, layer, x, 1, **OPTIONS.get(method, {}))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_tells_it(method, value):
    with unless("NaN that the model goes on from", method):
        tells_it(method, value)


def tells_it(method, value):
    maps, words = told(call_of(method, net(value)))
    assert re.search("NaN or infinite values", words), words
    assert words.count("NaN or infinite") == 1
    assert maps is None or bool(torch.isfinite(maps[1]).all())  # of the other image
    clean, words = told(call_of(method, net(0.0)))
    assert bool(torch.isfinite(clean).all())
    assert "NaN or infinite" not in words


@pytest.mark.parametrize("value", VALUES)
def test_so_does_cam(value):
    maps, words = told(functools.partial(camfn.cam, net(value), "2", X, 1, fc="6"))
    assert words.startswith("1 of 2 maps at layer '2' are not finite: the layer's output has NaN or infinite values; choose")
    assert bool(torch.isfinite(maps[1]).all())


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_tells_of_a_channel_that_the_model_goes_on_without(method, value):
    with unless("a channel that the model goes on without", method):
        _, words = told(call_of(method, net(value, Dropped)))
        assert "NaN or infinite values" in words, words


def test_of_several_layers_the_one_that_has_it_is_named():
    maps, words = told(call_of("grad_cam", net(math.nan), ["1", "2", "0"]))
    assert "layer '2'" in words
    assert "layer '1'" not in words
    assert "layer '0'" not in words
    assert [bool(torch.isfinite(each).all()) for each in maps] == [True, False, True]


def test_a_map_that_hides_it_is_told_of_too():
    _, words = told(call_of("recipro_cam", net(math.nan)))
    assert words == (
        "layer '2' has NaN or infinite values that the maps do not show: choose an earlier layer, or find the operation that "
        "makes them"
    )


def test_a_card_has_it_among_its_findings_with_the_share_of_maps():
    for value, share in ((math.nan, 0.5), (math.inf, 0.5)):
        card = camfn.explain(net(value), "2", X, 1, method="grad_cam", relu=False)
        (found,) = [finding for finding in card.findings if finding.kind == "non-finite map"]
        assert (found.layer, found.value) == ("2", share)
        assert "flat map" not in {finding.kind for finding in card.findings}  # infinity less infinity is not one value


def test_the_first_of_two_targets_alone():
    signed = torch.tensor([[[1.0, torch.inf], [1.0, 2.0]]])
    (found,) = about_maps([signed], ["a"], True)
    assert (found.kind, found.value) == ("non-finite map", 0.5)
    assert found.sentence == (
        "1 of 2 maps at layer 'a' are not finite, though the layer is: a gradient or a product overflows; try float64 for "
        "model and x"
    )
    (found,) = about_maps([signed], [""], True)
    assert found.sentence.startswith("1 of 2 maps are not finite: a gradient")


def test_a_product_that_overflows_is_told():
    class Steep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach() * 1e-30 + (x - x.detach()) * 1e30

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Steep(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[0].weight *= 1e30
    _, words = told(call_of("hires_cam", model, "0"))
    assert words == ""
    _, words = told(functools.partial(camfn.hires_cam, model, "0", X, 1, normalize=False))
    assert "2 of 2 maps at layer '0' are not finite, though the layer is" in words


COMPOSED = {
    "smooth": lambda: camfn.smooth(camfn.grad_cam, num_samples=2),
    "integrate": lambda: camfn.integrate(camfn.grad_cam, steps=2),
    "augment": lambda: camfn.augment(camfn.grad_cam, factors=(1.0,)),
    "ensemble": lambda: camfn.ensemble([camfn.grad_cam, camfn.mean_cam]),
    "multi_scale": lambda: camfn.multi_scale(camfn.grad_cam, [12, 16]),
    "fuse_layers": lambda: camfn.fuse_layers(camfn.grad_cam, ["1", "2"]),
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", COMPOSED)
def test_compositions_tell_it(name, value):
    _, words = told(functools.partial(COMPOSED[name](), net(value), None if name == "fuse_layers" else "2", X, 1))
    assert "layer '2'" in words
    assert "NaN or infinite values" in words


@pytest.mark.parametrize("value", VALUES)
def test_factorize_refuses_it(value):
    with pytest.raises(camfn.CamError, match="layer '2' has NaN or infinite values, which have no factors: choose an earlier"):
        camfn.factorize(net(value), "2", X, 1, concepts=2)


def test_under_a_transform_nothing_is_read():
    model = net(math.nan)
    maps, words = told(lambda: vmap(lambda x: camfn.grad_cam(model, "2", x[None], 1)[0])(X))
    assert words == ""
    assert bool(torch.isnan(maps).any())

"""Sizes near the ends of float32: of activations and gradients of 1e30 and 1e-30 the map is the one that float64 gives.

Squares, cubes and products of such values have no number in float32, or are 0 there. The bound is that of the same map at
ordinary sizes, in units of rounding.
"""

import functools
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import camfn
from camfn.formulas import attention, components
from camfn.formulas.scaling import magnitude, rescale
from tests.oracles.exceptions import unless
from tests.oracles.networks import CHEAP, LAYERED

pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ of \d+ maps:camfn.CamWarning")

SIZES = (1e-30, 1.0, 1e30)
EPS = torch.finfo(torch.float32).eps
OPTIONS = {**CHEAP, "cam": {"fc": "4"}, "opti_cam": {"steps": 3}}
X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


class Through(nn.Module):
    """What comes in times `value`, with a gradient of `slope`: so the score stays within the range."""

    def __init__(self, value: float, slope: float):
        super().__init__()
        self.value, self.slope = value, slope

    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * self.value + (x - x.detach()) * self.slope


def net(activation: float, gradient: float, bend: nn.Module, *, through: bool) -> nn.Sequential:
    """Layer "1" gives values of the size `activation`, and the logits' gradient there is of the size `gradient`."""
    torch.manual_seed(0)
    head = nn.Conv2d(6, 7, 2), bend, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4)
    body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), *([Through(1 / activation, gradient)] * through), *head)
    scaled = {body[0].weight: activation, body[0].bias: activation}
    if not through:
        size = activation * gradient
        scaled |= {head[0].weight: 1 / activation, head[-1].weight: size, head[-1].bias: size}
    body.double()
    with torch.no_grad():
        for parameter, factor in scaled.items():
            parameter.mul_(factor)
    return body.eval().float()


def pooled(activation: float, gradient: float) -> nn.Sequential:
    """For CAM: one linear layer behind the pooling."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    with torch.no_grad():
        for parameter, factor in ((body[0].weight, activation), (body[0].bias, activation), (body[4].weight, gradient)):
            parameter.mul_(factor)
    return body


def difference(method: str, model: nn.Module, **options) -> float:
    """Of the normalised map from that of the same model in float64."""
    row = camfn.METHODS[method]
    call = functools.partial(row.function, target=camfn.targets.logit(2), **{**OPTIONS.get(method, {}), **options})
    layer = "1" if row.of_layer else None
    found, wanted = call(model, layer, X), call(model.double(), layer, X.double())
    assert float(wanted.amax()) == pytest.approx(1, abs=0.01)  # else there is nothing to compare
    return float((found - wanted).abs().max())


ALL = {name: [{"relu": False}] for name in LAYERED if name not in ("cam", "rise")}
ALL["grad_cam"] = [{"relu": False}, {"relu": False, "combine": "eigen"}]
ALL["hires_cam"] = ALL["grad_cam"]
ALL["grad_cam_pp"] = [{"alphas": "paper", "relu": False}, {"alphas": "authors", "relu": False}]
ALL["fem"] = [{"form": "mean"}, {"form": "share"}]
# Of a kernel of distances nothing is left at 1e30: no two positions are near each other.
ALL["kpca_cam"] = [{"kernel": kernel} for kernel in ("sigmoid", "poly", "linear")]
ALL["score_cam"] = [{"relu": False}, {"relu": False, "budget": 0.5, "order": "std"}]

HIGH_TO_LOW = [(a, g) for a, g in itertools.product(SIZES, SIZES) if a * g in (1e30, 1.0, 1e-30)]


@pytest.mark.parametrize(("activation", "gradient"), HIGH_TO_LOW)
@pytest.mark.parametrize("method", ALL)
def test_the_map_is_the_one_that_float64_gives(method, activation, gradient):
    for options in ALL[method]:
        ordinary = difference(method, net(1.0, 1.0, nn.Softplus(), through=False), **options)
        found = difference(method, net(activation, gradient, nn.Softplus(), through=False), **options)
        assert found <= 8 * (ordinary + 4 * EPS), (options, ordinary)


@pytest.mark.parametrize(("activation", "gradient"), [*itertools.product((1e-30, 1e30), (1e-30, 1e30)), (1e15, 1e15)])
@pytest.mark.parametrize("method", [name for name in ALL if "gradients" in camfn.METHODS[name].needs and name != "lift_cam"])
def test_the_map_is_the_one_that_float64_gives_where_activation_and_gradient_are_both_large_or_both_small(
    method, activation, gradient
):
    """The gradient at the input, and one through all steps of Opti-CAM, have the size of the product."""
    bend = nn.ReLU() if method == "shapley_cam" else nn.Softplus()  # the square of such a gradient has none either
    with unless(f"gradients of {activation * gradient:.0e} in float32", method):
        for options in ALL[method]:
            ordinary = difference(method, net(1.0, 1.0, bend, through=True), **options)
            found = difference(method, net(activation, gradient, bend, through=True), **options)
            assert found <= 8 * (ordinary + 4 * EPS), (options, ordinary)


@pytest.mark.parametrize(("activation", "gradient"), HIGH_TO_LOW)
def test_so_is_that_of_a_linear_head(activation, gradient):
    assert difference("cam", pooled(activation, gradient), relu=False, fc="4") <= 64 * EPS


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_product_over_layers_of_attention_stays_within_the_range_where_the_map_is_normalised(scale):
    draw = torch.Generator().manual_seed(0)
    seen = [torch.rand(1, 2, 5, 5, generator=draw).softmax(-1) for _ in range(3)]
    gradients = [scale * torch.randn(1, 2, 5, 5, generator=draw) for _ in range(3)]
    row = torch.eye(5)[:1]
    found = attention.gradient_attention(seen, gradients, row, unit=True)
    wanted = attention.gradient_attention([a.double() for a in seen], [g.double() for g in gradients], row.double())
    torch.testing.assert_close((found / found.amax()).double(), wanted / wanted.amax(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel", components.KERNELS)
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0])
def test_a_kernel_component_has_the_length_of_float64s(kernel, scale):
    values = scale * torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    found, wanted = (components.kpca_cam(each, kernel, None).double() for each in (values, values.double()))
    assert float((found - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max())


def test_a_size_is_a_power_of_two_and_a_constant_to_derivatives():
    values = torch.tensor([[3.0, -5.0], [0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0], [1e-45, 0.0]])
    assert magnitude(values, -1)[:, 0].tolist() == [4.0, 1.0, 1.0, 1.0, pytest.approx(1e-45, rel=0.5)]
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    slopes = grad(lambda v: (rescale(v, -1) * magnitude(v, -1)).sum())(rows)
    assert torch.equal(slopes, torch.ones(3, 4))
    assert torch.equal(vmap(lambda row: rescale(row, 0))(rows), rescale(rows, 1))

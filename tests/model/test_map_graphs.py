"""Maps with a graph: a plain call whose `x`, or a tensor of whose `state=`, requires grad."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad
from torch.utils.checkpoint import checkpoint

import camfn
from tests.oracles.closeness import close
from tests.oracles.networks import CHEAP, inputs, small_net

ATTENTION = ["attention_rollout", "gradient_attention", "legrad", "ag_cam"]


class Smooth(nn.Module):
    """A network with a batch norm, whose derivatives have no jumps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.features, self.fc = nn.Conv2d(4, 5, 3), nn.Linear(5, 4)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(torch.tanh(self.norm(self.stem(x))))
        return self.fc(torch.tanh(h).mean((2, 3)))


def image(side: int = 8) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def weighted(maps: Tensor) -> Tensor:
    weights = torch.randn(maps.shape, generator=torch.Generator().manual_seed(2), dtype=maps.dtype)
    return (weights * maps).sum()


# ------------------------------------------------------------------------------------------------------- by plain autograd


def by_hand(net: Smooth, x: Tensor, classes: list[int]) -> Tensor:
    """Grad-CAM by a hook and `create_graph`, as a training loop would write it."""
    kept: list[Tensor] = []
    handle = net.features.register_forward_hook(lambda module, args, out: kept.append(out))
    score = net(x)[torch.arange(len(x)), classes].sum()
    handle.remove()
    (slope,) = torch.autograd.grad(score, kept, create_graph=True)
    return F.relu((slope.mean((2, 3), keepdim=True) * kept[0]).sum(1))


@pytest.mark.parametrize("method", ["grad_cam", "eigen_cam", "score_cam", "recipro_cam"])
def test_a_model_made_in_inference_mode_gives_maps_with_a_graph(method):
    """autograd cannot save its parameters, and they cannot require grad: copies of them serve."""
    with torch.inference_mode():
        net = Smooth()
    gradients = []
    for model in (net, Smooth()):
        x = image().requires_grad_()
        weighted(getattr(camfn, method)(model, "features", x, 1, normalize=False)).backward()
        gradients.append(x.grad)
    close(*gradients)


def test_the_gradient_of_grad_cam_is_that_of_hooks_with_create_graph():
    net, x = Smooth(), image().requires_grad_()
    state = {**camfn.state_of(net), **camfn.parameters_of(net)}
    weighted(camfn.grad_cam(net, "features", x, [1, 3], normalize=False, state=state)).backward()
    found = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    own, x.grad = x.grad, None
    net.zero_grad()
    weighted(by_hand(net, x, [1, 3])).backward()
    close(own, x.grad)
    assert {*found} == {name for name, _ in net.named_parameters()} - {"fc.bias"}
    for name, slope in found.items():
        close(slope, net.get_parameter(name).grad, name)
    assert not net.training
    assert net.norm.num_batches_tracked == 0


@pytest.mark.parametrize("method", ["score_cam", "grad_cam", "ablation_cam"])
def test_the_second_derivative_is_that_of_transforms(method):
    net, x = Smooth(), image().requires_grad_()

    def total(x: Tensor) -> Tensor:
        return weighted(camfn.METHODS[method].function(net, "features", x, 1, normalize=False))

    (slope,) = torch.autograd.grad(total(x), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), x)
    close(second, grad(lambda x: grad(total)(x).square().sum())(x.detach()))


# ------------------------------------------------------------------------------------------------------- where it begins


@pytest.mark.filterwarnings("ignore:.* of the activation's energy:camfn.CamWarning")
def test_parameters_alone_give_no_graph():
    net, x = small_net().requires_grad_(), inputs()
    for name in ("grad_cam", "score_cam", "mean_cam", "cam"):
        options = {"fc": "fc"} if name == "cam" else {}
        assert not camfn.METHODS[name].function(net, "features", x, 1, **options).requires_grad
    assert not camfn.factorize(net, "features", x, concepts=2).maps.requires_grad


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "mean_cam"])
def test_without_grad_mode_there_is_no_graph(method, off):
    x = inputs().requires_grad_()
    with off():
        assert not camfn.METHODS[method].function(small_net(), "features", x, 1).requires_grad


def test_the_parameters_of_a_model_are_its_own():
    net = Smooth()
    found = camfn.parameters_of(camfn.prepare(net))
    assert {name: id(tensor) for name, tensor in found.items()} == {name: id(p) for name, p in net.named_parameters()}
    wrapped = camfn.parameters_of(nn.DataParallel(net))
    assert {*found} == {*wrapped} <= {*camfn.state_of(net)}


# --------------------------------------------------------------------------------------------------- the sweep's chunks


def nodes_of(tensor: Tensor) -> Counter:
    """The kinds of the nodes of a graph."""
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [after for after, _ in node.next_functions]
    return Counter(node.name() for node in seen)


SWEPT = ["score_cam", "ss_cam", "group_cam", "rise", "ablation_cam", "recipro_cam", "opti_cam", "poly_cam"]


@pytest.mark.parametrize("method", SWEPT)
def test_the_graph_of_a_sweep_holds_no_forward_pass_of_a_chunk(method):
    net, x = Smooth(), image().requires_grad_()
    layer = None if method == "rise" else "features"
    options = CHEAP.get(method, {})

    def convolutions(chunk: int) -> int:
        found = camfn.METHODS[method].function(net, layer, x, 1, sweep=camfn.Sweep(chunk=chunk), **options)
        return nodes_of(found)["ConvolutionBackward0"]

    assert convolutions(1) == convolutions(100) <= 6


RUNS: list[int] = []


def test_each_chunk_runs_again_in_the_backward_pass():
    class Counting(Smooth):
        def forward(self, x: Tensor) -> Tensor:
            RUNS.append(len(x))
            return super().forward(x)

    net, x = Counting(), image().requires_grad_()
    found = camfn.score_cam(net, "features", x, 1, sweep=camfn.Sweep(chunk=3))
    RUNS.clear()
    weighted(found).backward()
    assert sorted(RUNS) == [1, 3, 3, 3]


def test_the_copy_that_runs_again_is_lent_to_no_other_call():
    class Known(Smooth):
        def forward(self, x: Tensor) -> Tensor:
            RUNS.append(id(self))
            return super().forward(x)

    net, x = camfn.prepare(Known()), image().requires_grad_()
    found = camfn.score_cam(net, "features", x, 1)
    RUNS.clear()
    for _ in range(3):
        camfn.score_cam(net, "features", image(), 1)
    others = {*RUNS}
    RUNS.clear()
    weighted(found).backward()
    assert RUNS
    assert not others & {*RUNS}


@pytest.mark.parametrize("method", ["score_cam", "ablation_cam", "opti_cam", "grad_cam"])
def test_the_backward_pass_may_come_after_other_calls(method):
    """A private copy that runs again in the backward pass must not have been lent to another call."""
    net, x = camfn.prepare(Smooth()), image().requires_grad_()
    function, options = camfn.METHODS[method].function, CHEAP.get(method, {})
    found = weighted(function(net, "features", x, 1, **options))
    function(net, "features", 2 * image(), 2, **options)
    (late,) = torch.autograd.grad(found, x)
    (early,) = torch.autograd.grad(weighted(function(net, "features", x, 1, **options)), x)
    close(late, early)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 0.5}, "budget= or tolerance="),
        ({"tolerance": 0.1}, "budget= or tolerance="),
        ({"sweep": camfn.Sweep(dtype=torch.bfloat16)}, r"Sweep\(dtype=torch.bfloat16\)"),
        ({"sweep": camfn.Sweep(compile=True)}, r"Sweep\(compile=True\)"),
    ],
    ids=str,
)
def test_what_has_no_derivative_is_an_error(options, said):
    net, x = Smooth(), image()
    state = {**camfn.state_of(net), **camfn.parameters_of(net)}
    for given in ({"x": x.clone().requires_grad_()}, {"x": x, "state": state}):
        with pytest.raises(camfn.CamError, match=rf"the map has a graph, .* {said} has no derivative"):
            camfn.score_cam(net, "features", target=1, **given, **options)


# -------------------------------------------------------------------------------------------------------- odd models


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 4)
        block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.blocks = nn.TransformerEncoder(block, 2)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x).flatten(2).mT).mean(1))


@pytest.mark.parametrize("method", ATTENTION)
def test_the_graph_of_attention_is_that_of_transforms(method):
    net, x = Attends(), image()
    parameters = camfn.parameters_of(net)

    def total(given: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        state = {**camfn.state_of(net), **given[1]}
        return weighted(camfn.METHODS[method].function(net, None, given[0], 1, state=state))

    own = x.clone().requires_grad_()
    total((own, parameters)).backward()
    slope, slopes = grad(total)((x, {name: tensor.detach() for name, tensor in parameters.items()}))
    close(own.grad, slope)
    for name, parameter in parameters.items():
        close(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, slopes[name], name)


@pytest.mark.parametrize("method", ["grad_cam", "score_cam"])
def test_a_model_that_checkpoints_its_activations_has_the_graph_too(method):
    class Kept(Smooth):
        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(lambda x: self.features(torch.tanh(self.norm(self.stem(x)))), x, use_reentrant=False)
            return self.fc(torch.tanh(h).mean((2, 3)))

    layer = "features" if method == "grad_cam" else "stem"
    found = []
    for net in (Smooth(), Kept()):
        x = image().requires_grad_()
        found += torch.autograd.grad(weighted(camfn.METHODS[method].function(net, layer, x, 1)), x)
    close(*found)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return 2 * slope


def test_a_derivative_that_would_be_missing_is_an_error():
    class Odd(Smooth):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.tanh(Once.apply(self.features(torch.tanh(self.stem(x))))).mean((2, 3)))

    with pytest.raises(camfn.CamError, match=r"second derivative of Once"):
        camfn.grad_cam(Odd(), "features", image().requires_grad_(), 1)


@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "full_grad", "cam", "opti_cam", "lift_cam"])
def test_a_card_of_maps_with_a_graph_is_the_card_without(method):
    net, x = Smooth(), image()
    options = {**CHEAP.get(method, {}), **({"fc": "fc"} if method == "cam" else {})}
    layer = None if method == "full_grad" else "features"
    plain, graphed = (
        camfn.explain(net, layer, given, 1, method=method, **options) for given in (x, x.clone().requires_grad_())
    )
    assert graphed.maps.requires_grad
    assert not plain.maps.requires_grad
    close(graphed.maps, plain.maps)
    assert graphed.notes == plain.notes
    assert (graphed.forwards, graphed.backwards) == (plain.forwards, plain.backwards)

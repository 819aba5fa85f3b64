"""Blocks that drop their activations and compute them again in the backward: the map of the model without checkpoints, or one
error."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import camfn
from tests.oracles.closeness import close
from tests.oracles.exceptions import unless
from tests.oracles.networks import CHEAP

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* maps at layer 'last' are flat:camfn.CamWarning"),
]

WAYS = {
    "none": lambda block, x: block(x),
    "kept": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "segments": lambda block, x: checkpoint_sequential(block, 2, x, use_reentrant=False),
    "nested": lambda block, x: checkpoint(lambda y: checkpoint(block, y, use_reentrant=False), x, use_reentrant=False),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
}
PLAIN_GRADIENTS = ["grad_cam", "grad_cam_pp", "xgrad_cam", "layer_cam", "hires_cam", "eigen_grad_cam", "grad_cam_elementwise"]


class Net(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3), nn.Tanh())
        self.last = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 5)
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = WAYS[self.way](self.block, self.stem(x).relu())
        return self.fc(torch.sigmoid(self.last(x)).mean((2, 3)))


def net(way: str) -> nn.Module:
    torch.manual_seed(0)
    return Net(way).double()


def image() -> torch.Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run(method: str, model: nn.Module, layer: str | None, target: object = (1, 2)) -> torch.Tensor:
    options = {**CHEAP.get(method, {}), **({"fc": "fc"} if method == "cam" else {})}
    given = list(target) if isinstance(target, tuple) else target
    return camfn.METHODS[method].function(model, layer, image(), given, relu=False, normalize=False, **options)


def hooked(model: nn.Module, layer: str) -> torch.Tensor:
    """Grad-CAM by plain hooks."""
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out.clone()) or kept[-1])
    scores = model.eval()(image())
    handle.remove()
    slope = torch.autograd.grad(scores[0, 1] + scores[1, 2], kept[0])[0]
    return (slope.mean((2, 3), keepdim=True) * kept[0]).sum(1)


@pytest.mark.parametrize("layer", ["stem", "block", "block.0", "block.3", "last"])
@pytest.mark.parametrize("way", ["kept", "segments", "nested"])
@pytest.mark.parametrize("of", [lambda model: model, camfn.prepare], ids=["plain", "prepared"])
def test_the_gradient_is_that_of_plain_hooks(way, layer, of):
    if (way, layer) == ("segments", "block"):
        pytest.skip("the layers in the block run, and the block does not")
    close(run("grad_cam", of(net(way)), layer), hooked(net("none"), layer))


@pytest.mark.parametrize("method", camfn.METHODS)
@pytest.mark.parametrize("way", ["kept", "reentrant"])
def test_every_method_gives_the_map_of_the_model_without_checkpoints_or_one_error(method, way):
    with unless("a network of convolutions", method):
        the_map_or_one_error(method, way)


def the_map_or_one_error(method, way):
    # torch gives no second derivative through a reentrant block, and `functionalize` does not take one.
    refused = {"shapley_cam", "lift_cam", "full_grad", "opti_cam"} if way == "reentrant" else set()
    for layer in ("stem", "block", "last") if camfn.METHODS[method].of_layer else (None,):
        if method == "cam" and layer != "last":
            continue
        try:
            found = run(method, net(way), layer)
        except camfn.CamError as error:
            by_gradient = "gradients" in camfn.METHODS[method].needs
            assert method in refused or (way == "reentrant" and by_gradient and layer == "block"), error  # noqa: PT017
            assert "checkpoint" in str(error)  # noqa: PT017
            continue
        close(found, run(method, net("none"), layer), units=1e5)


@pytest.mark.parametrize("layer", ["stem", "last"])
@pytest.mark.parametrize("method", PLAIN_GRADIENTS)
def test_of_layers_outside_reentrant_blocks_too(method, layer):
    for target in ((1, 2), camfn.targets.top(3)):
        close(run(method, net("reentrant"), layer, target), run(method, net("none"), layer, target))


@pytest.mark.parametrize("method", [*PLAIN_GRADIENTS, "full_grad"])
def test_inside_a_reentrant_block_it_is_one_error_and_no_map_of_zeros(method):
    with pytest.raises(camfn.CamError, match=r"runs where the model records no gradient.*use_reentrant=True"):
        run(method, net("reentrant"), None if method == "full_grad" else "block.3")


def test_no_gradient_is_recorded_under_no_grad_either():
    class Frozen(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.block(self.stem(x))
            return self.fc(self.last(x).mean((2, 3)))

    torch.manual_seed(0)
    model = Frozen("none").double()
    with pytest.raises(camfn.CamError, match="layer 'block' runs where the model records no gradient"):
        run("grad_cam", model, "block")
    assert run("grad_cam", model, "last").abs().max() > 0


def test_what_a_tap_gave_can_be_pulled_after_later_calls():
    """The block that runs again must find what it ran with: state, nudge and swap."""
    models = {way: camfn.prepare(net(way)) for way in ("none", "kept")}
    found = {}
    for way, model in models.items():
        state = camfn.state_of(model)
        other = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        f, nudge = camfn.tap(model, "block.0"), torch.full((2, 6, 8, 8), 0.3, dtype=torch.float64, requires_grad=True)
        swap = torch.linspace(-1, 1, nudge.numel(), dtype=torch.float64).view_as(nudge).requires_grad_()
        outputs = [f(state, image(), nudge).output, f(other, image(), nudge).output, f(state, image(), nudge, swap).output]
        camfn.grad_cam(model, "block", image(), 1)
        f(other, image())
        leaves = [(nudge,), (nudge,), (nudge, swap)]
        found[way] = [g for y, at in zip(outputs, leaves) for g in torch.autograd.grad(y[:, 1].sum(), at)]
    for ours, expected in zip(found["kept"], found["none"]):
        close(ours, expected)


def test_a_call_that_is_one_of_several_cannot_be_told_in_the_backward():
    class Twice(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def block(y: torch.Tensor) -> torch.Tensor:
                return self.last(self.last(y).tanh()).tanh()

            x = self.block(self.stem(x))
            return self.fc((checkpoint(block, x, use_reentrant=False) if self.way == "kept" else block(x)).mean((2, 3)))

    torch.manual_seed(0)
    model = Twice("kept").double()
    with pytest.raises(camfn.CamError, match="runs several times in a forward, and again in the backward"):
        run("grad_cam", model, "last@2")


@pytest.mark.parametrize("way", ["kept", "reentrant"])
def test_under_a_transform_it_is_one_error(way):
    model = net(way)

    def total(x: torch.Tensor) -> torch.Tensor:
        return camfn.grad_cam(model, "stem", x[None], 1, normalize=False).sum()

    with pytest.raises(camfn.CamError, match=r"checkpoints its activations.*switch that off"):
        vmap(grad(total))(image())


def test_a_reentrant_block_has_no_second_derivative():
    with pytest.raises(camfn.CamError, match="checkpoints its activations"):
        run("shapley_cam", net("reentrant"), "stem")

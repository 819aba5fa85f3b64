"""Batch norms merged into convolutions, weights with the channels last: the model's function stays as it is, to rounding."""

import dataclasses
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import camfn
from camfn._types import State
from camfn.model.capture import pure_from
from camfn.model.prepare import opened
from camfn.sweep.folding import Fold, channels_last, find_folds, merge_norms
from tests.oracles.closeness import close
from tests.oracles.foldable import NORMS, Net, images, loop_maps, pair, seeded, signed_maps


@pytest.fixture(autouse=True)
def _worth_it(monkeypatch):
    """The networks here are too small for a copy of their weights to pay."""
    monkeypatch.setattr(camfn.sweep.runner, "_REUSED", 0)


def in_eval(model: nn.Module, x: Any) -> Any:
    """What torch itself makes of the model in eval mode; the mode is put back."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        output = model.eval()(x)
    for module, mode in modes.items():
        module.training = mode
    return output


def merged(model: nn.Module, x: Tensor, state: State | None = None) -> tuple[tuple[Fold, ...], Callable, State]:
    """What was found in one image, the rewritten model as a function of `(state, x)`, and its state."""
    state = camfn.state_of(model) if state is None else state
    folds = find_folds(model, state, x[:1]).folds
    private, new = merge_norms(opened(model).borrow(), state, folds)
    return folds, pure_from(private), new


class SamePadding(nn.Conv2d):
    """TensorFlow's "same": what is missing is padded at the end, as timm has it."""

    def forward(self, x):
        pads = [max((-(-size // 2) - 1) * 2 + 3 - size, 0) for size in reversed(x.shape[2:])]
        pads = [side for pad in pads for side in (pad // 2, pad - pad // 2)]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride)


class Standardised(nn.Conv2d):
    """Weight standardisation: a gain on the weight is divided out again, so merging would lose the norm's."""

    def forward(self, x):
        flat = self.weight.flatten(1)
        weight = (self.weight - flat.mean(1)[:, None, None, None]) / flat.std(1)[:, None, None, None]
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Masked(nn.Conv2d):
    """A weight with holes in it, as autoregressive models have."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, x):
        return F.conv2d(x, self.weight * (self.mask > 0), self.bias, self.stride, self.padding)


class Rectified(nn.BatchNorm2d):
    """A batch norm with the activation in it."""

    def forward(self, x):
        return super().forward(x).relu()


class Saturating(nn.Conv2d):
    """Clips its output, as quantised convolutions do, farther out than the image at hand comes."""

    limit = 1.0

    def forward(self, x):
        return super().forward(x).clamp(-self.limit, self.limit)


# ------------------------------------------------------------------------------------------------- pairs that merge


class Again(nn.Module):
    """The pair under two names, and run under the second."""

    def __init__(self):
        super().__init__()
        self.first = pair()
        self.second = self.first

    def forward(self, x):
        return self.second(x)


MERGE = {
    **{f"{dims}-D": (lambda dims=dims: pair(dims)) for dims in (1, 2, 3)},
    **{f"{dims}-D without bias": (lambda dims=dims: pair(dims, bias=False)) for dims in (1, 2, 3)},
    "groups": lambda: pair(groups=2),
    "depthwise": lambda: pair(groups=4, bias=False),
    "3-D depthwise": lambda: pair(3, groups=4),
    "stride, dilation and reflection": lambda: pair(stride=2, dilation=2, padding=2, padding_mode="reflect"),
    "no affine": lambda: pair(affine=False),
    "no affine, no bias": lambda: pair(affine=False, bias=False),
    "kernel of one": lambda: nn.Sequential(nn.Conv2d(4, 16, 1), nn.BatchNorm2d(16)),
    "large eps": lambda: nn.Sequential(nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16, eps=0.7)),
    "in-place activation behind": lambda: nn.Sequential(*pair(), nn.ReLU(inplace=True)),
    "identity between": lambda: nn.Sequential(nn.Sequential(pair()[0], nn.Identity()), nn.BatchNorm2d(16)),
    "two in a row": lambda: nn.Sequential(*pair(), nn.ReLU(), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)),
    "under two names": Again,
}


def dims_of(model: nn.Module) -> int:
    return next(len(m.kernel_size) for m in model.modules() if hasattr(m, "kernel_size"))


@pytest.mark.parametrize("kind", MERGE)
def test_a_merged_pair_is_the_same_function_without_the_norm(kind):
    model = seeded(Net(MERGE[kind]()))
    x = images(dims=dims_of(model))
    folds, call, state = merged(model, x)
    assert len(folds) == sum(isinstance(module, tuple(NORMS.values())) for module in model.modules())
    assert not [name for name in state if "running" in name or "tracked" in name]
    for other in (x, images(3, dims_of(model), side=7, seed=9) * 5):  # the image that the pair was found in, and others
        close(call(state, other.clone()), in_eval(model, other.clone()), kind)


def test_the_names_of_a_pair_and_the_formula():
    model = seeded(Net(pair()))
    folds, _, state = merged(model, images())
    conv, norm = model.inner
    gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    assert folds == (Fold("inner.0", "inner.1"),)
    close(state["inner.0.weight"], conv.weight * gain[:, None, None, None])
    close(state["inner.0.bias"], (conv.bias - norm.running_mean) * gain + norm.bias)
    assert set(state) == {"inner.0.weight", "inner.0.bias", "fc.weight", "fc.bias"}


def test_in_a_narrow_dtype_a_merged_weight_is_rounded_once():
    model = seeded(Net(pair())).bfloat16()
    _, state = merge_norms(opened(model).borrow(), camfn.state_of(model), (Fold("inner.0", "inner.1"),))
    conv, norm = model.inner.double()
    exact = conv.weight * (norm.weight / torch.sqrt(norm.running_var + norm.eps))[:, None, None, None]
    found = state["inner.0.weight"]
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 2**-8 * 1.001 * exact.abs()).all()


# ------------------------------------------------------------------------------------------- pairs that must be left


class Wired(nn.Module):
    """A convolution and a norm, wired as `how` says; it may use both as often as it likes."""

    def __init__(self, how: Callable[["Wired", Tensor], Tensor], conv: Any = nn.Conv2d, norm: Any = nn.BatchNorm2d):
        super().__init__()
        self.conv = conv(4, 16, 3, padding=1)
        self.norm = norm(16)
        self.back = nn.Conv2d(16, 4, 1)
        self.how = how

    def forward(self, x):
        return self.how(self, x)


def plain(net: Wired, x: Tensor) -> Tensor:
    return net.norm(net.conv(x))


def beside(net: Wired, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.norm(y) + y


def weight_beside(net: Wired, x: Tensor) -> Tensor:
    return net.norm(net.conv(x)) + F.conv2d(x, net.conv.weight, padding=1)


def conv_twice(net: Wired, x: Tensor) -> Tensor:
    return net.conv(net.back(net.norm(net.conv(x)).tanh()))


def norm_twice(net: Wired, x: Tensor) -> Tensor:
    return net.norm(net.norm(net.conv(x)).tanh())


def in_place_between(net: Wired, x: Tensor) -> Tensor:
    return net.norm(net.conv(x).relu_())


def view_in_place_between(net: Wired, x: Tensor) -> Tensor:
    y = net.conv(x)
    y[:, :, 0] = 0
    return net.norm(y)


def out_of_place_between(net: Wired, x: Tensor) -> Tensor:
    return net.norm(net.conv(x).relu())


def input_changed_between(net: Wired, x: Tensor) -> Tensor:
    x = x * 1
    y = net.conv(x)
    x.relu_()
    return net.norm(y)


def norm_before(net: Wired, x: Tensor) -> Tensor:
    return net.norm(x.repeat(1, 4, 1, 1)) + net.conv(net.back(net.norm(x.repeat(1, 4, 1, 1))))


def tied(*names: str) -> nn.Module:
    net = Wired(lambda net, x: net.norm(net.conv(x)) + net.other(x))
    net.other = nn.Conv2d(4, 16, 3, padding=1)
    for name in names:
        setattr(net.other, name, getattr(net.conv, name))
    return net


def bias_of_both() -> nn.Module:
    net = Wired(plain)
    net.conv.bias = net.norm.bias
    return net


def hooked(part: str, register: str, hook: Callable) -> nn.Module:
    net = Wired(plain)
    getattr(getattr(net, part), register)(hook)
    return net


class Halved(nn.Module):
    def forward(self, weight):
        return weight.clamp(max=0.2)


def parametrized() -> nn.Module:
    net = Wired(plain)
    parametrize.register_parametrization(net.conv, "weight", Halved())
    return net


LEFT = {
    "conv used twice": lambda: Wired(conv_twice),
    "norm used twice": lambda: Wired(norm_twice),
    "in-place op between": lambda: Wired(in_place_between),
    "in-place op on a part between": lambda: Wired(view_in_place_between),
    "op between": lambda: Wired(out_of_place_between),
    "norm before": lambda: Wired(norm_before),
    "tied weights": lambda: tied("weight"),
    "tied biases": lambda: tied("bias"),
    "one bias for both": bias_of_both,
    "hook on the conv": lambda: hooked("conv", "register_forward_hook", lambda module, args, out: out.abs()),
    "silent hook on the conv": lambda: hooked("conv", "register_forward_hook", lambda module, args, out: None),
    "pre-hook on the conv": lambda: hooked("conv", "register_forward_pre_hook", lambda module, args: (args[0].abs(),)),
    "hook on the norm": lambda: hooked("norm", "register_forward_hook", lambda module, args, out: out.abs()),
    "pre-hook on the norm": lambda: hooked("norm", "register_forward_pre_hook", lambda module, args: (args[0].abs(),)),
    "weight standardisation": lambda: Wired(plain, conv=Standardised),
    "parametrized weight": parametrized,
    "no running statistics": lambda: Wired(plain, norm=functools.partial(nn.BatchNorm2d, track_running_stats=False)),
    "transposed": lambda: Wired(plain, conv=nn.ConvTranspose2d),
    "square transposed": lambda: Wired(
        lambda net, x: net.norm(net.conv(x.repeat(1, 4, 1, 1))), conv=lambda *args, **kwargs: nn.ConvTranspose2d(16, 16, 3)
    ),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_cannot_be_merged_is_left(kind):
    model, x = seeded(Net(LEFT[kind]())), images()
    folds, call, state = merged(model, x)
    assert folds == ()
    close(call(state, x), in_eval(model, x), kind)


@pytest.mark.parametrize("wrap", [lambda **parts: types.SimpleNamespace(**parts), lambda **parts: Parts(**parts), dict])
def test_an_output_returned_in_an_object_is_not_merged(wrap):
    model = seeded(Wired(lambda net, x: wrap(y=net.norm(y := net.conv(x)), also=y)))
    assert find_folds(model, camfn.state_of(model), images(1, channels=4)).folds == ()


@dataclasses.dataclass
class Parts:
    y: Tensor
    also: Tensor


RIGHT = {
    **MERGE,
    **{kind: made for kind, made in LEFT.items() if kind != "no running statistics"},  # whose rows are not independent
    "conv output used elsewhere too": lambda: Wired(beside),
    "conv weight used elsewhere too": lambda: Wired(weight_beside),
    "input changed between": lambda: Wired(input_changed_between),
    "conv called by keyword": lambda: Wired(lambda net, x: net.norm(net.conv(input=x))),
    "both called by keyword": lambda: Wired(lambda net, x: net.norm(input=net.conv(input=x))),
    "norm's tensors read": lambda: Wired(lambda net, x: net.norm(net.conv(x)) * net.norm.running_var.sum()),
    "conv's bias read": lambda: Wired(lambda net, x: net.norm(net.conv(x)) + net.conv.bias.sum()),
    "same padding of TensorFlow": lambda: pair(cls=SamePadding, stride=2),
    "weight with holes": lambda: Wired(plain, conv=Masked),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_a_sweep_gives_the_map_of_the_loop(kind):
    model = seeded(Net(RIGHT[kind]()))
    x, layer = images(dims=dims_of(model)), "inner"
    found = signed_maps(model, layer, x, 3)
    close(found, loop_maps(model, layer, x, 3), kind)


def test_an_output_used_elsewhere_with_a_gain_that_is_zero_at_first():
    """Zero-initialised branches: on one state the merged model looks right, on the next it does not."""
    model, x = seeded(Net(Wired(lambda net, x: net.norm(y := net.conv(x)) + net.gain * y))), images()
    model.inner.gain = nn.Parameter(torch.zeros((), dtype=torch.float64))
    for gain in (0.0, 1.0, 0.0):
        with torch.no_grad():
            model.inner.gain.fill_(gain)
        close(signed_maps(model, "inner", x, 3), loop_maps(model, "inner", x, 3), str(gain))


@pytest.mark.parametrize("part", ["conv", "norm"])
def test_more_than_the_image_shows_is_not_merged(part):
    """A ReLU or a clamp that does nothing on the image itself, and something on five times the image."""
    classes = {"conv": Saturating} if part == "conv" else {"norm": Rectified}
    model, x = seeded(Net(Wired(plain, **classes))), images()
    with torch.no_grad():
        raw = nn.Conv2d.forward(model.inner.conv, x)
        model.inner.conv.limit = float(raw.abs().max()) * 1.01
        low = nn.BatchNorm2d.forward(model.inner.norm.eval(), raw).amin((0, 2, 3)) - model.inner.norm.bias
        model.inner.norm.bias.copy_(0.01 - low)
    plainly = functools.partial(camfn.is_cam, model, "inner", x, 3, num_samples=4, relu=False, normalize=False)
    close(plainly(), plainly(sweep=camfn.Sweep(fold=False)))
    _, call, state = merged(model, x)
    close(call(state, x * 5), in_eval(model, x * 5))


# --------------------------------------------------------------------------------------------------- nothing is kept


def test_changed_weights_are_merged_anew_in_each_call():
    model, x = seeded(Net(pair())), images()
    conv, norm = model.inner
    for tensor in (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        with torch.no_grad():
            tensor.mul_(3)
        close(signed_maps(model, "inner", x, 3), loop_maps(model, "inner", x, 3))
    norm.eps = 0.5
    close(signed_maps(model, "inner", x, 3), loop_maps(model, "inner", x, 3))


def test_another_state_and_back():
    model, other, x = seeded(Net(pair())), camfn.state_of(seeded(Net(pair()), 7)), images()
    expected = {None: loop_maps(model, "inner", x, 3), 1: loop_maps(model, "inner", x, 3, other)}
    assert (expected[None] - expected[1]).abs().max() > 1e-3
    for which in (None, 1, None, 1):
        found = signed_maps(model, "inner", x, 3, state=other if which else None)
        close(found, expected[which], str(which))


def test_a_model_changed_between_calls_is_looked_at_again():
    model, x = seeded(Net(Wired(plain))), images()
    changes = [
        lambda: None,
        lambda: model.inner.conv.register_forward_hook(lambda module, args, out: out.abs()),
        lambda: setattr(model.inner, "how", beside),
        lambda: setattr(model.inner, "norm", nn.Identity()),
    ]
    for change in changes:
        change()
        close(signed_maps(model, "inner", x, 3), loop_maps(model, "inner", x, 3))


@pytest.mark.parametrize("kind", ["2-D", "2-D without bias", "no affine", "under two names"])
def test_the_model_and_the_state_are_left_as_they_are(kind):
    model, x = seeded(Net(MERGE[kind]())), images()
    given = {name: tensor.clone() for name, tensor in camfn.state_of(model).items()}
    held = {name: (id(t), t._version, t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    before = {name: (id(tensor), tensor._version) for name, tensor in given.items()}
    values = {name: tensor.clone() for name, tensor in given.items()}
    merged(model, x, given)
    camfn.score_cam(model, "inner", x, 3, state=given)
    camfn.score_cam(model, "inner", x, 3)
    assert {name: (id(tensor), tensor._version) for name, tensor in given.items()} == before
    assert all(torch.equal(given[name], values[name]) for name in values)
    after = {name: (id(t), t._version, t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert {name: entry[:2] for name, entry in after.items()} == {name: entry[:2] for name, entry in held.items()}
    assert all(torch.equal(after[name][2], held[name][2]) for name in held)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert [type(module) for module in model.modules()] == [type(module) for module in Net(MERGE[kind]()).modules()]


def test_threads_merge_each_their_own_state():
    model, x = seeded(Net(pair())), images()
    states = [camfn.state_of(seeded(Net(pair()), seed)) for seed in range(4)]
    expected = [loop_maps(model, "inner", x, 3, state) for state in states]
    found: dict[int, Tensor] = {}
    gate = threading.Barrier(len(states))

    def work(number: int) -> None:
        gate.wait()
        for _ in range(3):
            found[number] = signed_maps(model, "inner", x, 3, state=states[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(states))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, maps in enumerate(expected):
        close(found[number], maps, f"thread {number}")


# ------------------------------------------------------------------------------------------------------ channels last


def test_channels_last_is_a_layout_and_no_more():
    model = seeded(Net(nn.Sequential(*pair(), nn.ReLU(), nn.Conv2d(16, 16, 3))))
    state = camfn.state_of(model)
    found = channels_last(state)
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)
        assert tensor.is_contiguous()  # the caller's own stays
        assert found[name].is_contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else found[name] is tensor
    x = images(side=8)
    close(camfn.pure(model)(found, x), in_eval(model, x))

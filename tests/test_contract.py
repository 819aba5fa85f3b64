"""The promise, for every row of `camfn.METHODS`: pure, exact however it is executed, composable, differentiable.

A new method is tested here from the moment it is in the table; one that follows attention, in methods/test_transformers.py.
"""

import collections
import copy
import dataclasses
import functools
import itertools
import random
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import camfn
from camfn import _compat
from camfn.testing.laws import ROUGH, slope
from camfn.testing.unchanged import unchanged
from tests.laws import laws
from tests.oracles import closeness, networks
from tests.oracles.closeness import assert_close, close
from tests.oracles.exceptions import unless
from tests.oracles.loops import score_cam_loop
from tests.oracles.networks import LAYERED, SmallNet, inputs, small_net

WEIGHTLESS = ("cameras", "eigen_grad_cam", "kpca_cam", "seg_eigen_cam", "recipro_cam")
"""Methods of a layer that have no weights."""
ELEMENTWISE = ("grad_cam_elementwise", "hires_cam", "layer_cam")
"""Methods with a weight for each position of a channel."""

DIFFERENCES = ("group_cam", "poly_cam")
"""Their weights are differences of scores, the negative ones left out."""

# Where no group of channels adds to the blurred input, which is so for most classes, Group-CAM's map is flat.
pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ of \d+ maps at layer '.*' are flat:camfn.CamWarning")


def fused(net: nn.Module, layer: None, x, target=None, **options):
    names = [name for name, module in net.named_modules() if name.rpartition(".")[2] in ("stem", "features")]
    return camfn.fuse_layers(camfn.grad_cam, names, "mean")(net, layer, x, target, **options)


vars(fused).update(of_layer=False)
UNRECTIFIED = {"relu": False}
CHEAP = networks.CHEAP | {
    "augment(smooth(grad_cam))": UNRECTIFIED,
    "multi_scale(ensemble)": UNRECTIFIED,
    "fuse_layers(grad_cam)": UNRECTIFIED,
}
COMPOSED = {
    "augment(smooth(grad_cam))": camfn.augment(camfn.smooth(camfn.grad_cam, 2), factors=(1.0,)),
    "integrate(score_cam)": camfn.integrate(camfn.score_cam, 2),
    "multi_scale(ensemble)": camfn.multi_scale(camfn.ensemble([camfn.grad_cam, camfn.score_cam_pp]), [10], blur=None),
    "fuse_layers(grad_cam)": fused,
}
METHODS = [*sorted(LAYERED), *COMPOSED]
FUNCTIONS = {**{name: row.function for name, row in camfn.METHODS.items()}, **COMPOSED}
SWEPT = [name for name in sorted(LAYERED) if "masked inputs" in camfn.METHODS[name].needs and name != "opti_cam"]
CHUNKED = [name for name in sorted(LAYERED) if "sweep" in camfn.METHODS[name].function.__wrapped__.__kwdefaults__]
OF_LAYER = [name for name in METHODS if vars(FUNCTIONS[name])["of_layer"]]
"""The others take `None` for a layer. Their maps are of the input's size, and so are those of `multi_scale` and `cameras`."""
PROBABLE = ("group_cam", "score_cam_pp", "rise", "poly_cam")
"""A class stands for its probability."""

every_method = pytest.mark.parametrize("method", METHODS)
every_sweep = pytest.mark.parametrize("method", SWEPT)
every_row = pytest.mark.parametrize("method", sorted(LAYERED))
every_row_and_one = pytest.mark.parametrize("method", [*sorted(LAYERED), next(iter(COMPOSED))])
"""Of tests that take long: a composition says little there that its parts do not."""
every_chunked = pytest.mark.parametrize("method", CHUNKED)
every_composition = pytest.mark.parametrize("method", [name for name in COMPOSED if name not in laws.COMPOSED])
"""Of tests that the laws make of all others."""
WAYS = ("cam", "grad_cam", "score_cam", "score_cam_pp", "ablation_cam", "full_grad", "opti_cam")
"""A method of each way to use what it is given: the rows of a linear layer, gradients at a layer, logits of masked inputs,
their probabilities, the head, all gradients, steps along a gradient. Targets, inputs and outputs are read before that."""


def each_way(name: str, values, few, methods=tuple(sorted(LAYERED))):
    """All values for the methods of `WAYS`, and a few for the others."""
    pairs = [(method, value) for method in methods for value in (values if method in WAYS else few)]
    return pytest.mark.parametrize(("method", name), pairs, ids=lambda part: part if isinstance(part, str) else None)


can_compile = pytest.mark.skipif(bool(_compat.can_compile()), reason=_compat.can_compile() or "-")


def run(method: str, net: nn.Module, layer, x, target=None, **options):
    return FUNCTIONS[method](net, layer_of(method, layer), x, target, **{**CHEAP.get(method, {}), **options})


def layer_of(method: str, layer):
    """The layer, for a method that takes one."""
    return layer if method in OF_LAYER else None


def size_of(method: str, grid: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...]:
    """Of the maps of a method, where the layer's grid and the input are of these sizes."""
    return grid if method in OF_LAYER and not method.startswith(("multi_scale", "cameras")) else size


def signed(method: str) -> dict:
    """The option by which no map of gradients is nowhere positive."""
    return {"relu": False} if method not in COMPOSED and "gradients" in camfn.METHODS[method].needs else {}


def in_chunks_of(method: str, chunk: int) -> dict:
    return {"sweep": camfn.Sweep(chunk=chunk)} if method in CHUNKED else {}


# ---------------------------------------------------------------------------------------------- what must not change


def test_the_comparison_sees_every_kind_of_change():
    def changes_nothing(net):
        net(inputs())

    def trains(net):
        net.bn.train()

    def bumps(net):
        net.bn.num_batches_tracked += 1

    def writes_the_value_that_was_there(net):
        with torch.no_grad():
            net.conv.weight.copy_(net.conv.weight.clone())

    def replaces_by_an_equal(net):
        net.conv.bias = nn.Parameter(net.conv.bias.detach().clone())

    def accumulates(net):
        net.conv.weight.grad = torch.ones_like(net.conv.weight)

    def hooks(net):
        net.conv.register_forward_hook(print)

    def freezes(net):
        net.conv.weight.requires_grad_(False)

    def subclasses(net):
        net.conv.__class__ = type("Conv2d", (nn.Conv2d,), {})

    def reorders(net):
        net._parameters.update(weight=None)

    def draws(net):
        random.random()

    def filters(net):
        warnings.filters.insert(0, ("ignore", None, UserWarning, None, 12345))

    net = nn.Module()
    net.conv, net.bn = nn.Conv2d(3, 3, 1).double(), nn.BatchNorm2d(3).double().eval()
    net.forward = lambda x: net.bn(net.conv(x))
    with unchanged(net):
        changes_nothing(net)
    for change in (trains, bumps, writes_the_value_that_was_there, replaces_by_an_equal, accumulates, hooks, freezes):
        with pytest.raises(AssertionError, match="argument is not"), unchanged(net):
            change(net)
    for change in (subclasses, reorders):
        with pytest.raises(AssertionError, match="argument is not"), unchanged(net):
            change(net)
    with pytest.raises(AssertionError, match="process is not"), warnings.catch_warnings(), unchanged(net):
        filters(net)
    with pytest.raises(AssertionError, match="process is not"), unchanged(net):
        draws(net)


# ----------------------------------------------------------------------------------------------------------- purity


def batch_norm(seed: int) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(6).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        bn.running_mean.copy_(torch.randn(6, generator=generator) * 0.3)
        bn.running_var.copy_(torch.rand(6, generator=generator) + 0.5)
    return bn


class Holder:
    """Not a module, and holds one."""

    def __init__(self, module: nn.Module):
        self.module = module


class Everything(nn.Module):
    """Whatever a forward may write to, and every way by which it may reach a module; in train mode with one part in eval."""

    def __init__(self):
        super().__init__()
        inner = small_net(1)
        self.stem, self.features, self.act, self.fc = inner.stem, inner.features, nn.ReLU(inplace=True), inner.fc
        self.drop = nn.Dropout(0.5)
        self.listed, self.held, closed = [batch_norm(1)], Holder(batch_norm(2)), batch_norm(3)
        self.bound, self.closure = batch_norm(4).forward, lambda h: closed(h)
        self.partial = functools.partial(Everything.through, batch_norm(5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(5, dtype=torch.float64), persistent=False)
        self.plain, self.number, self.log, self.table = torch.zeros(()), 0, [], {"calls": 0, "sum": torch.zeros(())}
        self.stem[1].eval()
        self.features.weight.requires_grad_(False)
        self.fc.weight.grad = torch.ones_like(self.fc.weight)
        self.act.register_forward_hook(lambda module, args, out: out * 1.5)
        self.fc.register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))

    @staticmethod
    def through(module, h):
        return module(h)

    def modules_out_of_sight(self):
        cell = self.closure.__closure__[0].cell_contents
        return self.listed[0], self.held.module, self.bound.__self__, cell, self.partial.args[0]

    def forward(self, x):
        self.calls += 1
        self.plain += 1
        self.number += 1
        self.log.append(self.number)
        self.table["calls"] += 1
        self.table["sum"] += 1
        h = self.act(self.features(self.stem(x)))
        for step in (self.listed[0], self.held.module, self.bound, self.closure, self.partial):
            h = step(h)
        y = self.fc(self.drop(h.mean((2, 3))))
        self.last.copy_(y[0].detach())
        return y


@every_method
@pytest.mark.parametrize("given", ["own", "state="])
def test_nothing_is_changed(method, given):
    net, x, target = Everything(), inputs().requires_grad_(), torch.tensor([1, 2])
    net.fc.register_full_backward_hook(lambda module, gradient_in, gradient_out: None)
    x.grad = torch.ones_like(x)
    state = {"state": {name: t + 0.01 for name, t in camfn.state_of(net).items() if t.is_floating_point()}}
    state["state"]["stem.1.num_batches_tracked"], state["state"]["calls"] = torch.tensor(7), torch.tensor(7)
    options = state if given == "state=" else {}
    with unchanged(net, net.modules_out_of_sight(), x, target, state):
        run(method, net, "features", x, target, **options)
        run(method, net, ("stem", "features"), x, **options) if method in OF_LAYER and method != "cam" else None


@pytest.mark.parametrize("method", WAYS)
def test_the_second_call_gives_what_the_first_gave(method):
    """The laws have it for every method, of models that keep nothing."""
    net, x = Everything(), inputs()
    assert torch.equal(run(method, net, "features", x), run(method, net, "features", x))


@every_method
def test_a_model_in_train_mode_is_explained_in_eval_mode(method):
    training, evaluated = Everything(), Everything().eval()
    for module in evaluated.modules_out_of_sight():
        module.eval()
    x = inputs()
    assert torch.equal(run(method, training, "features", x), run(method, evaluated, "features", x))
    assert torch.equal(camfn.pure(training)(camfn.state_of(training), x), evaluated(x))


@every_chunked
def test_a_model_in_train_mode_has_the_scores_of_eval_mode(method):
    card = camfn.explain(Everything(), layer_of(method, "features"), inputs(), "all", method=method, **CHEAP.get(method, {}))
    evaluated = Everything().eval()
    for module in evaluated.modules_out_of_sight():
        module.eval()
    with torch.no_grad():
        y = evaluated(inputs())
    assert torch.equal(card.scores, y.softmax(1) if method in PROBABLE else y)


FORWARDS = itertools.count(1)


class Stumbles(Everything):
    """Raises in the forward whose number is `at`, half-way, having written to everything."""

    at = 0

    def forward(self, x):
        out = super().forward(x)
        if next(FORWARDS) == self.at:
            raise RuntimeError("stumbled")
        return out


@every_method
def test_nothing_is_changed_when_the_model_raises_in_the_fifth_forward(method):
    global FORWARDS
    FORWARDS, net, x = itertools.count(1), Stumbles(), inputs()
    net.at = 5 if method in SWEPT else 1
    with pytest.raises(RuntimeError, match="stumbled"), unchanged(net, net.modules_out_of_sight(), x):
        run(method, net, "features", x, **in_chunks_of(method, 1))
    assert next(FORWARDS) == net.at + 1


@every_method
def test_nothing_is_changed_when_the_call_is_an_error(method):
    net, x = Everything(), inputs()
    with pytest.raises(camfn.CamError), unchanged(net, net.modules_out_of_sight(), x):
        run(method, net, "features", x, target=99)
    with pytest.raises(camfn.CamError), unchanged(net, net.modules_out_of_sight(), x):
        FUNCTIONS[method](net, "fc", x)


@pytest.mark.parametrize("function", ["state_of", "pure", "tap", "head", "explain", "candidate_layers", "factorize"])
def test_the_other_public_functions_change_nothing(function):
    net, x = Everything(), inputs()
    state = camfn.state_of(net)
    value = camfn.tap(net, "features")(state, x).seen
    calls = {
        "state_of": lambda: camfn.state_of(net),
        "pure": lambda: camfn.pure(net)(state, x),
        "tap": lambda: camfn.tap(net, "features")(state, x, torch.ones_like(value), value * 2),
        "head": lambda: camfn.head(net, "features", x, value)(state, x, value * 2),
        "explain": lambda: camfn.explain(net, "features", x),
        "candidate_layers": lambda: camfn.candidate_layers(net, x, state=state),
        "factorize": lambda: camfn.factorize(net, "act", x, concepts=2),
    }
    with unchanged(net, net.modules_out_of_sight(), x, state, value):
        calls[function]()


class Counts(nn.Module):
    """Multiplies by its weight, and counts its calls in a buffer and in a plain tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("calls", torch.zeros(()))
        self.plain = torch.zeros(())

    def forward(self, h):
        self.calls += 1
        self.plain += 1
        return h * self.weight


class CountsOutOfSight(nn.Module):
    """Its counters stand before the layer, reached through a list, an object, a bound method and a closure."""

    def __init__(self):
        super().__init__()
        self.inner = small_net()
        self.fc = self.inner.fc
        closed = Counts()
        self.steps = [Counts()]
        self.held, self.bound, self.closure = Holder(Counts()), Counts().forward, lambda h: closed(h)

    def counters(self):
        return self.steps[0], self.held.module, self.bound.__self__, self.closure.__closure__[0].cell_contents

    def forward(self, x):
        return self.inner(self.closure(self.bound(self.held.module(self.steps[0](x)))))


@every_method
def test_buffers_of_modules_out_of_sight_are_copied_too(method):
    net = CountsOutOfSight()
    with unchanged(net, net.counters()):
        run(method, net, "inner.features", inputs())


@every_method
def test_no_graph_is_kept_by_parameters_of_modules_out_of_sight(method):
    net, x = CountsOutOfSight(), inputs()
    assert not run(method, net, "inner.features", x).requires_grad
    assert not grad(lambda x: run(method, net, "inner.features", x, 1, normalize=False).sum())(x).requires_grad


class CountsInObjects(nn.Module):
    """Keeps its count in things that are neither tensors nor plain containers."""

    def __init__(self):
        super().__init__()
        self.inner = small_net()
        self.fc = self.inner.fc
        self.counter = types.SimpleNamespace(calls=0, total=torch.zeros(()))
        self.recent = collections.deque(maxlen=3)
        self.names = collections.defaultdict(int)

    def forward(self, x):
        self.counter.calls += 1
        self.counter.total += 1
        self.recent.append(len(x))
        self.names["calls"] += 1
        return self.inner(x)


@every_method
def test_a_model_that_counts_its_calls_in_an_object_does_not_count_ours(method):
    net = CountsInObjects()
    with unchanged(net):
        run(method, net, "inner.features", inputs())


class Settings(dict):
    """Keys as attributes, as configurations often have them."""

    def __getattr__(self, name):
        return self[name]


class Stages(list):
    def last(self):
        return self[-1]


class Names(set):
    def knows(self, name):
        return name in self


class Pair(tuple):
    def __new__(cls, first, second):
        return super().__new__(cls, (first, second))


class Holds(nn.Module):
    """Keeps something beside its modules, and uses it in the forward."""

    def __init__(self, held, use):
        super().__init__()
        self.inner, self.held, self.use = small_net(), held, use
        self.fc = self.inner.fc

    def forward(self, x):
        return self.inner(x) + self.use(self.held)


CONTAINERS = {
    "dict": (Settings(gain=2, norm=batch_norm(1)), lambda held: held.gain),
    "list": (Stages([batch_norm(1), 2]), lambda held: held.last()),
    "set": (Names(["two", 3]), lambda held: 2 * held.knows("two")),
    "tuple": (Pair(batch_norm(1), 2), lambda held: held[1]),
    "namedtuple": (collections.namedtuple("Named", "norm gain")(batch_norm(1), 2), lambda held: held.gain),
    "OrderedDict": (collections.OrderedDict(norm=batch_norm(1), gain=2), lambda held: held["gain"]),
    "Counter": (collections.Counter(gain=2), lambda held: held["gain"] + held["nothing"]),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_of_a_class_of_their_own_keep_it(kind):
    net = Holds(*CONTAINERS[kind])
    with torch.no_grad():
        expected = net.eval()(inputs())
    with unchanged(net.train()):
        assert torch.equal(camfn.pure(net)(camfn.state_of(net), inputs()), expected)


@every_row_and_one
def test_modules_in_a_container_of_the_standard_library_do_not_move(method):
    for container in (collections.UserDict(norm=batch_norm(1)), types.MappingProxyType({"norm": batch_norm(1)})):
        ones = torch.ones(2, 6, 2, 2, dtype=torch.float64)
        net = Holds(container, lambda held, ones=ones: held["norm"](ones).mean())
        with unchanged(net, container["norm"]):
            run(method, net, "inner.features", inputs())


@every_method
def test_no_process_wide_switch_is_touched_not_even_for_a_moment(method, monkeypatch):
    def touched(*args, **kwargs):
        raise AssertionError("a process-wide switch was touched")

    monkeypatch.setattr(warnings, "filterwarnings", touched)
    monkeypatch.setattr(warnings, "simplefilter", touched)
    monkeypatch.setattr(warnings.catch_warnings, "__enter__", touched)
    monkeypatch.setattr(torch.random, "fork_rng", touched)
    for name in ("manual_seed", "set_rng_state", "seed", "set_default_dtype", "use_deterministic_algorithms"):
        monkeypatch.setattr(torch, name, touched)
    for name in ("enable_flash_sdp", "enable_math_sdp", "enable_mem_efficient_sdp"):
        monkeypatch.setattr(torch.backends.cuda, name, touched)
    if hasattr(torch.backends, "mha"):
        monkeypatch.setattr(torch.backends.mha, "set_fastpath_enabled", touched)
    run(method, small_net(), "features", inputs())


def test_tracing_a_head_patches_no_class_of_torch(monkeypatch):
    """Another thread may be in a forward at the time: what the tracer puts over `nn.Module` would be put over its modules."""
    seen = []

    class Looks(SmallNet):
        def forward(self, x):
            seen.append((nn.Module.__call__, nn.Module.__getattr__, torch.fx._symbolic_trace._is_fx_tracing_flag))
            return super().forward(x)

    net, x = Looks().double(), inputs()
    net.eval()(x)
    camfn.head(net, "features", x, camfn.tap(net, "features")(camfn.state_of(net), x).seen)
    assert len(seen) >= 3
    assert set(seen) == {seen[0]}


@each_way("dtype", [torch.float64, torch.bfloat16], [torch.bfloat16], METHODS)
def test_the_default_dtype_does_not_matter(method, dtype):
    net, x = small_net(), inputs()
    expected = run(method, net, "features", x, normalize=False)
    torch.set_default_dtype(dtype)
    try:
        found = run(method, net, "features", x, normalize=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@each_way("target", [None, 1, [1, 2], "all", "contrast", "callable"], ["contrast"], [*sorted(LAYERED), next(iter(COMPOSED))])
def test_the_default_device_does_not_matter(method, target):
    named = {"contrast": camfn.targets.contrast(1, [2, 3]), "callable": lambda y: y[1] - y[2]}
    given, net, x = named.get(target, target) if isinstance(target, str) else target, small_net(), inputs()
    with unless("a target that is no sum of logits", method, target == "callable"):
        expected = run(method, net, "features", x, given)
        with torch.device("meta"):
            found = run(method, net, "features", x, given)
        assert torch.equal(found, expected)


SEEDED = [name for name in sorted(LAYERED) if "seed" in camfn.METHODS[name].function.__wrapped__.__kwdefaults__]


@pytest.mark.parametrize("method", SEEDED)
def test_a_generator_or_seed_of_the_caller_is_not_advanced(method):
    net, x, generator = small_net(), inputs(), torch.Generator().manual_seed(5)
    before = generator.get_state()
    first = run(method, net, "features", x, seed=generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(first, run(method, net, "features", x, seed=5))
    noisy = method in ("ss_cam", "rise", "random_cam", "smooth_grad_cam_pp")  # the others draw for budgets alone
    assert torch.equal(first, run(method, net, "features", x, seed=6)) != noisy


# ----------------------------------------------------------------------------------------------- independent oracle


def clean(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(net).eval()(x)


NET, X = small_net(11), inputs(seed=9)
LOGITS = clean(NET, X)
PREDICTED, BEST = LOGITS.argmax(1), LOGITS.topk(3, 1).indices  # of another class for each image, best first is not lowest first
NEAREST = (LOGITS - LOGITS[:, 1:2]).abs().topk(3, 1, largest=False).indices[:, 1:]
GIVEN = torch.tensor([[0, 3, 3], [4, 2, 1]])
T = camfn.targets
TARGETS = {  # a target, and what it means
    "None": (None, lambda y, i: y[PREDICTED[i]][None]),
    "int": (3, lambda y, i: y[3:4]),
    "numpy int": (np.int64(3), lambda y, i: y[3:4]),
    "list": ([0, 4], lambda y, i: y[[0, 4][i]][None]),
    "tuple": ((0, 4), lambda y, i: y[[0, 4][i]][None]),
    "tensor (n,)": (torch.tensor([4, 1]), lambda y, i: y[[4, 1][i]][None]),
    "tensor ()": (torch.tensor(2), lambda y, i: y[2:3]),
    "int32": (torch.tensor([4, 1], dtype=torch.int32), lambda y, i: y[[4, 1][i]][None]),
    "tensor (n, t)": (GIVEN, lambda y, i: y[GIVEN[i]]),
    "all": ("all", lambda y, i: y),
    "top": (T.top(3), lambda y, i: y[BEST[i]]),
    "logit": (T.logit(3), lambda y, i: y[3:4]),
    "logit of all": (T.logit("all"), lambda y, i: y),
    "probability": (T.probability(3), lambda y, i: y.softmax(0)[3:4]),
    "probability predicted": (T.probability(), lambda y, i: y.softmax(0)[PREDICTED[i]][None]),
    "probability each": (T.probability([2, 0]), lambda y, i: y.softmax(0)[[2, 0][i]][None]),
    "probability of the top": (T.probability(T.top(3)), lambda y, i: y.softmax(0)[BEST[i]]),
    "log probability": (T.log_probability([2, 0]), lambda y, i: y.log_softmax(0)[[2, 0][i]][None]),
    "rest": (T.rest(GIVEN), lambda y, i: (y + y.log_softmax(0))[GIVEN[i]]),
    "contrast": (T.contrast(1, [0, 4], alpha=0.6), lambda y, i: (y[1] - 0.6 * (y[0] + y[4]) / 2)[None]),
    "contrast nearest": (T.contrast(1, top=2), lambda y, i: (y[1] - y[NEAREST[i]].mean())[None]),
    "callable": (lambda y: y[1] * y[2], lambda y, i: (y[1] * y[2])[None]),
    "callable (t,)": (lambda y: y[:2].cumsum(0), lambda y, i: torch.stack([y[0], y[0] + y[1]])),
    "callables": ([lambda y: y[1], lambda y: y[2] - y[0]], lambda y, i: (y[1] if i == 0 else y[2] - y[0])[None]),
}
SUMS = ("None", "int", "numpy int", "list", "tuple", "tensor (n,)", "tensor ()", "int32", "tensor (n, t)", "all", "top")
SUMS += ("logit", "logit of all", "contrast", "contrast nearest")
"""The kinds that are logits of classes, and sums of them."""
SEVERAL = ("tensor (n, t)", "all", "top", "logit of all", "probability of the top", "rest", "callable (t,)")


@pytest.mark.kernels
@pytest.mark.parametrize("kind", TARGETS)
def test_every_kind_of_target_is_what_a_plain_loop_scores(kind):
    target, score = TARGETS[kind]
    expected = score_cam_loop(NET, "features", X, score)
    found = camfn.score_cam(NET, "features", X, target)
    close(found, expected if kind in SEVERAL else expected[:, 0], kind)


def test_the_reference_tells_targets_apart():
    maps = torch.stack(
        [score_cam_loop(NET, "features", X, score)[:, 0] for _, score in (TARGETS[k] for k in ("int", "list", "callable"))]
    )
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(maps, 2))


@each_way("kind", TARGETS, ["None", "tensor (n, t)", "probability each", "callable"], [*sorted(LAYERED), next(iter(COMPOSED))])
def test_every_kind_of_target_gives_maps_of_its_shape(method, kind):
    target, score = TARGETS[kind]
    with unless("a target that is no sum of logits", method, kind not in SUMS):
        found = run(method, NET, "features", X, target, **signed(method))
        has_the_form(method, found, score, kind)


def has_the_form(method, found, score, kind):
    count = len(score(LOGITS[0], 0))
    grid = size_of(method, (4, 4), (8, 8))
    assert found.shape == ((2, count, *grid) if kind in SEVERAL else (2, *grid))
    assert found.dtype == torch.float64
    assert torch.equal(found.flatten(-2).amin(-1), torch.zeros(found.shape[:-2], dtype=torch.float64))
    high = found.flatten(-2).amax(-1)
    assert bool(((high == 1) | ((high == 0) & (method in DIFFERENCES))).all())


@pytest.mark.kernels
@every_composition
def test_many_targets_from_one_call_are_the_maps_of_one_call_each(method):
    every = run(method, NET, "features", X, "all")
    for c in range(5):
        close(every[:, c], run(method, NET, "features", X, c), f"class {c}")


# ----------------------------------------------------------------------------------------- inputs and outputs, any kind


class TwoInputs(nn.Module):
    """An image and a gain for each sample; and what else a forward may be given."""

    def __init__(self, wrap=lambda y: y):
        super().__init__()
        self.inner = small_net()
        self.fc, self.wrap = self.inner.fc, wrap

    def forward(self, image, gain, ids=None, note="nothing"):
        y = self.inner(image) * gain[:, None]
        return self.wrap(y if ids is None else y + ids.double())


GAIN, IDS = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64), torch.arange(15).reshape(3, 5)


GIVEN_AS = {
    "tuple": (inputs(3), GAIN),
    "dict": {"image": inputs(3), "gain": GAIN},
    "dict in another order": {"gain": GAIN, "image": inputs(3)},
    "tuple of more": (inputs(3), GAIN, None, "a word"),
    "OrderedDict": collections.OrderedDict(gain=GAIN, image=inputs(3)),
    "mappingproxy": types.MappingProxyType({"gain": GAIN, "image": inputs(3)}),
    "UserDict": collections.UserDict({"gain": GAIN, "image": inputs(3)}),
    "namedtuple": collections.namedtuple("Pair", "image gain")(inputs(3), GAIN),
}


@each_way("kind", GIVEN_AS, ["tuple"], [*sorted(LAYERED), next(iter(COMPOSED))])
def test_each_sample_keeps_its_own_other_inputs(method, kind):
    net, x = TwoInputs(), GIVEN_AS[kind]
    found = run(method, net, "inner.features", x, 2)
    for i in range(3):
        alone = (inputs(3)[i : i + 1], GAIN[i : i + 1])
        close(found[i : i + 1], run(method, net, "inner.features", alone, 2), f"image {i}")


def test_the_other_inputs_count():
    scaled, plain = ((inputs(3), gain) for gain in (GAIN, torch.ones_like(GAIN)))
    a, b = (camfn.score_cam(TwoInputs(), "inner.features", x, 2) for x in (scaled, plain))
    assert (a[0] - b[0]).abs().max() == 0
    assert min((a[i] - b[i]).abs().max() for i in (1, 2)) > 1e-3


class TwoImages(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = small_net(1), small_net(2)
        self.fc = self.left.fc

    def forward(self, left, right):
        return self.left(left) + self.right(right)


class OneImage(nn.Module):
    """The other is always this one."""

    def __init__(self, net: TwoImages, right: Tensor):
        super().__init__()
        self.net, self.right = net, right
        self.fc = net.fc

    def forward(self, left):
        return self.net(left, self.right.expand_as(left))


@every_sweep
def test_masked_says_which_input_is_masked(method):
    net, left, right = TwoImages(), inputs(1, seed=1), inputs(1, seed=2)
    alone = run(method, OneImage(net, right), "net.left.features", left, 1)
    for x, key in (((left, right), 0), ({"left": left, "right": right}, "left")):
        close(run(method, net, "left.features", x, 1, masked=key), alone, str(key))
    other = run(method, net, "left.features", (left, right), 1, masked=1)
    assert (other - alone).abs().max() > 1e-3


@every_method
def test_integer_inputs_beside_the_image_are_left_alone(method):
    net = TwoInputs()
    ids = torch.arange(3)[:, None]  # added to all logits alike
    found = run(method, net, "inner.features", (inputs(3), GAIN, ids), 2)
    # By logits, to which the integers add a constant: those that only follow gradients do not see it.
    scored = method in COMPOSED or {"masked inputs", "head"} & camfn.METHODS[method].needs
    close(found, run(method, net, "inner.features", (inputs(3), GAIN), 2), units=closeness.UNITS if scored else 0)


@dataclasses.dataclass
class Output:
    loss: Tensor | None
    logits: Tensor
    note: str = "kept"


WRAPS = {
    "tuple": lambda y: (y, y.mean()[None].expand(len(y))),
    "named tuple": collections.namedtuple("Out", "logits aux")._make,
    "mapping with logits": lambda y: {"aux": y * 2, "logits": y},
    "mapping with out": lambda y: collections.OrderedDict(out=y, aux=y * 2),
    "dataclass": lambda y: Output(None, y),
    "list per sample": lambda y: list(y),
    "list of mappings": lambda y: [{"logits": row} for row in y],
}
WRAPS["named tuple"] = lambda y, make=WRAPS["named tuple"]: make((y, y * 2))


def agrees_with_the_bare_logits(method, kind, target):
    x = (inputs(3), GAIN)
    found = run(method, TwoInputs(WRAPS[kind]), "inner.features", x, target)
    close(found, run(method, TwoInputs(), "inner.features", x, target), kind)


@each_way("kind", WRAPS, ["dataclass"], [*sorted(LAYERED), next(iter(COMPOSED))])
def test_logits_are_found_in_every_kind_of_output(method, kind):
    agrees_with_the_bare_logits(method, kind, [1, 4, 0])


@pytest.mark.parametrize("target", [None, "all", T.probability(2), T.contrast()], ids=str)
@pytest.mark.parametrize("kind", WRAPS)
@pytest.mark.parametrize("method", ["cam", "grad_cam", "score_cam"])
def test_every_kind_of_target_finds_the_logits_in_every_kind_of_output(method, kind, target):
    with unless("a target that is no sum of logits", method, target == T.probability(2)):
        agrees_with_the_bare_logits(method, kind, target)


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        ("tuple", lambda out: out[0][1]),
        ("named tuple", lambda out: out.logits[1]),
        ("mapping with logits", lambda out: out["aux"][1] / 2),
        ("dataclass", lambda out: out.logits[1]),
        ("list per sample", lambda out: out[1]),
        ("list of mappings", lambda out: out["logits"][1]),
    ],
)
@every_sweep
def test_a_callable_target_gets_one_sample_of_every_kind_of_output(method, kind, read):
    x = (inputs(3), GAIN)
    found = run(method, TwoInputs(WRAPS[kind]), "inner.features", x, read)
    close(found, run(method, TwoInputs(), "inner.features", x, T.logit(1)), kind)


# ---------------------------------------------------------------------------------------- independence of execution


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@every_method
def test_the_callers_grad_mode_does_not_matter(method, mode):
    net, x = small_net(), inputs()
    expected = run(method, net, "features", x)
    with mode(), unchanged(net, x):
        found = run(method, net, "features", x)
    assert torch.equal(found, expected)
    with mode():  # what is made inside: inference tensors, in the one case
        assert torch.equal(run(method, small_net(), "features", inputs()), expected)
    with mode():
        within = inputs()
    assert torch.equal(run(method, net, "features", within), expected)


@every_method
def test_frozen_parameters_and_inputs_that_require_gradients_change_nothing(method):
    net, frozen = small_net(), small_net().requires_grad_(False)
    expected = run(method, net, "features", inputs())
    assert torch.equal(run(method, frozen, "features", inputs()), expected)
    assert not expected.requires_grad
    graphed = run(method, net, "features", inputs().requires_grad_())
    close(graphed, expected)  # the sweep of a map with a graph folds no batch norms
    assert graphed.requires_grad


@every_chunked
def test_a_card_has_a_graph_where_the_state_requires_grad(method):
    net, x, layer = small_net(), inputs(), layer_of(method, "features")
    options = CHEAP.get(method, {})
    state = dict(net.named_parameters()) | dict(net.named_buffers())
    card = camfn.explain(net, layer, x, method=method, state=state, **options)
    assert all(t.requires_grad for t in (card.maps, card.scores))
    plain = camfn.explain(net, layer, x, method=method, **options)
    assert not any(t.requires_grad for t in (plain.maps, plain.scores, *plain.weights))


@pytest.mark.kernels
@every_composition
def test_batch_neighbours_do_not_matter(method):
    net, x = small_net(), inputs(3)
    together = run(method, net, "features", x, [0, 1, 2], normalize=False)
    order = [2, 0, 1]
    permuted = run(method, net, "features", x[order], order, normalize=False)
    close(permuted, together[order], "permuted")
    for i in range(3):
        alone = run(method, net, "features", x[i : i + 1], i, normalize=False)
        close(alone[0], together[i], f"image {i} alone")


@pytest.mark.kernels
@pytest.mark.parametrize("method", ["score_cam", "grad_cam", "augment(smooth(grad_cam))", "multi_scale(ensemble)"])
def test_a_tuple_of_names_and_modules_gives_the_maps_of_each_layer(method):
    """The laws have it for every method, of layers by name."""
    net, x = small_net(), inputs()
    layers = ("stem.0", net.features, "act")
    for layer, found in zip(layers, run(method, net, layers, x), strict=True):
        close(found, run(method, net, layer, x), str(layer))


@pytest.fixture
def graphs(monkeypatch):
    """Kernels are compiled with a backend that runs the graph as it is; the graphs are counted."""
    found = []

    def backend(graph, example_inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(_compat, "compiled", functools.partial(_compat.compiled, backend=backend))
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@can_compile
@pytest.mark.parametrize("fold", [True, False])
@every_sweep
def test_compiled_or_not_does_not_matter(method, fold, graphs):
    net, x, sweep = small_net(), inputs(), camfn.Sweep(chunk=5, compile=True, fold=fold)
    prepared = camfn.prepare(net)
    expected = run(method, net, "features", x, "all", normalize=False)
    with unchanged(net, x):
        found = run(method, prepared, "features", x, "all", normalize=False, sweep=sweep)
    close(found, expected)
    assert len(graphs) == 1
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            close(run(method, prepared, "features", inputs(), "all", normalize=False, sweep=sweep), expected)
    assert len(graphs) == 1


@can_compile
def test_a_compiled_kernel_changes_nothing_of_a_model_that_writes_to_everything(graphs):
    net, x, sweep = Everything(), inputs(), camfn.Sweep(compile=True)
    prepared = camfn.prepare(net)
    expected = camfn.score_cam(net, "features", x, sweep=camfn.Sweep(compile=False))
    with unchanged(net, net.modules_out_of_sight(), x):
        found = camfn.score_cam(prepared, "features", x, sweep=sweep)
        again = camfn.score_cam(prepared, "features", x, sweep=sweep)
    assert len(graphs) == 1
    close(found, expected)
    close(again, expected)


# ----------------------------------------------------------------------------------------------------- composition


ANY = {"None": None, "int": 2, "all": "all", "top": T.top(2), "contrast": T.contrast(), "probability": T.probability(1)}
ANY |= {"callable": lambda y: y[0] * y[2]}


@pytest.mark.kernels
@each_way("kind", ANY, ["top", "callable"], METHODS)
def test_mapping_over_inputs_is_the_batch(method, kind):
    target, net, x = ANY[kind], small_net(), inputs(3)
    with unless("a target that is no sum of logits", method, kind in ("probability", "callable")):
        expected = run(method, net, "features", x, target, normalize=False)
        with unchanged(net, x):
            found = vmap(lambda one: run(method, net, "features", one[None], target, normalize=False)[0])(x)
        close(found, expected)


@pytest.mark.kernels
@every_composition
def test_targets_can_be_mapped_with_their_inputs(method):
    net, x, classes = small_net(), inputs(3), torch.tensor([4, 0, 2])
    found = vmap(lambda one, c: run(method, net, "features", one[None], c[None])[0])(x, classes)
    close(found, run(method, net, "features", x, classes))


def stacked(nets):
    states = [camfn.state_of(net) for net in nets]
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


@pytest.mark.kernels
@every_composition
def test_mapping_over_stacked_states_is_a_loop_over_models(method):
    nets, x = [small_net(seed) for seed in range(3)], inputs()
    empty = small_net(9)
    found = vmap(lambda state: run(method, empty, "features", x, normalize=False, state=state))(stacked(nets))
    for one, net in zip(found, nets):
        close(one, run(method, net, "features", x, normalize=False))


@pytest.mark.kernels
@every_method
def test_states_and_inputs_can_be_mapped_one_inside_the_other(method):
    nets, x = [small_net(seed) for seed in range(2)], inputs(3)

    def one(state, image):
        return run(method, nets[0], "features", image[None], 1, state=state)[0]

    found = vmap(vmap(one, in_dims=(None, 0)), in_dims=(0, None))(stacked(nets), x)
    expected = torch.stack([run(method, net, "features", x, 1) for net in nets])
    close(found, expected)


@can_compile
@pytest.mark.parametrize("method", [*sorted(LAYERED), next(iter(COMPOSED))])
def test_a_method_can_be_called_in_compiled_code(method):
    net, options = small_net(), {"normalize": False, **({"num_samples": 2} if "num_samples" in CHEAP.get(method, {}) else {})}
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, c: run(method, net, "features", x * 2, c, **options) / 2, backend="eager")
    for image, classes in ((inputs(1), torch.tensor([1])), (inputs(1, seed=2), torch.tensor([4]))):
        with unchanged(net, image, classes):
            found = compiled(image, classes)
        close(found, run(method, net, "features", image * 2, classes, **options) / 2)
    torch._dynamo.reset()


def backward(function, x):
    given = x.clone().requires_grad_()
    function(given).sum().backward()
    return given.grad


@can_compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # the compiler reads it
@pytest.mark.parametrize("method", ["grad_cam", "score_cam"])
def test_a_gradient_flows_back_through_a_map_in_compiled_code(method):
    net, x = small_net(), inputs(2)

    def maps(x):
        return 2 * run(method, net, "features", x, 1, normalize=False)

    torch._dynamo.reset()
    close(backward(torch.compile(maps, backend="eager"), x), backward(maps, x))
    torch._dynamo.reset()


@can_compile
def test_a_card_can_be_made_in_compiled_code():
    net, x = small_net(), inputs(2)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: camfn.explain(net, "features", x, 1).maps * 2, backend="eager")
    close(compiled(x), camfn.explain(net, "features", x, 1).maps * 2)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------- differentiation


class Smooth(nn.Module):
    """No ReLU and no maximum, so that finite differences mean something; one channel of `features` is flat if asked."""

    def __init__(self, flat: bool = False, seed: int = 0):
        super().__init__()
        self.stem, self.features, self.fc = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, 3)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
            if flat:
                self.features.weight[1] = 0
        self.double()

    def forward(self, x):
        h = F.softplus(self.features(torch.tanh(self.stem(x))))
        return self.fc(torch.tanh(h).mean((2, 3))) * 3


def picture_of(seed: int = 4) -> Tensor:
    return torch.randn(2, 2, 9, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in tensors.items()}


DERIVATIVES = [*itertools.product(sorted(LAYERED), ("x", "state="), (False, True), ({},))]
DERIVATIVES += [(next(iter(COMPOSED)), wrt, False, {}) for wrt in ("x", "state=")]
LAST_STEPS = [{"normalize": False}, {"relu": False, "normalize": False}, {"size": "input"}]
"""Behind the map they are the same for all methods, whatever the derivative is of."""
DERIVATIVES += [(method, "x", False, options) for method in ("grad_cam", "score_cam", "full_grad") for options in LAST_STEPS]


@pytest.mark.parametrize(("method", "wrt", "flat", "options"), DERIVATIVES, ids=str)
def test_gradients_and_directional_derivatives_agree_with_finite_differences(method, wrt, flat, options):
    with unless("the derivative with a flat channel", method, flat):
        agrees_with_finite_differences(method, wrt, flat, options)


def agrees_with_finite_differences(method, wrt, flat, options):
    net, x = Smooth(flat), picture_of()
    sides = (9, 9) if "size" in options else size_of(method, (3, 3), (9, 9))
    weighing = torch.randn(2, *sides, generator=torch.Generator().manual_seed(8))

    def maps(at: dict[str, Tensor]) -> Tensor:
        given = {"state": at} if wrt == "state=" else {}
        return run(method, net, "features", x if given else at["x"], 1, **given, **options)

    at = camfn.state_of(net) if wrt == "state=" else {"x": x}
    if flat and wrt == "state=":  # a weight that moves makes the channel one that is not flat: no derivative there
        along = directions(at, 1) | {"features.weight": directions(at, 1)["features.weight"].index_fill(0, torch.tensor(1), 0)}
    else:
        along = directions(at, 1)
    expected = slope(maps, at, along)
    assert expected.abs().max() > (1e-4 if method == "rise" else 1e-3)  # its masks are alike, and so are their scores
    _, found = jvp(maps, (at,), (along,))
    scale = max(1.0, float(expected.abs().max()))
    assert_close(found / scale, expected / scale, ROUGH, "jvp")
    gradient = grad(lambda at: (maps(at) * weighing).sum())(at)
    slid = sum((gradient[name] * along[name]).sum() for name in at)
    scale = sum((gradient[name] * along[name]).abs().sum() for name in at)
    assert_close(slid / scale, (expected * weighing).sum() / scale, ROUGH, "grad")


@every_row_and_one
def test_the_gradient_of_every_single_input_value_agrees_with_finite_differences(method):
    """Not only along a random direction: a value of the input whose gradient is lost would show here."""
    net, x = Smooth(), picture_of()[:1, :, :5, :5]
    net.features.stride = (1, 1)

    def totals(x: Tensor) -> Tensor:
        """Of each image by itself, which the laws have of every method."""
        layer, image = ("features", torch.cat([x, x], 3)) if method == "cam" else ("stem", x)
        return run(method, net, layer, image, 1, normalize=False).pow(2).flatten(1).sum(1)

    found = grad(lambda x: totals(x).sum())(x)
    scale = max(1.0, float(found.abs().max()), float(totals(x)))  # a difference has the rounding of what it is of
    steps = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape[1:])
    expected = slope(lambda at: totals(at["x"]), {"x": x.expand_as(steps)}, {"x": steps})
    assert_close(found.flatten(), expected, ROUGH * scale)


@pytest.mark.parametrize("wrt", ["x", "state="])
@every_method
def test_the_graph_of_a_plain_call_has_the_gradient_of_transforms(method, wrt):
    net, x = Smooth(), picture_of()
    at = {name: tensor.detach() for name, tensor in net.named_parameters()} if wrt == "state=" else {"x": x}

    def total(at: dict[str, Tensor]) -> Tensor:
        given = {"state": at} if wrt == "state=" else {}
        return run(method, net, "features", at.get("x", x), 1, **given, **in_chunks_of(method, 3)).square().sum()

    own = {name: tensor.clone().requires_grad_() for name, tensor in at.items()}
    total(own).backward()
    expected = grad(total)(at)
    size = max(float(slope.abs().max()) for slope in expected.values())
    for name, leaf in own.items():
        close(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, expected[name], name, size=size)
    assert not total(at).requires_grad


@every_method
def test_gradients_of_the_sum_leave_everything_as_it_was(method):
    """Of squares: what has its mean taken off sums to zero, whatever the input."""
    net, x = Everything(), inputs()
    with unchanged(net, net.modules_out_of_sight(), x):
        gradient = grad(lambda x: run(method, net, "features", x, 1, normalize=False).square().sum())(x)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 1e-6


@pytest.mark.parametrize("wrt", ["x", "state="])
@every_method
def test_the_gradient_of_a_flat_map_is_zero_and_not_nan(method, wrt):
    net, x = Smooth(), picture_of()
    with torch.no_grad():
        net.features.weight.zero_()

    def total(at):
        given = {"state": at} if wrt == "state=" else {}
        return run(method, net, "features", x if given else at["x"], 1, **given).sum()

    gradient = grad(total)(camfn.state_of(net) if wrt == "state=" else {"x": x})
    with unless("no gradient of a flat map", method, wrt == "state="):
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradient.values())


@pytest.mark.kernels
@every_method
def test_gradients_do_not_mix_images(method):
    net, x = Smooth(), picture_of(6)  # on picture 4 multi_scale counts, with some kernels, pixels that are 0 or 1e-17
    both = grad(lambda x: run(method, net, "features", x, 1, normalize=False).square().sum())(x)
    each = vmap(grad(lambda one: run(method, net, "features", one[None], 1, normalize=False).square().sum()))(x)
    close(each, both)


@pytest.mark.kernels
@every_method
def test_the_gradient_is_the_same_in_chunks(method):
    net, x = Smooth(), picture_of()

    def gradient(chunk):
        return grad(
            lambda x: run(method, net, "features", x, 1, normalize=False, **in_chunks_of(method, chunk)).square().sum()
        )(x)

    close(gradient(3), gradient(1000))


# ----------------------------------------------------------------------------------------------------- narrow dtypes


def narrow_net(dtype: torch.dtype) -> SmallNet:
    net = small_net(dtype=torch.float32)
    with torch.no_grad():
        net.features.weight[2] = 0  # a channel that has its bias everywhere
        for parameter in net.fc.parameters():
            parameter.mul_(0.25)
    return net.to(dtype)


def runs_in(dtype: torch.dtype) -> bool:
    try:
        narrow_net(dtype).eval()(inputs(dtype=dtype))
    except RuntimeError:  # older torch has no float16 convolution on the CPU
        return False
    return True


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_way("target", [1, "all"], ["all"], [*sorted(LAYERED), next(iter(COMPOSED))])
def test_narrow_dtypes_with_a_flat_channel_give_nearly_the_wide_map(method, target, dtype):
    if not runs_in(dtype):
        pytest.skip(f"no {dtype} on this CPU with this torch")
    net, x = narrow_net(dtype), inputs(dtype=dtype)
    found = run(method, net, "features", x, target)
    expected = run(method, copy.deepcopy(net).float(), "features", x.float(), target)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    assert float(found.min()) == 0
    assert float(found.max()) == 1
    # Activations, masks and logits are each rounded some times on their way; a map is of their size and scaled to one. Of
    # gradients it is smaller than what it is the sum of, since their signs differ; Group-CAM's weights are small differences.
    steps = 32 if method in DIFFERENCES else 8 if method in COMPOSED or "gradients" not in camfn.METHODS[method].needs else 16
    close(found, expected, str(dtype), units=steps, size=1, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@every_chunked
def test_maps_scores_and_weights_are_float32_or_wider(method, dtype):
    if not runs_in(dtype):
        pytest.skip(f"no {dtype} on this CPU with this torch")
    layer, options = layer_of(method, "features"), CHEAP.get(method, {})
    card = camfn.explain(narrow_net(dtype), layer, inputs(dtype=dtype), method=method, **options)
    assert {t.dtype for t in (card.maps, card.scores, *card.weights)} == {torch.promote_types(dtype, torch.float32)}


# ------------------------------------------------------------------------------------------------------ the one card


@every_row
def test_the_card_holds_the_maps_of_the_method(method):
    options = {**CHEAP.get(method, {}), **signed(method)}
    card = camfn.explain(NET, layer_of(method, "features"), X, T.top(2), method=method, **options)
    assert torch.equal(card.maps, run(method, NET, "features", X, T.top(2), **signed(method)))
    assert card.method == method
    assert card.layers == (("features",) if method in OF_LAYER else ())
    assert torch.equal(card.classes, LOGITS.topk(2, 1).indices)
    y = LOGITS.softmax(1) if method in PROBABLE else LOGITS
    assert torch.equal(card.scores, y.topk(2, 1).values)
    weights = [(2, 2, 6, 16) if method in ELEMENTWISE else (2, 2, 6)]
    assert [w.shape for w in card.weights] == ([] if method in WEIGHTLESS or method not in OF_LAYER else weights)

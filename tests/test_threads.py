"""Threads may explain one model at once, at one layer or at several, and get what they would have got one after the other."""

import functools
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn

import camfn
from camfn import _compat
from camfn.testing.threads import at_once
from tests.oracles.closeness import close
from tests.oracles.networks import CHEAP, LAYERED, SmallNet, inputs, small_net

# Where no group of channels adds to the blurred input, Group-CAM's map is flat.
pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ of \d+ maps at layer '.*' are flat:camfn.CamWarning")

THREADS = 8
FOLDED = {"sweep": camfn.Sweep(fold=True)}  # a busy model's output depends on the first row of its batch
FEW = {
    **{
        name: {**CHEAP.get(name, {}), **FOLDED}
        for name in LAYERED
        if "sweep" in camfn.METHODS[name].function.__wrapped__.__kwdefaults__
    },
    "poly_cam": {"variant": "+", **FOLDED},  # of differences none may be positive
    **{name: CHEAP[name] for name in ("cam", "cameras", "fem", "smooth_grad_cam_pp")},
}
# Of a logit ShapleyCAM is Grad-CAM, and the noise hardly counts.
TOLD_APART = {"shapley_cam": {"target": camfn.targets.rest(1)}, "smooth_grad_cam_pp": {"std": 2.0}}
ONE_OF_TWO = ("layer_cam", "lift_cam", "recipro_cam", "seg_eigen_cam")
"""Where what comes after a layer is linear at each position and then pooled, these are others: the element-wise Grad-CAM,
Ablation-, HiRes- and EigenGrad-CAM."""
METHODS = sorted(LAYERED)
LAYERS = ("stem", "stem.0", "stem.1", "features", "act", "inner")
can_compile = pytest.mark.skipif(bool(_compat.can_compile()), reason=_compat.can_compile() or "-")


@pytest.fixture(autouse=True)
def threads_take_turns_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def same(one, other) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return len(one) == len(other) and all(map(same, one, other))


def agree_with_serial(jobs, rounds: int) -> None:
    serial = [job() for job in jobs]
    for _ in range(rounds):
        assert [same(*pair) for pair in zip(at_once(jobs), serial)] == [True] * len(jobs)


class Busy(SmallNet):
    """In train mode, with batch norm and dropout, a buffer that every forward writes to and reads, and a module in a list."""

    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(()))
        self.inner, self.listed = nn.Conv2d(6, 6, 1), [nn.BatchNorm2d(6).double()]

    def forward(self, x):
        self.last.copy_(x.detach().flatten()[0])
        h = self.listed[0](self.inner(self.act(self.features(self.stem(x)))))
        return self.fc(self.drop(self.pool(h)).flatten(1)) + self.last


def busy_net(seed: int = 0) -> Busy:
    net, generator = Busy().double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    return net


def run(method: str, net: nn.Module, layer, x, target=1, **options):
    """Without the ReLU, so that no map is empty and a warning away."""
    options = {"relu": False, **FEW.get(method, {}), **options}
    row = camfn.METHODS[method]
    return row.function(net, layer if row.of_layer else None, x, target, **options)


def snapshot(net: nn.Module) -> list:
    tensors = [*net.parameters(), *net.buffers(), *net.listed[0].parameters(), *net.listed[0].buffers()]
    return [(id(t), t._version, t.clone()) for t in tensors] + [m.training for m in (*net.modules(), *net.listed)]


def unchanged(before: list, after: list) -> bool:
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) if isinstance(a, tuple) else a == b for a, b in zip(before, after))


def test_eight_threads_with_different_layers_and_methods_on_one_model():
    net, x = busy_net(), inputs()
    before, rng = snapshot(net), torch.get_rng_state()
    pairs = [(METHODS[i % len(METHODS)], LAYERS[(i + i // len(METHODS)) % len(LAYERS)]) for i in range(3 * THREADS)]
    pairs = [
        (method, layer if method != "cam" else ("act", "features", "inner")[i % 3]) for i, (method, layer) in enumerate(pairs)
    ]
    for part in range(0, len(pairs), THREADS):
        jobs = [functools.partial(run, method, net, layer, x) for method, layer in pairs[part : part + THREADS]]
        agree_with_serial(jobs, rounds=4)
    assert unchanged(before, snapshot(net))
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("method", METHODS)
def test_eight_threads_with_different_inputs_states_and_seeds_at_one_layer(method):
    net = busy_net()
    seeded = "seed" in camfn.METHODS[method].function.__wrapped__.__kwdefaults__
    jobs = [
        functools.partial(
            run,
            method,
            net,
            "features",
            inputs(seed=i),
            i % 5,
            state=camfn.state_of(busy_net(i)),
            **({"seed": i} if seeded else {}),
        )
        for i in range(THREADS)
    ]
    before = snapshot(net)
    agree_with_serial(jobs, rounds=6)
    assert unchanged(before, snapshot(net))


def test_the_serial_results_differ_so_that_a_mixture_would_show():
    net = busy_net()
    maps = [run("score_cam", net, "features", inputs(seed=i), 1, state=camfn.state_of(busy_net(i))) for i in range(THREADS)]
    apart = [name for name in METHODS if name not in ONE_OF_TWO]
    maps += [run(method, net, "features", inputs(), **TOLD_APART.get(method, {})) for method in apart]
    maps += [run("ss_cam", net, "features", inputs(), seed=i) for i in range(1, THREADS)]
    pairs = [(a, b) for i, a in enumerate(maps) for b in maps[:i] if a.shape == b.shape]
    assert all((a - b).abs().max() > 1e-6 for a, b in pairs)


def test_threads_in_different_grad_modes_keep_their_own():
    net, x = busy_net(), inputs()
    expected = run("score_cam", net, "features", x)
    seen = []

    def within(mode):
        with mode():
            modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            found = run("score_cam", net, "features", x)
            seen.append(modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return found.clone()

    def gradient():
        total = torch.func.grad(lambda x: run("score_cam", net, "features", x, normalize=False).sum())
        return total(x)

    slope = gradient()
    modes = [torch.no_grad, torch.enable_grad, torch.inference_mode] * 2
    for _ in range(4):
        *maps, found, again = at_once([*(functools.partial(within, mode) for mode in modes), gradient, gradient])
        assert all(torch.equal(m, expected) for m in maps)
        assert torch.equal(found, slope)
        assert torch.equal(again, slope)
    assert seen == [True] * 24


def test_an_error_in_one_thread_leaves_the_others_alone():
    net, x = busy_net(), inputs()
    expected = run("score_cam", net, "features", x)

    def fails():
        with pytest.raises(camfn.CamError, match="no layer named"):
            run("score_cam", net, "nowhere", x)
        with pytest.raises(camfn.CamError, match="not a class"):
            run("score_cam", net, "features", x, 99)
        return expected

    for _ in range(4):
        found = at_once([fails, functools.partial(run, "score_cam", net, "features", x)] * 4)
        assert all(torch.equal(m, expected) for m in found)


def test_pure_and_tap_in_threads_give_the_serial_result():
    net, x = busy_net(), inputs()
    states = [camfn.state_of(busy_net(i)) for i in range(THREADS)]
    jobs = [functools.partial(lambda i: camfn.pure(net)(states[i], inputs(seed=i)), i) for i in range(THREADS // 2)]
    jobs += [functools.partial(lambda i: camfn.tap(net, LAYERS[i])(states[i], x), i) for i in range(THREADS // 2)]
    agree_with_serial(jobs, rounds=10)


@pytest.mark.parametrize("make", [camfn.pure, lambda net: camfn.tap(net, "features")], ids=["pure", "tap"])
def test_one_function_of_pure_or_tap_may_be_called_from_eight_threads(make):
    function = make(busy_net())
    states = [camfn.state_of(busy_net(i)) for i in range(THREADS)]
    agree_with_serial([functools.partial(function, states[i], inputs(seed=i)) for i in range(THREADS)], rounds=20)


def torch_as_it_was():
    return nn.Module.__call__, nn.Module.__getattr__, torch.fx._symbolic_trace._is_fx_tracing_flag


def test_heads_of_different_layers_can_be_traced_at_once():
    """Each round has models of its own, so that nothing is kept yet."""
    x, before = inputs(), torch_as_it_was()
    layers = ("stem", "stem.0", "stem.1", "stem.2", "features", "act", "inner", "drop")

    def after(net, state, layer, value):
        return camfn.head(net, layer, x, value)(state, x, value * 1.5)

    def jobs(net):
        state = camfn.state_of(net)
        values = {layer: camfn.tap(net, layer)(state, x).seen for layer in layers}
        return [functools.partial(after, net, state, layer, values[layer]) for layer in layers]

    serial = [job() for job in jobs(busy_net())]
    for _ in range(5):
        assert [same(*pair) for pair in zip(at_once(jobs(busy_net())), serial)] == [True] * THREADS
        assert torch_as_it_was() == before


def test_threads_that_ask_for_a_head_each_get_their_own():
    forwards = []

    class Tells(Busy):
        def forward(self, x):
            forwards.append(1)
            return super().forward(x)

    def fresh():
        net = Tells().double()
        value = camfn.tap(net, "features")(camfn.state_of(net), x).seen
        forwards.clear()
        return net, value

    x = inputs()
    net, value = fresh()
    camfn.head(net, "features", x, value)
    once = len(forwards)
    net, value = fresh()
    heads = at_once([functools.partial(camfn.head, net, "features", x, value)] * THREADS)
    assert len({id(h.record) for h in heads}) == THREADS
    assert len(forwards) == THREADS * once > 0
    states = [camfn.state_of(busy_net(i)) for i in range(THREADS)]
    agree_with_serial([functools.partial(heads[0], state, x, value + i) for i, state in enumerate(states)], rounds=10)


def test_a_head_can_be_traced_while_another_thread_runs_the_callers_own_model():
    """Tracing must not put anything over `nn.Module` that the forward of another thread would run through."""
    net, other, x = busy_net(), small_net().eval(), inputs()
    value = camfn.tap(net, "features")(camfn.state_of(net), x).seen
    before, stop, seen = torch_as_it_was(), threading.Event(), set()

    def forwards():
        while not stop.is_set():
            seen.add(torch_as_it_was())
            other(x)

    def trace():
        for i in range(5):
            camfn.head(busy_net(i), "features", x, value)
        stop.set()

    at_once([forwards, trace])
    assert seen == {before}


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
def test_eight_threads_racing_the_first_compiled_call_compile_once(graphs):
    net, sweep = camfn.prepare(small_net()), camfn.Sweep(chunk=4, compile=True)
    jobs = [
        functools.partial(run, "score_cam", net, "features", inputs(seed=i), i % 5, state=camfn.state_of(small_net(i)))
        for i in range(THREADS)
    ]
    expected = [job() for job in jobs]
    assert not graphs
    raced = [functools.partial(job, sweep=sweep) for job in jobs]
    for _ in range(3):
        for found, right in zip(at_once(raced), expected):
            close(found, right)
        assert len(graphs) == 1


@can_compile
def test_threads_in_different_grad_modes_share_the_compiled_kernel(graphs):
    net, x, sweep = camfn.prepare(small_net()), inputs(), camfn.Sweep(chunk=4, compile=True)
    expected = run("score_cam", net, "features", x)

    def within(mode):
        with mode():
            return run("score_cam", net, "features", inputs(), sweep=sweep).clone()

    modes = [torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad] * 2
    for _ in range(2):
        for found in at_once([functools.partial(within, mode) for mode in modes]):
            close(found, expected)
        assert len(graphs) == 1


def test_a_draw_in_another_thread_is_not_the_models():
    net, x, stop, drawn = busy_net(), inputs(), threading.Event(), []

    def draws():
        while not stop.is_set():
            drawn.append(float(torch.rand(())))

    def explains():
        try:
            return [run("score_cam", net, "features", x) for _ in range(20)]
        finally:
            stop.set()

    _, maps = at_once([draws, explains])
    assert len(drawn) > 20
    assert all(torch.equal(m, maps[0]) for m in maps)


def test_a_model_that_draws_is_refused_in_its_own_thread_only():
    class Draws(Busy):
        def forward(self, x):
            return super().forward(x) + torch.rand(())

    drawing, net, x = Draws().double(), busy_net(), inputs()
    expected = run("score_cam", net, "features", x)

    def refused():
        with pytest.raises(camfn.CamError, match="draws random numbers"):
            run("score_cam", drawing, "features", x)
        return expected

    for _ in range(5):
        assert all(torch.equal(m, expected) for m in at_once([refused, lambda: run("score_cam", net, "features", x)] * 4))


FIRST_USE = """
import collections, sys, threading, time, torch
import camfn

made, look_up = collections.Counter(), torch._C._jit_get_operation

def slowly(name):
    time.sleep(1e-4)  # another thread goes on here
    found = look_up(name)
    made[name] += found is not None and found[0] is not None
    return found

torch._C._jit_get_operation = slowly
nn = torch.nn
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
x, barrier = torch.randn(2, 3, 8, 8), threading.Barrier(8)

def work():
    barrier.wait()
    with torch.inference_mode():
        camfn.score_cam(model, "2", x, relu=False)

threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(sorted(name for name, times in made.items() if times > 1))
"""


def test_the_first_calls_of_a_process_may_be_in_eight_threads():
    """torch makes the Python handle of an operator when a dispatch mode first meets it, without a lock.

    Two threads that meet it at once make two, and the one that torch keeps a bare pointer to is freed: a crash, then or later.
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FIRST_USE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"

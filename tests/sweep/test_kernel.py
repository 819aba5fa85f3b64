"""The scoring kernel: its three forms agree, and compilation makes one graph."""

import functools
import gc
import random
import weakref

import pytest
import torch
from torch import nn

import camfn
from camfn import Sweep, _compat
from camfn.testing.unchanged import picture
from tests.oracles.closeness import assert_close, close
from tests.oracles.libraries import needs_compiler
from tests.oracles.networks import SmallNet, inputs, small_net


def loop_scores(model: nn.Module, x: torch.Tensor, layer: str, target: int) -> torch.Tensor:
    """Score-CAM's scores by a Python loop: one image, one channel, one forward at a time."""
    activation = camfn.tap(model, layer)(camfn.state_of(model), x).seen
    eval_model, scores = model.eval(), []
    for image, channels in zip(x, activation):
        for channel in channels:
            low, high = channel.min(), channel.max()
            mask = torch.zeros_like(channel) if low == high else (channel - low) / (high - low + 1e-8)
            mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[channel.ndim]
            up = nn.functional.interpolate(mask[None, None], image.shape[1:], mode=mode, align_corners=False)[0]
            scores.append(eval_model(image[None] * up[None])[0, target])
    return torch.stack(scores).reshape(len(x), -1).detach()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_folded_mapped_and_loop_agree(dims):
    model, x = small_net(dims=dims, side=6), inputs(2, dims=dims, side=6)
    weights = torch.softmax(loop_scores(model, x, "features", 3), 1)
    for sweep in (Sweep(), Sweep(fold=False), Sweep(chunk=5), Sweep(fold=False, chunk=5)):
        found = camfn.METHODS["score_cam"].run(model, "features", x, 3, sweep=sweep).weights[0]
        close(found[:, 0], weights, str(sweep))


class NotIndependent(nn.Module):
    """Its output for a row depends on the other rows of the batch: only `fold=False` shows it one row at a time."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        return self.net(x) * x.mean()


def test_mapping_through_the_model_shows_it_one_row_at_a_time():
    model, x = NotIndependent(), inputs(1)
    weights = torch.softmax(loop_scores(model, x, "net.features", 3), 1)
    run = functools.partial(camfn.METHODS["score_cam"].run, model, "net.features", x, 3)
    close(run(sweep=Sweep(fold=False)).weights[0][:, 0], weights)
    assert (run(sweep=Sweep(fold=True)).weights[0][:, 0] - weights).abs().max() > 1e-5
    for _ in range(2):
        with pytest.warns(camfn.CamWarning, match="depends on the others of its batch: the sweep maps through the model"):
            close(run().weights[0][:, 0], weights)


def counting(monkeypatch) -> "torch._dynamo.testing.CompileCounter":
    """Compile with a backend that counts graphs and runs them as they are."""
    from torch._dynamo.testing import CompileCounter

    counter, real = CompileCounter(), _compat.compiled
    monkeypatch.setattr(_compat, "compiled", lambda function: real(function, backend=counter))
    torch._dynamo.reset()
    return counter


@needs_compiler
@pytest.mark.parametrize("fold", [True, False])
def test_one_graph_serves_ragged_ends_targets_weights_and_images(monkeypatch, fold):
    counter = counting(monkeypatch)
    model, x = small_net(), inputs(2)
    prepared = camfn.prepare(model)
    compiled, eager = Sweep(compile=True, chunk=5, fold=fold), Sweep(compile=False)
    state = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in camfn.state_of(model).items()}
    calls = [
        {"x": x, "target": 3},  # 12 rows in chunks of 5: the last is ragged
        {"x": x, "target": 1},
        {"x": x, "target": [2, 4]},
        {"x": x, "target": None},
        {"x": inputs(2, seed=5), "target": 3},
        {"x": x, "target": 3, "state": state},
    ]
    for options in calls:
        ours = camfn.score_cam(prepared, "features", normalize=False, sweep=compiled, **options)
        close(ours, camfn.score_cam(prepared, "features", normalize=False, sweep=eager, **options))
    with torch.no_grad():
        model.fc.weight.mul_(3)
    with torch.inference_mode():  # inference tensors are cloned, the mode is left
        ours = camfn.score_cam(prepared, "features", x * 1, 3, normalize=False, sweep=compiled)
    close(ours, camfn.score_cam(prepared, "features", x, 3, normalize=False, sweep=eager))
    assert counter.frame_count == 1  # and no break: `fullgraph` raises on one


@needs_compiler
def test_a_second_size_is_a_second_graph_and_more_than_dynamo_keeps_do_not_raise(monkeypatch):
    counter = counting(monkeypatch)
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    model = camfn.prepare(small_net())
    with torch._dynamo.config.patch({limit: 2}):
        for side in range(4, 8):
            x = inputs(1, side=side)
            ours = camfn.score_cam(model, "features", x, 3, normalize=False, sweep=Sweep(compile=True))
            close(ours, camfn.score_cam(model, "features", x, 3, normalize=False))
    assert counter.frame_count == 4


@needs_compiler
def test_a_plain_call_compiles_for_itself_and_says_how_to_keep_the_kernel(monkeypatch):
    counter = counting(monkeypatch)
    model, x = small_net(), inputs(1)
    for slope in (0.3, 0.9):
        model.act = nn.LeakyReLU(slope)
        with pytest.warns(
            camfn.CamWarning, match=r"compiled for this call alone; camfn.prepare\(model\), passed in the model's"
        ):
            ours = camfn.score_cam(model, "features", x, 3, normalize=False, sweep=Sweep(compile=True))
        close(ours, camfn.score_cam(model, "features", x, 3, normalize=False))
    assert counter.frame_count == 2


@needs_compiler
@pytest.mark.parametrize("method", ["ss_cam", "is_cam"])
def test_noise_and_path_compile_too(monkeypatch, method):
    counter = counting(monkeypatch)
    model, x = camfn.prepare(small_net()), inputs(2)
    call = functools.partial(getattr(camfn, method), model, "features", x, 3, num_samples=3, normalize=False)
    close(call(sweep=Sweep(compile=True, chunk=7)), call(sweep=Sweep(compile=False)))
    assert counter.frame_count == 1


@needs_compiler
def test_auto_uses_a_compiled_kernel_only_where_there_is_one(monkeypatch):
    counter = counting(monkeypatch)
    model, x = camfn.prepare(small_net()), inputs(1)
    camfn.score_cam(model, "features", x, 3)
    assert counter.frame_count == 0
    camfn.score_cam(model, "features", x, 3, sweep=Sweep(compile=True))
    operations = counter.op_count
    seen = []
    monkeypatch.setattr(
        camfn.sweep.kernel,
        "_call_compiled",
        lambda *args, call=camfn.sweep.kernel._call_compiled: (seen.append(1), call(*args))[1],
    )
    camfn.score_cam(model, "features", x, 3)
    assert seen
    assert (counter.frame_count, counter.op_count) == (1, operations)


@needs_compiler
def test_targets_that_are_callables_compile(monkeypatch):
    counter = counting(monkeypatch)
    model, x = camfn.prepare(small_net()), inputs(2)
    target = [lambda y: y[1] - y[2], lambda y: torch.logsumexp(y, 0)]
    for _ in range(2):
        ours = camfn.score_cam(model, "features", x, target, normalize=False, sweep=Sweep(compile=True))
        close(ours, camfn.score_cam(model, "features", x, target, normalize=False, sweep=Sweep(compile=False)))
    assert counter.frame_count == 1


@needs_compiler
def test_inductor_gives_the_same_map_and_changes_nothing():
    """The real compiler, once: half a minute."""
    torch._dynamo.reset()
    model, x = small_net(dtype=torch.float32), inputs(2, dtype=torch.float32)
    call = functools.partial(camfn.score_cam, camfn.prepare(model), "features", x, 3, normalize=False)
    before = torch.get_rng_state(), random.getstate(), picture(model), picture(x)
    ours = call(sweep=Sweep(compile=True))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), picture(model), picture(x))
    assert_close(ours, call(sweep=Sweep(compile=False)), 1e-5)
    gone = weakref.ref(model)
    del model, call
    gc.collect()
    assert gone() is None, "the compiled kernel keeps the model alive"
    torch._dynamo.reset()


@needs_compiler
def test_a_target_that_leads_to_the_model_does_not_keep_it_alive(monkeypatch):
    counting(monkeypatch)
    model, x = small_net(), inputs(1)
    gone = weakref.ref(model)

    def target(y, weight=model.fc.weight, net=model):
        return y[1] * weight.detach().sum()

    prepared = camfn.prepare(model)
    for _ in range(2):
        camfn.score_cam(prepared, "features", x, target, sweep=Sweep(compile=True))
    del model, target, prepared
    gc.collect()
    assert gone() is None


def test_an_old_torch_falls_back_to_eager_with_one_warning(monkeypatch):
    monkeypatch.setattr(_compat.torch, "__version__", "2.0.1")
    model, x = small_net(), inputs(1)
    with pytest.warns(camfn.CamWarning, match="runs without compilation: torch 2.0.1 cannot compile") as caught:
        ours = camfn.score_cam(model, "features", x, 3, sweep=Sweep(compile=True))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert_close(ours, camfn.score_cam(model, "features", x, 3, sweep=Sweep(compile=False)), 0)


class Without:
    """torch as `_compat` sees it, less one name."""

    def __init__(self, module, name: str):
        self.module, self.name = module, name

    def __getattr__(self, name: str):
        if name == self.name:
            raise AttributeError(name)
        found = getattr(self.module, name)
        return Without(found, self.name) if name == "compiler" else found


class OldGuard:
    """torch 2.0's `_DisableFuncTorch`: no context manager, in force for as long as it lives."""

    def __init__(self, guard=torch._C._DisableFuncTorch):
        self.guard = guard()
        if hasattr(self.guard, "__enter__"):
            self.guard.__enter__()

    def __del__(self):
        if hasattr(self.guard, "__exit__"):
            self.guard.__exit__(None, None, None)


@pytest.mark.parametrize("missing", ["compiler", "is_compiling", "guard"])
def test_newer_names_can_be_missing(monkeypatch, missing):
    model, x = small_net(), inputs(2)
    expected = camfn.ss_cam(model, "features", x, 3, num_samples=2)
    if missing == "guard":
        monkeypatch.setattr(torch._C, "_DisableFuncTorch", OldGuard)
    else:
        monkeypatch.setattr(_compat, "torch", Without(torch, missing))
    assert not _compat.transformed()
    assert _compat.eager(len)([1]) == 1
    maps = torch.func.vmap(lambda image: camfn.ss_cam(model, "features", image[None], 3, num_samples=2)[0])(x)
    close(maps, expected)
    assert torch.func.vmap(lambda _: torch.tensor(_compat.transformed()))(x).all()


def test_progress_counts_every_forward_of_the_sweep():
    told = []
    sweep = Sweep(chunk=5, progress=lambda done, total: told.append((done, total)))
    camfn.score_cam(small_net(), ("features", "act"), inputs(2), 3, sweep=sweep)
    rows = told[-1][1]
    assert told[-1][0] == rows
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert all(total == rows for _, total in told)
    assert rows >= 12


class CountsInPython(SmallNet):
    """A Python int that changes at every call is a constant of each graph: the compiler would make a graph for each chunk."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


@needs_compiler
def test_a_model_that_the_compiler_does_not_take_runs_without_it(monkeypatch):
    counting(monkeypatch)
    torch.manual_seed(0)
    net, x = camfn.prepare(CountsInPython().double()), inputs(2)
    expected = camfn.score_cam(net, "features", x, 1, sweep=Sweep(compile=False, chunk=1))
    for _ in range(2):
        with pytest.warns(camfn.CamWarning, match="runs without compilation: torch.compile does not take this model") as caught:
            found = camfn.score_cam(net, "features", x, 1, sweep=Sweep(compile=True, chunk=1))
        assert len(caught) == 1
        assert_close(found, expected, 0)


@needs_compiler
def test_hooks_for_the_backward_are_no_part_of_a_forward(monkeypatch):
    counting(monkeypatch)
    model, x = small_net(), inputs(1)
    expected = camfn.score_cam(model, "features", x, 1)
    model.features.register_full_backward_hook(lambda module, into, out: None)
    close(camfn.score_cam(camfn.prepare(model), "features", x, 1, sweep=Sweep(compile=True)), expected)
    assert torch.func.grad(lambda image: camfn.score_cam(model, "features", image, 1, normalize=False).sum())(x).abs().max() > 0

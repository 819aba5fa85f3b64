"""How many masked inputs go through the model at a time: what memory allows, and what is left when it runs out."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camfn
from camfn import Sweep, _compat
from camfn.model import memory
from camfn.model.memory import Ledger, free_bytes, is_exhausted
from tests.oracles.closeness import close
from tests.oracles.foldable import Net, images, pair, seeded
from tests.oracles.libraries import needs_compiler

SEEN: list[int] = []
"""The rows of every forward. A global, since a copy of a model has copies of all that it holds."""
GIB = 2**30


@pytest.fixture(autouse=True)
def _nothing_seen():
    SEEN.clear()


# -------------------------------------------------------------------------------------------------------- the ledger


@pytest.mark.parametrize("inference", [False, True])
def test_a_ledger_counts_what_is_alive(inference):
    outside = torch.zeros(5000)
    with torch.inference_mode(inference), Ledger() as ledger:
        a = torch.zeros(1000)
        assert ledger.alive == 4000
        view = a.reshape(10, 100)[3:]
        part, rest = a.split([400, 600])
        assert ledger.alive == 4000  # views hold no memory of their own
        a.add_(1)
        torch.mul(a, 2, out=a)
        assert ledger.alive == 4000  # nor does what is written in place
        b = a.double() + 1
        assert ledger.alive == 4000 + 8000
        assert ledger.peak == 4000 + 8000 + 8000  # the double, before one was added
        del a, part, rest
        assert ledger.alive == 4000 + 8000  # a view keeps the whole alive
        del view
        assert ledger.alive == 8000
        del b
        assert ledger.alive == 0
        outside.add_(1)
        seen = outside[:10]
        assert ledger.alive == 0  # what was there before is not ours
        wide = torch.ones(1, dtype=torch.float64).expand(1000)
        assert ledger.alive == 8
        values, places = torch.zeros(10, 10).max(1)
        assert ledger.alive == 8 + 40 + 80
        del wide, values, places, seen
    assert (ledger.alive, ledger.peak) == (0, 20000)
    torch.zeros(10**6)
    assert ledger.peak == 20000  # after it is over, nothing counts


def test_a_ledger_counts_a_forward_as_by_hand():
    """conv 3 -> 8 and ReLU on 10 x 10: both are there at once; then the pool, when the convolution's is gone."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    x = torch.zeros(1, 3, 10, 10)
    with torch.no_grad(), Ledger() as ledger:
        y = model(x)
    large = 8 * 100 * 4
    assert ledger.alive == 8 * 4
    assert 2 * large <= ledger.peak <= 2 * large + 1000
    assert y.shape == (1, 8, 1, 1)


def test_a_ledger_passes_by_what_has_no_storage():
    with Ledger() as ledger:
        product = torch.sparse.mm(torch.eye(10).to_sparse(), torch.ones(10, 10))
    assert torch.equal(product, torch.ones(10, 10))
    assert ledger.alive >= 400


# ------------------------------------------------------------------------------------------------------ what is free


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Callable[..., None]:
    """A made-up Linux: what its files say; `None` is a file that is not there."""

    def make(meminfo: str | None = None, **group: str | None) -> None:
        files = {"/proc/meminfo": meminfo}
        for old in tmp_path.iterdir():
            old.unlink()
        for name, text in group.items():
            if text is not None:
                (tmp_path / f"memory.{name}").write_text(text)
        if meminfo is not None:
            (tmp_path / "meminfo").write_text(files["/proc/meminfo"])
        monkeypatch.setattr(memory, "_CGROUP", tmp_path)
        monkeypatch.setattr(memory, "Path", lambda path: tmp_path / Path(path).name)

    return make


MEMINFO = f"MemTotal:       {16 * 2**20} kB\nMemFree:          123 kB\nMemAvailable:   {8 * 2**20} kB\nSwapFree:  99 kB\n"
STAT = f"anon 77\ninactive_anon 1\ninactive_file {GIB // 2}\nactive_file 5\n"


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({}, 8 * GIB),  # no container
        ({"max": "max\n", "current": f"{GIB}\n", "stat": STAT}, 8 * GIB),  # one without a limit
        ({"max": f"{3 * GIB}\n", "current": f"{GIB}\n", "stat": STAT}, 3 * GIB - GIB + GIB // 2),
        ({"max": f"{3 * GIB}\n", "current": f"{GIB}\n", "stat": "anon 7\n"}, 2 * GIB),
        ({"max": f"{64 * GIB}\n", "current": f"{GIB}\n", "stat": STAT}, 8 * GIB),  # a limit beyond what the machine has
    ],
    ids=["no container", "no limit", "limit", "no cache", "large limit"],
)
def test_what_is_free_is_the_lesser_of_machine_and_container(machine, group, expected):
    machine(MEMINFO, **group)
    assert free_bytes(torch.device("cpu")) == expected


def test_what_is_free_where_there_is_no_proc(machine, monkeypatch):
    pages = {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(memory.os, "sysconf_names", dict.fromkeys(pages, 0), raising=False)
    monkeypatch.setattr(memory.os, "sysconf", pages.__getitem__, raising=False)
    machine(None)
    assert free_bytes(torch.device("cpu")) == 4096000
    monkeypatch.setattr(memory.os, "sysconf_names", {}, raising=False)
    assert free_bytes(torch.device("cpu")) is None
    machine(None, max=f"{3 * GIB}", current="0", stat="")
    assert free_bytes(torch.device("cpu")) == 3 * GIB
    assert free_bytes(torch.device("meta")) is None


def test_what_is_free_here():
    free = free_bytes(torch.device("cpu"))
    assert free is None or 0 < free < 2**50


# --------------------------------------------------------------------------------------------------------- the chunk


class Wide(nn.Module):
    """64 channels of 16 x 16 in float64 as the layer, and their ReLU: 2 * 128 KiB for each row."""

    row = 2 * 64 * 16 * 16 * 8

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 64, 3, padding=1)
        self.fc = nn.Linear(64, 5)

    def forward(self, x):
        SEEN.append(len(x))
        return self.fc(self.conv(x).relu().mean((2, 3)))


def chunk_of(**options: Any) -> int:
    """The batches that reach the model in a sweep of 256 rows: all but the last are as large, which is checked."""
    model, x = seeded(Wide()), images(4, side=16)
    SEEN.clear()
    camfn.score_cam(model, "conv", x, 3, sweep=Sweep(fold=True, **options))
    swept: list[int] = []
    while sum(swept) < 256:  # before them are the clean forward, and those that find out about the model
        swept.append(SEEN.pop())
    assert sum(swept) == 256
    assert len(set(swept[1:])) <= 1
    return max(swept)


@pytest.mark.parametrize("rows", [4, 10, 50])
def test_bytes_decide_the_chunk(rows):
    found = chunk_of(memory=rows * Wide.row)
    assert 0.7 * rows <= found <= rows  # masks and masked inputs are counted too: 4 % here


def test_a_share_of_what_is_free_decides_the_chunk(monkeypatch):
    monkeypatch.setattr(camfn.sweep.runner, "free_bytes", lambda device: 40 * Wide.row)
    assert chunk_of(memory=0.25) == chunk_of(memory=10 * Wide.row)
    assert chunk_of(memory=1.0) == chunk_of(memory=40 * Wide.row)


def test_memory_for_less_than_a_row_is_one_row(monkeypatch):
    assert chunk_of(memory=1) == 1
    for free in (0, -GIB, 100):  # a container may be over its limit
        monkeypatch.setattr(camfn.sweep.runner, "free_bytes", lambda device, free=free: free)
        assert chunk_of(memory=0.5) == chunk_of() == 1


def test_chunk_is_the_most_where_both_are_given():
    assert chunk_of(memory=10 * GIB, chunk=8) == 8
    assert 7 <= chunk_of(memory=10 * Wide.row, chunk=100) <= 10
    assert chunk_of(memory=10 * GIB) > 32  # which is the most only where nothing is said


def test_the_default_chunk_is_smaller_where_little_is_free(monkeypatch):
    found = {}
    for rows in (8, 20, 10**6, None):
        free = None if rows is None else rows * Wide.row
        monkeypatch.setattr(camfn.sweep.runner, "free_bytes", lambda device, free=free: free)
        found[rows] = chunk_of()
        assert rows is None or found[rows] <= rows
    assert found[10**6] == found[None] == 32
    assert found[8] <= found[20] < 32


@pytest.mark.parametrize(("held", "rows"), [(8.5, 8), (15.9, 8), (20, 16), (1.1, 1), (0.3, 1), (1000, 32)])
def test_on_a_cpu_the_default_chunk_holds_what_it_is_quick_with(held, rows, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # who counts as two
    monkeypatch.setattr(camfn.sweep.runner, "_HELD", int(held * Wide.row / 2))
    assert chunk_of() == rows
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert chunk_of() == min(32, rows * 2 if held >= 1 else 1)
    assert chunk_of(chunk=64) == 64


def test_the_default_chunk_is_larger_where_the_weights_are_much_to_read(monkeypatch):
    class Heavy(Wide):
        def __init__(self):
            super().__init__()
            self.more = nn.Parameter(torch.zeros(2 * 17 * self.row // 8))

    monkeypatch.setattr(camfn.sweep.runner, "_HELD", 1)
    monkeypatch.setitem(globals(), "Wide", Heavy)
    assert chunk_of() == 16


def test_what_was_asked_for_is_not_made_smaller(monkeypatch):
    monkeypatch.setattr(camfn.sweep.runner, "free_bytes", lambda device: 4 * Wide.row)
    assert chunk_of(chunk=64) == 64


def test_a_share_of_what_nobody_knows(monkeypatch):
    monkeypatch.setattr(camfn.sweep.runner, "free_bytes", lambda device: None)
    with pytest.raises(camfn.CamError, match=r"Sweep\(memory=0.5\): .*cpu.* give bytes"):
        chunk_of(memory=0.5)


@pytest.mark.parametrize("method", ["score_cam", "ss_cam", "is_cam"])
def test_memory_changes_no_map(method):
    model, x = seeded(Wide()), images(2, side=16)
    options = {} if method == "score_cam" else {"num_samples": 3}
    run = functools.partial(getattr(camfn, method), model, "conv", x, 3, relu=False, normalize=False, **options)
    close(run(sweep=Sweep(memory=7 * Wide.row)), run(sweep=Sweep(chunk=32)))


# -------------------------------------------------------------------------------------------------- when it runs out

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "9000000000 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = {
    "torch's": lambda: getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)("CUDA out of memory. Tried to allocate"),
    "cuda's": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "the CPU's": lambda: RuntimeError(ALLOCATOR),
}


class Hungry(Net):
    """Fails as `error` says on more rows than `most`."""

    def __init__(self, most: int = 10**6, error: Callable[[], Exception] = ERRORS["torch's"], inner: nn.Module | None = None):
        super().__init__(inner or pair(padding=1))
        self.most, self.error = most, error

    def forward(self, x):
        SEEN.append(len(x))
        if len(x) > self.most:
            raise self.error()
        return super().forward(x)


METHODS = {
    "score_cam": {},
    "ss_cam": {"num_samples": 3},
    "ss_cam on the input": {"num_samples": 3, "noise": "input"},
    "is_cam": {"num_samples": 3},
}


def maps_of(model: nn.Module, x: Tensor, sweep: Sweep, kind: str = "score_cam", layer: Any = "inner.1") -> Any:
    run = getattr(camfn, kind.split()[0])
    return run(model, layer, x, [3, 1, 0, 4][: len(x)], relu=False, normalize=False, sweep=sweep, **METHODS[kind])


def halved(model: nn.Module, x: Tensor, sweep: Sweep, kind: str = "score_cam", **options: Any) -> Any:
    """The maps of a sweep that runs out of memory, and says so once."""
    with pytest.warns(camfn.CamWarning, match=f"memory ran out at {sweep.chunk or 32} masked inputs per forward") as caught:
        found = maps_of(model, x, sweep, kind, **options)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    return found


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("fold", ["auto", True])
def test_the_chunk_is_halved_and_the_result_is_that_of_the_smaller_chunk(kind, n, fold):
    x = images(n)
    found = halved(seeded(Hungry(5)), x, Sweep(chunk=16, fold=fold), kind)
    tried = [rows for rows in SEEN if rows > 3]
    assert tried[:3] == [16, 8, 4]
    assert set(tried[3:]) == {4}  # what did not fit is not tried again
    expected = maps_of(seeded(Hungry()), x, Sweep(chunk=4, fold=fold), kind)
    assert torch.equal(found, expected)
    close(found, maps_of(seeded(Hungry()), x, Sweep(chunk=16, fold=fold), kind))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("n", [1, 4])
def test_every_allocator_s_error_counts(error, n):
    x = images(n)  # 64 rows with four images: the model is rewritten
    found = halved(seeded(Hungry(5, ERRORS[error])), x, Sweep(chunk=16))
    assert torch.equal(found, maps_of(seeded(Hungry()), x, Sweep(chunk=4)))


@pytest.mark.parametrize("chunk", [7, 13, 32, None, 1000])
@pytest.mark.parametrize("most", [1, 2, 3, 6])
def test_any_chunk_comes_down_to_what_fits(chunk, most):
    x = images(1)
    found = halved(seeded(Hungry(most)), x, Sweep(chunk=chunk))
    assert SEEN[-1] <= most
    close(found, maps_of(seeded(Hungry()), x, Sweep(chunk=most)))


def test_it_may_run_out_again_later():
    """Another process takes memory in the middle of a sweep: the batches that were done are not done again."""
    room = {"rows": 8}

    class Shrinking(Hungry):
        def forward(self, x):
            if SEEN.count(8) == 3:
                room["rows"] = 3
            self.most = room["rows"]
            return super().forward(x)

    x = images(3)
    found = halved(seeded(Shrinking()), x, Sweep(chunk=16, fold=True))
    behind = SEEN[-SEEN[::-1].index(8) :]  # the fourth batch of eight, which did not fit
    assert behind[0] == 4
    assert sum(behind[1:]) == 48 - 3 * 8
    close(found, maps_of(seeded(Hungry()), x, Sweep(chunk=8, fold=True)))


def test_two_layers_run_out_with_one_warning():
    x = images(3)
    found = halved(seeded(Hungry(5)), x, Sweep(chunk=16, fold=True), layer=("inner.0", "inner.1"))
    expected = maps_of(seeded(Hungry()), x, Sweep(chunk=4, fold=True), layer=("inner.0", "inner.1"))
    assert SEEN.count(16) == 1  # what did not fit one layer's sweep is not tried in the next
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours, theirs)


def test_rounds_within_a_budget_run_out_with_one_warning():
    x, told = images(1), []

    def run(most: int, chunk: int) -> Tensor:
        inner = nn.Sequential(nn.Conv2d(4, 128, 3), nn.ReLU(), nn.Conv2d(128, 16, 1))
        sweep = Sweep(chunk=chunk, fold=True, progress=lambda done, total: told.append(done))
        return camfn.score_cam(seeded(Hungry(most, inner=inner)), "inner.0", x, 3, budget=0.5, relu=False, sweep=sweep)

    with pytest.warns(camfn.CamWarning, match="memory ran out at 4 masked inputs per forward; 2 fitted") as caught:
        found = run(3, chunk=4)
    assert len(caught) == 1
    assert SEEN.count(4) == 1
    assert torch.equal(found, run(100, chunk=2))
    told.clear()
    run(100, chunk=1000)
    assert len(told) > 2  # there were several rounds


def test_progress_counts_rows_once():
    told = []
    halved(seeded(Hungry(5)), images(3), Sweep(chunk=16, progress=lambda done, total: told.append((done, total))))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (48, 48)


def test_no_memory_for_the_look_at_a_model_is_no_word_about_it():
    """Its rows depend on each other; on the first call there is no room for two of them, on the second there is."""
    room = {"rows": 1}

    class Crossed(Hungry):
        def forward(self, x):
            self.most = room["rows"]
            y = super().forward(x)
            return y + y.mean(0)

    model, x = seeded(Crossed()), images(1)
    expected = maps_of(model, x, Sweep(chunk=1))
    assert torch.equal(halved(model, x, Sweep(chunk=4)), expected)
    room["rows"] = 100
    with pytest.warns(camfn.CamWarning, match="depends on the others of its batch"):
        close(maps_of(model, x, Sweep(chunk=4)), expected)


def test_with_memory_given_it_is_halved_too():
    x = images(3)
    with pytest.warns(camfn.CamWarning, match="memory ran out at 16 masked inputs per forward; 4 fitted"):
        found = maps_of(seeded(Hungry(5)), x, Sweep(memory=10 * GIB, chunk=16))
    assert torch.equal(found, maps_of(seeded(Hungry()), x, Sweep(chunk=4)))


OTHERS = {
    "another RuntimeError": RuntimeError("CUDA error: device-side assert triggered"),
    "of the model": RuntimeError("out of memory slots"),
    "ValueError with the allocator's words": ValueError(ALLOCATOR),
    "Python's": MemoryError("no more"),
    "a RuntimeError of another kind with the words": NotImplementedError(ALLOCATOR),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_no_other_error_is_tried_again(kind):
    error = OTHERS[kind]
    assert not is_exhausted(error)
    with pytest.raises(type(error)) as caught:
        maps_of(seeded(Hungry(5, lambda: error)), images(3), Sweep(chunk=16, fold=True))
    assert caught.value is error
    assert [rows for rows in SEEN if rows > 3] == [16]


def test_what_an_allocator_really_says():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_exhausted(caught.value)
    assert is_exhausted(torch.cuda.OutOfMemoryError("no"))


@pytest.mark.parametrize("error", ERRORS)
def test_one_row_too_many_is_the_error_itself(error):
    made = ERRORS[error]()

    class Full(Hungry):
        """Has room for the clean forward, and for nothing behind it."""

        def forward(self, x):
            self.most = 0 if SEEN else 1
            return super().forward(x)

    with pytest.raises(type(made)) as caught:
        maps_of(seeded(Full(error=lambda: made)), images(1), Sweep(chunk=8, fold=True))
    assert caught.value is made
    assert SEEN == [1, 8, 4, 2, 1]


def test_under_a_transform_the_error_is_the_error():
    model, x = seeded(Hungry(5)), images(1)
    with pytest.raises(type(ERRORS["torch's"]()), match="out of memory"):
        torch.func.grad(lambda x: maps_of(model, x, Sweep(chunk=16)).sum())(x)


class Starved:
    """A backend that counts graphs, and cannot run those of more than `most` rows."""

    def __init__(self, most: int):
        self.most, self.graphs = most, []

    def __call__(self, graph: Any, given: list[Any]) -> Callable[..., Any]:
        rows = max(len(t) for t in given if isinstance(t, Tensor) and t.ndim == 3)  # the channels of a chunk: (b, h, w)
        self.graphs.append(rows)

        def run(*args: Any) -> Any:
            if rows > self.most:
                raise ERRORS["the CPU's"]()
            return graph.forward(*args)

        return run


@needs_compiler
@pytest.mark.parametrize("kind", ["score_cam", "is_cam"])
def test_a_compiled_kernel_is_halved_too(monkeypatch, kind):
    real, backend, x = _compat.compiled, Starved(5), images(3)
    monkeypatch.setattr(_compat, "compiled", lambda function: real(function, backend=backend))
    torch._dynamo.reset()
    model, sweep = camfn.prepare(seeded(Net(pair(padding=1)))), Sweep(chunk=16, compile=True)
    found = halved(model, x, sweep, kind)
    assert backend.graphs == [16, 8, 4]
    close(found, maps_of(model, x, Sweep(chunk=4, compile=False), kind))
    assert torch.equal(halved(model, x, sweep, kind), found)
    graphs = len(backend.graphs)
    assert torch.equal(halved(model, x, sweep, kind), found)
    assert len(backend.graphs) == graphs  # those that did not fit are kept as well

"""How the model runs in a sweep: rewritten where that pays and is right, one row at a time where rows depend on each other."""

import dataclasses
import gc
import operator
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camfn
from camfn import Sweep
from tests.oracles.closeness import close
from tests.oracles.foldable import Net, images, loop_maps, pair, seeded, signed_maps
from tests.oracles.libraries import torchvision_models
from tests.oracles.networks import CHEAP

LAYER = "inner.1"
SEEN: list[tuple[int, bool]] = []
"""Of every forward: how many rows, and whether channels-last. A global, since a copy of a model has copies of all it holds."""


@pytest.fixture(autouse=True)
def _nothing_seen(monkeypatch):
    SEEN.clear()
    monkeypatch.setattr(camfn.sweep.runner, "_REUSED", 0)  # the networks here are too small for a copy to pay


def test_a_copy_of_weights_that_a_sweep_uses_seldom_is_not_made(monkeypatch):
    """Each of 4 x 16 masked images uses each weight at 5 x 5 positions."""
    model, x = seeded(Watched()), images(side=5)
    for enough, rewritten in ((1600, True), (1601, False)):
        SEEN.clear()
        monkeypatch.setattr(camfn.sweep.runner, "_REUSED", enough)
        camfn.score_cam(model, LAYER, x, 1)
        assert any(last for rows, last in SEEN if rows > 2) == rewritten


def note(x: Tensor) -> None:
    SEEN.append((len(x), x.stride(1) == 1))


class Watched(Net):
    """Notes what it is shown."""

    def __init__(self, inner: Any = None):
        super().__init__(inner or pair(padding=1))

    def forward(self, x):
        note(x)
        return super().forward(x)


class Functional(Watched):
    """A convolution and a norm, and what is done between, before and behind."""

    def before(self, x):
        return x

    def between(self, y):
        return y

    def behind(self, y):
        return y

    def forward(self, x):
        note(x)
        conv, norm = self.inner
        return self.behind(self.fc(torch.tanh(norm(self.between(conv(self.before(x))))).flatten(2).mean(2)))


def batches() -> list[int]:
    return [rows for rows, _ in SEEN]


# ------------------------------------------------------------------------------------------------------ as it is run


@pytest.fixture
def norms(monkeypatch) -> list[int]:
    """The rows of every call of a batch norm, of any class."""
    found, real = [], F.batch_norm
    monkeypatch.setattr(F, "batch_norm", lambda x, *args, **kwargs: (found.append(len(x)), real(x, *args, **kwargs))[1])
    return found


def test_large_sweeps_run_without_norms_and_channels_last(norms):
    model, x = seeded(Watched()), images()
    found = signed_maps(model, LAYER, x, 3, sweep=Sweep(chunk=16))
    chunks = [last for rows, last in SEEN if rows == 16]
    assert len(chunks) == 4
    assert all(chunks)
    assert 16 not in norms
    close(found, loop_maps(model, LAYER, x, 3))


@pytest.mark.parametrize("method", ["ss_cam", "is_cam"])
def test_all_draws_count_for_the_size_of_a_sweep(norms, method):
    model, x = seeded(Watched()), images(1)
    run = getattr(camfn, method)
    found = run(model, LAYER, x, 3, num_samples=4, relu=False, normalize=False, sweep=Sweep(chunk=16))
    assert 16 not in norms
    assert 16 in batches()
    plain = run(model, LAYER, x, 3, num_samples=4, relu=False, normalize=False, sweep=Sweep(chunk=16, fold=False))
    close(found, plain)


def test_small_sweeps_run_the_model_as_it_is(norms):
    model, x = seeded(Watched()), images(1)
    signed_maps(model, LAYER, x, 3, sweep=Sweep(chunk=4))
    assert [last for rows, last in SEEN if rows == 4] == [False] * 4
    assert norms.count(4) == 5  # the first chunk is guarded, and the patched function counts that call twice


def test_one_dimension_has_no_channels_last_and_is_merged_all_the_same(norms):
    model, x = seeded(Watched(pair(1, padding=1))), images(dims=1)
    close(signed_maps(model, LAYER, x, 3, sweep=Sweep(chunk=16)), loop_maps(model, LAYER, x, 3))
    assert 16 not in norms[:-64]


class Views(Functional):
    def between(self, y):
        return y.view(len(y), -1).view(y.shape)


class Insists(Functional):
    def between(self, y):
        assert y.is_contiguous()
        return y


class InsistsOnItsInput(Functional):
    def before(self, x):
        if not x.is_contiguous():
            raise ValueError("not contiguous")
        return x


class ReadsTheNorm(Functional):
    def before(self, x):
        return x.to(self.inner[1].weight.dtype) * self.inner[1].running_var.mean()


class ViewsItsInput(Functional):
    """Fails with channels last, and not without the norm: the norm can go all the same."""

    def before(self, x):
        return x.view(len(x), -1).view(x.shape)


@pytest.mark.parametrize("cls", [Views, ViewsItsInput, Insists, InsistsOnItsInput, ReadsTheNorm])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_model_that_does_not_take_the_copy_still_gets_its_map(cls, dtype):
    model, x = seeded(cls()).to(dtype), images().to(dtype)
    for sweep in (Sweep(), Sweep(fold=True, chunk=16), Sweep(chunk=5)):
        found = signed_maps(model, LAYER, x, 3, sweep=sweep)
        close(found, loop_maps(model, LAYER, x, 3), str(sweep))


def test_where_only_the_layout_is_refused_the_norms_still_go(norms):
    model, x = seeded(ViewsItsInput()), images()
    signed_maps(model, LAYER, x, 3, sweep=Sweep(chunk=16))
    assert [last for rows, last in SEEN if rows == 16] == [False] * 4
    assert 16 not in norms


# ------------------------------------------------------------------------------------ rows that depend on each other


class MeanOfBatch(Functional):
    def behind(self, y):
        return y + y.mean(0)


class LastRow(Functional):
    def behind(self, y):
        return y[-1:].expand_as(y)


class Reversed(Functional):
    def before(self, x):
        return x.flip(0)


class TrainNorm(Functional):
    def between(self, y):
        return F.batch_norm(y, None, None, training=True)


class TrainNormWithStatistics(Functional):
    """Written to in place, which cannot be mapped."""

    def between(self, y):
        return F.batch_norm(y, self.inner[1].running_mean, self.inner[1].running_var, training=True)


class NoStatistics(Watched):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16, track_running_stats=False)))


class LargestOfBatch(Functional):
    """Divided by the largest of the batch."""

    def before(self, x):
        return x / x.abs().amax()


class OneByOne(Functional):
    """Takes one row, and no more."""

    def between(self, y):
        return y.view(1, 16, 6, 6)


CROSSED = [MeanOfBatch, LastRow, Reversed, TrainNorm, TrainNormWithStatistics, NoStatistics, LargestOfBatch]


class Branches(Functional):
    """Reads a number of its batch in Python, and decides by it for all of the batch."""

    level = 0.0

    def __init__(self, number):
        super().__init__()
        self.number = number
        self.register_buffer("kept", torch.zeros((), dtype=torch.float64))

    def between(self, y):
        GIVEN.append(y)
        return y if self.number(self, y) > self.level else -y


GIVEN: list[Tensor] = []


def by_buffer(model: nn.Module, y: Tensor) -> Tensor:
    return model.kept.copy_(y.mean())


def by_out(model: nn.Module, y: Tensor) -> Tensor:
    return torch.sum(y.flatten(), 0, out=torch.zeros((), dtype=y.dtype)) / y.numel()


NUMBERS = {
    "a comparison": lambda model, y: y.mean(),
    "item": lambda model, y: y.mean().item(),
    "NumPy": lambda model, y: y.detach().numpy().mean(),
    "tolist": lambda model, y: sum(y.flatten().tolist()) / y.numel(),
    "a size": lambda model, y: len(y[y > 0.3]) / y.numel(),
    "a buffer that is written to": by_buffer,
    "out=": by_out,
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_what_a_batch_decides_by_a_value_is_decided_for_each_input_alone(kind):
    """The level is the median of the masked inputs' numbers, so that both ways are taken."""
    model, x = seeded(Branches(NUMBERS[kind])), images(1)
    GIVEN.clear()
    loop_maps(model, LAYER, x, 3)
    numbers = sorted(float(model.number(model, y)) for y in GIVEN if len(y) == 1)
    model.level = (numbers[len(numbers) // 2] + numbers[len(numbers) // 2 - 1]) / 2
    expected = loop_maps(model, LAYER, x, 3)
    SEEN.clear()
    with pytest.warns(camfn.CamWarning, match="reads of its input in Python .*one input at a time") as caught:
        close(signed_maps(model, LAYER, x, 3), expected)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert set(batches()) == {1}
    folded = signed_maps(model, LAYER, x, 3, sweep=Sweep(fold=True))
    assert (folded - expected).abs().max() > 1e-6, "the batch decides the same"


@pytest.mark.parametrize("fixed", [True, False])
def test_a_value_of_a_companion_that_all_images_share_is_read_in_batches(fixed):
    class Scaled(Watched):
        def forward(self, x, gain):
            return super().forward(x if bool(gain.sum() > 0) else -x)

    model, x = seeded(Scaled()), images(4)
    gain = torch.tensor(1.0 if fixed else [1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        signed_maps(model, LAYER, (x, gain), 3, sweep=Sweep(chunk=16))
    assert (16 in batches()) == fixed
    assert len(caught) == (not fixed)


@pytest.mark.parametrize("cls", [*CROSSED, OneByOne])
def test_dependent_rows_are_found_out_with_one_warning(cls):
    model, x = seeded(cls()), images(1)
    expected = loop_maps(model, LAYER, x, 3)
    for chunk in (None, 5):
        with pytest.warns(camfn.CamWarning, match="the sweep (maps through|runs) the model") as caught:
            found = signed_maps(model, LAYER, x, 3, sweep=Sweep(chunk=chunk))
        assert len(caught) == 1
        assert caught[0].filename == __file__
        close(found, expected, str(chunk))


@pytest.mark.parametrize(("cls", "n"), [*((cls, n) for cls in CROSSED for n in (1, 4)), (OneByOne, 1)])
def test_one_row_at_a_time_is_right_for_every_model_and_warns_of_nothing(cls, n):
    model, x = seeded(cls()), images(n)
    close(signed_maps(model, LAYER, x, 3, sweep=Sweep(chunk=1)), loop_maps(model, LAYER, x, 3))
    assert set(batches()) <= {1, n}


@pytest.mark.parametrize("cls", [MeanOfBatch, LastRow, TrainNorm, OneByOne])
def test_who_knows_it_is_not_warned(cls):
    model, x = seeded(cls()), images(1)
    close(signed_maps(model, LAYER, x, 3, sweep=Sweep(fold=False)), loop_maps(model, LAYER, x, 3))


@pytest.mark.parametrize("cls", [Watched, MeanOfBatch])
@pytest.mark.parametrize("n", [1, 4])
def test_it_is_found_out_in_each_call(cls, n):
    model = seeded(cls())

    def forwards(side: int = 6, net: nn.Module = model) -> int:
        SEEN.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", camfn.CamWarning)
            camfn.score_cam(net, LAYER, images(n, side=side), 3, sweep=Sweep(chunk=16))
        return len(SEEN)

    first = forwards()
    assert (forwards(), forwards(7)) == (first, first)
    assert forwards(6, seeded(cls())) == first
    with torch.no_grad():
        model.fc.weight.mul_(2)
    assert forwards() == first


def test_what_is_found_out_does_not_keep_the_model_alive():
    model = seeded(Watched())
    gone = weakref.ref(model)
    camfn.score_cam(model, LAYER, images(), lambda y, net=model: y[1] * net.fc.bias.detach()[0])
    del model
    gc.collect()
    assert gone() is None


# ----------------------------------------------------------------------------------------------- outputs and targets


@dataclasses.dataclass
class Record:
    logits: Tensor
    crowd: Tensor


class Says(Watched):
    """Logits, beside them something that depends on the batch, packed as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        y = super().forward(x)
        return self.how(y, y + y.mean(0))


class AtLeast:
    """A target that can be called, and neither hashed nor weakly held."""

    __slots__ = ("floor",)
    __hash__ = None

    def __init__(self, floor: float):
        self.floor = floor

    def __call__(self, y: Tensor) -> Tensor:
        return y[3].clamp(min=self.floor)


@dataclasses.dataclass
class Entry:
    number: int

    def __call__(self, y: Tensor) -> Tensor:
        return y[self.number]


PACKED = {
    "tensor": (lambda y, crowd: y, 3, lambda out: out[0, 3]),
    "tuple": (lambda y, crowd: (y, crowd), 3, lambda out: out[0][0, 3]),
    "mapping": (lambda y, crowd: {"aux": crowd, "logits": y}, 3, lambda out: out["logits"][0, 3]),
    "dataclass": (lambda y, crowd: Record(y, crowd), 3, lambda out: out.logits[0, 3]),
    "parts in parts": (lambda y, crowd: (y, (crowd[:, None], {"more": crowd})), 3, lambda out: out[0][0, 3]),
    "tuple, callable": (lambda y, crowd: (y, crowd), lambda out: out[0][3] * 2, lambda out: out[0][0, 3] * 2),
    "dataclass, callable": (Record, lambda out: out.logits[1:3].sum(), lambda out: out.logits[0, 1:3].sum()),
    "list per sample": (
        lambda y, crowd: [{"found": row[:3], "crowd": other} for row, other in zip(y, crowd)],
        lambda sample: sample["found"].logsumexp(0),
        lambda out: out[0]["found"].logsumexp(0),
    ),
    "itemgetter": (lambda y, crowd: y, operator.itemgetter(3), lambda out: out[0, 3]),
    "unhashable": (lambda y, crowd: y, AtLeast(-1.0), lambda out: out[0, 3].clamp(min=-1.0)),
    "dataclass as a target": (lambda y, crowd: y, Entry(3), lambda out: out[0, 3]),
    "name": (lambda y, crowd: (y, crowd), camfn.targets.log_probability(3), lambda out: out[0].log_softmax(1)[0, 3]),
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("n", [1, 4])
def test_parts_that_the_target_does_not_read_may_depend_on_what_they_like(kind, n):
    how, target, read = PACKED[kind]
    model, x = seeded(Says(how)), images(n)
    found = signed_maps(model, LAYER, x, target)
    close(found, loop_maps(model, LAYER, x, read), kind)
    assert max(batches()) > 4


def test_parts_that_the_target_reads_may_not():
    model, x = seeded(Says(lambda y, crowd: (y, crowd))), images(1)
    with pytest.warns(camfn.CamWarning, match="the sweep maps through the model") as caught:
        found = signed_maps(model, LAYER, x, lambda out: out[1][3])
    assert len(caught) == 1
    close(found, loop_maps(model, LAYER, x, lambda out: out[1][0, 3]))
    signed_maps(model, LAYER, x, lambda out: out[0][3])  # and after it, of another part of the same model, no warning


def test_every_image_s_target_is_looked_at():
    model, x = seeded(Says(lambda y, crowd: (y, crowd))), images(2)
    target = [lambda out: out[0][3], lambda out: out[1][3]]
    with pytest.warns(camfn.CamWarning, match="the sweep maps through the model"):
        found = signed_maps(model, LAYER, x, target)
    close(found[1:], loop_maps(model, LAYER, x, lambda out: out[1][0, 3])[1:])


# ------------------------------------------------------------------------------------------ models that are fine as is


class InPlace(Functional):
    """Writes to its input, as a normalisation in the model may."""

    def before(self, x):
        return x.sub_(0.5).div_(2)


class Root(Functional):
    """Of positive numbers only; elsewhere NaN."""

    def before(self, x):
        return x.sqrt()


class Palette(Functional):
    """Looks its pixels up."""

    def __init__(self):
        super().__init__()
        self.palette = nn.Embedding(256, 1)

    def before(self, x):
        return self.palette((x * 255).long())[..., 0] + x


class Sparse(Functional):
    def __init__(self):
        super().__init__()
        self.register_buffer("links", torch.eye(5).to_sparse())

    def behind(self, y):
        return torch.sparse.mm(self.links.to(y.dtype), y.T).T


class NotFinite(Functional):
    """One class is minus infinity, as models mask classes."""

    def behind(self, y):
        return torch.cat([y[:, :4], torch.full_like(y[:, 4:], -torch.inf)], 1)


class ReadsItsState(Functional):
    """Values of a parameter, a buffer, a plain tensor and shapes, and of what is made of these."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.scales = [torch.tensor(2.0, dtype=torch.float64)]

    def before(self, x):
        self.calls += 1
        steps = torch.arange(x.shape[2], dtype=x.dtype)
        gain = (self.scales[0] * steps.sum() + self.calls).item()
        return x * gain if bool(self.fc.bias.abs().sum() > 0) and steps.max() > 1 else -x


class ReadsNumPy(Functional):
    def before(self, x):
        return x * float(self.fc.weight.detach().numpy().max())


class Forgets(Functional):
    """Memory of the input is free, and may be that of what is read."""

    def before(self, x):
        x = (x * 2).sub(1)
        return x * torch.ones(x.shape[1:]).sum().item()


STILL = [ReadsItsState, ReadsNumPy, Forgets]


@pytest.mark.parametrize("cls", [Watched, InPlace, Root, Palette, Sparse, NotFinite, *STILL])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_independent_rows_are_run_in_batches_without_a_word(cls, inference, n):
    model, x = seeded(cls()), images(n).abs().clamp(max=1)
    expected = loop_maps(model, LAYER, x, 3)
    with torch.inference_mode(inference):
        found = signed_maps(model, LAYER, x.clone(), 3, sweep=Sweep(chunk=16))
    close(found, expected)
    assert 16 in batches()


def test_several_inputs_with_what_is_per_image_and_what_is_not():
    class Joint(Watched):
        def forward(self, pixels, bias, scale):
            return super().forward(pixels) * scale + bias

    model, x = seeded(Joint()), images()
    bias, scale = torch.randn(4, 5, dtype=x.dtype), torch.rand((), dtype=x.dtype)
    found = signed_maps(model, LAYER, {"pixels": x, "bias": bias, "scale": scale}, 3, masked="pixels")
    maps = [
        signed_maps(model, LAYER, {"pixels": x[i : i + 1], "bias": bias[i : i + 1], "scale": scale}, 3, masked="pixels")
        for i in range(4)
    ]
    close(found, torch.cat(maps))


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [("resnet18", {}, 64), ("mobilenet_v2", {}, 64), ("densenet121", {}, 64), ("vit_b_16", {"image_size": 32}, 32)],
)
def test_torchvision_s_networks_are_found_independent(name, options, side):
    from camfn.model.forward import look
    from camfn.sweep.runner import runner_of
    from camfn.targets import resolve

    torch.manual_seed(0)
    model = getattr(torchvision_models(), name)(**options)
    x = torch.rand(1, 3, side, side)
    layer = next(path for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    forward = look(model, layer, x, None, masks=True)
    runner = runner_of(forward, resolve(3, forward.output, 1, x.device), camfn.Sweep(), 64)
    assert runner.folded
    assert runner.room.chunk > 1


# ---------------------------------------------------------------------------------------------------- options refused

REFUSED = {
    "chunk": [0, -1, 2.5, True, "8", torch.tensor(4)],
    "memory": [0, 0.0, 1.5, -3, -0.5, "1GB", True, float("nan")],
    "compile": ["never", None, 2, "Auto", 0, 1],
    "fold": ["never", None, 2, "Auto", 0, 1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
@pytest.mark.parametrize("method", ["score_cam", "ss_cam", "is_cam"])
def test_a_wrong_option_is_named(name, value, method):
    with pytest.raises(camfn.CamError) as error:
        getattr(camfn, method)(seeded(Watched()), LAYER, images(), 3, sweep=Sweep(**{name: value}))
    assert f"Sweep({name}={value!r})" in str(error.value)
    assert f"{name} must be" in str(error.value)
    assert max(batches(), default=0) <= 4  # before anything is swept


@pytest.mark.parametrize("name", ["compile", "fold"])
def test_an_option_read_from_a_file_is_as_good(name):
    model, x = seeded(Watched()), images()
    value = "".join(("au", "to"))  # equal to "auto", and another object
    assert torch.equal(signed_maps(model, LAYER, x, 3, sweep=Sweep(**{name: value})), signed_maps(model, LAYER, x, 3))


class Compared(nn.Module):
    """Images against texts, as CLIP has them: logits `(images, texts)`, and the texts' own."""

    def __init__(self):
        super().__init__()
        self.features, self.words = nn.Conv2d(3, 6, 3), nn.Embedding(20, 6)

    def forward(self, pixels, texts):
        seen = self.features(pixels).relu().mean((2, 3))
        return {"logits_per_image": seen @ self.words(texts).mean(1).T, "texts": texts}


@pytest.mark.parametrize("method", ["score_cam", "rise", "ablation_cam", "recipro_cam", "opti_cam"])
@pytest.mark.parametrize("texts", [1, 2, 3])
def test_as_many_texts_as_images_belong_to_all_images(method, texts):
    torch.manual_seed(0)
    model, x = Compared().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    words = torch.randint(20, (texts, 4))
    function, given = camfn.METHODS[method].function, {**CHEAP.get(method, {}), "relu": False, "normalize": False}
    layer = "features" if camfn.METHODS[method].of_layer else None
    found = function(model, layer, {"pixels": x, "texts": words}, texts - 1, **given)
    alone = [function(model, layer, {"pixels": x[i : i + 1], "texts": words}, texts - 1, **given) for i in range(2)]
    close(found, torch.cat(alone))
    assert float(found.abs().max()) > 1e-3

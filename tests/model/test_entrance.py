"""The order of an input's axes, found at the first layers that know their channels."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camfn
from camfn import CamError
from camfn.model.task import begin
from tests.oracles.closeness import close
from tests.oracles.libraries import torchvision_models
from tests.oracles.networks import seeded


class Way(nn.Module):
    """Layers, and a function of them and of the input."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *x: Tensor) -> Any:
        return self.run(self, *x)


class Case(NamedTuple):
    letters: str  # that are right
    shape: tuple[int, ...]
    run: Callable[..., Any]
    layers: dict[str, Callable[[], nn.Module]]


def conv(inside: int = 3, dims: int = 2) -> Callable[[], nn.Module]:
    return lambda: {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](inside, 4, 3, padding=1)


def mean(z: Tensor) -> Tensor:
    return z.flatten(2).mean(2)


def frames(s: Any, x: Tensor) -> Tensor:
    return mean(s.c(x.flatten(0, 1))).unflatten(0, (len(x), -1))


def focus(x: Tensor) -> Tensor:
    return torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)


def patches(x: Tensor, p: int = 4) -> Tensor:
    """As einops' "n c (h p) (w q) -> n (h w) (p q c)"."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


SHIFT = torch.tensor([0.4, 0.5, 0.6])
LAST = (0, 3, 1, 2)
C = {"c": conv()}
ONE = {"c": conv(1)}
CASES = {
    "usual": Case("nchw", (2, 3, 8, 12), lambda s, x: mean(s.c(x)), C),
    "usual, all sides alike": Case("nchw", (2, 3, 3, 3), lambda s, x: mean(s.c(x)), C),
    "channels last": Case("nhwc", (2, 8, 12, 3), lambda s, x: mean(s.c(x.permute(LAST))), C),
    "channels last, all sides alike": Case("nhwc", (2, 3, 3, 3), lambda s, x: mean(s.c(x.permute(LAST))), C),
    "width first": Case("nwhc", (2, 12, 8, 3), lambda s, x: mean(s.c(x.permute(0, 3, 2, 1))), C),
    "one image": Case("nhwc", (1, 8, 12, 3), lambda s, x: mean(s.c(x.permute(LAST))), C),
    "no channels": Case("nhw", (2, 8, 12), lambda s, x: mean(s.c(x[:, None])), ONE),
    "no channels, turned": Case("nwh", (2, 8, 12), lambda s, x: mean(s.c(x.mT[:, None])), ONE),
    "no channels, repeated": Case("nhw", (2, 8, 12), lambda s, x: mean(s.c(x[:, None].repeat(1, 3, 1, 1))), C),
    "one channel": Case("nchw", (2, 1, 8, 12), lambda s, x: mean(s.c(x)), ONE),
    "one channel, last": Case("nhwc", (2, 8, 12, 1), lambda s, x: mean(s.c(x.permute(LAST))), ONE),
    "one channel, last, repeated": Case("nhwc", (2, 8, 12, 1), lambda s, x: mean(s.c(x.permute(LAST).repeat(1, 3, 1, 1))), C),
    "mean of channels": Case("nhwc", (2, 8, 12, 3), lambda s, x: mean(s.c(x.mean(3)[:, None])), ONE),
    "normalization, then a turn": Case("nhwc", (2, 8, 8, 3), lambda s, x: mean(s.c(((x - SHIFT) / 0.2).permute(LAST))), C),
    "image's own statistics": Case("nhwc", (2, 8, 8, 3), lambda s, x: mean(s.c((x / x.mean((1, 2), True)).permute(LAST))), C),
    "batch norm": Case(
        "nhwc", (2, 8, 8, 3), lambda s, x: mean(s.c(s.b(x.permute(LAST)))), {**C, "b": lambda: nn.BatchNorm2d(3)}
    ),
    "group norm": Case(
        "nhwc", (2, 8, 8, 3), lambda s, x: mean(s.c(s.b(x.permute(LAST)))), {**C, "b": lambda: nn.GroupNorm(1, 3)}
    ),
    "layer norm": Case("nhwc", (2, 8, 8, 3), lambda s, x: mean(s.c(s.b(x).permute(LAST))), {**C, "b": lambda: nn.LayerNorm(3)}),
    "linear layer": Case(
        "nhwc", (2, 8, 8, 3), lambda s, x: mean(s.c(s.b(x).permute(LAST))), {"b": lambda: nn.Linear(3, 4), "c": conv(4)}
    ),
    "resize": Case("nhwc", (2, 8, 8, 3), lambda s, x: mean(s.c(F.interpolate(x.permute(LAST), (5, 5)))), C),
    "bytes": Case("nhwc", (2, 8, 8, 3), lambda s, x: mean(s.c(x.byte().float().permute(LAST))), C),
    "threshold": Case("nhwc", (2, 8, 8, 3), lambda s, x: mean(s.c((x - 2).relu().permute(LAST))), C),
    "focus": Case("nchw", (2, 3, 8, 8), lambda s, x: mean(s.c(focus(x))), {"c": conv(12)}),
    "focus, channels last": Case("nhwc", (2, 8, 8, 3), lambda s, x: mean(s.c(focus(x.permute(LAST)))), {"c": conv(12)}),
    "coordinates beside": Case(
        "nhwc",
        (2, 8, 8, 3),
        lambda s, x: mean(s.c(torch.cat([x.permute(LAST), torch.ones(len(x), 1, 8, 8)], 1))),
        {"c": conv(4)},
    ),
    "patches of einops": Case("nchw", (2, 3, 8, 12), lambda s, x: s.l(patches(x)).mean(1), {"l": lambda: nn.Linear(48, 4)}),
    "patches, channels last": Case(
        "nhwc", (2, 8, 12, 3), lambda s, x: s.l(patches(x.permute(LAST))).mean(1), {"l": lambda: nn.Linear(48, 4)}
    ),
    "unfolded": Case(
        "nchw", (2, 3, 8, 8), lambda s, x: s.l(F.unfold(x, 4, stride=4).mT).mean(1), {"l": lambda: nn.Linear(48, 4)}
    ),
    "frames as the batch": Case("ntchw", (2, 5, 3, 8, 12), lambda s, x: frames(s, x).mean(1), C),
    "frames as the batch, all alike": Case("ntchw", (3, 3, 3, 3, 3), lambda s, x: frames(s, x).mean(1), C),
    "frames of one image": Case("ntchw", (1, 5, 3, 8, 8), lambda s, x: frames(s, x).mean(1), C),
    "frames after channels": Case("ncthw", (2, 3, 5, 8, 8), lambda s, x: frames(s, x.transpose(1, 2)).mean(1), C),
    "frames one by one": Case("ntchw", (2, 5, 3, 8, 8), lambda s, x: sum(mean(s.c(f)) for f in x.unbind(1)), C),
    "frames one by one, after channels": Case("ncthw", (2, 3, 5, 8, 8), lambda s, x: sum(mean(s.c(f)) for f in x.unbind(2)), C),
    "frames without channels": Case("nthw", (2, 5, 8, 12), lambda s, x: sum(mean(s.c(f[:, None])) for f in x.unbind(1)), ONE),
    "one frame": Case("ntchw", (2, 1, 3, 8, 12), lambda s, x: frames(s, x).mean(1), C),
    "volume": Case("ncdhw", (2, 3, 4, 8, 8), lambda s, x: mean(s.c(x)), {"c": conv(3, 3)}),
    "volume, channels last": Case(
        "ndhwc", (2, 4, 8, 8, 3), lambda s, x: mean(s.c(x.permute(0, 4, 1, 2, 3))), {"c": conv(3, 3)}
    ),
    "video in three axes": Case("ntchw", (2, 4, 3, 8, 8), lambda s, x: mean(s.c(x.transpose(1, 2))), {"c": conv(3, 3)}),
    "volume without channels": Case("ndhw", (2, 4, 8, 8), lambda s, x: mean(s.c(x[:, None])), {"c": conv(1, 3)}),
    "line": Case("ncw", (2, 3, 20), lambda s, x: mean(s.c(x)), {"c": conv(3, 1)}),
    "line, channels last": Case("nwc", (2, 20, 3), lambda s, x: mean(s.c(x.mT)), {"c": conv(3, 1)}),
    "recurrent layer": Case("ntc", (2, 9, 6), lambda s, x: s.l(x)[0][:, -1], {"l": lambda: nn.LSTM(6, 4, batch_first=True)}),
    "recurrent layer, square": Case(
        "ntc", (2, 6, 6), lambda s, x: s.l(x)[0][:, -1], {"l": lambda: nn.GRU(6, 4, batch_first=True)}
    ),
    "recurrent layer, sequence first": Case(
        "ntc", (2, 9, 6), lambda s, x: s.l(x.transpose(0, 1))[0][-1], {"l": lambda: nn.RNN(6, 4)}
    ),
    "recurrent layer, channels first": Case(
        "nct", (2, 6, 9), lambda s, x: s.l(x.mT)[0][:, -1], {"l": lambda: nn.LSTM(6, 4, batch_first=True)}
    ),
    "attention": Case(
        "nwc", (2, 9, 6), lambda s, x: s.l(x, x, x)[0].mean(1), {"l": lambda: nn.MultiheadAttention(6, 2, batch_first=True)}
    ),
    "transformer": Case(
        "nwc", (2, 9, 6), lambda s, x: s.l(x).mean(1), {"l": lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)}
    ),
    "registered in another order": Case(
        "nhwc",
        (2, 8, 12, 3),
        lambda s, x: mean(s.z(s.c(x.permute(LAST)))),
        {"z": lambda: nn.Conv2d(8, 4, 3), "c": lambda: nn.Conv2d(3, 8, 3)},
    ),
}


def letters_of(model: nn.Module, x: Any, **options: Any) -> str:
    return begin(model, x, None, masks=True, **options).batch.pixels.axes.letters


def made(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Way(case.run, **{name: make() for name, make in case.layers.items()}).eval()
    return model, 5 * torch.rand(case.shape)


@pytest.mark.parametrize("name", CASES)
def test_the_letters(name):
    model, x = made(CASES[name])
    model(x)  # it runs
    assert letters_of(model, x) == CASES[name].letters
    assert letters_of(model, 0 * x) == CASES[name].letters


@pytest.mark.parametrize("name", ["channels last", "frames as the batch", "no channels", "recurrent layer"])
def test_what_is_beside_the_input_does_not_matter(name):
    """A companion input that other layers take first, in a tuple and in a mapping."""
    case = CASES[name]
    layers = {name: make() for name, make in case.layers.items()}

    def run(s: Any, x: Tensor, age: Tensor, ids: Tensor) -> Tensor:
        beside = s.words(ids).sum(1) + s.two(s.one(age))
        return case.run(s, x) + beside.sum()

    model = Way(run, **layers, one=nn.Linear(1, 3), two=nn.Linear(3, 3), words=nn.Embedding(9, 3)).eval()
    x = 5 * torch.rand(case.shape)
    beside = torch.rand(2, 1), torch.tensor([[1, 2], [3, 4]])
    assert letters_of(model, (x, *beside)) == case.letters
    assert letters_of(model, (x, *beside), masked=0) == case.letters


# ----------------------------------------------------------------------------------------------- what it must not do


def test_the_random_state_and_the_caller_see_nothing():
    model, x = made(CASES["channels last"])
    calls = []
    model.eval().count = 0
    before, given = torch.get_rng_state(), x.clone()
    camfn.mean_cam(model, "c", x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, given)
    assert not calls


RUNS: list[Any] = []
"""What forward passes saw. A list in a closure would be copied."""


def test_the_usual_order_needs_no_forward_pass():
    RUNS.clear()

    def run(s: Any, x: Tensor) -> Tensor:
        RUNS.append(tuple(x.shape))
        return mean(s.c(x))

    model = Way(run, c=conv()()).eval()
    begin(model, torch.rand(2, 3, 8, 12), None)
    assert not RUNS
    begin(model, torch.rand(2, 3, 3, 3), None)
    assert RUNS


def test_the_forward_passes_stop_at_the_first_layers():
    RUNS.clear()

    def run(s: Any, x: Tensor) -> Tensor:
        z = s.c(x.permute(LAST))
        for _ in range(8):
            z = s.z(z)
        RUNS.append("the end")
        return mean(z)

    begin(Way(run, c=conv()(), z=conv(4)()), torch.rand(2, 8, 8, 3), None)
    assert not RUNS


def test_a_batch_norm_in_train_mode_and_a_model_of_one_batch_size():
    def run(s: Any, x: Tensor) -> Tensor:
        assert len(x) == 2, "another batch size"
        return mean(s.c(s.b(x.permute(LAST))))

    model = Way(run, c=conv()(), b=nn.BatchNorm2d(3)).train()
    moments = model.b.running_mean.clone()
    assert letters_of(model, torch.rand(2, 8, 8, 3)) == "nhwc"
    assert torch.equal(model.b.running_mean, moments)


# ----------------------------------------------------------------------------------------------------------- in doubt


def test_an_order_that_no_layer_shows_names_the_readings():
    by_hand = Way(lambda s, x: x.flatten(1) @ s.w.weight, w=nn.Linear(4, 192))
    with pytest.raises(CamError) as error:
        camfn.rise(by_hand, None, torch.rand(2, 8, 8, 3))
    assert str(error.value) == (
        'the order of the input\'s axes is not known: it can be read in 2 ways: pass axes="nchw" or axes="nhwc" (n images, '
        "c channels, t time, d depth, h, w)"
    )
    assert letters_of(by_hand, torch.rand(2, 8, 8, 3), axes="nhwc") == "nhwc"


@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 4, 3, 8, 8), (2, 2, 4, 3, 8, 8)])
def test_an_unknown_order_is_an_error_only_where_it_matters(shape):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.fc = nn.Tanh(), nn.Parameter(torch.randn(1, 5))

        def forward(self, x: Tensor):
            return self.features(x).flatten(1).mean(1, keepdim=True) @ self.fc

    x = torch.rand(shape)
    found = camfn.mean_cam(Odd(), "features", x, 1, layout="channels_first")
    assert found.shape == (2, *shape[2:])
    with pytest.raises(CamError, match=r'^size="input": the order of the input.s axes is not known: .*pass axes='):
        camfn.mean_cam(Odd(), "features", x, 1, layout="channels_first", size="input")
    with pytest.raises(CamError, match=r"^the order of the input's axes is not known: .*pass axes="):
        camfn.score_cam(Odd(), "features", x, 1, layout="channels_first")


def test_a_wrong_rank_is_complained_of_only_where_the_forward_failed():
    strict = Way(lambda s, x: mean(s.norm(s.features(x))), features=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)).double()
    with pytest.raises(CamError, match=r"x has shape \(3, 8, 12\), and Conv2d wants 4 axes.*is the batch axis missing"):
        camfn.grad_cam(strict, "features", torch.rand(3, 8, 12, dtype=torch.float64))
    torch.manual_seed(0)
    flat = seeded(
        Way(lambda s, x: mean(s.features(x.unflatten(1, (3, -1)).unflatten(2, (8, 12)))), features=nn.Conv2d(3, 4, 3))
    )
    x = torch.rand(2, 288, dtype=torch.float64)
    assert camfn.grad_cam(flat.eval(), "features", x, 1, layout="channels_first").shape == (2, 6, 10)


# ---------------------------------------------------------------------------------------------------- whole networks


def transformer(name: str, kind: str, **options: Any) -> nn.Module:
    torchvision_models()  # transformers imports torchvision
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 5}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**small, **options}, attn_implementation="eager")
    return seeded(getattr(transformers, kind)(config)).eval()


AST = {"num_mel_bins": 32, "max_length": 48, "frequency_stride": 8, "time_stride": 8, "patch_size": 8}


class Video(nn.Module):
    """With channels before frames, for a model that wants them behind."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor):
        return self.model(x.transpose(1, 2))


def test_videomae_is_masked_like_its_turned_twin():
    model = transformer("VideoMAE", "VideoMAEForVideoClassification", image_size=32, patch_size=8, num_frames=4)
    x = torch.randn(1, 4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert letters_of(model, {"pixel_values": x}) == "ntchw"
    layer = "videomae.layers.0" if hasattr(model.videomae, "layers") else "videomae.encoder.layer.0"
    layout = camfn.layouts.tokens((2, 4, 4), 0)
    found = camfn.score_cam(model, layer, {"pixel_values": x}, 1, layout=layout, normalize=False, size="input")
    expected = camfn.score_cam(
        Video(model), f"model.{layer}", x.transpose(1, 2), 1, layout=layout, normalize=False, size="input"
    )
    close(found, expected, units=2**16)
    assert found.shape == (1, 4, 32, 32)
    close(camfn.score_cam(model, layer, {"pixel_values": x}, 1, normalize=False, size="input"), found, units=2**16)


def test_timesformer_with_a_function_for_its_tokens():
    model = transformer("Timesformer", "TimesformerForVideoClassification", image_size=32, patch_size=8, num_frames=4)
    x = torch.randn(1, 4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert letters_of(model, {"pixel_values": x}) == "ntchw"

    def tokens(z: Tensor) -> Tensor:
        return z[:, 1:].unflatten(1, (16, 4)).permute(0, 3, 2, 1).unflatten(3, (4, 4))  # its frames are the inner axis

    layer = "timesformer.encoder.layer.0"
    found = camfn.score_cam(model, layer, {"pixel_values": x}, 1, layout=tokens, normalize=False, size="input")
    expected = camfn.score_cam(
        Video(model), f"model.{layer}", x.transpose(1, 2), 1, layout=tokens, normalize=False, size="input", axes="ncthw"
    )
    close(found, expected, units=2**16)
    assert found.shape == (1, 4, 32, 32)
    with pytest.raises(CamError, match=r"its positions do not follow those of the input|ways that fit equally well|no grid"):
        camfn.score_cam(model, layer, {"pixel_values": x}, 1)


def test_a_spectrogram_transformer_is_masked():
    model = transformer("AST", "ASTForAudioClassification", **AST)
    x = {"input_values": torch.randn(1, 48, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))}
    assert letters_of(model, x) == "nwh"  # the convolution gets (n, 1, frequency, time)

    class Picture(nn.Module):
        """The same, of pictures (n, 1, frequency, time)."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x: Tensor):
            return self.model(x[:, 0].mT)

    name = next(name for name, _ in model.named_modules() if name.endswith(("layers.0", "layer.0")))
    for function in (camfn.score_cam, functools.partial(camfn.rise, num_samples=20, cells=3)):
        layer = name if function is camfn.score_cam else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", camfn.CamWarning)
            found = function(model, layer, x, 1, normalize=False, size="input")
            twin = function(
                Picture(), layer and f"model.{layer}", x["input_values"].mT[:, None], 1, normalize=False, size="input"
            )
        close(found, twin, units=2**16)
        assert found.shape == (1, 32, 48)


def test_the_default_device_does_not_matter():
    model, x = Way(lambda s, x: mean(s.c(x.permute(LAST))), c=conv()()).eval(), torch.rand(2, 8, 12, 3)
    with torch.device("meta"):
        task = begin(model, x, None)
    assert task.batch.pixels.axes.letters == "nhwc"


class Einsum(nn.Module):
    """No layer that knows its channels, which are last."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nhwc,ck->nk", x.tanh(), self.weight)


@pytest.mark.parametrize("c", [3, 6])
def test_without_a_layer_that_shows_them_the_axes_are_no_guess(c):
    model, x = Einsum(c).eval(), torch.randn(1, 20, 24, c)
    with pytest.raises(CamError, match=r'can be read in 2 ways: pass axes="nchw" or axes="nhwc"'):
        camfn.rise(model, None, x, 1, num_samples=2)
    assert camfn.rise(model, None, x, 1, num_samples=2, axes="nhwc").shape == (1, 20, 24)


@pytest.mark.parametrize("sides", [(2, 1), (1, 2), (5, 1), (1, 1)])
def test_axes_of_length_one_are_where_they_are(sides):
    """No change tells them apart, and the linear layer behind the convolution knows nothing of them."""
    layers = {"c": conv(1), "fc": lambda: nn.Linear(4 * sides[0] * sides[1], 3)}
    model = Way(lambda s, x: s.fc(s.c(0.5 * x).flatten(1)), **{name: make() for name, make in layers.items()}).eval()
    assert begin(model, torch.rand(2, 1, *sides), None).batch.pixels.axes.letters == "nchw"

"""Attention written out: what it sees, what it must not take for attention, and gradients there."""

import copy
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camfn
from camfn._compat import constant
from camfn.model.attention import Attention, attended, blocks_of, self_attention
from camfn.model.capture import pure_from
from camfn.model.prepare import opened
from tests.oracles.closeness import assert_close, close
from tests.oracles.libraries import torchvision_models
from tests.oracles.networks import inputs
from tests.oracles.vits import MAKERS, hooked, logits, randomised, told, unfused, vit


def written_out(model: nn.Module, x: Tensor, **options) -> tuple[Tensor, Attention]:
    output, attention = attended(lambda: model(x), **options)
    return logits(output), self_attention(attention, len(x))


# ----------------------------------------------------------------------------------------------------------- what is seen


@pytest.mark.parametrize("name", MAKERS)
def test_it_sees_what_the_library_tells(name):
    model, x = vit(name), inputs(2, side=32)
    with torch.no_grad():
        theirs, plain = told(model, x), logits(model(x))
        output, attention = written_out(model, x)
    assert len(theirs) == len(attention.seen) == 3
    dtype = torch.float32 if name in ("ViT, sdpa", "CLIP, sdpa") else None  # of their eager softmax, whatever the model is
    for ours, told_ in zip(attention.seen, theirs):
        close(ours, told_, dtype=dtype)
        assert float(ours.std()) * ours.shape[-1] > 0.5, "attention that is the same everywhere shows nothing"
    close(output, plain)


@pytest.mark.parametrize("name", MAKERS)
def test_the_logits_are_those_of_the_softmax(name):
    with torch.no_grad():
        _, attention = written_out(vit(name), inputs(2, side=32))
    for seen, scaled in zip(*attention):
        close(torch.softmax(scaled, -1), seen, dtype=torch.float32 if "eager" in name else None)


@pytest.mark.parametrize("name", ["timm", "BEiT", "EVA", "DeiT, distilled"])
def test_fused_and_eager_attention_are_seen_alike(name):
    model, x = vit(name), inputs(2, side=32)
    with torch.no_grad():
        fused, eager = written_out(model, x)[1], written_out(unfused(model), x)[1]
    for ours, theirs in zip((*fused.seen, *fused.logits), (*eager.seen, *eager.logits)):
        close(ours, theirs)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention_in_every_form(need_weights, batch_first):
    layer = randomised(nn.MultiheadAttention(8, 4, batch_first=batch_first, dropout=0.3))
    x = inputs(5, side=8)[:, :, :, 0].movedim(1, 0 if not batch_first else 1)  # three tokens of five images, of width 8
    padding = torch.zeros(5, 3, dtype=torch.float64)
    padding[0, 2] = -math.inf
    mask = torch.full((3, 3), -math.inf).triu(1).double()

    def run():
        return layer(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=need_weights)

    with torch.no_grad():
        plain, theirs = layer(x, x, x, key_padding_mask=padding, attn_mask=mask, average_attn_weights=False)
        (output, told_), attention = attended(run)
    (seen,) = self_attention(attention, 5).seen
    close(seen, theirs)
    close(output, plain)
    assert (told_ is None) is (not need_weights)


def test_the_transformer_layers_of_torch():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    encoder = randomised(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    x = inputs(2, side=8)[:, :, 0]
    with torch.no_grad():
        (a, b), plain = told(encoder, x), encoder(x)
        output, attention = written_out(encoder, x)
        by_private, of_private = attended(lambda: pure_from(opened(encoder).borrow())(camfn.state_of(encoder), x))
    for seen in (attention.seen, of_private.seen):
        close(seen[0], a)
        close(seen[1], b)
    close(output, plain)
    close(by_private, plain)


class Written(nn.Module):
    """Attention written by hand, in one of the ways people write it; `seen` is the matrix the values were weighed by."""

    WAYS = ("matmul", "bmm", "einsum", "einsum turned", "einsum of a list", "functional", "module", "after casts", "flattened")

    def __init__(self, way: str, heads: int = 2, width: int = 4) -> None:
        super().__init__()
        self.way, self.heads = way, heads
        self.qkv = nn.Linear(width * heads, 3 * width * heads)
        self.softmax = nn.Softmax(-1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scaled = q @ k.mT / 2
        if self.way in ("bmm", "flattened"):
            return self._three_axes(scaled, v)
        attention = {
            "module": lambda: self.softmax(scaled),
            "functional": lambda: F.softmax(scaled, dim=3),
            "after casts": lambda: F.softmax(scaled, -1, dtype=torch.float32).to(x.dtype).contiguous() * 1.0,
        }.get(self.way, lambda: scaled.softmax(-1))()
        attention = self.drop(attention)
        self.seen = attention.detach().clone()
        return (
            {
                "einsum": lambda: torch.einsum("bhqk, bhkd -> bhqd", attention, v),
                "einsum turned": lambda: torch.einsum("bhjd,bhij->bhid", v, attention),
                "einsum of a list": lambda: torch.einsum("...qk,...kd->...qd", [attention, v]),
                "functional": lambda: torch.matmul(attention, v),
            }.get(self.way, lambda: attention @ v)()
            .transpose(1, 2)
            .flatten(2)
        )

    def _three_axes(self, scaled: Tensor, v: Tensor) -> Tensor:
        """One head: three axes. Several in one axis with the batch, as older libraries had it."""
        if self.way == "bmm":
            attention = torch.softmax(scaled[:, 0], -1)
            self.seen = attention.detach()[:, None]
            return torch.bmm(attention, v[:, 0])
        attention = torch.softmax(scaled.flatten(0, 1), -1).view(scaled.shape).flatten(0, 1)
        self.seen = attention.detach().view(scaled.shape)
        return torch.bmm(attention, v.flatten(0, 1)).unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("way", Written.WAYS)
def test_attention_written_by_hand(way):
    model = randomised(Written(way))
    x = inputs(3, side=8)[:, :, 0]
    with torch.no_grad():
        plain = model(x)
        output, attention = attended(lambda: model(x))
    assert torch.equal(output, plain)
    (seen,) = attention.seen
    if way == "flattened":  # whose heads are they? A library's own module tells, a bare product does not
        assert_close(seen.reshape(model.seen.shape), model.seen, 0)
        with pytest.raises(camfn.CamError, match="shape \\(6, 1, 3, 3\\) for a batch of 3"):
            self_attention(attention, 3)
    else:
        assert_close(seen, model.seen, 0)
        self_attention(attention, 3)


@pytest.mark.parametrize("way", Written.WAYS)
def test_a_nudge_goes_on_to_the_values(way):
    model = randomised(Written(way))
    x = inputs(3, side=8)[:, :, 0]
    with torch.no_grad():
        plain, attention = attended(lambda: model(x))
        nudge = torch.randn(attention.seen[0].shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
        nudged, again = attended(lambda: model(x), [nudge])
        values = model.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)[2]
        if way == "bmm":
            expected = (nudge[:, 0]) @ values[:, 0]
        else:
            expected = (nudge.reshape(values.shape[:2] + nudge.shape[2:]) @ values).transpose(1, 2).flatten(2)
    close(nudged - plain, expected, dtype=torch.float32 if way == "after casts" else None)
    assert torch.equal(again.seen[0], attention.seen[0]), "what is seen is what the model made, without the nudge"


# --------------------------------------------------------------------------------------- scaled_dot_product_attention


def qkv(q: int = 5, heads: int = 4, kv_heads: int | None = None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, count, q, 8, generator=generator, dtype=torch.float64).to(dtype)
        for count in (heads, kv_heads or heads, kv_heads or heads)
    ]


GENERATOR = torch.Generator().manual_seed(7)
MASKS = {
    "none": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.rand(2, 1, 5, 5, generator=GENERATOR) > 0.4},
    "a row with nothing": {"attn_mask": torch.tensor([[True] * 5, [False] * 5, *[[True] * 5] * 3])},
    "float": {"attn_mask": torch.randn(5, 5, generator=GENERATOR, dtype=torch.float64)},
    "positional": {},
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_and_scales(kind):
    q, k, v = qkv()
    options = MASKS[kind]
    if kind == "positional":
        mask = MASKS["bool"]["attn_mask"]
        plain, (output, attention) = (
            F.scaled_dot_product_attention(q, k, v, mask, 0.0, False),
            attended(lambda: F.scaled_dot_product_attention(q, k, v, mask, 0.0, False)),
        )
    else:
        plain = F.scaled_dot_product_attention(q, k, v, **options)
        output, attention = attended(lambda: F.scaled_dot_product_attention(q, k, v, **options))
    close(output, plain)
    eye = torch.eye(5, dtype=torch.float64).expand(2, 4, 5, 5)  # with one-hot values the output is the probabilities
    mask = options if kind != "positional" else {"attn_mask": MASKS["bool"]["attn_mask"]}
    close(attention.seen[0], F.scaled_dot_product_attention(q, k, eye, **mask))


@pytest.mark.skipif("enable_gqa" not in F.scaled_dot_product_attention.__doc__, reason="this torch has no grouped queries")
def test_grouped_queries():
    q, k, v = qkv(kv_heads=2)
    plain = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    output, attention = attended(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    close(output, plain)
    assert attention.seen[0].shape == (2, 4, 5, 5)
    whole = torch.softmax(q @ k.repeat_interleave(2, 1).mT / math.sqrt(8), -1)
    close(attention.seen[0], whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_a_narrow_dtype_the_softmax_is_in_float32(dtype):
    q, k, v = (4 * t for t in qkv(dtype=dtype))
    output, attention = attended(lambda: F.scaled_dot_product_attention(q, k, v))
    assert output.dtype == dtype
    assert attention.seen[0].dtype == torch.float32
    exact = torch.softmax(q.double() @ k.double().mT / math.sqrt(8), -1)
    assert_close(attention.seen[0], exact, 1e-5)
    assert_close(output, exact @ v.double(), 0.02 if dtype == torch.float16 else 0.15)


def test_under_autocast_the_probabilities_are_exact_too():
    q, k, v = (4 * t for t in qkv(dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, attention = attended(lambda: F.scaled_dot_product_attention(q, k, v))
    assert_close(attention.seen[0], torch.softmax(q.double() @ k.double().mT / math.sqrt(8), -1), 1e-5)


def test_dropout_that_draws_is_refused():
    q, k, v = qkv()
    with pytest.raises(camfn.CamError, match=r"draws random numbers in eval mode \(dropout_p=0.1\)"):
        attended(lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1))


# ------------------------------------------------------------------------------------------------ what is not attention


class Routed(nn.Module):
    """A square softmax of tokens over experts, a softmax over classes, a codebook, gates: none is attention."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.attention = Written("matmul")
        self.route = nn.Linear(8, 3)
        self.experts = nn.Linear(8, 24)
        self.codes = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        weights = self.route(x).softmax(-1)  # (n, 3 tokens, 3 experts): square, like attention
        outs = self.experts(x).unflatten(-1, (3, 8))  # (n, tokens, experts, 8)
        if self.kind == "experts":
            x = torch.einsum("nte,nted->ntd", weights, outs)
        elif self.kind == "experts by hand":
            x = (weights[..., None] * outs).sum(2)
        elif self.kind == "codebook":
            x = weights @ self.codes
        elif self.kind == "codebook by einsum":
            x = torch.einsum("nte,ed->ntd", weights, self.codes)
        elif self.kind == "gates":
            x = torch.softmax(x, -1) * x
        elif self.kind == "over queries":
            x = self.route(x).softmax(1) @ x
        elif self.kind == "classes":
            return torch.softmax(x.mean(1), -1)
        elif self.kind == "classes, a matrix product":
            return torch.softmax(x.mean(1), -1) @ torch.eye(8, dtype=x.dtype)
        return x.mean(1)


KINDS = (
    "experts",
    "experts by hand",
    "codebook",
    "codebook by einsum",
    "gates",
    "over queries",
    "classes",
    "classes, a matrix product",
)


@pytest.mark.parametrize("kind", KINDS)
def test_another_softmax_is_not_taken_for_attention(kind):
    model, x = randomised(Routed(kind)), inputs(2, side=8)[:, :, 0]
    with torch.no_grad():
        plain = model(x)
        output, attention = attended(lambda: model(x))
    assert len(attention.seen) == 1
    assert torch.equal(attention.seen[0], model.attention.seen)
    assert torch.equal(output, plain)


class TalkingHeads(nn.Module):
    """Heads are mixed after the softmax, with the axes moved."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        attention = (q @ q.mT).softmax(-1)
        return self.mix(attention.movedim(1, -1)).movedim(-1, 1) @ q


def test_attention_that_cannot_be_followed_is_an_error():
    model, x = randomised(TalkingHeads()), inputs(2, side=8)[:, :, 0]
    with pytest.raises(camfn.CamError, match=r"a softmax of shape \(2, 2, 3, 3\) looks like attention"):
        attended(lambda: model(x))


def test_a_model_without_attention():
    _, attention = attended(lambda: torch.ones(2))
    with pytest.raises(camfn.CamError, match="no attention that could be seen"):
        self_attention(attention, 2)


def test_cross_attention_is_an_error():
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval()
    with pytest.raises(camfn.CamError, match=r"attention of 3 queries to 5 keys \(shape \(2, 2, 3, 5\)\)"):
        attended(lambda: layer(torch.ones(2, 3, 8), torch.ones(2, 5, 8)))


def test_windows_are_an_error():
    models = torchvision_models()
    model = models.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4], num_classes=3).double().eval()
    with torch.no_grad():
        _, attention = attended(lambda: model(inputs(2, side=32)))
    with pytest.raises(camfn.CamError, match=r"shape \(8, 1, 16, 16\) for a batch of 2: it is over windows"):
        self_attention(attention, 2)


def test_a_number_of_tokens_that_changes_is_an_error():
    tokens = [torch.ones(2, 1, count, 8) for count in (9, 9, 4)]
    _, attention = attended(lambda: [F.scaled_dot_product_attention(t, t, t) for t in tokens])
    with pytest.raises(camfn.CamError, match=r"changes from layer to layer \(9, 4\)"):
        self_attention(attention, 2)


# ------------------------------------------------------------------------------------------------------------ gradients


def test_the_gradient_is_that_at_the_attention():
    """Of autograd at the very tensor, through a plain hook of an eager copy."""
    model, x = vit("timm"), inputs(2, side=32)
    output, probabilities, _, _ = hooked(model, x)
    theirs = torch.autograd.grad(output[:, 3].sum(), probabilities)
    for each in (model, unfused(model)):
        zeros: list[Tensor] = []

        def zero(seen, zeros=zeros):
            zeros.append(torch.zeros_like(seen, requires_grad=True))
            return zeros[-1]

        nudged, _ = attended(lambda each=each: each(x), zero)
        for ours, expected in zip(torch.autograd.grad(nudged[:, 3].sum(), zeros), theirs):
            close(ours, expected)
            assert float(expected.abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["torchvision", "timm", "DeiT, distilled", "BEiT", "EVA", "DINOv2, sdpa"])
def test_the_gradient_equals_finite_differences(name):
    """Of the library's own eager attention, changed by a plain hook where there is one, else by the nudge."""
    model, x = vit(name), inputs(1, side=32)
    shapes = [seen.shape for seen in written_out(model, x)[1].seen]
    found = torch.func.grad(lambda *nudges: written_out(model, x, nudge=nudges)[0][:, 3].sum(), argnums=(0, 1, 2))(
        *[torch.zeros(shape, dtype=x.dtype) for shape in shapes]
    )
    generator = torch.Generator().manual_seed(3)
    for layer, gradient in enumerate(found):
        way = torch.randn(shapes[layer], dtype=x.dtype, generator=generator)
        step = 1e-5
        with torch.no_grad():
            high, low = (_changed(model, x, layer, sign * step * way) for sign in (1, -1))
        numeric = (high - low)[:, 3].sum() / (2 * step)
        assert_close((gradient * way).sum(), numeric, 1e-7 * max(1, float(numeric.abs())))


def _changed(model: nn.Module, x: Tensor, layer: int, change: Tensor) -> Tensor:
    """The model's output with a change of one layer's probabilities."""
    model = unfused(model)
    drops = [module.attn_drop for module in model.modules() if hasattr(module, "attn_drop")]
    if not drops:
        nudges = [change if i == layer else torch.zeros_like(change) for i in range(3)]
        return written_out(model, x, nudge=nudges)[0]
    drops[layer].register_forward_hook(lambda _, args, out: out + change)
    return logits(model(x))


@pytest.mark.parametrize("fused", [True, False])
def test_held_attention_lets_gradients_pass_by_the_residual_stream_alone(fused):
    """As the authors of AG-CAM have it: what goes into every attention is detached."""
    model, x = vit("timm"), inputs(2, side=32)
    output, probabilities, _, _ = hooked(model, x, detached=True)
    theirs = torch.autograd.grad(output[:, 3].sum(), probabilities)
    run = model if fused else unfused(model)
    zeros = [torch.zeros_like(p) for p in probabilities]

    def score(*nudges):
        return attended(lambda: run(x), nudges, held=True)[0][:, 3].sum()

    for ours, expected in zip(torch.func.grad(score, argnums=(0, 1, 2))(*zeros), theirs):
        close(ours, expected)
    whole = torch.func.grad(lambda *n: attended(lambda: run(x), n)[0][:, 3].sum(), argnums=(0,))(*zeros)[0]
    assert float((whole - theirs[0]).detach().abs().max()) > 1e-3, "and the whole gradient is another"


def test_constant_is_one_to_the_innermost_gradient_only():
    def inner(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: y * constant(y * x))(x)  # to y alone: x * y, at y = x

    x = torch.tensor(3.0)
    assert inner(x) == 9
    assert torch.func.grad(inner)(x) == 6


# --------------------------------------------------------------------------------------------------- pure, and in threads


def test_it_leaves_the_model_and_the_thread_as_they_were():
    model, x = vit("timm"), inputs(2, side=32)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="stop"):
        attended(lambda: (model(x), (_ for _ in ()).throw(RuntimeError("stop"))))
    attended(lambda: model(x))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch._C._len_torch_function_stack() == 0


def test_threads_see_their_own_attention_only():
    model = vit("timm")
    images = [inputs(1, side=32, seed=seed) for seed in range(8)]
    with torch.no_grad():
        alone = [written_out(model, x)[1].seen for x in images]
    found: dict[int, list] = {i: [] for i in range(8)}

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found[i].append(written_out(model, images[i])[1].seen)
                assert len(attended(lambda: torch.ones(1))[1].seen) == 0

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, runs in found.items():
        assert len(runs) == 5
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, alone[i]))


# --------------------------------------------------------------------------------------------------------------- blocks


BLOCKS = {
    "torchvision": "encoder.layers.encoder_layer_{}",
    "timm": "blocks.{}",
    "BEiT": "blocks.{}",
    "ViT, sdpa": None,
    "CLIP, eager": "vision_model.encoder.layers.{}",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_blocks_around_attention(name):
    model, x = vit(name), inputs(1, side=32)
    found, axis = blocks_of(model, camfn.state_of(model), x, len(x))
    assert axis == 1
    if BLOCKS[name]:
        assert found == [BLOCKS[name].format(i) for i in range(3)]
    kinds = {type(model.get_submodule(block)) for block in found}
    assert len(found) == 3
    assert len(kinds) == 1
    assert "Layer" in next(iter(kinds)).__name__ or "Block" in next(iter(kinds)).__name__


def test_blocks_that_are_not_in_a_row():
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Sequential(Written("matmul"), Written("matmul"))
            self.other = Written("matmul")

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.pair(x)).mean(1)

    model = randomised(Three())
    with pytest.raises(camfn.CamError, match=r"3 attention layers are not in one row.*found 'pair.0', 'pair.1', 'other'"):
        blocks_of(model, camfn.state_of(model), inputs(1, side=8)[:, :, 0], 1)

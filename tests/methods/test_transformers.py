"""Methods that follow attention, held to loops written from the papers on attention that plain hooks caught."""

import collections
import copy
import dataclasses
import math
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camfn
from tests.oracles.closeness import assert_close, close
from tests.oracles.libraries import torchvision_models
from tests.oracles.networks import inputs
from tests.oracles.vits import MAKERS, TIMM, Patches, hooked, logits, randomised, told, unfused, vit

T = camfn.targets
METHODS = ("attention_rollout", "gradient_attention", "legrad", "ag_cam")
every_method = pytest.mark.parametrize("method", METHODS)


def raw(method: str, model: nn.Module, x: Tensor, target=3, **options) -> Tensor:
    return getattr(camfn, method)(model, None, x, target, **{"normalize": False, **options})


PASSED = []
"""How many inputs went through, forward by forward. A global: camfn runs a copy of the model and of what its hooks hold."""


def embedding(c: int) -> Callable:
    """A target of a model that gives embeddings and no classes."""
    return lambda output: output.image_embeds[c]


# ------------------------------------------------------------------------------------------------- loops from the papers


def paper_rollout(probabilities: list[Tensor], start: int = 0) -> Tensor:
    """Section 2: `W = (A + I) / 2` of attention averaged over heads; multiplied up. All rows, one image after the other."""
    maps = []
    for i in range(len(probabilities[0])):
        product = torch.eye(probabilities[0].shape[-1], dtype=torch.float64)
        for layer in probabilities[start:]:
            mixed = (layer[i].mean(0) + torch.eye(layer.shape[-1], dtype=torch.float64)) / 2
            product = mixed @ product
        maps.append(product)
    return torch.stack(maps)


def paper_gradient_attention(output: Tensor, probabilities: list[Tensor], classes: list[int]) -> Tensor:
    """Equations 5 and 6, one image after the other, as the authors' notebook for ViT goes."""
    maps = []
    for i, c in enumerate(classes):
        gradients = torch.autograd.grad(output[i, c], probabilities, retain_graph=True)
        relevance = torch.eye(probabilities[0].shape[-1], dtype=torch.float64)
        for attention, gradient in zip(probabilities, gradients):
            weighed = (gradient[i] * attention[i]).clamp(min=0).mean(0)
            relevance = relevance + weighed @ relevance
        maps.append(relevance.detach())
    return torch.stack(maps)


def paper_ag_cam(output: Tensor, probabilities: list[Tensor], scaled: list[Tensor], classes: list[int]) -> Tensor:
    """The class token's rows, of gradients that pass no other attention (the graph is made so), as in the authors' code."""
    maps = []
    for i, c in enumerate(classes):
        gradients = torch.autograd.grad(output[i, c], probabilities, retain_graph=True)
        total = torch.zeros(scaled[0].shape[-1], dtype=torch.float64)
        for logits_, gradient in zip(scaled, gradients):
            for head in range(logits_.shape[1]):
                total += gradient[i, head, 0].relu() * torch.sigmoid(logits_[i, head, 0].detach())
        maps.append(total)
    return torch.stack(maps)


def paper_legrad(score: Callable[[Tensor], Tensor], probabilities: list[Tensor], outputs: list[Tensor]) -> Tensor:
    """Each layer's own score, of its mean token, and that score's gradient at that layer's attention: `(n, q)`."""
    maps = []
    for attention, tokens in zip(probabilities, outputs):
        (gradient,) = torch.autograd.grad(score(tokens.mean(1)).sum(), attention, retain_graph=True)
        maps.append(gradient.clamp(min=0).mean(1).mean(1))
    return torch.stack(maps).mean(0)


def test_rollout_is_the_papers():
    model, x = vit("timm"), inputs(2, side=32)
    with torch.no_grad():
        theirs = paper_rollout(told(model, x))[:, 0, 1:].unflatten(1, (4, 4))
    close(raw("attention_rollout", model, x), theirs)


@pytest.mark.parametrize("name", [name for name in MAKERS if "registers" not in name])
def test_rollout_of_every_library(name):
    """The rows of the tokens that the head reads: said here for each library, found out by the method."""
    model, x = vit(name), inputs(2, side=32)
    rows = {
        "DeiT, distilled": slice(0, 2),  # the mean of two heads, on two tokens
        "BEiT": slice(1, None),  # the mean of the patches; its class token is read by nobody
        "EVA": slice(1, None),
        "DINOv2, sdpa": slice(None),  # the class token, and the mean of the patches
    }.get(name, slice(0, 1))
    prefix = 2 if name == "DeiT, distilled" else 1
    with torch.no_grad():
        theirs = paper_rollout(told(model, x))[:, rows, prefix:].mean(1).unflatten(1, (4, 4))
    ours = raw("attention_rollout", model, x, embedding(2) if "CLIP" in name else None)
    close(ours, theirs, dtype=torch.float32 if "ViT," in name or "CLIP" in name else None)


def test_gradient_attention_is_the_papers():
    model, x = vit("timm"), inputs(2, side=32)
    output, probabilities, _, _ = hooked(model, x)
    theirs = paper_gradient_attention(output, probabilities, [3, 1])[:, 0, 1:].unflatten(1, (4, 4))
    close(raw("gradient_attention", model, x, [3, 1]), theirs)
    one_class = paper_gradient_attention(output, probabilities, [1, 1])[:, 0, 1:].unflatten(1, (4, 4))
    assert float((one_class - theirs)[0].abs().max()) > 1e-3, "another class has another map"


def test_ag_cam_is_the_papers():
    model, x = vit("timm"), inputs(2, side=32)
    output, probabilities, scaled, _ = hooked(model, x, detached=True)
    theirs = paper_ag_cam(output, probabilities, scaled, [3, 1])[:, 1:].unflatten(1, (4, 4))
    close(raw("ag_cam", model, x, [3, 1]), theirs)
    close(raw("ag_cam", unfused(model), x, [3, 1]), theirs)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_legrad_is_the_papers(pool):
    model = randomised(MAKERS["timm"]()) if pool == "token" else vit_of_means()
    x = inputs(2, side=32)
    _, probabilities, _, outputs = hooked(model, x)
    classes = torch.tensor([3, 1])

    def score(mean: Tensor) -> Tensor:
        return model.head(model.fc_norm(model.norm(mean))).gather(1, classes[:, None])

    theirs = paper_legrad(score, probabilities, outputs)[:, 1:].unflatten(1, (4, 4))
    close(raw("legrad", model, x, classes), theirs)


def vit_of_means() -> nn.Module:
    """The head takes the mean of the patches; there is a class token all the same."""
    torchvision_models()
    make = pytest.importorskip("timm").models.vision_transformer.VisionTransformer
    return randomised(make(**{**TIMM, "global_pool": "avg", "class_token": True}))


@pytest.mark.parametrize("start", [0, -2])
def test_legrad_equals_torchcam(start):
    methods = pytest.importorskip("torchcam.methods")
    model, x = vit("torchvision"), inputs(1, side=32)
    blocks = list(model.encoder.layers)[start:]
    with methods.LeGrad(
        copy.deepcopy(model), [f"encoder.layers.encoder_layer_{3 - i}" for i in range(len(blocks), 0, -1)]
    ) as extractor:
        scores = extractor.model(x)
        theirs = extractor(3, scores, normalized=False)[0]
    close(raw("legrad", model, x, start=start), theirs)


def test_legrad_of_hugging_face():
    model, x = vit("ViT, sdpa"), inputs(2, side=32)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    found = eager(x, output_attentions=True, output_hidden_states=True)

    def score(mean: Tensor) -> Tensor:
        return eager.classifier(eager.vit.layernorm(mean))[:, 3]

    theirs = paper_legrad(score, list(found.attentions), list(found.hidden_states[1:]))[:, 1:].unflatten(1, (4, 4))
    assert_close(raw("legrad", model, x), theirs, 1e-6)


# ------------------------------------------------------------------------------------- what reaches where: closed forms


class Copying(nn.Module):
    """Attention of one layer whose keys are its input's; the output reads one token, or the mean of them."""

    def __init__(self, reads: int | None) -> None:
        super().__init__()
        self.reads = reads
        self.first = nn.TransformerEncoderLayer(4, 1, 4, batch_first=True)
        self.second = nn.TransformerEncoderLayer(4, 1, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.second(self.first(x.flatten(2).mT))
        return tokens.mean(1) if self.reads is None else tokens[:, self.reads]


@every_method
@pytest.mark.parametrize("reads", [None, 2])
def test_a_class_token_is_where_the_output_reads(method, reads):
    """There is no class token in it: which token counts is told by what the output depends on."""
    model = randomised(Copying(reads))
    x = inputs(2, side=12)[:, :, :6, :6].repeat(1, 2, 1, 1)[:, :4]
    with torch.no_grad():
        attention = paper_rollout(told(model, x))
    if method == "attention_rollout":
        theirs = attention.mean(1) if reads is None else attention[:, reads]
        close(raw(method, model, x), theirs.unflatten(1, (6, 6)))
    assert raw(method, model, x).shape == (2, 6, 6)


def test_query_takes_the_row_of_a_token():
    model, x = vit("timm"), inputs(2, side=32)
    with torch.no_grad():
        rolled = paper_rollout(told(model, x))
    for query in (0, 5, 16, -1):
        theirs = rolled[:, query, 1:].unflatten(1, (4, 4))
        close(raw("attention_rollout", model, x, query=query), theirs)
    output, probabilities, _, _ = hooked(model, x)
    theirs = paper_gradient_attention(output, probabilities, [3, 3])[:, 7, 1:].unflatten(1, (4, 4))
    close(raw("gradient_attention", model, x, query=7), theirs)


@every_method
@pytest.mark.parametrize("start", [1, -1])
def test_start_leaves_out_the_layers_before(method, start):
    model, x = vit("timm"), inputs(2, side=32)
    output, probabilities, scaled, outputs = hooked(model, x, detached=method == "ag_cam")
    some = probabilities[start:]
    if method == "attention_rollout":
        theirs = paper_rollout([p.detach() for p in some])[:, 0]
    elif method == "gradient_attention":
        theirs = paper_gradient_attention(output, some, [1, 1])[:, 0]
    elif method == "ag_cam":
        theirs = paper_ag_cam(output, some, scaled[start:], [1, 1])
    else:
        theirs = paper_legrad(lambda mean: model.head(model.norm(mean))[:, 1], some, outputs[start:])
    close(raw(method, model, x, 1, start=start), theirs[:, 1:].unflatten(1, (4, 4)))


def test_rollout_says_nothing_about_the_target():
    model, x = vit("timm"), inputs(2, side=32)
    several = raw("attention_rollout", model, x, "all")
    assert several.shape == (2, 5, 4, 4)
    assert torch.equal(several, raw("attention_rollout", model, x, 1)[:, None].expand_as(several))
    other = raw("gradient_attention", model, x, "all")
    assert float((other[:, 0] - other[:, 1]).abs().max()) > 1e-3, "others do"


@every_method
def test_prefix_tokens_are_dropped(method):
    for name in ("timm, registers, mean", "DeiT, distilled", "torchvision"):
        assert raw(method, vit(name), inputs(2, side=32)).shape == (2, 4, 4)


@every_method
def test_grids_that_are_not_square(method):
    torchvision_models()
    make = pytest.importorskip("timm").models.vision_transformer.VisionTransformer
    model = randomised(make(**{**TIMM, "img_size": (16, 32)}))
    found = raw(method, model, inputs(2, side=32)[:, :, :16], size="input")
    assert found.shape == (2, 16, 32)
    assert raw(method, model, inputs(2, side=32)[:, :, :16]).shape == (2, 2, 4)


@every_method
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("class_token", [False, True])
def test_one_to_three_axes(method, dims, class_token):
    """And a network with one axis more, of length 1, gives the same map."""
    model, x = randomised(Patches(dims, class_token)), inputs(2, dims=dims)
    found = raw(method, model, x, [3, 1])
    assert found.shape == (2, *(4,) * dims)
    if method == "attention_rollout":
        with torch.no_grad():
            rolled = paper_rollout(told(model, x))
        theirs = rolled[:, 0, 1:] if class_token else rolled.mean(1)
        close(found.flatten(1), theirs)
    if dims < 3:
        state = model.state_dict()
        thick = Patches(dims + 1, class_token).double()
        thick.load_state_dict({name: F.pad(t[..., None], (0, 1)) if name == "embed.weight" else t for name, t in state.items()})
        wide = F.pad(x[..., None], (0, 1))
        close(raw(method, thick, wide, [3, 1], layout=camfn.layouts.tokens((*(4,) * dims, 1)))[..., 0], found)


@every_method
def test_tokens_before_the_batch(method):
    """As torch's own layers have them by default; also where there are as many images as tokens."""
    model = randomised(Patches(class_token=True))
    turned = Patches(class_token=True, batch_first=False).double()
    turned.load_state_dict(model.state_dict())
    for n in (2, 17):
        x = inputs(n)
        close(raw(method, turned, x, 1), raw(method, model, x, 1))


@every_method
def test_the_grid_and_the_prefix_can_be_said(method):
    model, x = vit("timm"), inputs(2, side=32)
    found = raw(method, model, x)
    assert torch.equal(raw(method, model, x, layout=camfn.layouts.tokens((4, 4), 1)), found)
    assert torch.equal(raw(method, model, x, layout=camfn.layouts.tokens((2, 8), 1)).flatten(1), found.flatten(1))
    assert raw(method, model, x, layout=camfn.layouts.tokens((17,), 0)).shape == (2, 17)
    turned = raw(method, model, x, layout=lambda tokens: tokens[:, 1:].mT.unflatten(2, (4, 4)).mT)
    assert torch.equal(turned, found.mT)
    for layout in ("channels_first", "channels_last"):
        with pytest.raises(camfn.CamError, match=f"layout='{layout}': attention is over tokens"):
            raw(method, model, x, layout=layout)
    with pytest.raises(camfn.CamError, match=r"'attention' gives \(2, 17, 1\), which is not"):
        raw(method, model, x, layout=camfn.layouts.tokens((5, 5)))


# -------------------------------------------------------------------------------------------------------- all at once


@every_method
@pytest.mark.parametrize("name", MAKERS)
def test_every_model(method, name):
    model, x = vit(name), inputs(2, side=32)
    clip = "CLIP" in name
    both = raw(method, model, x, embedding(2) if clip else [3, 1])
    assert both.shape == (2, 4, 4)
    assert bool((both >= 0).all())
    assert float(both.std((1, 2)).min()) > 1e-6
    for i, c in enumerate((3, 1)):  # images are independent
        close(both[i], raw(method, model, x[i : i + 1], embedding(2) if clip else c)[0])
    normalised = raw(method, model, x, embedding(2) if clip else [3, 1], normalize=True)
    assert float(normalised.amin((1, 2)).abs().max()) == 0
    close(normalised.amax((1, 2)), torch.ones(2))


@every_method
def test_several_targets_are_each_alone(method):
    model, x = vit("timm"), inputs(2, side=32)
    together = raw(method, model, x, T.top(3))
    top = logits(model(x)).topk(3).indices
    for t in range(3):
        close(together[:, t], raw(method, model, x, top[:, t]))
    for target in (T.probability(2), T.contrast(1), lambda y: y[2] - y[0], [lambda y: y[2], lambda y: y[0] * 2]):
        assert raw(method, model, x, target).shape == (2, 4, 4)


@every_method
def test_inputs_as_keywords(method):
    model, x = vit("ViT, sdpa"), inputs(2, side=32)
    assert torch.equal(raw(method, model, {"pixel_values": x}), raw(method, model, x))
    assert torch.equal(raw(method, model, (x,)), raw(method, model, x))


@every_method
def test_the_card_counts(method):
    model, x = vit("timm"), inputs(2, side=32)
    card = camfn.explain(model, None, x, T.top(2), method=method)
    assert card.forwards == (4 if method == "legrad" else 2)
    assert card.backwards == (2 if method == "attention_rollout" else 4)
    assert card.notes == ()
    close(card.scores, logits(model(x)).topk(2).values.detach())
    assert camfn.METHODS[method].needs <= {"attention", "gradients"}


@every_method
def test_a_call_runs_the_model_once_and_legrad_once_more_for_its_blocks(method):
    model, x = vit("timm"), inputs(1, side=32)
    model.patch_embed.register_forward_hook(lambda module, args, out: PASSED.append(len(out)))
    PASSED.clear()
    raw(method, model, x, layout=camfn.layouts.tokens((4, 4), 1))
    assert len(PASSED) == (3 if method == "legrad" else 1)  # legrad finds its blocks in each call


class Within(nn.Module):
    """A model whose output is what `wrap` makes of the logits."""

    def __init__(self, net: nn.Module, wrap: Callable):
        super().__init__()
        self.net, self.wrap = net, wrap

    def forward(self, x: Tensor):
        return self.wrap(self.net(x))


def branch(y):
    return torch.stack([one * (1 if one.mean() > 0 else 1.5) for one in y])


def masked_write(y):
    y = y.clone()
    y[y < 0] *= 0.1
    return y


UNMAPPED = {
    "branch": (branch, lambda y: torch.where(y.mean(1, keepdim=True) > 0, y, 1.5 * y)),
    "masked write": (masked_write, lambda y: torch.where(y < 0, 0.1 * y, y)),
    "NumPy": (
        lambda y: y * torch.from_numpy(1 + y.detach().numpy().max(1, keepdims=True)),
        lambda y: y * (1 + y.detach().amax(1, keepdim=True)),
    ),
    "item": (lambda y: torch.stack([one * one[0].item() for one in y]), lambda y: y * y[:, :1].detach()),
}


@pytest.mark.parametrize("kind", UNMAPPED)
def test_legrad_of_what_cannot_be_mapped_is_that_of_a_loop_over_blocks(kind):
    odd, plain = (Within(vit("timm"), wrap) for wrap in UNMAPPED[kind])
    x, where = inputs(2, side=32), camfn.layouts.tokens((4, 4), 1)
    expected = raw("legrad", plain, x, layout=where)
    close(raw("legrad", odd, x, layout=where), expected)
    assert torch.equal(raw("legrad", odd, x, layout=where), raw("legrad", odd, x, layout=where))


def test_legrad_with_a_companion_that_has_no_rows():
    class Gained(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = vit("timm")

        def forward(self, x, gain):
            return self.net(x * gain)

    x, where = inputs(2, side=32), camfn.layouts.tokens((4, 4), 1)
    found = raw("legrad", Gained(), (x, torch.tensor(1.5, dtype=x.dtype)), layout=where)
    close(found, raw("legrad", vit("timm"), 1.5 * x, layout=where))


class Fields(collections.OrderedDict):
    """A class that torch's pytree does not know, as the outputs of transformers."""


@dataclasses.dataclass
class Answer:
    loss: None
    logits: Tensor


@every_method
@pytest.mark.parametrize("wrap", [lambda y: Fields(loss=y.mean(), logits=y), lambda y: Answer(None, y)])
def test_an_output_of_any_class_is_opened(method, wrap):
    model, x, where = vit("timm"), inputs(2, side=32), camfn.layouts.tokens((4, 4), 1)
    close(raw(method, Within(model, wrap), x, layout=where), raw(method, model, x, layout=where))


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes(method, dtype):
    model, x = vit("timm"), inputs(2, side=32)
    theirs = raw(method, model, x, normalize=True)
    ours = raw(method, copy.deepcopy(model).to(dtype), x.to(dtype), normalize=True)
    assert ours.dtype == torch.float32
    assert_close(ours, theirs, {torch.float16: 0.02, torch.bfloat16: 0.15, torch.float32: 1e-4}[dtype])


# -------------------------------------------------------------------------------------------------- pure, and composable


@every_method
@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_it_is_pure(method, name):
    model, x = vit(name).train(), inputs(2, side=32)
    state, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = raw(method, model, x)
    assert not found.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values()))
    assert torch.equal(drawn, torch.get_rng_state())
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert raw(method, model, x.clone().requires_grad_()).requires_grad
    assert torch.equal(raw(method, model, x), found)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(raw(method, model, x.detach().clone()), found)


@every_method
def test_an_error_half_way_changes_nothing(method):
    model, x = vit("timm"), inputs(2, side=32)

    def target(y: Tensor) -> Tensor:
        raise RuntimeError("in the target")

    with pytest.raises(camfn.CamError, match="in the target"):
        raw(method, model, x, target)
    assert torch._C._len_torch_function_stack() == 0
    assert raw(method, model, x).shape == (2, 4, 4)


@every_method
def test_threads(method):
    model = vit("timm")
    images = [inputs(1, side=32, seed=seed) for seed in range(8)]
    alone = [raw(method, model, x) for x in images]
    found: list = [None] * 8

    def work(i: int) -> None:
        found[i] = [raw(method, model, images[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for runs, expected in zip(found, alone):
        assert all(torch.equal(run, expected) for run in runs)


@every_method
@pytest.mark.parametrize("name", ["timm", "torchvision", "ViT, eager"])
def test_under_vmap(method, name):
    model, x = vit(name), inputs(3, side=32)
    mapped = torch.func.vmap(lambda one: raw(method, model, one[None])[0])(x)
    close(mapped, raw(method, model, x))


@every_method
def test_an_ensemble_by_vmap_over_states(method):
    model, x = vit("timm"), inputs(2, side=32)
    states = [camfn.state_of(randomised(copy.deepcopy(model), seed)) for seed in range(2)]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    mapped = torch.func.vmap(lambda state: raw(method, model, x, state=state))(stacked)
    for i, state in enumerate(states):
        close(mapped[i], raw(method, model, x, state=state))


@every_method
@pytest.mark.parametrize("wrt", ["x", "state="])
@pytest.mark.parametrize("normalize", [True, False])
def test_maps_are_differentiable(method, wrt, normalize):
    """Against finite differences, also through what the method takes for constant: that depends on the input too."""
    model, x = vit("timm"), inputs(1, side=32)
    state = camfn.state_of(model)
    name = "blocks.1.attn.qkv.weight"
    weights = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def value(given: Tensor) -> Tensor:
        options = {"normalize": normalize}
        if wrt == "x":
            return (raw(method, model, given, **options)[0] * weights).sum()
        return (raw(method, model, x, state={**state, name: given}, **options)[0] * weights).sum()

    start = x if wrt == "x" else state[name]
    gradient = torch.func.grad(value)(start)
    way = torch.randn(start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    step = 1e-5
    numeric = (value(start + step * way) - value(start - step * way)) / (2 * step)
    assert abs(float(numeric)) > 1e-6
    assert_close((gradient * way).sum(), numeric, 1e-6 * max(1.0, abs(float(numeric))))
    forward = torch.func.jvp(value, (start,), (way,))[1]
    assert_close(forward, numeric, 1e-6 * max(1.0, abs(float(numeric))))


@every_method
def test_a_method_can_be_called_in_compiled_code(method):
    model, x = vit("timm"), inputs(1, side=32)
    run = torch.compile(lambda x: raw(method, model, x) * 2, backend="eager")
    close(run(x), 2 * raw(method, model, x))


# ---------------------------------------------------------------------------------------------------------------- errors


@every_method
def test_a_layer_is_refused(method):
    with pytest.raises(camfn.CamError, match=rf"{method} takes no layer: pass layer=None, found 'blocks.1'"):
        getattr(camfn, method)(vit("timm"), "blocks.1", inputs(1, side=32))


@every_method
def test_windows_are_refused(method):
    model = torchvision_models().SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4], num_classes=3).double()
    with pytest.raises(camfn.CamError, match=r"1, 16, 16\) for a batch of \d: it is over windows"):
        getattr(camfn, method)(model, None, inputs(2, side=32))


@every_method
def test_models_without_attention_are_refused(method):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    with pytest.raises(camfn.CamError, match="no attention that could be seen"):
        getattr(camfn, method)(model, None, inputs(2, side=8))


@every_method
@pytest.mark.parametrize("start", [3, -4, 1.0, None])
def test_a_start_that_is_no_layer(method, start):
    with pytest.raises(camfn.CamError, match=r"start=.* must be one of the model's 3 attention layers"):
        raw(method, vit("timm"), inputs(1, side=32), start=start)


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


@every_method
def test_what_every_method_refuses(method):
    model, x = vit("timm"), inputs(2, side=32)
    for words, options in {
        r"target 5.*0 to 4": {"target": 5},
        r"3 entries for a batch of 2": {"target": [1, 2, 3]},
        r"size='output' must be": {"size": "output"},
        r"size=\(4,\) must be None, \"input\", or 2 positive ints": {"size": (4,)},
        r"layout='nchw': attention is over tokens": {"layout": "nchw"},
        r"layout must be": {"layout": 5},
        r"state= lacks": {"state": {}},
        r"x is not finite": {"x": x * math.nan},
        r"is the batch axis missing": {"x": x[0]},
        r"x is torch.int64": {"x": x.long()},
        r"draws random numbers in eval mode": {"model": nn.Sequential(Draws(), model)},
    }.items():
        with pytest.raises(camfn.CamError, match=words):
            getattr(camfn, method)(**{"model": model, "layer": None, "x": x, "target": 3, **options})


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("query", [17, -18, 0.5])
def test_a_query_that_is_no_token(method, query):
    with pytest.raises(camfn.CamError, match=r"query=.* must be one of the 17 tokens"):
        raw(method, vit("timm"), inputs(1, side=32), query=query)


def test_methods_of_a_layer_do_not_mind_what_kind_of_attention_comes_after():
    """A pooling of one query to all tokens: no map for those that follow attention, and all the same to a second derivative."""
    torchvision_models()
    kind = pytest.importorskip("timm").models.vision_transformer.VisionTransformer
    model, x = randomised(kind(**{**TIMM, "class_token": False, "global_pool": "map"})), inputs(2, side=32)
    expected = camfn.shapley_cam(unfused(model), "blocks.1", x, 3, relu=False, normalize=False)
    close(camfn.shapley_cam(model, "blocks.1", x, 3, relu=False, normalize=False), expected)
    with pytest.raises(camfn.CamError, match="attention of 1 queries to 16 keys"):
        camfn.attention_rollout(model, None, x)


@pytest.mark.parametrize("method", ["ablation_cam", "recipro_cam"])
def test_what_cannot_be_recorded_is_mapped_over_without_fused_attention(method):
    """The fused kernels have no rule for that; torch says so once in a process, unless asked to say it always."""

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = vit("timm")

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return y if float(y.detach().sum()) < math.inf else -y  # a value that is read in Python

    x, function = inputs(1, side=32), getattr(camfn, method)
    expected = function(vit("timm"), "blocks.1", x, 3, relu=False, normalize=False)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = function(Asking(), "net.blocks.1", x, 3, relu=False, normalize=False)
    finally:
        torch.set_warn_always(always)
    close(found, expected)


# -------------------------------------------------------------------------------------------------------------- padding


class Padded(nn.Module):
    """A transformer over patches of which the last five are masked out, or left out altogether."""

    def __init__(self, masked: bool, mask: str = "src_key_padding_mask") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.head, self.masked, self.mask = nn.Linear(16, 5), masked, mask

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x).flatten(2).mT], 1)
        if not self.masked:
            return self.head(self.blocks(tokens[:, :-5])[:, 0])
        count = tokens.shape[1]
        padding = torch.arange(count) >= count - 5
        if self.mask == "mask":  # the smallest number of the dtype, as transformers writes it
            given = torch.zeros(count, count, dtype=x.dtype).masked_fill(padding, torch.finfo(x.dtype).min)
        else:
            given = padding.expand(len(x), -1)
        return self.head(self.blocks(tokens, **{self.mask: given})[:, 0])


OF_ATTENTION = [name for name, row in camfn.METHODS.items() if camfn.methods.Need.ATTENTION in row.needs]


@pytest.mark.parametrize("mask", ["src_key_padding_mask", "mask"])
@pytest.mark.parametrize("method", OF_ATTENTION)
def test_tokens_that_are_masked_out_have_no_relevance(method, mask):
    x = inputs(2, side=24)
    padded = raw(method, Padded(True, mask).double(), x, [3, 1])
    assert padded.shape == (2, 6, 6)
    assert not padded.flatten(1)[:, -5:].any()
    assert padded.flatten(1)[:, :-5].any()
    if method != "legrad":  # whose mean token has the padding in it
        row = camfn.layouts.tokens((1, 31), 1)
        close(padded.flatten(1)[:, :-5], raw(method, Padded(False).double(), x, [3, 1], layout=row).flatten(1))


def test_a_mask_of_some_queries_excludes_no_token():
    class Causal(Padded):
        def forward(self, x: Tensor) -> Tensor:
            tokens = torch.cat([self.embed(x).flatten(2).mT, self.token.expand(len(x), -1, -1)], 1)
            above = torch.ones(37, 37, dtype=torch.bool).triu(1)
            return self.head(self.blocks(tokens, mask=above)[:, -1])

    found = raw("attention_rollout", Causal(True).double(), inputs(2, side=24), [3, 1], layout=camfn.layouts.tokens((1, 37), 0))
    assert (found > 0).all()

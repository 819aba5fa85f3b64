"""FullGrad: what the input and every bias of the network contribute to the score."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Inputs, Layout, Size, State, Target, wide
from camfn.formulas import maps as _maps
from camfn.formulas.diagnostics import Finding
from camfn.formulas.scaling import size_of
from camfn.methods.table import Drawing, Outcome, clean_scores, drawn, method, without_layer
from camfn.model.capture import Captured, calls_from
from camfn.model.forward import Subject, check_slopes, introduced, without_graph
from camfn.model.gradients import Pull, slopes_of, with_pull
from camfn.model.inputs import pick, with_input
from camfn.targets import resolve

Form = Literal["authors", "pytorch-grad-cam"]


class Bias(NamedTuple):
    """What a layer adds."""

    values: Tensor  # (c,)
    last: bool  # whether channels are on the last axis, or on the second

    def along(self, slope: Tensor) -> Tensor:
        """In the shape of what the layer gives."""
        return self.values if self.last else self.values.reshape(-1, *[1] * (slope.ndim - 2))


class Parts(NamedTuple):
    """A network taken apart: by its gradient at the input and at every layer with a bias."""

    subject: Subject
    pull: Pull  # to the input, 0, and to the layers with a bias, 1, 2, ... in the order of execution
    biases: list[Bias]  # of these layers


@method("gradients", "biases", cost="1, 1 backward")
def full_grad(
    model: nn.Module,
    layer: None,
    x: Inputs,
    target: Target = None,
    *,
    form: Form = "authors",
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """FullGrad: the input and every bias, each times the gradient of the score where it enters.

    `L = psi(x * ds/dx) + sum_l psi(b_l * ds/dz_l)`, `psi(P) = sum_k U(norm(|P_k|))`: z_l is what a layer with a bias b_l gives,
    norm is min-max over an image's channels and positions together, U upsamples linearly (corners aligned) to the input's size,
    which is the map's own. One forward, and one backward to the input for each target.

    Biases are those of convolutions, linear layers and batch norms; a batch norm's is `b - m w / sqrt(v + eps)`, all that it
    adds in eval mode. Layers without positions are left out of the map, as in the authors' code. Where these are all biases
    there are, and the network is piecewise linear, the parts are complete: `s = sum x * ds/dx + sum_l sum b_l * ds/dz_l` for a
    logit s. Other layers (SiLU, GELU, layer norm, attention) have biases of their own, which vary with the input:
    `camfn.explain` notes how much of the score the parts leave out.

    - `layer`: `None`, since all of them count.
    - `form="pytorch-grad-cam"`: norm is taken channel by channel, which gives all of them the same weight, of convolutions and
      batch norms alone, and corners are not aligned.
    - `layout`: `"auto"` alone, since a layer's kind says where its channels are.
    - `relu` changes nothing: nothing is negative.

    The other arguments, and what is returned and raised, are those of `camfn.grad_cam`. The authors add 1e-6 to the range that
    is divided by; here the division is exact, and zeros stay zeros.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> camfn.full_grad(model, None, torch.randn(2, 3, 8, 8), [1, 3]).shape
    torch.Size([2, 8, 8])

    Srinivas & Fleuret, Full-Gradient Representation for Neural Network Visualization, NeurIPS 2019 (arXiv 1905.00780).
    """
    without_layer("full_grad", layer)
    if form not in ("authors", "pytorch-grad-cam"):
        raise CamError(f'form must be "authors" or "pytorch-grad-cam", found {form!r}')
    if layout != "auto":
        raise CamError(
            f'layout must be "auto" in full_grad, where a layer\'s kind says where its channels are; found {layout!r}'
        )
    with without_graph():
        parts = _apart(model, x, state)
        subject, score = parts.subject, resolve(target, parts.subject.output, parts.subject.n, parts.subject.image.device)
        if subject.size is None:
            raise CamError(f"full_grad needs spatial axes in the input, and x has shape {tuple(subject.image.shape)}")
        clean = clean_scores(subject, score)
        made = slopes_of(parts.pull, subject.output, score, lambda slopes: _joined(parts, slopes, form))
        signed = torch.stack([joined.flatten(1) for joined, _ in made], 1)
        outcome = drawn(subject, score, clean, [signed], [subject.size], Drawing(relu, size, normalize))
        remarks = _left_out(clean, torch.stack([total for _, total in made], 1)) if score.linear else ()
    return outcome._replace(backwards=clean.numel(), remarks=remarks)


def _apart(model: nn.Module, x: Inputs, state: State | None) -> Parts:
    subject = introduced(model, x, state)
    check_slopes(subject.shell)
    found = {name: _bias_of(subject, name, module) for name, module in subject.shell.distinct().items()}
    biases = {name: bias for name, bias in found.items() if bias is not None}
    called: tuple[str, ...] = ()

    def run(state: State, x: Inputs, nudge: Any = None) -> Captured:
        nonlocal called
        image = pick(x, subject.key)
        own: Any = nudge(image) if callable(nudge) else nudge and nudge[0]
        moved = x if own is None else with_input(x, subject.key, image + own)
        rest = nudge if callable(nudge) else nudge and nudge[1:]
        (output, seen), called = calls_from(subject.model.shell(), [*biases])(state, moved, rest)
        return Captured(output, (image, *seen))

    (output, _), pull = with_pull(run, subject.state, subject.x, None)
    return Parts(subject._replace(output=output, forwards=subject.n), pull, [biases[name] for name in called])


def _bias_of(subject: Subject, name: str, module: nn.Module) -> Bias | None:
    """All that the layer adds to a linear function of its input."""
    if not isinstance(module, (_ConvNd, nn.Linear, _BatchNorm)):
        return None

    def own(leaf: str) -> Tensor | None:
        tensor = subject.state.get(subject.shell.aliases.get(f"{name}.{leaf}", ""))
        return None if tensor is None else tensor.to(wide(tensor.dtype))

    bias, mean, variance = own("bias"), own("running_mean"), own("running_var")
    if isinstance(module, _BatchNorm) and mean is not None and variance is not None:
        shift = -mean * torch.rsqrt(variance + module.eps)
        weight = own("weight")
        shift = shift if weight is None else shift * weight
        bias = shift if bias is None else bias + shift
    return None if bias is None else Bias(bias, isinstance(module, nn.Linear))


def _joined(parts: Parts, slopes: dict[int, Tensor], form: Form) -> tuple[Tensor, Tensor]:
    """The map of one target, and what all its parts sum to in each image."""
    image, side = parts.subject.image, parts.subject.image.shape[2:]
    peer = form == "pytorch-grad-cam"
    product, size = _product(slopes[0], image)
    joined, total = _maps.saliency(product, side, each=peer, align_corners=not peer), _sum(product, size)
    for i, bias in enumerate(parts.biases, 1):
        product, size = _product(slopes[i], bias.along(slopes[i]))
        if len(product) == len(image):  # else it is of windows, or has its tokens first: whose is which cannot be told
            total = total + _sum(product, size)
            if product.ndim == image.ndim and not (peer and bias.last):
                part = product.movedim(-1, 1) if bias.last else product
                joined = joined + _maps.saliency(part, side, each=peer, align_corners=not peer)
    return joined, total


def _product(slopes: Tensor, other: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A gradient times what is added, each in units of its size; saliency is the same in any. And the two sizes."""
    other = other.to(wide(other.dtype))
    sizes = size_of(slopes, tuple(range(1, slopes.ndim))), size_of(other, tuple(range(other.ndim)))
    return slopes / sizes[0] * (other / sizes[1]), sizes


def _sum(product: Tensor, sizes: tuple[Tensor, Tensor]) -> Tensor:
    first, second = (size.flatten() for size in sizes)
    return product.flatten(1).sum(1) * first * second


def _left_out(clean: Tensor, total: Tensor) -> tuple[Finding, ...]:
    """What is to be said where the parts do not sum to the score."""
    if _compat.transformed():
        return ()
    larger = torch.maximum(clean.abs(), total.abs())
    worst = float(((clean - total).abs() / torch.where(larger == 0, 1, larger)).max())
    if not worst >= 0.01:  # of parts whose sum has no number, nothing is known
        return ()
    sentence = (
        f"full_grad's parts differ from the score by up to {worst:.0%} of the larger: the network has layers whose bias varies "
        "with the input (SiLU, GELU, layer norm, attention), or is not a registered tensor, and the map leaves these out"
    )
    return (Finding("parts left out", "", worst, sentence),)

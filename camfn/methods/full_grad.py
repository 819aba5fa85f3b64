"""FullGrad: what the input and every bias of the network contribute to the score."""

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Inputs, Layout, Size, State, Target, wide
from camfn.formulas import maps
from camfn.formulas.diagnostics import Finding
from camfn.methods._common import Drawing, checked_size, drawn, explained, without_layer
from camfn.methods.registry import Cost, Need, Outcome, method
from camfn.model.capture import Captured, calls_from
from camfn.model.forward import Forward, Task, begin, check_differentiable, without_graph
from camfn.model.gradients import Of, Pullback, each_target, with_pullback
from camfn.model.inputs import Companions, pick, with_input

FullGradForm = Literal["authors", "pytorch-grad-cam"]


class Bias(NamedTuple):
    """What a layer adds."""

    values: Tensor  # (c,)
    last: bool  # whether channels are on the last axis, or on the second

    def along(self, slope: Tensor) -> Tensor:
        """In the shape of what the layer gives."""
        return self.values if self.last else self.values.reshape(-1, *[1] * (slope.ndim - 2))


class Parts(NamedTuple):
    """A network taken apart: by its gradient at the input and at every layer with a bias."""

    forward: Forward
    pullback: Pullback  # to the input, 0, and to the layers with a bias, 1, 2, ... in the order of execution
    biases: list[Bias]  # of these layers


@method(maps.full_grad, (Need.GRADIENTS, Need.BIASES), Cost(backwards=1))
def full_grad(
    model: nn.Module,
    layer: None,
    x: Inputs,
    target: Target = None,
    *,
    form: FullGradForm = "authors",
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
        forward, spatial = parts.forward, parts.forward.size
        found = explained(forward, target, Drawing(relu, size, normalize, layout))
        if spatial is None:
            raise CamError(f"full_grad needs spatial axes in the input, and x has shape {tuple(forward.image.shape)}")
        checked_size(size, forward.batch, len(spatial))

        def joined(of: Of) -> tuple[Tensor, Tensor]:
            return _joined(parts, parts.pullback.gradients(of), form)

        made = each_target(joined, forward.output, found.score)
        outcome = drawn(found, [torch.stack([part.flatten(1) for part, _ in made], 1)], [spatial])
        remarks = _left_out(found.clean, torch.stack([total for _, total in made], 1)) if found.score.linear else ()
    return outcome._replace(backwards=found.clean.numel(), remarks=remarks)


def _apart(model: nn.Module, x: Inputs, state: State | None) -> Parts:
    task = begin(model, x, state)
    check_differentiable(task.shell)
    every = {name: _bias_of(task, name, module) for name, module in task.shell.distinct().items()}
    biases = {name: bias for name, bias in every.items() if bias is not None}
    called: tuple[str, ...] = ()

    def run(state: State, x: Inputs, nudge: Any = None) -> Captured:
        nonlocal called
        image = pick(x, task.batch.key)
        own: Any = nudge(image) if callable(nudge) else nudge and nudge[0]
        moved = x if own is None else with_input(x, task.batch.key, image + own)
        rest = nudge if callable(nudge) else nudge and nudge[1:]
        (output, seen), called = calls_from(task.model.shell(), [*biases])(state, moved, rest)
        return Captured(output, (image, *seen))

    (output, _), pullback = with_pullback(run, task.state, task.batch.x, None)
    companions = Companions(task.batch.key, task.batch.n)
    forward = Forward(task, (), False, output, (), companions, task.batch.n)
    return Parts(forward, pullback, [biases[name] for name in called])


def _bias_of(task: Task, name: str, module: nn.Module) -> Bias | None:
    """All that the layer adds to a linear function of its input."""
    if not isinstance(module, (_ConvNd, nn.Linear, _BatchNorm)):
        return None

    def own(leaf: str) -> Tensor | None:
        tensor = task.state.get(task.shell.aliases.get(f"{name}.{leaf}", ""))
        return None if tensor is None else tensor.to(wide(tensor.dtype))

    bias, mean, variance = own("bias"), own("running_mean"), own("running_var")
    if isinstance(module, _BatchNorm) and mean is not None and variance is not None:
        bias = maps.batch_norm_bias(bias, own("weight"), mean, variance, module.eps)
    return None if bias is None else Bias(bias, isinstance(module, nn.Linear))


def _joined(parts: Parts, gradients: dict[int, Tensor], form: FullGradForm) -> tuple[Tensor, Tensor]:
    """The map of one target, and the sum of all its parts in each image."""
    image, side = parts.forward.image, parts.forward.image.shape[2:]
    peer = form == "pytorch-grad-cam"
    psi = partial(maps.full_grad, size=side, each=peer, align_corners=not peer)
    product = maps.gradient_times(gradients[0], image)
    joined, total = psi(product.values), product.sum()
    for i, bias in enumerate(parts.biases, 1):
        product = maps.gradient_times(gradients[i], bias.along(gradients[i]))
        values = product.values
        if len(values) == len(image):  # else it is of windows, or has its tokens first: which image it is of is not known
            total = total + product.sum()
            if values.ndim == image.ndim and not (peer and bias.last):
                joined = joined + psi(values.movedim(-1, 1) if bias.last else values)
    return joined, total


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

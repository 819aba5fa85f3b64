"""FullGrad: what the input and every bias of the network contribute to the score."""

from collections.abc import Callable, Sequence
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
from camfn.model.capture import Captured, calls_from, layers_of
from camfn.model.forward import Forward, check_differentiable, from_output, without_graph
from camfn.model.gradients import Of, Pullback, each_target, with_pullback
from camfn.model.graph_ends import Reason
from camfn.model.inputs import pick, with_input
from camfn.model.task import Task, begin

FullGradForm = Literal["authors", "pytorch-grad-cam"]


class Bias(NamedTuple):
    """The bias of a layer."""

    values: Tensor  # (c,)
    last: bool  # channels are on the last axis; otherwise on the second

    def along(self, gradient: Tensor) -> Tensor:
        """The bias in a shape that broadcasts against the layer's gradient."""
        return self.values if self.last else self.values.reshape(-1, *[1] * (gradient.ndim - 2))


class FullGradParts(NamedTuple):
    """The clean forward pass, with the pullback to the input and to every layer with a bias."""

    forward: Forward
    pullback: Pullback  # to the input (0), and to the layers with a bias (1, 2, ...) in the order of execution
    biases: list[Bias]  # the biases of these layers


@method(maps.full_grad, (Need.GRADIENTS, Need.BIASES), Cost(backwards=1))
def full_grad(
    model: nn.Module,
    layer: None,
    x: Inputs,
    target: Target = None,
    *,
    form: FullGradForm = "authors",
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """FullGrad: sum the contributions of the input and of all biases, each multiplied by the score's gradient.

    `L = psi(x * ds/dx) + sum_l psi(b_l * ds/dz_l)`, `psi(P) = sum_k U(norm(|P_k|))`.

    `z_l` is the output of a layer with the bias `b_l`. norm is min-max normalization over an image's channels and positions
    together. U upsamples linearly (with aligned corners) to the input's size, which is also the size of the map. The cost is
    one forward pass, and for each target one backward pass to the input.

    The biases are those of convolutions, linear layers and batch norms, registered or held in a list, a closure or an object. A
    layer that only a global leads to is an error. A batch norm's bias is `b - m w / sqrt(v + eps)`, the constant that it adds
    in eval mode. The map leaves out layers without positions, as the authors' code does.

    If the network has no other biases and is piecewise linear, the contributions are complete:
    `s = sum x * ds/dx + sum_l sum b_l * ds/dz_l` for a logit s. Other layers (SiLU, GELU, layer norm, attention) have implicit
    biases, which vary with the input. `camfn.explain` notes which share of the score the contributions miss.

    The authors add 1e-6 to the range before they divide by it. Here the division is exact, and zeros stay zeros.

    **Arguments**

    - `layer`: must be `None`, because the method uses all layers.
    - `form`: `"authors"`, as above, or `"pytorch-grad-cam"`. The latter normalizes each channel by itself, which gives all
      channels the same weight. It uses convolutions and batch norms only, and does not align corners.
    - `layout`: must be `"auto"`, because the type of a layer determines its layout.
    - `relu`: has no effect, because the map is never negative.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

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
            f'layout must be "auto" in full_grad, because the type of a layer determines its layout; found {layout!r}'
        )
    with without_graph(x, state):
        parts = _decompose(begin(model, x, state, None, axes))
        forward, spatial = parts.forward, parts.forward.size
        found = explained(forward, target, Drawing(relu, size, normalize, layout, axes))
        if spatial is None:
            raise CamError(f"full_grad needs spatial axes in the input, and x has shape {tuple(forward.image.shape)}")
        checked_size(size, forward.batch, len(spatial))

        def joined(of: Of) -> tuple[Tensor, Tensor]:
            return _joined(parts, parts.pullback.gradients(of), form)

        made = each_target(joined, forward.output, found.score)
        outcome = drawn(found, [torch.stack([part.flatten(1) for part, _ in made], 1)], [spatial])
        remarks = (
            _left_out(found.clean.detach(), torch.stack([total.detach() for _, total in made], 1)) if found.score.linear else ()
        )
    return outcome._replace(backwards=found.clean.numel(), remarks=remarks)


def _decompose(task: Task) -> FullGradParts:
    """Run the clean forward pass, and collect the biases in the order of execution."""
    check_differentiable(task.private)
    every = {name: _bias_of(task, name, module) for name, module in layers_of(task.private).items()}
    biases = {name: bias for name, bias in every.items() if bias is not None}
    called: tuple[str, ...] = ()

    def run(state: State, x: Inputs, nudge: Any = None) -> Captured:
        nonlocal called
        image = pick(x, task.batch.pixels)
        own: Any = nudge(image) if callable(nudge) else nudge and nudge[0]
        moved = x if own is None else with_input(x, task.batch.pixels, image + own)
        rest = nudge if callable(nudge) else nudge and nudge[1:]
        (output, seen), called = calls_from(task.model.borrow(), [*biases], _KINDS)(state, moved, rest)
        return Captured(output, (image, *seen))

    def lost(numbers: Sequence[int], why: Callable[[int, str], Reason]) -> None:
        sentence = why(0, "the input").sentence if 0 in numbers else ""  # a bias may be that of another output
        if sentence:
            raise CamError(sentence)

    (output, _), pullback = with_pullback(run, task.state, task.batch.x, None, lost, graphed=task.graphed)
    return FullGradParts(from_output(task, output), pullback, [biases[name] for name in called])


_KINDS = (_ConvNd, nn.Linear, _BatchNorm)
"""The layers whose biases are counted."""


def _bias_of(task: Task, name: str, module: nn.Module) -> Bias | None:
    """The constant that the layer adds to a linear function of its input, if any."""
    if not isinstance(module, _KINDS):
        return None

    def own(leaf: str) -> Tensor | None:
        full = f"{name}.{leaf}" if name else leaf
        if name in task.private.modules:
            tensor = task.state.get(task.private.aliases.get(full, ""))
        else:
            tensor = {**module._parameters, **module._buffers}.get(leaf)
        return None if tensor is None else tensor.to(wide(tensor.dtype))

    bias, mean, variance = own("bias"), own("running_mean"), own("running_var")
    if isinstance(module, _BatchNorm) and mean is not None and variance is not None:
        bias = maps.batch_norm_bias(bias, own("weight"), mean, variance, module.eps)
    return None if bias is None else Bias(bias, isinstance(module, nn.Linear))


def _joined(parts: FullGradParts, gradients: dict[int, Tensor], form: FullGradForm) -> tuple[Tensor, Tensor]:
    """The map of one target, and the sum of all contributions in each image."""
    image, side = parts.forward.image, parts.forward.image.shape[2:]
    peer = form == "pytorch-grad-cam"
    psi = partial(maps.full_grad, size=side, each=peer, align_corners=not peer)
    product = maps.gradient_times(gradients[0], image)
    joined, total = psi(product.values), product.sum()
    for i, bias in enumerate(parts.biases, 1):
        product = maps.gradient_times(gradients[i], bias.along(gradients[i]))
        values = product.values
        if len(values) == len(image):  # otherwise (windows, tokens first) the rows do not belong to known images
            total = total + product.sum()
            if values.ndim == image.ndim and not (peer and bias.last):
                joined = joined + psi(values.movedim(-1, 1) if bias.last else values)
    return joined, total


def _left_out(clean: Tensor, total: Tensor) -> tuple[Finding, ...]:
    """A finding if the contributions do not sum to the score."""
    if _compat.transformed():
        return ()
    larger = torch.maximum(clean.abs(), total.abs())
    worst = float(((clean - total).abs() / torch.where(larger == 0, 1, larger)).max())
    if not worst >= 0.01:  # returns for NaN too, where nothing is known
        return ()
    sentence = (
        f"full_grad's parts differ from the score by up to {worst:.0%} of the larger: the network has layers whose bias varies "
        "with the input (SiLU, GELU, layer norm, attention), or is not that of a layer, and the map leaves these out"
    )
    return (Finding("parts left out", "", worst, sentence),)

"""What is to be said about maps that mean little, and why they do: values, each with a sentence. Tensors only."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from camfn._types import Activations, FlatMaps, Gradients, Weights
from camfn.formulas.maps import is_flat

Kind = Literal[
    "non-finite map",
    "flat map",
    "negative map",
    "non-finite channels",
    "dead channels",
    "equal weights",
    "one channel",
    "no gradient",
    "no position",
    "parts left out",
]


class Finding(NamedTuple):
    """Something that should be known about a map."""

    kind: Kind
    layer: str
    value: float  # the share of maps, channels or weight that it is about
    sentence: str


def about_maps(
    signed: Sequence[FlatMaps], layers: Sequence[str], relu: bool, seen: Sequence[Tensor] = ()
) -> tuple[Finding, ...]:
    """Maps that are not finite, one value, or nowhere positive, and layers whose output is not finite.

    The values are read once. The layer of a map without one is "", and there `seen`, the layers' outputs, is empty.
    """
    pairs = zip(signed, seen or (None,) * len(signed))
    facts = torch.stack([torch.stack(_facts(*pair)) for pair in pairs])
    found = []
    for name, (wild, flat, negative, source) in zip(layers, facts.cpu()):
        place = f" at layer {name!r}" if name else ""
        if wild.any() or source.any():
            sentence = _not_finite(int(wild.sum()), wild.numel(), name, bool(source.any()))
            found.append(Finding("non-finite map", name, float(wild.float().mean()), sentence))
        if flat.any():
            sentence = (
                f"{int(flat.sum())} of {flat.numel()} maps{place} are flat: every position has the same value, "
                "so there is nothing to see (an activation that does not vary over positions, or no channel that counts?)"
            )
            found.append(Finding("flat map", name, float(flat.float().mean()), sentence))
        below = negative & ~flat
        if relu and below.any():
            sentence = (
                f"{int(below.sum())} of {flat.numel()} maps{place} are nowhere positive: the ReLU "
                "leaves zeros; relu=False gives the signed map"
            )
            found.append(Finding("negative map", name, float(below.float().mean()), sentence))
    return tuple(found)


def _facts(signed: FlatMaps, activation: Tensor | None) -> tuple[Tensor, ...]:
    """Of each map: is it not finite, flat, nowhere positive; and of its layer's output: is it not finite?"""
    low, high = signed.amin(-1), signed.amax(-1)  # NaN where one value is
    wild = ~(torch.isfinite(low) & torch.isfinite(high))
    source = torch.zeros_like(wild)
    if activation is not None and activation.is_floating_point():
        source = source | ~torch.isfinite(torch.stack(activation.detach().aminmax())).all()
    return wild, is_flat(low, high, signed.dtype) & ~wild, (high <= 0) & ~wild, source


def _not_finite(count: int, of: int, layer: str, source: bool) -> str:
    way_out = "choose an earlier layer, or find the operation that makes them"
    if not count:
        return f"layer {layer!r} has NaN or infinite values that the maps do not show: {way_out}"
    maps = f"{count} of {of} maps{f' at layer {layer!r}' if layer else ''} are not finite"
    if source:
        return f"{maps}: the layer's output has NaN or infinite values; {way_out}"
    return f"{maps}{', though the layer is' if layer else ''}: a gradient or a product overflows; try float64 for model and x"


def about_weights(weights: Sequence[Weights], layers: Sequence[str]) -> tuple[Finding, ...]:
    """Weights of a softmax. Nearly equal ones give the mean activation, whatever the class; one strong one, a channel."""
    found = []
    for name, w in zip(layers, weights):
        if w.shape[-1] < 2:
            continue
        share, strongest = float(effective_channels(w).max()) / w.shape[-1], float((w / w.sum(-1, keepdim=True)).max())
        if share > 0.99:
            sentence = (
                f"the weights at layer {name!r} are nearly equal ({share:.1%} of the channels count): the map is the mean "
                "activation and says little about the target"
            )
            found.append(Finding("equal weights", name, share, sentence))
        elif strongest > 0.9:
            sentence = f"one channel at layer {name!r} has {strongest:.0%} of the weight: the map is that channel, more or less"
            found.append(Finding("one channel", name, strongest, sentence))
    return tuple(found)


def effective_channels(weights: Weights) -> Tensor:
    """`exp(entropy(w))` of weights that are not negative: how many channels carry the map, `(n, t)`."""
    share = weights.clamp(min=0) / weights.clamp(min=0).sum(-1, keepdim=True)
    return torch.exp(torch.special.entr(share).sum(-1))


def about_activations(activations: Sequence[Activations], layers: Sequence[str]) -> tuple[Finding, ...]:
    """Channels that say nothing: not finite, or the same everywhere in every image."""
    found = []
    for name, values in zip(layers, activations):
        wild = float((~torch.isfinite(values)).any(-1).any(0).float().mean())
        dead = float(is_flat(values.amin(-1), values.amax(-1), values.dtype).all(0).float().mean())
        if wild:
            sentence = (
                f"{wild:.1%} of the channels at layer {name!r} have values that are not finite: no map of them means anything"
            )
            found.append(Finding("non-finite channels", name, wild, sentence))
        if dead >= 0.5:
            sentence = (
                f"{dead:.0%} of the channels at layer {name!r} are dead: one value at all positions, in every image; "
                "the map hangs on the others"
            )
            found.append(Finding("dead channels", name, dead, sentence))
    return tuple(found)


def about_gradients(gradients: Sequence[Gradients], layers: Sequence[str]) -> tuple[Finding, ...]:
    """Gradients that are zero, or the same at every position."""
    return tuple(
        finding
        for name, slopes in zip(layers, gradients)
        for check in (_vanished, _everywhere)
        for finding in check(name, slopes)
    )


def _vanished(name: str, slopes: Gradients) -> list[Finding]:
    none = float((slopes == 0).flatten(2).all(-1).float().mean())
    if not none:
        return []
    part = "the gradient" if none == 1 else f"{none:.0%} of the gradients"
    sentence = (
        f"{part} at layer {name!r} is zero throughout: the target does not depend on this layer there (the last block of a "
        "transformer whose class token alone is read? a saturated or clipped score? a branch that is not the target's?)"
    )
    return [Finding("no gradient", name, none, sentence)]


def _everywhere(name: str, slopes: Gradients) -> list[Finding]:
    if slopes.shape[-1] < 2 or not bool((slopes != 0).any()):
        return []
    spread, size = (slopes - slopes.mean(-1, keepdim=True)).abs().amax(), slopes.abs().amax()
    if bool(spread > 100 * torch.finfo(slopes.dtype).eps * size):
        return []
    sentence = (
        f"after layer {name!r} the class no longer depends on position (the gradient is the same everywhere, as before global "
        "average pooling and a linear layer): Grad-CAM, HiResCAM and XGrad-CAM are one map there, that of CAM"
    )
    return [Finding("no position", name, 1.0, sentence)]

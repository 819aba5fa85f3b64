"""Findings about maps that carry little information: a value and a sentence each. Functions of tensors."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
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
    "cancelled sum",
    "no class",
    "negative channels",
    "not the score's parts",
    "no gradient",
    "no position",
    "parts left out",
    "about the target",
    "no view",
]


class Finding(NamedTuple):
    """A property of a map that the user should know."""

    kind: Kind
    layer: str
    value: float  # the share of maps, channels or weight concerned
    sentence: str


def about_maps(
    signed: Sequence[FlatMaps], layers: Sequence[str], relu: bool, seen: Sequence[Tensor] = ()
) -> tuple[Finding, ...]:
    """Find maps that are not finite, flat, or nowhere positive, and layers whose output is not finite.

    - `signed`: the maps before the ReLU, per layer.
    - `layers`: the names of the layers. The name of a map without a layer is `""`.
    - `relu`: whether the method applies a ReLU.
    - `seen`: the outputs of the layers; empty for maps without a layer.

    The values are copied to the CPU once.
    """
    pairs = zip(signed, seen or (None,) * len(signed))
    facts = torch.stack([torch.stack(_facts(*pair)) for pair in pairs])
    found = []
    for name, (wild, flat, negative, source) in zip(layers, facts.cpu()):
        place = f" at layer {name!r}" if name else ""
        if wild.any() or source.any():
            sentence = _non_finite_sentence(int(wild.sum()), wild.numel(), name, bool(source.any()))
            found.append(Finding("non-finite map", name, float(wild.float().mean()), sentence))
        if flat.any():
            sentence = (
                f"{int(flat.sum())} of {flat.numel()} maps{place} are flat: every position has the same value, "
                "so there is nothing to see (an activation that does not vary over positions, or all weights zero?)"
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
    """Return for each map whether it is not finite, flat, or nowhere positive, and whether the layer is not finite."""
    low, high = signed.amin(-1), signed.amax(-1)  # NaN if any value is
    wild = ~(torch.isfinite(low) & torch.isfinite(high))
    source = torch.zeros_like(wild)
    if activation is not None and activation.is_floating_point():
        source = source | ~torch.isfinite(torch.stack(activation.detach().aminmax())).all()
    return wild, is_flat(low, high, signed.dtype) & ~wild, (high <= 0) & ~wild, source


def _non_finite_sentence(count: int, of: int, layer: str, source: bool) -> str:
    way_out = "choose an earlier layer, or find the operation that makes them"
    if not count:
        return f"layer {layer!r} has NaN or infinite values that the maps do not show: {way_out}"
    maps = f"{count} of {of} maps{f' at layer {layer!r}' if layer else ''} are not finite"
    if source:
        return f"{maps}: the layer's output has NaN or infinite values; {way_out}"
    return f"{maps}{', though the layer is' if layer else ''}: a gradient or a product overflows; try float64 for model and x"


def about_sums(
    left: Sequence[Float[Tensor, "n t"]], layers: Sequence[str], what: Literal["map", "sign"] = "map"
) -> tuple[Finding, ...]:
    """Find maps, or signs of maps, that are what is left of a sum whose parts cancel.

    `left` is `formulas.maps.remainder` of each layer. Before a layer norm, `sum_k G_k A_k` is zero at each position, since the
    score does not depend on the length of a position's vector: what is left is rounding, and the norm's epsilon.
    """
    found = []
    for name, shares in zip(layers, left):
        none = shares < _CANCELLED
        if none.any():
            maps = f"{int(none.sum())} of {none.numel()} maps at layer {name!r}"
            told = f"{maps} are" if what == "map" else f"the sign of {maps} is"
            most = float(shares[none].max())
            sentence = (
                f"{told} what is left where the parts of a sum cancel ({most:.1g} of their size), so rounding and no evidence: "
                "before a layer norm, the score does not depend on the length of a position's vector; name the norm that "
                "follows, or an earlier layer"
            )
            found.append(Finding("cancelled sum", name, float(none.float().mean()), sentence))
    return tuple(found)


_CANCELLED = 1e-3
"""The share of its parts below which a sum of channels has cancelled. Sums of thousands of channels keep some hundredths."""


def about_agreement(correlations: Sequence[Float[Tensor, "n t"]], layers: Sequence[str]) -> tuple[Finding, ...]:
    """Find maps that rank the positions as `mean_cam` does, by their rank correlations with it."""
    found = []
    for name, each in zip(layers, correlations):
        same = each >= ALIKE
        if same.any():
            least = f"{float(each[same].min()):.2f}"
            more = "" if least == "1.00" else " or more"
            sentence = (
                f"{int(same.sum())} of {same.numel()} maps at layer {name!r} rank the positions as mean_cam does (correlation "
                f"{least}{more}): they show where the layer is active, whatever the class"
            )
            found.append(Finding("no class", name, float(same.float().mean()), sentence))
    return tuple(found)


ALIKE = 0.95
"""The rank correlation from which maps hardly differ by class. That of Grad-CAM on trained networks is below 0.9."""


def about_negative(shares: Sequence[Float[Tensor, " n"]], layers: Sequence[str]) -> tuple[Finding, ...]:
    """Find layers where a tenth of FEM's weight or more is negative: `formulas.maps.negative_share`."""
    found = []
    for name, each in zip(layers, shares):
        share = float(each.max())
        if share >= 0.1:
            sentence = (
                f"channels of a negative mean have {share:.0%} of FEM's weight at layer {name!r}: what stands out in them is "
                'dark in the map; name a layer after a ReLU, or pass form="share"'
            )
            found.append(Finding("negative channels", name, share, sentence))
    return tuple(found)


def about_linear(told: Float[Tensor, "n t"], scores: Float[Tensor, "n t"], layer: str) -> tuple[Finding, ...]:
    """Find that CAM's map does not add up to the score: the linear layer of the pooled layer is not the score."""
    told, scores = told.detach(), scores.detach()
    size = torch.maximum(told.abs(), scores.abs())
    apart = (told - scores).abs() / torch.where(size > 0, size, 1)
    worst = int(apart.argmax())
    share = float(apart.flatten()[worst])
    if not share > _APART:
        return ()
    sentence = (
        f"the mean of CAM's map at layer {layer!r}, with the bias, is {float(told.flatten()[worst]):.3g}, and the score is "
        f"{float(scores.flatten()[worst]):.3g}: between this layer and the score is more than a mean and the linear layer (a "
        "ReLU, a norm, another block?), so the map's values are not the score's parts"
    )
    return (Finding("not the score's parts", layer, share, sentence),)


_APART = 0.05
"""The difference of two scores, as a share of the larger, that rounding does not explain, in bfloat16 either."""


_SOME = 8
"""The number of channels from which it is strange that one has more weight than all others."""


def about_weights(weights: Sequence[Weights], layers: Sequence[str]) -> tuple[Finding, ...]:
    """Find softmax weights that are nearly equal (the map is the mean activation) or dominated by one channel."""
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
        elif strongest > (0.5 if w.shape[-1] >= _SOME else 0.9):
            sentence = (
                f"one channel at layer {name!r} has {strongest:.0%} of the weight: the map is roughly that channel, and "
                "blank if that is nowhere positive"
            )
            found.append(Finding("one channel", name, strongest, sentence))
    return tuple(found)


def effective_channels(weights: Weights) -> Tensor:
    """The effective number of channels, `exp(entropy(w))` of the normalized non-negative weights, `(n, t)`."""
    share = weights.clamp(min=0) / weights.clamp(min=0).sum(-1, keepdim=True)
    return torch.exp(torch.special.entr(share).sum(-1))


def about_activations(activations: Sequence[Activations], layers: Sequence[str]) -> tuple[Finding, ...]:
    """Find channels that are not finite, or constant in every image."""
    found = []
    for name, values in zip(layers, activations):
        wild = float((~torch.isfinite(values)).any(-1).any(0).float().mean())
        dead = float(is_flat(values.amin(-1), values.amax(-1), values.dtype).all(0).float().mean())
        if wild:
            sentence = f"{wild:.1%} of the channels at layer {name!r} have NaN or infinite values: a map of them is meaningless"
            found.append(Finding("non-finite channels", name, wild, sentence))
        if dead >= 0.5:
            sentence = (
                f"{dead:.0%} of the channels at layer {name!r} are dead: one value at all positions, in every image; "
                "the map depends on the others"
            )
            found.append(Finding("dead channels", name, dead, sentence))
    return tuple(found)


def about_lost(reasons: Mapping[str, str]) -> tuple[Finding, ...]:
    """Find layers that no gradient reaches. `reasons` has a sentence for each."""
    return tuple(Finding("no gradient", name, 1.0, f"{reason}; the map is zeros") for name, reason in reasons.items())


def about_gradients(gradients: Sequence[Gradients], layers: Sequence[str]) -> tuple[Finding, ...]:
    """Find gradients that are zero, or the same at every position."""
    return tuple(
        finding
        for name, slopes in zip(layers, gradients)
        for check in (_zero_gradient, _uniform_gradient)
        for finding in check(name, slopes)
    )


def _zero_gradient(name: str, slopes: Gradients) -> list[Finding]:
    none = float((slopes == 0).flatten(2).all(-1).float().mean())
    if not none:
        return []
    part = "the gradient" if none == 1 else f"{none:.0%} of the gradients"
    sentence = (
        f"{part} at layer {name!r} is zero throughout, though the graph is whole: no small change of the layer changes the "
        "score (a ReLU after the layer that is zero everywhere? a saturated or clipped score? the last block of a transformer "
        "whose head reads only the class token?)"
    )
    return [Finding("no gradient", name, none, sentence)]


def _uniform_gradient(name: str, slopes: Gradients) -> list[Finding]:
    if slopes.shape[-1] < 2 or not bool((slopes != 0).any()):
        return []
    spread, size = (slopes - slopes.mean(-1, keepdim=True)).abs().amax(), slopes.abs().amax()
    if bool(spread > 100 * torch.finfo(slopes.dtype).eps * size):
        return []
    sentence = (
        f"after layer {name!r} the class no longer depends on position (the gradient is the same everywhere, as before global "
        "average pooling and a linear layer): Grad-CAM, HiResCAM and XGrad-CAM all give the map of CAM there"
    )
    return [Finding("no position", name, 1.0, sentence)]

"""Compositions that combine several maps of one input: of several layers, or of several methods."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from camfn._errors import CamError
from camfn._types import Layer, Maps
from camfn.compose._common import Question, composed, each_layer, joined, scaled
from camfn.formulas import maps, weights
from camfn.methods._common import checked_size
from camfn.methods.registry import Need, Outcome, made
from camfn.model.ports import is_several
from camfn.model.task import begin

How = Literal["max", "mean", "product", "winsorized"]


def fuse_layers(
    method: Callable[..., Maps], layers: Sequence[Layer], how: How = "max", *, percentile: float = 90.0
) -> Callable[..., Maps]:
    """Return a method whose map fuses a method's maps at several layers.

    The **normalized** maps are resized to a common size, by default the largest side of each axis, and fused by `how`.

    The cost is one call of the method for all layers, which share its forward pass.

    **Arguments**

    - `method`: as in `camfn.smooth`.
    - `layers`: the layers, by name or as modules.
    - `how="max"`: the maximum, as torchcam's `fuse_cams`.
    - `how="mean"`: the mean, as pytorch-grad-cam's maps of several layers.
    - `how="product"`: the product. This is Refine-CAM, which uses `camfn.grad_cam_pp` in its paper.
    - `how="winsorized"`: `sum_l v_l L_l`. This is Winsor-CAM, for methods whose weights `camfn.explain` returns. The importance
      of a layer is the mean of its channels' weights, or zero if that is negative. Importances above their `percentile`, taken
      over those that are not zero, are clipped to it. v are the clipped importances, min-max scaled to [0.1, 1]. A layer of
      importance zero has v = 0.
    - `percentile`: the percentile of `how="winsorized"`.

    **Returns** a method like any other (see `camfn.smooth`), which takes `None` for the layer, because the layers are set.

    **Raises** `CamError` for invalid options, and for a function that is not a method.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> method = camfn.fuse_layers(camfn.grad_cam, ["0", "1"], how="product")
    >>> method(model, None, torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 6, 6])

    How to Evaluate and Refine your CAM, 2026 (arXiv 2605.14641); Wall et al., Winsor-CAM, TPAMI 2026 (arXiv 2507.10846).
    """
    inner = made(method)
    if not is_several(layers) or not layers:
        raise CamError(f"layers must be a sequence of names or modules, with at least one in it; found {layers!r}")
    if how not in get_args(How):
        raise CamError(f"how={how!r} must be one of {', '.join(map(repr, get_args(How)))}")
    if not 0 <= percentile <= 100:
        raise CamError(f"percentile={percentile!r} must be from 0 to 100")

    def answer(question: Question) -> Outcome:
        outcome = question._replace(layer=layers).put_to(inner, size=None, normalize=True)
        lead = 1 if outcome.single else 2
        batch = begin(question.model, question.x, question.state, question.masked, question.axes).batch
        size = checked_size(question.size, batch, outcome.maps[0].ndim - lead)
        fused = _fused(_resized(tuple(outcome.maps), size, lead), how, outcome, percentile)
        return joined(scaled(fused, fused.ndim - lead, question.normalize), [outcome], outcome)

    return composed(f"fuse_layers({inner.name})", answer, False, inner.needs)


def _resized(found: Sequence[Tensor], to: Sequence[int] | None, lead: int) -> Tensor:
    """Resize maps to one size, by default the largest side of each axis, and stack them."""
    if len({m.ndim for m in found}) > 1:
        raise CamError(f"the maps to combine have different axes: {[tuple(m.shape[lead:]) for m in found]}")
    to = to or tuple(max(sides) for sides in zip(*(m.shape[lead:] for m in found)))
    return torch.stack([maps.resize(m, to) for m in found])


def _fused(found: Tensor, how: How, outcome: Outcome, percentile: float) -> Tensor:
    """Fuse stacked maps into one."""
    if how == "max":
        return found.amax(0)
    if how == "mean":
        return found.mean(0)
    if how == "product":
        return found.prod(0)
    if not outcome.weights:
        raise CamError('how="winsorized" needs weights of channels, and the method has none')
    shares = weights.winsor_cam(outcome.weights, percentile)
    shares = shares[..., 0] if outcome.single else shares
    return (found * shares.reshape(*shares.shape, *[1] * (found.ndim - shares.ndim))).sum(0)


def ensemble(methods: Sequence[Callable[..., Maps]]) -> Callable[..., Maps]:
    """Return a method whose map is the mean of several methods' maps of one input.

    The mean is of **normalized** maps. Without `size=`, each map has its own grid, and is resized to the largest. The cost is
    that of all the methods.

    **Arguments**

    - `methods`: the methods, each as in `camfn.smooth`. A method without a layer gets none.

    **Returns** a method like any other (see `camfn.smooth`), which takes only the arguments that all methods share. Set the
    options of a single method with `functools.partial`.

    **Raises** `CamError` for an empty list, for options of a single method, and for a function that is not a method.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> method = camfn.ensemble([camfn.grad_cam, camfn.score_cam])
    >>> method(model, "1", torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 6, 6])
    """
    inner = [made(method) for method in methods]
    if not inner:
        raise CamError("methods is empty: name one at least")
    name = f"ensemble({', '.join(one.name for one in inner)})"

    def answer(question: Question) -> Outcome:
        if question.own:
            raise CamError(
                f"{name} has no option {', '.join(question.own)}: functools.partial sets those of one of its methods"
            )
        layers = [question.layer if one.of_layer else None for one in inner]
        outcomes = [question._replace(layer=layer).put_to(one, normalize=True) for one, layer in zip(inner, layers)]
        lead = 1 if outcomes[0].single else 2

        def mean(*found: Tensor) -> Tensor:
            total = _resized(found, None, lead).mean(0)
            return scaled(total, total.ndim - lead, question.normalize)

        return joined(each_layer(mean, *(outcome.maps for outcome in outcomes)), outcomes, outcomes[0])

    needs = frozenset[Need]().union(*(one.needs for one in inner))
    return composed(name, answer, any(one.of_layer for one in inner), needs)

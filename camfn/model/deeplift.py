"""DeepLIFT's rescale rule through the head: attributions of the score's difference between the activation and zeros.

Every operation that is not affine in the activation is replaced by the affine function that agrees with it at the activation
and at zeros. The head is then affine. Its gradient is the multipliers, and multipliers times activation sum to the difference
of the scores (Shrikumar et al., 2017, arXiv 1704.02685).
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vjp
from torch.utils._pytree import tree_map

from camfn import _compat
from camfn._errors import CamError, layer_called
from camfn._types import wide
from camfn.model.forward import Forward, tell_lost
from camfn.model.gradients import ungraphed
from camfn.model.head import Head, agree, head_of
from camfn.model.tape import Operation, Value, leaves, mapped
from camfn.targets import Score, score_rows

_POINTS = 32  # quadrature points between two outputs; one is enough for a score that is linear in the logits


class Three(NamedTuple):
    """An intermediate value: as the affine function of the activation, at the activation, and at zeros."""

    line: Any  # the affine function, which is differentiated
    there: Any  # at the activation
    base: Any  # at zeros


def multipliers(forward: Forward, layer: str, activation: Tensor, score: Score) -> list[Tensor]:
    """The multipliers `m` of each target: the gradient of the affine function, in the layer's own shape."""
    # The head is recorded at zeros and tested at the activation, the two values of the rule.
    zeros = torch.zeros_like(activation)
    head = head_of(forward.task, layer, forward.batch.x, zeros, lambda head: _gives_clean(head, forward, activation))
    given = activation, head.handed(forward.task.state, forward.batch.x), score.rows
    with torch.inference_mode(False):
        activation, handed, rows = given if forward.task.graphed or _compat.transformed() else tree_map(ungraphed, given)
        found = _multipliers(head, layer, activation, handed, score._replace(rows=rows))
    if not _compat.transformed() and not any(bool(each.any()) for each in found):
        tell_lost(forward, layer, score)
    return found


def _gives_clean(head: Head, forward: Forward, activation: Tensor) -> bool:
    return agree(head.at(forward.task.state, forward.batch.x)(activation), forward.output)


def _multipliers(head: Head, layer: str, activation: Tensor, handed: Sequence[Tensor], score: Score) -> list[Tensor]:
    dtype = wide(activation.dtype)
    there, base = activation.to(dtype), torch.zeros_like(activation, dtype=dtype)
    handed = [t.to(dtype) if t.is_floating_point() else t for t in handed]
    points, shares = _quadrature(1 if score.linear else _POINTS)

    def scores(value: Tensor) -> Tensor:
        output = _followed(head, layer, Three(value, there, base), handed)
        parts = [score_rows(score.of, head.unflatten([_between(o, s) for o in output]), score.rows) for s in points]
        return torch.stack([share * part for share, part in zip(shares, parts)]).sum(0)

    pulled: Any = vjp(scores, there)
    found, pull = pulled
    one_hot = torch.eye(found.shape[1], dtype=found.dtype, device=found.device)
    return [pull(row.expand_as(found))[0] for row in one_hot]


def _quadrature(count: int) -> tuple[list[float], list[float]]:
    """The points in [0, 1] and the weights of Gauss-Legendre quadrature."""
    points, shares = np.polynomial.legendre.leggauss(count)
    return ((points + 1) / 2).tolist(), (shares / 2).tolist()


def _between(leaf: Any, share: float) -> Any:
    """An output at `share` of the way from zeros to the activation, with the line's gradient: the score is linearized there."""
    if not isinstance(leaf, Three):
        return leaf
    if not leaf.there.is_floating_point():
        return leaf.there
    return leaf.base + share * (leaf.there - leaf.base) + (leaf.line - leaf.there)


def _followed(head: Head, layer: str, value: Three, handed: Sequence[Tensor]) -> list[Any]:
    """Run the head operation by operation, and return its outputs."""
    rest = head.record.rest
    known: list[Any] = [value, *handed]
    for operation in rest.operations:
        known.append(_ruled(operation, known, layer))
    return mapped(lambda leaf: known[leaf] if isinstance(leaf, Value) else leaf, rest.results)


# ----------------------------------------------------------------------------------------------------------- the rules


def _named(names: str) -> frozenset[str]:
    """A set of aten operations."""
    return frozenset(names.split())


_NORMS = _named("native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm")
_AFFINE = _NORMS | _named(
    """
    add sub rsub neg mul div sum mean cumsum mm bmm mv dot addmm addmv baddbmm linear convolution cat stack getitem view
    _unsafe_view reshape expand permute transpose t squeeze unsqueeze slice select narrow split split_with_sizes chunk unbind
    clone alias contiguous repeat roll flip as_strided diagonal index index_select gather where constant_pad_nd
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d pixel_shuffle
    pixel_unshuffle im2col col2im unfold upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
    upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    _adaptive_avg_pool2d _adaptive_avg_pool3d slice_scatter select_scatter zeros_like ones_like full_like new_zeros
    new_ones new_full
    """
)
"""Operations that are affine in their tensors, under the conditions of `_ONE_OF` and `_STILL`."""

_ONE_OF = {name: {0, 1} for name in _named("mul mm bmm mv dot")} | {name: {1, 2} for name in _named("addmm addmv baddbmm")}
"""Products: at most one of these arguments may depend on the activation."""

_STILL = {name: {1, 2, 3, 4} for name in _named("div index index_select gather linear convolution") | _NORMS} | {"where": {0}}
"""None of these arguments may depend on the activation."""

_CURVES = _named(
    """
    relu leaky_relu _prelu_kernel elu celu selu gelu silu mish sigmoid tanh softplus hardtanh hardswish hardsigmoid softshrink
    hardshrink threshold clamp clamp_min clamp_max maximum minimum abs exp log log1p sqrt rsqrt reciprocal pow sin cos erf
    """
)
"""Element-wise functions of the first argument."""

_POOLS = {"max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3}
"""Max-pooling operations that return indices, and the number of their spatial axes."""


def _ruled(operation: Operation, known: list[Any], layer: str) -> Three:
    """Apply the rule for an operation."""
    target: Any = operation.target
    name = "getitem" if target is operator.getitem else target.overloadpacket.__name__
    moving = {i for i, argument in enumerate(operation.args) if _moves(argument, known)}
    dtype: Any = operation.kwargs.get("dtype", torch.float32)
    if name == "detach" or (name == "_to_copy" and dtype.is_floating_point):
        return known[operation.args[0]]  # the same values; casts are dropped, since the whole head runs in one dtype
    if name in _CURVES and moving == {0}:
        return _curve(target, *(_given(operation, known, i) for i in range(3)))
    if name in _POOLS or (name in ("amax", "max") and moving == {0}):
        return _maximum(name, target, *(_given(operation, known, i) for i in range(3)))
    product = len(moving & _ONE_OF.get(name, set())) > 1 or moving & _STILL.get(name, set())
    if name not in _AFFINE or product or _is_rounded_or_trained(name, operation):
        raise CamError(
            f"lift_cam has no rule for {target}{' with these arguments' if product else ''}, after {layer_called(layer)}: its "
            "rules are for operations that are affine in the activation, element-wise functions and max-pooling; choose a "
            "later layer, or another method"
        )
    return Three(*(target(*args, **kwargs) for args, kwargs in (_given(operation, known, i) for i in range(3))))


def _moves(argument: Any, known: list[Any]) -> bool:
    return any(isinstance(known[value], Three) for value in leaves(argument, Value))


def _given(operation: Operation, known: list[Any], i: int) -> Any:
    """The arguments of an operation for field `i` of `Three`."""

    def one(leaf: Any) -> Any:
        found = known[leaf] if isinstance(leaf, Value) else leaf
        return found[i] if isinstance(found, Three) else found

    return mapped(one, (operation.args, operation.kwargs))


def _is_rounded_or_trained(name: str, operation: Operation) -> bool:
    """Whether the operation is a division with rounding, or a batch norm with the statistics of the batch."""
    return bool(operation.kwargs.get("rounding_mode")) or (name.endswith("batch_norm") and operation.args[5] is True)


def _curve(target: Any, line: Any, there: Any, base: Any) -> Three:
    """The line through both values; if they nearly coincide, with the slope at their mean."""
    ((z, *_), _), ((a, *rest), kwargs), ((b, *_), _) = line, there, base

    def curve(value: Tensor) -> Tensor:
        return target(value, *rest, **kwargs)

    at, zero = curve(a), curve(b)
    step = a - b
    near = step.abs() <= torch.finfo(a.dtype).eps ** 0.5 * torch.maximum(a.abs(), b.abs())
    middle = (a + b) / 2
    between = (at - zero) / torch.where(near, 1, step)
    # `jvp` is not used: its levels are shared by all threads of the process.
    slope = torch.where(near, grad(lambda value: curve(value).sum())(middle), between)
    return Three(zero + slope * (z - b), at, zero)


def _maximum(name: str, target: Any, line: Any, there: Any, base: Any) -> Three:
    """The rule for maxima, as in DeepSHAP.

    With `top` the larger of both maxima, the rise from the maximum of zeros to `top` goes to the position of the activation's
    maximum. The fall from `top` to the activation's maximum goes to the position of the maximum of zeros.
    """
    z, a, b = (args[0] for args, _ in (line, there, base))
    ends = [target(*args, **kwargs) for args, kwargs in (there, base)]
    tells = isinstance(ends[0], tuple)  # whether the operation also returns the indices
    axes = tuple(range(-_POOLS[name], 0)) if name in _POOLS else _reduced(there)

    def lay(value: Tensor) -> Tensor:
        return value.movedim(axes, tuple(range(-len(axes), 0))).flatten(-len(axes))

    if name in _POOLS:
        i, j = (end[1].flatten(-len(axes)) for end in ends)
    else:
        i, j = (lay(value).argmax(-1, keepdim=True) for value in (a, b))
    high, low = lay(a).gather(-1, i), lay(b).gather(-1, j)
    top = torch.maximum(high, low)
    # At positions whose values are equal, the slope does not affect the difference: take the derivative at the activation.
    rise, fall = high - lay(b).gather(-1, i), lay(a).gather(-1, j) - low
    up = torch.where(rise == 0, 1, (top - low) / torch.where(rise == 0, 1, rise))
    down = torch.where(fall == 0, 0, (high - top) / torch.where(fall == 0, 1, fall))
    found = low + up * (lay(z).gather(-1, i) - lay(b).gather(-1, i)) + down * (lay(z).gather(-1, j) - low)
    found = found.reshape((ends[0][0] if tells else ends[0]).shape)
    return Three((found, ends[0][1]) if tells else found, *ends)


def _reduced(there: Any) -> tuple[int, ...]:
    """The axes that `amax` or `max` reduces."""
    (value, *rest), kwargs = there
    dim = rest[0] if rest else kwargs.get("dim", ())
    return tuple(dim if isinstance(dim, (list, tuple)) else (dim,)) or tuple(range(value.ndim))

"""Attention probabilities, which no layer returns: a forward pass runs with its attention written out, in this thread only.

`scaled_dot_product_attention` never computes them, and eager attention does not return them. A torch-function mode, active for
one call, computes the first explicitly and traces the softmax of the second. Attention is a softmax over the last axis whose
result multiplies values in a matrix product; the softmax of a classifier or a router does not.
"""

import functools
import math
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Inputs, State, wide
from camfn.model.capture import copied, watch
from camfn.model.prepare import Call, Prepared

T = TypeVar("T")

Nudge = Sequence[Tensor] | Callable[[Tensor], Tensor] | None
"""The summand of the probabilities: a tensor for each layer, or a function from the probabilities to one."""


class Attention(NamedTuple):
    """The self-attention of a forward pass, layer by layer in the order of execution, each `(n, heads, q, k)`."""

    seen: tuple[Tensor, ...]  # the probabilities, before the nudge
    logits: tuple[Tensor, ...]  # their logits: scaled, and with masks and position biases added


def attended(run: Callable[[], T], nudge: Nudge = None, *, held: bool = False) -> tuple[T, Attention]:
    """Call `run()`, and return its result and its attention.

    The gradient with respect to a zero nudge is the gradient at the probabilities. If `held`, queries, keys and values are
    constants for that gradient, which then reaches a layer only through the residual stream.

    Raises `CamError` if the numbers of queries and keys differ, if dropout is active, or if a softmax cannot be traced to its
    values.

    >>> import torch, torch.nn.functional as F
    >>> q = k = v = torch.eye(2)[None, None]
    >>> out, attention = attended(lambda: F.scaled_dot_product_attention(q, k, v))
    >>> torch.allclose(attention.seen[0], out), attention.logits[0].diagonal(dim1=-2, dim2=-1).mean().item()
    (True, 0.7071067690849304)
    """
    mode = _WrittenOut(nudge, held)
    with mode:
        out = run()
    mode.finish()
    return out, Attention(tuple(mode.seen), tuple(mode.logits))


def unfused(run: Callable[[], T]) -> T:
    """Call `run()` with all attention written out: fused kernels have no second derivative and no batching rule for `vmap`."""
    with _Unfused(None, False):
        return run()


def self_attention(attention: Attention, n: int) -> Attention:
    """Check that every layer attends from all tokens of an image to all of them, with the same tokens in all layers."""
    shapes = [tuple(seen.shape) for seen in attention.seen]
    if not shapes:
        raise CamError(
            "the model has no attention that could be seen: neither scaled_dot_product_attention nor a softmax that weighs "
            "values ran (custom kernels, such as flash or flex attention, are not seen: choose eager or sdpa attention)"
        )
    odd = next((shape for shape in shapes if len(shape) != 4 or shape[0] != n), None)
    if odd is not None:
        raise CamError(
            f"attention of shape {odd} for a batch of {n}: it is over windows or groups of tokens (as in Swin), and paths "
            "through them are not those of one set of tokens; use a method that takes a layer, such as camfn.grad_cam"
        )
    counts = list(dict.fromkeys(shape[-1] for shape in shapes))
    if len(counts) > 1:
        raise CamError(
            f"the number of tokens changes from layer to layer ({', '.join(map(str, counts))}): attention of one layer cannot "
            "be followed into the next; use a method that takes a layer, or pass only the image tower of a model with several"
        )
    return attention


class Blocks(NamedTuple):
    """The block of each attention layer: the outermost module that returns all tokens and contains no other attention layer."""

    names: list[str]
    axis: int  # the axis of the tokens: 1 for `(n, tokens, c)`, 0 for `(tokens, n, c)` as in torch's own transformers


def blocks_of(model: nn.Module | Prepared | Call, state: State, x: Inputs, n: int) -> Blocks:
    """Find the blocks, by a forward pass of the first of the n images. Companion inputs without n rows are shared."""

    def row(leaf: Any) -> Any:
        rows = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == (1 if isinstance(x, list) else n)
        return leaf[:1].clone() if rows else copied(leaf)

    batch: Any = [image[None] for image in x[:1]] if isinstance(x, list) else x
    first = tree_map(row, batch)
    first = [image[0] for image in first] if isinstance(x, list) else first
    return _find_blocks(model, state, first)


def _find_blocks(model: nn.Module | Prepared | Call, state: State, x: Inputs) -> Blocks:
    around, axes, attention = _watched(model, state, x)
    self_attention(attention, 1)
    layers_in = Counter(name for names in around for name in names)
    blocks = [name for names in around for name in [name for name in names if layers_in[name] == 1 and name in axes][-1:]]
    if len(blocks) < len(around) or len({(name.rpartition(".")[0], axes[name]) for name in blocks}) > 1:
        raise CamError(
            f"the model's {len(around)} attention layers are not in one row of blocks that return all tokens as one tensor; "
            f"found {', '.join(map(repr, blocks)) or 'none'}"
        )
    return Blocks(blocks, axes[blocks[0]])


def _watched(model: nn.Module | Prepared | Call, state: State, x: Inputs) -> tuple[list[list[str]], dict[str, int], Attention]:
    """Run one image, and return the modules around each attention layer, innermost first; the axis of the tokens, for each
    module that returns them; and the attention."""
    around: list[list[str]] = []
    axes: dict[str, int] = {}
    passed: list[Tensor] = []

    def pass_by(probabilities: Tensor) -> Tensor:
        passed.append(probabilities)
        return torch.zeros_like(probabilities)

    def see(name: str, args: tuple[Any, ...], out: Any) -> None:
        # The first module to return after the attention is its caller, or a module that its caller ran afterwards.
        around.extend([_containers(name)] * (len(passed) - len(around)))
        out = out[0] if isinstance(out, (tuple, list)) and len(out) == 1 else out
        if passed and isinstance(out, Tensor) and out.ndim == 3 and {1, passed[0].shape[-1]} == set(out.shape[:2]):
            axes[name] = 1 if out.shape[0] == 1 else 0

    with torch.no_grad():
        _, attention = attended(lambda: watch(model, state, x, see), pass_by)
    return around, axes, attention


def _containers(name: str) -> list[str]:
    """The module and its ancestors, innermost first: `a.b.c`, `a.b`, `a`."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


# ------------------------------------------------------------------------------------------- written-out attention


_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
_PRODUCT = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_SAME = frozenset(
    (
        *("dropout", "to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone"),
        *("mul", "div", "masked_fill", "view", "reshape", "flatten", "unflatten"),
    )
)
"""Functions whose results still count as probabilities, if the axes of queries and keys stay the last two."""


class _Softmax:
    """A softmax, and whether its result has reached a product with values."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.arrived = False


class _WrittenOut(TorchFunctionMode):
    """A mode in which attention is computed with explicit probabilities, in this thread only."""

    def __init__(self, nudge: Nudge, held: bool) -> None:
        super().__init__()
        self.nudge = nudge
        self.held = held
        self.heads = 1  # number of heads in the first axis of three-dimensional probabilities
        self.seen: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.followed: dict[int, tuple[Tensor, _Softmax]] = {}  # by id; the tensor is kept alive, so that ids stay unique

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._scaled_dot_product(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        if func in _SOFTMAX:
            return self._softmax(func, args, kwargs)
        if self.followed and args:
            return self._follow(func, args, kwargs)
        return func(*args, **kwargs)

    def _scaled_dot_product(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """torch's documented formula, in float32 or wider, as the fused kernels accumulate."""
        if dropout_p > 0:
            raise CamError(f"attention draws random numbers in eval mode (dropout_p={dropout_p}): obey self.training")
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        with _compat.without_autocast(query.device):
            logits = scale * query.to(wide(query.dtype)) @ key.to(wide(key.dtype)).mT
            if is_causal:
                attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
            probabilities, logits = _masked_softmax(logits, attn_mask)
            return self._weigh(probabilities, logits, value.to(logits.dtype), torch.matmul).to(value.dtype)

    def _multi_head(self, *args: Any, **kwargs: Any) -> Any:
        """torch's own function, with the mode active again: torch disables a mode inside its own handler."""
        outer, self.heads = self.heads, kwargs["num_heads"] if "num_heads" in kwargs else args[4]
        with self:
            out = _MULTI_HEAD(*args, **kwargs)
        self.heads = outer
        return out

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        logits = args[0] if args else kwargs["input"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        out = func(*args, **kwargs)
        if logits.ndim > 2 and dim in (-1, logits.ndim - 1):
            self.followed[id(out)] = out, _Softmax(logits)
        return out

    def _follow(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.einsum:
            return self._einsum(*args)
        first, source = self.followed.get(id(args[0]), (None, None))
        if first is None or source is None:
            return func(*args, **kwargs)
        if func in _PRODUCT and len(args) == 2 and args[1].ndim == first.ndim:
            return self._arrive(source, first, args[1], func)
        out = func(*args, **kwargs)
        same = isinstance(out, Tensor) and getattr(func, "__name__", "") in _SAME
        if same and out.shape[-2:] == first.shape[-2:]:
            self.followed[id(out)] = out, source
        return out

    def _einsum(self, equation: str, *operands: Any) -> Tensor:
        factors = operands[0] if isinstance(operands[0], (list, tuple)) else operands
        for place, factor in enumerate(factors):
            _, source = self.followed.get(id(factor), (None, None))
            if source is not None and len(factors) == 2 and _weighs(equation, place):
                product = functools.partial(_einsum, equation, bool(place))
                return self._arrive(source, factor, factors[1 - place], product)
        return torch.einsum(equation, *operands)

    def _arrive(self, source: _Softmax, probabilities: Tensor, values: Tensor, product: Callable[..., Tensor]) -> Tensor:
        source.arrived = True
        return self._weigh(probabilities, source.logits, values, product)

    def _weigh(self, probabilities: Tensor, logits: Tensor, values: Tensor, product: Callable[..., Tensor]) -> Tensor:
        """Record the probabilities, nudge them, and multiply them with the values."""
        seen = probabilities.unflatten(0, (-1, self.heads)) if probabilities.ndim == 3 else probabilities
        if seen.shape[-2] != seen.shape[-1]:
            raise CamError(
                f"attention of {seen.shape[-2]} queries to {seen.shape[-1]} keys (shape {tuple(seen.shape)}): cross-attention "
                "and pooled attention do not map the image to itself; use a method that takes a layer, such as camfn.grad_cam"
            )
        if self.held:
            seen, values = _compat.constant(seen), _compat.constant(values)
        onward = seen
        if self.nudge is not None:
            onward = seen + (self.nudge(seen) if callable(self.nudge) else self.nudge[len(self.seen)])
        self.seen.append(seen)
        self.logits.append(logits.reshape(seen.shape))
        return product(onward.reshape(probabilities.shape), values)

    def finish(self) -> None:
        """Raise if a softmax over queries and keys reached no values: its attention would be missing silently."""
        for _, source in self.followed.values():
            shape = tuple(source.logits.shape)
            if not source.arrived and len(shape) > 3 and shape[-2] == shape[-1]:
                raise CamError(
                    f"a softmax of shape {shape} looks like attention, but cannot be traced to a product with values (talking "
                    "heads, or a product written in another way?)"
                )


class _Unfused(_WrittenOut):
    """Written-out attention without tracing, checks and nudges."""

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        return func(*args, **kwargs)

    def _weigh(self, probabilities: Tensor, logits: Tensor, values: Tensor, product: Callable[..., Tensor]) -> Tensor:
        return product(probabilities, values)


_MULTI_HEAD = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
"""torch's function with modified globals, so that it does not dispatch to the mode again."""


def _masked_softmax(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The softmax of masked logits, and these logits. A row with all keys masked is zeros, as in torch's kernels."""
    if mask is None:
        return torch.softmax(logits, -1), logits
    logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    empty = (logits == -math.inf).all(-1, keepdim=True)
    return torch.where(empty, 0, torch.softmax(torch.where(empty, 0, logits), -1)), logits


def _einsum(equation: str, turned: bool, probabilities: Tensor, values: Tensor) -> Tensor:
    return torch.einsum(equation, *((values, probabilities) if turned else (probabilities, values)))


def _weighs(equation: str, place: int) -> bool:
    """Whether the operand at `place` multiplies values: its last axis is summed, and the other operand has no query axis."""
    operands, _, out = equation.replace(" ", "").partition("->")
    names = operands.split(",")
    (batch, *_, query, key), other = names[place], names[1 - place]
    return batch in other and key in other and key not in out and query in out and query not in other

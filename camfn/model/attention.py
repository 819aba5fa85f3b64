"""Attention probabilities, which no layer returns: a forward runs with its attention written out, in this thread only.

`scaled_dot_product_attention` never makes them, and eager attention keeps them to itself. So a torch-function mode, for the
one call, computes the first by hand and follows what becomes of a softmax in the second: attention is a softmax over the last
axis whose result weighs values in a matrix product. A classifier's or a router's softmax weighs none.
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
from camfn.model.capture import watch
from camfn.model.prepare import Call, Prepared

T = TypeVar("T")

Nudge = Sequence[Tensor] | Callable[[Tensor], Tensor] | None
"""What is added to the probabilities: a tensor for each layer, or a function that makes one from them."""


class Attention(NamedTuple):
    """What the self-attention of a forward was, layer by layer in the order of execution, each `(n, heads, q, k)`."""

    seen: tuple[Tensor, ...]  # probabilities: what the values were weighed by, before the nudge
    logits: tuple[Tensor, ...]  # what they are the softmax of: scaled, with masks and position biases in


@_compat.eager
def attended(run: Callable[[], T], nudge: Nudge = None, *, held: bool = False) -> tuple[T, Attention]:
    """What `run()` returns, and the attention in it.

    The gradient with respect to a zero nudge *is* the gradient at the probabilities. `held`: queries, keys and values are
    constants to that gradient, which then reaches a layer by the residual stream alone.

    Raises `CamError` where queries and keys differ in number, dropout draws, or a softmax cannot be followed.

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


@_compat.eager
def unfused(run: Callable[[], T]) -> T:
    """What `run()` returns, with attention of every kind written out: fused kernels have no second derivative, and no rule for
    being mapped over."""
    with _Unfused(None, False):
        return run()


def self_attention(attention: Attention, n: int) -> Attention:
    """The attention, where it is of all tokens of an image to all of them, the same ones in every layer; else an error."""
    shapes = [tuple(seen.shape) for seen in attention.seen]
    if not shapes:
        raise CamError(
            "the model has no attention that could be seen: neither scaled_dot_product_attention nor a softmax that weighs "
            "values ran (a kernel of its own, such as flash or flex attention, is not seen: choose eager or sdpa attention)"
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
    """The block around every attention layer: the outermost module that has no other layer in it and returns all tokens."""

    names: list[str]
    axis: int  # of the tokens: `(n, tokens, c)`, or `(tokens, n, c)` as torch's own transformers have them


@_compat.eager
def blocks_of(model: nn.Module | Prepared | Call, state: State, x: Inputs) -> Blocks:
    """Found in a forward of the first image."""
    batch: Any = [image[None] for image in x[:1]] if isinstance(x, list) else x
    first = tree_map(lambda leaf: leaf[:1].clone() if isinstance(leaf, Tensor) else leaf, batch)
    first = [image[0] for image in first] if isinstance(x, list) else first
    return _find_blocks(model, state, first)


def _find_blocks(model: nn.Module | Prepared | Call, state: State, x: Inputs) -> Blocks:
    around, axes, attention = _watched(model, state, x)
    self_attention(attention, 1)
    layers_in = Counter(name for names in around for name in names)
    blocks = [name for names in around for name in [name for name in names if layers_in[name] == 1 and name in axes][-1:]]
    if len(blocks) < len(around) or len({(name.rpartition(".")[0], axes[name]) for name in blocks}) > 1:
        raise CamError(
            f"the model's {len(around)} attention layers are not in one row of blocks, each of which returns all tokens as one "
            f"tensor; found {', '.join(map(repr, blocks)) or 'none'}"
        )
    return Blocks(blocks, axes[blocks[0]])


def _watched(model: nn.Module | Prepared | Call, state: State, x: Inputs) -> tuple[list[list[str]], dict[str, int], Attention]:
    """In a forward of one image: for each attention layer the modules around it, innermost first; the axis of the tokens of
    every module that returns them; and the attention."""
    around: list[list[str]] = []
    axes: dict[str, int] = {}
    passed: list[Tensor] = []

    def pass_by(probabilities: Tensor) -> Tensor:
        passed.append(probabilities)
        return torch.zeros_like(probabilities)

    def see(name: str, args: tuple[Any, ...], out: Any) -> None:
        # The first to return after the attention is what called it, or ran after it in there.
        around.extend([_containers(name)] * (len(passed) - len(around)))
        out = out[0] if isinstance(out, (tuple, list)) and len(out) == 1 else out
        if passed and isinstance(out, Tensor) and out.ndim == 3 and {1, passed[0].shape[-1]} == set(out.shape[:2]):
            axes[name] = 1 if out.shape[0] == 1 else 0

    with torch.no_grad():
        _, attention = attended(lambda: watch(model, state, x, see), pass_by)
    return around, axes, attention


def _containers(name: str) -> list[str]:
    """`a.b.c`, `a.b`, `a`."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


# ---------------------------------------------------------------------------------------------------- the written-out


_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
_PRODUCT = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_SAME = frozenset(
    (
        *("dropout", "to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone"),
        *("mul", "div", "masked_fill", "view", "reshape", "flatten", "unflatten"),
    )
)
"""Functions after which probabilities are still looked for, where queries and keys keep their places."""


class _Softmax:
    """One softmax, and whether its result came to weigh values."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.arrived = False


class _WrittenOut(TorchFunctionMode):
    """Inside, in this thread only, attention is computed with its probabilities in the open."""

    def __init__(self, nudge: Nudge, held: bool) -> None:
        super().__init__()
        self.nudge = nudge
        self.held = held
        self.heads = 1  # of a product of three axes: the heads in its first
        self.seen: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.followed: dict[int, tuple[Tensor, _Softmax]] = {}  # by id, of tensors that are kept alive here

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
        """As torch documents it. In float32 or wider, as the fused kernels add up."""
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
        """torch's own function, inside which the mode is on again: torch turns it off in what a mode runs."""
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
        """The values weighed by what is seen and nudged."""
        seen = probabilities.unflatten(0, (-1, self.heads)) if probabilities.ndim == 3 else probabilities
        if seen.shape[-2] != seen.shape[-1]:
            raise CamError(
                f"attention of {seen.shape[-2]} queries to {seen.shape[-1]} keys (shape {tuple(seen.shape)}): between two sets "
                "of tokens, or pooled, it is no map of the image to itself; use a method that takes a layer, such as "
                "camfn.grad_cam"
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
        """A softmax of queries by keys that came to no values was attention all the same, and would be missing in silence."""
        for _, source in self.followed.values():
            shape = tuple(source.logits.shape)
            if not source.arrived and len(shape) > 3 and shape[-2] == shape[-1]:
                raise CamError(
                    f"a softmax of shape {shape} looks like attention, and what becomes of it cannot be followed to a product "
                    "with values (talking heads, or a product written in another way?)"
                )


class _Unfused(_WrittenOut):
    """Nothing of it is followed, and nothing is wrong with it."""

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        return func(*args, **kwargs)

    def _weigh(self, probabilities: Tensor, logits: Tensor, values: Tensor, product: Callable[..., Tensor]) -> Tensor:
        return product(probabilities, values)


_MULTI_HEAD = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
"""torch's function with globals of its own, in which it does not hand itself to the mode again."""


def _masked_softmax(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """A row with every key masked is zeros, as in torch's own kernels."""
    if mask is None:
        return torch.softmax(logits, -1), logits
    logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    empty = (logits == -math.inf).all(-1, keepdim=True)
    return torch.where(empty, 0, torch.softmax(torch.where(empty, 0, logits), -1)), logits


def _einsum(equation: str, turned: bool, probabilities: Tensor, values: Tensor) -> Tensor:
    return torch.einsum(equation, *((values, probabilities) if turned else (probabilities, values)))


def _weighs(equation: str, place: int) -> bool:
    """Is one operand's last axis summed over with the other's, which has no axis of queries?"""
    operands, _, out = equation.replace(" ", "").partition("->")
    names = operands.split(",")
    (batch, *_, query, key), other = names[place], names[1 - place]
    return batch in other and key in other and key not in out and query in out and query not in other

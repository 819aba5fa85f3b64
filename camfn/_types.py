"""Shapes by name, and the shapes of arguments.

Axes: `n` images, `c` channels, `p` positions of the layer's grid (flattened), `t` targets, `r` rows of a sweep
(masked inputs); in attention `h` heads, `q` queries, `k` keys.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

State: TypeAlias = dict[str, Tensor]
"""Parameters and buffers by name: the model as a value."""

Inputs: TypeAlias = Tensor | list[Tensor] | tuple[Any, ...] | Mapping[str, Any]
"""`model(x)`, `model(*x)` for a tuple, `model(**x)` for a mapping; the batch is the first axis of every tensor. A list is one
argument: a detector's images, `(channels, *size)` each, of any sizes."""

Layer: TypeAlias = str | nn.Module
Layers: TypeAlias = Layer | Sequence[Layer] | None

Activations: TypeAlias = Float[Tensor, "n c p"]
Scores: TypeAlias = Float[Tensor, "n c t"]
Weights: TypeAlias = Float[Tensor, "n t c"]
Gradients: TypeAlias = Float[Tensor, "n t c p"]
FlatMaps: TypeAlias = Float[Tensor, "n t p"]
Attentions: TypeAlias = Float[Tensor, "n h q k"]
Relevances: TypeAlias = Float[Tensor, "n k"]
Classes: TypeAlias = Int[Tensor, "n t"]

Maps: TypeAlias = Tensor | tuple[Tensor, ...]
"""`(n, *grid)`, or `(n, t, *grid)` where the target asks for several; a tuple for several layers."""

Combine: TypeAlias = Literal["sum", "eigen"]
Size: TypeAlias = Literal["input"] | Sequence[int] | None


class Tokens(NamedTuple):
    """Made by `camfn.layouts.tokens`: tokens before a grid, and the grid; what is `None` is to be found."""

    grid: tuple[int, ...] | None = None
    prefix: int | None = None


Layout: TypeAlias = str | Tokens | Callable[[Tensor], Tensor]
"""`"auto"`, `"channels_first"`, `"channels_last"`, `camfn.layouts.tokens(grid, prefix)`, or a way to `(n, c, *grid)`."""
Target: TypeAlias = Any
"""`None`, an int, n ints, a long tensor `(n,)` or `(n, t)`, `"all"`, a `camfn.targets` name, a callable, or n of these."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself where it is wider: what scores, softmax and sums are computed in."""
    return torch.promote_types(dtype, torch.float32)

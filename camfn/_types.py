"""Type aliases: named tensor shapes and the types of arguments.

Axes: `n` images, `c` channels, `p` positions of the layer's grid (flattened), `t` targets, `r` rows of a sweep
(masked inputs). In attention: `h` heads, `q` queries, `k` keys.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

State: TypeAlias = dict[str, Tensor]
"""Parameters and buffers by name."""

Inputs: TypeAlias = Tensor | list[Tensor] | tuple[Any, ...] | Mapping[str, Any]
"""The input of a model: `model(x)`, `model(*x)` for a tuple, or `model(**x)` for a mapping. The batch is the first axis of
every tensor. A list is a single argument: the images `(channels, *size)` of a detector, which may have different sizes."""

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
"""`(n, *grid)`, or `(n, t, *grid)` if the target has several scores. A tuple for several layers."""

Combine: TypeAlias = Literal["sum", "eigen"]
Size: TypeAlias = Literal["input"] | Sequence[int] | None


class Tokens(NamedTuple):
    """The layout returned by `camfn.layouts.tokens`. A field that is `None` is inferred."""

    grid: tuple[int, ...] | None = None
    prefix: int | None = None
    suffix: int | None = None


Layout: TypeAlias = str | Tokens | Callable[[Tensor], Tensor]
"""`"auto"`, `"channels_first"`, `"channels_last"`, `camfn.layouts.tokens()`, or a function to `(n, c, *grid)`."""
Target: TypeAlias = Any
"""`None`, an int, n ints, a long tensor `(n,)` or `(n, t)`, `"all"`, a target of `camfn.targets`, a callable, or n of these."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or the dtype itself if it is wider. Scores, softmax and sums are computed in it."""
    return torch.promote_types(dtype, torch.float32)

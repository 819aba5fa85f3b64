"""A method of the user: a formula for the weights, with all that other methods have around it."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from camfn._errors import CamError
from camfn._types import Activations, Combine, Inputs, Layers, Layout, Maps, Size, State, Target, Weights, wide
from camfn.methods._common import Drawing, Graded, explain_layer, grade_layer, weighed_by_gradients
from camfn.methods.activation import weighed_alike
from camfn.methods.registry import Need, Outcome, published

Needs = Literal["gradients", "activations"]


def method(weights: Callable[..., Weights], *, name: str, needs: Needs) -> Callable[..., Maps]:
    """Return a method whose channel weights a function of yours computes.

    `L = relu(sum_k w_k A_k)`, with `w = weights(A, G)` and `G = d(score)/dA`.

    The method is like any other: it takes the model, layer, input and target, composes (`camfn.smooth`), has a card
    (`camfn.explain(..., method=mine)`), and runs under `vmap`, `grad` and `jvp` if your function does. It is not added to
    `camfn.METHODS`. The cost is one forward pass, and with gradients one backward pass for each target.

    **Arguments**

    - `weights`: a function of tensors in float32 or wider. With several layers it is called for each. It gets copies.
      - `needs="gradients"`: `weights(A, G)`, from `A` `(n, c, p)` and `G` `(n, t, c, p)` to `(n, t, c)`: images, targets,
        channels, positions.
      - `needs="activations"`: `weights(A)`, from `A` `(n, c, p)` to `(n, c)` or `(n, 1, c)`. All targets share them.
    - `name`: the name on cards and in errors.
    - `needs`: what the function gets.

    **Returns** a method with the arguments of `camfn.grad_cam`. Its maps and errors are those of `camfn.score_cam`.

    **Raises** `CamError` for invalid arguments and, when the method is called, for weights of another shape or on another
    device. Errors of your function pass through.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> peak_cam = camfn.method(lambda A, G: G.amax(-1), name="peak_cam", needs="gradients")
    >>> camfn.smooth(peak_cam)(model, "1", x, [1, 3]).shape
    torch.Size([2, 6, 6])
    >>> camfn.explain(model, "1", x, method=peak_cam).method
    'peak_cam'
    """
    if not callable(weights):
        raise CamError(f"weights must be a function of activations (and gradients) to weights, found {weights!r}")
    if not isinstance(name, str) or not name:
        raise CamError(f"name must be a text that is not empty, found {name!r}")
    if needs not in ("gradients", "activations"):
        raise CamError(f'needs must be "gradients", for weights(A, G), or "activations", for weights(A); found {needs!r}')

    def of(
        model: nn.Module,
        layer: Layers,
        x: Inputs,
        target: Target = None,
        *,
        combine: Combine = "sum",
        axes: str | None = None,
        state: State | None = None,
        layout: Layout = "auto",
        size: Size = None,
        relu: bool = True,
        normalize: bool = True,
    ) -> Outcome:
        drawing = Drawing(relu, size, normalize, layout, axes, combine)
        if needs == "gradients":
            graded = grade_layer(model, layer, x, target, state, drawing)
            return weighed_by_gradients(graded, _by_gradients(weights, name, graded))
        found = explain_layer(model, layer, x, target, state, drawing)
        return weighed_alike(found, [_by_activations(weights, name, part.values) for part in found.reads])

    of.__name__ = of.__qualname__ = name
    of.__doc__ = getattr(weights, "__doc__", None) or f"`{name}`, a method made by `camfn.method`."
    return published(of, True, (Need.ACTIVATIONS, Need.GRADIENTS) if needs == "gradients" else (Need.ACTIVATIONS,))


def _by_gradients(weights: Callable[..., Weights], name: str, graded: Graded) -> list[Weights]:
    """The weights `(n, t, c)` of each layer."""
    return [
        _checked(weights(_given(activations), _given(gradients)), name, activations, gradients)
        for gradients, activations in graded.pairs
    ]


def _by_activations(weights: Callable[..., Weights], name: str, activations: Activations) -> Tensor:
    """The weights `(n, c)` of one layer, which all targets share."""
    found = weights(_given(activations))
    alone = isinstance(found, Tensor) and found.ndim == 3 and found.shape[1] == 1
    return _checked(found[:, 0] if alone else found, name, activations)


def _given(value: Tensor) -> Tensor:
    """A copy: methods of one `explain` share what they read, and the function may write to its arguments."""
    return value.to(wide(value.dtype), copy=True)


def _checked(found: Any, name: str, *given: Tensor) -> Tensor:
    """Return the weights as they are, or raise an error that names the shapes."""
    like = given[-1][..., 0]  # (n, t, c) of gradients, (n, c) of activations
    wanted, axes = tuple(like.shape), "(n, t, c)" if like.ndim == 3 else "(n, c)"
    told = " and ".join(f"{letter} of {tuple(value.shape)}" for letter, value in zip("AG", given))
    if not isinstance(found, Tensor):
        raise CamError(f"the weights of {name} must be a tensor {axes} = {wanted} for {told}; found {type(found).__name__}")
    if tuple(found.shape) != wanted:
        raise CamError(f"the weights of {name} must have shape {axes} = {wanted} for {told}; found {tuple(found.shape)}")
    if not found.is_floating_point() or found.device != like.device:
        raise CamError(
            f"the weights of {name} must be floating-point numbers on {like.device}, as its activations are; "
            f"found {found.dtype} on {found.device}"
        )
    return found.to(wide(found.dtype))

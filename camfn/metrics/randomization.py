"""Model-parameter randomization: whether a map depends on what the network has learned."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camfn._errors import CamError
from camfn._types import Inputs, Layer, State
from camfn.metrics.similarity import rank_correlation, ssim
from camfn.metrics.states import randomized_states
from camfn.model.capture import state_of
from camfn.model.prepare import Prepared


class Randomization(NamedTuple):
    """How alike the maps stay while weights are drawn anew. Lower is better."""

    layers: tuple[str, ...]  # the layers, from the output downwards
    rank_correlation: Float[Tensor, "layers n"]  # of the map and that of the trained network, with the axes of the maps
    ssim: Float[Tensor, "layers n"]


def model_randomization(
    model: nn.Module | Prepared,
    x: Inputs,
    explain: Callable[[State], Tensor],
    *,
    cascading: bool = True,
    layers: Sequence[Layer] | None = None,
    state: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    spatial_ndim: int = 2,
) -> Randomization:
    """The similarity of a map with itself when the weights are drawn anew, layer by layer from the output downwards.

    A map that stays as it is does not depend on the weights: it may only show the image's edges. A method that explains no
    class passes below the classifier only.

    **Arguments**

    - `model`: a module, or a model prepared by `camfn.prepare`. It is left as it is.
    - `x`: the inputs, on which the order of layers is found.
    - `explain`: a function from a state to maps `(n, *grid)` or `(n, t, *grid)`, as
      `lambda state: camfn.grad_cam(model, "features", x, 3, relu=False, state=state)`. Fix the target in it.
    - `cascading`: redraw a layer and all above it. If False, redraw it alone.
    - `layers`: the layers or blocks to redraw, in this order, instead of all with parameters.
    - `state`: the trained state. `None` is the model's own.
    - `seed`: the seed of the weights: see `randomized_states`.
    - `spatial_ndim`: the number of spatial axes of a map, which come last.

    **Returns** a `Randomization`. A map that is not finite, before or after, has a similarity of NaN.

    **Raises** `CamError` if there is nothing to redraw.

    >>> import camfn
    >>> from camfn import demo
    >>> model, x = demo.network(), demo.preprocess(demo.scene(0).image)[None]
    >>> def explain(state):
    ...     return camfn.mean_cam(model, "features", x, relu=False, state=state)
    >>> found = model_randomization(model, x, explain, layers=["classify", "features"])
    >>> found.layers, [float(r) == 1 for r in found.rank_correlation]  # mean_cam does not read the classifier
    (('classify', 'features'), [True, False])

    Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018 (arXiv 1810.03292), section 3.1.
    """
    clean = explain(state_of(model) if state is None else dict(state))
    names, ordered, structure = [], [], []
    for name, now in randomized_states(model, x, cascading=cascading, layers=layers, state=state, seed=seed):
        maps = explain(now)
        names.append(name)
        for found, metric in ((ordered, rank_correlation), (structure, ssim)):
            found.append(metric(clean, maps, spatial_ndim=spatial_ndim))
    if not names:
        raise CamError("the model has no parameters to draw anew")
    return Randomization(tuple(names), torch.stack(ordered), torch.stack(structure))

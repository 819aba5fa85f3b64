"""Laws of methods and models, and hypothesis strategies for your own tests.

`check` checks every law on a method, with small networks that hypothesis draws; `check_model` checks them on your model. `laws`
has them one by one. The strategies are `cases`, `token_cases`, `models`, `transformers`, `inputs_of`, `layers_of`,
`targets_of`, `activations`, `gradients`, `maps` and `outputs`. The fields of a case are in the order of a method's arguments:

>>> import camfn
>>> from camfn.testing import cases, laws
>>> from hypothesis import given, settings
>>> @settings(max_examples=5, deadline=None)
... @given(cases("score_cam"))
... def an_image_has_its_map_without_the_others(case):
...     laws.batch_independent(camfn.score_cam, case)
>>> an_image_has_its_map_without_the_others()

No other part of camfn needs hypothesis.
"""

from camfn.testing import laws
from camfn.testing.checking import check, check_model
from camfn.testing.closeness import assert_close, close
from camfn.testing.strategies import (
    Case,
    Spec,
    TinyNet,
    TinyViT,
    TokenSpec,
    activations,
    cases,
    gradients,
    inputs_of,
    layers_of,
    maps,
    models,
    outputs,
    targets_of,
    token_cases,
    transformers,
)
from camfn.testing.unchanged import unchanged

__all__ = [
    "Case",
    "Spec",
    "TinyNet",
    "TinyViT",
    "TokenSpec",
    "activations",
    "assert_close",
    "cases",
    "check",
    "check_model",
    "close",
    "gradients",
    "inputs_of",
    "laws",
    "layers_of",
    "maps",
    "models",
    "outputs",
    "targets_of",
    "token_cases",
    "transformers",
    "unchanged",
]

"""Check all laws on a method, with drawn networks, or on a model."""

from collections.abc import Callable, Collection
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from camfn._errors import CamError, suggested
from camfn._types import Inputs, Layer, Maps, Target
from camfn.methods import grad_cam
from camfn.methods.registry import Need, method_of
from camfn.testing import laws
from camfn.testing.laws import LAWS, UNITS
from camfn.testing.strategies import Case, cases, token_cases

_UNHURRIED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

_SOMEWHERE = ("knows_the_class",)
"""Laws that must hold in at least one case. Failure in a single case may be due to its network."""


def check(
    method: Callable[..., Maps] | str,
    *,
    examples: int = 10,
    seed: int = 0,
    skip: Collection[str] | str = (),
    among: SearchStrategy[Case] | None = None,
    units: float = UNITS,
) -> None:
    """Check every law on a method, with small networks that hypothesis draws, and shrinks where a law does not hold.

    **Arguments**

    - `method`: a method of camfn, a `functools.partial` of one, your own (`camfn.method`), or a composition.
    - `examples`: cases for each law, 1 or more. The first is the simplest, of one position or few. The same `seed` draws the
      same cases.
    - `skip`: the name of a law that your method does not promise, or several names: a method with noise belonging to pixels is
      not symmetric under `flip`.
    - `among`: a strategy of cases. By default, convolutional networks and vision transformers that the method accepts.
    - `units`: as in the laws.

    **Raises** an `AssertionError` with a line for each law that does not hold, and the smallest case that was found.

    >>> import camfn
    >>> from camfn.testing import check
    >>> spread = camfn.method(lambda A, G: G.std(-1, correction=0), name="spread_cam", needs="gradients")
    >>> check(spread, examples=1)
    >>> first = camfn.method(lambda A, G: G[..., 0], name="first_cam", needs="gradients")
    >>> try:
    ...     check(first, examples=3)
    ... except AssertionError as error:
    ...     print(str(error).splitlines()[1].split(".")[0])
    - flip does not hold for first_cam
    """
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 1:
        raise CamError(f"examples={examples!r} must be a positive int, the number of cases for each law")
    name, drawn = method_of(method).name, _drawn(method) if among is None else among
    with laws.own_dice():
        failed = [_counterexample(law, method, drawn, (examples, seed), units) for law in _chosen(skip)]
    _raise(name, [each for each in failed if each])


def check_model(
    model: Any,
    layer: Layer,
    x: Inputs,
    target: Target = None,
    *,
    method: Callable[..., Maps] | str = grad_cam,
    skip: Collection[str] | str = (),
    units: float = UNITS,
) -> None:
    """Check every law on a model: whether its maps are a function of one image, the same in a batch, in a thread, under `vmap`.

    The laws are those of `check` that say something of any model. Derivatives are checked for float64 models alone.

    **Arguments**

    - `model`, `layer`, `x`, `target`: as in `camfn.grad_cam`. Several layers are checked one after the other. Two images or
      more tell whether the images of a batch are apart.
    - `method`: the method, by name or as a function.
    - `skip`, `units`: as in `check`. In float32, rounding is larger in relation to a map that is a small difference.

    **Raises** an `AssertionError` with a line for each law that does not hold, and all errors of the method.

    >>> import torch
    >>> from torch import nn
    >>> from camfn.testing import check_model
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).double()
    >>> x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    >>> check_model(model, "1", x)
    """
    case, failed = Case(model, layer, x, target), []  # pyright: ignore[reportArgumentType]: a layer may be a module
    with laws.own_dice():
        told = laws.asked(method, case).told(case)  # an argument that does not fit is an error of its own
        # Each layer alone, by name: a changed network is a copy, which has no module of the caller's.
        for name in told.layers or (layer,):
            found = _failures(method, case._replace(layer=name), _chosen(skip), units)
            failed += [f"layer {name!r}: {each}" for each in found] if len(told.layers) > 1 else found
    _raise(f"{method_of(method).name} of this model", failed)


def _failures(method: Callable[..., Maps] | str, case: Case, chosen: list[str], units: float) -> list[str]:
    failed = []
    for law in chosen:
        try:
            LAWS[law](method, case, units=units)
        except Exception as error:
            failed.append(_told(law, error))
    return failed


def _drawn(method: Callable[..., Maps] | str) -> SearchStrategy[Case]:
    """The cases that a method accepts."""
    one = method_of(method)
    if Need.ATTENTION in one.needs:
        return token_cases()
    some = cases(method)
    return some if {Need.LINEAR_HEAD, Need.ANY_SIZE} & one.needs or not one.of_layer else st.one_of(some, token_cases())


def _chosen(skip: Collection[str] | str) -> list[str]:
    skip = [skip] if isinstance(skip, str) else skip
    for name in skip:
        if name not in LAWS:
            raise CamError(f"skip: no law named {name!r}{suggested(name, LAWS)}; all: {', '.join(LAWS)}")
    return [name for name in LAWS if name not in skip]


def _counterexample(
    law: str, method: Callable[..., Maps] | str, among: SearchStrategy[Case], search: tuple[int, int], units: float
) -> str:
    """The smallest case that was found for which a law does not hold, in words; nothing if there is none."""
    examples, seed = search
    asked, held, last = [], [], []

    @hypothesis.seed(seed)
    @settings(
        max_examples=max(examples, 30) if law in _SOMEWHERE else examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
        suppress_health_check=_UNHURRIED,
        phases=[Phase.generate, *([] if law in _SOMEWHERE else [Phase.shrink])],
    )
    @given(among)
    def holds(case: Case) -> None:
        if (held and law in _SOMEWHERE) or not laws.speaks_of(law, method, case):
            return
        asked.append(case)
        try:
            LAWS[law](method, case, units=units)
            held.append(case)
        except Exception as error:
            last.append(_told(law, error, case))
            if law not in _SOMEWHERE:
                raise

    try:
        holds()
    except Exception:
        if not last:
            raise
        return last[-1]
    return "" if law not in _SOMEWHERE or held or not asked else min(last, key=len)


def _told(law: str, error: Exception, case: Case | None = None) -> str:
    text = str(error) if isinstance(error, AssertionError) else f"{law} ends in an error: {type(error).__name__}: {error}"
    return text if case is None else f"{text}\n  {_shown(case)}"


def _shown(case: Case) -> str:
    values = f"\n  x={case.x.tolist()}" if case.x.numel() <= 64 else ""  # more are not read
    return f"model={case.model!r}, layer={case.layer!r}, x of shape {tuple(case.x.shape)}, target={case.target!r}{values}"


def _raise(name: str, failed: list[str]) -> None:
    if failed:
        count = "a law does not hold" if len(failed) == 1 else f"{len(failed)} laws do not hold"
        raise AssertionError(f"{name}: {count}\n" + "\n".join(f"- {each}" for each in failed))

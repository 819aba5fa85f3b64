"""How much each channel counts: one pure function per formula, those of `camfn.formulas.weights`."""

from camfn.formulas.weights import *  # noqa: F403

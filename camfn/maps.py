"""From weights to maps: the functions of `camfn.formulas.maps`."""

from camfn.formulas.maps import *  # noqa: F403

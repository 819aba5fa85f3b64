"""How near two tensors must be: `camfn.testing.closeness`, which the laws use too."""

from camfn.testing.closeness import UNITS, assert_close, close

__all__ = ["UNITS", "assert_close", "close"]

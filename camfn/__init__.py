"""Class activation maps as pure functions of a model, a layer and an input.

camfn sets no hooks, wraps no model, changes no mode and keeps no state between calls. A CAM therefore composes like any other
function: `vmap` it, `grad` through it, compile it, or call it from several threads on one model.
"""

import importlib.util
from typing import TYPE_CHECKING

from camfn._version import __version__ as __version__

if TYPE_CHECKING:
    from camfn._public import *  # noqa: F403
    from camfn._public import __all__ as __all__
    from camfn._public import open as open
else:

    def __getattr__(name: str) -> object:
        """Import a submodule, or torch and all public names, on first use: the help of the command line needs neither.

        Submodules come first, because they import each other while `_public` is being imported.
        """
        if name.startswith("_") and name != "__all__":  # asked by Python and by tools
            raise AttributeError(f"module 'camfn' has no attribute {name!r}")
        if importlib.util.find_spec(f"camfn.{name}"):
            return importlib.import_module(f"camfn.{name}")
        public = importlib.import_module("camfn._public")
        if name not in ("__all__", "open", *public.__all__):
            raise AttributeError(f"module 'camfn' has no attribute {name!r}")
        globals()[name] = getattr(public, name)
        return globals()[name]

    def __dir__() -> list[str]:
        return ["__version__", "open", *__getattr__("__all__")]

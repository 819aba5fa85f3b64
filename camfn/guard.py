"""What a forward does, seen by a torch-function mode of this thread."""

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten


class Watcher(TorchFunctionMode):
    """Tells where followed tensors go, and whether a value is read in Python.

    A torch-function mode sees every torch function that is called from Python in this thread. It does not see scripted
    functions, other threads, or what NumPy computes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads = False
        self.consumers: dict[int, list[Any]] = {}  # by the id of a followed tensor
        self._kept: list[Tensor] = []  # an id may be given again once its tensor has died

    def follow(self, tensor: Tensor) -> None:
        """From now on, tell which functions take this tensor."""
        self._kept.append(tensor)
        self.consumers.setdefault(id(tensor), [])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _METADATA:
            self.reads = self.reads or getattr(func, "__name__", "") in _READS
            for leaf in tree_flatten((args, kwargs))[0] if self.consumers else ():
                if id(leaf) in self.consumers:
                    self.consumers[id(leaf)].append(func)
        return func(*args, **kwargs)


_READS = frozenset(
    (
        *(
            "item",
            "tolist",
            "numpy",
            "__array__",
            "__bool__",
            "__float__",
            "__int__",
            "__index__",
            "__complex__",
            "__contains__",
        ),
        *("equal", "allclose", "is_nonzero", "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"),
    )
)
"""Functions whose result, or its size, is known in Python and depends on values."""

_METADATA = frozenset(
    (
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.__len__),
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad", "is_sparse", "is_quantized")
        ),
    )
)
"""Functions that read no value."""

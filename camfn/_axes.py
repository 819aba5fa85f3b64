"""The order of a tensor's axes. Inside camfn the input with the pixels is `(n, c, *size)`, in the order t, d, h, w."""

from typing import NamedTuple

from torch import Tensor

from camfn._errors import CamError

_SPATIAL = "tdhw"
_USUAL = {1: "n", 2: "nc", 3: "ncw", 4: "nchw", 5: "ncdhw"}


class Axes(NamedTuple):
    """One letter for each axis of a tensor: n images, c channels, t time, d depth, h height, w width."""

    letters: str  # as the caller writes them; "" if their order is not known
    unclear: str = ""  # then why, and what to pass

    @property
    def spatial(self) -> str:
        """The axes that masks and resizing cover, in the order of maps."""
        return "".join(letter for letter in _SPATIAL if letter in self.letters)

    @property
    def still(self) -> str:
        """The spatial axes without time: those that blurs and `multi_scale` cover. They are the last ones."""
        return self.spatial.removeprefix("t")

    @property
    def _order(self) -> list[int]:
        return [self.letters.index(letter) for letter in f"nc{self.spatial}" if letter in self.letters]

    def first(self, image: Tensor) -> Tensor:
        """The input as `(n, c, *size)`. An input without channels gets one."""
        order = self._order
        moved = image if order == sorted(order) else image.permute(order)
        return moved if "c" in self.letters or not self.spatial else moved.unsqueeze(1)

    def back(self, image: Tensor) -> Tensor:
        """`(n, c, *size)` in the order of the model's input. It is contiguous where it is moved: a model may call `view`."""
        moved = image if "c" in self.letters or not self.spatial else image.squeeze(1)
        order = self._order
        if order == sorted(order):
            return moved
        return moved.permute([order.index(axis) for axis in range(len(order))]).contiguous()


def usual(ndim: int) -> Axes:
    """The order `(n, c, *size)`."""
    return Axes(_USUAL[ndim]) if ndim in _USUAL else unclear_of(ndim)


def unclear_of(ndim: int, ways: tuple[str, ...] = ()) -> Axes:
    """An order that is not known. `ways` are the readings that fit."""
    named = " or ".join(f'axes="{way}"' for way in ways)
    which = f"can be read in {len(ways)} ways: pass {named}" if ways else f'has {ndim} axes: pass axes=, such as axes="ntchw"'
    return Axes("", f"the order of the input's axes is not known: it {which} (n images, c channels, t time, d depth, h, w)")


def checked_axes(axes: str, ndim: int, where: str) -> Axes:
    """Return the axes that a caller names, or raise an error."""
    valid = isinstance(axes, str) and axes[:1] == "n" and len(set(axes)) == len(axes) and set(axes[1:]) <= {"c", *_SPATIAL}
    if not valid or not set(axes) & set(_SPATIAL):
        raise CamError(
            f'axes={axes!r} must have one letter for each axis of {where}: "n" first, at most one "c", and the others from '
            '"t", "d", "h" and "w", as in "nhwc", "ntchw" or "nct"'
        )
    if len(axes) != ndim:
        raise CamError(f"axes={axes!r} names {len(axes)} axes, and {where} has {ndim}")
    return Axes(axes)

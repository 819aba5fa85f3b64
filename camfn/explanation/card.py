"""The card: what `explain` returns."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_map

from camfn import images
from camfn._errors import CamError
from camfn.explanation import files, html, pictures, text
from camfn.explanation.fields import Fields
from camfn.model.gradients import detached

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_PICTURES = (".png", ".jpg", ".jpeg")
_ARRAYS = (".npz", ".safetensors")


class Explanation(Fields):
    """The result of `explain`: the maps, with scores, weights, settings, cost and findings.

    Printed, it is a few lines; in a notebook, the photos with their maps. `overlay` and `figure` draw it, `save` writes it.

    It can be pickled, copied, saved by `torch.save`, and returned by a worker of a `DataLoader`. The copy has no graph. A
    setting that cannot be pickled, such as a lambda, is replaced by its name.
    """

    __slots__ = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """The sentences of the findings."""
        return tuple(finding.sentence for finding in self.findings)

    def overlay(
        self,
        image: int = 0,
        target: int = 0,
        *,
        layer: int = 0,
        style: images.Style = "heat",
        alpha: float = images.ALPHA,
        colormap: str | None = None,
    ) -> "Image":
        """Draw one map over its photo, as a PIL image of the photo's size.

        - `image`, `target`, `layer`: the indices of the map: the image, its target, and the layer of several.
        - `style`, `alpha`, `colormap`: as in `camfn.images.overlay`.

        Raw maps (`normalize=False`) are divided by their largest absolute value. **Raises** `CamError` if the card has no
        pictures, or no such image, target or layer.
        """
        return pictures.overlay(self, image, target, layer, style=style, alpha=alpha, colormap=colormap)

    def figure(self, *, style: images.Style = "heat", alpha: float = images.ALPHA, colormap: str | None = None) -> "Figure":
        """Draw all photos with their maps, as a figure of matplotlib: a row for each image, at most six panels wide.

        A cross marks the maximum of each map. **Raises** `CamError` if the card has no pictures, or matplotlib is missing.
        """
        return pictures.figure(self, style=style, alpha=alpha, colormap=colormap)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the card to a file, by its suffix. An existing file is replaced.

        - `.png`, `.jpg`: the figure.
        - `.html`: a page with photos, maps, targets and findings, in one file.
        - `.npz`, `.safetensors`: all fields, for `camfn.load`. Photos are stored as arrays, and a setting that JSON does not
          have as text.

        **Raises** `CamError` for another suffix, if the file cannot be written, or if the card has no pictures for a picture.
        """
        place = Path(path)
        suffix = place.suffix.lower()
        if suffix not in (*_PICTURES, ".html", *_ARRAYS):
            raise CamError(f"a card is saved as .png, .jpg, .html, .npz or .safetensors; found {os.fspath(path)!r}")
        try:
            if suffix in _ARRAYS:
                files.write(self, place)
            elif suffix == ".html":
                place.write_text(html.page(self), encoding="utf-8")
            else:
                self.figure().savefig(place, facecolor="white")
        except OSError as error:
            raise CamError(f"{os.fspath(path)!r} cannot be written: {error.strerror or error}") from error

    def __repr__(self) -> str:
        return text.summary(self)

    def _repr_html_(self) -> str | None:
        return html.fragment(self) if find_spec("PIL") else None  # the notebook then shows the text

    def __reduce__(self) -> tuple[Any, ...]:
        return Explanation, tuple(tree_map(detached, tuple(self)))


def load(path: str | os.PathLike[str]) -> Explanation:
    """Load a card that `Explanation.save` wrote to `.npz` or `.safetensors`. Nothing is unpickled.

    **Raises** `CamError` if the file is not such a card.

    >>> import camfn, torch, tempfile
    >>> from camfn import demo
    >>> card = camfn.explain(demo.network(), "features", demo.preprocess(demo.scene(0).image)[None], method="grad_cam")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     card.save(f"{folder}/card.npz")
    ...     same = camfn.load(f"{folder}/card.npz")
    >>> torch.equal(same.maps, card.maps), same.targets == card.targets
    (True, True)
    """
    return Explanation(*files.read(path))

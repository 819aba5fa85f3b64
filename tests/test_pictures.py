"""The pictures of the pages are those that are drawn."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import pictures
from tests.support.documents import ROOT

pytest.importorskip("safetensors")
matplotlib = pytest.importorskip("matplotlib")


def blocks(picture: Image.Image) -> np.ndarray:
    """Means over squares of 8 pixels: a panel has about twenty in each direction."""
    size = [side // 8 for side in picture.size]
    return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BOX)).astype(float)


def test_the_picture_of_all_methods_is_this_one():
    """To what its palette and rounding leave; one map of another method is far off."""
    if f"matplotlib=={matplotlib.__version__}\n" not in (ROOT / "constraints.txt").read_text():
        pytest.skip("another matplotlib lays the panels out otherwise")
    path = Path(pictures.DOCS) / "methods.png"
    with Image.open(path) as file:
        shipped, made = blocks(file), blocks(pictures.methods())
    assert shipped.shape == made.shape
    assert (np.abs(shipped - made).max(-1) > 30).mean() < 0.0005  # a panel is a hundredth
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("name", ["card", "styles"])
def test_the_pictures_of_a_card_are_these(name, tmp_path):
    if f"matplotlib=={matplotlib.__version__}\n" not in (ROOT / "constraints.txt").read_text():
        pytest.skip("another matplotlib lays the panels out otherwise")
    pictures.draw_card(tmp_path) if name == "card" else pictures.draw_styles(tmp_path)
    with Image.open(Path(pictures.DOCS) / f"{name}.png") as file, Image.open(tmp_path / f"{name}.png") as made:
        assert blocks(file).shape == blocks(made).shape
        assert (np.abs(blocks(file) - blocks(made)).max(-1) > 30).mean() < 0.0005

"""The pictures of the pages that are drawn, not taken.

python tests/pictures.py    # draw docs/demo.png, docs/methods.png, docs/card.png and docs/styles.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import camfn
from camfn import demo, figures
from camfn.cli import demo as command
from tests import tables

DOCS = Path(__file__).resolve().parents[1] / "docs"
SCENE = (3, 2)
"""The seed and the number of objects: the first scene of the demo with two of them."""
WIDTH = 8  # panels in a line
_TITLE = "One scene, two questions: where is the {}, and where is the {}?"


def methods() -> Any:
    """Every method that the shipped network takes, on one scene, asked for each of its objects; by family."""
    model, scene = demo.network(), demo.scene(*SCENE)
    objects = range(len(scene.classes))
    names = [demo.CLASSES[index] for index in scene.classes]
    panels = figures.lines([figures.Panel(scene.image, outline=scene.masks[i]) for i in objects], WIDTH)
    rows = ["scene"]
    for family, (_, said) in tables.FAMILIES.items():
        named = [name for name in tables.family(family) if name in command.FITTING]
        drawn = [panel for name in named for panel in _panels(name, command.explained(model, scene, name).maps[0], scene)]
        if drawn:
            lines = figures.lines(drawn, WIDTH)
            panels += lines
            rows += [said, *[""] * (len(lines) - 1)]
    columns = names * (WIDTH // len(names))
    return figures.grid(panels, rows=rows, columns=columns, title=_TITLE.format(*names), note=command.NOTE)


def _panels(name: str, maps: Any, scene: demo.Scene) -> Sequence[figures.Panel]:
    """A method's map of each object, under the first its name."""
    first, *others = [command.panel(one) for one in command.judged(scene, maps)]
    return [first._replace(caption=f"{name}\n{first.caption}"), *others]


def photo() -> Any:
    """The card of README.md and of docs/pictures.md."""
    scene = demo.scene(3, objects=2, size=(320, 480))
    return camfn.open("demo").explain(scene.image, target=["square", "star"], layer="features")


def draw_card(folder: Path) -> None:
    photo().save(folder / "card.png")


def draw_styles(folder: Path) -> None:
    """One map in each style, and a signed one."""
    card, scene = photo(), demo.scene(3, objects=2, size=(320, 480))
    options: dict[str, Any] = {"method": "hires_cam", "layer": "features", "relu": False, "normalize": False}
    signed = camfn.open("demo").explain(scene.image, target="star", **options)
    panels = [figures.Panel(card.overlay(0, target=1, style=style), caption=style) for style in camfn.images.STYLES]
    figure = figures.figure([[*panels, figures.Panel(signed.overlay(), caption="signed")]], side=2.4)
    figure.savefig(folder / "styles.png", bbox_inches="tight")


def small(picture: Any) -> Any:
    """In 256 colours, which is a third of the file."""
    from PIL import Image

    return picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def main() -> None:
    command.picture(list(command.rows(command.METHODS))).save(DOCS / "demo.png", optimize=True)
    small(methods()).save(DOCS / "methods.png", optimize=True)
    draw_card(DOCS)
    draw_styles(DOCS)


if __name__ == "__main__":
    main()

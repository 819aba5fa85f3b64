"""The grid of panels: what is drawn where, measured in its pixels."""

import numpy as np
import pytest
import torch

from camfn import CamError, figures, images
from camfn.figures import Panel

pytest.importorskip("matplotlib")
GREY = torch.full((3, 40, 40), 0.5)
MAP = torch.zeros(4, 4)
MAP[1, 2] = 1


def pixels(*arguments, **options) -> np.ndarray:
    return np.asarray(figures.grid(*arguments, **options)).astype(int)


def panel_of(found: np.ndarray, colour: tuple[int, int, int]) -> tuple[slice, slice]:
    """The box that a colour fills; letters have a few pixels of any grey."""
    there = (abs(found - colour) <= 1).all(-1)
    rows, columns = (np.nonzero(there.sum(axis) > 20)[0] for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def test_panels_stand_in_rows_and_columns():
    colours = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0))
    panels = [[Panel(colour[:, None, None].expand(3, 8, 8)) for colour in row] for row in colours]
    found = pixels(panels)
    boxes = [[panel_of(found, tuple(round(float(255 * c)) for c in colour)) for colour in row] for row in colours]
    for row in boxes:
        assert [box[1].start for box in row] == sorted(box[1].start for box in row)
        assert len({box[0].start for box in row}) == 1
    assert boxes[0][0][0].stop < boxes[1][0][0].start


def test_nothing_is_drawn_where_there_is_no_panel():
    green = torch.tensor([0.0, 1, 0])[:, None, None].expand(3, 40, 40)
    panels = [Panel(GREY), Panel(GREY, MAP), Panel(green)]
    first, last = figures.lines(panels, 2)
    assert (first, last) == (panels[:2], [panels[2], None])
    found = pixels([first, last], columns=["one", "two"])
    beside = panel_of(found, (0, 255, 0))
    assert beside[0].stop > len(found) * 0.5
    empty = found[beside[0], beside[1].stop + 5 : found.shape[1] * 3 // 4]  # as far as the colour bar
    assert empty.shape[1] > 60
    assert (empty == 255).all()


def test_a_map_is_laid_over_its_picture_with_a_cross_at_its_maximum():
    plain, drawn = pixels([[Panel(GREY, MAP * 0)]]), pixels([[Panel(GREY, MAP)]])
    box = panel_of(plain, tuple(images.overlay(GREY, MAP * 0).getpixel((0, 0))))
    found = drawn[box]
    overlay = np.asarray(images.overlay(GREY, MAP).resize(found.shape[1::-1], 0)).astype(int)
    assert np.median(abs(found - overlay)) <= 2
    white = np.argwhere((found == 255).all(-1))  # the cross is the only white in the panel
    assert abs(white.mean(0) / found.shape[:2] - [1.5 / 4, 2.5 / 4]).max() < 0.02


def test_an_outline_is_drawn_around_the_object():
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[10:30, 20:36] = True
    box = panel_of(pixels([[Panel(GREY)]]), (128, 128, 128))
    found = pixels([[Panel(GREY, outline=mask)]])[box]
    white = np.argwhere((found > 240).all(-1)) / found.shape[:2]
    assert abs(white.min(0) - [10 / 40, 20 / 40]).max() < 0.03
    assert abs(white.max(0) - [30 / 40, 36 / 40]).max() < 0.03
    assert (found[int(0.5 * len(found)), int(0.7 * len(found))] == 128).all()  # inside it nothing is covered


def test_names_captions_title_and_note_are_written():
    def ink(**options) -> int:
        """Dark pixels outside the panel and its frame."""
        caption = options.pop("caption", "")
        found = pixels([[Panel(GREY, caption=caption)]], **options)
        rows, columns = panel_of(found, (128, 128, 128))
        found[rows.start - 4 : rows.stop + 4, columns.start - 4 : columns.stop + 4] = 255
        return int((found < 170).all(-1).sum())

    assert ink() == 0
    for words in ({"rows": ["row"]}, {"columns": ["column"]}, {"title": "title"}, {"note": "note"}, {"caption": "caption"}):
        assert ink(**words) > 20, words


def test_a_map_may_have_a_graph_and_lists_will_do():
    expected = pixels([[Panel(GREY, MAP, MAP > 0)]])
    assert np.array_equal(pixels([[Panel(GREY, MAP.clone().requires_grad_(), (MAP > 0).tolist())]]), expected)


def test_the_colour_bar_is_there_where_a_map_is():
    def vivid(panel: Panel) -> int:
        found = pixels([[panel]])
        return int((found.max(-1) - found.min(-1) > 60).sum())

    assert vivid(Panel(GREY)) == 0
    assert vivid(Panel(GREY, MAP)) > 300


def test_no_global_figure_is_made():
    from matplotlib import pyplot

    pixels([[Panel(GREY, MAP)]])
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(
    ("panels", "options", "said"),
    [
        ([], {}, r"a grid needs a row.*found \[\]"),
        ([[]], {}, r"found \[0\]"),
        ([[Panel(GREY)], [Panel(GREY)] * 2], {}, r"all rows must have the same length; found \[1, 2\]"),
        ([[Panel(GREY)]], {"rows": ["a", "b"]}, "rows has 2 names, and the grid has 1 rows"),
        ([[Panel(GREY)] * 3], {"columns": ["a"]}, "columns has 1 names, and the grid has 3 columns"),
        ([[Panel(GREY, MAP * 2)]], {}, "map has values from 0 to 2"),
    ],
)
def test_what_is_no_grid(panels, options, said):
    with pytest.raises(CamError, match=said):
        figures.grid(panels, **options)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(CamError, match=r"needs matplotlib: pip install 'camfn\[cli\]'"):
        figures.grid([[Panel(GREY)]])


def test_dollars_are_no_formula_and_control_characters_have_no_glyph():
    for name in (r"a$\frac$b", "a$b", "a\x1b\udcff", r"\$"):
        pixels([[Panel(GREY, caption=name)]], rows=[name], columns=[name], title=name, note=name)


def test_maps_share_signed_colors_if_one_is_signed_other_than_by_rounding():
    barely = [Panel(GREY, MAP - 1e-7 * (1 - MAP))]
    assert np.array_equal(pixels([barely]), pixels([barely], colormap=images.UNSIGNED))
    both = [Panel(GREY, MAP), Panel(GREY, -MAP)]
    assert np.array_equal(pixels([both]), pixels([both], colormap=images.SIGNED))

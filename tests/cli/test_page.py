"""The page of all maps: how panels are laid out, and that no caption leaves its panel."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from camfn._errors import shortened
from camfn.cli import page

pytest.importorskip("matplotlib")

LONG = "layer4.1.a_block_with_a_very_long_name.downsample.conv, " * 3


@given(st.integers(1, 80), st.integers(1, 9), st.floats(0.3, 3))
def test_at_most_six_panels_are_side_by_side_and_the_classes_of_a_map_stay_together(count, group, aspect):
    columns = page.columns_of(count, group, aspect)
    assert 1 <= columns <= page.COLUMNS
    if group <= page.COLUMNS:
        assert columns % group == 0
    else:
        assert columns <= count


@given(st.integers(1, 80), st.floats(0.3, 3))
def test_no_other_number_of_columns_is_nearer_to_a_square(count, aspect):
    def off(columns: int) -> float:
        return abs(np.log(-(-count // columns) * aspect / columns))

    best = min(map(off, range(1, min(count, page.COLUMNS) + 1)))
    assert off(page.columns_of(count, 1, aspect)) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (4000, 3000), (3000, 4000), (100, 2000), (2000, 100)])
@pytest.mark.parametrize("columns", [1, 3, 6])
def test_a_panel_keeps_the_proportions_of_the_photo_within_its_place(size, columns):
    width, height = page.panel_size(size, columns)
    assert width <= page.WIDTH / columns
    assert height <= page.TALLEST * page.WIDTH / columns + 1
    assert width / height == pytest.approx(size[0] / size[1], abs=max(1 / height, 1 / width) * max(1, size[0] / size[1]))


def cells(count: int, caption=lambda number: ()) -> list[page.Cell]:
    return [page.Cell(Image.new("RGB", (200, 150), (0, 99, 0)), caption(number)) for number in range(count)]


@pytest.mark.parametrize("columns", [1, 3, 6])
@pytest.mark.parametrize("marked", [0, 2, 7])
def test_a_caption_of_any_length_stays_below_its_own_panel(columns, marked):
    lines = (LONG, "W" * 300, "short")
    blank = page.drawn(cells(8, lambda number: ("",) * 3), columns)
    told = page.drawn(cells(8, lambda number: lines if number == marked else ("",) * 3), columns)
    assert told.size == blank.size
    y, x = np.nonzero((np.asarray(told) != np.asarray(blank)).any(-1))
    green = (np.asarray(blank) == (0, 99, 0)).all(-1)
    rows = np.flatnonzero(np.diff(np.pad(green.any(1), 1).astype(int))).reshape(-1, 2)  # of panels
    places = np.flatnonzero(np.diff(np.pad(green[rows[0][0]], 1).astype(int))).reshape(-1, 2)
    (left, right), (_, bottom) = places[marked % columns], rows[marked // columns]
    below = rows[marked // columns + 1][0] if marked // columns + 1 < len(rows) else told.height
    assert left <= x.min() < x.max() < right
    assert bottom <= y.min() < y.max() < below
    assert x.max() - x.min() > 0.9 * (right - left)  # a long one fills its place


def test_a_long_name_is_cut_in_the_middle_as_little_as_needed():
    font = page._font(14)
    for width in (60, 133, 400):
        cut = page.fitted(LONG, font, width)
        start, end = cut.split("…")
        assert LONG.startswith(start)
        assert LONG.endswith(end)
        assert abs(len(start) - len(end)) <= 1
        assert font.getlength(cut) <= width < font.getlength(shortened(LONG, len(start) + len(end) + 2))
    assert page.fitted("short", font, 100) == "short"
    assert page.fitted("a\nb", font, 100) == r"a\nb"  # a line break would leave the line


def test_a_title_stays_on_the_page_and_a_bar_shows_the_colors_of_the_lowest_and_highest_value():
    plain = page.drawn(cells(2), 2)
    told = page.drawn(cells(2), 2, (LONG, LONG), page.Bar(1.0, "viridis"))
    assert told.width == plain.width
    assert told.height > plain.height
    pixels = np.asarray(told)[told.height - 12 :]
    assert (pixels == (68, 1, 83)).all(-1).any() or (np.abs(pixels.astype(int) - (253, 231, 36)).max(-1) < 3).any()


def test_without_a_caption_and_a_title_there_are_panels_alone():
    one = page.drawn(cells(1), 1)
    assert set(map(tuple, np.asarray(one).reshape(-1, 3).tolist())) == {(255, 255, 255), (0, 99, 0)}
    assert (np.asarray(one) == (0, 99, 0)).all(-1).sum() == 200 * 150


def test_many_panels_fit_a_page():
    """As for two classes by 32 methods, which once were a strip of 492 x 5533 pixels."""
    columns = page.columns_of(64, 2, 1.2)
    whole = page.drawn(cells(64, lambda number: ("class", "90%", "method")), columns)
    assert columns == 6
    assert whole.height < 2.2 * whole.width

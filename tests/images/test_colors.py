"""Color maps: against matplotlib, and what their lightness says."""

import numpy as np
import pytest

from camfn import images


@pytest.mark.parametrize(
    ("name", "levels"), [("jet", 1e-9), ("inferno", 1.8), ("berlin", 1.1), ("turbo", 1.9), ("viridis", 1.4)]
)
def test_colours_are_matplotlibs_to_the_error_that_the_docstring_states(name, levels):
    matplotlib = pytest.importorskip("matplotlib", minversion="3.10")  # which brought berlin
    theirs = np.array([matplotlib.colormaps[name](level)[:3] for level in range(256)])
    ours = images.colorize(np.arange(256) / 255, name)
    worst = np.abs(ours - theirs).max() * 255
    assert worst <= levels, f"{name} differs by {worst:.3g} of 255"


@pytest.mark.parametrize("name", images.COLORMAPS)
def test_a_colour_map_keeps_shape_and_range_and_has_no_jumps(name):
    colours = images.colorize(np.linspace(0, 1, 2001).reshape(3, 667), name)
    assert colours.shape == (3, 667, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert np.abs(np.diff(colours.reshape(-1, 3), axis=0)).max() < 0.005  # no slope is above 10


@pytest.mark.parametrize("name", ["inferno", "viridis"])
def test_an_even_map_grows_lighter_all_the_way(name):
    luminance = images.colorize(np.linspace(0, 1, 256), name) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) > 0).all()


def test_the_map_of_signs_is_darkest_in_the_middle_and_grows_to_both_ends():
    luminance = images.colorize(np.linspace(0, 1, 257), "berlin") @ (0.2126, 0.7152, 0.0722)
    assert abs(int(luminance.argmin()) - 128) <= 2
    assert (np.diff(luminance[:126]) < 0).all()
    assert (np.diff(luminance[131:]) > 0).all()

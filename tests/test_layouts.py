"""How activations are read, and written back: by shape alone, and on the same weights expressed in several layouts."""

import pytest
import torch
from torch.func import vmap

from camfn import CamError, layouts
from camfn.layouts import Clues
from tests.oracles.closeness import assert_close

ANY = Clues(frozenset(range(1000)), frozenset(range(1000)))
"""All widths are known, first and last: nothing is told by them."""


def of_widths(first=(), last=(), axes=(), grids=()) -> Clues:
    return Clues(frozenset(first), frozenset(last), axes=frozenset(axes), grids=frozenset(grids))


def read(shape, spatial, clues=Clues(), layout="auto", n=2, placed=list):
    return layouts.read(torch.zeros(shape), layout, spatial, "layer", n, lambda: clues, placed=placed)


def first_of(forms):
    """As if the forward pass showed that the extra tokens come first."""
    return forms[:1]


@pytest.mark.parametrize(
    ("shape", "spatial", "clues", "grid"),
    [
        # By proportions alone.
        ((2, 8, 7, 7), (224, 224), Clues(), (7, 7)),
        ((2, 512, 7, 7), (224, 224), ANY, (7, 7)),
        ((2, 7, 7, 768), (224, 224), ANY, (7, 7)),
        ((2, 56, 56, 96), (224, 224), ANY, (56, 56)),  # Swin's first stage: (56, 96) is not far from square
        ((2, 96, 56, 56), (224, 224), ANY, (56, 56)),
        ((2, 32, 28, 28), (28, 28), ANY, (28, 28)),
        ((2, 32, 12, 16), (96, 128), ANY, (12, 16)),
        ((2, 12, 16, 32), (96, 128), ANY, (12, 16)),
        ((2, 64, 5, 7), (100, 130), ANY, (5, 7)),  # no stride gives just this
        ((2, 4, 6, 8, 10), (24, 32, 40), ANY, (6, 8, 10)),
        ((2, 6, 8, 10, 4), (24, 32, 40), ANY, (6, 8, 10)),
        # By widths, where proportions tell nothing.
        ((2, 7, 7, 7), (28, 28), of_widths(first=[7]), (7, 7)),
        ((2, 16, 8, 32), (64, 64), of_widths(first=[16]), (8, 32)),
        ((2, 8, 32, 16), (64, 64), of_widths(last=[16]), (8, 32)),
        ((2, 9, 40), (100,), of_widths(first=[9]), (40,)),
        ((2, 9, 40), (100,), of_widths(last=[40]), (9,)),
        ((2, 9, 40), (20,), Clues(), (9,)),  # a layer is not finer than the input
        ((2, 6, 5, 4, 3), None, of_widths(first=[6]), (5, 4, 3)),
        ((2, 49, 768), None, of_widths(first=[512], last=[768]), (49,)),  # a transformer on the samples of a sound
        ((2, 9, 9, 9), (18, 18), of_widths(first=[3, 4]), (9, 9)),  # a width that no layer has, of a concatenation say
        ((2, 9, 40), (100,), of_widths(first=[3]), (40,)),
        # Fewer axes than the input: kept where the width says so.
        ((2, 64, 20), (80, 160), of_widths(first=[64]), (20,)),
    ],
)
def test_a_grid_is_inferred(shape, spatial, clues, grid):
    found = read(shape, spatial, clues)
    assert found.grid == grid
    p = torch.Size(grid).numel()
    assert found.values.shape == (2, torch.Size(shape).numel() // 2 // p, p)


@pytest.mark.parametrize("prefix", range(9))
@pytest.mark.parametrize(("spatial", "grid"), [((224, 224), (14, 14)), ((96, 160), (6, 10)), ((64, 32), (16, 8))])
def test_tokens_are_inferred_with_any_prefix(prefix, spatial, grid):
    """Their shape tells the grid; which of them are extra, the forward pass alone."""
    asked = []

    def placed(forms):
        asked.extend(forms)
        return [form for form in forms if form.suffix == 0]

    found = read((2, prefix + grid[0] * grid[1], 192), spatial, of_widths(first=[3, 192], last=[192]), placed=placed)
    assert found.grid == grid
    assert found.values.shape == (2, 192, grid[0] * grid[1])
    assert sorted((form.prefix, form.suffix) for form in asked) == [(before, prefix - before) for before in range(prefix + 1)]


@pytest.mark.parametrize(
    ("count", "spatial", "clues", "grid"),
    [
        (5, (32, 32), Clues(), (2, 2)),
        (197, (224, 224), Clues(), (14, 14)),
        (37, (100, 100), of_widths(grids=[(6, 6)]), (6, 6)),  # patches of 16, and a rest that none covers
        (10, (96, 96), of_widths(grids=[(3, 3)]), (3, 3)),
        (10, (96, 96), of_widths(grids=[(2, 2)]), (2, 2)),
        (33, (64, 64), of_widths(grids=[(4, 8)]), (4, 8)),  # patches that are not square
        (17, (128,), of_widths(first=[8], last=[192], grids=[(16,)]), (16,)),
        (17, (128,), of_widths(first=[8], last=[192]), (17,)),
    ],
)
def test_tokens_are_told_by_the_input_and_by_what_embeds_its_patches(count, spatial, clues, grid):
    assert read((2, count, 192), spatial, clues, placed=first_of).grid == grid


@pytest.mark.parametrize(
    ("shape", "spatial", "clues", "ways"),
    [
        ((2, 7, 7, 7), (28, 28), Clues(), ['"channels_first"', '"channels_last"']),
        ((2, 7, 7, 7), (28, 28), ANY, ['"channels_first"', '"channels_last"']),
        ((2, 8, 8, 9), (32, 32), of_widths(first=[8]), ['"channels_first"', '"channels_last"']),
        ((2, 9, 40), (100,), Clues(), ['"channels_first"', '"channels_last"']),
        # An input without spatial axes, and a permuted convolution: 4 rows and 8 channels are both widths of convolutions.
        ((2, 4, 6, 8), None, Clues(frozenset([4, 8]), permuted=frozenset([8])), ['"channels_first"', '"channels_last"']),
        # A network that pools one axis more than the other, or one with its channels last: width against proportions.
        ((2, 32, 32, 64), (64, 64), of_widths(first=[32, 64]), ['"channels_first"', '"channels_last"']),
        (
            (2, 10, 192),
            (96, 96),
            of_widths(last=[192]),
            ["tokens(grid=(3, 3), prefix=1)", "tokens(grid=(2, 2), prefix=6)", "tokens(grid=(3, 3), prefix=0, suffix=1)"],
        ),
        ((2, 64, 50), (80, 80), of_widths(first=[64]), ["tokens(grid=(8, 8), prefix=0)", '"channels_first"']),
    ],
)
def test_two_readings_that_fit_alike_are_an_error_that_names_them(shape, spatial, clues, ways):
    with pytest.raises(CamError, match=r"layer 'layer' gives \(2, .* can be read in \d ways that fit equally well") as error:
        read(shape, spatial, clues)
    for way in ways:
        assert f"layout={way}" in str(error.value) or f"or {way}" in str(error.value) or f".{way}" in str(error.value)


def test_readings_of_the_same_values_are_no_doubt():
    found = read((2, 1, 1), (1,), Clues())
    assert (found.grid, found.values.shape) == ((1,), (2, 1, 1))


def test_tokens_in_number_far_beyond_the_grid_are_tried_before_it_and_after_it():
    """A mixer of 512 hidden tokens beside a grid of 2 x 2: a split at each of them would be 509 readings of each layer."""
    forms = layouts.forms_of((2, 512, 256), "auto", (64, 64), 2, lambda: of_widths(grids=[(2, 2)]))
    assert {form.prefix for form in forms} >= {508, 0, 1}
    assert len(forms) < 12
    (asked,) = layouts.forms_of((2, 512, 256), layouts.tokens((2, 2), 100), (64, 64), 2, Clues)
    assert (asked.prefix, asked.suffix) == (100, 408)


def test_where_nothing_fits_the_error_says_what_to_do():
    with pytest.raises(CamError, match=r"no grid of that many positions has the proportions of the input, \(224, 224\); pass"):
        read((2, 32, 768), (224, 224), of_widths(last=[768]))
    with pytest.raises(CamError, match="no grid of that many"):
        read((2, 37, 192), (100, 100), of_widths(last=[192]))
    # A spectrogram (n, time, frequency) of a model that makes a picture of it, and so tokens of two axes.
    for spatial in (None, (32,)):
        with pytest.raises(CamError, match="no grid of that many positions has the proportions of the input"):
            read((2, 12, 32), spatial, of_widths(first=[1, 32], last=[32], axes=[2]))
    assert read((2, 12, 32), (32,), of_widths(first=[1], last=[32], axes=[1, 2])).grid == (12,)
    with pytest.raises(CamError, match="has no spatial axes; choose a layer before pooling"):
        read((2, 10), (224, 224))


def test_windows_are_an_error_that_says_so():
    with pytest.raises(CamError, match=r"a batch of 128 for x with a batch of 2: 64 windows, .* choose the layer around them"):
        read((128, 49, 96), (224, 224))
    with pytest.raises(CamError, match=r"a batch of 3 for x with a batch of 2: is the batch axis of x missing\?"):
        read((3, 49, 96), (224, 224))
    for layout in ("channels_last", layouts.tokens()):
        with pytest.raises(CamError, match="64 windows"):
            read((128, 49, 96), (224, 224), layout=layout)
    regroup = layouts.read(torch.zeros(8, 4, 5), lambda a: a.reshape(2, 4, 4, 5).movedim(-1, 1), (8, 8), "layer", 2)
    assert regroup.grid == (4, 4)


def test_tokens_said_by_hand():
    values = torch.randn(2, 13, 5)
    for layout in (layouts.tokens((3, 4), 1), layouts.tokens((3, 4), suffix=0), layouts.tokens([3, 4], prefix=1, suffix=0)):
        found = layouts.read(values, layout, None, "layer", 2)
        assert found.grid == (3, 4)
        assert_close(found.values, values[:, 1:].mT, 0)
    found = layouts.read(values, layouts.tokens((2, 4), prefix=1, suffix=4), None, "layer", 2)
    assert_close(found.values, values[:, 1:9].mT, 0)
    assert_close(found.restore(found.values), values, 0)
    assert read((2, 13, 5), (48, 64), layout=layouts.tokens(suffix=0)).grid == (3, 4)
    assert read((2, 10, 5), (96, 96), layout=layouts.tokens(prefix=6)).grid == (2, 2)
    far = read((2, 31, 5), (96, 96), layout=layouts.tokens(grid=(3, 3)), placed=first_of)
    assert far.values.shape == (2, 5, 9)  # a prefix of 22
    with pytest.raises(CamError, match=r"can be read in 2 ways .* prefix=1\) or .*, prefix=0, suffix=1\)"):
        read((2, 13, 5), (48, 64), layout=layouts.tokens((3, 4)))
    with pytest.raises(CamError, match="do not follow those of the input"):  # a suffix that the caller has not named is seen
        read((2, 13, 5), (48, 64), layout=layouts.tokens((2, 4), prefix=1), placed=lambda forms: [])
    with pytest.raises(CamError, match=r"not \(n, tokens, channels\) with the prefix and grid of layout=camfn.layouts.tokens"):
        read((2, 13, 5), (48, 64), layout=layouts.tokens((3, 4), prefix=2))
    with pytest.raises(CamError, match="which is not"):
        read((2, 13, 5, 5), (48, 64), layout=layouts.tokens())
    with pytest.raises(CamError, match=r"tokens\(grid=\(3, 0\)\): grid must be"):
        layouts.tokens((3, 0))
    with pytest.raises(CamError, match=r"tokens\(prefix=-1\): prefix must be a number"):
        layouts.tokens(prefix=-1)
    with pytest.raises(CamError, match=r"tokens\(suffix=True\): suffix must be a number"):
        layouts.tokens(suffix=True)


def test_tokens_first_as_torchs_transformers_have_them():
    values = torch.randn(17, 2, 5)
    found = layouts.read(values, "auto", (32, 32), "layer", 2, placed=first_of)
    assert found.grid == (4, 4)
    assert_close(found.values, values[1:].permute(1, 2, 0), 0)
    assert_close(found.restore(found.values), values, 0)
    with pytest.raises(CamError, match="a batch of 17"):
        layouts.read(values, "channels_last", (32, 32), "layer", 2)


def test_a_callable_layout_reads_and_has_no_way_back():
    tokens = torch.randn(2, 1 + 6, 8)
    found = layouts.read(tokens, lambda t: t[:, 1:].mT.unflatten(-1, (2, 3)), None, "layer", 2)
    assert found.grid == (2, 3)
    assert_close(found.values[0, :, 0], tokens[0, 1], 0)
    assert_close(found.view(tokens * 2), found.values * 2, 0)
    with pytest.raises(CamError, match="writes values into layer 'layer', and layout= is a function, which has no inverse"):
        found.restore(found.values)


BACK = {
    "channels_first": ((2, 5, 3, 4), "channels_first"),
    "channels_last": ((2, 3, 4, 5), "channels_last"),
    "tokens": ((2, 12, 5), layouts.tokens((3, 4))),
    "prefix": ((2, 3 + 12, 5), layouts.tokens((3, 4), 3)),
    "sequence": ((1 + 12, 2, 5), layouts.tokens((3, 4), 1)),
    "volume": ((2, 5, 3, 4, 2), "channels_first"),
    "line": ((2, 5, 7), "channels_first"),
}


@pytest.mark.parametrize("name", BACK)
def test_the_way_back(name):
    shape, layout = BACK[name]
    activation = torch.randn(shape, dtype=torch.float64)
    found = layouts.read(activation, layout, None, "layer", 2)
    assert_close(found.restore(found.values), activation, 0, "there and back")
    assert found.restore(found.values).is_contiguous()
    other = torch.randn_like(found.values)
    back = found.restore(other)
    assert_close(found.view(back), other, 0, "what was written is read")
    # All else is as it was captured: a plain loop over what is no position.
    batch, axis = (1, 0) if name == "sequence" else (0, 1)
    for i in range({"prefix": 3, "sequence": 1}.get(name, 0)):
        assert_close(back.select(axis, i), activation.select(axis, i), 0)
    # Rows of any images, and mapped over a leading axis.
    images = torch.tensor([1, 1, 0])
    rows = found.restore(other[images], images)
    assert_close(rows, back.index_select(batch, images), 0)
    assert_close(vmap(found.restore)(torch.stack([other, found.values])), torch.stack([back, activation]), 0)
    # Linear in the values, so its derivative is itself less the prefix.
    tangent = torch.func.jvp(found.restore, (found.values,), (other,))[1]
    assert_close(tangent, found.restore(other) - found.restore(torch.zeros_like(other)), 0)


def test_values_are_written_back_in_the_layers_dtype():
    activation = torch.randn(2, 13, 5).half()
    found = layouts.read(activation, layouts.tokens((3, 4), 1), None, "layer", 2)
    assert found.restore(found.values.float()).dtype == torch.float16


def test_one_captured_image_serves_any_number_of_rows():
    activation = torch.randn(1, 13, 5)
    found = layouts.read(activation, layouts.tokens((3, 4), 1), None, "layer", 1)
    rows = torch.randn(4, 5, 12)
    back = found.restore(rows)
    assert_close(back[:, 0], activation[:, 0].expand(4, -1), 0)
    assert_close(back[:, 1:], rows.mT, 0)

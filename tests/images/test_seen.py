"""What a network saw: the cropped picture in its own colors."""

import numpy as np
import pytest
import torch
from PIL import Image

from camfn import images
from camfn.images.preprocessing import pixels_of
from tests.oracles.closeness import close

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def resized(picture: Image.Image) -> Image.Image:
    return picture.resize((12, 10), Image.Resampling.BILINEAR).crop((2, 1, 10, 9))


def tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(2).integers(0, 256, (20, 24, 3), dtype=np.uint8))


SCALINGS = {
    "none": lambda p: tensor(resized(p)),
    "mean and standard deviation": lambda p: (tensor(resized(p)) - MEAN) / STD,
    "0 to 255 less a mean, BGR": lambda p: tensor(resized(p)).flip(0) * 255 - torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1),
    "another cyclic order": lambda p: (tensor(resized(p)).roll(1, 0) - MEAN) / STD,
    "inverted": lambda p: 1 - 2 * tensor(resized(p)),
    "a mapping of lists, as of transformers": lambda p: {"pixel_values": [((tensor(resized(p)) - MEAN) / STD).numpy()]},
    "a batch of one": lambda p: ((tensor(resized(p)) - MEAN) / STD)[None],
}


@pytest.mark.parametrize("name", SCALINGS)
def test_what_the_network_saw_is_the_cropped_picture_in_its_own_colours(name):
    preprocess = SCALINGS[name]
    seen, true = images.as_seen(pixels_of(preprocess, photo()), preprocess, photo().size)
    assert true
    assert np.array_equal(np.rint(seen.numpy() * 255), np.asarray(resized(photo())))


def test_a_grey_network_saw_a_grey_picture():
    def preprocess(picture):
        return (torch.from_numpy(np.array(resized(picture).convert("L")))[None].float() / 255 - 0.4) / 0.2

    seen, true = images.as_seen(preprocess(photo()), preprocess, photo().size)
    assert true
    assert np.array_equal(np.rint(seen.numpy() * 255), np.dstack([np.asarray(resized(photo()).convert("L"))] * 3))


def test_padding_is_black_and_the_rest_true():
    def preprocess(picture):
        return torch.nn.functional.pad((tensor(resized(picture)) - MEAN) / STD, (2, 2, 0, 0), value=0.7)

    seen, true = images.as_seen(preprocess(photo()), preprocess, photo().size)
    assert true
    assert np.array_equal(np.rint(seen[:, 2:-2].numpy() * 255), np.asarray(resized(photo())))
    assert not seen[:, :2].any()
    assert not seen[:, -2:].any()


def choosy(picture):
    if len(set(picture.getdata() if not hasattr(picture, "get_flattened_data") else picture.get_flattened_data())) == 1:
        raise ValueError("an even picture")
    return tensor(resized(picture))


UNMEASURABLE = {
    "a square root": lambda p: tensor(resized(p)).sqrt(),
    "channels mixed": lambda p: tensor(resized(p)) @ torch.full((8, 8), 0.1) + tensor(resized(p)).mean(0) * 3,
    "scaled by its own mean": lambda p: tensor(resized(p)) / tensor(resized(p)).mean().clamp(min=1e-3),
    "refuses even pictures": choosy,
    "two channels": lambda p: tensor(resized(p))[:2] * 3,
    "constant": lambda p: torch.zeros(3, 8, 8),
}


@pytest.mark.parametrize("name", UNMEASURABLE)
def test_where_colours_cannot_be_undone_the_input_is_stretched_and_that_is_said(name):
    x = UNMEASURABLE[name](photo())
    seen, true = images.as_seen(x, UNMEASURABLE[name], photo().size)
    assert not true
    grey = x.double() if len(x) == 3 else x.double().mean(0).expand(3, 8, 8)
    span = grey.max() - grey.min()
    expected = (grey - grey.min()) / span if span else torch.zeros(3, 8, 8, dtype=torch.float64)
    close(seen, expected.permute(1, 2, 0))


def test_random_numbers_that_a_preprocessing_draws_leave_no_trace():
    before = torch.get_rng_state()
    images.as_seen(tensor(resized(photo())), lambda p: tensor(resized(p)) + 0 * torch.rand(()), photo().size)
    assert torch.equal(torch.get_rng_state(), before)

"""The worker: the maps of batches, failures one by one, noise by id."""

import contextlib
import os
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import camfn
from camfn import CamError, demo, runs
from camfn.runs.decoding import Decoded, Decoder, batches, decoded
from camfn.runs.sources import Item, items_of
from camfn.zoo.networks import Network
from tests.support import datasets
from tests.support.datasets import check_equal, keyed, made

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return datasets.pictures(tmp_path_factory.mktemp("images"), 7)


def inputs(count, side=16):
    generator = torch.Generator().manual_seed(count)
    return [(f"x{number}", torch.randn(3, side, side, generator=generator)) for number in range(count)]


# ------------------------------------------------------------------------------------------------------ what is stored


def test_maps_are_those_of_plain_calls(tmp_path):
    given, net = inputs(3), camfn.open("demo")
    made(
        given,
        tmp_path,
        methods=["grad_cam", "score_cam", "rise"],
        target=["top2", "ring"],
        num_samples=6,
        relu=False,
        dtype="float32",
    )
    rows = keyed(tmp_path)
    for id, x in given:
        logits = net.model(x[None])[0]
        best = logits.topk(2).indices.tolist()
        classes = list(dict.fromkeys([*best, net.names.index("ring")]))
        wanted = {("features", "grad_cam"), ("features", "score_cam"), (None, "rise")}
        assert {key[1:] for key in rows if key[0] == id} == {(*at, str(index)) for at in wanted for index in classes}
        for index in classes:
            row = rows[id, "features", "grad_cam", str(index)]
            raw = camfn.grad_cam(net.model, "features", x[None], index, relu=False, normalize=False)[0]
            torch.testing.assert_close(row.map, raw, rtol=1e-4, atol=1e-5)
            assert (row.class_name, row.predicted) == (net.names[index], best[0])
            np.testing.assert_allclose(
                (row.score, row.probability), (logits[index].detach(), logits.softmax(0)[index].detach()), 1e-4
            )


def test_several_layers_come_from_one_forward(tmp_path):
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = camfn.demo.network()
            self.seen = []  # shared with copies: a list of the caller's is copied, so the count is kept in a file

        def forward(self, x):
            with open(tmp_path / "count", "a") as file:
                file.write(f"{len(x)}\n")
            return self.net(x)

    network = Network("counted", None, Counted().eval(), camfn.demo.preprocess, ())
    made(inputs(4), tmp_path / "out", model=network, layer=["net.body", "net.features"], methods=["grad_cam", "layer_cam"])
    assert len(keyed(tmp_path / "out")) == 4 * 2 * 2
    assert (tmp_path / "count").read_text() == "4\n"


def test_a_target_of_camfn_has_a_name(tmp_path):
    made(inputs(2), tmp_path, target=camfn.targets.contrast(1, [2]))
    (name,) = {key[3] for key in keyed(tmp_path)}
    assert name == "logit 1 - mean of 2"
    assert {row.class_name for row in runs.read(tmp_path)} == {"square"}


def test_where_the_input_lies_on_the_photo_is_told(tmp_path, images):
    Image.new("RGB", (192, 96)).save(tmp_path / "wide.png")
    made([("wide", tmp_path / "wide.png")], tmp_path / "out")
    (row,) = runs.read(tmp_path / "out")
    assert (row.width, row.height, row.input_width, row.input_height) == (192, 96, 192, 96)
    np.testing.assert_allclose(row.view, (1, 0, 0, 0, 1, 0), atol=1e-2)
    camfn.images.overlay(Image.open(tmp_path / "wide.png"), row.map / max(float(row.map.abs().max()), 1.0), view=row.on_photo)


def test_what_a_map_lacks_is_told(tmp_path):
    flat = torch.zeros(3, 16, 16)
    made([("flat", flat), *inputs(1)], tmp_path, methods="mean_cam", layer="mean")
    found = {row.id: row.findings for row in runs.read(tmp_path)}
    assert found["flat"] == ("flat map",), "a single position is flat"


# ------------------------------------------------------------------------------------------- it depends on nothing else

NOISY = {"methods": ["random_cam", "ss_cam", "is_cam", "rise"], "num_samples": 2}


def test_maps_do_not_depend_on_batches_and_order(tmp_path):
    given = inputs(5)
    made(given, tmp_path / "one", batch=1, **NOISY)
    made(given[::-1], tmp_path / "all", batch=5, every=2, **NOISY)
    check_equal(tmp_path / "one", tmp_path / "all")


def test_noise_depends_on_the_id_and_the_seed(tmp_path):
    x = inputs(1)[0][1]
    made([("a", x), ("b", x)], tmp_path / "0", methods="random_cam")
    made([("a", x)], tmp_path / "1", methods="random_cam", seed=1)
    a, b = (keyed(tmp_path / "0", id=id) for id in "ab")
    (first,), (second,), (other,) = (found.values() for found in (a, b, keyed(tmp_path / "1")))
    assert not torch.allclose(first.map, second.map)
    assert not torch.allclose(first.map, other.map)


# ------------------------------------------------------------------------------------------------------------ failures


class Picky(nn.Module):
    """Refuses pictures whose first pixel is above a bound."""

    def __init__(self, bound=3.0):
        super().__init__()
        self.net, self.bound = camfn.demo.network(), bound

    def forward(self, x):
        if bool((x[:, 0, 0, 0] > self.bound).any()):
            raise RuntimeError("too\nbright")
        return self.net(x)


def picky(bound=3.0):
    return Network("picky", None, Picky(bound).eval(), camfn.demo.preprocess, ())


def test_an_image_that_fails_leaves_its_batch_alone(tmp_path):
    given = inputs(6)
    given[2][1][0, 0, 0] = 9.0
    summary = made(given, tmp_path / "out", model=picky(), layer="net.features")
    assert (summary.made, summary.failed) == (5, 1)
    (row,) = runs.failures(tmp_path / "out")
    assert row.id == "x2"
    assert row.error == "the model failed: RuntimeError: too bright"
    made([each for each in given if each[0] != "x2"], tmp_path / "same", model=picky(), layer="net.features")
    check_equal(tmp_path / "out", tmp_path / "same")


def test_failures_are_tried_again_only_if_asked(tmp_path, images):
    given = [*inputs(2), ("late", tmp_path / "late.png")]
    assert made(given, tmp_path / "out")[:2] == (2, 1)
    Image.new("RGB", (9, 9)).save(tmp_path / "late.png")
    assert made(given, tmp_path / "out")[:3] == (0, 1, 2)
    assert made([*given, *[("new", given[0][1])]], tmp_path / "out", retry=True)[:2] == (1, 0), "and nothing but failures"
    assert runs.failures(tmp_path / "out") == []
    assert {key[0] for key in keyed(tmp_path / "out")} == {"x0", "x1", "late"}


def test_a_run_in_which_nothing_works_ends(tmp_path):
    with pytest.raises(CamError, match=r"32 images in a row failed, the last \('x31'\) with: the model failed: .*too bright"):
        made(inputs(40), tmp_path, model=picky(-99.0), layer="net.features")
    assert runs.failures(tmp_path) == [], "they are not the images' fault"


def test_a_map_beyond_float32_fails(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    network = Network("huge", None, net, camfn.demo.preprocess, ())
    made([("a", 1e300 * torch.ones(3, 6, 6, dtype=torch.float64))], tmp_path, model=network, layer="0", methods="mean_cam")
    (row,) = runs.failures(tmp_path)
    assert "beyond float32" in row.error or "not finite" in row.error


# ------------------------------------------------------------------------------------------------------------- batches


def test_batches_have_one_shape():
    shapes = [(1,), (2,), None, (1,), (1,), (2,), None, (3,)]
    given = [Decoded(Item(str(number), None), shape and np.zeros(shape)) for number, shape in enumerate(shapes)]
    found = [[each.item.id for each in batch] for batch in batches(given, 2)]
    assert found == [["0", "3"], ["1", "5"], ["2", "6"], ["4"], ["7"]]


def test_few_images_wait_for_others_of_their_shape():
    given = [Decoded(Item(str(number), None), np.zeros(number)) for number in range(50)]
    at = []
    taken = batches((at.append(each) or each for each in given), 2)
    for number in range(20):
        next(taken)
        assert len(at) - number <= 8, "four batches of two"


# ------------------------------------------------------------------------------------------------------ other processes


class Deadly:
    """A decoder that some pictures kill, as a fault in its C code would."""

    def __init__(self, *ids):
        self.ids, self.decode = ids, Decoder(camfn.open("demo"))

    def __call__(self, item):
        if item.id in self.ids:
            os.kill(os.getpid(), 9)
        return self.decode(item)


EVERY = ("a/0000.png", "a/0002.png", "a/0004.png", "a/0006.png", "b/0001.png", "b/0003.png", "b/0005.png")
"""The pictures of `images`. Where neighbors kill their processes, one dies before the other's process is replaced."""


@pytest.mark.parametrize("ids", [(), EVERY[:1], EVERY[2:5], EVERY[-1:], EVERY[2::4], EVERY])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_picture_that_kills_its_process_fails_alone(images, ids, workers):
    items = items_of(images)
    with contextlib.closing(decoded(items, Deadly(*ids), workers)) as taken:
        found = list(taken)
    assert [each.item for each in found] == items, "each once, in order"
    for each in found:
        assert (each.error == "it kills the process that decodes it") == (each.item.id in ids)
        assert (each.x is None) == (each.item.id in ids)


def test_pictures_that_kill_one_process_after_the_other_are_waited_for(images):
    """While one's process is replaced, the other may be the first to take the new one. Each round is a race."""
    items = items_of(images)
    for _ in range(10):
        with contextlib.closing(decoded(items, Deadly(*EVERY[1:3]), 1)) as taken:
            assert [each.item.id for each in taken if each.error] == [*EVERY[1:3]]


def test_a_death_is_seen_while_another_process_holds_the_pipe(images, monkeypatch):
    """As one that is forked between the making of the pipe and the closing of its other end here."""
    held = []
    monkeypatch.setattr(Connection, "close", lambda self: held.append(self))
    with contextlib.closing(decoded(items_of(images), Deadly(*EVERY[:1]), 1)) as taken:
        assert [each.item.id for each in taken if each.error] == [*EVERY[:1]]
    assert held


def test_processes_decode_as_this_one_does(tmp_path, images):
    made(images, tmp_path / "here", workers=0)
    made(images, tmp_path / "there", workers=2, batch=2)
    check_equal(tmp_path / "here", tmp_path / "there")


def test_the_callers_network_is_left_as_it_was(tmp_path):
    network = camfn.open("demo")
    network.model.train()
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    x = demo.preprocess(demo.scene(0).image)
    camfn.runs.run([("a", x)], model=network, layer="features", out=tmp_path / "mine")
    assert all(module.training for module in network.model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.model.state_dict().items())
    camfn.runs.run([("a", x)], model="demo", layer="features", out=tmp_path / "named")
    (mine,), (named,) = (list(camfn.runs.read(tmp_path / name)) for name in ("mine", "named"))
    assert torch.equal(mine.map, named.map), "the maps are those of eval mode"

"""The format: rows in Parquet shards, committed whole or not at all, and the manifest."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from camfn import CamError, CamWarning, runs
from camfn.runs import lock, manifest, shards
from camfn.runs.rows import Row, packed, table_of
from tests.support.command_line import ENVIRONMENT

pa = pytest.importorskip("pyarrow")


def row(id="a", map=None, **fields):
    return Row(id, f"{id}.png", layer="l", method="m", target="1", map=torch.rand(3, 4) if map is None else map, **fields)


@pytest.fixture
def out(tmp_path):
    shards.make(tmp_path)
    manifest.agree(tmp_path, {"methods": ["m"], "layers": ["l"]})
    return tmp_path


def test_rows_come_back(out):
    full = row(
        width=9,
        height=8,
        input_width=5,
        input_height=4,
        view=(2.0, 0.0, 0.0, 0.0, 2.0, 0.0),
        class_name="fox",
        label="7",
        predicted=3,
        score=0.1,
        probability=0.5,
        map_error=0.25,
        findings=("flat map",),
    )
    bare = row("b")
    shards.commit(out / shards.MAPS, [full, bare], "float32")
    for found, wanted in zip(runs.read(out), (full, bare)):
        assert torch.equal(found.map, wanted.map)
        assert found._replace(map=None) == wanted._replace(map=None)
    view = full.on_photo
    assert (view.size, view.photo, view.matrix) == ((5, 4), (9, 8), ((2.0, 0.0, 0.0), (0.0, 2.0, 0.0)))
    assert bare.on_photo is None


@pytest.mark.parametrize("scale", [1e-30, 1.0, 7e4, 1e30])
def test_a_narrow_map_keeps_its_digits_at_every_scale(out, scale):
    """float16 has 11 bits: half a unit is 2**-11 of a value, and 2**-25 of the largest below float16's normal numbers."""
    raw = scale * torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    shards.commit(out / shards.MAPS, [row(map=raw)])
    (found,) = runs.read(out)
    bound = raw.abs() * 2**-10.9 + raw.abs().max() * 2**-24
    assert bool(((found.map - raw).abs() <= bound).all())


def test_maps_that_are_zero_or_not_finite_come_back(out):
    wild = torch.tensor([[float("nan"), float("inf"), -2.0]])
    shards.commit(out / shards.MAPS, [row("a", torch.zeros(2, 2)), row("b", wild)])
    zero, found = runs.read(out)
    assert torch.equal(zero.map, torch.zeros(2, 2))
    torch.testing.assert_close(found.map, wild, rtol=0, atol=0, equal_nan=True)


def test_a_file_that_others_read_needs_no_camfn(out):
    """The columns say how a map is stored."""
    raw = torch.rand(2, 3)
    path = shards.commit(out / shards.MAPS, [row(map=raw)])
    (found,) = pa.parquet.read_table(path).to_pylist()
    again = np.array(found["map"], np.float32).reshape(found["grid"]) * found["scale"]
    np.testing.assert_allclose(again, raw, atol=2**-11)


def test_a_shard_is_named_by_its_ids(out):
    first = shards.commit(out / shards.MAPS, [row("a"), row("b")])
    assert shards.commit(out / shards.MAPS, [row("b"), row("a")]) == first
    assert shards.commit(out / shards.MAPS, [row("b")]) != first
    assert shards.ids_in(out / shards.MAPS) == {"a", "b"}
    assert shards.ids_in(out / shards.MAPS, [first.name]) == {"b"}


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_damaged_shard_is_left_out_with_a_warning(out, damage):
    shards.commit(out / shards.MAPS, [row("a")])
    path = shards.commit(out / shards.MAPS, [row("b", torch.rand(40, 40))])
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 4] ^= 255
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "flipped": data}[damage])
    with pytest.warns(CamWarning, match="is cut off or damaged, and is left out: .*run again"):
        assert [found.id for found in runs.read(out)] == ["a"]


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["replace", "fsync", "open"])
def test_a_disk_that_is_full_leaves_no_half_file(out, monkeypatch, where):
    def fails(*_, **__):
        raise FULL

    if where == "open":
        monkeypatch.setattr("builtins.open", fails)
    else:
        monkeypatch.setattr(os, where, fails)
    with pytest.raises(CamError, match="cannot be written to: No space left on device"):
        shards.commit(out / shards.MAPS, [row()])
    monkeypatch.undo()
    assert list((out / shards.MAPS).iterdir()) == []


def test_what_a_killed_run_left_is_removed(out):
    left = out / shards.MAPS / ".abc.parquet.123.tmp"
    left.write_bytes(b"half")
    assert list(runs.read(out)) == []
    shards.sweep(out)
    assert not left.exists()


# ------------------------------------------------------------------------------------------------------------ manifest


def test_settings_must_be_the_same(out):
    manifest.agree(out, {"methods": ["m"], "layers": ("l",)})
    with pytest.raises(CamError, match=r"has layers \['l'\], and this call has \['k'\]; use the same, or"):
        manifest.agree(out, {"methods": ["m"], "layers": ["k"]})
    with pytest.raises(CamError, match="has seed None, and this call has 3; use"):
        manifest.agree(out, {"methods": ["m"], "layers": ["l"], "seed": 3})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "holds no run: it has no manifest.json"),
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[]", "is not the manifest of a run"),
        (json.dumps({"format": 99, "settings": {}}).encode(), "has format 99, and this camfn reads format 1"),
    ],
)
def test_what_is_no_run_is_one_sentence(tmp_path, text, words):
    if text is not None:
        (tmp_path / manifest.FILE).write_bytes(text)
    with pytest.raises(CamError, match=words):
        runs.read(tmp_path)


def test_names_of_methods_and_layers_are_checked(out):
    with pytest.raises(CamError, match="the run has no method 'n'; all: m"):
        runs.read(out, method="n")


def test_the_hash_of_weights_sees_names_dtypes_and_values():
    layer = torch.nn.Linear(2, 2)
    first = manifest.weights_of(layer)
    assert manifest.weights_of(layer) == first
    assert manifest.weights_of(torch.nn.Sequential(layer)) != first
    assert manifest.weights_of(layer.double()) != first
    with torch.no_grad():
        layer.float().bias[0] += 1
    assert manifest.weights_of(layer) != first


# ---------------------------------------------------------------------------------------------------------------- lock

HOLD = """
import sys, pathlib, time
from camfn.runs import lock
with lock.locked(pathlib.Path(sys.argv[1]), eval(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(out, rank=None):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out), repr(rank)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_ends_with_its_process(out, monkeypatch):
    monkeypatch.setattr(lock, "WAIT", 0.0)
    process = holder(out)
    try:
        with pytest.raises(CamError, match=rf"is being written by another run \(process {process.pid} on "), lock.locked(out):
            pass
        with pytest.raises(CamError, match="is being written by another run"), lock.locked(out, 3):
            pass
    finally:
        process.kill()
        process.communicate()
    with lock.locked(out):
        pass


def test_ranks_share_a_folder_and_keep_others_out(out, monkeypatch):
    monkeypatch.setattr(lock, "WAIT", 0.0)
    process = holder(out, 1)
    try:
        with lock.locked(out, 0), pytest.raises(CamError, match="another run"), lock.locked(out, 1):
            pass
        with pytest.raises(CamError, match="another run"), lock.locked(out):
            pass
    finally:
        process.kill()
        process.communicate()


def test_a_process_is_locked_out_by_itself(out):
    with lock.locked(out):
        with pytest.raises(CamError, match="by another run of this process"), lock.locked(out):
            pass
        with pytest.raises(CamError, match="by another run of this process"), lock.locked(out):
            pass


def test_a_map_beyond_float32_is_an_error():
    from camfn.runs.rows import checked

    with pytest.raises(CamError, match=r"up to 1e[+]300, beyond float32"):
        checked(torch.tensor([[1e300]], dtype=torch.float64))


def test_rows_without_maps_make_a_table():
    assert table_of([Row("a", "a.png", error="why")]).to_pylist()[0]["error"] == "why"
    assert table_of([]).num_rows == 0
    assert packed(torch.zeros(1, 1), "float16")[2] == 1.0

"""`camfn.runs.run`: resumed after kills and interruptions, each image once; its arguments."""

import os
import random
import signal
import time

import pytest
import torch

import camfn
from camfn import CamError, runs
from camfn.runs import lock, shards
from tests.support import datasets
from tests.support.datasets import check_equal, keyed, made, started, wait_for_shards

pytest.importorskip("pyarrow")
COUNT = 120


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return datasets.pictures(tmp_path_factory.mktemp("images"), COUNT)


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    """A run that nothing disturbs, in one go."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert made(images, out, methods=["grad_cam", "random_cam"])[:3] == (COUNT, 0, 0)
    return out


METHODS = {"methods": ["grad_cam", "random_cam"]}


def resumed(images, out, undisturbed, **options):
    """Resume a run, and hold it equal to an undisturbed one."""
    summary = made(images, out, **METHODS, **options)
    assert summary.failed == 0
    assert summary.made + summary.done == COUNT
    check_equal(out, undisturbed)
    assert not list((out / shards.MAPS).glob(".*")), "nothing half written is left"
    return summary


@pytest.mark.parametrize("who", ["the run", "its decoder", "both"])
def test_a_killed_run_is_resumed(images, undisturbed, tmp_path, who):
    chance = random.Random(who)
    process = started(images, tmp_path, **METHODS)
    try:
        wait_for_shards(process, tmp_path, chance.randint(1, 4))
        time.sleep(chance.random() / 10)
        children = datasets.children_of(process.pid)
        if who != "the run" and process.poll() is None and children:
            datasets.kill(children[0])
        if who != "its decoder":
            process.kill()
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    if who == "its decoder":
        assert f"made={COUNT}, failed=0" in output, errors
    summary = resumed(images, tmp_path, undisturbed)
    assert summary.done > 0, "what was committed is kept"


@pytest.mark.slow  # depends on when the signal comes
def test_an_interrupted_run_ends_in_order(images, tmp_path):
    process = started(images, tmp_path, **SLOW)
    try:
        wait_for_shards(process, tmp_path, 1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the decoders too
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors
    assert "Process" not in errors, "the decoders end without a word"
    assert keyed(tmp_path)


SLOW = {"methods": ["score_cam"], "batch": 1, "every": 1}
"""Some seconds on any machine, with a shard early on."""


def processes_of(process, count):
    """The processes of a run on several devices, as soon as they are there. They import torch first."""
    until = time.monotonic() + 60
    while True:
        found = [pid for pid in datasets.children_of(process.pid) if b"spawn_main" in command_of(pid)]
        if len(found) == count:
            return found
        assert time.monotonic() < until
        time.sleep(0.01)


def command_of(pid):
    """The command of a process; nothing if it has ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


@pytest.mark.slow  # depends on when the signal comes
def test_the_processes_of_a_run_end_with_it(images, undisturbed, tmp_path):
    """The parent is killed; its processes end too, and the lock with them."""
    process = started(images, tmp_path, devices=["cpu", "cpu"], **METHODS)
    try:
        workers = processes_of(process, 2)
        wait_for_shards(process, tmp_path, 1)
        process.kill()
        process.communicate(timeout=60)
    finally:
        process.kill()
    resumed(images, tmp_path, undisturbed)
    until = time.monotonic() + 60
    while any(b"spawn_main" in command_of(pid) for pid in workers):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.slow  # depends on when the signal comes
def test_a_process_that_is_killed_is_told_and_the_others_end_in_order(images, undisturbed, tmp_path):
    process = started(images, tmp_path, devices=["cpu", "cpu"], **METHODS)
    try:
        datasets.kill(processes_of(process, 2)[0])
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert "was killed by SIGKILL: run again to make the rest" in errors
    summary = resumed(images, tmp_path, undisturbed)
    assert summary.done == COUNT // 2, "the other made its share"


def test_ranks_of_torchrun_make_all_between_them(images, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    counts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        counts.append(made(images, tmp_path, **METHODS).made)
    assert counts == [40, 40, 40]
    monkeypatch.delenv("WORLD_SIZE")
    assert resumed(images, tmp_path, undisturbed).made == 0


def test_a_shard_that_is_cut_off_is_made_again(images, undisturbed, tmp_path):
    made(images, tmp_path, every=50, **METHODS)
    path = sorted((tmp_path / shards.MAPS).iterdir())[1]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(camfn.CamWarning, match="is cut off or damaged"):
        summary = made(images, tmp_path, **METHODS)
    assert 0 < summary.made < 100
    assert summary.made + summary.done == COUNT
    check_equal(tmp_path, undisturbed)


def test_two_runs_at_once(images, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WAIT", 0.2)
    process = started(images, tmp_path, **SLOW)
    try:
        wait_for_shards(process, tmp_path, 1)
        with pytest.raises(CamError, match=rf"is being written by another run \(process {process.pid} on"):
            made(images, tmp_path)
    finally:
        process.kill()
        process.communicate()


def test_a_disk_that_gets_full_is_one_sentence_and_loses_nothing_committed(images, undisturbed, tmp_path, monkeypatch):
    replace, count = os.replace, iter(range(100))

    def full(*paths):
        if next(count) >= 3:
            raise OSError(28, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CamError, match="cannot be written to: No space left on device"):
        made(images, tmp_path, every=32, **METHODS)
    monkeypatch.undo()
    assert resumed(images, tmp_path, undisturbed).done == 64, "the manifest and two shards"


def test_a_folder_that_turns_read_only_is_one_sentence(images, tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(CamError, match="cannot be written to: Permission denied"):
        made(images, tmp_path)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_or_an_interruption_commits_what_was_made(tmp_path, error):
    def given():
        for number in range(5):
            yield str(number), torch.zeros(3, 16, 16)
        raise error("the caller's")

    with pytest.raises(error, match="the caller's"):
        made(given(), tmp_path, batch=2)
    assert {key[0] for key in keyed(tmp_path)} == {"0", "1", "2", "3"}


# ------------------------------------------------------------------------------------------------------------ settings

OTHER = {
    "layer": {"layer": "body"},
    "methods": {"methods": "mean_cam"},
    "target": {"target": 3},
    "seed": {"seed": 1},
    "dtype": {"dtype": "float32"},
    "weights": {"pretrained": False},
    "options": {"relu": False},
}


@pytest.mark.parametrize("name", OTHER)
def test_other_settings_are_an_error_that_says_which(tmp_path, name):
    given = [("a", torch.zeros(3, 16, 16))]
    made(given, tmp_path)
    word = f"{name}s" if name == "layer" else name
    with pytest.raises(CamError, match=f" has {word} .*, and this call has "):
        made(given, tmp_path, **OTHER[name])
    made(given, tmp_path, batch=3, every=7)


WRONG = {
    "a method": ({"methods": "grad_cm"}, "no method named 'grad_cm'; closest: 'grad_cam'"),
    "no method": ({"methods": []}, "methods is empty"),
    "an option": ({"budget": 0.1}, "a run of grad_cam has no option 'budget'"),
    "an option of ours": ({"normalize": True}, "has no option 'normalize'"),
    "no layer": ({"layer": None}, "name a layer, so that all maps come from the same layer: `camfn layers"),
    "a layer": (
        {"layer": "feature"},
        "no layer named 'feature' in .*; closest: 'features', .*; `camfn layers --model SPEC` lists",
    ),
    "a target": ({"target": "wolf"}, "'wolf' is not a class"),
    "a batch": ({"batch": 0}, "batch must be a whole number of at least 1"),
    "a dtype": ({"dtype": "int8"}, "dtype must be 'float16' or 'float32'"),
    "an engine": ({"engine": "spark"}, 'engine must be "local" or "ray"'),
    "an address": ({"address": "auto"}, "is that of a cluster of Ray"),
    "devices": ({"devices": ["cpu", "cpu"]}, "several devices need a folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence_before_anything_is_written(tmp_path, case):
    options, words = WRONG[case]
    with pytest.raises(CamError, match=words):
        made([("a", torch.zeros(3, 16, 16))], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_one_sentence(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(CamError, match="cannot be made"):
        made([("a", torch.zeros(3, 16, 16))], tmp_path / "out")


def test_nothing_is_shown_where_stderr_is_no_terminal(tmp_path, capfd):
    runs.run([("a", torch.zeros(3, 16, 16))], model="demo", layer="features", out=tmp_path)
    assert capfd.readouterr() == ("", "")

"""The engine on Ray: the rows of the local engine, also where actors are killed."""

import contextlib
import os
import signal
import threading
import time

import pytest

from camfn.runs import shards
from tests.support import datasets
from tests.support.command_line import ROOT
from tests.support.datasets import check_equal, made

pytest.importorskip("pyarrow")
ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
COUNT = 60
METHODS = {"methods": ["grad_cam", "random_cam"]}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return datasets.pictures(tmp_path_factory.mktemp("images"), COUNT)


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two cores, as its start takes seconds."""
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def local(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("local")
    made(images, out, **METHODS)
    return out


pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


def test_both_engines_have_the_same_rows(cluster, images, local, tmp_path):
    (images / "a" / "bad.png").write_text("no picture")
    try:
        summary = made(images, tmp_path, engine="ray", **METHODS)
    finally:
        (images / "a" / "bad.png").unlink()
    assert (summary.made, summary.failed) == (COUNT, 1)
    check_equal(tmp_path, local)


def test_a_run_begun_by_one_engine_is_resumed_by_the_other(cluster, images, local, tmp_path):
    made(images / "a", tmp_path / "half", engine="ray", **METHODS)
    assert made(images / "a", tmp_path / "half", **METHODS)[:3] == (0, 0, COUNT // 2)


def test_actors_that_are_killed_cost_nothing(cluster, images, local, tmp_path):
    killed = []

    def kill():
        until = time.monotonic() + 100
        while time.monotonic() < until and len(killed) < 2:
            if datasets.shards_in(tmp_path) > 2 * len(killed):
                for pid in actors() - set(killed):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    break
            time.sleep(0.02)

    (tmp_path / shards.MAPS).mkdir()
    thread = threading.Thread(target=kill)
    thread.start()
    try:
        summary = made(images, tmp_path, engine="ray", every=4, **METHODS)
    finally:
        thread.join()
    assert killed, "the test can fail"
    assert summary.failed == 0
    check_equal(tmp_path, local)


def test_the_death_of_the_whole_cluster_loses_only_what_was_not_committed(images, local, tmp_path):
    """The driver, the scheduler and the actors are killed at once, as by a machine that stops."""
    process = datasets.started(images, tmp_path, engine="ray", every=4, **METHODS)
    try:
        datasets.wait_for_shards(process, tmp_path, 2)
        for pid in (process.pid, *datasets.descendants_of(process.pid)):
            with contextlib.suppress(ProcessLookupError):  # it ended with its parent
                datasets.kill(pid)
        process.communicate(timeout=60)
    finally:
        process.kill()
    summary = made(images, tmp_path, **METHODS)
    assert summary.done > 0
    assert (summary.made + summary.done, summary.failed) == (COUNT, 0)
    check_equal(tmp_path, local)


def actors() -> set[int]:
    """The processes of Ray that run our worker."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read()
        except OSError:
            continue
        if words.startswith(b"ray::") and b"Actor" in words:
            found.add(int(name))
    return found

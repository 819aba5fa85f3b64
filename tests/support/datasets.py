"""What the tests of runs share: small pictures, runs of the demo network, and what a run must hold."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from camfn import runs
from tests.support.command_line import ENVIRONMENT

SIDE = 24


def pictures(folder: Path, count: int, side: int = SIDE) -> Path:
    """A folder of pictures of two shapes, in two subfolders. They are made of noise, and all differ."""
    random = np.random.default_rng(count)
    for number in range(count):
        place = folder / ("ab"[number % 2])
        place.mkdir(parents=True, exist_ok=True)
        shape = (side, side + 8 * (number % 3 == 0), 3)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(place / f"{number:04}.png")
    return folder


def tarred(path: Path, members: dict[str, bytes], *, mode: str = "w") -> Path:
    """A tar file with these members."""
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def table(where: Path, **columns) -> Path:
    """A table in row groups of two rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), where, row_group_size=2)
    return where


DEMO = {"model": "demo", "layer": "features", "progress_line": False}


def made(images, out, **options):
    """A run of the demo network in this process."""
    return runs.run(images, out=out, **{**DEMO, "workers": 0, **options})


def keyed(out, **which) -> dict:
    """The rows of a run by what names them. Each is there once."""
    rows = list(runs.read(out, **which))
    found = {(row.id, row.layer, row.method, row.target): row for row in rows}
    assert len(found) == len(rows), "rows are there twice"
    return found


def check_equal(out, other) -> None:
    """Two runs have the same rows. Their maps differ by the rounding of sums, which another batch adds in another order."""
    found, wanted = keyed(out), keyed(other)
    assert found.keys() == wanted.keys()
    for key, row in found.items():
        like = wanted[key]
        plain = {"map": None, "score": None, "probability": None, "map_error": None}
        assert row._replace(**plain) == like._replace(**plain)
        scale = float(like.map.abs().max())
        # Half a unit of float16 is 2**-11 of the largest value; sums that differ in float32 may round to its neighbor.
        torch.testing.assert_close(row.map, like.map, rtol=0, atol=scale * 2**-10, equal_nan=True)
        np.testing.assert_allclose(row.score, like.score, rtol=1e-4, atol=1e-4)


SCRIPT = """
import sys
from camfn import runs
if __name__ == "__main__":
    images, out, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
    print(runs.run(images, out=out, **options), flush=True)
"""


def started(images, out, **options) -> subprocess.Popen:
    """A run in a process of its own, and in a group of its own."""
    given = {**DEMO, "workers": 1, "every": 16, "batch": 8, **options}
    command = [sys.executable, "-c", SCRIPT, str(images), str(out), repr(given)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def shards_in(out: Path) -> int:
    return len(list((Path(out) / "shards").glob("[!.]*.parquet")))


def wait_for_shards(process: subprocess.Popen, out: Path, count: int) -> None:
    until = time.monotonic() + 120
    while shards_in(out) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "no shard was committed"
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    """The children of a process, on Linux."""
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def descendants_of(pid: int) -> list[int]:
    """The children of a process, their children, and so on."""
    found = children_of(pid)
    for child in found:
        with contextlib.suppress(OSError):  # it has ended
            found += children_of(child)
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)

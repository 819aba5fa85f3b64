"""The command line on streams that are closed, full, or slow."""

import io
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from camfn import cli
from camfn.cli import streams
from tests.support import command_line
from tests.support.command_line import CAMFN, ENVIRONMENT

here = command_line.here
PAIR = ("--model", "net.py:pair", "--layer", "2", "--target", "1", "--out", "maps")


def run_main(monkeypatch, *arguments: str, stdout, stderr) -> int:
    """`camfn ...` in this process, on streams that may take nothing; gives the exit status."""
    with open(stdout, "w") as out, open(stderr, "w") as err, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setattr(sys, "argv", ["camfn", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        sys.stdout.flush()  # as Python does at its end
        sys.stderr.flush()
    return int(ended.value.code or 0)


EXPLAIN = ["explain", "a.png", *PAIR]
LAYERS = ["layers", "--model", "net.py:pair"]


@pytest.mark.parametrize("command", [EXPLAIN, LAYERS, ["methods"], ["demo", "--method", "cam"], ["--help"], ["--version"]])
def test_a_stdout_that_is_full_is_one_line_and_exit_2(here, monkeypatch, command):
    monkeypatch.setattr("camfn.cli.demo.SHOWN", ((0, 1),))
    assert run_main(monkeypatch, *command, stdout="/dev/full", stderr="said") == 2
    *notes, line = Path("said").read_text().splitlines()
    assert notes == []
    assert line == "Error: stdout cannot be written to (No space left on device): redirect it to another file, or to /dev/null"


@pytest.mark.parametrize(("command", "status"), [(EXPLAIN[:4], 0), (["methods"], 0), (["explain", "none.png", *PAIR], 2)])
def test_a_stderr_that_is_full_stops_no_run_and_changes_no_status(here, monkeypatch, command, status):
    assert run_main(monkeypatch, *command, stdout="printed", stderr="/dev/full") == status
    assert bool(Path("printed").read_text()) == (status == 0)


def test_both_full_is_told_by_the_status_alone(here, monkeypatch):
    assert run_main(monkeypatch, *EXPLAIN, stdout="/dev/full", stderr="/dev/full") == 2
    assert len(list(Path("maps").iterdir())) == 3


def test_a_pipe_that_does_not_wait_is_waited_for():
    there, here = os.pipe()
    os.set_blocking(here, False)
    with open(there, "rb") as reader, open(here, "wb", buffering=0) as raw:
        slow = threading.Timer(0.2, reader.read, [300_000])
        slow.start()
        writer = io.BufferedWriter(streams.Guarded(raw, tells=True))
        writer.write(b"x" * 300_000)
        writer.flush()
        slow.join()


@pytest.mark.parametrize(
    ("command", "closed", "status", "said"),
    [
        (["methods"], ">&-", 2, "Error: stdout is closed: redirect it to a file, or to /dev/null\n"),
        (EXPLAIN[:4], "2>&-", 0, ""),
        (EXPLAIN, "<&- >&- 2>&-", 2, ""),
    ],
)
def test_a_stdout_that_is_closed_is_one_line_and_a_stderr_that_is_closed_stops_nothing(here, command, closed, status, said):
    line = f"{shlex.join([*CAMFN, *command])} {closed}"
    result = subprocess.run(line, shell=True, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (status, said)
    assert result.stdout.startswith("a.png: class " if status == 0 else "")
    folder = Path("camfn-maps")
    assert len(list(folder.iterdir()) if folder.exists() else []) == (3 if status == 0 else 0)
    assert not Path("maps").exists()

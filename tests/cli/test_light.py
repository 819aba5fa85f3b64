"""Help, lists and errors of usage come without torch, which takes seconds to import."""

import subprocess
import sys

import pytest

from tests.support import command_line
from tests.support.command_line import ENVIRONMENT

here = command_line.here

WITHOUT_TORCH = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Block())
sys.argv = ["camfn", *sys.argv[1:]]
from camfn.__main__ import main
main()
"""


def light(*arguments: str, blocked=("torch", "numpy", "PIL", "matplotlib")) -> subprocess.CompletedProcess:
    """`camfn ...`, in a process that cannot import torch."""
    command = [sys.executable, "-c", WITHOUT_TORCH.replace("{blocked}", repr(blocked)), *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["--help"],
        ["--version"],
        ["methods"],
        ["methods", "--json"],
        *([each, "-h"] for each in ("explain", "layers", "demo", "run", "convert")),
    ],
)
def test_help_and_lists_come_without_torch(command):
    result = light(*command)
    assert result.stderr == "" or not command  # click shows the help of a bare command on stderr
    assert result.stdout + result.stderr
    assert "is imported" not in result.stderr


USAGE = {
    "a command": (["explian"], "No such command 'explian'"),
    "an option": (["explain", "a.png", "--model", "demo", "--methid", "cam"], "--methid"),
    "no model": (["explain", "a.png"], "Missing option '--model'"),
    "a model": (["explain", "a.png", "--model", "resnet50"], "model 'resnet50' is none of demo, torchvision:NAME"),
    "a model of layers": (["layers", "--model", "net.py"], "model 'net.py' does not name a function"),
    "a model of a run": (["run", "a", "--model", "tim:x", "--layer", "1", "--out", "o"], "model 'tim:x' is none of demo"),
    "a method": (["explain", "a.png", "--model", "demo", "--method", "scorecam"], "--method 'scorecam' is not known"),
    "a seed": (["explain", "a.png", "--model", "demo", "--method", "cam", "--seed", "1"], "--seed 1: cam draws no random"),
    "a chunk": (["explain", "a.png", "--model", "demo", "--method", "cam", "--chunk", "1"], "--chunk 1: cam has no sweep"),
    "a size": (["explain", "a.png", "--model", "demo", "--size", "big"], "--size 'big' is not a size"),
    "a method of the demo": (["demo", "--method", "legrad"], "--method legrad needs attention"),
}


@pytest.mark.parametrize("case", USAGE)
def test_errors_of_usage_come_without_torch(case):
    arguments, words = USAGE[case]
    result = light(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert words in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_pictures_that_are_not_there_are_told_of_without_torch(here):
    result = light("explain", "none.png", "nor.png", "--model", "demo", blocked=("torch", "matplotlib"))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "Error: there is no file 'none.png'",
        "Error: there is no file 'nor.png'",
        "Error: 2 of 2 pictures failed: none.png, nor.png",
    ]
    result = light("layers", "none.png", "--model", "demo", blocked=("torch", "matplotlib"))
    assert (result.returncode, result.stderr) == (2, "Error: there is no file 'none.png'\n")


def test_the_check_can_fail(here):
    result = light("layers", "--model", "demo")
    assert result.returncode != 0
    assert "AssertionError: " in result.stderr
    assert "is imported" in result.stderr

"""`camfn layers` and `camfn methods`, the layers and costs that they tell of, and the help with its examples."""

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import camfn
from camfn import cli, images, zoo
from camfn.cli import catalog
from camfn.cli import layers as layer_table
from tests.support import command_line
from tests.support.command_line import command, picture

here = command_line.here


def listed(*arguments: str) -> list[dict]:
    result = command(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


# ---------------------------------------------------------------------------------------------------------- layers


def with_hooks(function: str, path: str) -> list[tuple[str, str, list[int]]]:
    """Name, class and shape of every module that returns one tensor, in the order in which they return."""
    found = []
    with zoo.opened(f"net.py:{function}") as loaded:
        x = loaded.preprocess(images.read(path))[None]
        for name, module in loaded.model.named_modules():
            module.register_forward_hook(
                lambda module, _, out, name=name: found.append((name, type(module).__name__, list(out.shape[1:])))
            )
        loaded.model.eval()(x)
    return found


def test_layers_lists_what_hooks_see_where_there_is_a_grid_in_the_order_of_execution(here):
    found = listed("layers", "a.png", "--model", "net.py:odd")
    expected = [seen for seen in with_hooks("odd", "a.png") if seen[0] in ("first", "twice", "last")]
    assert expected == [
        ("first", "Conv2d", [4, 4, 6]),
        ("twice", "ReLU", [4, 4, 6]),
        ("twice", "ReLU", [4, 4, 6]),
        ("last", "Conv2d", [5, 4, 6]),
    ]
    calls = iter(("twice@1", "twice@2"))  # a layer that runs twice is listed with its calls
    named = [(next(calls) if name == "twice" else name, kind, shape) for name, kind, shape in expected]
    assert [(row["layer"], row["class"], row["shape"]) for row in found] == named


def test_layers_shows_containers_after_their_contents(here):
    found = [row["layer"] for row in listed("layers", "a.png", "--model", "net.py:already")]
    assert (
        found == ["0.0", "0.1", "0.2", "0.3"] == [name for name, _, shape in with_hooks("already", "a.png") if shape[1:2] > [1]]
    )
    assert [row["layer"] for row in listed("layers", "--model", "net.py:watched")] == ["net.0", "net.1", "net.2", "net.3"]


def test_the_layer_that_is_marked_is_the_one_that_explain_chooses(here):
    for function in ("pair", "odd", "already", "without_tensors"):
        (chosen,) = [row["layer"] for row in listed("layers", "a.png", "--model", f"net.py:{function}") if row["chosen"]]
        (card,) = listed("explain", "a.png", "--model", f"net.py:{function}", "--out", "maps")
        assert chosen == card["layer"]


def test_layers_in_columns_for_a_reader(here):
    result = command("layers", "a.png", "--model", "net.py:pair")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "layer  class   output",
        "0      Conv2d  3 x 6 x 8",
        "1      ReLU    3 x 6 x 8",
        "2      Conv2d  5 x 2 x 3",
        "3      ReLU    5 x 2 x 3  <- the default layer: last layer on a grid",
    ]


DEEP = """
from torch import nn

def block():
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

def load():
    stages = nn.Sequential(*[nn.Sequential(block(), block()) for _ in range(6)])
    return nn.Sequential(nn.Conv2d(3, 4, 3), stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
"""


def test_the_twenty_layers_that_lie_in_the_fewest_modules_are_listed_and_of_these_the_last(here):
    """One convolution, a list of 6 stages, 12 blocks, and 24 layers in them."""
    (here / "deep.py").write_text(DEEP)
    result = command("layers", "--model", "deep.py:load", "--json")
    names = [json.loads(line)["layer"] for line in result.stdout.splitlines()]
    # Nothing is as outermost as 0 and 1, then come all stages and all blocks; 12 + 6 + 2 are twenty.
    assert sorted(names) == sorted(["0", "1", *(f"1.{i}" for i in range(6)), *(f"1.{i}.{j}" for i in range(6) for j in (0, 1))])
    assert result.stderr == "note: 24 layers are left out, which lie deeper or run earlier: --all lists them\n"
    every = command("layers", "--model", "deep.py:load", "--json", "--all")
    assert (len(every.stdout.splitlines()), every.stderr) == (44, "")
    order = [json.loads(line)["layer"] for line in every.stdout.splitlines()]
    assert names == [name for name in order if name in names]  # in the order of execution


def test_the_last_of_layers_of_one_depth_are_listed_and_the_chosen_one_always():
    layers = [layer_table.Candidate(f"a.{i}", "ReLU", (1, 2, 3, 3), (3, 3), i == 1, "") for i in range(30)]
    layers.append(layer_table.Candidate("a", "Sequential", (1, 2, 3, 3), (3, 3), False, ""))
    assert [layer.name for layer in layer_table.useful(layers)] == ["a.1", *(f"a.{i}" for i in range(12, 30)), "a"]


def test_a_reason_is_shown_where_a_layer_is_left_out_for_one(here):
    (here / "dense.py").write_text(
        "from torch import nn\n"
        "def load(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 7, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    _, first, last = command("layers", "--model", "dense.py:load").stdout.splitlines()
    assert first.endswith("  <- the default layer: last layer on a grid")
    assert last.endswith("  it is an output, with a channel for each class")


def test_without_a_picture_the_network_is_shown_noise_of_224(here):
    shapes = {row["layer"]: row["shape"] for row in listed("layers", "--model", "net.py:plain")}
    assert shapes["0"] == [3, 224, 224]
    assert shapes["2"] == [5, 111, 111]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "net.py:headless"], r"no layer of Sequential has 2 spatial axes of more than one position"),
        (["none.png", "--model", "net.py:pair"], r"there is no file 'none\.png'"),
        ([".", "--model", "net.py:pair"], r"'\.' is a folder, not a picture"),
        (["--model", "net.py:flat"], r"the model, on an input of shape \(1, 3, 224, 224\), failed: RuntimeError"),
        (["--model", "net.py:nothing"], r"the file has no function 'nothing'"),
        (["--model", "net.py:pair", "--device", "gpu"], r"--device 'gpu' is not a device of torch"),
    ],
)
def test_what_layers_cannot_do_is_one_sentence(here, arguments, words):
    result = command("layers", *arguments)
    (sentence,) = result.stderr.splitlines()
    assert re.match(f"Error: .*{words}", sentence), sentence
    assert (result.exit_code, result.stdout) == (2, "")


# --------------------------------------------------------------------------------------------------------- methods


PASSED = []
"""How many inputs went through, forward by forward. A global: camfn runs a copy of the model and of what its hooks hold."""


class Turned(nn.Module):
    def forward(self, x):
        return x.mT


class Means(nn.Module):
    def forward(self, x):
        return x.mean(-1)


@pytest.mark.parametrize("method", camfn.METHODS)
def test_the_cost_that_is_told_is_what_really_goes_through_the_network(method, monkeypatch):
    """Beside the few forwards by which each call finds out how the model may be run."""
    monkeypatch.setattr(camfn.sweep.runner, "_WORTH", 10**6)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    if "attention" in camfn.METHODS[method].needs:
        blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2, enable_nested_tensor=False)
        model = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(2), Turned(), blocks, Turned(), Means())
    model[0].register_forward_pre_hook(lambda module, inputs: PASSED.append(len(inputs[0])))
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    given = {"fc": "3"} if method == "cam" else {}
    layer = "0" if camfn.METHODS[method].of_layer else None
    PASSED.clear()
    card = camfn.explain(model, layer, x, method=method, **given)
    forwards, *others = str(camfn.METHODS[method].cost).split(", ")
    of = {kind: amount for amount, _, kind in (part.rpartition(" ") for part in others)}
    assert set(of) <= {"backward", "head"}
    assert counted(forwards) == card.forwards
    assert 0 <= sum(PASSED) - card.forwards <= 5
    assert (counted(of.get("backward", "0")), counted(of.get("head", "0"))) == (card.backwards, card.heads)


def counted(amount: str) -> int:
    assert re.fullmatch(r"(\d+ x )?((\d+|channels|positions) \+ )?(\d+|channels|positions)", amount)
    return eval(amount.replace("x", "*"), {"channels": 32, "positions": 36})


def test_methods_lists_every_method_with_needs_cost_and_first_line():
    found = listed("methods")
    assert [row["method"] for row in found] == list(camfn.METHODS)
    for row, (name, method) in zip(found, camfn.METHODS.items()):
        assert row["needs"] == sorted(method.needs)
        options = inspect.signature(method.function).parameters
        swept = "masked inputs" in row["needs"] or any(word in row["cost"] for word in ("channels", "positions"))
        assert swept == row["chunk"] == ("sweep" in options)
        assert ("linear head" in row["needs"]) == ("fc" in options)
        assert row["seed"] <= ("seed" in options)
        assert row["cost"] == str(method.cost)
        assert getattr(camfn, name).__doc__.startswith(row["summary"] + "\n\n")


def test_methods_in_columns_for_a_reader():
    head, *rows = command("methods").stdout.splitlines()
    assert head.split() == ["method", "needs", "forwards", "summary"]
    for name, row in zip(camfn.METHODS, rows, strict=True):
        assert row.startswith(name + " ")
        needs, cost = row[head.index("needs") : head.index("forwards")], row[head.index("forwards") : head.index("summary")]
        assert needs.strip().split(", ") == sorted(camfn.METHODS[name].needs)
        assert cost.strip() == str(camfn.METHODS[name].cost)


# ------------------------------------------------------------------------------------------------------------ help

COMMANDS = {name: each.help for name, each in {"": cli.app(), **cli.app().commands}.items()}


def examples(text: str) -> list[str]:
    """The command lines of a help text."""
    return [
        line.strip() for line in inspect.cleandoc(text).partition("Example:")[2].splitlines() if line.startswith("  camfn ")
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_that_runs(here, name):
    shown = command(*filter(None, [name]), "-h")
    assert shown.exit_code == 0
    found = examples(COMMANDS[name])
    assert found, f"camfn {name} -h has no example"
    Path("photos").mkdir()
    picture("a.png").resize((96, 96)).save("photos/photo.jpg")
    if name == "convert":
        assert command(*shlex.split(examples(COMMANDS["run"])[0])[1:]).exit_code == 0
    for line in found:
        assert line in shown.stdout  # not wrapped, not folded into a paragraph
        picture("a.png").resize((96, 96)).save("photo.jpg")
        _, *arguments = shlex.split(line.partition(" < ")[0])
        result = command(*arguments, given=Path("photo.jpg").read_bytes() if " < " in line else None)
        assert result.exit_code == 0, result.output
        assert result.stdout


def test_camfn_alone_shows_its_help():
    alone, asked = command(), command("--help")
    assert alone.output == asked.output
    assert [line.split()[0] for line in asked.output.partition("Commands:")[2].splitlines() if line] == sorted(
        cli.app().commands
    )


def test_the_help_says_that_the_file_is_run_and_what_the_defaults_are():
    text = " ".join(command("explain", "--help").stdout.split())
    for words in (
        "The file is run",
        "Without preprocess, the input is the picture with values from 0 to 1, not resized",
        "The map is laid where it belongs on the photo",
        "Existing files are never overwritten",
        "use the index for a class that is itself called top3",
        "demo a small network that ships with camfn torchvision:NAME[:WEIGHTS]",
        "A method listed by `camfn methods`, or all; repeatable. [default: grad_cam]",
    ):
        assert words in text


def test_the_default_method_is_the_one_that_the_page_says_to_start_with():
    page = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert f"- **To start**: `{catalog.DEFAULT}`." in page


def test_the_default_chunk_that_the_help_tells_is_the_sweeps():
    assert f"Masked inputs per forward. [default: {camfn.sweep.options.CHUNK};" in " ".join(
        command("explain", "-h").stdout.split()
    )

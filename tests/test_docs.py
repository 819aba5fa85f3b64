"""The documents: every block runs, every command, link and name is there, every table and figure is as it was found."""

import random
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import camfn
from camfn import _compat
from tests import tables
from tests.oracles.libraries import torchvision_models
from tests.support import documents
from tests.support.documents import ROOT, blocks

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMES = [str(file.relative_to(ROOT)) for file in DOCUMENTS]

pytestmark = [
    pytest.mark.filterwarnings(rf"ignore:{tables.FLAT}:camfn.CamWarning"),
    pytest.mark.filterwarnings("ignore:layer=None. '.*' was chosen:camfn.CamWarning"),
]
every_document = pytest.mark.parametrize("file", DOCUMENTS, ids=NAMES)


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """What a block draws, sets and writes is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    drawn = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - the ones that the process has
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield tmp_path
    torch.set_rng_state(drawn[0])
    np.random.set_state(drawn[1])  # noqa: NPY002
    random.setstate(drawn[2])
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


# ----------------------------------------------------------------------------------------------------------- blocks


def four_channels(build):
    """A network of torchvision of whose 512 channels at `layer4` all but four are dead, and share one forward: the blocks of
    README.md run as they stand, in seconds."""

    def built(*args, **kwargs):
        model = build(*args, **kwargs)
        with torch.no_grad():
            for module in model.layer4.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.weight[4:] = module.bias[4:] = 0
        return model

    return built


@every_document
def test_every_block_of_python_runs(file, apart, monkeypatch):
    ours = [block for block in blocks(file) if block.language == "python"]
    if any("torchvision" in block.text for block in ours):
        models = torchvision_models()
        monkeypatch.setattr(models, "resnet18", four_channels(models.resnet18))
    torch.manual_seed(0)  # a network drawn at random may be one without a map
    namespace = {"__name__": "__main__"}
    for block in ours:
        if "torch.compile(" in block.text and _compat.can_compile():
            continue
        documents.run(block, namespace)


def test_there_are_blocks_to_run():
    count = {name: sum(block.language == "python" for block in blocks(file)) for name, file in zip(NAMES, DOCUMENTS)}
    assert count["README.md"] > 0
    assert count["docs/gotchas.md"] > 15


@every_document
def test_every_fence_is_seen_and_of_a_known_language(file):
    found, text = blocks(file), file.read_text(encoding="utf-8")
    assert len(re.findall(r"```|~~~", text)) == 2 * len(found), "a fence that is not at the start of a line, or inside a block"
    assert {block.language for block in found} <= {"python", "bash", ""}
    drawings = [block.text for block in found if not block.language]
    assert not any("import " in text or ">>>" in text for text in drawings), "a block of Python without the word python"


# A block that is wrong, and what is said of it: the line of the file is in every one.
WRONG = {
    "an assertion": ("x = 1\nassert x == 2", 5, AssertionError, "^$"),
    "an error": ("x = 1\n\ny = undefined", 6, NameError, "undefined"),
    "inside a function": ("def f():\n    return undefined\n\n\nf()", 5, NameError, "undefined"),
    "a shape": (
        "import torch\nx = torch.zeros(2, 3)  # (2, 4): so it says",
        5,
        AssertionError,
        r"page.md:5: the comment says \(2, 4\)",
    ),
    "output": (">>> 1 + 1\n3", 4, AssertionError, r'(?s)File ".*page.md", line 4.*Expected:\s*3\s*Got:\s*2'),
    "a later output": (">>> a = 1\n>>> a\n2", 5, AssertionError, r'(?s)File ".*page.md", line 5.*Expected:\s*2\s*Got:\s*1'),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_line_fails_with_the_line_of_the_file(kind, apart):
    text, line, error, words = WRONG[kind]
    page = apart / "page.md"
    page.write_text(f"# Title\n\n```python\n{text}\n```\n")
    (block,) = blocks(page)
    with pytest.raises(error, match=words) as caught:
        documents.run(block, {})
    where = [entry.lineno + 1 for entry in caught.traceback if str(entry.path) == str(page)]
    assert not where or where[-1] == line
    assert where or f"page.md:{line}" in str(caught.value) or f'page.md", line {line}' in str(caught.value)


def test_a_wrong_syntax_fails_with_the_line_of_the_file(apart):
    page = apart / "page.md"
    page.write_text("```python\nx = 1\nx = = 2\n```\n")
    with pytest.raises(SyntaxError, match="invalid syntax") as caught:
        documents.run(blocks(page)[0], {})
    assert (caught.value.filename, caught.value.lineno) == (str(page), 3)


def test_blocks_share_their_names_and_write_where_they_run(apart):
    page = apart / "page.md"
    first, second, third = "x = 1", "    open('left', 'w').close()", ">>> x\n1\n>>> x = 2"
    page.write_text(f"```python\n{first}\n```\n\n    ```python\n{second}\n    ```\n\n~~~python\n{third}\n~~~\n")
    namespace = {}
    for block in blocks(page):
        documents.run(block, namespace)
    assert namespace["x"] == 2
    assert (apart / "left").exists()


def test_a_fence_that_is_not_closed_is_an_error(apart):
    (apart / "page.md").write_text("```python\nx = 1\n```\n\n```python\nx = 2\n")
    with pytest.raises(AssertionError, match=r"page\.md: the last fence is not closed"):
        blocks(apart / "page.md")


# ---------------------------------------------------------------------------------------------------------- commands


@every_document
def test_every_command_names_what_is_there(file):
    pytest.importorskip("click")
    for where, words in documents.commands(file):
        documents.check_command(where, words)


def test_there_are_commands_to_check():
    found = {" ".join(words[:2]) for file in DOCUMENTS for _, words in documents.commands(file)}
    assert {".venv/bin/camfn demo", "camfn explain", ".venv/bin/pip install", "python benchmarks/score_cam.py"} <= found


UNKNOWN = {
    "camfn explain a.png --modle m.py:f": "--modle",
    "camfn explain a.png": "--model",
    "camfn explian a.png --model m.py:f": "explian",
    ".venv/bin/camfn explain a.png --model m.py:f --layers x": "--layers",
    "python examples/shaped.py a.png": "there is no examples/shaped.py",
    ".venv/bin/python -m pytest tests/test_nothing.py": "there is no tests/test_nothing.py",
    "pip install -c constraint.txt '.[cli]'": "there is no constraint.txt",
    "pip install -e '.[clii]'": "no extra 'clii'",
    "python benchmarks/score_cam.py --sizes 64": "benchmarks/score_cam.py has no --sizes",
    "camfn explain a.png --model examples/shaped.py:model": "there is no examples/shaped.py",
    ".ci/runs": "there is no .ci/runs",
}


@pytest.mark.parametrize("command", UNKNOWN)
def test_a_command_that_names_what_is_not_there_is_found(command, apart):
    pytest.importorskip("click")
    (apart / "page.md").write_text(f"```bash\npython -m venv .venv && \\\n  {command}\n```\n")
    first, second = documents.commands(apart / "page.md")
    documents.check_command(*first)
    with pytest.raises(AssertionError, match="page.md:2: .*" + re.escape(UNKNOWN[command])):
        documents.check_command(*second)


# ----------------------------------------------------------------------------------------------------- links and names


@every_document
def test_every_link_leads_somewhere(file):
    assert documents.missing_links(file) == []


@every_document
def test_every_path_and_name_is_there(file):
    assert documents.missing_names(file) == []


def test_links_and_names_that_are_not_there_are_found(apart):
    page = apart / "page.md"
    page.write_text(
        "# A *b* c\n\n[one](page.md) [two](pages.md) [three](#a-b-c) [four](#a-c) [five](page.md#d) [six](https://a.b/c)\n"
        "`camfn.maps.normalize` `camfn.testing` `camfn.normalise(x)` `camfn.maps.no` `README.md` `docs/no.md` `no/` `tests/`\n"
    )
    assert documents.missing_links(page) == ["pages.md", "#a-c", "page.md#d"]
    assert documents.missing_names(page) == ["docs/no.md", "no/", "camfn.normalise", "camfn.maps.no"]


# ------------------------------------------------------------------------------------------------------------ tables


def made(name: str, page: Path = tables.METHODS) -> str:
    block = tables.block_of(page.read_text(encoding="utf-8"), name)
    assert block is not None, (
        f"{page.name} has no lines <!-- {name} --> and <!-- /{name} -->: python tests/tables.py prints what goes there"
    )
    return block


def test_the_names_of_the_methods_are_those_of_the_code():
    assert made("methods", tables.README) == tables.names(), "python tests/tables.py --write"


@pytest.mark.parametrize("family", tables.FAMILIES)
def test_the_tables_of_methods_are_those_of_the_code(family):
    assert made(family) == tables.methods(family), "python tests/tables.py --write"


def test_the_methods_of_the_command_line_are_those_of_the_code():
    assert tables.CATALOG.read_text(encoding="utf-8") == tables.catalog(), "python tests/tables.py --catalog"


def test_every_method_is_of_one_family():
    families = {name: tables.family(name) for name in tables.FAMILIES}
    assert sorted(method for kin in families.values() for method in kin) == sorted(camfn.METHODS)
    assert families["activation"][0] == "cam"
    assert {"grad_cam", "full_grad"} <= set(families["gradient"])
    assert "ablation_cam" in families["head"]
    assert {"group_cam", "rise"} <= set(families["masked"])  # one of them has a gradient too
    assert len(families["attention"]) == 4


COMPOSITIONS = [name for name in camfn.__all__ if getattr(getattr(camfn, name), "__module__", "").startswith("camfn.compose")]


def test_of_every_method_it_is_said_when_to_use_it():
    """Below the table of its family, in its order; and of every function that makes methods of methods."""
    heads = {said: tables.family(name) for name, (_, said) in tables.FAMILIES.items()}
    heads |= {"Methods made of methods": COMPOSITIONS, "Concepts": ["factorize"]}
    found = dict(re.findall(r"^## (.*)\n((?:(?!^## ).*\n)*)", tables.METHODS.read_text(encoding="utf-8"), re.MULTILINE))
    for head, names in heads.items():
        assert sorted(re.findall(r"^- `(\w+)`: ", found[head], re.MULTILINE)) == sorted(names), head
        assert [name for name in re.findall(r"^\| `(\w+)`", found[head], re.MULTILINE) if name not in names] == [], head


def test_the_changelog_names_every_method():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [name for name in (*camfn.METHODS, *COMPOSITIONS, "factorize") if f"`{name}`" not in text] == []


def test_the_tables_of_speed_and_budgets_are_those_of_the_records():
    assert made("speed", tables.README) == tables.speed(), "python tests/tables.py --write"
    assert made("budget", tables.BUDGETS) == tables.budgets(), "python tests/tables.py --write"
    assert made("precision", tables.BUDGETS) == tables.precisions(), "python tests/tables.py --write"  # none without a record


def test_the_table_of_what_works_has_every_method_and_use():
    cells = tables.cells_of(made("works"))
    assert list(cells) == list(camfn.METHODS)
    assert {tuple(row) for row in cells.values()} == {tuple(tables.COLUMNS)}
    assert {cell for row in cells.values() for cell in row.values()} <= {tables.WORKS, tables.REFUSED, tables.FAILS}
    assert made("works") == tables.works(cells), "python tests/tables.py --write"


USES = [(method, column) for column in tables.COLUMNS for method in camfn.METHODS]
TRIED = [use for use in USES if not tables.asked_anyway(*use) or use[0] in ("mean_cam", "legrad")]


def test_what_is_not_tried_here_works_and_is_a_test_of_its_own():
    """Where the table says that it works, a test that fails elsewhere says that it does not."""
    cells = tables.cells_of(made("works"))
    assert {cells[method][column] for method, column in {*USES} - {*TRIED}} == {tables.WORKS}
    assert {column for _, column in {*USES} - {*TRIED}} == set(tables.ASKED)


@pytest.mark.parametrize(("method", "column"), TRIED)
def test_the_table_of_what_works_is_true(method, column):
    said = tables.cells_of(made("works"))[method][column]
    if said == tables.WORKS:
        tables.check_of(method, column)(method)  # not `tried`: where it fails, it says how
    else:
        assert tables.tried(method, column) == said


def test_a_cell_is_what_came_of_trying(monkeypatch, capsys):
    def fails(method):
        raise ValueError("no such luck")

    def refuses(method):
        raise camfn.CamError("cam explains one layer")

    def skips(method):
        pytest.skip("no compiler")

    for check, cell in ((fails, "✗"), (refuses, "-"), (skips, "?"), (lambda method: None, "✓")):
        monkeypatch.setitem(tables.COLUMNS, "several layers", check)
        assert tables.tried("cam", "several layers") == cell
    assert "cam, several layers: ValueError('no such luck')" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- figures

SCORE_CAM = "score_cam.json"
FIGURES = {  # a sentence, with {} where its figure stands: the record, and the keys to the value
    "README.md": {
        "images of {} px": (SCORE_CAM, "arguments/size"),
        "their maps are torchcam's to {} ": (SCORE_CAM, "contenders/camfn-compiled/largest_difference/from_peer"),
        "give or take a cell, in {} %": ("demo.json", "maps/score_cam/hits"),
        "with random weights in {} %": ("demo.json", "maps/score_cam, untrained network/hits"),
        "the middle of the picture in {} %": ("demo.json", "maps/middle of the picture/hits"),
        "a random map in {} %": ("demo.json", "maps/random numbers/hits"),
    },
    "docs/design.md": {"takes 2 to {} ms for a ResNet-50": ("capture.json", "milliseconds/resnet50/private_copy")},
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_stands_in_a_record(name):
    left = documents.figures(ROOT / name)
    text = " ".join(documents.prose(ROOT / name).split())
    for sentence, place in FIGURES[name].items():
        before, after = map(re.escape, sentence.split("{}"))
        found = re.findall(rf"{before}(\d[\d.e-]*){after}", text)
        assert len(found) == 1, f"{name} says {len(found)} times {sentence!r}"
        value = documents.recorded(*place)
        assert documents.agrees(found[0], value), f"{name} says {found[0]}, {place[0]} has {value} at {place[1]}"
        if found[0] in left:
            left.remove(found[0])
    assert left == [], f"{name} has figures of which FIGURES does not say which record has them"


def test_figures_are_told_from_versions_and_settings(apart):
    text = """
        Took 1.5 of the time, 3 % more, 20 ms, and 2e-6 off: 12 times as much. See `0.3` and [that](a-1.2.md), from
        torch 2.0.1 and Python 3.10 on, for ResNet-18 at 224 px on 2 cores. And 7.25.
        """
    (apart / "page.md").write_text(textwrap.dedent(text))
    assert documents.figures(apart / "page.md") == ["1.5", "3", "20", "2e-6", "12", "7.25"]


def test_a_figure_agrees_to_its_last_digit():
    assert documents.agrees("1.01", 1.0071)
    assert documents.agrees("2e-6", 1.43e-6)
    assert not documents.agrees("1.01", 1.0304)
    assert not documents.agrees("2e-6", 3.5e-6)

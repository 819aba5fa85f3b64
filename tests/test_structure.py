"""The package's shape: public names, arrows between files, a light import."""

import ast
import importlib
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import camfn

PACKAGE = Path(camfn.__file__).parent
METHODS_PAGE = PACKAGE.parent / "docs" / "methods.md"

ROOMS = {
    "": ("_version", "_errors", "_types", "_compat", "_paths", "_specs", "_axes"),
    "formulas": (
        *("probabilities", "scaling", "resampling", "components", "factorization", "masks", "noise", "maps", "weights"),
        *("attention", "diagnostics"),
    ),
    "targets": ("outputs", "scores", "algebra", "classes", "dense", "embeddings", "detections"),
    ".layouts": ("layouts",),
    "model": (
        *("memory", "randomness", "guard", "private_copy", "restore", "prepare", "torch_errors", "ports", "capture"),
        *("inputs", "agreement", "tape", "recording", "attention", "linear_head", "entrance", "positions", "task", "layers"),
        *("graph_ends", "gradients", "forward", "head", "deeplift"),
    ),
    "sweep": (
        *("options", "folding", "runner", "kernel", "scoring", "changes", "gaussian_process", "search", "low_precision"),
        "budget",
    ),
    "methods": (
        *("registry", "_common", "activation", "gradient", "elementwise", "averaged", "full_grad", "eigen", "ablation"),
        *("score_cam", "group_cam", "poly_cam", "opti_cam", "rise", "attention", "custom"),
    ),
    "compose": ("_common", "averages", "multi_scale", "ensembles"),
    ".beside": ("concepts",),
    "testing": ("closeness", "threads", "unchanged", "strategies", "changes", "laws", "checking"),
    ".public": ("weights", "maps"),
    "metrics": (
        *("scoring", "imputation", "faithfulness", "confidence"),
        *("pixels", "localization", "boxes", "complexity", "similarity", "sensitivity", "grids", "removal", "robustness"),
        *("states", "randomization", "controls"),
    ),
    "images": ("colors", "pictures", "preprocessing", "reading", "turns", "seen", "views", "observing", "overlays"),
    ".pictures": ("figures",),
    "explanation": ("fields", "text", "pictures", "html", "files", "card", "check", "explain"),
    "demo": ("scenes", "network"),
    ".train": ("demo.train",),
    "zoo": ("checkpoints", "downloads", "libraries", "specs", "networks"),
    "runs": (
        *("rows", "shards", "manifest", "sources", "lock", "decoding", "job", "making", "worker", "progress", "local"),
        *("on_ray", "run", "reading", "converting"),
    ),
    "evaluation": ("statistics", "judged", "measures", "drawing", "result", "evaluate", "annotations", "stored"),
    ".names": ("_public",),
    "cli": (
        *("signals", "streams", "catalog", "options", "tables", "files", "page", "drawing", "models", "cards", "job"),
        *("facts", "explain", "layers", "demo", "run", "evaluate"),
    ),
    ".main": ("__main__",),
}
"""The rooms, from the ground up, and the files of each. A file imports from those before it, and from no other.

Files of a room whose name begins with a dot lie beside the folders."""


def _order() -> tuple[str, ...]:
    order = []
    for room, files in ROOMS.items():
        folder = bool(room) and not room.startswith(".")
        order += [f"{room}.{file}" if folder else file for file in files]
        order += [room] if folder else []  # its `__init__.py`
    return tuple(order)


ORDER = _order()


def name_of(path: Path) -> str:
    """As an import has it, less `camfn.`"""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> set[str]:
    """The files of the package that a file imports from, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import, which is not followed here"
            found |= {_file_of(f"{node.module}.{alias.name}") for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {_file_of(alias.name) for alias in node.names}
    return found - {None}


def _file_of(dotted: str) -> str | None:
    """`camfn.demo.scenes.scene` is of `demo.scenes`, `camfn.demo.scene` of `demo`; `camfn.explain` is the public face."""
    package, _, name = dotted.partition(".")
    while package == "camfn" and name:
        if name in ORDER:
            return name
        name = name.rpartition(".")[0]
    return None


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem != "__init__"}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    assert name in ORDER, f"{name} is new: give it its place"
    later = [other for other in imported(FILES[name]) if ORDER.index(other) >= ORDER.index(name)]
    assert not later, f"{name} imports {later}, which come after it"


def test_the_order_names_files_that_are_there():
    assert set(ORDER) == set(FILES)
    assert len(ORDER) == len(FILES)


def test_the_arrow_test_sees_imports():
    assert {"model.private_copy", "_errors", "_types"} <= imported(PACKAGE / "model" / "capture.py")
    assert {"cli.files", "cli.options", "cli.cards", "explanation"} <= imported(PACKAGE / "cli" / "explain.py")
    assert {"demo", "cli.files"} <= imported(PACKAGE / "cli" / "demo.py")
    assert "cli" not in imported(PACKAGE / "cli" / "explain.py")


def test_public_names():
    public = vars(importlib.import_module("camfn._public"))
    visible = {name for name, value in public.items() if not name.startswith("_") and not isinstance(value, ModuleType)}
    assert visible - {"open"} <= set(camfn.__all__), "open is none: a star import would hide Python's"
    assert "open" not in camfn.__all__
    assert dir(camfn) == sorted(["__version__", "open", *camfn.__all__])
    assert set(camfn.__all__) - visible == {"figures", "images", "layouts", "maps", "metrics", "targets", "weights"}
    assert list(camfn.__all__) == sorted(camfn.__all__, key=lambda name: (not name.isupper(), name.lower() == name, name))


def test_public_names_are_documented():
    for name in set(camfn.__all__) - {"METHODS", "RECIPES"}:
        assert getattr(camfn, name).__doc__, name
    for name, method in camfn.METHODS.items():
        assert ">>>" in method.function.__doc__, f"{name} needs an example that runs"
        assert re.search(r"\((arXiv|doi)\s", method.function.__doc__), f"{name} needs its source"


@pytest.mark.parametrize("name", camfn.METHODS)
def test_the_formula_of_a_method_is_in_formulas(name):
    formula = camfn.METHODS[name].formula
    assert formula.__module__.startswith("camfn.formulas.")
    assert formula.__name__ == name
    assert formula.__doc__
    (row,) = [
        line for line in METHODS_PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |") and "[formula]" in line
    ]
    assert f"(../{formula.__module__.replace('.', '/')}.py)" in row


ARITHMETIC = ("einsum", "matmul", "softmax", "sqrt", "exp", "tanh", "sigmoid", "mean", "std", "amax", "amin")
"""Of these a method calls none, but for the few in `COMPOSED`."""
COMPOSED = {
    "averaged": {"amax"},  # one scale for the gradients of all sizes
    "opti_cam": {"softmax"},  # the weights whose score is climbed
}


@pytest.mark.parametrize("name", [path.stem for path in sorted((PACKAGE / "methods").glob("[a-z]*.py"))])
def test_methods_compute_nothing(name):
    tree = ast.parse((PACKAGE / "methods" / f"{name}.py").read_text())
    called = {node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
    assert called & {*ARITHMETIC} == COMPOSED.get(name, set())


TORCHS = {"_scaled_dot_product"}  # torch names its arguments
MOST = 6


@pytest.mark.parametrize("name", FILES)
def test_no_function_takes_many_positional_parameters(name):
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.FunctionDef) and node.name not in TORCHS:
            given = [*node.args.posonlyargs, *node.args.args]
            given = given[1:] if given and given[0].arg in ("self", "cls") else given
            assert len(given) <= MOST, f"{name}.{node.name} takes {len(given)}"


LIGHT = "import sys, camfn; {use}; print(' '.join(m for m in {heavy} if m in sys.modules))"
HEAVY = ["matplotlib", "PIL", "torchvision", "timm", "hypothesis", "click", "cv2", "sklearn", "torch._dynamo"]


def loaded(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_import_is_light():
    assert loaded(LIGHT.format(use="camfn.METHODS", heavy=HEAVY)) == []
    assert loaded(LIGHT.format(use="import hypothesis", heavy=HEAVY)) == ["hypothesis"], "the check can fail"


def test_torch_is_loaded_on_the_first_use_of_a_name():
    heavy = ["torch", "numpy"]
    assert loaded(LIGHT.format(use="camfn.__version__", heavy=heavy)) == []
    for use in ("camfn.grad_cam", "camfn.weights", "dir(camfn)", "from camfn import *"):
        assert "torch" in loaded(LIGHT.format(use=use, heavy=heavy)), use


def test_names_are_those_of_the_files_where_they_are_defined():
    assert camfn.grad_cam is importlib.import_module("camfn.methods.gradient").grad_cam
    assert pickle.loads(pickle.dumps(camfn.grad_cam)) is camfn.grad_cam
    everything: dict[str, object] = {}
    exec("from camfn import *", everything)
    assert {name: everything[name] for name in camfn.__all__} == {name: getattr(camfn, name) for name in camfn.__all__}


@pytest.mark.parametrize("name", ["grad_cm", "_public_", "__wrapped__"])
def test_a_name_that_camfn_does_not_have_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"^module 'camfn' has no attribute {name!r}$"):
        getattr(camfn, name)
    with pytest.raises(ImportError, match=f"cannot import name {name!r} from 'camfn'"):
        exec(f"from camfn import {name}")


FIRST_USE = """
import threading, camfn
names = ["grad_cam", "weights", "explain", "images", "METHODS", "figures", "Sweep", "sweep"]
start, found = threading.Barrier(len(names)), []
def use(name):
    start.wait()
    found.append(getattr(camfn, name))
threads = [threading.Thread(target=use, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found))
"""


def test_threads_may_be_the_first_to_use_names():
    assert loaded(FIRST_USE) == ["8"]


def test_version_is_one():
    metadata = pytest.importorskip("importlib.metadata")
    assert metadata.version("camfn") == camfn.__version__


# ---------------------------------------------------------------------------------------------------------- the tests

TESTS = Path(__file__).parent
TRIED = "tables.py"
"""The script that makes the table of what works: a cell is what came of a test."""


def modules_of(text: str) -> set[str]:
    """All modules that a text imports from, at the top or inside a function, and all that it may import by name."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def of_tests(modules: set[str]) -> list[str]:
    return sorted(name for name in modules if any(part.startswith("test_") for part in name.split(".")))


def test_nothing_but_the_table_of_what_works_imports_a_test_module():
    assert of_tests(modules_of((TESTS / TRIED).read_text(encoding="utf-8"))), "the check can fail"
    for path in sorted(TESTS.rglob("*.py")):
        if path.name != TRIED:
            assert of_tests(modules_of(path.read_text(encoding="utf-8"))) == [], path


def test_folders_of_tests_are_rooms():
    """Beside them are the fuzzer, the laws, the oracles, and what tests of documents and of the command line share."""
    folders = {path.parent.name for path in TESTS.glob("*/__init__.py")}
    assert folders - {"fuzz", "laws", "oracles", "support"} <= {room for room in ROOMS if room and not room.startswith(".")}

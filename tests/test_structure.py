"""The package's shape: public names, arrows between files, a light import."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import camfn

PACKAGE = Path(camfn.__file__).parent

ORDER = (
    *("_errors", "_types", "_compat", "draws", "shell", "capture", "keep", "heads", "maps", "layouts", "targets"),
    *(
        "layers",
        "weights",
        "masks",
        "subject",
        "scoring",
        "methods",
        "explanation",
        "testing",
        "images",
        "zoo",
        "cli",
        "__main__",
    ),
)
"""Every file may import from those before it, and from no other."""


def imported(path: Path) -> set[str]:
    """The files of the package that a file imports from, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "camfn":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("camfn."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("camfn.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_one_way(path):
    if path.stem == "__init__":
        return
    assert path.stem in ORDER, f"{path.name} is new: give it its place"
    names = imported(path) & set(ORDER)
    if path.stem in ("cli", "testing", "__main__"):
        names -= set(ORDER)  # they stand at the top and use the public face
    later = [name for name in names if ORDER.index(name) >= ORDER.index(path.stem)]
    assert not later, f"{path.stem} imports {later}, which come after it"


def test_the_arrow_test_sees_imports():
    assert {"shell", "_errors", "_types"} <= imported(PACKAGE / "capture.py")


def test_public_names():
    visible = {name for name, value in vars(camfn).items() if not name.startswith("_") and not isinstance(value, ModuleType)}
    assert visible <= set(camfn.__all__)
    assert set(camfn.__all__) - visible == {"layouts", "maps", "targets", "weights"}
    assert list(camfn.__all__) == sorted(camfn.__all__, key=lambda name: (not name.isupper(), name.lower() == name, name))


def test_public_names_are_documented():
    for name in set(camfn.__all__) - {"METHODS", "RECIPES"}:
        assert getattr(camfn, name).__doc__, name
    for name, method in camfn.METHODS.items():
        assert ">>>" in method.function.__doc__, f"{name} needs an example that runs"
        assert "arXiv" in method.function.__doc__, f"{name} needs its source"


LIGHT = "import sys, camfn; print(' '.join(m for m in {heavy} if m in sys.modules))"
HEAVY = ["matplotlib", "PIL", "torchvision", "timm", "hypothesis", "click", "cv2", "sklearn", "torch._dynamo"]


def loaded(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_import_is_light():
    assert loaded(LIGHT.format(heavy=HEAVY)) == []
    assert loaded("import hypothesis; " + LIGHT.format(heavy=HEAVY)) == ["hypothesis"], "the check can fail"


def test_version_is_one():
    metadata = pytest.importorskip("importlib.metadata")
    assert metadata.version("camfn") == camfn.__version__

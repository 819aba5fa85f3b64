"""The page of what works on which architecture has all of both, and says what comes of trying."""

import re

import pytest

import camfn
from tests import compatibility
from tests.oracles.architectures import ARCHITECTURES
from tests.oracles.libraries import torchvision_models

TEXT = compatibility.PAGE.read_text(encoding="utf-8")


def told() -> dict[str, compatibility.Row]:
    """The rows of the page."""
    columns = {mark: re.findall(r"`(\w+)`", methods) for mark, methods in re.findall(r"^- ([A-Z]): (.*)$", TEXT, re.MULTILINE)}
    head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if line.startswith("|")]
    rows = {}
    for name, layer, grid, *marks in (line for line in lines if len(line) > 3):
        cells = {method: mark for column, mark in zip(head[3:], marks) for method in columns[column]}
        rows[name] = compatibility.Row(layer.strip("`"), grid, cells)
    return rows


def test_every_architecture_has_a_row():
    assert list(told()) == list(ARCHITECTURES)
    assert len(ARCHITECTURES) >= 50


def test_every_method_has_a_column():
    """A new one has none, until the page is made anew."""
    for name, row in told().items():
        assert set(row.cells) == set(camfn.METHODS), name


def test_every_mark_is_explained():
    marks = {mark for row in told().values() for mark in row.cells.values()}
    explained = set(re.findall(r"^- ([a-z]): ", TEXT, re.MULTILINE))
    assert marks == explained | {compatibility.MAP}


CHEAP = ("torchvision ShuffleNetV2", "timm ViT, registers, mean", "transformers Swin", "torch ResNet (1-D)")


@pytest.mark.parametrize("name", CHEAP)
def test_what_the_page_says_comes_of_trying(name):
    torchvision_models()
    for library in compatibility.LIBRARIES[2:]:
        pytest.importorskip(library)
    library = name.split()[0]
    if f"{library} {compatibility._version(library)}" not in TEXT:
        pytest.skip("the page was made with another version of the library")
    assert compatibility.tried(name) == told()[name]


@pytest.mark.parametrize("kind", ["ResNet", "MobileNetV2", "ConvNeXt", "DenseNet", "DeiT"])
def test_an_embedding_network_gets_the_layer_of_its_classifier(kind):
    pytest.importorskip("timm")
    first, second = compatibility.with_and_without_classifier(kind)
    assert first == second != []


@pytest.mark.parametrize("name", compatibility.YOLO)
def test_a_detector_of_ultralytics_gets_the_last_stage_of_its_neck(name):
    torchvision_models()
    pytest.importorskip("ultralytics")
    assert compatibility.chosen(compatibility.yolo(name), 128) == [compatibility.YOLO[name]]


def test_the_page_is_that_of_its_rows():
    assert compatibility.page(told()) == TEXT


@pytest.mark.parametrize(
    "fault", ["another error", "another refusal", "a warning", "not finite", "one position", "no gradient", "flat"]
)
def test_a_fault_is_no_mark(fault, monkeypatch):
    """What the script must not take for a map or a refusal."""
    real = camfn.explain

    def explain(*args, **options):
        card = real(*args, **options)
        if fault == "another error":
            raise RuntimeError("sizes do not match")
        if fault == "another refusal":
            raise camfn.CamError("x is empty")
        if fault == "a warning":
            compatibility.warnings.warn("batching rule", stacklevel=1)
        told = {"no gradient": "no gradient", "flat": "flat map"}.get(fault)
        findings = (camfn.formulas.diagnostics.Finding(told, "2", 1.0, "of it"),) if told else ()
        maps = card.maps / 0 if fault == "not finite" else card.maps
        return card._replace(maps=maps, findings=findings, grids=((1,),) if fault == "one position" else card.grids)

    monkeypatch.setattr(camfn, "explain", explain)
    with pytest.raises(compatibility.FaultError, match=r"torch ResNet \(1-D\), mean_cam"):
        compatibility.tried("torch ResNet (1-D)", ["mean_cam"])

"""Models by name: each library's own weights, preprocessing and class names, and each refusal in one sentence."""

import importlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from socket import gaierror
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from camfn import CamError, demo, zoo
from tests.oracles.libraries import torchvision_models

PICTURE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (90, 120, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def quiet_and_without_a_trace(tmp_path, monkeypatch, capfd):
    """Nothing is printed, the random state stays, and no library looks into a cache of this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "0")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = model.eval()(x)
    return getattr(y, "logits", y)


def seeded(make, seed: int = 7) -> nn.Module:
    """A model with weights that no seed of ours gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor).abs() * 0.01)
    return model.eval()


def assert_same(loaded: zoo.Loaded, model: nn.Module, x: torch.Tensor) -> None:
    """The picture becomes `x`, and the outputs are those of the model."""
    assert torch.equal(zoo.input_of(loaded, PICTURE), x)
    assert torch.equal(outputs(loaded.model, x), outputs(model, x))
    assert torch.equal(zoo.outputs_of(loaded, x), outputs(model, x)[0].double())


# ------------------------------------------------------------------------------------------------------ torchvision


@pytest.fixture(scope="module")
def models():
    return torchvision_models()


def test_torchvision_with_a_weight_file(models, tmp_path):
    model = seeded(models.squeezenet1_1)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    kind = models.SqueezeNet1_1_Weights.DEFAULT
    loaded = zoo.load("torchvision:squeezenet1_1", weights=tmp_path / "w.safetensors")
    assert_same(loaded, model, kind.transforms()(PICTURE)[None])
    assert loaded.names == tuple(kind.meta["categories"])
    assert (loaded.names[0], len(loaded.names)) == ("tench", 1000)
    assert (loaded.spec, loaded.file) == ("torchvision:squeezenet1_1", None)


def test_the_weights_that_are_named_say_the_preprocessing(models):
    for wanted, side in (("", 232), (":DEFAULT", 232), (":IMAGENET1K_V2", 232), (":IMAGENET1K_V1", 256)):
        loaded = zoo.load(f"torchvision:mobilenet_v3_large{wanted}", pretrained=False)
        kind = models.MobileNet_V3_Large_Weights[wanted[1:] or "DEFAULT"]
        assert kind.transforms().resize_size == [side]
        assert torch.equal(loaded.preprocess(PICTURE), kind.transforms()(PICTURE))


def published(tensors: dict[str, torch.Tensor], monkeypatch) -> dict[str, list]:
    """Let torch download the tensors, from any address; what it was asked for is told."""
    asked = {"urls": [], "digits": []}

    def download(url, dst, hash_prefix=None, progress=True):
        asked["urls"].append(url)
        asked["digits"].append(hash_prefix)
        torch.save(tensors, dst)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return asked


def test_published_weights_are_downloaded_once_and_checked(models, monkeypatch, tmp_path):
    model, kind = seeded(models.squeezenet1_1), models.SqueezeNet1_1_Weights.DEFAULT
    asked = published(model.state_dict(), monkeypatch)
    for _ in range(2):
        assert_same(zoo.load("torchvision:squeezenet1_1"), model, kind.transforms()(PICTURE)[None])
    assert asked == {"urls": [kind.url], "digits": ["b8a52dc0"]}
    assert [file.name for file in (tmp_path / "torch/hub/checkpoints").iterdir()] == ["squeezenet1_1-b8a52dc0.pth"]


def test_a_published_file_that_would_run_code_is_not_run(models, monkeypatch, tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "written"), "w")

    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, dst, *_, **__: torch.save(Payload(), dst))
    with pytest.raises(CamError, match=r"squeezenet1_1-b8a52dc0\.pth' holds more than tensors \(.*open\)"):
        zoo.load("torchvision:squeezenet1_1")
    assert not (tmp_path / "written").exists()


def test_densenets_old_names_are_torchvisions_to_change(models, monkeypatch):
    model = seeded(models.densenet121)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "num_batches" not in name}  # newer than the file
    old = {re.sub(r"(layer\d+\.norm|layer\d+\.conv)", r"\1.", name): tensor for name, tensor in tensors.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    published(old, monkeypatch)
    x = models.DenseNet121_Weights.DEFAULT.transforms()(PICTURE)[None]
    assert_same(zoo.load("torchvision:densenet121"), model, x)
    assert "get_state_dict" not in vars(models.DenseNet121_Weights)  # which is torchvision's again


@pytest.mark.parametrize("aux", [True, False])
def test_googlenet_is_what_torchvision_makes_of_its_weights(models, monkeypatch, tmp_path, aux):
    model = seeded(lambda: models.googlenet(transform_input=True, aux_logits=aux, init_weights=False))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    x = models.GoogLeNet_Weights.DEFAULT.transforms()(PICTURE)[None]
    loaded = zoo.load("torchvision:googlenet", weights=tmp_path / "w.pth")
    assert_same(loaded, model, x)
    assert loaded.model.aux1 is None


@pytest.mark.filterwarnings("ignore:The default weight initialization of")
def test_every_model_is_constructed_as_with_its_weights(models, monkeypatch):
    """torchvision's own construction is the oracle: with weights, of which no tensor is loaded. The largest are left out."""
    from torchvision.models._api import WeightsEnum

    from camfn.zoo import libraries

    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
    for init in [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]:
        monkeypatch.setattr(nn.init, init, lambda tensor, *_, **__: tensor)  # memory that nobody writes to costs nothing
    kinds = [(name, kind) for name in models.list_models(module=models) for kind in models.get_model_weights(name)]
    kinds = [(name, kind) for name, kind in kinds if kind.meta["categories"] and kind.meta["num_params"] < 9e7]
    assert len(kinds) > 80
    with torch.random.fork_rng(devices=[]):
        for name, kind in kinds:
            theirs = models.get_model(name, weights=kind)
            ours = models.get_model(name, weights=None, **libraries._meant(name, kind.meta))
            assert settings(ours) == settings(theirs), kind


def settings(model: nn.Module) -> list:
    """What its modules are, all that is set on them beside modules and tensors, and the shapes of the tensors."""
    simple = (bool, int, float, str, tuple, list)
    found = [(name, type(module).__name__, module.extra_repr()) for name, module in model.named_modules()]
    found += [{key: value for key, value in vars(module).items() if isinstance(value, simple)} for module in model.modules()]
    return found + [(name, tensor.shape) for name, tensor in model.state_dict().items()]


# ------------------------------------------------------------------------------------------------------------- timm


@pytest.fixture(scope="module")
def timm():
    torchvision_models()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("timm")


def timm_folder(timm, name: str = "test_resnet", folder: str = "saved", **config) -> nn.Module:
    """A model in timm's own format, with more in its configuration."""
    model = seeded(lambda: timm.create_model(name, num_classes=config.pop("classes", 3)))
    timm.models.save_for_hf(model, folder, model_config=config, safe_serialization=True)
    return model


def timm_input(timm, model: nn.Module) -> torch.Tensor:
    return timm.data.create_transform(**timm.data.resolve_model_data_config(model))(PICTURE)[None]


@pytest.mark.parametrize("spec", ["timm:saved", "timm:./saved", "timm:local-dir:saved"])
def test_timm_from_a_folder(timm, spec):
    model = timm_folder(timm, label_names=["hen", "dog", "owl"])
    loaded = zoo.load(spec)
    x = timm_input(timm, model)
    assert_same(loaded, model, x)
    assert x.shape == (1, 3, 160, 160)  # as its configuration says
    assert loaded.names == ("hen", "dog", "owl")


TIMM_NAMES = {
    "none": ({}, ()),
    "by index": ({"label_names": {"1": "dog", "0": "hen", "2": "owl"}}, ("hen", "dog", "owl")),
    "too few": ({"label_names": ["hen", "dog"]}, ()),
}


@pytest.mark.parametrize("case", TIMM_NAMES)
def test_timms_names_are_the_models_own_or_none(timm, case):
    config, names = TIMM_NAMES[case]
    timm_folder(timm, **config)
    assert zoo.load("timm:saved").names == names


def test_timms_names_are_imagenets_for_as_many_classes(timm):
    names = zoo.load("timm:test_resnet", pretrained=False).names
    assert names == tuple(timm.data.ImageNetInfo("imagenet-1k").label_descriptions())
    assert (names[0], len(names)) == ("tench, Tinca tinca", 1000)
    own = [f"class {number}" for number in range(1000)]
    timm_folder(timm, classes=1000, label_names=own)
    assert zoo.load("timm:saved").names == tuple(own)


def test_timm_with_a_weight_file(timm, tmp_path):
    model = timm_folder(timm)
    other = seeded(lambda: timm.create_model("test_resnet", num_classes=3), seed=8)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "w.pth")
    assert_same(zoo.load("timm:saved", weights=tmp_path / "w.pth"), other, timm_input(timm, model))


def test_timm_by_name_with_a_weight_file(timm, tmp_path):
    model = seeded(lambda: timm.create_model("test_resnet"))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    for name in ("test_resnet", "test_resnet.r160_in1k"):
        assert_same(zoo.load(f"timm:{name}", weights=tmp_path / "w.safetensors"), model, timm_input(timm, model))


def test_a_folder_does_not_hide_a_model_of_timms(timm, tmp_path):
    (tmp_path / "test_resnet").mkdir()
    assert len(zoo.load("timm:test_resnet", pretrained=False).names) == 1000


def test_files_with_the_authors_names_are_timms_to_change(timm, tmp_path):
    model = seeded(lambda: timm.create_model("test_convnext"))
    back = (
        *((r"^stem\.", "downsample_layers.0."), (r"^(stages\.\d)\.downsample", r"\1"), (r"\.blocks\.", ".")),
        *((r"conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"), (r"^head\.fc\.", "head."), (r"^head\.norm", "norm")),
    )
    old = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^stages\.(\d)\.downsample", r"downsample_layers.\1", name)
        for pattern, words in back:
            name = re.sub(pattern, words, name)
        old[name] = tensor
    assert {"downsample_layers.0.0.weight", "stages.0.0.dwconv.weight", "head.weight", "norm.bias"} <= old.keys()
    torch.save({"model": old}, tmp_path / "w.pth")
    assert_same(zoo.load("timm:test_convnext", weights=tmp_path / "w.pth"), model, timm_input(timm, model))


# ----------------------------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def hf():
    torchvision_models()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("transformers")
        library.utils.logging.disable_progress_bar()  # of the saving in these tests
        library.AutoModelForImageClassification, library.AutoImageProcessor  # noqa: B018 - import what is lazy
    return library


LABELS = ("hen", "dog", "owl")


def hf_folder(hf, folder: str = "saved", labels=LABELS, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, object]:
    """A model and its image processor in transformers' own format."""
    labels = {"id2label": dict(enumerate(labels)), "label2id": {}} if labels else {"num_labels": 3}
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **labels)
    model = seeded(lambda: hf.ResNetForImageClassification(config).to(dtype))
    processor = hf.ConvNextImageProcessor(size={"shortest_edge": 64}, image_mean=[0.4, 0.5, 0.6])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def hf_input(processor) -> torch.Tensor:
    return processor(images=PICTURE, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("name", ["saved", "./saved", "{tmp}/saved"])
def test_transformers_from_a_folder(hf, tmp_path, name):
    model, processor = hf_folder(hf)
    loaded = zoo.load("hf:" + name.format(tmp=tmp_path))
    x = hf_input(processor)
    assert_same(loaded, model, x)
    assert x.shape == (1, 3, 64, 64)
    assert loaded.names == LABELS


def test_names_are_in_the_order_of_their_numbers(hf):
    hf_folder(hf)
    edited("saved/config.json", id2label={"2": "owl", "0": "hen", "1": "dog"})  # files have 10 before 2
    assert zoo.load("hf:saved").names == LABELS


def test_placeholders_are_no_names(hf):
    hf_folder(hf, labels=None)
    assert zoo.load("hf:saved").names == ()


def test_half_precision_from_a_folder_computes_in_single(hf):
    model, processor = hf_folder(hf, dtype=torch.bfloat16)
    assert json.loads(Path("saved/config.json").read_text())["dtype"] == "bfloat16"
    for pretrained in (True, False):
        assert {tensor.dtype for tensor in zoo.load("hf:saved", pretrained=pretrained).model.parameters()} == {torch.float32}
    assert_same(zoo.load("hf:saved"), model.float(), hf_input(processor))


def test_transformers_with_a_weight_file(hf, tmp_path):
    _, processor = hf_folder(hf)
    other = seeded(lambda: hf.AutoModelForImageClassification.from_config(hf.AutoConfig.from_pretrained("saved")), seed=8)
    torch.save(other.state_dict(), tmp_path / "w.pth")
    Path("saved/model.safetensors").unlink()
    assert_same(zoo.load("hf:saved", weights=tmp_path / "w.pth"), other, hf_input(processor))


def test_files_with_published_names_are_transformers_to_change(hf):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = seeded(lambda: hf.ViTForImageClassification(hf.ViTConfig(**size, image_size=32, patch_size=16, num_labels=3)))
    model.save_pretrained("saved")
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("saved")
    file = Path("saved/model.safetensors").rename("w.safetensors")
    x = hf_input(hf.AutoImageProcessor.from_pretrained("saved"))
    assert_same(zoo.load("hf:saved", weights=file), model, x)
    tensors = load_file(file)
    save_file({**tensors, "more": torch.zeros(1)}, file)
    with pytest.raises(CamError, match=r"w\.safetensors' does not fit ViTForImageClassification: "):
        zoo.load("hf:saved", weights=file)


def without(tensors: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def edited(file: str, **changes) -> None:
    path = Path(file)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def own_code() -> None:
    edited("saved/config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    Path("saved/mine.py").write_text("open('written', 'w')\n")


def as_pickle() -> None:
    torch.save(load_file("saved/model.safetensors"), "saved/pytorch_model.bin")
    Path("saved/model.safetensors").unlink()


def other_tensors(change) -> None:
    save_file(change(load_file("saved/model.safetensors")), "saved/model.safetensors", {"format": "pt"})


FOLDERS = {
    "code of its own": (own_code, r"'hf:saved': it needs code from its repository, which is not run: write path/to/file\.py:"),
    "a pickle": (as_pickle, r"'hf:saved': its weights are not in safetensors: give their file as --weights FILE$"),
    "no preprocessing": (
        lambda: Path("saved/preprocessor_config.json").unlink(),
        r"'hf:saved': it has no preprocessor_config\.json, or none that transformers can use$",
    ),
    "a model of text": (
        lambda: edited("saved/config.json", model_type="bert"),
        r"'hf:saved': transformers has no image classifier of its kind",
    ),
    "more classes than weights": (
        lambda: edited("saved/config.json", id2label={str(number): str(number) for number in range(5)}),
        r"'hf:saved': the weights do not fit ResNetForImageClassification: "
        r"2 of another shape \('classifier\.1\.bias' is \(3,\), not \(5,\), "
        r"'classifier\.1\.weight' is \(3, 16\), not \(5, 16\)\)$",
    ),
    "no head": (
        lambda: other_tensors(lambda tensors: without(tensors, "classifier.1.bias", "classifier.1.weight")),
        r"do not fit ResNetForImageClassification: 2 missing \('classifier\.1\.bias', 'classifier\.1\.weight'\)$",
    ),
    "no configuration": (
        lambda: Path("saved/config.json").unlink(),
        r"^model 'hf:saved' failed: \w+: .*config\.json",
    ),
    "a pipe": (
        lambda: os.mkfifo("saved/tokenizer.json"),
        r"^model 'hf:saved': 'saved/tokenizer\.json' is a pipe, not a file: copy it to a file first$",
    ),
    "not JSON": (
        lambda: Path("saved/config.json").write_text("{"),
        r"^model 'hf:saved' failed: OSError: .* not a valid JSON",
    ),
    "cut": (
        lambda: Path("saved/model.safetensors").write_bytes(Path("saved/model.safetensors").read_bytes()[:300]),
        r"^model 'hf:saved' failed: SafetensorError: ",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_does_not_do_is_one_sentence(hf, case):
    hf_folder(hf)
    change, words = FOLDERS[case]
    change()
    with pytest.raises(CamError, match=words):
        zoo.load("hf:saved")
    assert not Path("written").exists()


def test_what_a_published_file_has_too_many_is_transformers_to_drop(hf):
    model, processor = hf_folder(hf)
    other_tensors(lambda tensors: {**tensors, "resnet.pooler.extra": torch.zeros(2)})
    assert_same(zoo.load("hf:saved"), model, hf_input(processor))


# ------------------------------------------------------------------------------------------ the demo, and a user's file


def test_the_demo():
    loaded = zoo.load("demo")
    assert_same(loaded, demo.network(), demo.preprocess(PICTURE)[None])
    assert (loaded.spec, loaded.file, loaded.names) == ("demo", None, tuple(demo.CLASSES))


def test_the_demo_with_a_weight_file(tmp_path):
    other = demo.network(pretrained=False, seed=4)
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    assert_same(zoo.load("demo", weights=tmp_path / "w.safetensors"), other, demo.preprocess(PICTURE)[None])


USERS = """
import torch
from torch import nn
import beside_the_file

def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, beside_the_file.CLASSES))

def preprocess(picture):
    import later_beside_the_file
    return later_beside_the_file.tensor()

def model():
    return small(), preprocess, ["a", "b"]
"""


@pytest.fixture
def users(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "net.py").write_text(USERS)
    (folder / "beside_the_file.py").write_text("CLASSES = 2\n")
    (folder / "later_beside_the_file.py").write_text("import torch\ndef tensor(): return torch.ones(3, 5, 5)\n")
    yield "folder/net.py:model"
    for name in ("beside_the_file", "later_beside_the_file"):
        sys.modules.pop(name, None)


def small(seed: int = 7) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), seed)


def test_a_users_file_with_a_weight_file(users, tmp_path):
    torch.save(small().state_dict(), tmp_path / "w.pth")
    with torch.random.fork_rng(devices=[]):
        loaded = zoo.load(users, weights=tmp_path / "w.pth")
    assert torch.equal(outputs(loaded.model, torch.ones(1, 3, 5, 5)), outputs(small(), torch.ones(1, 3, 5, 5)))
    assert (loaded.names, loaded.file) == (("a", "b"), tmp_path / "folder/net.py")


def test_the_folder_of_a_users_file_can_be_imported_from_until_the_end(users):
    path = list(sys.path)
    with torch.random.fork_rng(devices=[]), zoo.opened(users) as loaded:
        assert zoo.input_of(loaded, PICTURE).shape == (1, 3, 5, 5)  # preprocess imports
    assert sys.path == path
    sys.modules.pop("later_beside_the_file")
    with pytest.raises(CamError, match=r"^preprocess failed at line \d+ \(import later_beside_the_file\): ModuleNotFoundError"):
        zoo.input_of(loaded, PICTURE)


def test_a_users_function_decides_about_its_weights(users):
    words = r"^--no-pretrained has no meaning with model 'folder/net\.py:model': its function decides about the weights$"
    with pytest.raises(CamError, match=words):
        zoo.load(users, pretrained=False)


def test_weights_that_do_not_fit_a_users_model_are_named(users, tmp_path):
    torch.save({**small().state_dict(), "3.bias": torch.zeros(9)}, tmp_path / "w.pth")
    with (
        torch.random.fork_rng(devices=[]),
        pytest.raises(CamError, match=r"does not fit Sequential: 1 of another shape \('3\.bias'"),
    ):
        zoo.load(users, weights=tmp_path / "w.pth")


# --------------------------------------------------------------------------------------------------- random weights


@pytest.mark.parametrize("spec", ["demo", "torchvision:squeezenet1_1", "timm:test_resnet", "hf:saved"])
def test_random_weights_are_the_same_in_every_run_and_not_the_trained_ones(request, spec):
    library = {"torchvision": "models", "timm": "timm", "hf": "hf"}.get(spec.partition(":")[0])
    library = library and request.getfixturevalue(library)
    trained = hf_folder(library)[0] if spec == "hf:saved" else None
    first = zoo.load(spec, pretrained=False).model.state_dict()
    torch.rand(5)
    state = torch.get_rng_state()
    second = zoo.load(spec, pretrained=False).model.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for model in filter(None, (trained, demo.network() if spec == "demo" else None)):
        assert any(not torch.equal(first[name], tensor) for name, tensor in model.state_dict().items() if tensor.ndim > 1)


# ----------------------------------------------------------------------------------- downloads that are impossible


class Mute:
    """A client of the hub that reaches nobody."""

    def __init__(self, error: Exception):
        self.error, self.asked = error, 0

    def head(self, *_, **__):
        self.asked += 1
        raise self.error


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """The hub's own code runs, and nobody answers; its cache is empty."""
    hub = pytest.importorskip("huggingface_hub")
    client = Mute(type("ConnectError", (Exception,), {})("[Errno -2] Name or service not known"))
    monkeypatch.setattr(hub, "get_session", lambda: client)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    yield client
    assert hub.constants.HF_HUB_OFFLINE is False


UNREACHED = {
    "timm:test_resnet": r"test_resnet cannot be fetched \(Connect.*not known\): give a weight file, or random weights",
    "timm:tv_resnet34": r"tv_resnet34 cannot be fetched \(Connect.*not known\): give a weight file, or random weights",
    "timm:hf-hub:some/model": r"hf-hub:some/model cannot be fetched \(ConnectError: .*not known\): give timm:FOLDER$",
    "timm:hf_hub:some/model": r"hf_hub:some/model cannot be fetched \(ConnectError: .*not known\): give timm:FOLDER$",
    "hf:some/model": r"some/model cannot be fetched \(ConnectError: .*not known\): give hf:FOLDER$",
    "hf:model": r"model cannot be fetched \(ConnectError: .*not known\): give hf:FOLDER$",
}


@pytest.mark.parametrize("spec", UNREACHED)
def test_a_hub_that_does_not_answer_is_asked_once_and_is_one_sentence(request, no_hub, spec):
    request.getfixturevalue(spec.partition(":")[0])
    with pytest.raises(CamError, match=rf"^model '{spec}': {UNREACHED[spec]}"):
        zoo.load(spec)
    assert no_hub.asked == 1


@pytest.fixture
def cached(tmp_path):
    """The model that was last saved, as the hub's cache keeps it."""

    def cache() -> Path:
        folder = tmp_path / "hub/models--some--model"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("0" * 40)
        return Path(shutil.copytree("saved", folder / "snapshots" / ("0" * 40)))

    return cache


def test_without_the_hub_what_is_in_its_cache_is_loaded(hf, no_hub, cached):
    model, processor = hf_folder(hf)
    cached()
    assert_same(zoo.load("hf:some/model"), model, hf_input(processor))


@pytest.mark.parametrize("file", ["preprocessor_config.json", "model.safetensors"])
def test_without_the_hub_a_cache_with_half_a_model_is_not_blamed_on_the_model(hf, no_hub, cached, file):
    hf_folder(hf)
    (cached() / file).unlink()
    with pytest.raises(CamError, match=r"^model 'hf:some/model': some/model cannot be fetched \(ConnectError: "):
        zoo.load("hf:some/model")


@pytest.mark.parametrize("spec", ["timm:test_resnet", "timm:saved", "hf:saved"])
def test_what_is_here_is_loaded_without_asking_the_hub(request, no_hub, spec):
    library = request.getfixturevalue(spec.partition(":")[0])
    {"timm": timm_folder, "hf": hf_folder}[spec.partition(":")[0]](library)
    zoo.load(spec, pretrained="saved" in spec)
    assert no_hub.asked == 0


def test_a_hub_that_answers_and_has_no_such_model_is_one_sentence(timm, monkeypatch):
    import huggingface_hub

    def missing(*_, **__):
        assert not huggingface_hub.constants.HF_HUB_OFFLINE
        raise huggingface_hub.errors.EntryNotFoundError("404 Client Error.\n\nEntry Not Found for url")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: type("", (), {"head": lambda *_, **__: None})())
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", missing)
    words = (
        r"^model 'timm:hf-hub:some/model': .* cannot be fetched \(EntryNotFoundError: 404 Client Error\.\): give timm:FOLDER$"
    )
    with pytest.raises(CamError, match=words):
        zoo.load("timm:hf-hub:some/model")


def test_the_hub_is_not_asked_to_convert_a_pickle(hf, monkeypatch):
    import huggingface_hub
    from transformers import modeling_utils

    def convert(*_, **__):
        raise AssertionError("asked")

    hf_folder(hf)
    config, processor = hf.AutoConfig.from_pretrained("saved"), hf.AutoImageProcessor.from_pretrained("saved")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: type("", (), {"head": lambda *_, **__: None})())
    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", lambda *_, **__: config)
    monkeypatch.setattr(hf.AutoImageProcessor, "from_pretrained", lambda *_, **__: processor)
    monkeypatch.setattr(modeling_utils, "cached_file", lambda *_, **__: None)  # the hub has no such file
    monkeypatch.setattr(modeling_utils, "auto_conversion", convert)
    with pytest.raises(
        CamError, match=r"'hf:some/model': its weights are not in safetensors: give their file as --weights FILE$"
    ):
        zoo.load("hf:some/model")


def no_download(*_, **__):
    raise URLError(gaierror(-2, "Name or service not known"))


def test_torchvisions_weights_that_cannot_be_fetched_are_one_sentence(models, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_download)
    words = (
        r"^model 'torchvision:squeezenet1_1': "
        r"https://download\.pytorch\.org/models/squeezenet1_1-b8a52dc0\.pth cannot be fetched "
        r"\(URLError: <urlopen error \[Errno -2\] Name or service not known>\): give a weight file, or random weights"
    )
    with pytest.raises(CamError, match=words):
        zoo.load("torchvision:squeezenet1_1")


def test_what_torch_prints_of_timms_downloads_is_not_on_stdout(timm, no_hub, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_download)
    with pytest.raises(CamError, match=r"^model 'timm:gcvit_xxtiny': gcvit_xxtiny cannot be fetched"):
        zoo.load("timm:gcvit_xxtiny")  # from an address, not from the hub; the fixture sees that nothing is printed


def test_the_libraries_may_speak_again_afterwards(hf):
    hf_folder(hf)
    hf.utils.logging.enable_progress_bar()
    logging.disable(logging.DEBUG)
    try:
        zoo.load("hf:saved")
        assert hf.utils.logging.is_progress_bar_enabled()
        assert logging.root.manager.disable == logging.DEBUG
    finally:
        logging.disable(logging.NOTSET)
        hf.utils.logging.disable_progress_bar()


FRESH = """
from tests.oracles.libraries import torchvision_models
torchvision_models()
from camfn import CamError, zoo
for spec in ("hf:saved", "timm:kept"):
    zoo.load(spec)
    try:
        zoo.load(spec, weights="w.pth")
    except CamError as error:
        print(error)
"""


def test_a_fresh_process_prints_nothing_beside_what_it_is_told(hf, timm):
    hf_folder(hf)
    timm_folder(timm, folder="kept")
    torch.save(small().state_dict(), "w.pth")
    path = [str(folder) for folder in (Path(__file__).parents[2], Path(zoo.__file__).parents[2])]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join((*path, os.environ.get("PYTHONPATH", "")))}
    found = subprocess.run([sys.executable, "-c", FRESH], env=paths, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    first, second = found.stdout.splitlines()
    assert first.startswith("model 'hf:saved': weights file 'w.pth' does not fit ResNetForImageClassification: 32 missing")
    assert second.startswith("model 'timm:kept': weights file 'w.pth' does not fit ResNet: ")


# -------------------------------------------------------------------------------- libraries that cannot be imported


NMS = RuntimeError("operator torchvision::nms does not exist")


def chained() -> ImportError:
    error = ModuleNotFoundError(
        "Could not import module 'AutoImageProcessor'. Are this object's requirements defined correctly?"
    )
    error.__cause__ = NMS
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NMS, r"{0} cannot be imported \(RuntimeError: operator torchvision::nms does not exist\): install a release that"),
        (
            OSError("libcudart.so.12: cannot open"),
            r"{0} cannot be imported \(OSError: libcudart\.so\.12: cannot open\): install",
        ),
        (
            chained(),
            r"{0} cannot be imported \(RuntimeError: operator torchvision::nms does not exist\): install a release that",
        ),
        (ImportError("cannot import name 'x'"), r"{0} cannot be imported \(ImportError: cannot import name 'x'\): install"),
        (
            ModuleNotFoundError("No module named 'yaml'", name="yaml"),
            r"{0} cannot be imported \(.*No module named 'yaml'\): install",
        ),
        ("missing", r"{0} is not installed: pip install {0}$"),
    ],
)
@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:resnet18", "hf:microsoft/resnet-18"])
def test_a_library_that_cannot_be_imported_is_one_sentence(monkeypatch, spec, error, words):
    package = {"hf": "transformers"}.get(spec.partition(":")[0], spec.partition(":")[0])
    if error == "missing":
        error = ModuleNotFoundError(f"No module named {package!r}", name=package)
    real = importlib.import_module

    def broken(name, *rest):
        if name.partition(".")[0] == package:
            raise error
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(CamError, match=f"^model '{spec}': " + words.format(package)):
        zoo.load(spec, pretrained=False)


def test_a_part_of_transformers_that_cannot_be_imported_is_one_sentence(hf, monkeypatch):
    def broken(*_, **__):
        raise chained()

    hf_folder(hf)
    monkeypatch.setattr(hf.AutoImageProcessor, "from_pretrained", broken)
    words = r"^model 'hf:saved': transformers cannot be imported \(RuntimeError: operator torchvision::nms does not exist\): "
    with pytest.raises(CamError, match=words + "install a release that goes with that of torch and torchvision$"):
        zoo.load("hf:saved")


# -------------------------------------------------------------------------------------------------------- refusals


FORMS = r" is none of demo, torchvision:NAME\[:WEIGHTS\], timm:NAME, hf:NAME or path/to/file\.py:function$"
REFUSALS = {
    **{
        spec: f"^model {spec!r}".replace("\\", r"\\") + FORMS
        for spec in ("", ":", ":a", "resnet18", "tv:resnet18", "torchvision:", "timm", "hf:", "Demo", "demo:", "some folder:f")
    },
    "net.py": r"^model 'net\.py' does not name a function: write path/to/file\.py:function$",
    "C:\\models\\net.py": r"^model 'C:.*net\.py' does not name a function",
    "C:\\models\\net.py:load": r"^model 'C:.*net\.py:load': there is no file 'C:.*net\.py'$",
    "torchvision:resnet19": r"'torchvision:resnet19': torchvision has no image classifier 'resnet19'; closest: 'resnet18'",
    "torchvision:fcn_resnet50": r"torchvision has no image classifier 'fcn_resnet50'; closest: .*'resnet50'",
    "torchvision:resnet50:V2": r"has no weights 'V2' for resnet50; there are: IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT$",
    "torchvision:vgg16:IMAGENET1K_FEATURES": r"no weights 'IMAGENET1K_FEATURES' for vgg16; there are: IMAGENET1K_V1, DEFAULT$",
    "timm:resnat18": r"'timm:resnat18': timm has no model 'resnat18', nor is it a folder; closest: 'resnet18'",
    "timm:timm/resnet18.a1_in1k": r"timm has no model 'timm/resnet18\.a1_in1k', nor is it a folder; closest: ",
    "timm:C:\\models": r"timm has no model 'C:.*models', nor is it a folder",
    "timm:resnet18.a9_in1k": r"timm has no model 'resnet18\.a9_in1k'; closest: .*'resnet18\.a1_in1k'",
    "timm:coatnet_0_224": r"timm has no weights for 'coatnet_0_224': give a weight file, or random weights",
    "timm:local-dir:nowhere": r"^model 'timm:local-dir:nowhere' failed: FileNotFoundError: .*nowhere/config\.json$",
    "hf:./nowhere": r"there is no folder '\./nowhere', and a model on the hub has a name like microsoft/resnet-50$",
    "hf:a/b/c": r"there is no folder 'a/b/c', and a model on the hub has a name like",
}


@pytest.mark.parametrize("spec", REFUSALS)
def test_what_is_not_there_is_one_sentence(request, spec):
    library = {"torchvision": "models", "timm": "timm", "hf": "hf"}.get(spec.partition(":")[0])
    if library and spec.partition(":")[2]:
        request.getfixturevalue(library)
    with pytest.raises(CamError, match=REFUSALS[spec]):
        zoo.load(spec)


def test_a_model_of_features_has_no_classes_to_explain(timm, monkeypatch):
    with pytest.raises(CamError, match=r"^model 'timm:vit_small_patch14_dinov2': the model has no classifier"):
        zoo.load("timm:vit_small_patch14_dinov2", pretrained=False)


def test_a_model_of_torchvisions_without_weights_has_no_preprocessing(models, monkeypatch):
    from torchvision.models._api import WeightsEnum

    monkeypatch.setattr(models, "get_model_weights", lambda name: WeightsEnum("None_Weights", {}))
    with pytest.raises(CamError, match=r"torchvision has no weights 'DEFAULT' for resnet18; there are: none$"):
        zoo.load("torchvision:resnet18", pretrained=False)


@pytest.mark.parametrize("spec", ["demo", "torchvision:squeezenet1_1", "timm:test_resnet", "hf:saved"])
def test_weights_that_do_not_fit_are_named_with_the_model(request, tmp_path, spec):
    library = {"torchvision": "models", "timm": "timm", "hf": "hf"}.get(spec.partition(":")[0])
    library = library and request.getfixturevalue(library)
    if spec == "hf:saved":
        hf_folder(library)
    state = zoo.load(spec, pretrained=False).model.state_dict()
    *_, last = state
    save_file({**state, last: torch.zeros(7)}, tmp_path / "w.safetensors")
    found = rf"1 of another shape \('{re.escape(last)}' is \(7,\), not"
    words = rf"^model '{spec}': weights file '.*w\.safetensors' does not fit \w+: {found}"
    with pytest.raises(CamError, match=words):
        zoo.load(spec, weights=tmp_path / "w.safetensors")
    with pytest.raises(CamError, match=r"^weights file '.*none\.pth' is not there$"):
        zoo.load(spec, weights=tmp_path / "none.pth")


# ------------------------------------------------------------------------------------------------ targets in words

NAMES = (
    *("tench, Tinca tinca", "goldfish, Carassius auratus", "tabby, tabby cat", "tiger cat", "tiger, Panthera tigris"),
    *("crane", "Crane", "cats_eye  marble", "scatter rug", "7"),
)


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("3", 3),  # an index, although "7" is a name too
        ("7", 7),
        ("tiger cat", 3),  # the whole name
        ("TIGER  cat", 3),
        ("tiger", 4),  # a synonym, before the words of another name
        ("tabby", 2),
        ("tabby cat", 2),
        ("panthera TIGRIS", 4),
        ("tiger, Panthera tigris", 4),
        ("tinca", 0),  # a word, before a part
        ("cats eye", 7),
        ("cats_eye marble", 7),
        ("scatter", 8),
        ("aura", 1),  # a part
    ],
)
def test_a_class_in_words_is_the_first_kind_of_fit(text, index):
    assert zoo.class_of(text, NAMES) == index


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("crane", "target 'crane' fits 2 classes: 5 'crane', 6 'Crane'; give the index"),
        ("cat", "target 'cat' fits 2 classes: 2 'tabby, tabby cat', 3 'tiger cat'; give the index"),  # and no scatter
        ("tig", "target 'tig' fits 2 classes: 3 'tiger cat', 4 'tiger, Panthera tigris'; give the index"),
        ("goldfisch", "target 'goldfisch' is not a class; closest: 'goldfish'"),
        ("", "target '' is not a class; give the index"),
        (" , ", "target ' , ' is not a class; give the index"),
        ("top0", "target 'top0' is not a class; give the index"),
    ],
)
def test_a_class_in_words_that_is_none_or_several_is_one_sentence(text, words):
    with pytest.raises(CamError, match="^" + re.escape(words)):
        zoo.class_of(text, NAMES)


def test_at_most_ten_classes_are_listed():
    with pytest.raises(
        CamError, match=r"^--target 'hound' fits 14 classes: 0 'hound 0', .*, 9 'hound 9', 4 more; give the index$"
    ):
        zoo.class_of("hound", [f"hound {number}" for number in range(14)], "--target")


def test_without_names_a_class_is_an_index():
    assert zoo.class_of("12", ()) == 12
    with pytest.raises(CamError, match=r"^target 'cat' is not a class; the model has no class names, so give the index$"):
        zoo.class_of("cat", ())


def test_targets_in_words_are_a_row_of_classes_each_once():
    targets = zoo.targets_of(["Top2", "tabby", "0"], NAMES)
    outputs = torch.tensor([0.0, 5.0, 4.0, 9.0])
    assert zoo.classes_of(targets, outputs) == (3, 1, 2, 0)
    assert zoo.classes_of(targets[1:], outputs) == (2, 0)
    assert zoo.classes_of((), outputs) == (3,)
    assert zoo.classes_of((2, *targets), outputs) == (2, 3, 1, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("top5", "target top5 needs 5 classes: the model has 4"),
        ("4", "target 4 is not a class: the model has classes 0 to 3"),
        ("-1", "target -1 is not a class: the model has classes 0 to 3"),
    ],
)
def test_targets_that_the_model_does_not_have_are_one_sentence(text, words):
    with pytest.raises(CamError, match=f"^{words}$"):
        zoo.classes_of(zoo.targets_of([text], NAMES), torch.zeros(4))

"""Weight files: what is read, that nothing in them is run, and that they must fit the model."""

import argparse
import os
import pathlib
import pickle
import sys
import warnings
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from camfn import CamError
from camfn.zoo import checkpoints
from tests.oracles.networks import SmallNet, inputs, small_net


def net(seed: int = 0, classes: int = 5) -> SmallNet:
    return small_net(seed, torch.float32, classes=classes).eval()


def state(seed: int = 0, **options) -> dict[str, torch.Tensor]:
    return net(seed, **options).state_dict()


def prefixed(prefix: str, tensors=None) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in (tensors or state()).items()}


def old_format(value, file) -> None:
    torch.save(value, file, _use_new_zipfile_serialization=False)


def contiguous(tensors, file) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


# ------------------------------------------------------------------------------------------------------- what is read

FILES = {
    "a state_dict": (torch.save, state()),
    "the format before torch 1.6": (old_format, state()),
    "safetensors": (contiguous, state()),
    "beside a count and an optimizer": (torch.save, {"epoch": 3, "state_dict": state(), "optimizer": {"lr": 0.1}}),
    "model_state_dict": (torch.save, {"model_state_dict": state()}),
    "model": (torch.save, {"model": state()}),
    "only averaged": (torch.save, {"state_dict_ema": state()}),
    "averaged, torchvision's": (torch.save, {"model_ema": state()}),
    "averaged as well": (torch.save, {"state_dict_ema": state(1), "model_ema": state(1), "state_dict": state()}),
    "DataParallel": (torch.save, prefixed("module.")),
    "compiled": (contiguous, prefixed("_orig_mod.")),
    "Lightning": (torch.save, {"state_dict": prefixed("model."), "pytorch-lightning_version": "2"}),
    "compiled in DataParallel in Lightning": (torch.save, {"state_dict": prefixed("model.module._orig_mod.")}),
    "before batch norms counted": (torch.save, {name: tensor for name, tensor in state().items() if "num_batches" not in name}),
}


@pytest.mark.parametrize("case", FILES)
def test_what_people_have_is_read(tmp_path, case):
    save, value = FILES[case]
    file = tmp_path / ("weights.safetensors" if save is contiguous else "weights.pth")
    save(value, file)
    model, x = net(seed=1), inputs(dtype=torch.float32)
    assert not torch.equal(model(x), net()(x))
    checkpoints.fill(model, checkpoints.read(file))
    assert torch.equal(model(x), net()(x))


def test_half_precision_is_copied_into_the_models_own_dtype(tmp_path):
    torch.save(
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state().items()}, tmp_path / "w"
    )
    model = net(seed=1)
    checkpoints.fill(model, checkpoints.read(tmp_path / "w"))
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(model.fc.weight, net().fc.weight.half().float())


def test_wrapped_names_keep_the_versions_of_their_modules(tmp_path):
    class Versioned(nn.Linear):
        _version = 7

        def _load_from_state_dict(self, tensors, prefix, metadata, *rest):
            assert metadata["version"] == 7
            super()._load_from_state_dict(tensors, prefix, metadata, *rest)

    torch.save(nn.DataParallel(nn.Sequential(Versioned(3, 2))).state_dict(), tmp_path / "w")
    state = nn.DataParallel(nn.Sequential(Versioned(3, 2))).state_dict()
    consume_prefix_in_state_dict_if_present(state, "module.")
    if "0" not in state._metadata:
        pytest.skip("this torch does not rename the versions with the tensors")
    checkpoints.fill(nn.Sequential(Versioned(3, 2)), checkpoints.read(tmp_path / "w"))


def test_a_models_own_names_are_not_taken_for_a_wrappers(tmp_path):
    inner = OrderedDict(model=net(1))
    torch.save(prefixed("model."), tmp_path / "w")
    checkpoints.fill(nn.Sequential(inner), checkpoints.read(tmp_path / "w"))
    assert torch.equal(inner["model"].fc.weight, net().fc.weight)
    torch.save({name: tensor for name, tensor in prefixed("model.").items() if name != "model.fc.bias"}, tmp_path / "w")
    with pytest.raises(CamError, match=r"does not fit Sequential: 1 missing \('model\.fc\.bias'\)$"):
        checkpoints.fill(nn.Sequential(inner), checkpoints.read(tmp_path / "w"))


# ------------------------------------------------------------------------------------------------- what is not run


class Payload:
    """Unpickled by plain pickle, it writes the file."""

    def __init__(self, target: pathlib.Path):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


def plain(value, file) -> None:
    with file.open("wb") as stream:
        pickle.dump(value, stream, protocol=2)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("save", [torch.save, old_format, plain])
@pytest.mark.parametrize("beside", [True, False])
def test_a_pickle_that_would_write_a_file_does_not(tmp_path, monkeypatch, save, beside, name):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # torch's default, not ours
    target, file = tmp_path / "written", tmp_path / name
    save({"state_dict": state(), "more": Payload(target)} if beside else Payload(target), file)
    words = (
        "is damaged, or not a safetensors file" if name.endswith("safetensors") else r"holds more than tensors \([\w.]+\), and"
    )
    with pytest.raises(CamError, match=words):
        checkpoints.read(file)
    assert not target.exists()
    if save is not plain:  # the payload is one: torch, told to trust the file, runs it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(file.rename(tmp_path / "renamed.pth"), weights_only=False)
        assert target.exists()


# ---------------------------------------------------------------------------------------------------- what is refused


def scripted(file) -> None:
    torch.jit.trace(net(), inputs(dtype=torch.float32), check_trace=False).save(str(file))


def cut(file, save=torch.save, value=None) -> None:
    save(state() if value is None else value, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGED = r"^weights file '.*w\.pth' is damaged, or not a checkpoint of torch: write it with torch\.save\(.*, FILE\)$"
UNREAD = {
    "nothing there": ("w.pth", lambda file: None, r"^weights file '.*w\.pth' is not there$"),
    "a folder": ("w.pth", lambda file: file.mkdir(), r"^weights file '.*w\.pth' is a folder, not a file$"),
    "a pipe": ("w.pth", os.mkfifo, r"^weights file '.*w\.pth' is a pipe, not a file$"),
    "a device": ("w.pth", lambda file: file.symlink_to("/dev/zero"), r"^weights file '.*w\.pth' is a device, not a file$"),
    "empty": ("w.pth", lambda file: file.touch(), r"^weights file '.*w\.pth' is empty$"),
    "cut": ("w.pth", cut, DAMAGED),
    "cut, old": ("w.pth", lambda file: cut(file, old_format), DAMAGED),
    "cut safetensors": ("w.safetensors", lambda file: cut(file, contiguous), r"is damaged, or not a safetensors file \(.*\)$"),
    "text": ("w.pth", lambda file: file.write_text("hello\nworld\n"), DAMAGED),
    "a picture": ("w.pth", lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n123"), DAMAGED),
    "a module": (
        "w.pth",
        lambda file: torch.save(nn.Linear(2, 2), file),
        r"^weights file '.*w\.pth' holds more than tensors \(torch\.nn\.modules\.linear\.Linear\), and reading that would run "
        r"code from the file: save the tensors alone, with torch\.save\(model\.state_dict\(\), FILE\)$",
    ),
    "a namespace beside": (
        "w.pth",
        lambda file: torch.save({"state_dict": state(), "args": argparse.Namespace(lr=1)}, file),
        r"holds more than tensors \(argparse\.Namespace\), and reading that would run code",
    ),
    "a program": ("w.pth", scripted, r"holds more than tensors \(TorchScript\)|found a RecursiveScriptModule"),
    "a list": (
        "w.pth",
        lambda file: torch.save([torch.zeros(2)], file),
        r"must hold tensors by name, at the top or under 'state_dict', 'model_state_dict', .*'model_ema'; found a list$",
    ),
    "a tensor": ("w.pth", lambda file: torch.save(torch.zeros(2), file), r"must hold tensors by name.*; found a Tensor$"),
    "nothing in it": ("w.pth", lambda file: torch.save({"state_dict": {}}, file), r"; found an empty dict$"),
    "a name of its own": (
        "w.pth",
        lambda file: torch.save({"net": state(), "epoch": 3}, file),
        r"; found a dict in which 'net', 'epoch' are no tensors$",
    ),
    "a number among tensors": (
        "w.pth",
        lambda file: torch.save({**state(), "steps": 3}, file),
        r"; found a dict in which 'steps' is no tensor$",
    ),
    "numbers for names": ("w.pth", lambda file: torch.save({0: torch.zeros(2)}, file), r"a dict in which 0 is no tensor$"),
}


@pytest.mark.parametrize("case", UNREAD)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_cannot_be_read_is_one_sentence(tmp_path, case):
    name, write, words = UNREAD[case]
    write(tmp_path / name)
    with pytest.raises(CamError, match=words):
        checkpoints.read(tmp_path / name)


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    torch.save(state(), tmp_path / "w.pth")

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", forbidden)
    with pytest.raises(CamError, match=r"^weights file '.*w\.pth' cannot be read: Permission denied$"):
        checkpoints.read(tmp_path / "w.pth")


def test_without_safetensors_its_files_are_refused_and_others_are_not(tmp_path, monkeypatch):
    contiguous(state(), tmp_path / "w.safetensors")
    torch.save(state(), tmp_path / "w.pth")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CamError, match=r"needs safetensors: pip install 'camfn\[cli\]'$"):
        checkpoints.read(tmp_path / "w.safetensors")
    assert checkpoints.read(tmp_path / "w.pth").tensors.keys() == state().keys()


MISFITS = {
    "another head": (
        state(classes=3),
        r"^weights file '.*w\.pth' does not fit SmallNet: "
        r"2 of another shape \('fc\.bias' is \(3,\), not \(5,\), 'fc\.weight' is \(3, 6\), not \(5, 6\)\)$",
    ),
    "another head, wrapped": (prefixed("module.", state(classes=3)), r"does not fit SmallNet: 2 of another shape \('fc\.bias'"),
    "another network": (
        {"body.weight": torch.zeros(2), "body.bias": torch.zeros(2)},
        r"does not fit SmallNet: 10 missing \('fc\.bias', 'fc\.weight', 'features\.bias', \.\.\.\); "
        r"2 unknown to the model \('body\.bias', 'body\.weight'\)$",
    ),
    "one of each": (
        {
            **{name: tensor for name, tensor in state().items() if name != "fc.bias"},
            "fc.weight": torch.zeros(1),
            "b": torch.zeros(1),
        },
        r"1 missing \('fc\.bias'\); 1 unknown to the model \('b'\); "
        r"1 of another shape \('fc\.weight' is \(1,\), not \(5, 6\)\)$",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_named(tmp_path, case):
    tensors, words = MISFITS[case]
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(CamError, match=words):
        checkpoints.fill(net(1), checkpoints.read(tmp_path / "w.pth"))


def test_a_model_that_will_not_be_filled_says_why(tmp_path):
    class Stubborn(nn.Linear):
        def _load_from_state_dict(self, *_):
            raise ValueError("version 1 or 2")

    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    with pytest.raises(CamError, match=r"does not fit Stubborn \(ValueError: version 1 or 2\)$"):
        checkpoints.fill(Stubborn(2, 2), checkpoints.read(tmp_path / "w.pth"))

"""What the tests of the command line share: a folder with a model file and two pictures, and ways to run the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from camfn import cli

ROOT = Path(__file__).resolve().parents[2]

MODEL = """
import dataclasses
import time
import warnings
import torch
from torch import nn
import beside

NAMES = ["Dark", "light", "light", "Red fox"]


@dataclasses.dataclass
class Settings:
    "Dataclasses look for their module in sys.modules."
    width: "int" = 3


def net(classes=4):
    generator = torch.Generator().manual_seed(beside.SEED)
    model = nn.Sequential(nn.Conv2d(3, Settings().width, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 5, 3, stride=2), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, classes))
    for p in model.parameters():
        p.data.normal_(generator=generator)
    return model.train()


def preprocess(picture):
    import beside_later
    return (beside_later.tensor(picture.resize((8, 6))) - 0.5) / 0.25


def plain(): return net()
def pair(): return net(), preprocess
def triple(): return net(), preprocess, NAMES
def listed(): return [net(), None, tuple(NAMES)]
def wrong_count(): return net(), preprocess, NAMES[:3]
def needs(size): return net()
def gives_none(): return None
def gives_four(): return net(), preprocess, NAMES, 0
def gives_text(): return net(), preprocess, "four"
def raises():
    raise RuntimeError("no weights\\nhere")
def calls():
    return raises()
def refuses():
    from camfn import CamError
    raise CamError("weights are\\nmissing")
def exits():
    raise SystemExit("enough")
def flat(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
def maps(): return net()[:4]
def headless(): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)), preprocess
def broken_preprocess(): return net(), lambda picture: 1 / 0
def bytes_preprocess(): return net(), lambda picture: (preprocess(picture) * 9).byte()
def batch_preprocess(): return net(), lambda picture: preprocess(picture)[None]
def two_preprocess(): return net(), lambda picture: torch.stack([preprocess(picture)] * 2)
def pil_preprocess(): return net(), lambda picture: picture
def root_preprocess(): return net(), lambda picture: preprocess(picture).clamp(0).sqrt(), NAMES
def double(): return net().double(), preprocess
def already(): return nn.Sequential(net(), nn.Softmax(1)), preprocess
def fails_when_masked():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
        def forward(self, x):
            assert bool((x != 0).all()), "no zeros"
            return self.net(x)
    return Fails(), preprocess
def tops(): return net(), preprocess, ["top1", "top2", "other", "more"]
def accents(): return net(), preprocess, ["Füchse"] * 4
def wild(): return net(), preprocess, ["two\\nlines\\x1b[2J"] * 4
def wild_error():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("one\\ntwo\\r\\x1b[2J\\u2028three")
    return Fails()
def wild_layer():
    first, act, *rest = net()
    model = nn.Sequential(first)
    model.add_module("a\\x1b", act)
    for number, module in enumerate(rest, 2):
        model.add_module(str(number), module)
    return model, preprocess
def leaves_a_mark():
    open("loaded", "w").close()
    return net(), preprocess
class Squeezed(nn.MaxPool2d):
    "Of a small picture it leaves no grid."
    def forward(self, x):
        y = super().forward(x)
        return y.flatten(1) if y.shape[2:] == (1, 1) else y
class Squeezes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.classify = net()[0], Squeezed(2), nn.Linear(3, 4)
    def forward(self, x):
        y = self.last(self.first(x))
        return self.classify(y if y.ndim == 2 else y.mean((2, 3)))
def squeezes(): return Squeezes()
def only_9_by_11():
    last = nn.Linear(100, 4)
    nn.init.constant_(last.weight, 0.01)  # a map is positive where the layer is
    return nn.Sequential(net()[:4], nn.Flatten(), last)
class Watched(nn.Module):
    "Writes down what happens to it."
    def __init__(self, about="", seconds=0):
        super().__init__()
        self.net, self.about, self.seconds = net(), about, seconds
    def to(self, device):
        self.note("to", device)
        return super().to(device)
    def forward(self, x):
        self.note("rows", len(x))
        time.sleep(self.seconds)
        if self.about:
            print(self.about)
            warnings.warn(self.about)
        return self.net(x)
    def note(self, *words):
        with open("seen.txt", "a") as file:
            print(*words, file=file)
def watched(): return Watched(), preprocess
def enlarges(): return Watched(), lambda picture: torch.zeros(1).expand(3, 4000, 4001)
def slow(): return Watched(seconds=0.15), preprocess
def talks(): return Watched("twice\\nas good"), preprocess
def without_tensors(): return nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()), preprocess
class Odd(nn.Module):
    "One layer runs twice, one gives tokens, one gives a single position, one is never run."
    def __init__(self):
        super().__init__()
        self.first, self.twice, self.tokens = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(2)
        self.last, self.pool, self.never = nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.ReLU()
    def forward(self, x):
        a = self.twice(self.first(x))
        return self.pool(self.last(self.twice(a)) + self.tokens(a).mean()).flatten(1)
def odd(): return Odd(), preprocess
class Attends(nn.Module):
    "Patches of 2, three rows of four."
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.embed, self.blocks = nn.Conv2d(3, 4, 2, 2), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, 4)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data.normal_(generator=generator)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x).flatten(2).mT).mean(1))
def attends(): return Attends(), preprocess
NUMBER = 3
"""
RAISES = next(number for number, line in enumerate(MODEL.splitlines(), 1) if line.startswith("    raise RuntimeError"))
BESIDE = {
    "beside.py": "SEED = 3\n",
    "beside_later.py": "import numpy, torch\n"
    "def tensor(p): return torch.from_numpy(numpy.array(p)).permute(2, 0, 1).float() / 255\n",
    "syntax.py": "import torch\n\ndef f(:\n",
    "absent.py": "import torch\n\nimport no_such_module_at_all\n",
    "nested.py": "import torch\nimport syntax\n",
    "notes.txt": "def f(): ...\n",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with model files, two pictures, and an empty folder."""
    for name, text in {"net.py": MODEL, **BESIDE}.items():
        (tmp_path / name).write_text(text)
    random = np.random.default_rng(5)
    for name in ("a.png", "b.png"):
        Image.fromarray(random.integers(0, 256, (11, 9, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("beside", "beside_later", "syntax"):
        sys.modules.pop(name, None)


def command(*arguments: str, given: bytes | None = None):
    """`camfn ...`, in this process. `given` is what stands on stdin."""
    try:
        runner = CliRunner(mix_stderr=False)  # click < 8.2
    except TypeError:
        runner = CliRunner()
    return runner.invoke(cli.app(), [*map(str, arguments)], input=given)


def invoke(*arguments: str, given: bytes | None = None):
    """`camfn explain ...`, in this process."""
    return command("explain", *arguments, given=given)


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
    "OMP_NUM_THREADS": "1",
}
CAMFN = [sys.executable, "-m", "camfn"]


def process(*arguments: str, **options) -> subprocess.CompletedProcess:
    """`camfn ...`, in a process of its own."""
    options = {"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 120, **options}
    return subprocess.run([*CAMFN, *map(str, arguments)], **options)


def explain(*arguments: str) -> list[str]:
    """The lines on stdout of a command that must succeed."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def facts(path: Path) -> dict:
    return json.loads(Path(path).read_text())


def picture(path: str | Path) -> Image.Image:
    with Image.open(path) as file:
        return file.copy()

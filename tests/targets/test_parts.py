"""Callable targets on outputs of several parts, against the same model with its logits alone."""

import dataclasses
import functools
import re
from collections import OrderedDict, UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.functional import normalize

import camfn
from camfn import Sweep, _compat
from camfn.targets.outputs import compared, flatten, observe, shown
from tests.oracles.closeness import close
from tests.oracles.networks import inputs

T = camfn.targets
needs_compiler = pytest.mark.skipif(bool(_compat.can_compile()), reason="this torch cannot compile the kernel")


def says(*parts: str):
    return pytest.raises(camfn.CamError, match="(?s)" + ".*".join(map(re.escape, parts)))


class Net(nn.Module):
    """A layer `c`, and four logits (or `k`) in an output of any kind."""

    def __init__(self, wrap=lambda y: y, k: int = 4):
        super().__init__()
        self.c, self.f, self.wrap = nn.Conv2d(3, 6, 3, 2), nn.Linear(6, k), wrap
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.double()

    def forward(self, x: Tensor):
        return self.wrap(self.f(self.c(x).sigmoid().mean((2, 3))))


X = inputs(3)
METHODS = ("grad_cam", "score_cam", "ablation_cam")
every_method = pytest.mark.parametrize("method", METHODS)


def maps(method: str, net: nn.Module, x, target, **options) -> Tensor:
    return camfn.METHODS[method].function(net, "c", x, target, relu=False, normalize=False, **options)


def loop(method: str, net: nn.Module, x: Tensor, target) -> Tensor:
    """One image after the other."""
    return torch.cat([maps(method, net, x[i : i + 1], target) for i in range(len(x))])


# ------------------------------------------------------------------------------------------------- what is whose


class Cache:
    """No container: it is handed whole."""

    def __init__(self):
        self.keys = torch.zeros(3, 2)


TEXTS, CACHE = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).double(), Cache()


def parts(y: Tensor) -> dict:
    """Logits and hidden values with a row for each image; a loss, as many texts as images, and a cache without."""
    return {"logits": y, "loss": y.logsumexp(1).mean(), "texts": TEXTS, "cache": CACHE, "hidden": (y * 2, None), "note": "a"}


@dataclasses.dataclass
class Record:
    logits: Tensor
    loss: Tensor
    texts: Tensor
    cache: Cache
    hidden: tuple
    note: str


@dataclasses.dataclass(frozen=True)
class Checked:
    logits: Tensor
    loss: Tensor
    texts: Tensor
    cache: Cache
    hidden: tuple
    note: str
    twice: Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "twice", 2 * self.logits)


class Own(dict):
    """A mapping that pytree functions do not know."""


class Thing:
    """What a model may return, and pytree functions do not know."""

    def __init__(self, **parts):
        vars(self).update(parts)


Named = namedtuple("Named", list(parts(torch.ones(1, 4))))
FORMS = {
    "dict": parts,
    "ordered": lambda y: OrderedDict(parts(y)),
    "own mapping": lambda y: Own(parts(y)),
    "user mapping": lambda y: UserDict(parts(y)),
    "record": lambda y: Record(**parts(y)),
    "frozen record": lambda y: Checked(**parts(y)),
    "named tuple": lambda y: Named(**parts(y)),
    "namespace": lambda y: SimpleNamespace(**parts(y)),
    "object": lambda y: Thing(**parts(y)),
}


def part(output, key: str):
    return output[key] if isinstance(output, (dict, UserDict)) else getattr(output, key)


def of_parts(output) -> Tensor:
    assert part(output, "texts").shape == (3, 5)
    assert part(output, "loss").ndim == 0
    assert part(output, "cache") is CACHE
    assert part(output, "hidden")[1] is None
    return part(output, "logits")[1] + part(output, "hidden")[0][2] + part(output, "texts").sum()


def of_logits(y: Tensor) -> Tensor:
    return y[1] + 2 * y[2] + TEXTS.sum()


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_a_callable_gets_what_belongs_to_its_sample_and_the_rest_whole(form, n):
    net, x = Net(FORMS[form]), X[:n]
    for method in METHODS:
        expected = maps(method, Net(), x, of_logits)
        close(maps(method, net, x, of_parts), expected, method)
        close(maps(method, net, x, [of_parts] * n), expected, method)
    close(maps("score_cam", net, x, of_parts, sweep=Sweep(chunk=3)), expected := maps("score_cam", Net(), x, of_logits))
    assert float(expected.abs().max()) > 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS[:2])
def test_under_a_transform_it_is_the_same(method, form):
    net = Net(FORMS[form])
    close(vmap(lambda one: maps(method, net, one[None], of_parts)[0])(X), loop(method, Net(), X, of_logits))
    found, expected = (
        grad(lambda x, a=a: maps(method, *a[:1], x, a[1]).sum())(X) for a in ((net, of_parts), (Net(), of_logits))
    )
    close(found, expected)


@needs_compiler
@pytest.mark.parametrize("form", ["dict", "record", "object"])
def test_a_compiled_sweep_is_the_sweep(form, monkeypatch):
    """Outputs in parts matter to the tracer alone, so its graph runs as it is."""
    monkeypatch.setattr(_compat, "compiled", functools.partial(_compat.compiled, backend="eager"))
    torch._dynamo.reset()
    run = camfn.prepare(Net(FORMS[form]))
    close(maps("score_cam", run, X, of_parts, sweep=Sweep(compile=True)), maps("score_cam", Net(), X, of_logits))
    torch._dynamo.reset()


def test_a_model_output_of_transformers():
    utils = pytest.importorskip("transformers.utils")
    made = dataclasses.make_dataclass("Made", [(key, object, None) for key in parts(X)], bases=(utils.ModelOutput,))
    close(maps("score_cam", Net(lambda y: made(**parts(y))), X, of_parts_of_mapping), maps("score_cam", Net(), X, of_logits))


def of_parts_of_mapping(output) -> Tensor:
    assert output.texts.shape == (3, 5)
    assert output.cache is CACHE
    return output["logits"][1] + output.hidden[0][2] + output.texts.sum()


@every_method
def test_the_axis_of_images_may_be_any(method):
    net = Net(lambda y: {"logits_per_text": y.T, "hidden": torch.stack([y, y])})
    found = maps(method, net, X[:2], lambda o: o["logits_per_text"][1] - o["hidden"][1, 3])  # two images, and two layers
    close(found, maps(method, Net(), X[:2], lambda y: y[1] - y[3]))


@pytest.mark.parametrize("heads", [1, 2, 3, 4])
@every_method
def test_a_list_of_outputs_for_the_whole_batch(method, heads):
    """Deep supervision, with as many heads as images among others."""
    net = Net(lambda y: [y * (i + 1) for i in range(heads)])
    expected = maps(method, Net(), X, 1)
    close(maps(method, net, X, 1), expected)
    close(maps(method, net, X, [1, T.logit(1), lambda o: o[0][1]]), expected)
    close(maps(method, net, X, lambda o: o[-1][1] / heads if isinstance(o, list) else None), expected)


class Detector(Net):
    """A list with an entry for each image, of as many detections as there are logits."""

    def forward(self, x: Tensor):
        boxes = torch.tensor([[0.0, 0, 8, 8]]).double()
        return [{"boxes": boxes.repeat(len(y), 1), "labels": torch.arange(len(y)), "scores": y} for y in super().forward(x)]


@pytest.mark.parametrize("detections", [1, 2, 3, 4])
@every_method
def test_a_list_with_an_entry_for_each_image(method, detections):
    """With as many detections as images among others, and with one."""
    expected = maps(method, Net(k=detections), X, lambda y: y[0])
    for n in (1, 3):
        close(maps(method, Detector(k=detections), X[:n], lambda o: o["scores"][0]), expected[:n])


def test_entries_inside_an_output():
    net = Net(lambda y: {"logits": y, "each": [{"y": row[: 2 + i % 2]} for i, row in enumerate(y)]})
    card = camfn.explain(net, "c", X, lambda o: o["each"]["y"][1], method="score_cam")
    close(card.scores, Net()(X)[:, 1:2].detach())
    assert not [finding for finding in card.findings if finding.kind == "about the target"]


class Counting(Net):
    def forward(self, x: Tensor):
        self.sizes.append(len(x))
        return super().forward(x)


@pytest.mark.parametrize(
    ("wrap", "target", "sizes"),
    [
        (lambda y: y, lambda y: y[1], [3]),
        (lambda y: {"logits": y, "loss": y.mean()}, lambda o: o["logits"][1], [3]),
        (lambda y: {"logits": y, "texts": TEXTS}, 1, [3]),
        (lambda y: {"logits": y, "texts": TEXTS}, lambda o: o["logits"][1], [3, 2]),
        (lambda y: {"logits": y, "texts": TEXTS}, [T.logit(1), lambda o: o["logits"][1], 2], [3, 2]),
    ],
)
def test_the_model_runs_again_once_and_only_where_the_output_leaves_it_open(wrap, target, sizes):
    net = Counting(wrap)
    net.sizes = Sizes()
    maps("grad_cam", net, X, target)
    assert net.sizes.seen == sizes


class Sizes:
    """A list that copies of the model share."""

    def __init__(self):
        self.seen = []

    def __del__(self):  # objects with a destructor are not copied
        pass

    def append(self, size: int):
        self.seen.append(size)


def test_a_model_for_one_number_of_images_is_read_by_its_shapes_and_the_card_says_so():
    class Fixed(Net):
        def forward(self, x: Tensor):
            return super().forward(x.reshape(3, 3, 8, 8))

    card = camfn.explain(Fixed(lambda y: {"logits": y, "hidden": 2 * y}), "c", X, lambda o: o["hidden"][1], method="grad_cam")
    close(card.scores, 2 * Net()(X)[:, 1:2].detach())
    assert [finding.sentence for finding in card.findings if finding.kind == "about the target"] == [
        "each part of the output whose first axis is 3 was taken for one row for each image"
    ]


def test_readings():
    y, texts = torch.zeros(2, 4), torch.zeros(2, 5)
    three = {"y": torch.zeros(3, 4), "texts": texts, "each": [1, 2, 3], "two": [torch.zeros(3), texts], "t": torch.zeros(4, 3)}
    two = {"y": y, "texts": texts, "each": [1, 2], "two": [torch.zeros(2), texts], "t": torch.zeros(4, 2)}
    assert compared(two, 2, three, 3) == (("y", 0), ("each", "each"), ("two", ((0, 0),)), ("t", 1))
    assert compared({"texts": texts}, 2, {"texts": texts}, 3) is None
    assert observe(y, 2, lambda: None).reading == 0
    assert observe(y, 3, lambda: None).reading is None
    assert observe([y[0], y[0]], 2, lambda: None) == ("each", "")
    assert observe((y, texts), 2, lambda: ((three["y"], texts), 3)) == (((0, 0),), "")


def test_leaves_are_put_back():
    for form in FORMS.values():
        output = form(torch.ones(2, 4))
        leaves, rebuilt = flatten(output)
        made = rebuilt([2 * leaf if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        assert type(made) is type(output)
        assert float(part(made, "logits").sum()) == 16
        assert float(part(output, "logits").sum()) == 8
        assert part(made, "cache") is CACHE


# ------------------------------------------------------------------------------------------------ image by image


def choosing(y: Tensor) -> Tensor:
    return y[1] if y[1] > y[2] else y[2]


@every_method
def test_a_callable_that_cannot_be_mapped_runs_image_by_image(method):
    """Such as one with `if` on values. The maximum can be mapped, and is the same."""
    for net, target in ((Net(), choosing), (Net(parts), lambda o: choosing(o["logits"]))):
        for of in (target, [target] * 3, 2 * T.named(target) - T.named(target)):
            close(maps(method, net, X, of), maps(method, Net(), X, lambda y: torch.maximum(y[1], y[2])))


@pytest.mark.parametrize("sweep", [Sweep(fold=False), Sweep(chunk=2)])
def test_a_sweep_of_it(sweep):
    close(maps("score_cam", Net(), X, choosing, sweep=sweep), maps("score_cam", Net(), X, lambda y: y[1:3].amax()))


def test_the_card_says_once_that_it_runs_image_by_image(recwarn):
    card = camfn.explain(Net(), "c", X, 2 * T.named([choosing, choosing, choosing]), method="grad_cam")
    said = [finding.sentence for finding in card.findings if finding.kind == "about the target"]
    assert said == ["the target (choosing) is run image by image: vmap cannot map it over them (RuntimeError)"]
    assert camfn.explain(Net(), "c", X, lambda y: y[1], method="grad_cam").notes == ()
    maps("grad_cam", Net(), X, choosing)
    assert not recwarn.list


# ------------------------------------------------------------------------------------------------------- messages


def test_shapes_of_parts():
    assert shown({"a": torch.ones(2, 3), "b": [torch.ones(()), None, "text"]}) == "{a: (2, 3), b: [(), None, str]}"
    assert shown(Thing(a=1)) == "Thing"
    assert shown(list(range(9))) == "[int, int, int, int, int, int, int, int, ...]"


SEGMENTED = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)).double()
WRONG = {
    "a class of a segmentation": (SEGMENTED, 1, ("the target is a class", "(3, 5, 6, 6)", "targets.segmentation")),
    "a class of detections": (Detector(), 1, ("without logits", "{boxes: (4, 4), labels: (4,)", "targets.boxes")),
    "a class of one output": (Net(k=1), 2, ("target 2 is not a class", "a single one", "targets.regression")),
    "a missing key": (
        Net(parts),
        lambda o: o["logit"],
        ("the target failed", "'logit'", "{logits: (3, 4), loss: (), texts: (3, 5), cache: Cache", "targets.regression"),
    ),
    "a missing key of detections": (Detector(), lambda o: o["mask"], ("the target failed", "'mask'", "targets.boxes")),
    "a result with axes": (SEGMENTED, lambda y: y[1], ("(t,)", "found shape (6, 6)", "(3, 5, 6, 6)", "targets.segmentation")),
    "no rows": (Net(lambda y: {"loss": y.mean()}), lambda o: o["loss"], ("no part", "each of the 3 images", "{loss: ()}")),
    "a regression of a segmentation": (SEGMENTED, T.regression(1), ("(n=3, k)", "(3, 5, 6, 6)", "targets.segmentation")),
    "a segmentation of classes": (Net(), T.segmentation(), ("(n=3, classes, *grid)", "(3, 4)", "targets.regression")),
    "boxes of a segmentation": (
        SEGMENTED,
        T.boxes(),
        ("targets.boxes", "returns Tensor, (3, 5, 6, 6)", "targets.segmentation"),
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_error_shows_the_parts_and_names_the_target_that_would_do(kind):
    net, target, words = WRONG[kind]
    with says(*words):
        camfn.grad_cam(net, "0" if net is SEGMENTED else "c", X, target)


# ------------------------------------------------------------------------------------------- images and their texts


class TwoTowers(Net):
    """Images and texts, in the forms of open_clip, and as similarities alone."""

    def __init__(self, form: str, bias: bool):
        super().__init__(k=5)
        self.e, self.form, self.bias = (
            nn.Embedding(9, 5, _weight=torch.randn(9, 5, generator=torch.Generator().manual_seed(3))),
            form,
            bias,
        )
        self.double()

    def forward(self, image: Tensor, text: Tensor):
        i, t = normalize(super().forward(image), dim=-1), normalize(self.e(text).mean(1), dim=-1)
        numbers = torch.tensor(30.0), *[torch.tensor(-2.0)] * self.bias
        if self.form == "tuple":
            return i, t, *numbers
        if self.form == "dict":
            return dict(zip(("image_features", "text_features", "logit_scale", "logit_bias"), (i, t, *numbers)))
        return {self.form: numbers[0] * i @ t.T - 2 * self.bias}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["tuple", "dict"])
@pytest.mark.parametrize("texts", [1, 2, 3, 4])
def test_features_and_a_scale_are_similarities(texts, form, bias):
    """With as many texts as images among others."""
    text = torch.arange(4 * texts).reshape(texts, 4) % 9
    found, plain = TwoTowers(form, bias), TwoTowers("logits_per_image", bias)
    for n in (1, 2, 3):
        x = X[:n], text
        for target in ("all", texts - 1, T.probability(0), [T.logit(texts - 1)] * n):
            for method in METHODS[:2]:
                close(maps(method, found, x, target), maps(method, plain, x, target), f"{method} {n} {target}")


def test_the_embedding_of_features_is_that_of_the_image():
    text = torch.zeros(3, 4, dtype=torch.long)
    e = torch.randn(5, generator=torch.Generator().manual_seed(5))
    for form in ("tuple", "dict"):
        found = camfn.explain(TwoTowers(form, False), "c", (X, text), T.similarity(e), method="grad_cam").scores
        close(found, camfn.explain(Net(k=5), "c", X, T.similarity(e), method="grad_cam").scores)


@pytest.mark.parametrize("target", [1, T.regression(1), T.contrast(1)])
def test_logits_with_other_logits_and_a_loss_are_not_taken_for_features(target):
    with says("[(3, 4), (3, 4), ()]", "image features", "other logits", "lambda output"):
        camfn.grad_cam(Net(lambda y: (y, 2 * y, y.mean())), "c", X, target)
    net = Net(lambda y: (y, 2 * y[:, :3], y.mean()))
    close(maps("grad_cam", net, X, 1), maps("grad_cam", Net(), X, 1))


# ------------------------------------------------------------------------------------------------ companion inputs


@pytest.mark.parametrize("method", [*METHODS, "recipro_cam"])
def test_a_companion_with_as_many_rows_as_images_is_shared_if_any_part_of_the_output_says_so(method):
    text = torch.arange(12).reshape(3, 4) % 9
    for n in (2, 3):
        x = X[:n], text[:n]
        found = maps(method, TwoTowers("sims", False), x, lambda o: o["sims"][1])
        alone = [maps(method, TwoTowers("sims", False), (X[i : i + 1], text[:n]), lambda o: o["sims"][1]) for i in range(n)]
        close(found, torch.cat(alone))


class Asked(Net):
    """A question for each image."""

    def forward(self, x: Tensor, question: Tensor):
        return {"answer": super().forward(x) * question, "question": question}


@every_method
def test_a_companion_with_a_row_for_each_image_goes_with_its_image(method):
    question = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)).double()
    found = maps(method, Asked(), (X, question), lambda o: o["answer"][1] + o["question"].sum())
    each = [(X[i : i + 1], question[i : i + 1]) for i in range(3)]
    close(found, torch.cat([maps(method, Asked(), x, lambda o: o["answer"][1] + o["question"].sum()) for x in each]))

"""Targets on segmentations, embeddings and detections, against plain loops over images, pixels, boxes."""

import dataclasses
import functools
import re

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import camfn
from camfn import Sweep, _compat
from tests.oracles.closeness import assert_close, close
from tests.oracles.libraries import torchvision_models
from tests.oracles.loops import grad_cam_loop, score_cam_loop
from tests.oracles.networks import inputs

T = camfn.targets
needs_compiler = pytest.mark.skipif(bool(_compat.can_compile()), reason="this torch cannot compile the kernel")


def says(*parts: str):
    return pytest.raises(camfn.CamError, match="(?s)" + ".*".join(map(re.escape, parts)))


def seeded(net: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    return net.double()


class Net(nn.Module):
    """`features` on a grid of half the size, and what a head makes of it."""

    def __init__(self, head: nn.Module, wrap=lambda y: y):
        super().__init__()
        self.features, self.act, self.head, self.wrap = nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Softplus(), head, wrap
        seeded(self)

    def forward(self, x: Tensor):
        return self.wrap(self.head(self.act(self.features(x))))


X = inputs(2, seed=5)
METHODS = {"score_cam": functools.partial(score_cam_loop, raw=True), "grad_cam": grad_cam_loop}
every_method = pytest.mark.parametrize("method", METHODS)


def holds(method: str, net: nn.Module, target, score, several: bool, x: Tensor = X) -> None:
    """The method's map for the target is the loop's for the score."""
    expected = METHODS[method](net, "features", x, lambda y, i: torch.stack(score(y, i)))
    found = camfn.METHODS[method].function(net, "features", x, target, normalize=False)
    close(found, expected if several else expected[:, 0])
    assert float(expected.abs().max()) > 1e-6


# ----------------------------------------------------------------------------------------------------- segmentation


def segmenter(classes: int = 4, wrap=lambda y: {"out": y, "aux": 2 * y}) -> Net:
    return Net(nn.Conv2d(5, classes, 1), wrap)


def marked(*corners: tuple[int, int, int, int], side: int = 4) -> Tensor:
    """Masks with a rectangle each."""
    masks = torch.zeros(len(corners), side, side, dtype=torch.bool)
    for mask, (top, left, bottom, right) in zip(masks, corners):
        mask[top:bottom, left:right] = True
    return masks


MASKS = marked((0, 0, 2, 3), (1, 1, 4, 4))
SOFT = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    SEGMENTED = segmenter()(X)["out"]  # (2, 4, 4, 4)
PREDICTED = SEGMENTED.argmax(1)
SHOWN = [int(PREDICTED[i].flatten().mode().values) for i in range(2)]  # a class that is predicted on the image


def over(y: Tensor, c: int, mask: Tensor) -> Tensor:
    """The mean of a class over a mask, pixel by pixel."""
    weights = [(float(mask[i, j]), y[c, i, j]) for i in range(4) for j in range(4)]
    return sum(weight * value for weight, value in weights) / sum(weight for weight, _ in weights)


def most(i: int, mask: Tensor) -> int:
    """The class that is predicted at most pixels of a mask."""
    return max(range(4), key=lambda c: int(((PREDICTED[i] == c) & mask).sum()))


LARGE = marked((0, 0, 4, 6), (2, 2, 8, 8), side=8)
SEGMENTATIONS = {
    "one mask": (T.segmentation(MASKS[0], 2), lambda y, i: [over(y, 2, MASKS[0])]),
    "one mask each": (T.segmentation(MASKS, 2), lambda y, i: [over(y, 2, MASKS[i])]),
    "masks in a list": (T.segmentation(list(MASKS), [1, 3]), lambda y, i: [over(y, [1, 3][i], MASKS[i])]),
    "a target each": ([T.segmentation(m, c) for m, c in zip(MASKS, (1, 3))], lambda y, i: [over(y, [1, 3][i], MASKS[i])]),
    "sum": (T.segmentation(MASKS, 2, reduce="sum"), lambda y, i: [over(y, 2, MASKS[i]) * MASKS[i].sum()]),
    "weights": (T.segmentation(SOFT, 1), lambda y, i: [over(y, 1, SOFT)]),
    "of no dtype of ours": (T.segmentation(MASKS[0].to(torch.uint8).numpy(), 1), lambda y, i: [over(y, 1, MASKS[0])]),
    "all classes": (T.segmentation(MASKS, "all"), lambda y, i: [over(y, c, MASKS[i]) for c in range(4)]),
    "a table": (
        T.segmentation(MASKS, torch.tensor([[0, 1], [3, 2]])),
        lambda y, i: [over(y, c, MASKS[i]) for c in [[0, 1], [3, 2]][i]],
    ),
    "its class": (T.segmentation(MASKS), lambda y, i: [over(y, most(i, MASKS[i]), MASKS[i])]),
    "where predicted": (T.segmentation(None, SHOWN), lambda y, i: [over(y, SHOWN[i], PREDICTED[i] == SHOWN[i])]),
    "where each is predicted": (
        T.segmentation(None, torch.tensor([[0, 1], [3, 1]])),
        lambda y, i: [over(y, c, PREDICTED[i] == c) for c in [[0, 1], [3, 1]][i]],
    ),
    "predicted": (T.segmentation(), lambda y, i: [over(y, SHOWN[i], PREDICTED[i] == SHOWN[i])]),
    "larger": (T.segmentation(LARGE, 2), lambda y, i: [over(y, 2, LARGE[i].double().reshape(4, 2, 4, 2).mean((1, 3)))]),
    "contrast": (
        T.segmentation(MASKS, 2) - T.segmentation(~MASKS, 2),
        lambda y, i: [over(y, 2, MASKS[i]) - over(y, 2, ~MASKS[i])],
    ),
}
SEVERAL = ("all classes", "a table", "where each is predicted")


@pytest.mark.parametrize("kind", SEGMENTATIONS)
@every_method
def test_a_segmentation(method, kind):
    target, score = SEGMENTATIONS[kind]
    holds(method, segmenter(), target, lambda y, i: score(y["out"], i), kind in SEVERAL)


def test_a_segmentation_of_a_single_channel_is_where_it_is_positive():
    net = segmenter(1, wrap=lambda y: y - y.mean())
    with torch.no_grad():
        there = net(X)[:, 0] > 0
    assert 0 < int(there[0].sum()) < 16
    holds("grad_cam", net, T.segmentation(None, 0), lambda y, i: [over(y, 0, there[i])], False)


@pytest.mark.parametrize("dims", [1, 3])
def test_a_segmentation_of_any_number_of_axes(dims):
    y = torch.randn(2, 3, *(4,) * dims)
    mask = torch.rand(2, *(8,) * dims) > 0.4
    score = T.resolve(T.segmentation(mask, 1), y, 2, y.device)
    small = mask.float().unfold(1, 2, 2).mean(-1)
    for axis in range(2, dims + 1):
        small = small.unfold(axis, 2, 2).mean(-1)
    expected = [(y[i, 1] * small[i]).sum() / small[i].sum() for i in range(2)]
    assert_close(T.score_rows(score.of, y, score.rows)[:, 0], torch.stack(expected), 1e-6)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_segmentation_of_an_output_of_another_size(reduce):
    """Which CAMERAS makes of the input at other sizes: the mask goes with the picture."""
    score = T.resolve(T.segmentation(MASKS, 2, reduce=reduce), SEGMENTED, 2, X.device)
    y, masks = torch.randn(2, 4, 8, 8, dtype=torch.float64), MASKS.repeat_interleave(2, 1).repeat_interleave(2, 2)
    expected = (y[:, 2] * masks).sum((1, 2)) / (masks.sum((1, 2)) if reduce == "mean" else 1)
    close(T.score_rows(score.of, y, score.rows)[:, 0], expected)
    maps = camfn.cameras(segmenter(), "features", X, T.segmentation(MASKS, 2, reduce=reduce), factors=(2.0,), relu=False)
    assert maps.shape == (2, 8, 8)


def test_the_name_of_a_segmentation():
    score = T.resolve(T.segmentation(MASKS, torch.tensor([[0, 1], [2, 3]])), SEGMENTED, 2, X.device)
    assert T.names(score, 2)[0] == ("mean of logit 0 over 6 pixels", "mean of logit 1 over 6 pixels")
    assert T.names(score, 2)[1] == ("mean of logit 2 over 9 pixels", "mean of logit 3 over 9 pixels")
    score = T.resolve(T.segmentation(LARGE, 1, reduce="sum") - T.segmentation(MASKS, 0), SEGMENTED, 2, X.device)
    assert T.names(score)[1] == ("sum of logit 1 over 9 pixels - mean of logit 0 over 9 pixels",)


WRONG_MASKS = {
    "no numbers": ("a cat", 1, ("mask 'a cat' cannot be made a tensor",)),
    "axes": (torch.ones(1, 1, 4, 4), 1, ("a mask with 2 axes", "grid (4, 4)", "n=2", "(1, 1, 4, 4)")),
    "images": (torch.ones(3, 4, 4), 1, ("n=2 of them", "(3, 4, 4)")),
    "a list of another length": ([torch.ones(4, 4)], 1, ("n=2 of them", "1 masks")),
    "shape": (torch.ones(8, 6), 1, ("mask's size (8, 6)", "grid (4, 4)", "as the input was")),
    "empty": (marked((0, 0, 0, 0), (0, 0, 1, 1)), 1, ("mask 0 is empty",)),
    "classes": (torch.arange(16).reshape(4, 4) % 4 * 7, 1, ("mask 0 has values from 0 to 21", "labels == c")),
    "negative": (-torch.ones(4, 4), 1, ("values from -1 to -1",)),
    "NaN": (torch.full((4, 4), torch.nan), 1, ("mask 0 has values from nan",)),
    "class too high": (MASKS, 4, ("target 4 is not a class", "0 to 3")),
    "class negative": (MASKS, [0, -1], ("target -1 is not a class",)),
    "predicted nowhere": (None, 3, ("class 3 is predicted nowhere on image 1", "mask=")),
}


@pytest.mark.parametrize("kind", WRONG_MASKS)
def test_a_wrong_mask(kind):
    mask, c, words = WRONG_MASKS[kind]
    y = SEGMENTED.clone()
    y[1, 3] = -100
    y[0, 3, 0, 0] = 100
    with says(*words):
        T.resolve(T.segmentation(mask, c), y, 2, y.device)


def test_a_wrong_reduction_and_an_output_without_positions():
    with says("reduce='max'", '"mean" or "sum"'):
        T.segmentation(None, 1, reduce="max")
    with says("targets.segmentation", "(n=2, classes, *grid)", "(2, 4)"):
        T.resolve(T.segmentation(None, 1), torch.zeros(2, 4), 2, X.device)


# ----------------------------------------------------------------------------------------------------- similarity


@dataclasses.dataclass
class Embedded:
    image_embeds: Tensor
    hidden: Tensor | None = None


POOLED = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3))
WRAPS = {  # how a model may give an embedding, and how it is read
    "a tensor": (lambda y: y, lambda out: out),
    "a tensor of one position": (lambda y: y[..., None, None], lambda out: out[:, 0, 0]),
    "a record": (Embedded, None),
    "a mapping": (lambda y: {"last_hidden_state": y * y, "pooler_output": y}, lambda out: out["pooler_output"]),
    "a tuple": (lambda y: (y, y * y), lambda out: out[0]),
}
GIVEN = torch.randn(2, 3, generator=torch.Generator().manual_seed(3))
SEVERAL_GIVEN = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(4))


def cosine(y: Tensor, e: Tensor) -> Tensor:
    e = e.double()
    return (y * e).sum() / ((y * y).sum() * (e * e).sum()).sqrt()


SIMILARITIES = {
    "one": (T.similarity(GIVEN[0]), lambda y, i: [cosine(y, GIVEN[0])]),
    "one each": (T.similarity(GIVEN), lambda y, i: [cosine(y, GIVEN[i])]),
    "a target each": ([T.similarity(e) for e in GIVEN], lambda y, i: [cosine(y, GIVEN[i])]),
    "several each": (T.similarity(SEVERAL_GIVEN), lambda y, i: [cosine(y, e) for e in SEVERAL_GIVEN[i]]),
    "one over another": (
        T.similarity(GIVEN[0]) - T.similarity(GIVEN[1]),
        lambda y, i: [cosine(y, GIVEN[0]) - cosine(y, GIVEN[1])],
    ),
}


@pytest.mark.parametrize("kind", SIMILARITIES)
@every_method
def test_a_similarity(method, kind):
    target, score = SIMILARITIES[kind]
    holds(method, Net(POOLED), target, score, kind == "several each")


@pytest.mark.parametrize("kind", WRAPS)
@every_method
def test_an_embedding_is_found_in_every_kind_of_output(method, kind):
    function = functools.partial(camfn.METHODS[method].function, layer="features", x=X, normalize=False)
    expected = function(Net(POOLED), target=T.similarity(GIVEN))
    assert_close(function(Net(POOLED, WRAPS[kind][0]), target=T.similarity(GIVEN)), expected, 0)


def test_the_likeness_of_an_image_to_itself_is_one():
    net = Net(POOLED)
    with torch.no_grad():
        y = net(X)
    close(camfn.explain(net, "features", X, T.similarity(y)).scores, torch.ones(2, 1))
    close(camfn.explain(net, "features", X, -2 * T.similarity(-3 * y)).scores, 2 * torch.ones(2, 1))


WRONG_EMBEDDINGS = {
    "size": (torch.ones(4), ("(4,)", "the model's have (2, 3)", "(3,) is one for all")),
    "images": (torch.ones(3, 3), ("(3, 3)", "(2, 3) one per image", "expand")),
    "several for other images": (torch.ones(4, 2, 3), ("(4, 2, 3)", "(2, t, 3) several per image")),
    "zero": (torch.zeros(3), ("zero or not finite", "no direction")),
    "NaN": (torch.tensor([[1.0, 2.0, 3.0], [1.0, torch.nan, 0.0]]), ("zero or not finite",)),
    "axes": (torch.ones(1, 1, 1, 3), ("(d,), (n, d) or (n, t, d)", "(1, 1, 1, 3)")),
    "whole": (torch.ones(3).long(), ("floating-point", "torch.int64")),
    "list": ([1.0, 2.0, 3.0], ("floating-point tensor", "found list")),
}


@pytest.mark.parametrize("kind", WRONG_EMBEDDINGS)
def test_a_wrong_embedding(kind):
    embedding, words = WRONG_EMBEDDINGS[kind]
    with says(*words):
        camfn.grad_cam(Net(POOLED), "features", X, T.similarity(embedding))


@pytest.mark.filterwarnings("ignore")
def test_text_and_image():
    """CLIP: the score of a text is its logit, less the temperature; texts are no samples, and are there in any number."""
    torchvision_models()
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**tower, **text}, vision_config={**tower, "image_size": 16, "patch_size": 4}, projection_dim=8
    )
    model = seeded(transformers.CLIPModel(config)).eval()
    ids = torch.tensor([[0, 5, 9, 2], [0, 7, 7, 2], [0, 30, 11, 2]])
    x = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double(), "input_ids": ids}
    with torch.no_grad():
        texts = model(**x).text_embeds
    run = functools.partial(camfn.grad_cam, model, "vision_model.embeddings.patch_embedding", x, normalize=False, relu=False)
    every = run(T.similarity(texts.expand(2, -1, -1)))
    assert every.shape == (2, 3, 4, 4)
    close(run("all") / model.logit_scale.detach().exp(), every)
    close(run([T.similarity(texts[2]), T.similarity(texts[0])]), every[[0, 1], [2, 0]])
    one = {**x, "pixel_values": x["pixel_values"][:1]}
    swept = functools.partial(camfn.METHODS["score_cam"].run, model, "vision_model.embeddings.patch_embedding", one)
    weights = swept(T.similarity(texts[None])).weights[0].log() * model.logit_scale.detach().exp()
    close(swept("all").weights[0], weights.softmax(-1))


# ----------------------------------------------------------------------------------------------------- detections


class Detector(nn.Module):
    """A box around each of 16 cells whose score is above a half: any number of them, as the image has it."""

    def __init__(self, threshold: float = 0.4):
        super().__init__()
        self.features, self.act, self.head = nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Softplus(), nn.Conv2d(5, 8, 1)
        self.threshold = threshold
        seeded(self, 2)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        y = self.head(self.act(self.features(x))).flatten(2).mT  # (n, 16, 8)
        at = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).to(y) * 2 + 1
        corners = torch.cat([at - 1.2 - y[..., :2].sigmoid(), at + 1.2 + y[..., 2:4].sigmoid()], -1)
        scores, labels = y[..., 4].sigmoid(), y[..., 5:].argmax(-1) + 1
        keep = [s > self.threshold for s in scores]
        return [{"boxes": b[k], "labels": c[k], "scores": s[k]} for b, c, s, k in zip(corners, labels, scores, keep)]


DETECTOR = Detector()
with torch.no_grad():
    FOUND = DETECTOR(X)


def iou(a: list[float], b: Tensor) -> Tensor:
    width = torch.minimum(b[2], b.new_tensor(a[2])) - torch.maximum(b[0], b.new_tensor(a[0]))
    height = torch.minimum(b[3], b.new_tensor(a[3])) - torch.maximum(b[1], b.new_tensor(a[1]))
    if width <= 0 or height <= 0:
        return 0 * b.sum()
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def best(y: dict[str, Tensor], box: Tensor, label: int) -> Tensor:
    """The loop: the largest product of overlap and score among the detections of the label."""
    each = [iou(box.tolist(), b) * s for b, c, s in zip(y["boxes"], y["labels"], y["scores"]) if int(c) == label]
    return max(each, default=0 * y["scores"].sum())


def first(i: int, count: int) -> tuple[Tensor, Tensor]:
    """Some of what was found on an image, moved a little."""
    return FOUND[i]["boxes"][:count] + 0.3, FOUND[i]["labels"][:count]


def score_of(boxes, labels):
    return lambda y, i: [sum(best(y, box, int(c)) for box, c in zip(boxes[i], labels[i]))]


TWO, THREE = first(0, 2), first(1, 3)
RAGGED = [TWO[0], THREE[0]], [TWO[1], THREE[1]]
SAME = [first(0, 2)[0], first(1, 2)[0]], [first(0, 2)[1], first(1, 2)[1]]
WIDE = torch.tensor([0.0, 0.0, 8.0, 8.0])
TOP = [int(found["scores"].argmax()) for found in FOUND]
COMMON = next(c for c in (1, 2, 3) if all(c in found["labels"] for found in FOUND))
DETECTIONS = {
    "boxes of each image": (T.boxes(*RAGGED), score_of(*RAGGED)),
    "a target each": ([T.boxes(*TWO), T.boxes(*THREE)], score_of(*RAGGED)),
    "in one tensor": (T.boxes(torch.stack(SAME[0]), torch.stack(SAME[1])), score_of(*SAME)),
    "each box": (
        T.boxes(*SAME, each=True),
        lambda y, i: [best(y, box, int(c)) for box, c in zip(SAME[0][i], SAME[1][i])],
    ),
    "one box for all": (T.boxes(WIDE, COMMON), score_of([WIDE[None]] * 2, [[COMMON]] * 2)),
    "in lists": (
        T.boxes([[0, 0, 8, 8], [1, 1, 5, 8]], COMMON),
        score_of([torch.tensor([[0, 0, 8, 8], [1, 1, 5, 8]])] * 2, [[COMMON] * 2] * 2),
    ),
    "the best found": (T.boxes(), lambda y, i: [best(y, FOUND[i]["boxes"][TOP[i]], int(FOUND[i]["labels"][TOP[i]]))]),
    "the best found on each": (
        [T.boxes(), T.boxes()],
        lambda y, i: [best(y, FOUND[i]["boxes"][TOP[i]], int(FOUND[i]["labels"][TOP[i]]))],
    ),
    "a difference": (
        T.boxes(WIDE, COMMON) - 0.5 * T.boxes(*RAGGED),
        lambda y, i: [score_of([WIDE[None]] * 2, [[COMMON]] * 2)(y, i)[0] - 0.5 * score_of(*RAGGED)(y, i)[0]],
    ),
}


def test_the_detector_finds_another_number_on_every_image_and_under_masks():
    counts = [len(found["scores"]) for found in FOUND]
    masked = [len(found["scores"]) for found in DETECTOR(X * (torch.arange(8) < 4))]
    assert len(set(counts)) == 2
    assert set(counts) != set(masked)
    assert all(0.05 < float(best(FOUND[i], b, int(c))) < 0.9 for i, pair in enumerate((TWO, THREE)) for b, c in zip(*pair))


@pytest.mark.parametrize("kind", DETECTIONS)
@every_method
def test_boxes(method, kind):
    target, score = DETECTIONS[kind]
    holds(method, DETECTOR, target, score, kind == "each box")


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_boxes_in_chunks(chunk):
    run = functools.partial(camfn.score_cam, DETECTOR, "features", X, T.boxes(*RAGGED), normalize=False)
    close(run(sweep=Sweep(chunk=chunk)), run())


def test_no_detection_is_a_score_of_zero():
    score = T.resolve(T.boxes(*RAGGED), FOUND, 2, X.device)
    none = {name: part[:0] for name, part in FOUND[0].items()}
    others = {**FOUND[1], "labels": FOUND[1]["labels"] + 10}
    assert T.score_rows(score.of, [none, others], score.rows).tolist() == [[0.0], [0.0]]


def test_boxes_that_touch_or_have_no_area_do_not_overlap():
    found = [{"boxes": torch.tensor([[4.0, 0, 8, 8], [1, 1, 1, 1]]), "labels": torch.tensor([1, 1]), "scores": torch.ones(2)}]
    score = T.resolve(T.boxes([[0, 0, 5, 8]], 1), found, 1, X.device)
    moved = [{**found[0], "boxes": found[0]["boxes"] + torch.tensor([1.0, 0, 1, 0])}]
    assert_close(T.score_rows(score.of, found, score.rows), torch.tensor([[8 / 64]]), 1e-7)
    assert T.score_rows(score.of, moved, score.rows).tolist() == [[0.0]]
    boxes = [torch.tensor([[0.0, 0, 5, 8]]), torch.tensor([[0.0, 0, 5, 8], [4, 0, 8, 8]])]  # the first is filled up
    score = T.resolve(T.boxes(boxes, 1), found * 2, 2, X.device)
    assert_close(T.score_rows(score.of, found * 2, score.rows), torch.tensor([[8 / 64], [8 / 64 + 1]]), 1e-7)


def test_the_names_of_boxes():
    boxes = [torch.tensor([[0.0, 1, 20, 30]]), torch.tensor([[0.0, 1, 20, 30], [2, 2, 9, 9.6]])]
    found = [{"boxes": b, "labels": torch.tensor([7, 8])[: len(b)], "scores": torch.ones(len(b))} for b in boxes]
    score = T.resolve(T.boxes(boxes, [[7], [7, 8]]), found, 2, X.device)
    assert T.names(score) == (("label 7 in (0, 1, 20, 30)",), ("label 7 in (0, 1, 20, 30) + label 8 in (2, 2, 9, 10)",))
    score = T.resolve(T.boxes([boxes[1]], [[7, 8]], each=True), found[1:], 1, X.device)
    assert T.names(score, 2) == (("label 7 in (0, 1, 20, 30)", "label 8 in (2, 2, 9, 10)"),)
    score = T.resolve(T.boxes(boxes[0].repeat(5, 1), 7), found, 2, X.device)
    assert T.names(score)[0][0].endswith("label 7 in (0, 1, 20, 30) + 2 more")


WRONG_BOXES = {
    "no labels": (lambda: T.boxes(WIDE), ("boxes and labels, or neither",)),
    "shape": (lambda: T.boxes([[0, 0, 4]], [1]), ("(m, 4) boxes", "(1, 3)")),
    "labels of no class": (lambda: T.boxes(WIDE, 1.0), ("integer labels", "torch.float32")),
    "labels of another number": (lambda: T.boxes(WIDE, [1, 2]), ("1 boxes and 2 labels",)),
    "images": (lambda: T.boxes([WIDE[None]] * 3, [[1]] * 3), ("boxes for 3 images", "a batch of 2")),
    "labels of other images": (lambda: T.boxes([WIDE[None]] * 2, [[1]] * 3), ("labels for 3",)),
    "in one image": (lambda: T.boxes([WIDE[None], WIDE[None, :3]], 1), ("targets.boxes for image 1", "(1, 3)")),
    "none in one image": (lambda: T.boxes([WIDE[None], torch.zeros(0, 4)], 1), ("image 1", "has 0 boxes")),
    "no numbers": (lambda: T.boxes("a cat", 1), ("targets.boxes: boxes 'a cat' cannot be made a tensor",)),
    "upside down": (lambda: T.boxes([0, 8, 8, 0], 1), ("image 0", "x1 < x2 and y1 < y2")),
    "NaN": (lambda: T.boxes([0, 0, 8, float("nan")], 1), ("x1 < x2",)),
    "negative label": (lambda: T.boxes(WIDE, -1), ("image 0: -1 is not a label",)),
    "label that is not found": (lambda: T.boxes(WIDE, 99), ("image 0: no detection", "[99]", "labels found are", "pixels")),
    "place where nothing is": (lambda: T.boxes([90, 90, 95, 95], COMMON), ("image 0: no detection", "[90, 90, 95, 95]")),
    "one place of two": (
        lambda: T.boxes([[0, 0, 8, 8], [90, 90, 95, 95]], COMMON, each=True),
        ("image 0: no detection", "overlaps [[90, 90, 95, 95]]"),
    ),
    "each of different numbers": (lambda: T.boxes(*RAGGED, each=True), ("each=True) of [2, 3] boxes",)),
}


@pytest.mark.parametrize("kind", WRONG_BOXES)
def test_wrong_boxes(kind):
    make, words = WRONG_BOXES[kind]
    with says(*words):
        T.resolve(make(), FOUND, 2, X.device)


def test_boxes_of_what_is_no_detector():
    none = {name: part[:0] for name, part in FOUND[0].items()}
    for output, words in (
        (SEGMENTED, ("a list with one mapping", "boxes, labels, scores", "returns Tensor")),
        ([SEGMENTED[0]], ("returns a list with Tensor",)),
        ([{"boxes": WIDE, "masks": WIDE}], ("returns a list with boxes, masks",)),
        ([FOUND[0], none], ("the best detection", "image 1 has none")),
    ):
        with says("targets.boxes", *words):
            T.resolve(T.boxes(), output, len(output), X.device)


# ------------------------------------------------------------------------------------------- how they are executed


@needs_compiler
def test_one_graph_serves_all_masks(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter, real = CompileCounter(), _compat.compiled
    monkeypatch.setattr(_compat, "compiled", lambda function: real(function, backend=counter))
    torch._dynamo.reset()
    net = camfn.prepare(segmenter())
    for target in (T.segmentation(MASKS, 2), T.segmentation(SOFT, [1, 3]), T.segmentation(None, SHOWN)):
        run = functools.partial(camfn.score_cam, net, "features", X, target, normalize=False)
        close(run(sweep=Sweep(compile=True)), run(sweep=Sweep(compile=False)))
    assert counter.frame_count == 1
    torch._dynamo.reset()


EXECUTED = {
    "segmentation": (segmenter(), T.segmentation(MASKS[0], [2])),
    "predicted part": (segmenter(), T.segmentation()),
    "similarity": (Net(POOLED), T.similarity(GIVEN[0])),
    "a sum": (Net(POOLED), T.similarity(GIVEN[0]) - T.regression(1)),
    "a list": (Net(POOLED), [T.similarity(GIVEN[0])]),
}


@pytest.mark.parametrize("kind", [*EXECUTED, "boxes"])
def test_a_sweep_of_a_part_or_mapped_through_the_model_is_the_sweep(kind):
    net, target = EXECUTED[kind] if kind in EXECUTED else (DETECTOR, T.boxes(*THREE))
    run = functools.partial(camfn.score_cam, net, "features", X[1:], target, normalize=False)
    assert_close(run(tolerance=1e-9), run(), 1e-9)
    if kind != "boxes":  # which is no tensor
        close(run(sweep=Sweep(fold=False, chunk=2)), run())


@pytest.mark.parametrize("kind", EXECUTED)
@every_method
def test_mapping_over_inputs_is_the_batch(method, kind):
    net, target = EXECUTED[kind]
    run = functools.partial(camfn.METHODS[method].function, net, "features", normalize=False, relu=False)
    found = vmap(lambda one: run(one[None], target)[0])(X)
    close(found, torch.cat([run(one[None], target) for one in X]))


@pytest.mark.parametrize("kind", EXECUTED)
@every_method
def test_maps_can_be_differentiated(method, kind):
    net, target = EXECUTED[kind]
    x, direction, step = X[:1], inputs(1, seed=8), 1e-6

    def total(x: Tensor) -> Tensor:
        maps = camfn.METHODS[method].function(net, "features", x, target, normalize=False, relu=False)
        return (maps * torch.linspace(-1, 2, 16, dtype=x.dtype).reshape(1, 4, 4)).sum()

    expected = (total(x + step * direction) - total(x - step * direction)) / (2 * step)
    assert expected.abs() > 1e-4
    assert_close((grad(total)(x) * direction).sum(), expected, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_narrow_outputs_are_wide(dtype):
    narrow = [{name: part.to(dtype) if part.is_floating_point() else part for name, part in found.items()} for found in FOUND]
    given = (
        (T.segmentation(MASKS, 2, reduce="sum"), SEGMENTED.to(dtype), SEGMENTED.to(dtype).float()),
        (T.similarity(GIVEN), SEGMENTED[:, 0, 0, :3].to(dtype), SEGMENTED[:, 0, 0, :3].to(dtype).float()),
        (T.boxes(*RAGGED), narrow, [{name: part.float() for name, part in found.items()} for found in narrow]),
    )
    for target, output, wide in given:
        score, same = (T.resolve(target, y, 2, X.device) for y in (output, wide))
        found = T.score_rows(score.of, output, score.rows)
        assert found.dtype == torch.float32
        assert_close(found, T.score_rows(same.of, wide, same.rows), 1e-5)

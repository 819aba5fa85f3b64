"""Which tokens of a layer are a grid, from forward passes of changed inputs."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import camfn
from camfn import CamError, layouts
from camfn.model import positions

C = 8


class Tokens(nn.Module):
    """Patches and other tokens, in several orders, mixed by attention. The layer is `mark`."""

    def __init__(self, kind: str, seed: int, depth: int = 1, queries: int = 16, only: int | None = None):
        super().__init__()
        torch.manual_seed(seed)
        block = nn.TransformerEncoderLayer
        self.kind, self.only = kind, only
        self.patches, self.norm = nn.Conv2d(3, C, 4, 4), nn.BatchNorm2d(C)
        self.others, self.asked = nn.Parameter(torch.randn(1, 3, C)), nn.Parameter(torch.randn(1, queries, C))
        self.blocks = nn.ModuleList(block(C, 2, 16, dropout=0.0, batch_first=True) for _ in range(depth))
        self.ask, self.learn = nn.MultiheadAttention(C, 2, batch_first=True), nn.Linear(C, queries)
        self.mark, self.fc = nn.LayerNorm(C), nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        assert self.only in (None, len(x)), "another batch size"
        z, others = self.norm(self.patches(x)).flatten(2).mT, self.others.expand(len(x), -1, -1)
        z = torch.cat([others[:, : SPLITS[self.kind][0]], z, others[:, : SPLITS[self.kind][1]]], 1)
        for block in self.blocks:
            z = block(z)
        queries = self.asked.expand(len(x), -1, -1)
        if self.kind in ("queries", "detection tokens"):
            found = self.ask(queries, z, z, need_weights=False)[0]
            z = found if self.kind == "queries" else torch.cat([z, found], 1)
        elif self.kind == "learned tokens":
            z = self.learn(z).softmax(1).mT @ z
        elif self.kind == "means":
            z = z.mean(1, keepdim=True) + queries
        z = self.mark(z.transpose(0, 1)).transpose(0, 1) if self.kind == "sequence first" else self.mark(z)
        return self.fc(z.tanh().mean(1))


SPLITS = {
    **dict.fromkeys(("patches", "sequence first", "queries", "learned tokens", "means", "detection tokens"), (0, 0)),
    "before": (3, 0),
    "after": (0, 3),
    "between": (1, 2),
}
NO_GRID = "its positions do not follow those of the input"


def picture(sides: tuple[int, int], n: int = 2) -> Tensor:
    return torch.randn(n, 3, *sides, generator=torch.Generator().manual_seed(1))


def found(model: nn.Module, x: Tensor, **options) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", camfn.CamWarning)
        return camfn.mean_cam(model.eval(), "mark", x, 1, normalize=False, relu=False, **options)


def expected(model: Tokens, x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The mean of the channels on the grid, by a plain hook."""
    kept = []
    handle = model.eval().mark.register_forward_hook(lambda module, args, out: kept.append(out.detach()))
    model(x)
    handle.remove()
    first, tokens = SPLITS[model.kind][0], kept[0].transpose(0, 1) if model.kind == "sequence first" else kept[0]
    return tokens[:, first : first + grid[0] * grid[1]].unflatten(1, grid)


GRIDS = [(8, 8), (16, 16), (16, 24), (56, 56)]


@pytest.mark.parametrize("sides", GRIDS)
@pytest.mark.parametrize("kind", ["patches", "before", "after", "between", "sequence first", "detection tokens"])
def test_the_grid_is_found_wherever_it_lies(kind, sides):
    """The weights of `mean_cam` are the same for all channels: the sum of the channels is compared."""
    grid, few = (sides[0] // 4, sides[1] // 4), sides == (56, 56)
    for seed in range(2 if few else 20):
        model, x = Tokens(kind, seed, depth=1 + seed % 3), picture(sides)
        if kind == "detection tokens" and sides == (8, 8):
            continue  # sixteen tokens after four patches: no shape that is tried
        ours = found(model, x)
        theirs = expected(model, x, grid).sum(3)
        scale = ours.flatten().dot(theirs.flatten()) / theirs.square().sum()
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, scale * theirs, atol=1e-5), f"seed {seed}"


@pytest.mark.parametrize("kind", ["queries", "learned tokens", "means"])
def test_tokens_that_no_position_made_are_no_grid(kind):
    """As many as there are patches, so that their shape says nothing."""
    for seed in range(20):
        model, x = Tokens(kind, seed, depth=1 + seed % 3), picture((16, 16))
        with pytest.raises(CamError, match=NO_GRID):
            found(model, x)
    told = found(model, x, layout=layouts.tokens((4, 4), 0, 0))  # who says so is believed
    assert told.shape == (2, 4, 4)
    assert all(layer.name != "mark" for layer in camfn.candidate_layers(model, x))


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("kind", ["before", "after", "queries"])
def test_any_number_of_images_gives_the_same_reading(kind, n):
    model, x = Tokens(kind, 0, only=n), picture((16, 16), n)  # and a model that takes no other number
    if kind == "queries":
        with pytest.raises(CamError, match=NO_GRID):
            found(model, x)
    else:
        theirs = found(model, x, layout=layouts.tokens((4, 4), *SPLITS[kind]))
        assert torch.equal(found(model, x), theirs)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["before", "after", "sequence first"])
def test_a_constant_input_is_read_as_any_other(kind, value):
    model, x = Tokens(kind, 1), torch.full((2, 3, 16, 16), value)
    layer = camfn.explain(model.eval(), "mark", x, 1, method="mean_cam", normalize=False, relu=False)
    assert layer.grids == ((4, 4),)
    assert torch.equal(layer.maps, found(model, x, layout=layouts.tokens((4, 4), *SPLITS[kind])))


def test_patches_with_a_rest():
    """The last pixels of each side are in no patch."""
    for kind in ("patches", "before", "after"):
        model, x = Tokens(kind, 2), picture((18, 27))
        assert torch.equal(found(model, x), found(model, x, layout=layouts.tokens((4, 6), *SPLITS[kind])))


@pytest.mark.filterwarnings("ignore:2 of 2 maps at layer 'mark' are what is left:camfn.CamWarning")  # a norm's mean is 0
def test_a_batch_norm_in_train_mode_keeps_its_statistics():
    model, x = Tokens("after", 3).train(), picture((16, 16))
    kept = model.norm.running_mean.clone()
    camfn.mean_cam(model, "mark", x, 1)
    assert torch.equal(model.norm.running_mean, kept)
    assert model.norm.training


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_reading_is_the_same_under_a_transform():
    model, x = Tokens("after", 4).eval(), picture((16, 16))
    one = torch.func.vmap(lambda image: camfn.grad_cam(model, "mark", image[None], 1)[0])
    assert torch.allclose(one(x), camfn.grad_cam(model, "mark", x, 1), atol=1e-5)


def rows_of_windows(z: Tensor) -> Tensor:
    side = int(z.shape[1] ** 0.5) // 2
    return z.unflatten(1, (2, 2, side, side)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def rows_of_columns(z: Tensor) -> Tensor:
    side = int(z.shape[1] ** 0.5)
    return z.mT.unflatten(2, (side, side)).mT


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("windows", [True, False])
def test_tokens_in_another_order_than_that_of_rows_are_no_grid(windows, side):
    """Their number is right, and some of them are at their place."""

    class Ordered(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            z = self.patches(x)
            half = z.shape[2] // 2
            if windows:
                z = z.unflatten(2, (2, half)).unflatten(4, (2, half)).permute(0, 2, 4, 3, 5, 1).flatten(1, 4)
            else:
                z = z.mT.flatten(2).mT
            return self.fc(self.mark(z).tanh().mean(1))

    for seed in range(10):
        model, x = Ordered("patches", seed), picture((side, side))
        with pytest.raises(CamError, match=NO_GRID):
            found(model, x)
    in_rows = found(model, x, layout=rows_of_windows if windows else rows_of_columns)
    kept = model.patches(x).permute(0, 2, 3, 1)
    theirs = model.mark(kept).sum(3).detach()
    scale = in_rows.flatten().dot(theirs.flatten()) / theirs.square().sum()
    assert torch.allclose(in_rows, scale * theirs, atol=1e-5)


@pytest.mark.parametrize("kind", ["before", "after"])
def test_the_default_device_does_not_matter(kind):
    """Nor is anything of it kept for later calls."""
    model, x = Tokens(kind, 0), picture((16, 24))
    positions._random_orders.cache_clear()
    positions._usual_orders.cache_clear()
    with torch.device("meta"):
        first = found(model, x)
    assert torch.equal(first, found(model, x))

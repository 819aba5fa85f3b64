"""The exact cuts: rows that need not be swept are not, which is counted, and the result is what it was with them."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import camfn
from tests.oracles.closeness import close

SEEN: list[Tensor] = []  # every input of every forward; a global, since camfn copies all that the model itself holds
PLAIN = camfn.Sweep(chunk=32, fold=True, compile=False)
CHANNELS, SIDE, CLASSES = 6, 8, 4
RECIPES = ("torchcam", "pytorch-grad-cam", "authors", "paper")
FLATS = {0: (), 1: (3,), 3: (0, 2, 5), 6: (0, 1, 2, 3, 4, 5)}


@pytest.fixture(autouse=True)
def as_it_is(monkeypatch):
    """The forward that checks a model rewritten for a long sweep is tested with the rewriting."""
    monkeypatch.setattr(camfn.sweep.runner, "_WORTH", 10**6)


class Counted(nn.Module):
    """Channel k of `features` is a function of input channel k alone: constant there, constant here."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = nn.Conv2d(CHANNELS, CHANNELS, 2, stride=2, groups=CHANNELS)
        self.more = nn.Conv2d(CHANNELS, 3, 3, padding=1)
        self.fc = nn.Linear(3 * (SIDE // 2) ** 2, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)
            self.fc.weight.mul_(0.3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x.detach().clone())
        return self.fc(torch.tanh(self.more(torch.tanh(self.features(x)))).flatten(1))


def images(*flats: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """An image for each tuple, with those channels constant, one of them 0."""
    x = torch.randn(len(flats), CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for image, flat in zip(x, flats):
        for i, k in enumerate(flat):
            image[k] = 0.6 * i
    return x.to(dtype)


def rows_of(x: Tensor, run) -> tuple[Tensor, object]:
    """What the model sees beside the one clean forward, and what `run` returns."""
    SEEN.clear()
    result = run()
    rows = torch.cat(SEEN)
    assert torch.equal(SEEN[0], x), "the first forward is the clean one"
    assert not any(torch.equal(row, image) for row in rows[len(x) :] for image in x), "the clean image is run once"
    return rows[len(x) :], result


def expected_rows(x_flats, draws: int = 1, recipe: str = "torchcam") -> int:
    shared = 0 if recipe == "authors" else 1
    return sum((CHANNELS - len(flat)) * draws + (shared if flat else 0) for flat in x_flats)


def zeros_in(rows: Tensor) -> int:
    return int((rows == 0).flatten(1).all(1).sum())


def raw(method: str, x: Tensor, target=1, **options):
    """A method's outcome on the counted network: raw maps, in a plain sweep."""
    return camfn.METHODS[method].run(Counted(x.dtype), "features", x, target, sweep=PLAIN, normalize=False, **options)


def loop(x: Tensor, c: int, recipe: str, coefficients=(1.0,), noise_of=None) -> Tensor:
    """Every channel, every draw, no cut: `noise_of(i, k, masked)` is added to the masked input."""
    net = Counted(x.dtype).requires_grad_(False)
    channels = net.features(x)
    maps = []
    for image, activation in zip(x, channels):
        masks = [mask(a, recipe) for a in activation]
        scores = []
        for k, m in enumerate(masks):
            rows = [a * image * m for a in coefficients]
            rows = [row + noise_of(i, k, row) for i, row in enumerate(rows)] if noise_of else rows
            logits = net(torch.stack(rows))
            scores.append((logits.softmax(1) if recipe == "authors" else logits)[:, c].mean())
        kept = torch.tensor([recipe != "authors" or not flat(a) for a in activation])
        weights = torch.stack(scores) * kept if recipe == "authors" else torch.stack(scores).softmax(0)
        maps.append(torch.einsum("k,khw->hw", weights, activation).clamp(min=0))
    return torch.stack(maps)


def flat(values: Tensor) -> bool:
    return bool(values.max() - values.min() <= 1e-13 * values.abs().max())


def mask(a: Tensor, recipe: str) -> Tensor:
    def up(values):
        aligned = recipe == "pytorch-grad-cam"
        return nn.functional.interpolate(values[None, None], (SIDE, SIDE), mode="bilinear", align_corners=aligned)[0, 0]

    eps = 1e-8 if recipe in ("torchcam", "pytorch-grad-cam") else 0.0
    if flat(a):
        return torch.zeros(SIDE, SIDE, dtype=a.dtype)
    if recipe == "torchcam":
        return up((a - a.min()) / (a.max() - a.min() + eps))
    return (up(a) - up(a).min()) / (up(a).max() - up(a).min() + eps)


# ---------------------------------------------------------------------------------------------------------- Score-CAM


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("target", [None, 2, "all", camfn.targets.top(3)], ids=["none", "one", "all", "top"])
def test_a_sweep_runs_the_channels_that_are_not_flat_and_one_for_those_that_are(target, k, recipe):
    x = images(FLATS[k])
    rows, outcome = rows_of(x, lambda: raw("score_cam", x, target, recipe=recipe))
    assert len(rows) == expected_rows([FLATS[k]], recipe=recipe)
    assert zeros_in(rows) == (1 if k and recipe != "authors" else 0)
    assert outcome.forwards == len(rows) + 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_images_of_a_batch_have_flat_channels_of_their_own(recipe):
    flats = [FLATS[3], FLATS[0], FLATS[1]]
    x = images(*flats)
    rows, outcome = rows_of(x, lambda: raw("score_cam", x, [1, 3, 0], recipe=recipe))
    assert len(rows) == expected_rows(flats, recipe=recipe) == outcome.forwards - 3
    for i, c in enumerate([1, 3, 0]):
        close(outcome.maps[i : i + 1], loop(x[i : i + 1], c, recipe), recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_flat_channel_keeps_its_share(k, recipe):
    """The map of the sweep without the cut: a zero mask is scored, and its channel takes part in the softmax."""
    x = images(FLATS[k])
    close(raw("score_cam", x, recipe=recipe).maps, loop(x, 1, recipe), recipe)


@pytest.mark.parametrize(
    "target",
    [
        camfn.targets.contrast(1),
        torch.tensor([[0, 1, 2, 3, 3], [1, 1, 1, 1, 1]]),
        lambda y: y.softmax(-1),
        [lambda y: y[0], lambda y: y.max()],
    ],
    ids=["contrast", "tensor", "callable", "callables"],
)
def test_the_number_of_targets_costs_no_forward(target):
    x = images(FLATS[1], FLATS[3])
    rows, outcome = rows_of(x, lambda: raw("score_cam", x, target))
    assert len(rows) == expected_rows([FLATS[1], FLATS[3]]) == outcome.forwards - 2


def test_layers_share_the_clean_forward_and_have_flat_channels_of_their_own():
    x = images(FLATS[3])
    rows, outcome = rows_of(
        x, lambda: camfn.METHODS["score_cam"].run(Counted(), ("features", "more"), x, 1, sweep=PLAIN, normalize=False)
    )
    assert len(rows) == expected_rows([FLATS[3]]) + 3 == outcome.forwards - 1
    close(outcome.maps[0], loop(x, 1, "torchcam"))


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("recipe", ["torchcam", "authors"])
def test_chunks_neither_add_rows_nor_drop_any(chunk, recipe):
    flats = [FLATS[3], FLATS[1]]
    x, sweep = images(*flats), PLAIN._replace(chunk=chunk)
    rows, _ = rows_of(x, lambda: camfn.score_cam(Counted(), "features", x, 1, recipe=recipe, sweep=sweep))
    assert len(rows) == expected_rows(flats, recipe=recipe)
    assert max(len(seen) for seen in SEEN[1:]) <= chunk
    assert len(SEEN) == 1 + -(-len(rows) // chunk)


def test_the_default_sweep_makes_the_same_cuts():
    """But for the forwards that tell how the model may be run: a second input alone, watched, and the two together."""
    x, net = images(FLATS[3]), Counted()
    for _ in range(2):
        SEEN.clear()
        camfn.score_cam(net, "features", x, 1)
        assert sum(map(len, SEEN)) == 1 + 3 + expected_rows([FLATS[3]])


def test_progress_counts_the_rows_that_are_run():
    told = []
    x = images(FLATS[3], FLATS[0])
    sweep = PLAIN._replace(chunk=4, progress=lambda done, total: told.append((done, total)))
    rows, _ = rows_of(x, lambda: camfn.score_cam(Counted(), "features", x, 1, sweep=sweep))
    assert told == [(4, 10), (8, 10), (10, 10)]
    assert len(rows) == 10


def test_a_layer_that_is_flat_throughout_is_one_row():
    x = images(FLATS[6])
    rows, outcome = rows_of(x, lambda: raw("score_cam", x))
    assert len(rows) == zeros_in(rows) == 1
    close(outcome.weights[0], torch.full((1, 1, CHANNELS), 1 / CHANNELS, dtype=torch.float64))
    assert "are flat" in outcome.findings[0].sentence


@pytest.mark.parametrize("method", ["score_cam", "is_cam"])
def test_the_authors_recipe_has_nothing_to_sweep_in_a_layer_that_is_flat_throughout(method):
    x = images(FLATS[6])
    with pytest.raises(camfn.CamError, match="every channel of the layer is flat"):
        raw(method, x, recipe="authors")


def test_the_authors_recipe_takes_an_image_that_is_flat_throughout_beside_one_that_is_not():
    x = images(FLATS[6], FLATS[0])
    rows, outcome = rows_of(x, lambda: raw("score_cam", x, recipe="authors"))
    assert len(rows) == CHANNELS
    assert torch.equal(outcome.maps[0], torch.zeros(4, 4, dtype=torch.float64))
    close(outcome.maps[1:], loop(x[1:], 1, "authors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_flat_is_what_rounding_leaves_and_no_more(dtype):
    """One unit in the last place is no variation; a thousand of them are, however small the number."""
    x = images((), dtype=dtype)
    ulp = torch.finfo(dtype).eps
    for scale in (1.0, 1e-6):
        for steps, cut in ((1, 1), (1000, 0)):
            x[0, 2] = scale
            x[0, 2, 0, 0] = scale * (1 + steps * ulp)
            net = Counted(dtype)
            with torch.no_grad():  # the layer hands channel 2 on as it is
                net.features.weight[2] = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
                net.features.bias[2] = 0.0
            rows, _ = rows_of(x, lambda net=net: camfn.score_cam(net, "features", x, 1, sweep=PLAIN))
            assert len(rows) == CHANNELS
            assert zeros_in(rows) == cut, f"scale {scale}, {steps} units"


# ------------------------------------------------------------------------------------------------- draws and noise


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("path", ["cumulative", "linear"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_all_draws_of_a_zero_mask_in_is_cam_are_one(k, path, recipe):
    flats, draws = [FLATS[k], FLATS[1]], 4
    x = images(*flats)
    rows, outcome = rows_of(x, lambda: raw("is_cam", x, num_samples=draws, path=path, recipe=recipe))
    assert len(rows) == expected_rows(flats, draws, recipe) == outcome.forwards - 2
    assert zeros_in(rows) == (0 if recipe == "authors" else sum(1 for flat in flats if flat))
    coefficients = [i * (i + 1) / (2 * draws) if path == "cumulative" else i / draws for i in range(1, draws + 1)]
    close(outcome.maps, loop(x, 1, recipe, coefficients), f"{recipe} {path}")


@pytest.mark.parametrize("noise", ["mask", "activation"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_with_noise_on_the_mask_no_two_rows_are_equal_and_all_are_run(recipe, noise):
    """Of flat channels too, but for the recipe that leaves them out."""
    flats, draws = [FLATS[3], FLATS[0]], 3
    x = images(*flats)
    options = {"num_samples": draws, "std": 0.5, "noise": noise, "recipe": recipe}
    rows, outcome = rows_of(x, lambda: raw("ss_cam", x, **options))
    kept = [CHANNELS - (len(flat) if recipe == "authors" else 0) for flat in flats]
    assert len(rows) == draws * sum(kept) == outcome.forwards - 2
    assert len(rows.flatten(1).unique(dim=0)) == len(rows)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("k", [0, 1, 3])
def test_with_noise_on_the_input_a_zero_mask_gets_none_and_all_its_draws_are_one(k, recipe):
    flats, draws, std = [FLATS[k]], 3, 0.5
    x = images(*flats)
    rows, outcome = rows_of(x, lambda: raw("ss_cam", x, num_samples=draws, std=std, noise="input", recipe=recipe, seed=6))
    assert len(rows) == expected_rows(flats, draws, recipe) == outcome.forwards - 1
    assert zeros_in(rows) == (1 if k and recipe != "authors" else 0)
    drawn = torch.randn(draws, CHANNELS, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(6)).double() * std

    def noise_of(i: int, channel: int, masked: Tensor) -> Tensor:
        span = masked.max() - masked.min()
        return drawn[i, channel] / span if span > 0 else torch.zeros_like(masked)

    close(outcome.maps, loop(x, 1, recipe, (1.0,) * draws, noise_of), recipe)


# ----------------------------------------------------------------------------------------------------- no baseline


@pytest.mark.parametrize("method", ["score_cam", "ss_cam", "is_cam"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_baseline_is_run(method, recipe):
    """Without a flat channel no row is zero, and the clean image is run once: `rows_of` sees to that."""
    x = images((), ())
    draws = {} if method == "score_cam" else {"num_samples": 2}
    rows, outcome = rows_of(x, lambda: raw(method, x, recipe=recipe, **draws))
    assert len(rows) == 2 * CHANNELS * draws.get("num_samples", 1) == outcome.forwards - 2
    assert zeros_in(rows) == 0


def test_cam_is_the_clean_forward_alone():
    x = images(FLATS[1])
    model = nn.Sequential(Counted().features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 3)).double()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            SEEN.append(x.clone())
            return self.net(x)

    rows, outcome = rows_of(x, lambda: camfn.METHODS["cam"].run(Outer(), "net.0", x, "all", fc="net.3"))
    assert len(rows) == 0
    assert outcome.forwards == 1


def test_choosing_the_layer_is_one_forward_more_and_is_counted():
    x = images((), ())
    SEEN.clear()
    with pytest.warns(camfn.CamWarning, match="layer=None: 'more' was chosen"):
        card = camfn.explain(Counted(), None, x, 1, sweep=PLAIN)
    assert card.forwards == sum(map(len, SEEN)) == 2 * (1 + 1 + 3)


# ------------------------------------------------------------------------------------------------- under transforms


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("score_cam", {}),
        ("is_cam", {"num_samples": 2}),
        ("ss_cam", {"num_samples": 2, "std": 0.5, "noise": "mask"}),
        ("ss_cam", {"num_samples": 2, "std": 0.5, "noise": "activation"}),
        ("ss_cam", {"num_samples": 2, "std": 0.5, "noise": "input"}),
    ],
    ids=["score_cam", "is_cam", "mask", "activation", "input"],
)
def test_without_the_cuts_under_a_transform_the_map_is_the_same(method, options, recipe):
    """There no value can be read, and every row is run: also those that a plain call leaves out."""
    x, function = images(FLATS[3], FLATS[0], FLATS[1]), getattr(camfn, method)
    options = {**options, "recipe": recipe, "normalize": False}
    plain = function(Counted(), "features", x, 1, sweep=PLAIN, **options)
    model = Counted()

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        maps = function(model, "features", x, 1, **options)
        return maps.sum(), maps

    mapped = vmap(lambda image: function(model, "features", image[None], 1, **options)[0])(x)
    close(mapped, plain, "vmap")
    close(grad(loss, has_aux=True)(x)[1], plain, "grad")

"""Group-CAM, ScoreCAM++ and RISE against plain loops written from the papers and their authors' code, and closed forms.

Nothing of camfn computes an expected value here, but RISE's draws: layers and gradients are read by hooks on a copy.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camfn
from camfn.formulas import noise
from camfn.model.memory import Ledger
from tests.oracles.closeness import close
from tests.oracles.loops import DIMS, activation_of, blurred, frozen, gradient_of, min_max, upsampled
from tests.oracles.networks import inputs, net_with_flat_channels, small_net, softer

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


# ---------------------------------------------------------------------------------------------------------- Group-CAM


def group_cam_loop(model, layer, x, classes, groups, percentile, blur, gradient=None, score=None) -> tuple[Tensor, Tensor]:
    """The authors' loop, raw, at the size of the input; and the groups' scores."""
    maps, weights = [], []
    for i, c in enumerate(classes):
        image = x[i : i + 1]
        of = score or (lambda y, c=c: y.softmax(0)[c])
        a = activation_of(model, layer, image)[0]
        g = gradient_of(model, layer, image, gradient or (lambda y, c=c: y[c]))
        weighted = a * g.flatten(1).mean(1).reshape(-1, *[1] * (a.ndim - 1))
        below = blurred(image, *blur)
        base = float(of(frozen(model)(below)[0]))
        total, found = torch.zeros(image.shape[2:], dtype=x.dtype), []
        for some in weighted.chunk(groups):
            level = some.sum(0).clamp(min=0)
            if percentile is not None:
                level = torch.where(level > float(np.percentile(level.numpy(), percentile)), level, 0)
            mask = min_max(upsampled(level, image.shape[2:], False), 0.0)
            if float(mask.max()) == 0:
                found.append(0.0)
                continue
            found.append(max(0.0, float(of(frozen(model)(image * mask + below * (1 - mask))[0])) - base))
            total += found[-1] * mask
        maps.append(total)
        weights.append(found)
    return torch.stack(maps), torch.tensor(weights, dtype=x.dtype)


@pytest.mark.filterwarnings("ignore:.* of 10 maps at layer 'features' are flat")
@pytest.mark.parametrize("percentile", [None, 70])
@pytest.mark.parametrize("groups", [1, 4, 32])
@pytest.mark.parametrize("dims", DIMS)
def test_group_cam_is_the_authors_loop(dims, groups, percentile):
    """With 6 channels: one group, three of two, six of one."""
    model, x, options = softer(net_with_flat_channels(dims)), inputs(2, dims), {"groups": groups, "percentile": percentile}
    each = [group_cam_loop(model, "features", x, [c, c], **options, blur=(5, 1.5)) for c in range(5)]
    expected, weights = (torch.stack(parts, 1) for parts in zip(*each))
    assert float(weights.amax()) > 1e-3
    found = camfn.group_cam(model, "features", x, "all", size="input", normalize=False, blur=(5, 1.5), **options)
    close(found, expected)
    card = camfn.explain(model, "features", x, "all", method="group_cam", blur=(5, 1.5), **options)
    close(card.weights[0], weights, "weights")


def test_group_cam_by_default_has_32_groups_the_percentile_70_and_a_blur_of_51_pixels():
    model, x = softer(small_net(side=60, channels=70)), inputs(1, side=60)
    expected, weights = group_cam_loop(model, "features", x, [2], 32, 70, (51, 50.0))
    assert weights.shape == (1, 24)  # 70 channels in chunks of three
    found = camfn.group_cam(model, "features", x, 2, size="input", normalize=False)
    close(found, expected)
    for other in ({"groups": 35}, {"percentile": None}, {"blur": (51, 9.0)}, {"blur": (49, 50.0)}):
        assert (camfn.group_cam(model, "features", x, 2, size="input", normalize=False, **other) - found).abs().max() > 1e-9


TARGETS = {
    "logit": (camfn.targets.logit(2), lambda y: y[2], lambda y: y[2]),
    "probability": (camfn.targets.probability(2), lambda y: y.softmax(0)[2], lambda y: y.softmax(0)[2]),
    "callable": (lambda y: y[1] - y[4], lambda y: y[1] - y[4], lambda y: y[1] - y[4]),
    "class": (2, lambda y: y[2], lambda y: y.softmax(0)[2]),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_group_cam_of_a_target_that_says_its_scale_takes_it_for_gradient_and_score(kind):
    target, gradient, score = TARGETS[kind]
    model, x = softer(small_net()), inputs(1)
    expected, _ = group_cam_loop(model, "features", x, [0], 3, 70, (3, 2.0), gradient, score)
    found = camfn.group_cam(model, "features", x, target, groups=3, blur=(3, 2.0), size="input", normalize=False)
    close(found, expected, kind)


def test_groups_that_are_zero_score_zero_and_share_the_forward_of_the_blurred_input():
    model, x = softer(net_with_flat_channels(2)), inputs(2)
    card = camfn.explain(model, "act", x, "all", method="group_cam")
    seen = activation_of(model, "act", x).flatten(2)
    live = seen.amax(2) > seen.amin(2)  # what is flat is no mask, as in the authors' code
    assert live.all(0).tolist() == [True, False, True, True, False, True]
    assert not card.weights[0][:, :, [1, 4]].any()
    # For each image the clean input, the blurred one, and a mask for each target and live channel of a positive weight.
    gradients = [
        gradient_of(model, "act", x[i : i + 1], lambda y, c=c: y[c]).flatten(1).mean(1) for i in (0, 1) for c in range(5)
    ]
    positive = torch.stack(gradients).reshape(2, 5, 6) > 0
    assert card.forwards == 2 * 2 + int((positive & live[:, None]).sum())
    assert card.backwards == 10


class Deaf(nn.Module):
    """Its output has nothing to do with its input, and its layer has."""

    def __init__(self):
        super().__init__()
        self.inner, self.y = small_net(), nn.Parameter(torch.tensor([0.3, -0.2, 1.0, 0.1, 0.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 0 + self.y


@pytest.mark.filterwarnings("ignore:2 of 2 maps")
def test_a_model_that_ignores_its_input_gives_group_cam_nothing_and_the_others_the_mean_of_their_masks():
    model, x = Deaf(), inputs(2)
    p = float(model.y.detach().softmax(0)[2])
    assert not camfn.group_cam(model, "inner.features", x, normalize=False).any()
    gates = torch.stack(
        [torch.stack([upsampled(a, (8, 8), False).tanh() for a in one]) for one in activation_of(model, "inner.features", x)]
    )
    found = camfn.score_cam_pp(model, "inner.features", x, size="input", relu=False, normalize=False)
    close(found, p * gates.sum(1))
    masks = masks_of(*noise.rise(3, 50, 4, (8, 8), 0.3), (8, 8))
    found = camfn.rise(model, None, x, num_samples=50, cells=4, probability=0.3, seed=3, normalize=False)
    close(found, p * masks.mean(0).expand(2, 8, 8) / 0.3)


# ---------------------------------------------------------------------------------------------------------- ScoreCAM++


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("layer", ["stem", "features"])
def test_score_cam_pp_is_the_authors_loop(layer, dims):
    model, x, classes = softer(net_with_flat_channels(dims)), inputs(2, dims), [3, 1]
    for size in (x.shape[2:], activation_of(model, layer, x).shape[2:]):
        maps = []
        for i, c in enumerate(classes):
            total = torch.zeros(tuple(size), dtype=x.dtype)
            for channel in activation_of(model, layer, x[i : i + 1])[0]:
                masked = x[i] * torch.tanh(upsampled(channel, x.shape[2:], False))
                total += float(frozen(model)(masked[None])[0].softmax(0)[c]) * torch.tanh(upsampled(channel, size, False))
            maps.append(total.clamp(min=0))
        found = camfn.score_cam_pp(model, layer, x, classes, layout="channels_first", size=tuple(size), normalize=False)
        close(found, torch.stack(maps), str(size))


def test_score_cam_pp_scores_a_channel_that_is_flat_and_not_zero():
    """Its gate is open everywhere to one degree; only those that are zero throughout share a forward."""
    model, x = softer(net_with_flat_channels(2)), inputs(2)
    card = camfn.explain(model, "features", x, 3, method="score_cam_pp")
    assert card.forwards == 2 * 7
    with torch.no_grad():
        half = frozen(model)(x * math.tanh(0.7)).softmax(1)[:, 3]
        none = frozen(model)(x * 0).softmax(1)[:, 3]
    close(card.weights[0][:, 0, 1], half)
    close(card.weights[0][:, 0, 4], none)
    assert float((half - none).abs().max()) > 1e-3


# ---------------------------------------------------------------------------------------------------------------- RISE


def masks_of(cells: Tensor, shifts: Tensor, size: tuple[int, ...]) -> Tensor:
    """Every mask by NumPy's interpolation, one axis after the other: pixel centres, cells go on at the border."""
    made = []
    for cell, shift in zip(cells.double().numpy(), shifts.numpy()):
        for axis, side in enumerate(size):
            count = cell.shape[axis]
            breadth = -(-side // count)
            at = (shift[axis] + np.arange(side) + 0.5) * count / ((count + 1) * breadth) - 0.5
            cell = np.apply_along_axis(lambda line, at=at: np.interp(at, np.arange(len(line)), line), axis, cell)
        made.append(cell)
    return torch.from_numpy(np.stack(made))


@pytest.mark.parametrize("dims", DIMS)
def test_rise_is_the_papers_mean(dims):
    model, x, options = (
        softer(small_net(dims=dims)),
        inputs(2, dims),
        {"num_samples": 70, "cells": 3, "probability": 0.4, "seed": 5},
    )
    size = tuple(x.shape[2:])
    masks = masks_of(*noise.rise(5, 70, 3, size, 0.4), size)
    assert float(masks.std()) > 0.2
    total = torch.zeros(2, 5, *size, dtype=x.dtype)
    for i in range(2):
        for mask in masks:
            scores = frozen(model)(x[i : i + 1] * mask)[0].softmax(0)
            total[i] += scores.reshape(5, *[1] * dims) * mask
    found = camfn.rise(model, None, x, "all", normalize=False, **options)
    close(found, total / (70 * 0.4))


def test_rise_on_sides_that_cells_do_not_divide():
    x = inputs(1, side=9)[..., :7]
    model = softer(small_net())
    masks = masks_of(*noise.rise(0, 40, 4, (9, 7), 0.5), (9, 7))
    with torch.no_grad():
        scores = frozen(model)(x * masks[:, None]).softmax(1)[:, 1]
    found = camfn.rise(model, None, x, 1, num_samples=40, cells=4, normalize=False)
    close(found[0], torch.einsum("i,ihw->hw", scores, masks) / (40 * 0.5))


class Linear(nn.Module):
    def __init__(self, side: int):
        super().__init__()
        self.fc = nn.Linear(side * side, 2).double()
        with torch.no_grad():
            self.fc.weight.normal_(generator=torch.Generator().manual_seed(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def test_rise_of_a_linear_model_tends_to_its_expectation():
    """`E L = sum_j v_j E[M_j M] / p + b` with `v = w * x`; masks' second moments from all shifts, none drawn:
    `E[M_i M_j] = p^2 + p (1 - p) mean_shift sum_c u_c(i) u_c(j)`, u being the cells' shares in a pixel."""
    side, cells, p, n = 6, 3, 0.3, 4000
    model, x = Linear(side), inputs(1, side=side)[:, :1]
    lines = []
    for shift in range(side // cells):
        each = [masks_of(torch.eye(cells)[c][None], torch.tensor([[shift]]), (side,))[0] for c in range(cells)]
        lines.append(torch.stack(each))  # (cells, side)
    shares = [torch.einsum("ai,bj->abij", a, b).reshape(cells**2, side**2) for a in lines for b in lines]
    moment = p**2 + p * (1 - p) * torch.stack([u.mT @ u for u in shares]).mean(0)
    v = (model.fc.weight[1].detach() * x.flatten()).double()
    expected = moment @ v / p + float(model.fc.bias[1].detach())
    masks = masks_of(*noise.rise(0, n, cells, (side, side), p), (side, side)).flatten(1)
    found = camfn.rise(model, None, x, camfn.targets.logit(1), num_samples=n, cells=cells, probability=p, normalize=False)
    error = ((masks @ v + float(model.fc.bias[1].detach()))[:, None] * masks / p).std(0) / n**0.5
    assert float(error.max()) < 0.2 * float(expected.std())  # few enough to tell
    assert float(((found.flatten() - expected) / error).abs().max()) < 4.5


def test_of_pixels_masked_each_for_itself_rise_finds_the_weights():
    """Where the cells are the pixels, nearly: its maximum is where `w * x` has it."""
    model, x = Linear(6), torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    x[0, 0, 4, 1] = 3.0 * model.fc.weight[0].detach().reshape(6, 6)[4, 1].sign()
    found = camfn.rise(model, None, x, camfn.targets.logit(0), cells=6, num_samples=2000)
    assert divmod(int(found[0].argmax()), 6) == (4, 1)


def test_masks_are_the_first_of_however_many_and_each_draw_has_its_own():
    few, many = noise.rise(7, 10, 4, (8, 9), 0.5), noise.rise(7, 300, 4, (8, 9), 0.5)
    for some, all_ in zip(few, many):
        assert torch.equal(some, all_[:10])
    cells, shifts = many
    assert abs(float(cells.double().mean()) - 0.5) < 4 * 0.5 / (300 * 16) ** 0.5
    assert [shifts[:, axis].unique().tolist() for axis in (0, 1)] == [[0, 1], [0, 1, 2]]
    assert len(cells.flatten(1).unique(dim=0)) > 290
    assert not torch.equal(cells, noise.rise(8, 300, 4, (8, 9), 0.5)[0])
    assert noise.rise(7, 300, 4, (8, 9), 1.0)[0].all()


def test_a_mask_of_zeros_costs_no_forward_of_its_own():
    """A cell or none: of 40 masks of one cell those without it share a forward."""
    model, x = softer(small_net()), inputs(2)
    alive = int(noise.rise(0, 40, 1, (8, 8), 0.5)[0].sum())
    assert 5 < alive < 35
    card = camfn.explain(model, None, x, method="rise", num_samples=40, cells=1)
    assert card.forwards == 2 * (alive + 1 + 1)


def test_rise_never_holds_all_masks_at_the_size_of_the_input():
    model, x = softer(small_net(dtype=torch.float32, side=32)), inputs(1, side=32, dtype=torch.float32)
    with Ledger() as ledger:
        camfn.rise(model, None, x, num_samples=2000)
    assert ledger.peak < 0.3 * 2000 * 32 * 32 * 4


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("method", ["group_cam", "score_cam_pp", "rise"])
def test_a_dtype_of_the_sweep_is_refused(method):
    row, sweep = camfn.METHODS[method], camfn.Sweep(dtype=torch.bfloat16)
    with pytest.raises(camfn.CamError, match=rf"dtype=torch.bfloat16\) is not for {method}.*leave dtype= out"):
        row.function(small_net(), "features" if row.of_layer else None, inputs(), sweep=sweep)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 0}, "groups >= 1, found 0"),
        ({"groups": 2.0}, "groups >= 1, found 2.0"),
        ({"percentile": 100}, "percentile=100 must be"),
        ({"blur": (4, 1.0)}, r"blur=\(4, 1.0\) must be an odd"),
        ({"blur": 5}, "blur=5 must be an odd"),
        ({"blur": (5, 0.0)}, r"blur=\(5, 0.0\) must be an odd"),
    ],
)
def test_what_group_cam_cannot_do(options, words):
    with pytest.raises(camfn.CamError, match=words):
        camfn.group_cam(small_net(), "features", inputs(), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": "features"}, "rise takes no layer: pass layer=None, found 'features'"),
        ({"num_samples": 0}, "num_samples >= 1, found 0"),
        ({"cells": 0}, "cells >= 1.*found 0"),
        ({"probability": 0.0}, r"probability in \(0, 1\]; found 7, 0.0"),
        ({"seed": "a"}, "seed must be an int or a torch.Generator, found 'a'"),
    ],
)
def test_what_rise_cannot_do(options, words):
    options = {"layer": None, **options}
    with pytest.raises(camfn.CamError, match=words):
        camfn.rise(small_net(), x=inputs(), **options)


def test_a_score_that_is_not_finite_names_the_mask():
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + torch.where(x.abs().sum((1, 2, 3)) < 60, torch.nan, 0)[:, None]

    with pytest.raises(camfn.CamError, match=r"the score of image 0 masked by mask \d+ is not finite"):
        camfn.rise(Fragile(), None, inputs(1))


def test_the_flat_map_of_a_method_without_a_layer_is_told_without_one():
    model = partial(Linear, 8)()
    with torch.no_grad():
        model.fc.weight.zero_()
    with pytest.warns(camfn.CamWarning, match="1 of 1 maps are flat"):
        camfn.rise(model, None, inputs(1)[:, :1], num_samples=3, probability=1.0)

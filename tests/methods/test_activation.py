"""Methods that look at the activation alone, and the eigen family: against NumPy, scikit-learn, loops and pytorch-grad-cam.

What pytorch-grad-cam 1.5.7 does, and we do not: its EigenCAM and EigenGradCAM have the sign that LAPACK gives, and make a
matrix of c x c; its RandomCAM draws from NumPy's global state, without a seed; its KernelPCA begins at random from 200
positions on. All of them cut what is below zero.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import camfn
from camfn import CamError
from camfn.formulas import components
from tests.oracles.closeness import assert_close, close
from tests.oracles.libraries import torchvision_models
from tests.oracles.networks import inputs, small_net

RAW = {"normalize": False, "relu": False}
ALIKE = ("mean_cam", "fem", "random_cam", "eigen_cam", "kpca_cam")
"""Methods that know nothing of the target."""


def activation(net: nn.Module, x: Tensor, layer: str = "features") -> Tensor:
    net, kept = copy.deepcopy(net).eval(), []
    net.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out.detach().clone()))
    with torch.no_grad():
        net(x)
    return kept[0]


def slopes(net: nn.Module, x: Tensor, c: int, layer: str = "features") -> tuple[Tensor, Tensor]:
    """Activation and gradient by plain autograd."""
    net, kept = copy.deepcopy(net).eval(), []
    net.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out.clone()) or kept[0])
    score = net(x)[:, c].sum()
    (gradient,) = torch.autograd.grad(score, kept[0])
    return kept[0].detach(), gradient


def component(values: np.ndarray, center: bool) -> tuple[np.ndarray, np.ndarray]:
    """`X v` and `v` of `(c, p)` by NumPy's decomposition of the whole matrix."""
    matrix = values.T - values.T.mean(0) if center else values.T
    vector = np.linalg.svd(matrix)[2][0]
    return matrix @ vector, vector


def by_peak(scores: np.ndarray) -> float:
    return 1.0 if scores.max() >= -scores.min() else -1.0


def peer():
    torchvision_models()  # which it imports
    return pytest.importorskip("pytorch_grad_cam")


# -------------------------------------------------------------------------------------------- of the activation alone


@pytest.mark.parametrize("method", ALIKE)
def test_the_target_changes_the_score_and_not_the_map(method):
    net, x = small_net(), inputs(3)
    options = {**RAW, **({"k": 0.5} if method == "fem" else {})}
    one = camfn.METHODS[method].run(net, "features", x, 1, **options)
    every = camfn.METHODS[method].run(net, "features", x, "all", **options)
    assert every.maps.shape == (3, 5, 4, 4)
    assert all(torch.equal(every.maps[:, c], one.maps) for c in range(5))
    assert torch.equal(every.scores[:, 1:2], one.scores)
    assert every.scores[0].unique().numel() == 5
    assert (every.forwards, every.backwards) == (3, 0)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_mean_cam_is_the_mean_of_the_channels(dims):
    net, x = small_net(dims=dims), inputs(dims=dims)
    close(camfn.mean_cam(net, "features", x, **RAW), activation(net, x).mean(1))
    card = camfn.explain(net, "features", x, [1, 2], method="mean_cam", combine="eigen", **RAW)
    close(card.weights[0], torch.full((2, 1, 6), 1 / 6, dtype=torch.float64))
    for found, a in zip(card.maps, activation(net, x)):
        expected, _ = component(a.flatten(1).numpy() / 6, center=True)
        close(found.flatten().abs(), torch.from_numpy(expected).abs())


def fem_loop(values: np.ndarray, k: float, form: str) -> np.ndarray:
    """`(c, p)` to `(p,)`, channel by channel."""
    total = np.zeros(values.shape[1])
    for channel in values:
        binary = (channel > channel.mean() + k * channel.std()).astype(float)
        total += channel.mean() * binary if form == "mean" else binary.mean() * channel
    return total


@pytest.mark.parametrize("form", ["mean", "share"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("k", [0.4, 1.2])
def test_fem_is_the_loop_over_channels(form, dims, k):
    net, x = small_net(dims=dims, channels=9), inputs(3, dims=dims)
    found = camfn.fem(net, "features", x, form=form, k=k, **RAW)
    for mine, a in zip(found, activation(net, x)):
        expected = fem_loop(a.flatten(1).numpy(), k, form)
        assert np.abs(expected).max() > 0.01
        close(mine.flatten(), torch.from_numpy(expected))


def test_the_two_forms_of_fem_and_its_default_k_differ():
    net, x = small_net(channels=9, side=16), inputs(side=16)
    paper, other = (camfn.fem(net, "features", x, form=form) for form in ("mean", "share"))
    assert (paper - other).abs().max() > 0.3
    assert torch.equal(camfn.fem(net, "features", x), paper)
    a = activation(net, x)[0].flatten(1).numpy()
    close(camfn.fem(net, "features", x, **RAW)[0].flatten(), torch.from_numpy(fem_loop(a, 2.0, "mean")))


def test_fem_counts_nothing_that_is_above_by_rounding_alone():
    """A flat channel; and of five positions one alone, which is exactly two deviations above the mean."""
    flat = torch.full((1, 1, 7), 0.1, dtype=torch.float64)
    alone = torch.tensor([[[0.0, 0, 0, 0, v] for v in np.linspace(0.1, 3, 50)]]).double().reshape(1, 50, 5)
    for values in (flat, flat.float(), flat.half(), alone, alone.float()):
        assert int(camfn.weights.far_above(values, 2.0).count_nonzero()) == 0
    assert int(camfn.weights.far_above(alone, 1.99).count_nonzero()) == 50


def test_fem_is_that_of_pytorch_grad_cam_by_share():
    net, x = small_net(channels=9).eval().float(), inputs(3, dtype=torch.float32)
    with peer().FEM(net, [net.features], k=1) as extractor:
        theirs = torch.from_numpy(extractor.get_cam_image(x, None, None, activation(net, x).numpy(), None, False))
    assert_close(camfn.fem(net, "features", x, form="share", k=1, **RAW), theirs, 1e-5)


def test_random_weights_are_of_the_seed_and_the_number_of_the_channel():
    net, x = small_net(), inputs(3)
    card = camfn.explain(net, ("features", "stem"), x, [0, 1, 2], method="random_cam", seed=3, **RAW)
    drawn = 2 * torch.rand(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 1
    assert_close(card.weights[0], drawn.expand(3, 1, 6), 0)
    assert_close(card.weights[1], drawn[:4].expand(3, 1, 4), 0)  # every layer starts anew
    close(card.maps[0], torch.einsum("c,nchw->nhw", drawn, activation(net, x)))
    many = camfn.weights.random_cam(camfn.formulas.noise.uniform(0, 10_000), torch.zeros(1, 10_000, 1))[0]
    assert -1 <= many.min() < -0.999
    assert 0.999 < many.max() < 1
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.square().mean()) - 1 / 3) < 0.01
    seeds = [camfn.random_cam(net, "features", x, seed=seed) for seed in range(5)]
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.combinations(seeds, 2))


def test_random_weights_are_shared_by_all_that_is_mapped():
    net, x = small_net(), inputs(3)
    found = vmap(lambda one: camfn.random_cam(net, "features", one[None], 1, **RAW)[0])(x)
    close(found, camfn.random_cam(net, "features", x, 1, **RAW))


# ---------------------------------------------------------------------------------------------------- the eigen family


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("dims", "channels"), [(1, 6), (2, 6), (2, 30), (3, 6)])
def test_eigen_cam_is_the_projection_on_the_first_singular_vector(center, dims, channels):
    net, x = small_net(dims=dims, channels=channels), inputs(3, dims=dims)
    card = camfn.explain(net, "features", x, 2, method="eigen_cam", center=center, **RAW)
    for found, weights, a in zip(card.maps, card.weights[0][:, 0], activation(net, x)):
        expected, vector = component(a.flatten(1).numpy(), center)
        turn = by_peak(expected)
        close(found.flatten(), torch.from_numpy(turn * expected))
        close(weights, torch.from_numpy(turn * vector))


def test_the_paper_takes_no_mean_off_and_pytorch_grad_cam_does():
    net, x = small_net(), inputs()
    plain, centered = (camfn.eigen_cam(net, "act", x, center=center, **RAW) for center in (False, True))
    assert torch.equal(camfn.eigen_cam(net, "act", x, **RAW), plain)
    assert (plain >= 0).all(), "behind a ReLU the first singular vector has one sign"
    close(centered.mean((1, 2)), torch.zeros(2, dtype=torch.float64), size=centered.abs().max())


@pytest.mark.parametrize("center", [False, True])
def test_a_picture_turned_has_the_map_turned(center):
    """Positions in another order have the components in that order, signs too."""
    net, x = small_net(), inputs(4)
    net.features, net.stem[0] = nn.Conv2d(4, 6, 1).double(), nn.Conv2d(3, 4, 1).double()
    for method in ("eigen_cam", "kpca_cam", "eigen_grad_cam", "seg_eigen_cam"):
        options = {**RAW, **({} if method == "kpca_cam" else {"center": center})}
        function = camfn.METHODS[method].function
        upright = function(net, "features", x, 1, **options)
        turned = function(net, "features", x.rot90(1, (2, 3)), 1, **options)
        close(turned, upright.rot90(1, (1, 2)), method)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("size", [lambda g: g, np.abs], ids=["eigen_grad_cam", "seg_eigen_cam"])
def test_the_gradient_forms_are_components_of_its_product_with_the_activation(center, size):
    net, x = small_net(channels=8, dense=True), inputs(3)
    method = "seg_eigen_cam" if size is np.abs else "eigen_grad_cam"
    for c in range(5):
        found = camfn.METHODS[method].function(net, "features", x, c, center=center, **RAW)
        for mine, a, g in zip(found, *slopes(net, x, c)):
            values = size(g.flatten(1).numpy()) * a.flatten(1).numpy()
            expected, vector = component(values, center)
            turn = by_peak(expected) if size is np.abs else np.sign(vector.sum())
            close(mine.flatten(), torch.from_numpy(turn * expected), f"class {c}")


def test_the_signs_of_the_two_gradient_forms():
    """One goes with HiResCAM's map, the other has its largest value positive; here the two rules do not agree."""
    net, x = small_net(channels=8, dense=True), inputs(40)
    a, g = slopes(net, x, 1)
    with_sum = camfn.eigen_grad_cam(net, "features", x, 1, **RAW)
    products = a * g
    centered = products.sum(1) - products.sum(1).mean((1, 2), keepdim=True)
    assert ((with_sum * centered).sum((1, 2)) > 0).all()
    by_size = camfn.seg_eigen_cam(net, "features", x, 1, **RAW)
    assert (by_size.amax((1, 2)) >= -by_size.amin((1, 2))).all()
    assert (with_sum.amax((1, 2)) < -with_sum.amin((1, 2))).any()


def test_before_global_pooling_the_two_gradient_forms_are_one_up_to_the_sign():
    """A gradient that is the same everywhere turns a channel round, or not; a singular vector turns it back."""
    net, x = small_net(), inputs(40)
    one, other = (function(net, "features", x, 1, **RAW) for function in (camfn.eigen_grad_cam, camfn.seg_eigen_cam))
    turn = (one * other).sum((1, 2), keepdim=True).sign()
    close(one, turn * other)
    assert set(turn.flatten().tolist()) == {1.0, -1.0}  # one map is the other's negative
    close(one, camfn.seg_eigen_cam(net, "features", x, 1, side="class", **RAW))


@pytest.mark.parametrize("center", [False, True])
def test_the_side_that_speaks_for_the_class_agrees_with_hires_cam(center):
    net, x = small_net(channels=8, dense=True), inputs(40)
    a, g = slopes(net, x, 1)
    largest, side = (camfn.seg_eigen_cam(net, "features", x, 1, center=center, side=s, **RAW) for s in ("largest", "class"))
    close(largest.abs(), side.abs())
    evidence = (a * g).sum(1)
    evidence = evidence - evidence.mean((1, 2), keepdim=True) if center else evidence
    assert ((side * evidence).sum((1, 2)) > 0).all()
    assert ((largest * evidence).sum((1, 2)) < 0).any()


def test_another_side_is_an_error():
    with pytest.raises(camfn.CamError, match='side must be "largest" or "class"'):
        camfn.seg_eigen_cam(small_net(), "features", inputs(), 1, side="sum")


def test_one_channel_alone_is_its_own_component():
    net, x = small_net(channels=1), inputs()
    a = activation(net, x)[:, 0]
    centered = a - a.mean((1, 2), keepdim=True)
    turn = torch.where(centered.amax((1, 2)) >= -centered.amin((1, 2)), 1, -1)[:, None, None]
    close(camfn.eigen_cam(net, "features", x, center=True, **RAW), turn * centered)


# ----------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("kernel", ["sigmoid", "rbf", "poly", "linear"])
@pytest.mark.parametrize("gamma", [None, 0.3])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_kpca_cam_is_that_of_scikit_learn(kernel, gamma, scale):
    decomposition = pytest.importorskip("sklearn.decomposition")
    net, x = small_net(channels=9), inputs(3)
    with torch.no_grad():
        net.features.weight *= scale
        net.features.bias *= scale
    found = camfn.kpca_cam(net, "features", x, kernel=kernel, gamma=gamma, **RAW)
    for mine, a in zip(found, activation(net, x)):
        rows = a.flatten(1).T.numpy()
        rows = rows - rows.mean(0)
        # gamma=None means 1 over the number of channels there too; kernels but the linear one have coef0=1 and degree=3
        expected = decomposition.KernelPCA(1, kernel=kernel, gamma=gamma, eigen_solver="dense").fit_transform(rows)[:, 0]
        assert_close(mine.flatten() / scale, torch.from_numpy(by_peak(expected) * expected) / scale, 1e-9 / scale, kernel)


def test_small_activations_keep_their_digits_in_a_kernel():
    """`tanh(1 + 1e-10)` is `tanh(1)` in float32: the constant is left out before it can swallow what there is."""
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    values = values - values.mean(1, keepdim=True)
    for kernel in ("sigmoid", "rbf", "poly"):
        fine = components.kpca_cam(1e-5 * values.double(), kernel, None)
        assert_close(
            components.kpca_cam(1e-5 * values, kernel, None) / fine.abs().max(),
            fine / fine.abs().max(),
            1e-4,
        )


def test_the_linear_kernel_is_eigen_cam():
    net, x = small_net(), inputs(3)
    expected = camfn.eigen_cam(net, "features", x, center=True, **RAW)
    close(camfn.kpca_cam(net, "features", x, kernel="linear", **RAW), expected)
    assert (camfn.kpca_cam(net, "features", x) - camfn.eigen_cam(net, "features", x, center=True)).abs().max() > 0.01


def test_a_kernel_without_a_positive_eigenvalue_has_a_map_of_zeros():
    flat = torch.zeros(3, 5)
    for kernel in components.KERNELS:
        assert int(components.kpca_cam(flat, kernel, None).count_nonzero()) == 0
        slope = torch.func.grad(lambda values, kernel=kernel: components.kpca_cam(values, kernel, None).sum())(flat)
        assert int(slope.count_nonzero()) == 0


# ------------------------------------------------------------------------------------------------- pytorch-grad-cam

PEERS = {
    "eigen_cam": ("EigenCAM", {"center": True}),
    "eigen_grad_cam": ("EigenGradCAM", {}),
    "seg_eigen_cam": ("SegEigenCAM", {}),
    "kpca_cam": ("KPCA_CAM", {}),
}


@pytest.mark.parametrize("method", PEERS)
def test_raw_maps_are_those_of_pytorch_grad_cam_up_to_their_sign(method):
    name, options = PEERS[method]
    net, x = small_net(channels=12, dense=True).eval().float(), inputs(6, dtype=torch.float32)
    with getattr(peer(), name)(net, [net.features]) as extractor:
        a, g = slopes(net, x, 1)
        theirs = torch.from_numpy(extractor.get_cam_image(x, None, None, a.numpy(), g.numpy(), False))
    ours = camfn.METHODS[method].function(net, "features", x, 1, **options, **RAW)
    turn = torch.ones(6, 1, 1)
    if method not in ("seg_eigen_cam", "kpca_cam"):  # these two fix it, as we do: scikit-learn by the largest value
        turn = (ours * theirs).sum((1, 2), keepdim=True).sign()
        assert (turn < 0).any(), "no sign is turned: nothing to allow for"
    assert_close(ours, turn * theirs, 2e-5 * float(theirs.abs().max()), method)


@pytest.mark.parametrize("method", PEERS)
def test_whole_maps_are_those_of_pytorch_grad_cam_where_the_signs_agree(method):
    """At a layer of the input's size, where nothing is resized; rectified, as all of its maps are."""
    name, options = PEERS[method]
    net, x = small_net(dense=True).eval().float(), inputs(6, dtype=torch.float32)
    targets = [peer().utils.model_targets.ClassifierOutputTarget(1)] * 6
    with getattr(peer(), name)(net, [net.stem[2]]) as extractor:
        theirs = torch.from_numpy(extractor(x, targets))
    ours = camfn.METHODS[method].function(net, "stem.2", x, 1, **options, **RAW)
    for mine, other in zip(ours, theirs):
        turned = [camfn.maps.normalize((turn * mine).clamp(min=0), (0, 1)) for turn in (1, -1)]
        assert_close(min(turned, key=lambda one: float((one - other).abs().max())), other, 1e-4, method)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fem", {"form": "sum"}, 'form must be "mean" or "share", found \'sum\''),
        ("fem", {"k": float("inf")}, "finite number of deviations for k, found inf"),
        ("fem", {"k": "2"}, "finite number of deviations for k, found '2'"),
        ("random_cam", {"seed": 0.5}, "seed must be an int or a torch.Generator, found 0.5"),
        ("kpca_cam", {"kernel": "cosine"}, "kernel 'cosine' is not known; all: sigmoid, rbf, poly, linear"),
        ("kpca_cam", {"gamma": 0.0}, "gamma must be None or a finite number above 0, found 0.0"),
        ("kpca_cam", {"gamma": float("nan")}, "gamma must be None or a finite number above 0, found nan"),
        *((method, {"combine": "max"}, 'combine must be "sum" or "eigen"') for method in ("mean_cam", "fem", "random_cam")),
    ],
)
def test_what_cannot_be_is_refused(method, options, message):
    with pytest.raises(CamError, match=message):
        camfn.METHODS[method].function(small_net(), "features", inputs(), **options)

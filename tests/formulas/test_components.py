"""First components against NumPy's singular value decomposition, and `combine="eigen"` against loops and pytorch-grad-cam."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import camfn
from camfn import CamError, maps
from camfn.formulas import components
from tests.oracles.closeness import assert_close, close
from tests.oracles.libraries import torchvision_models
from tests.oracles.networks import inputs, small_net


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def of_svd(values: Tensor, center: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Projection and first singular vector, by NumPy's decomposition of the whole matrix; of `sum_k v_k >= 0`."""
    matrix = values.double().numpy().T
    matrix = matrix - matrix.mean(0) if center else matrix
    vector = np.linalg.svd(matrix)[2][0]
    vector = vector * np.sign(vector.sum())
    return matrix @ vector, vector


# ------------------------------------------------------------------------------------------------- the first component


@pytest.mark.parametrize(("channels", "positions"), [(6, 3), (3, 6), (4, 4), (1, 5), (5, 1), (40, 9), (9, 40)])
def test_the_first_component_is_that_of_the_svd(channels, positions):
    values = drawn(channels, positions)
    scores, loadings = of_svd(values)
    found = components.first(values)
    close(found.scores, torch.from_numpy(scores))
    close(found.loadings, torch.from_numpy(loadings))


def test_no_matrix_of_channels_is_made_where_there_are_fewer_positions(monkeypatch):
    sides, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sides.append(matrix.shape[-1]) or eigh(matrix))
    components.first(drawn(2048, 49, dtype=torch.float32))
    components.first(drawn(64, 784, dtype=torch.float32))
    assert sides == [49, 64]


def test_a_batch_has_the_components_of_each():
    values = drawn(2, 3, 5, 4)
    together = components.first(values)
    for i in range(2):
        for j in range(3):
            alone = components.first(values[i, j])
            close(together.scores[i, j], alone.scores)
            close(together.loadings[i, j], alone.loadings)
    close(vmap(vmap(lambda one: components.first(one).scores))(values), together.scores)


@pytest.mark.parametrize("sign", ["sum", "peak"])
def test_the_sign_is_fixed_and_turns_with_what_it_is_told_by(sign):
    values = torch.tensor([[4.0, -1, -1, -1], [-6, 1, 1, 1]], dtype=torch.float64)
    scores, loadings = components.first(values, sign)
    if sign == "sum":  # the second channel is larger, and the sum of the two is low where it is low
        assert loadings.sum() > 0
        assert scores[0] < -7
    else:
        assert scores.abs().max() == scores.max()
        assert scores[0] > 7
    opposite = components.first(-values, sign)
    close(opposite.scores, -scores if sign == "sum" else scores)
    close(opposite.loadings, loadings if sign == "sum" else -loadings)


def test_where_one_rule_leaves_the_sign_open_the_other_tells():
    opposed = torch.tensor([[4.0, -1, -1], [-4, 1, 1]], dtype=torch.float64)  # the channels sum to zero
    assert components.first(opposed).scores[0] > 5
    assert components.first(-opposed).scores[0] > 5
    balanced = torch.tensor([[-1.0, 1], [-2, 2.5], [0, 0]], dtype=torch.float64)
    balanced = balanced - balanced.mean(1, keepdim=True)  # the largest and the smallest are equal in size
    assert components.first(balanced, "peak").scores[1] > 1
    assert components.first(balanced[:, [1, 0]], "peak").scores[0] > 1


def test_rounding_does_not_tell_the_sign():
    opposed = torch.tensor([[4.0, -1, -1], [-4, 1, 1]], dtype=torch.float64)
    balanced = torch.tensor([[-1.0, 1], [-2, 2], [0.5, -0.5]], dtype=torch.float64)
    for seed in range(10):
        assert components.first(opposed + 1e-15 * drawn(2, 3, seed=seed)).scores[0] > 5
        assert components.first(balanced + 1e-15 * drawn(3, 2, seed=seed), "peak").scores[1] > 1


def test_the_order_of_channels_and_positions_does_not_matter():
    values = drawn(7, 5)
    found = components.first(values)
    close(components.first(values.flip(0)).scores, found.scores)
    close(components.first(values.flip(0)).loadings, found.loadings.flip(0))
    close(components.first(values[:, [2, 0, 1, 4, 3]]).scores, found.scores[[2, 0, 1, 4, 3]])


@pytest.mark.parametrize("k", [2.0**-400, 2.0**400])
def test_values_whose_squares_have_no_number_have_the_same_component(k):
    values = drawn(4, 6)
    found = components.first(values)
    assert torch.equal(components.first(k * values).scores, k * found.scores)
    assert torch.equal(components.first(k * values).loadings, found.loadings)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_nothing_has_the_component_nothing_and_what_is_not_finite_shows(shape):
    zeros = torch.zeros(shape)
    found = components.first(zeros)
    assert int(found.scores.count_nonzero()) == int(found.loadings.count_nonzero()) == 0
    assert torch.equal(grad(lambda values: components.first(values).scores.sum())(zeros), zeros)
    for bad in (torch.nan, torch.inf):
        pair = torch.stack([drawn(*shape), drawn(*shape).index_fill(0, torch.tensor(1), bad)])
        scores = components.first(pair).scores
        assert torch.isnan(scores[1]).all()
        close(scores[0], components.first(pair[0]).scores)


def test_a_matrix_that_is_not_finite_has_no_eigenvector_and_spoils_no_other():
    sound = drawn(3, 3) + drawn(3, 3).T
    spoiled = sound.clone()
    spoiled[2, 2] = torch.inf
    found = components.top(torch.stack([spoiled, sound]))
    assert torch.isnan(found[0]).all()
    close(found[1], components.top(sound))


# ----------------------------------------------------------------------------------------------------- its derivative


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_first_and_second_derivatives_agree_with_finite_differences(shape):
    weighing = drawn(shape[1], seed=1)

    def total(values: Tensor) -> Tensor:
        scores, loadings = components.first(values)
        return (scores * weighing).sum() + loadings[0].exp()

    values, along = drawn(*shape).requires_grad_(), drawn(*shape, seed=2)
    assert gradcheck(total, values)
    assert gradgradcheck(total, values)
    values = values.detach()
    step, slopes = 1e-5, grad(total)
    expected = (slopes(values + step * along) - slopes(values - step * along)) / (2 * step)
    assert_close(jvp(slopes, (values,), (along,))[1], expected, 1e-7)
    assert expected.abs().max() > 0.01


def test_an_eigenvector_stays_a_unit_vector_in_second_derivatives():
    matrix, along = (square + square.T for square in (drawn(4, 4), drawn(4, 4, seed=1)))

    def square(at: Tensor) -> Tensor:
        return components.top(matrix + at * along).square().sum()

    zero = torch.zeros((), dtype=torch.float64)
    close(grad(square)(zero), zero, size=1)
    close(grad(grad(square))(zero), zero, size=1)
    assert_close(components.top(matrix), torch.linalg.eigh(matrix)[1][:, -1], 0)


@pytest.mark.parametrize("shape", [(4, 6), (9, 6)])
def test_dead_channels_leave_the_derivative_finite(shape):
    """`eigh` of the Gram matrix has none: two eigenvalues are zero."""
    values = drawn(*shape)
    values[1:3] = 0
    values[:, 4] = values[:, 5]

    def plain(values: Tensor) -> Tensor:
        return components.first(values[torch.arange(len(values)) % len(values) != 1]).scores.square().cumsum(0).sum()

    found = grad(lambda values: components.first(values).scores.square().cumsum(0).sum())(values)
    assert torch.isfinite(found).all()
    close(found, grad(plain)(values))
    if shape[0] < shape[1]:
        gram = values @ values.mT
        assert not torch.isfinite(grad(lambda gram: torch.linalg.eigh(gram)[1][:, -1].cumsum(0).sum())(gram)).all()


def test_where_the_largest_value_is_double_the_derivative_is_finite():
    values = torch.eye(3, dtype=torch.float64)
    assert torch.isfinite(grad(lambda values: components.first(values).scores.exp().sum())(values)).all()


# ------------------------------------------------------------------------------------------------------ combine="eigen"

LINEAR = {"cam": {"fc": "fc"}, "ss_cam": {"num_samples": 2}, "is_cam": {"num_samples": 2}}
WEIGHING = ["cam", "grad_cam", "score_cam", "ss_cam", "is_cam"]


def activation(net, x: Tensor) -> Tensor:
    net, kept = copy.deepcopy(net).eval(), []
    net.features.register_forward_hook(lambda module, args, out: kept.append(out.detach().clone()))
    net(x)
    return kept[0]


@pytest.mark.parametrize("method", WEIGHING)
@pytest.mark.parametrize("channels", [6, 20])
def test_combined_by_eigen_a_map_is_the_first_principal_component_of_what_is_summed(method, channels):
    net, x = small_net(channels=channels), inputs(3)
    options = {"normalize": False, "relu": False, **LINEAR.get(method, {})}
    function = camfn.METHODS[method].function
    weights = camfn.METHODS[method].run(net, "features", x, "all", **options).weights[0]
    found, summed = (function(net, "features", x, "all", combine=how, **options) for how in ("eigen", "sum"))
    assert found.shape == summed.shape
    for n, a in enumerate(activation(net, x).flatten(2)):
        for t, w in enumerate(weights[n]):
            expected, _ = of_svd(w[:, None] * a, center=True)
            close(found[n, t].flatten(), torch.from_numpy(expected), f"image {n}, class {t}")
            assert (found[n, t] * (summed[n, t] - summed[n, t].mean())).sum() > 0
    assert (found - summed).abs().max() > 0.1
    rectified = function(net, "features", x, "all", combine="eigen", **LINEAR.get(method, {}), normalize=False, relu=True)
    assert_close(rectified, found.clamp(min=0), 0)


@pytest.mark.parametrize("method", WEIGHING)
def test_a_map_combined_by_eigen_composes(method):
    net, x = small_net(), inputs(3)
    options = {"combine": "eigen", "normalize": False, "relu": False, **LINEAR.get(method, {})}

    def one(image: Tensor) -> Tensor:
        return camfn.METHODS[method].function(net, "features", image[None], 1, **options)[0]

    close(vmap(one)(x), camfn.METHODS[method].function(net, "features", x, 1, **options))
    along, step = inputs(3, seed=5), 1e-6
    expected = (vmap(one)(x + step * along) - vmap(one)(x - step * along)) / (2 * step)
    assert_close(jvp(vmap(one), (x,), (along,))[1], expected, 1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_components_of_narrow_dtypes_are_made_in_float32(dtype):
    w, a = drawn(1, 2, 8, dtype=dtype), drawn(1, 8, 6, dtype=dtype)
    a[:, 3] = 0.6  # flat
    found = maps.component(w, a)
    assert found.dtype == torch.float32
    assert_close(found, maps.component(w.double(), a.double()), 1e-5)


def test_weights_of_each_position_are_weights_too():
    w, a = drawn(2, 3, 5, 4), drawn(2, 5, 4, seed=1)
    found = maps.component(w, a)
    for n in range(2):
        for t in range(3):
            expected, _ = of_svd(w[n, t] * a[n], center=True)
            close(found[n, t], torch.from_numpy(expected))
    same = w.mean(-1)
    close(maps.component(same[..., None].expand_as(w), a), maps.component(same, a))


def test_channels_that_are_flat_up_to_rounding_have_no_component():
    flat = torch.full((1, 2, 3), 0.1).cumsum(-1)[..., 2:].expand(1, 2, 3) * torch.tensor([1, 1 + 1e-7, 1])
    assert flat.unique().numel() > 1, "the rounding is there"
    assert torch.equal(maps.component(torch.ones(1, 1, 2), flat), torch.zeros(1, 1, 3))
    assert torch.equal(maps.component(torch.ones(1, 1, 2), torch.full((1, 2, 3), 0.1)), torch.zeros(1, 1, 3))


@pytest.mark.parametrize("method", WEIGHING)
def test_another_way_to_combine_is_an_error(method):
    with pytest.raises(CamError, match='combine must be "sum" or "eigen"'):
        camfn.METHODS[method].function(small_net(), "features", inputs(), combine="mean", **LINEAR.get(method, {}))


@pytest.mark.parametrize("options", [{"budget": 0.5}, {"tolerance": 0.1}, {"sweep": camfn.Sweep(dtype=torch.bfloat16)}])
def test_what_knows_the_error_of_a_sum_is_refused_with_another_way_to_combine(options):
    with pytest.raises(CamError, match='estimate the error of a sum: pass combine="sum"'):
        camfn.score_cam(small_net(), "features", inputs(), combine="eigen", **options)


def test_the_map_is_the_one_that_pytorch_grad_cam_smooths_by_eigen_up_to_its_sign():
    """Its map is float32, and what it has below zero is cut: where its sign is the other one, the other side of the map."""
    torchvision_models()  # which it imports
    package = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    net, x, classes = small_net(dense=True).eval().float(), inputs(6, dtype=torch.float32), [1, 3, 0, 2, 4, 1]
    with package.GradCAM(net, [net.stem[2]]) as extractor:
        theirs = torch.from_numpy(extractor(x, [ClassifierOutputTarget(c) for c in classes], eigen_smooth=True))
    assert theirs.shape == (6, 8, 8), "a layer of the input's size: nothing is resized"
    ours = camfn.grad_cam(net, "stem.2", x, classes, combine="eigen", relu=False, normalize=False)
    for mine, other in zip(ours, theirs):
        turned = [maps.normalize((turn * mine).clamp(min=0), (0, 1)) for turn in (1, -1)]
        assert_close(min(turned, key=lambda one: float((one - other).abs().max())), other, 1e-5)

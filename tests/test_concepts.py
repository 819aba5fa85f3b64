"""Factors and concepts: against scikit-learn, activations of which the factors are known, and pytorch-grad-cam."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import camfn
from camfn import CamError
from camfn.formulas import factorization
from tests.oracles.closeness import assert_close, close
from tests.oracles.libraries import torchvision_models
from tests.oracles.networks import inputs, small_net


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(values: Tensor, parts: int, steps: int) -> float:
    left, right = factorization.factors(values, parts, steps)
    return float((values - left @ right).norm() / values.norm())


# ---------------------------------------------------------------------------------------------------------- factors


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (6, 6)])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_factors_are_those_of_scikit_learn_step_by_step(shape, steps):
    """Its coordinate descent, from the beginning that it calls nndsvd."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    from sklearn.decomposition._nmf import _initialize_nmf

    values = uniform(*shape)
    w, h = _initialize_nmf(values.numpy(), 3, init="nndsvd", random_state=0)
    if steps:
        theirs = decomposition.NMF(3, init="custom", solver="cd", max_iter=steps, tol=0)
        w = theirs.fit_transform(values.numpy(), W=w, H=h)
        h = theirs.components_
    left, right = factorization.factors(values, 3, steps)
    order = (torch.from_numpy(w).square().sum(0) * torch.from_numpy(h).square().sum(1)).argsort(descending=True)
    assert_close(left, torch.from_numpy(w)[:, order], 1e-7)  # its singular vectors are approximate
    assert_close(right, torch.from_numpy(h)[order], 1e-7)


def test_the_error_falls_with_every_sweep_and_with_every_part():
    values = uniform(9, 30)
    by_steps = [error(values, 4, steps) for steps in range(8)]
    assert all(b < a for a, b in itertools.pairwise(by_steps))
    by_parts = [error(values, parts, 200) for parts in range(1, 10)]
    assert all(b < a for a, b in itertools.pairwise(by_parts))
    assert by_parts[-1] < 1e-3 < by_parts[-2]


def test_nothing_is_below_zero_and_the_larger_parts_come_first():
    left, right = factorization.factors(uniform(9, 30), 4, 50)
    assert (left >= 0).all()
    assert (right >= 0).all()
    sizes = left.norm(dim=0) * right.norm(dim=1)
    assert torch.equal(sizes, sizes.sort(descending=True).values)


def test_known_factors_are_found():
    """Two parts, each alone in some row and column: there is one factorization, up to a factor."""
    left = torch.tensor([[0.0, 3], [0, 1], [2, 0], [1, 1], [4, 0]], dtype=torch.float64)
    right = torch.tensor([[0, 3, 0, 1, 4, 0], [1.0, 0, 2, 0, 0, 5]], dtype=torch.float64)
    found = factorization.factors(left @ right, 2, 500)
    for (w, h), (u, v) in zip(zip(left.T, right), zip(found.left.T, found.right)):
        assert_close(torch.outer(u, v), torch.outer(w, h), 1e-6)


def test_a_matrix_of_a_lower_rank_leaves_parts_of_zeros():
    values = torch.outer(uniform(4), uniform(6, seed=1))
    left, right = factorization.factors(values, 3, 20)
    close(left @ right, values)
    close(left[:, 1:] @ right[1:], torch.zeros_like(values), size=values.max())
    zeros = factorization.factors(torch.zeros(4, 6), 3, 20)
    assert int(zeros.left.count_nonzero()) == 0
    assert torch.isfinite(zeros.right).all()


# --------------------------------------------------------------------------------------------------------- concepts


class Shown(nn.Module):
    """The layer shows the input; the rest is a pooled linear head."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.layer, self.fc = nn.Identity(), nn.Linear(channels, classes).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(x).flatten(2).mean(-1))


VECTORS = torch.tensor([[4.0, 1, 0, 2, 0], [0, 0, 3, 0, 1]], dtype=torch.float64)


def made_of(seed: int = 0) -> tuple[Tensor, Tensor]:
    """An activation of two images that is made of two concepts, and where they are: each alone at some position."""
    places = torch.relu(uniform(2, 2, 4, 3, seed=seed) - 0.4)
    places[0, :, 0, 0], places[1, :, 3, 2] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.8])
    return torch.einsum("nkhw,kc->nchw", places, VECTORS), places


def test_concepts_that_are_there_are_found_where_they_are():
    x, places = made_of()
    found = camfn.factorize(Shown(5, 3), "layer", x, concepts=2, steps=2000)
    peaks = places.amax((0, 2, 3))
    assert_close(found.maps, places / peaks[:, None, None], 1e-4)
    assert_close(found.vectors, VECTORS * peaks[:, None], 1e-3)
    assert float(found.error) < 1e-4
    assert found.layer == "layer"


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_maps_and_vectors_make_up_the_activation_but_for_the_error(dims):
    net, x = small_net(dims=dims, channels=8), inputs(3, dims=dims)
    tapped = camfn.tap(net, "act")(camfn.state_of(net), x).seen
    errors = []
    for concepts in (1, 3, 8):
        found = camfn.factorize(net, "act", x, concepts=concepts)
        assert found.maps.shape == (3, concepts, *(4,) * dims)
        assert found.maps.min() >= 0
        close(found.maps.flatten(2).amax((0, 2)), torch.ones(concepts, dtype=torch.float64))
        sums = torch.einsum("nk...,kc->nc...", found.maps, found.vectors)
        close(found.error, (tapped - sums).norm() / tapped.norm(), size=1)
        errors.append(float(found.error))
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.6


def test_scores_are_of_the_concept_alone_at_every_position():
    net, x = small_net(dense=True), inputs(2)
    found = camfn.factorize(net, "act", x, concepts=3)
    everywhere = found.vectors[:, :, None, None].expand(-1, -1, 4, 4)
    with torch.no_grad():
        expected = net.eval().fc(everywhere.flatten(1))
    for image in range(2):
        close(found.scores[image], expected)
    best = camfn.factorize(net, "act", x, camfn.targets.top(2), concepts=3)
    close(best.scores, found.scores.gather(2, best.classes[:, None].expand(-1, 3, -1)))
    assert torch.equal(best.classes, net(x).topk(2).indices)
    one = camfn.factorize(net, "act", x, [4, 1], concepts=3)
    close(one.scores[..., 0], torch.stack([found.scores[0, :, 4], found.scores[1, :, 1]]))


def test_each_image_keeps_its_own_other_inputs():
    class Gained(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_net().eval()

        def forward(self, image: Tensor, gain: Tensor) -> Tensor:
            return self.inner(image) * gain[:, None]

    gain = torch.tensor([1.0, -3.0], dtype=torch.float64)
    found = camfn.factorize(Gained(), "inner.act", (inputs(2), gain), concepts=2)
    close(found.scores[1], -3 * found.scores[0])
    assert found.scores[0].abs().max() > 0.1


def test_size_and_layer_and_dtype():
    net, x = small_net(), inputs(2)
    found, large = (camfn.factorize(net, net.act, x, concepts=2, size=size) for size in (None, "input"))
    close(large.maps, camfn.maps.resize(found.maps, (8, 8)))
    half = camfn.factorize(net.to(torch.bfloat16), "act", x.to(torch.bfloat16), concepts=2)
    assert half.maps.dtype == half.vectors.dtype == half.scores.dtype == torch.float32
    assert_close(half.maps, found.maps, 0.1)


def test_under_autocast_the_factors_are_made_in_float32():
    net, x = small_net(dtype=torch.float32), inputs(2, dtype=torch.float32)
    expected = camfn.factorize(net, "act", x, concepts=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = camfn.factorize(net, "act", x, concepts=2)
    assert found.maps.dtype == found.vectors.dtype == found.scores.dtype == torch.float32
    sums = torch.einsum("nkhw,kc->nchw", found.maps, found.vectors)
    assert_close(sums, torch.einsum("nkhw,kc->nchw", expected.maps, expected.vectors), 0.02 * float(sums.max()))
    assert not torch.equal(found.maps, expected.maps)


def test_the_same_call_gives_the_same_and_keeps_no_graph():
    net, x = small_net(), inputs(2)
    one, other = (camfn.factorize(net, "act", x) for _ in range(2))
    for a, b in zip(one[:3], other[:3]):
        assert torch.equal(a, b)
        assert not a.requires_grad


def test_the_graph_of_a_plain_call_has_the_gradient_of_transforms():
    net, x = small_net(), inputs(2)

    def total(x: torch.Tensor) -> torch.Tensor:
        found = camfn.factorize(net, "act", x, 1, concepts=2)
        return found.maps.square().sum() + found.scores.sum()

    own = x.clone().requires_grad_()
    total(own).backward()
    close(own.grad, grad(total)(x))


def test_mapped_each_image_has_concepts_of_its_own():
    net, x = small_net(), inputs(3)
    found = vmap(lambda image: camfn.factorize(net, "act", image[None], 1, concepts=2)[:3])(x)
    for image in range(3):
        alone = camfn.factorize(net, "act", x[image : image + 1], 1, concepts=2)
        for together, one in zip(found, alone):
            assert_close(together[image], one, 1e-9)


def test_maps_can_be_differentiated():
    """At the end of many sweeps, where it does not matter any more where they began."""
    net = Shown(5, 3)
    x, _ = made_of()
    x = x + 0.01 * uniform(*x.shape, seed=5)
    along, step = uniform(*x.shape, seed=6), 1e-4

    def maps(x: Tensor) -> Tensor:
        return camfn.factorize(net, "layer", x, concepts=2, steps=1500).maps

    expected = (maps(x + step * along) - maps(x - step * along)) / (2 * step)
    assert_close(jvp(maps, (x,), (along,))[1], expected, 1e-3 * float(expected.abs().max()))


def test_pytorch_grad_cam_makes_no_smaller_an_error():
    """It begins at random and takes each channel's minimum off first; behind a ReLU with a zero in each channel: nothing."""
    torchvision_models()  # which it imports
    package = pytest.importorskip("pytorch_grad_cam.feature_factorization.deep_feature_factorization")
    net, x = small_net(channels=12), inputs(4)
    tapped = camfn.tap(net, "act")(camfn.state_of(net), x).seen.detach()
    alive = (tapped.flatten(2).amin((0, 2)) == 0) & (tapped.flatten(2).amax((0, 2)) > 0)
    assert alive.all()
    concepts, places = package.dff(tapped.numpy().copy(), n_components=4)
    theirs = torch.einsum("ck,nkhw->nchw", torch.from_numpy(concepts), torch.from_numpy(places))
    assert float(camfn.factorize(net, "act", x, concepts=4).error) <= float((tapped - theirs).norm() / tapped.norm()) * 1.001


# --------------------------------------------------------------------------------------------------------- refusals


def test_what_is_below_zero_is_left_out_and_said():
    net, x = small_net(), inputs(2)
    with pytest.warns(camfn.CamWarning, match=r"\d+% of the activation's energy at layer 'features' is negative"):
        found = camfn.factorize(net, "features", x, concepts=2)
    close(found.maps, camfn.factorize(net, "act", x, concepts=2).maps)


@pytest.mark.parametrize("concepts", [0, 7, 2.5, True, "3"])
def test_a_wrong_number_of_concepts(concepts):
    with pytest.raises(
        CamError, match=r"concepts=.* must be a number from 1 to 6: layer 'act' has 6 channels, and 32 positions"
    ):
        camfn.factorize(small_net(), "act", inputs(2), concepts=concepts)


def test_nothing_to_factorize():
    net = small_net()
    with torch.no_grad():
        net.features.weight.zero_()
        net.features.bias.fill_(-1)
    with pytest.raises(CamError, match="layer 'act' has no positive value, and nothing to factorize"):
        camfn.factorize(net, "act", inputs(2))
    with pytest.raises(CamError, match="factorize takes one layer"):
        camfn.factorize(small_net(), ["act"], inputs(2))
    with pytest.raises(CamError, match="size=5 must be None"):
        camfn.factorize(small_net(), "act", inputs(2), size=5)

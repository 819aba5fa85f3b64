"""States with other weights: which layer is the classifier, what is permuted and redrawn, and that the model is left alone."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import camfn
from camfn import CamError, metrics
from tests.oracles.closeness import close
from tests.oracles.networks import inputs, small_net


class TwoHeads(nn.Module):
    """Two classifiers whose logits are averaged, as those of a distilled transformer are."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3)
        self.head, self.head_dist = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        features = self.body(x).relu().mean((2, 3))
        return (self.head(features) + self.head_dist(features)) / 2


class Hidden(nn.Module):
    """A classifier behind a layer of the same width, registered before it, and beside one that never runs."""

    def __init__(self):
        super().__init__()
        self.out, self.between, self.idle = nn.Linear(5, 5), nn.Linear(3, 5), nn.Linear(6, 5)

    def forward(self, x):
        return self.out(self.between(x.mean((2, 3))).relu()).softmax(-1)


def convolutional() -> nn.Sequential:
    """The classifier of SqueezeNet: a 1x1 convolution, a ReLU, and the pooling."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def dense() -> nn.Sequential:
    """Logits of each pixel, with the classes along axis 1."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.Upsample(scale_factor=2))


def normed() -> nn.Module:
    """A classifier whose weight is made of two tensors."""
    model = small_net()
    parametrizations.weight_norm(model.fc)
    return model


MODELS = {
    "small": (small_net, ["fc.weight", "fc.bias"]),
    "two heads": (TwoHeads, ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]),
    "hidden": (Hidden, ["out.weight", "out.bias"]),
    "convolution": (convolutional, ["1.weight", "1.bias"]),
    "dense": (dense, ["2.weight", "2.bias"]),
    "weight norm": (
        normed,
        ["fc.bias", "fc.parametrizations.weight.original0", "fc.parametrizations.weight.original1"],
    ),
}


def made(name: str) -> tuple[nn.Module, list[str]]:
    build, changed = MODELS[name]
    torch.manual_seed(0)
    return build().double().eval(), changed


def differing(a: camfn._types.State, b: camfn._types.State) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("name", MODELS)
def test_a_permuted_classifier_permutes_the_logits(name):
    model, changed = made(name)
    own, before = camfn.state_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    state = metrics.permuted_classifier(model, inputs())
    assert sorted(differing(own, state)) == sorted(changed)
    clean, permuted = (camfn.pure(model)(s, inputs()) for s in (own, state))
    apart = (permuted[:, :, None] - clean[:, None]).abs().transpose(0, 1).transpose(1, 2).flatten(2).amax(2)
    order = apart.argmin(1).tolist()
    assert sorted(order) == list(range(5))
    assert all(c != of for c, of in enumerate(order)), "a class stays in its place"
    close(permuted, clean[:, order])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_a_random_classifier_has_new_weights_of_the_same_spread(name):
    model, changed = made(name)
    own = camfn.state_of(model)
    state = metrics.random_classifier(model, inputs())
    assert sorted(differing(own, state)) == sorted(changed)
    for key in changed:
        assert (state[key] != own[key]).all()
        assert float((state[key] - own[key].mean()).abs().max()) < 6 * float(own[key].std(unbiased=False)) + 1e-12


@pytest.mark.parametrize("changed", [metrics.permuted_classifier, metrics.random_classifier])
def test_a_seed_is_a_state_and_the_global_one_is_left(changed):
    model, before = small_net().eval(), torch.get_rng_state()
    a, again, b = (changed(model, inputs(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert differing(a, again) == []
    assert differing(a, b) == ["fc.weight", "fc.bias"]


def test_a_state_to_begin_with_and_a_named_layer():
    model = small_net().eval()
    start = {**camfn.state_of(model), "stem.0.bias": torch.ones(4, dtype=torch.float64)}
    state = metrics.permuted_classifier(model, inputs(), state=start, layer=model.fc)
    assert differing(start, state) == ["fc.weight", "fc.bias"]
    prepared = camfn.prepare(model)
    assert differing(metrics.permuted_classifier(prepared, inputs()), metrics.permuted_classifier(model, inputs())) == []


def test_a_map_of_a_permuted_class_is_that_of_the_class_which_took_its_place():
    model = small_net().eval()
    state, own = metrics.permuted_classifier(model, inputs()), camfn.state_of(model)
    took = [int((own["fc.weight"] == state["fc.weight"][c]).all(1).nonzero()) for c in range(5)]
    maps = camfn.grad_cam(model, "features", inputs(), "all", relu=False, normalize=False)
    permuted = camfn.grad_cam(model, "features", inputs(), "all", relu=False, normalize=False, state=state)
    close(permuted, maps[:, took])


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return x.mean((2, 3)) @ self.matrix.mT


def test_what_has_no_classifier():
    with pytest.raises(
        CamError, match=r"no linear layer gives the logits \(2, 5\): .*tried: none has as many outputs.*name it"
    ):
        metrics.permuted_classifier(Bare().double(), inputs())
    single = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1)).double()
    with pytest.raises(CamError, match="the model has one class"):
        metrics.permuted_classifier(single, inputs())
    assert len(differing(camfn.state_of(single), metrics.random_classifier(single, inputs()))) == 1  # one bias has no spread
    twice = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1), nn.Linear(1, 1)).double()
    with pytest.raises(CamError, match=r"several layers could give the single logit: '3', '2'; name it with layer="):
        metrics.random_classifier(twice, inputs())
    with pytest.raises(CamError, match="layer='act' must be linear layers or 1x1 convolutions with as many outputs"):
        metrics.permuted_classifier(small_net(), inputs(), layer="act")
    with pytest.raises(CamError, match="layer='fc', 'features' must be linear layers"):
        metrics.permuted_classifier(small_net(), inputs(), layer=["fc", "features"])
    with pytest.raises(CamError, match="'act' has no parameters in the state"):
        metrics.random_classifier(small_net(), inputs(), layer="act")


# ------------------------------------------------------------------------------------------------ layer by layer


def names_of(states) -> list[str]:
    return [name for name, _ in states]


def test_layers_come_in_the_reverse_order_of_execution():
    model = small_net().eval()
    assert names_of(metrics.randomized_states(model, inputs())) == ["fc", "features", "stem.1", "stem.0"]
    hidden = Hidden().double()
    assert names_of(metrics.randomized_states(hidden, inputs())) == ["out", "between", ""]  # what never runs is the model's own


def test_parameters_that_a_block_reads_itself_are_drawn_with_it():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    names = names_of(metrics.randomized_states(model, torch.randn(2, 4, 8, dtype=torch.float64)))
    assert names == ["norm2", "linear2", "linear1", "norm1", "self_attn"]


def test_cascading_keeps_what_is_above_and_independent_does_not():
    model = small_net().eval()
    own, before = camfn.state_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    cascading = dict(metrics.randomized_states(model, inputs()))
    alone = dict(metrics.randomized_states(model, inputs(), cascading=False))
    layers = [*alone]
    for number, name in enumerate(layers):
        assert {key.rpartition(".")[0] for key in differing(own, alone[name])} == {name}
        assert {key.rpartition(".")[0] for key in differing(own, cascading[name])} == {*layers[: number + 1]}
        assert all(torch.equal(cascading[name][key], alone[name][key]) for key in differing(own, alone[name]))
        assert all(torch.equal(own[key], cascading[name][key]) for key in own if "running" in key)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_blocks_by_name():
    model = small_net().eval()
    states = dict(metrics.randomized_states(model, inputs(), layers=["fc", model.stem]))
    assert [*states] == ["fc", "stem"]
    changed = differing(camfn.state_of(model), states["stem"])
    assert {key.split(".")[0] for key in changed} == {"fc", "stem"}
    assert not any("running" in key for key in changed), "buffers stay"
    with pytest.raises(CamError, match="has no parameters in the state"):
        list(metrics.randomized_states(model, inputs(), layers=["act"]))

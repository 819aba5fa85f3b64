"""The card: what it tells, what several methods share, and the findings, each on a network that is made to show it."""

import copy
import functools
import inspect
import itertools
import pickle
import typing

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import camfn
from camfn._types import Maps
from camfn.explanation.fields import Check
from camfn.formulas import diagnostics
from camfn.formulas.diagnostics import Finding
from tests.oracles.closeness import close
from tests.oracles.networks import CHEAP, SmallNet, inputs, small_net
from tests.oracles.vits import Patches, randomised

KINDS = ("score_cam", "grad_cam", "is_cam")


def kinds(card: camfn.Explanation) -> list[str]:
    return [finding.kind for finding in card.findings]


# --------------------------------------------------------------------------------------------------- what a card tells


def test_a_card_tells_every_setting_of_its_method():
    card = camfn.explain(small_net(), "features", inputs(), 3, method="is_cam", num_samples=2)
    assert (card.method, card.layers, card.grids) == ("is_cam", ("features",), ((4, 4),))
    assert (card.settings["num_samples"], card.settings["path"], card.settings["relu"]) == (2, "cumulative", True)
    assert card.versions["torch"] == torch.__version__
    assert card.versions["camfn"] == camfn.__version__
    with pytest.raises(TypeError):
        card.settings["num_samples"] = 3
    with pytest.raises(AttributeError):
        card.maps = None


def test_scores_are_those_of_the_model():
    net, x = small_net(), inputs()
    card = camfn.explain(net, "features", x, [3, 1], method="grad_cam")
    close(card.scores[:, 0], net.eval()(x).detach()[[0, 1], [3, 1]])
    assert (card.forwards, card.backwards, card.heads) == (2, 2, 0)


# ------------------------------------------------------------------------------------------------------ several methods


FORWARDS: list[int] = []


class Counting(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        FORWARDS.append(len(x))
        return super().forward(x)


def counting() -> Counting:
    torch.manual_seed(2)
    return Counting().double().eval()


def test_several_methods_are_what_each_is_alone():
    net, x = small_net(), inputs()
    cards = camfn.explain(net, "features", x, [3, 1], method=KINDS, num_samples=2)
    assert [card.method for card in cards] == list(KINDS)
    for card in cards:
        own = {"num_samples": 2} if card.method == "is_cam" else {}
        alone = camfn.explain(net, "features", x, [3, 1], method=card.method, **own)
        close(card.maps, alone.maps)
        assert kinds(card) == kinds(alone)


def test_several_methods_share_one_clean_forward():
    net, x = counting(), inputs(1)
    FORWARDS.clear()
    camfn.explain(net, "features", x, 3, method=["grad_cam", "grad_cam", "grad_cam"])
    assert FORWARDS == [1]


@pytest.mark.filterwarnings("ignore:layer=None")
def test_a_layer_is_chosen_once_for_all():
    net, x = counting(), inputs(1)
    FORWARDS.clear()
    camfn.explain(net, None, x, 3, method=["grad_cam", "grad_cam"])
    assert FORWARDS == [1, 1]


@pytest.mark.parametrize("names", ["nothing", ["score_cam", "nothing"]])
def test_an_unknown_method_is_an_error(names):
    with pytest.raises(camfn.CamError, match="no method named 'nothing'"):
        camfn.explain(small_net(), "features", inputs(), method=names)


def test_an_option_that_no_method_has_is_an_error():
    with pytest.raises(camfn.CamError, match="grad_cam has no option 'num_samples'"):
        camfn.explain(small_net(), "features", inputs(), method="grad_cam", num_samples=2)
    with pytest.raises(camfn.CamError, match="grad_cam, score_cam have no option 'num_samples', 'steps'"):
        camfn.explain(small_net(), "features", inputs(), method=["grad_cam", "score_cam"], num_samples=2, steps=1)


# ------------------------------------------------------------------------------------------------------------- findings


class Pooled(nn.Module):
    """A layer that a function changes, and a head."""

    def __init__(self, change=lambda h: h, head=lambda h: h.mean((2, 3))):
        super().__init__()
        self.conv, self.shown, self.fc = nn.Conv2d(3, 6, 3), nn.Identity(), nn.Linear(6, 4)
        self.change, self.head = change, head

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.head(self.shown(self.change(self.conv(x)))))


def pooled(change=lambda h: h, head=lambda h: h.mean((2, 3))) -> nn.Module:
    torch.manual_seed(0)
    return Pooled(change, head).double()


def explained(net: nn.Module, method: str = "grad_cam", **options) -> camfn.Explanation:
    return camfn.explain(net, "shown", inputs(), 2, method=method, relu=False, **options)


def weighted(h: Tensor) -> Tensor:
    """A head that looks at places: the mean, with one corner counted double."""
    return h.mean((2, 3)) + h[:, :, 0, 0]


def only(card: camfn.Explanation, kind: str) -> Finding:
    (found,) = [finding for finding in card.findings if finding.kind == kind]
    assert found.layer == "shown"
    assert found.sentence in card.notes
    return found


def test_nothing_is_found_where_nothing_is_wrong():
    assert kinds(explained(pooled(head=weighted))) == []


def test_a_class_that_does_not_depend_on_position_is_found():
    assert only(explained(pooled()), "no position").value == 1
    assert "no position" not in kinds(explained(pooled(head=weighted)))
    assert "no position" not in kinds(explained(pooled(), "score_cam"))  # which looks at no gradient


def test_a_gradient_of_zero_is_found():
    card = explained(pooled(head=lambda h: 0 * h.mean((2, 3))))
    assert only(card, "no gradient").value == 1
    assert "no position" not in kinds(card)
    half = explained(pooled(head=lambda h: h[:, :, 0, 0] * torch.tensor([[0.0], [1.0]]).double()))  # of the first image
    assert only(half, "no gradient").value == 0.5
    assert "50% of the gradients" in only(half, "no gradient").sentence


def test_dead_channels_are_found():
    share = only(
        explained(pooled(lambda h: torch.cat([h[:, :2], torch.ones_like(h[:, 2:])], 1), weighted)), "dead channels"
    ).value
    assert share == pytest.approx(4 / 6)
    assert kinds(explained(pooled(lambda h: torch.cat([h[:, :4], torch.ones_like(h[:, 4:])], 1), weighted))) == []


def test_a_channel_that_is_dead_in_one_image_only_is_not_dead():
    def change(h):
        return torch.stack([torch.cat([h[0, :1], torch.ones_like(h[0, 1:])]), h[1]])

    assert diagnostics.about_activations([change(inputs(2)).flatten(2)], ["a"]) == ()


def test_channels_that_are_not_finite_are_found():
    def head(h):
        return torch.nan_to_num(weighted(h), posinf=0.0)

    card = explained(pooled(lambda h: torch.cat([h[:, :5], torch.full_like(h[:, 5:], torch.inf)], 1), head))
    assert only(card, "non-finite channels").value == pytest.approx(1 / 6)


def test_weights_that_are_nearly_equal_and_one_that_has_it_all_are_found():
    quiet, loud = pooled(head=weighted), pooled(head=weighted)
    with torch.no_grad():
        quiet.fc.weight *= 1e-3
        loud.fc.weight *= 1e3
    assert only(explained(quiet, "score_cam"), "equal weights").value > 0.99
    assert only(explained(loud, "score_cam"), "one channel").value > 0.9


def test_half_of_the_weight_on_one_channel_is_enough():
    """Of eight channels and more: of few, some have to."""
    rest = [0.05] * 6
    (found,) = diagnostics.about_weights([torch.tensor([[[0.6, 0.1, *rest]]])], ["a"])
    assert (found.kind, round(found.value, 6)) == ("one channel", 0.6)
    assert diagnostics.about_weights([torch.tensor([[[0.4, 0.3, *rest]]])], ["a"]) == ()
    assert diagnostics.about_weights([torch.tensor([[[0.6, 0.2, 0.2]]])], ["a"]) == ()
    (found,) = diagnostics.about_weights([torch.tensor([[[0.95, 0.05]]])], ["a"])
    assert found.kind == "one channel"


# A layer norm follows this layer, and the class token alone is read: no length of a patch's vector matters.
BEFORE_NORM, NORM = "blocks.layers.0", "blocks.layers.1.norm1"
SIGNED = {
    "hires_cam": {},
    "eigen_grad_cam": {},
    "seg_eigen_cam": {"side": "class"},
    "hires_cam, eigen": {"combine": "eigen"},
}


def transformer() -> tuple[nn.Module, Tensor]:
    return randomised(Patches(class_token=True)), inputs(2)


@pytest.mark.parametrize("name", SIGNED)
def test_a_sum_that_cancels_before_a_layer_norm_warns(name):
    (net, x), method, options = transformer(), name.partition(",")[0], SIGNED[name]
    told = "2 of 2 maps at layer" if name == "hires_cam" else "the sign of 2 of 2 maps at layer"
    with pytest.warns(camfn.CamWarning, match=f"^{told} 'blocks.layers.0' .* what is left where the parts of a sum cancel"):
        camfn.METHODS[method].function(net, BEFORE_NORM, x, 1, relu=False, **options)
    card = camfn.explain(net, BEFORE_NORM, x, 1, method=method, relu=False, **options)
    assert kinds(card) == ["cancelled sum"]
    assert "cancelled sum" not in kinds(camfn.explain(net, NORM, x, 1, method=method, relu=False, **options))


def test_other_methods_do_not_cancel_there():
    net, x = transformer()
    for method in ("grad_cam", "layer_cam", "grad_cam_elementwise", "xgrad_cam", "seg_eigen_cam", "score_cam", "ablation_cam"):
        assert "cancelled sum" not in kinds(camfn.explain(net, BEFORE_NORM, x, 1, method=method, relu=False))


def test_the_sum_of_channels_behind_a_plain_layer_norm_cancels():
    """Its mean over channels is zero by definition."""
    net, x = transformer()
    net.blocks.layers[1].norm1.weight.data.fill_(1), net.blocks.layers[1].norm1.bias.data.fill_(0)
    assert only_at(camfn.explain(net, NORM, x, 1, method="mean_cam"), "cancelled sum").layer == NORM


def only_at(card: camfn.Explanation, kind: str) -> Finding:
    (found,) = [finding for finding in card.findings if finding.kind == kind]
    return found


def test_what_cancels_is_a_share_of_the_parts_without_signs():
    left = torch.tensor([[1e-4, 1.0], [0.02, 1e-7]])
    (found,) = diagnostics.about_sums([left], ["a"])
    assert found.value == 0.5
    assert found.sentence.startswith("2 of 4 maps at layer 'a' are what is left where the parts of a sum cancel (0.0001 of")


def test_channels_of_a_negative_mean_are_found_in_fem():
    spotted = torch.zeros(6, 6).double()
    spotted[2, 3] = 5.0  # where every channel stands out

    def shifted(by: float):
        return lambda h: 0 * h + spotted + torch.tensor([by, 0, 0, 0, 0, 0]).double().reshape(6, 1, 1)

    net = pooled(shifted(-3.0), weighted)
    assert only(explained(net, "fem"), "negative channels").value == pytest.approx(_share_of_the_first(-3.0))
    assert "negative channels" not in kinds(explained(net, "fem", form="share"))
    assert "negative channels" not in kinds(explained(pooled(shifted(3.0), weighted), "fem"))


def _share_of_the_first(shift: float) -> float:
    """All channels mark the one spot, with the weight of their mean: 5 / 36, and the first less its shift."""
    first, other = abs(5 / 36 + shift), 5 / 36
    return first / (first + 5 * other)


class Squeezed(nn.Module):
    """A 1x1 convolution to the classes, a function, and a mean, as in SqueezeNet."""

    def __init__(self, between=torch.relu):
        super().__init__()
        self.shown, self.fc, self.between = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self.fc(self.shown(x))).mean((2, 3))


def test_a_map_of_cam_that_is_not_the_parts_of_the_score_is_found():
    torch.manual_seed(0)
    net, plain = Squeezed().double(), Squeezed(lambda h: h).double()
    plain.load_state_dict(net.state_dict())
    card = camfn.explain(net, "shown", inputs(), 2, method="cam", fc="fc")
    found, scores = only(card, "not the score's parts"), net(inputs())[:, 2].detach()
    told = plain(inputs())[:, 2].detach()
    assert found.value == pytest.approx(float(((told - scores).abs() / torch.maximum(told.abs(), scores.abs())).max()))
    contrast = camfn.targets.logit(2) - camfn.targets.logit(1)
    for target in (2, "all", contrast):
        assert "not the score's parts" in kinds(camfn.explain(net, "shown", inputs(), target, method="cam", fc="fc"))
        assert kinds(camfn.explain(plain, "shown", inputs(), target, method="cam", fc="fc")) == []


def test_cam_at_a_layer_before_the_last_is_not_the_parts_of_the_score():
    net = pooled(lambda h: h, lambda h: h.relu().mean((2, 3)))
    assert "not the score's parts" in kinds(camfn.explain(net, "shown", inputs(), 2, method="cam", fc="fc"))
    assert kinds(camfn.explain(pooled(), "shown", inputs(), 2, method="cam", fc="fc")) == []


def test_a_flat_map_and_a_negative_one_are_found():
    flat = explained(pooled(lambda h: h.mean((2, 3), keepdim=True).expand_as(h), weighted))
    assert only(flat, "flat map").value == 1
    below = pooled(lambda h: -h.abs() - 1, weighted)
    with torch.no_grad():
        below.fc.weight.abs_()
    card = camfn.explain(below, "shown", inputs(), 2, method="grad_cam")
    assert only(card, "negative map").value == 1


def test_findings_are_not_looked_for_under_a_transform():
    net, x = pooled(), inputs()
    found = []

    def total(x):
        card = camfn.explain(net, "shown", x, 2, method="grad_cam", relu=False)
        found.append(card.findings)
        return card.maps.sum()

    torch.func.grad(total)(x)
    assert found == [()]


def test_the_card_names_what_was_scored_for_each_image():
    net, x, t = small_net(), inputs(2), camfn.targets
    for target, said in (
        (None, [[f"logit {i}"] for i in net.eval()(x).argmax(1).tolist()]),
        (t.probability([3, 1]), [["probability 3"], ["probability 1"]]),
        (t.logit(torch.tensor([[0, 2], [1, 4]])), [["logit 0", "logit 2"], ["logit 1", "logit 4"]]),
        (t.logit(3) - t.logit(1), [["logit 3 - logit 1"]] * 2),
    ):
        for method in ("score_cam", "grad_cam", "rise"):
            row = camfn.METHODS[method]
            card = camfn.explain(net, "features" if row.of_layer else None, x, target, method=method, **CHEAP.get(method, {}))
            own = [[name.replace("logit", "probability") for name in names] for names in said]
            assert [list(names) for names in card.targets] == (own if method == "rise" and target is None else said)
            assert card.scores.shape == (2, len(said[0]))


def test_a_card_made_under_a_transform_has_no_names():
    net, x = small_net(), inputs(2)
    kept = []

    def maps(x):
        kept.append(camfn.explain(net, "features", x, 1, method="grad_cam"))
        return kept[-1].maps.sum()

    torch.func.grad(maps)(x)
    assert kept[0].targets == ()


# ------------------------------------------------------------------------------------------------------ copies of a card


def halved(activation: Tensor) -> Tensor:
    """A layout that can be pickled."""
    return activation[:, :3]


def loaded(card: camfn.Explanation, folder) -> dict[str, camfn.Explanation]:
    torch.save(card, folder / "card.pt")
    return {
        "pickle": pickle.loads(pickle.dumps(card)),
        "copy": copy.copy(card),
        "deepcopy": copy.deepcopy(card),
        "save": torch.load(folder / "card.pt", weights_only=False),
    }


def test_a_card_is_the_same_after_it_was_pickled_copied_and_saved(tmp_path):
    options = {"layout": halved, "num_samples": 2, "sweep": camfn.Sweep(chunk=2)}
    card = camfn.explain(small_net(), "features", inputs(), 3, method="is_cam", **options)
    for found in loaded(card, tmp_path).values():
        assert type(found) is camfn.Explanation
        for name in ("method", "layers", "grids", "targets", "forwards", "findings", "notes", "seconds"):
            assert getattr(found, name) == getattr(card, name)
        assert dict(found.settings) == dict(card.settings)
        assert dict(found.versions) == dict(card.versions)
        for name in ("maps", "scores", "classes"):
            assert torch.equal(getattr(found, name), getattr(card, name))
        assert torch.equal(found.weights[0], card.weights[0])
        with pytest.raises(TypeError):
            found.settings["num_samples"] = 3


def test_the_name_stands_for_a_setting_that_cannot_be_pickled(tmp_path):
    seen = []
    sweep = camfn.Sweep(progress=lambda done, total: seen.append(done))
    card = camfn.explain(small_net(), "features", inputs(), 3, layout=lambda activation: activation, sweep=sweep)
    assert callable(card.settings["layout"])
    for way, found in loaded(card, tmp_path).items():
        if way != "copy":
            assert (found.settings["layout"], found.settings["sweep"].progress) == ("<lambda>", "<lambda>")
            assert found.settings["sweep"]._replace(progress=False) == camfn.Sweep()
            assert torch.equal(found.maps, card.maps)


def test_a_setting_with_a_graph_is_pickled_without_it():
    net = small_net()
    state = {**camfn.state_of(net), **{name: 1 * parameter for name, parameter in net.named_parameters()}}
    card = camfn.explain(net, "features", inputs(), 3, method="mean_cam", state=state)
    found = copy.deepcopy(card)
    assert not any(tensor.requires_grad for tensor in (found.maps, *found.settings["state"].values()))
    assert card.settings["state"] is state


class Cards(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> camfn.Explanation:
        torch.set_num_threads(1)
        x = inputs()[i : i + 1].requires_grad_()
        return camfn.explain(small_net(), "features", x, 3, method="mean_cam", layout=lambda activation: activation)


def test_a_worker_of_a_data_loader_returns_cards():
    loader = torch.utils.data.DataLoader(Cards(), batch_size=None, num_workers=1, timeout=120)
    for i, found in enumerate(loader):
        assert torch.equal(found.maps, Cards()[i].maps)


# --------------------------------------------------------------------------------------------------- what help says


@pytest.mark.parametrize("name", [*camfn.METHODS, "smooth", "integrate", "augment"])
def test_a_method_says_that_it_returns_maps(name):
    function = getattr(camfn, name) if name in camfn.METHODS else getattr(camfn, name)(camfn.grad_cam)
    assert inspect.signature(function).return_annotation == Maps
    assert typing.get_type_hints(function)["return"] == Maps
    parameters = [*inspect.signature(function).parameters]
    assert parameters[:4] == ["model", "layer", "x", "target"]
    assert "normalize" in parameters


# ---------------------------------------------------------------------------------------------------- maps and controls


def test_maps_that_rank_the_positions_as_the_mean_of_the_channels_are_found():
    card = explained(pooled(lambda h: h.abs(), weighted), "eigen_cam")
    found = only(card, "no class")
    mean = camfn.mean_cam(pooled(lambda h: h.abs(), weighted), "shown", inputs())
    told = camfn.metrics.rank_correlation(card.maps, mean)
    assert found.value == float((told >= 0.95).float().mean())
    assert f"correlation {float(told[told >= 0.95].min()):.2f} or more)" in found.sentence
    (same,) = diagnostics.about_agreement([torch.tensor([[1.0, 0.999]])], ["shown"])
    assert "2 of 2 maps at layer 'shown' rank the positions as mean_cam does (correlation 1.00): they" in same.sentence
    for method in ("grad_cam", "mean_cam", "hires_cam"):  # `mean_cam` need not be told that it is itself
        assert "no class" not in kinds(explained(pooled(head=weighted), method))


def test_the_trained_network_has_no_findings_about_a_usual_map():
    net, x = camfn.demo.network(), torch.stack([camfn.demo.preprocess(camfn.demo.scene(i, 1 + i % 3).image) for i in range(9)])
    for method in ("grad_cam", "xgrad_cam", "hires_cam", "recipro_cam", "ablation_cam"):
        assert set(kinds(camfn.explain(net, "features", x, method=method))) <= {"no position"}, method
    assert set(kinds(camfn.explain(net, "features", x, method="cam", fc="classify"))) == set()


@pytest.fixture
def scenes() -> Tensor:
    return torch.stack([camfn.demo.preprocess(camfn.demo.scene(i, 2).image) for i in (1, 3)])


def test_a_check_compares_with_each_control(scenes):
    net = camfn.demo.network()
    card = camfn.explain(net, "features", scenes, method="grad_cam", check=True)
    plain = camfn.explain(net, "features", scenes, method="grad_cam")
    assert torch.equal(card.maps, plain.maps)
    assert plain.check is None
    best = net(scenes).topk(2).indices
    other = camfn.grad_cam(net, "features", scenes, best[:, 1])
    close(card.check.other[:, 0, 0], camfn.metrics.rank_correlation(plain.maps, other))
    close(card.check.mean[:, 0, 0], camfn.metrics.rank_correlation(plain.maps, camfn.mean_cam(net, "features", scenes)))
    score = camfn.metrics.score_function(net, scenes, camfn.targets.probability(best[:, 0]))
    area = functools.partial(camfn.metrics.deletion_curve, plain.maps, scenes, score, steps=6)
    apart = area(order="lerf").area - area(order="morf").area
    random = [area(order="random", seed=seed).area for seed in range(6)]
    wins = [apart > (one - next).abs() for one, next in itertools.pairwise(random)]
    assert torch.equal(card.check.random[:, 0, 0], torch.stack(wins).float().mean(0))
    assert f"  check: {card.check.sentence}" in repr(card)
    assert card.check.sentence in card._repr_html_()


def test_maps_of_the_class_pass_their_check_and_the_reverse_order_does_not():
    net = camfn.demo.network()
    drawn = [camfn.demo.scene(seed, 2) for seed in range(20, 40)]
    x, target = torch.stack([camfn.demo.preprocess(each.image) for each in drawn]), [each.classes[0] for each in drawn]

    def passed(method) -> float:
        return float(camfn.explain(net, "features", x, target, method=method, check=True).check.passed.float().mean())

    assert passed("grad_cam") > 0.9
    assert passed("layer_cam") > 0.6
    assert passed("mean_cam") == passed("random_cam") == 0
    assert passed(camfn.method(lambda a, g: -g.mean(-1), name="against", needs="gradients")) == 0


def test_a_map_of_no_class_fails_its_check_and_says_why(scenes):
    card = camfn.explain(camfn.demo.network(), "features", scenes, method="mean_cam", check=True)
    assert not card.check.passed.any()
    alike = "2 are like the map of another class (correlation 1.00); 2 are like the mean of the channels (correlation 1.00)"
    assert alike in repr(card)


def test_a_check_has_a_value_for_each_target_and_layer(scenes):
    table = torch.tensor([[1, 2], [3, 4]])
    card = camfn.explain(camfn.demo.network(), ["body", "features"], scenes, table, method="grad_cam", check=True)
    alone = camfn.explain(camfn.demo.network(), "features", scenes, table, method="grad_cam", check=True)
    assert card.check.other.shape == card.check.mean.shape == card.check.random.shape == (2, 2, 2)
    for mine, own in zip(card.check[:3], alone.check[:3]):
        close(mine[..., 1], own[..., 0])


def test_a_check_leaves_out_what_does_not_apply(scenes):
    """No class, or no layer."""
    of_callable = camfn.explain(camfn.demo.network(), "features", scenes, lambda y: y[0] - y[1], method="grad_cam", check=True)
    assert of_callable.check.other.isnan().all()
    assert not of_callable.check.mean.isnan().any()
    whole = camfn.explain(camfn.demo.network(), None, scenes, method="full_grad", check=True)
    assert whole.check.mean.isnan().all()
    assert not whole.check.other.isnan().any()


def test_the_line_of_a_check():
    def line(other: float, mean: float, random: float) -> str:
        return Check(*(torch.tensor([[[each]]]) for each in (other, mean, random)), 5).sentence

    assert line(0.25, 0.5, 1.0) == (
        "the map passes the check: it beats 5 of 5 random orders of the cells, and is unlike the map of another class "
        "(correlation 0.25) and the mean of the channels (correlation 0.50)"
    )
    assert line(torch.nan, torch.nan, 1.0) == "the map passes the check: it beats 5 of 5 random orders of the cells"
    assert line(0.96, 0.5, 0.4) == (
        "the map fails the check: it does not beat random orders of the cells (it beats 2 of 5), and it is like the map of "
        "another class (correlation 0.96)"
    )


def test_the_line_of_a_check_of_several_maps():
    def line(*maps: tuple[float, float, float]) -> str:
        return Check(*torch.tensor(maps).T[:, :, None, None], 5).sentence

    assert line((0.25, 0.5, 1.0), (0.1, 0.4, 1.0)) == (
        "all 2 maps pass the check: they beat 5 of 5 random orders of the cells, and are unlike the map of another class "
        "(correlation 0.25) and the mean of the channels (correlation 0.50)"
    )
    assert line((0.96, 0.5, 0.4), (0.1, 1.0, 0.0), (0.1, 1.0, 0.2)) == (
        "3 of 3 maps fail the check: 3 do not beat random orders of the cells (the worst beats 0 of 5); 1 is like the map of "
        "another class (correlation 0.96); 2 are like the mean of the channels (correlation 1.00)"
    )
    assert line((0.25, 0.5, 1.0), (0.1, 0.5, 0.8)) == (
        "1 of 2 maps fails the check: 1 does not beat random orders of the cells (the worst beats 4 of 5)"
    )


def test_a_check_goes_with_its_card(scenes, tmp_path):
    card = camfn.explain(camfn.demo.network(), "features", scenes, method="grad_cam", check=True)
    for name in ("card.npz", "card.safetensors"):
        card.save(tmp_path / name)
        again = camfn.load(tmp_path / name).check
        assert all(torch.equal(mine, own) for mine, own in zip(again[:3], card.check[:3]))
        assert again.sentence == card.check.sentence
    assert pickle.loads(pickle.dumps(card)).check.sentence == card.check.sentence


@pytest.mark.filterwarnings("ignore::camfn.CamWarning")
def test_a_map_that_is_not_finite_fails_its_check(scenes):
    scale = torch.tensor([torch.nan, 1.0])[:, None, None]
    half = camfn.method(lambda a, g: g.mean(-1) * scale, name="half", needs="gradients")
    card = camfn.explain(camfn.demo.network(), "features", scenes, method=half, check=True)
    plain = camfn.explain(camfn.demo.network(), "features", scenes, method="grad_cam", check=True)
    assert card.check.random[0] == 0
    assert torch.equal(card.check.random[1], plain.check.random[1])


def test_a_check_is_refused_under_a_transform():
    net = small_net()
    with pytest.raises(camfn.CamError, match="check=True reads values"):
        vmap(lambda x: camfn.explain(net, "features", x[None], 1, method="grad_cam", check=True).maps)(inputs())

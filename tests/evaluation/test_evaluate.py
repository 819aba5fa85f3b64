"""Evaluations, beside plain calls of methods and metrics."""

import functools
import json

import numpy as np
import pytest
import torch
from torch import nn

import camfn
from camfn import CamError, demo, metrics, targets
from camfn.evaluation import MEASURES, scenes
from camfn.metrics.controls import CONTROL_METHODS, CONTROLS
from camfn.testing import Spec, TinyNet

CHEAP = ["other_class", "permuted_classifier", "other_energy", "deletion", "average_drop", "energy", "pixel_auc", "gini"]


@pytest.fixture(scope="module")
def network():
    return demo.network()


@pytest.fixture(scope="module")
def batches():
    return list(scenes(6, batch=4))


@pytest.fixture(scope="module")
def found(network, batches):
    return camfn.evaluate(network, "features", batches, methods=["grad_cam", "layer_cam"], metrics=CHEAP)


def signed(network, batch, method=camfn.grad_cam, **options):
    target = options.pop("target", batch["target"])
    return method(network, "features", batch["x"], target, relu=False, normalize=False, **options)


def beside(found, method, metric, batches, values):
    torch.testing.assert_close(found.values[method][metric], torch.cat([values(batch) for batch in batches]), equal_nan=True)


def test_values_are_those_of_plain_calls(found, network, batches):
    def energy(batch):
        return metrics.energy_pointing_game(signed(network, batch), batch["masks"])

    def other(batch):
        return metrics.energy_pointing_game(signed(network, batch), batch["others"])

    def dropped(batch):
        maps = signed(network, batch).clamp(min=0)
        score = metrics.score_function(network, batch["x"], targets.probability(batch["target"]))
        return metrics.average_drop(maps / maps.amax((1, 2), keepdim=True), batch["x"], score)

    def likeness(batch):
        logits = network(batch["x"])
        wrong = logits.scatter(1, batch["target"][:, None], -torch.inf).argmax(1)
        return metrics.rank_correlation(signed(network, batch), signed(network, batch, target=wrong))

    def permuted(batch):
        state = metrics.permuted_classifier(network, batch["x"])
        return metrics.rank_correlation(signed(network, batch), signed(network, batch, state=state))

    with torch.no_grad():
        beside(found, "grad_cam", "energy", batches, energy)
        beside(found, "grad_cam", "other_energy", batches, lambda batch: other(batch) / (other(batch) + energy(batch)))
        beside(found, "grad_cam", "average_drop", batches, dropped)
        beside(found, "grad_cam", "other_class", batches, likeness)
        beside(found, "grad_cam", "permuted_classifier", batches, permuted)


def test_deletion_is_the_area_under_random_orders_less_that_of_the_map(found, network, batches):
    def minus_random(batch):
        score = metrics.score_function(network, batch["x"], targets.probability(batch["target"]))
        return -metrics.deletion(signed(network, batch), batch["x"], score, minus_random=2)

    got = found.values["grad_cam"]["deletion"]
    assert float((got - torch.cat([minus_random(batch) for batch in batches])).abs().max()) < 0.2, "other random orders"
    curve = found.curves["grad_cam"]
    assert curve.scores.shape == (1, len(curve.fractions))
    assert curve.fractions[0] == 0
    assert curve.fractions[-1] == 1


def test_controls_are_there_and_know_no_class(found):
    assert set(found.controls) == {*CONTROLS, *CONTROL_METHODS}
    assert found.methods == ("grad_cam", "layer_cam", *found.controls)
    for control in found.controls:
        assert found.interval(control, "other_class").mean == pytest.approx(1)
        assert found.interval(control, "permuted_classifier").mean == pytest.approx(1)
    assert found.interval("all_ones", "average_drop")[:3] == (0, 0, 0)


def test_grad_cam_beats_the_controls_and_the_controls_do_not(found):
    assert found.beats_controls("grad_cam", "energy")
    assert found.beats_controls("grad_cam", "other_class")
    assert not any(found.beats_controls(control, "energy") for control in found.controls)
    assert not found.beats_controls("grad_cam", "gini"), "it has no better end"
    paired = found.paired("grad_cam", "energy", "mean_cam")
    assert paired.mean == pytest.approx(found.interval("grad_cam", "energy").mean - found.interval("mean_cam", "energy").mean)


def test_a_method_without_values_beats_nothing():
    """No object, no energy: neither the method nor a control has a value."""
    nan, controls = torch.full((3,), torch.nan), ("mean_cam", "all_ones")
    for own, other in ((nan, nan), (torch.ones(3), nan), (nan, torch.ones(3))):
        values = {"grad_cam": {"energy": own}, **{name: {"energy": other} for name in controls}}
        assert not camfn.Evaluation(values, controls, {}, {}, 0).beats_controls("grad_cam", "energy")


def test_batches_do_not_matter(found, network):
    again = camfn.evaluate(network, "features", scenes(6, batch=6), methods=["grad_cam", "layer_cam"], metrics=CHEAP)
    for method, own in found.values.items():
        for metric, values in own.items():
            torch.testing.assert_close(again.values[method][metric], values, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_methods_share_the_clean_pass(network, batches):
    """A function of the user, a composition and a name are judged alike."""
    mine = camfn.method(lambda activation, gradient: gradient.mean(-1), name="mine", needs="gradients")
    found = camfn.evaluate(network, "features", batches, methods=[mine, camfn.smooth(mine, 2), "grad_cam"], metrics=["energy"])
    torch.testing.assert_close(found.values["mine"]["energy"], found.values["grad_cam"]["energy"])
    assert len(found.methods) == 3 + len(found.controls)


def test_what_does_not_fit_is_left_out_with_the_reason(network, batches):
    plain = [{"x": batch["x"]} for batch in batches]
    found = camfn.evaluate(network, "features", plain, methods=["grad_cam", "legrad"], controls=False)
    assert found.methods == ("grad_cam",)
    assert "attention" in found.skipped["legrad"]
    assert found.skipped["energy"] == "no masks were given"
    assert "Not in the table: legrad" in found.markdown()
    for methods, told in ((["legrad"], "judged: legrad"), (["legrad", "ag_cam"], "judged: legrad, ag_cam: the model")):
        with pytest.raises(CamError, match=f"no method could be {told}"):
            camfn.evaluate(network, "features", plain, methods=methods, controls=False)
    with pytest.raises(CamError, match=r"judged: fem, grad_cam, .*: no layer named 'feature'") as caught:
        camfn.evaluate(network, "feature", plain, methods=["fem", "grad_cam"])
    assert str(caught.value).count("no layer named") == 1


def test_a_target_that_is_no_class(network, batches):
    def margin(y):
        return y[0] - y[1]

    found = camfn.evaluate(
        network, "features", [{"x": batches[0]["x"], "target": margin}], methods=["grad_cam"], metrics=["other_class", "gini"]
    )
    assert found.metrics == ("gini",)
    assert "not a class" in found.skipped["other_class"]


def raising(activation, gradient):
    raise KeyError("mine")


NAMED_AS_A_CONTROL = camfn.method(raising, name="all_ones", needs="gradients")


def test_methods_may_have_names_of_ones_own(network, batches):
    recipes = {name: functools.partial(camfn.score_cam, recipe=name) for name in ("paper", "authors")}
    found = camfn.evaluate(network, "features", batches, methods=recipes, metrics=["gini"], controls=False)
    for name, method in recipes.items():
        beside(found, name, "gini", batches, lambda batch, method=method: metrics.gini(signed(network, batch, method)))
    assert found.methods == ("paper", "authors")
    drop = camfn.evaluate(network, "features", batches[:1], methods=recipes, metrics=["average_drop"], controls=False)
    assert all(record["circular"] for record in drop.records()), "they are Score-CAM under another name"
    assert drop.markdown().count("°") == 3


@pytest.mark.parametrize("control", ["mean_cam", camfn.mean_cam])
def test_a_control_may_be_named_among_the_methods(network, batches, control):
    found = camfn.evaluate(network, "features", batches[:1], methods=[control, "grad_cam"], metrics=["gini"])
    assert found.methods == ("grad_cam", *found.controls)


@pytest.mark.filterwarnings("ignore::camfn.CamWarning")
def test_a_method_that_fails_costs_only_itself(network, batches):
    """An error of the user's own code, and maps that are not finite."""
    own = camfn.method(raising, name="raises", needs="gradients")
    wild = camfn.method(lambda a, g: g.mean(-1) * torch.nan, name="wild", needs="gradients")
    wanted = ["deletion", "gini", "max_box_acc"]
    with_boxes = [{**batch, "boxes": [[[0, 0, 40, 40]]] * len(batch["x"])} for batch in batches]
    found = camfn.evaluate(network, "features", with_boxes, methods=[own, wild, "grad_cam"], metrics=wanted, controls=False)
    assert found.skipped["raises"] == "KeyError: 'mine'"
    assert found.values["wild"]["deletion"].isnan().all()
    assert found.values["wild"]["max_box_acc"].isnan().all()
    assert not found.values["grad_cam"]["deletion"].isnan().any()
    assert set(found.curves) == {"grad_cam"}


def test_a_state_holds_for_scores_and_classes_too(batches):
    """As the model that has these weights, and a control of no class does not follow its own permutation."""
    net, other = (demo.network(pretrained=False, seed=seed) for seed in (1, 2))
    asked = {"methods": ["grad_cam"], "metrics": ["deletion", "permuted_classifier", "other_class", "average_drop"]}
    plain = [{"x": batch["x"]} for batch in batches]
    by_state = camfn.evaluate(net, "features", plain, state=camfn.state_of(other), **asked)
    by_model = camfn.evaluate(other, "features", plain, **asked)
    for method, own in by_model.values.items():
        for metric, values in own.items():
            torch.testing.assert_close(by_state.values[method][metric], values, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert by_state.interval("mean_cam", "permuted_classifier").mean == pytest.approx(1)


class Beside(nn.Module):
    """A network of a picture with its channels last, and of a gain for each image."""

    def __init__(self):
        super().__init__()
        self.net = demo.network()

    def forward(self, picture, gain):
        return self.net(picture.permute(0, 3, 1, 2)) * gain


def test_metrics_that_make_maps_of_changed_inputs_keep_the_axes_and_the_companions(network, batches):
    x = batches[0]["x"]
    asked = {"methods": ["grad_cam"], "metrics": ["adcc", "maximum_sensitivity"], "controls": False}
    given = {"picture": x.permute(0, 2, 3, 1).contiguous(), "gain": torch.ones(len(x), 1)}
    found = camfn.evaluate(Beside(), "net.features", [{"x": given}], axes="nhwc", masked="picture", **asked)
    plain = camfn.evaluate(network, "features", [{"x": x}], **asked)
    for metric in asked["metrics"]:
        torch.testing.assert_close(found.values["grad_cam"][metric], plain.values["grad_cam"][metric], rtol=1e-3, atol=1e-4)


def test_batches_of_several_sizes_have_one_mean_curve(network, batches):
    """The smaller grid has fewer cells than steps: its scores are those of the straight lines between."""
    small = torch.nn.functional.interpolate(batches[0]["x"], 32)
    both = [{"x": batches[0]["x"]}, {"x": small}]
    found, one = (
        camfn.evaluate(network, "features", given, methods=["grad_cam"], metrics=["deletion"], controls=False)
        for given in (both, both[1:])
    )
    curve, alone = found.curves["grad_cam"], one.curves["grad_cam"]
    assert len(alone.fractions) < len(curve.fractions)
    large = camfn.evaluate(network, "features", both[:1], methods=["grad_cam"], metrics=["deletion"], controls=False)
    between = np.interp(curve.fractions, alone.fractions, alone.scores[0])
    expected = (large.curves["grad_cam"].scores[0] + torch.from_numpy(between)) / 2
    torch.testing.assert_close(curve.scores[0], expected.to(curve.scores.dtype))


def test_an_image_without_a_box_has_no_value_and_the_others_have_theirs(network):
    x = torch.stack([demo.preprocess(demo.scene(seed).image) for seed in range(5)])
    boxes = [[[0, 0, 96, 96]]] * 4 + [[]]
    asked = {"methods": ["grad_cam"], "metrics": ["max_box_acc"]}
    found = camfn.evaluate(network, "features", [{"x": x[:2], "boxes": boxes[:2]}, {"x": x[2:], "boxes": boxes[2:]}], **asked)
    alone = camfn.evaluate(network, "features", [{"x": x[:4], "boxes": boxes[:4]}], **asked)
    for method, own in alone.values.items():
        assert found.values[method]["max_box_acc"].tolist()[:4] == own["max_box_acc"].tolist()
        assert found.values[method]["max_box_acc"][4].isnan()
    assert found.interval("all_ones", "max_box_acc")[::3] == (1, 4)


def test_one_class_has_no_other(batches):
    one = nn.Sequential(nn.Conv2d(3, 8, 9, 8), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))
    found = camfn.evaluate(one, "1", [{"x": batches[0]["x"]}], methods=["grad_cam"], metrics=["other_class", "gini"])
    assert "one class" in found.skipped["other_class"]


def test_few_images_beat_nothing():
    """The differences of five images have one sign by chance in one case of sixteen."""
    for count in range(1, 9):
        values = {"grad_cam": {"energy": torch.ones(count)}, "all_ones": {"energy": torch.zeros(count)}}
        found = camfn.Evaluation(values, ("all_ones",), {}, {}, 0)
        assert found.beats_controls("grad_cam", "energy") == (count >= 6)
        assert ("(" in found.markdown().splitlines()[2]) == (count > 1), "one image has no interval"


def test_a_target_of_several_scores_is_an_error(network, batches):
    with pytest.raises(CamError, match="one target at a time"):
        camfn.evaluate(network, "features", [{"x": batches[0]["x"], "target": targets.top(2)}], methods=["grad_cam"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ["grad_kam"]}, "grad_cam"),
        ({"metrics": ["enrgy"]}, "closest: 'energy'"),
        ({"metrics": ["max_box_acc"], "batches": [{"x": torch.zeros(1, 3, 96, 96)}]}, "no boxes were given"),
        ({"batches": []}, "batches is empty"),
        ({"batches": [{"image": 1}]}, "must have 'x'"),
        (
            {"batches": [{"x": torch.rand(1, 3, 96, 96), "target": 1}, {"x": torch.rand(1, 3, 96, 96)}]},
            "batch 1 has x, and the",
        ),
        ({"num_samples": 3}, "no method of grad_cam"),
        ({"batches": {"x": torch.rand(1, 3, 96, 96)}}, r"batches must be several mappings, such as .*, found one dict$"),
        ({"batches": torch.rand(1, 3, 96, 96)}, "batches must be several mappings, .* found one Tensor"),
        ({"batches": [(torch.rand(1, 3, 96, 96), 1)]}, "batch 0 is a tuple: it must be a mapping"),
        ({"batches": [{"x": torch.rand(1, 3, 96, 96), "masks": [1]}]}, "masks of batch 0 are a list: they must be a tensor of"),
        (
            {"batches": [{"x": torch.rand(1, 3, 96, 96), "masks": torch.ones(1, 96, 96)}]},
            "masks of batch 0 are a tensor of torch.float32: they must be a tensor of bools",
        ),
        (
            {"batches": [{"x": torch.rand(1, 3, 96, 96), "others": torch.ones(1, 96, 96) > 0}], "metrics": ["other_energy"]},
            "the metric other_energy cannot be computed: no masks were given",
        ),
        ({"normalize": "minmax"}, "evaluate has no option normalize=: .* maps are signed and unscaled"),
        ({"target": 3}, "evaluate has no option target=: inputs and targets are in the batches"),
        ({"metrics": []}, "no metric can be computed: none was asked"),
        ({"methods": []}, "methods is empty"),
        (
            {"methods": ["mean_cam"], "controls": True},
            r"methods has only controls \(mean_cam\): name a method, or pass controls=",
        ),
        (
            {"methods": ["grad_cam", camfn.smooth(camfn.fem, 2), "grad_cam"]},
            "two methods are called 'grad_cam': pass a mapping",
        ),
        ({"methods": [NAMED_AS_A_CONTROL], "controls": True}, "a control is called 'all_ones': pass a mapping"),
        ({"methods": {"mean_cam": "grad_cam", "fem": "fem"}, "controls": True}, "a control is called 'mean_cam'"),
    ],
)
def test_errors_are_one_sentence(network, given, message):
    given = {
        "batches": [{"x": torch.rand(1, 3, 96, 96)}],
        "methods": ["grad_cam"],
        "controls": False,
        "metrics": ["gini"],
        **given,
    }
    with pytest.raises(CamError, match=message):
        camfn.evaluate(network, "features", given.pop("batches"), **given)


def test_the_model_and_the_inputs_are_left_as_they_were(network, batches):
    x, state = batches[0]["x"].clone(), {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    camfn.evaluate(network, "features", batches[:1], methods=["grad_cam"], metrics=CHEAP)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(batches[0]["x"], x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_all_metrics_have_a_value_on_scenes(network):
    found = camfn.evaluate(network, "features", scenes(2, batch=2), methods=["grad_cam"], metrics="all", controls=False)
    assert found.metrics == tuple(MEASURES)
    assert not found.skipped
    assert all(bool(torch.isfinite(values).any()) for values in found.values["grad_cam"].values())
    assert 0 <= found.interval("grad_cam", "max_box_acc").mean <= 1


def test_tables_and_pictures(found, tmp_path):
    for name in ("a.md", "a.csv", "a.json", "a.png"):
        found.save(tmp_path / name)
    rows = json.loads((tmp_path / "a.json").read_text())
    assert len(rows) == len(found.methods) * len(CHEAP)
    energy = next(row for row in rows if (row["method"], row["metric"]) == ("grad_cam", "energy"))
    assert energy["mean"] == pytest.approx(float(found.values["grad_cam"]["energy"].mean()))
    assert energy["beats_controls"]
    table = (tmp_path / "a.md").read_text()
    assert table.index("other_class") < table.index("deletion") < table.index("| energy"), "class sensitivity comes first"
    assert (tmp_path / "a.csv").read_text().count("\n") == len(rows) + 1
    assert "grad_cam" in repr(found)
    assert len(repr(found).splitlines()) < 100
    with pytest.raises(CamError, match="must end in"):
        found.save(tmp_path / "a.txt")
    with pytest.raises(CamError, match="has no value of 'road'"):
        found.interval("grad_cam", "road")


def test_a_circular_metric_is_marked(network, batches):
    found = camfn.evaluate(network, "features", batches[:1], methods=["score_cam"], metrics=["average_drop"], controls=False)
    assert "°" in found.markdown()
    assert found.records()[0]["circular"]


class Summed(nn.Module):
    """Logits that are sums of those before: no layer's rows are classes."""

    def forward(self, z):
        return z.cumsum(1)


def test_a_network_without_a_classifier_to_permute_says_so(batches):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 9, 8), nn.Tanh(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Summed())
    found = camfn.evaluate(body, "1", [{"x": batches[0]["x"]}], methods=["grad_cam"], metrics=["permuted_classifier", "gini"])
    assert found.metrics == ("gini",)
    assert "no linear layer" in found.skipped["permuted_classifier"]


@pytest.mark.parametrize("dims", [1, 3])
def test_other_numbers_of_axes(dims):
    """One image after the other has the values that the batch has: no axis is taken for another."""
    spec = Spec(sides=(12,) if dims == 1 else (4, 5, 6), seed=3)
    model, side = TinyNet(spec), (3, spec.colors, *spec.sides)
    x = torch.randn(side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masks = torch.rand(3, *spec.sides, generator=torch.Generator().manual_seed(1)) > 0.6

    def batches(size):
        for start in range(0, 3, size):
            part = slice(start, start + size)
            yield {"x": x[part], "masks": masks[part], "target": torch.tensor([0, 1, 2])[part]}

    plain = [name for name, each in MEASURES.items() if each.needs in ((), ("masks",)) and name not in ("road", "arcc")]
    options = {"methods": ["grad_cam", "hires_cam"], "metrics": plain, "layout": "channels_first"}
    whole, single = (camfn.evaluate(model, "features", batches(size), **options) for size in (3, 1))
    assert set(whole.metrics) == set(plain)
    for method, own in whole.values.items():
        for metric, values in own.items():
            torch.testing.assert_close(single.values[method][metric], values, rtol=1e-4, atol=1e-6, equal_nan=True)

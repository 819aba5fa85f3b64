"""The laws for users: what `check` finds in a formula that is wrong, and what it says of it; and `check_model`.

That each law holds for camfn's methods, and sees mistakes in camfn, is in tests/laws.
"""

import collections
import functools
import inspect
import itertools
import threading

import pytest
import torch
from torch import Tensor, nn

import camfn
from camfn.testing import Case, Spec, TinyNet, TinyViT, TokenSpec, check, check_model, laws, unchanged
from tests.oracles.networks import small_net

CALLS = itertools.count()

RIGHT = {
    "spread": camfn.method(lambda a, g: g.std(-1, correction=0) + g.amax(-1), name="own", needs="gradients"),
    "mean_cam": camfn.method(lambda a: a.mean(-1), name="own", needs="activations"),
    "composition": camfn.augment(camfn.grad_cam, flips=(), factors=(0.5, 1.0)),
    "partial": functools.partial(camfn.hires_cam, relu=False),
    "swept, by name": "score_cam",
    "linear head": functools.partial(camfn.cam, fc="fc"),
}


@pytest.mark.parametrize("what", RIGHT)
def test_all_laws_hold_for_a_method_that_is_right(what):
    # CAM is of the one layer before the pooling: several are an error.
    check(RIGHT[what], examples=2, skip=("layer_independent",) if what == "linear head" else ())


def _shared_by_targets(a, g):
    return g.mean(-1).softmax(1)


def _counted(a, g):
    return g.mean(-1) + next(CALLS)


def _by_numpy(a, g):
    return torch.from_numpy(g.mean(-1).detach().numpy())


# A formula that is wrong, and laws that say so.
WRONG = {
    "a mean over the batch": (lambda a, g: g.mean(-1) - g.mean((0, -1)), {"batch_independent"}),
    "the first image's": (lambda a, g: g[:1].mean(-1).expand(len(a), -1, -1), {"batch_independent", "image_permutation"}),
    "the number of a channel": (lambda a, g: g.mean(-1) * torch.arange(a.shape[1]), {"channel_permutation"}),
    "the first position": (lambda a, g: g[..., 0] + a[:, None, :, 0], {"flip"}),
    "a softmax over the targets": (_shared_by_targets, {"target_independent"}),
    "a random number": (lambda a, g: g.mean(-1) + torch.rand(()), {"pure", "deterministic"}),
    "a count of calls": (_counted, {"deterministic", "thread_safe"}),
    "no class": (lambda a, g: a.mean(-1)[:, None].expand(g.shape[:3]), {"knows_the_class"}),
    "no derivative": (lambda a, g: g.mean(-1) * (1 + a.detach().square().mean(-1))[:, None], {"gradcheck"}),
    "numbers out of torch": (_by_numpy, {"vmap_equals_loop", "gradcheck"}),
    "another shape for several images": (lambda a, g: g.mean(-1)[:1], {"batch_independent", "image_permutation"}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_formula_is_found_and_the_law_named(what):
    formula, broken = WRONG[what]
    method = camfn.method(formula, name="own", needs="gradients")
    others = set(laws.LAWS) - broken
    with pytest.raises(AssertionError, match=r"^own: .* not hold\n- ") as caught:
        check(method, examples=30, skip=others)
    text = str(caught.value)
    assert {name for name in laws.LAWS if f"- {name} " in text} == broken
    assert "model=Tiny" in text
    assert "layer='" in text
    assert "x of shape (" in text


def test_of_a_map_that_is_not_finite_range_alone_tells():
    for value in ("nan", "inf"):
        method = camfn.method(lambda a, g, value=value: g.mean(-1) * float(value), name="own", needs="gradients")
        with pytest.raises(
            AssertionError, match=r"own: a law does not hold\n- range .* values are NaN or infinite, for relu=True"
        ):
            check(method, examples=2)
    counted = camfn.method(lambda a, g: g.mean(-1) * (float("nan") if next(CALLS) % 2 else 1), name="own", needs="gradients")
    with pytest.raises(AssertionError, match=r"- deterministic .* nan against"):
        check(counted, examples=2, skip=set(laws.LAWS) - {"deterministic"})


def test_the_error_has_the_numbers_of_the_smallest_case_and_is_the_same_each_time():
    method = camfn.method(lambda a, g: g.mean(-1) * torch.arange(1, 1 + a.shape[1]), name="numbered", needs="gradients")
    others = set(laws.LAWS) - {"channel_permutation"}

    def said() -> str:
        with pytest.raises(AssertionError) as caught:
            check(method, examples=30, skip=others)
        return str(caught.value)

    text = said()
    assert "numbered: a law does not hold\n- channel_permutation does not hold for numbered. The order of the layer's" in text
    assert "units of rounding" in text
    assert "channels=2" in text or "width=2" in text or "heads=1" in text, "it is shrunk"
    assert said() == text


def test_a_law_of_camfn_that_a_method_does_not_promise_is_named_and_can_be_left_out():
    others = set(laws.LAWS) - {"logit_shift", "range"}
    with pytest.raises(AssertionError, match=r"logit_shift does not hold for ablation_cam. A constant added"):
        check("ablation_cam", examples=20, skip=others)
    check("ablation_cam", examples=2, skip=[*others, "logit_shift"])
    for wrong in (["logit_shifts"], "logit_shifts"):
        with pytest.raises(camfn.CamError, match="skip: no law named 'logit_shifts'; closest: 'logit_shift'"):
            check("ablation_cam", skip=wrong)


def test_one_law_is_left_out_by_its_name():
    first = camfn.method(lambda a, g: g[..., 0], name="first", needs="gradients")
    check(first, examples=3, skip="flip")


@pytest.mark.parametrize("examples", [0, -1, 2.5, True, "3"])
def test_a_number_of_examples_is_positive(examples):
    with pytest.raises(camfn.CamError, match=r"examples=.* must be a positive int, the number of cases for each law"):
        check("grad_cam", examples=examples)


def test_what_is_no_method_is_an_error():
    with pytest.raises(camfn.CamError, match="is no method"):
        check(lambda a, g: g.mean(-1))
    with pytest.raises(camfn.CamError, match="no method named 'grad_cm'"):
        check("grad_cm")


@pytest.mark.parametrize("law", laws.LAWS)
def test_a_law_is_a_function_of_a_method_and_a_case(law):
    case = Case(TinyNet(Spec(sides=(6, 6), channels=4, seed=1)), "block", torch.randn(2, 2, 6, 6).double(), [0, 2])
    function = getattr(laws, law)
    assert function is laws.LAWS[law]
    assert list(inspect.signature(function).parameters) == ["method", "case", "units"]
    function(camfn.grad_cam, case)
    assert function.__doc__
    assert laws.speaks_of(law, camfn.score_cam, case)
    assert laws.speaks_of(function, camfn.grad_cam, case) == (law != "chunk_independent")


def test_laws_speak_of_what_a_method_and_a_case_have():
    net, x = TinyNet(), torch.zeros(1, 2, 6, 5, dtype=torch.float64)
    case = Case(net, "features", x, 0)
    assert not laws.speaks_of("knows_the_class", camfn.mean_cam, case)
    assert not laws.speaks_of("channel_permutation", camfn.rise, case)
    assert not laws.speaks_of("gradcheck", camfn.grad_cam, case._replace(model=TinyNet().float(), x=x.float()))
    assert not laws.speaks_of("flip", camfn.grad_cam, case._replace(model=nn.Sequential(net)))
    assert not laws.speaks_of("logit_shift", camfn.rise, case._replace(target=camfn.targets.regression(0)))


# -------------------------------------------------------------------------------------------------------- a user's model


class OfTheBatch(nn.Module):
    """Takes the mean of the batch off, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.inner = small_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - x.mean(0))


class Remembers(nn.Module):
    """Adds what it saw before."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = small_net(), 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x + self.seen)
        self.inner.features.bias.data += 0.1
        return y


SLOW = ("gradcheck", "thread_safe")
X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("target", [None, [0, 4, 2], camfn.targets.contrast(1, [2])], ids=str)
@pytest.mark.parametrize("method", ["grad_cam", "score_cam"])
def test_all_laws_hold_for_a_model_in_order(method, target):
    check_model(small_net(), "act", X, target, method=method, skip=("gradcheck", "thread_safe"))


def test_all_laws_hold_for_a_model_of_tokens_whose_layout_camfn_finds():
    vit = nn.Sequential(TinyViT(TokenSpec(sides=(6, 4), pool="class")))
    check_model(vit, "0.blocks.0", torch.randn(2, 2, 6, 4, generator=torch.Generator().manual_seed(1)).double(), 1)


class Wrapped(nn.Module):
    """A network, and what it makes of its logits."""

    def __init__(self, wrap, inner=None):
        super().__init__()
        self.inner, self.wrap = inner or small_net(), wrap

    def forward(self, x: Tensor):
        return self.wrap(self.inner(x))


NORMED = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*performance drop:UserWarning")
Out = collections.namedtuple("Out", "aux logits")
OUTPUTS = {
    "dict": lambda y: {"aux": 2 * y, "logits": y},
    "tuple": lambda y: (y, y.mean(1)),
    "named tuple": lambda y: Out(y.mean(1), y),
    "computed": lambda y: {"logits": 2 * y.tanh()},
}


@pytest.mark.parametrize(
    "method", ["grad_cam", "score_cam", functools.partial(camfn.cam, fc="inner.fc")], ids=["grad_cam", "score_cam", "cam"]
)
@pytest.mark.parametrize("what", OUTPUTS)
def test_logits_are_changed_where_the_output_has_them(what, method):
    check_model(Wrapped(OUTPUTS[what]), "inner.act", X, [0, 4, 2], method=method, skip=SLOW)


def test_a_target_of_the_users_own_reads_the_output_with_its_classes_renamed():
    check_model(Wrapped(OUTPUTS["dict"]), "inner.act", X, lambda y: y["logits"][1] - y["logits"][2], skip=SLOW)


EMBEDDING = torch.randn(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(
    ("target", "shifts"),
    [
        (lambda y: y[1] ** 2, False),
        (lambda y: y[1] - 0.5 * y[2] + y.softmax(0)[0], True),
        (camfn.targets.probability(1, multi_label=True), False),
        (camfn.targets.probability(1) - camfn.targets.logit(2), True),
        (camfn.targets.similarity(EMBEDDING), False),
    ],
)
def test_logits_are_shifted_for_targets_that_take_their_differences(target, shifts):
    case = Case(small_net(), "act", X, target)
    assert laws.speaks_of("logit_shift", camfn.grad_cam, case) == shifts
    assert laws.speaks_of("class_permutation", camfn.grad_cam, case) == (not isinstance(target, camfn.targets.Similarity))
    check_model(*case, skip=SLOW)


def test_similarities_which_no_tensor_of_the_output_holds_are_not_changed():
    texts = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = Wrapped(lambda y: (y, texts, torch.ones((), dtype=torch.float64)))
    assert not laws.speaks_of("logit_shift", camfn.grad_cam, Case(model, "inner.act", X, 1))
    check_model(model, "inner.act", X, 1, skip=SLOW)


def test_a_layer_is_a_module_or_several():
    net = small_net()
    check_model(net, net.act, X, 1, skip=SLOW)
    check_model(net, [net.features, "act"], X, 1, skip=SLOW)
    with pytest.raises(
        AssertionError, match=r"2 laws do not hold\n- layer 'inner.features': batch_independent .*\n- layer 'inner.act'"
    ):
        check_model(
            model := OfTheBatch(), [model.inner.features, "inner.act"], X, 1, skip=set(laws.LAWS) - {"batch_independent"}
        )


def test_a_layer_is_the_model_itself_or_one_of_its_calls_or_in_a_wrapper():
    features = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU()).double()
    check_model(features, "", X, lambda y: y[1].mean(), skip=SLOW)
    check_model(small_net(), "act@1", X, 1, skip=SLOW)
    check_model(nn.DataParallel(small_net()), "module.act", X, 1, skip=SLOW)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "hires_cam"])
def test_laws_hold_for_a_model_in_half_precision(method, dtype):
    for seed in range(3):
        net, x = small_net(seed, dtype, channels=16), torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        check_model(net, "act", x.to(dtype), 1, method=method)


def test_a_model_in_half_precision_that_mixes_its_images_is_found():
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(AssertionError, match="- batch_independent does not hold"):
            check_model(OfTheBatch().to(dtype), "inner.act", X.to(dtype), 1)


@NORMED
def test_laws_hold_for_cam_without_a_bias_and_of_a_head_that_only_cam_reads():
    for last in (nn.Linear(4, 5, bias=False), nn.utils.weight_norm(nn.Linear(4, 5)), nn.Sequential(nn.Linear(4, 5), nn.Tanh())):
        head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last).double()
        fc = "4.0" if isinstance(last, nn.Sequential) else "4"
        check_model(head, "1", X, [0, 4, 2], method=functools.partial(camfn.cam, fc=fc))


def test_laws_hold_for_a_head_whose_weight_is_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.fc = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
            self.conv, self.fc.weight = nn.Conv2d(3, 4, 3), self.mix.weight

        def forward(self, x):
            return self.fc(self.mix(self.conv(x).relu().mean((2, 3))))

    torch.manual_seed(0)
    check_model(Tied().double(), "conv", X, 1, skip=SLOW)


def test_an_input_may_be_expanded():
    check_model(small_net(), "act", X[:1].expand(3, -1, -1, -1), 1, skip={*SLOW} - {"gradcheck"})


@NORMED
def test_a_model_may_hold_what_deepcopy_refuses():
    class Holds(OfTheBatch):
        def forward(self, x):
            self.kept, self.lock = self.inner.stem(x), threading.Lock()
            return self.inner(x)

    normed = small_net()
    nn.utils.weight_norm(normed.features)
    nn.utils.weight_norm(normed.fc)
    normed(X)
    check_model(normed, "act", X, 1, skip=SLOW)
    model = Holds()
    model(X)
    check_model(model, "inner.act", X, 1, skip=SLOW)


def test_a_small_share_of_the_class_is_no_rounding():
    """Score-CAM's weights of a flat softmax differ little."""
    net = small_net(dtype=torch.float32)
    with torch.no_grad():
        net.fc.weight *= 1e-3
    only = set(laws.LAWS) - {"knows_the_class"}
    check_model(net, "act", X.float(), method="score_cam", skip=only)
    with pytest.raises(AssertionError, match="knows_the_class"):
        laws.knows_the_class(
            camfn.method(lambda a, g: a.mean(-1)[:, None].expand(g.shape[:3]), name="own", needs="gradients"),
            Case(net, "act", X.float(), None),
        )


def test_a_model_that_mixes_its_images_is_found():
    with pytest.raises(AssertionError, match="grad_cam of this model") as caught:
        check_model(OfTheBatch(), "inner.act", X, 1)
    assert "- batch_independent does not hold for grad_cam. An image has the map that it has without" in str(caught.value)
    check_model(OfTheBatch(), "inner.act", X, 1, skip=("batch_independent", "vmap_equals_loop", "thread_safe"))


def test_the_global_random_states_are_kept():
    drawing = camfn.method(lambda a, g: g.mean(-1) + torch.rand(()), name="drawing", needs="gradients")
    net, case = small_net(), Case(TinyNet(), "features", torch.zeros(1, 2, 6, 5, dtype=torch.float64), 0)
    others = set(laws.LAWS) - {"deterministic", "knows_the_class"}  # drawn networks use the state too, by their constructors
    with unchanged():
        check("grad_cam", examples=1, skip=others)
        check_model(net, "act", X)
        for law in laws.LAWS.values():
            law(camfn.grad_cam, case)
        with pytest.raises(AssertionError, match="- deterministic does not hold"):
            check_model(net, "act", X, method=drawing)


def test_an_error_of_the_method_is_raised_as_it_is():
    class Draws(OfTheBatch):
        def forward(self, x):
            return self.inner(x + torch.rand_like(x))

    with pytest.raises(camfn.CamError, match="random"):
        check_model(Draws(), "inner.act", X)
    with pytest.raises(camfn.CamError, match="no layer named 'at'"):
        check_model(small_net(), "at", X)


def test_an_error_of_a_formula_is_told_with_the_law_and_the_case():
    method = camfn.method(lambda a, g: g.mean(-1)[:, :2], name="two", needs="gradients")
    with pytest.raises(AssertionError, match=r"- target_independent ends in an error: CamError: .*\n  model=Tiny"):
        check(method, examples=5, skip=set(laws.LAWS) - {"target_independent"})


def test_unchanged_sees_a_change():
    net = small_net()
    with unchanged(net, X):
        net.state_dict()
    with pytest.raises(AssertionError, match=r"an argument is not what it was: .*training"), unchanged(net):
        net.stem.eval()

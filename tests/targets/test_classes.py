"""Targets of classes and numbers, and targets made of targets: against plain loops, through a sweep and through gradients."""

import copy
import functools
import gc
import operator
import re
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import camfn
from camfn import Sweep, _compat
from tests.oracles.closeness import assert_close, close
from tests.oracles.loops import grad_cam_loop, score_cam_loop
from tests.oracles.networks import CHEAP, inputs, small_net

T = camfn.targets
needs_compiler = pytest.mark.skipif(bool(_compat.can_compile()), reason="this torch cannot compile the kernel")

NET, X = small_net(11), inputs(seed=9)
with torch.no_grad():
    LOGITS = NET.eval()(X)
    NET.train()
BEST = LOGITS.argsort(1, descending=True)
TABLE = torch.tensor([[0, 3, 3], [4, 2, 1]])


def says(*parts: str):
    """`CamError` with these words in this order."""
    return pytest.raises(camfn.CamError, match="(?s)" + ".*".join(map(re.escape, parts)))


def near(i: int, c: int, k: int) -> list[int]:
    """The k classes whose clean logits are nearest to that of c."""
    y = LOGITS[i].tolist()
    return sorted((d for d in range(5) if d != c), key=lambda d: abs(y[d] - y[c]))[:k]


def against(y: Tensor, c: int, others: list[int], alpha: float = 1.0) -> Tensor:
    return y[c] - alpha * sum(y[d] for d in others) / len(others)


def margin(y: Tensor) -> Tensor:
    return y[1] * y[2]


CONTRASTS = {
    "given": (T.contrast(1, [0, 4], alpha=0.6), lambda y, i: [against(y, 1, [0, 4], 0.6)]),
    "nearest": (T.contrast(1, top=2), lambda y, i: [against(y, 1, near(i, 1, 2))]),
    "of the predicted class": (T.contrast(), lambda y, i: [against(y, int(BEST[i, 0]), near(i, int(BEST[i, 0]), 3))]),
    "one class each": (T.contrast([2, 0], top=1), lambda y, i: [against(y, [2, 0][i], near(i, [2, 0][i], 1))]),
    "of several classes": (T.contrast(TABLE, top=2), lambda y, i: [against(y, c, near(i, c, 2)) for c in TABLE[i].tolist()]),
    "of all": (T.contrast("all", top=4), lambda y, i: [against(y, c, [d for d in range(5) if d != c]) for c in range(5)]),
    "of the best": (T.contrast(T.top(2), top=1), lambda y, i: [against(y, c, near(i, c, 1)) for c in BEST[i, :2].tolist()]),
    "against others each": (T.contrast(1, [[0, 4], [3]]), lambda y, i: [against(y, 1, [[0, 4], [3]][i])]),
    "against a table": (T.contrast(1, torch.tensor([[0, 4], [3, 2]])), lambda y, i: [against(y, 1, [[0, 4], [3, 2]][i])]),
    "against a tensor": (T.contrast([1, 3], torch.tensor([0, 4])), lambda y, i: [against(y, [1, 3][i], [0, 4])]),
    "itself left out": (T.contrast("all", [0, 1, 3]), lambda y, i: [against(y, c, sorted({0, 1, 3} - {c})) for c in range(5)]),
}
SUMS = {
    "difference": (T.logit(3) - 0.5 * T.logit(1), lambda y, i: [y[3] - 0.5 * y[1]]),
    "of scales": (T.probability(3) + T.log_probability(0) / 4, lambda y, i: [y.softmax(0)[3] + y.log_softmax(0)[0] / 4]),
    "negative": (-T.logit([2, 0]), lambda y, i: [-y[[2, 0][i]]]),
    "weighted": (3 * T.rest(1), lambda y, i: [3 * (y + y.log_softmax(0))[1]]),
    "one with several": (T.top(2) - T.logit(4), lambda y, i: [y[c] - y[4] for c in BEST[i, :2]]),
    "several with several": (T.logit("all") + 2 * T.probability("all"), lambda y, i: list(y + 2 * y.softmax(0))),
    "best one": (T.top(1) + T.logit(2), lambda y, i: [y[BEST[i, 0]] + y[2]]),
    "a callable": (T.logit(2) - margin, lambda y, i: [y[2] - y[1] * y[2]]),
    "a callable first": (margin - T.logit(2), lambda y, i: [y[1] * y[2] - y[2]]),
    "a callable of several": (T.logit(2) + (lambda y: y[:3]), lambda y, i: list(y[2] + y[:3])),
    "sum()": (sum(T.logit(c) for c in (1, 2, 4)), lambda y, i: [y[1] + y[2] + y[4]]),
    "of a contrast": (T.contrast(1, [0, 4]) - T.logit(3), lambda y, i: [y[1] - (y[0] + y[4]) / 2 - y[3]]),
    "nested": (2 * (T.logit(1) - (T.logit(2) - T.logit([3, 0])) / 2), lambda y, i: [2 * y[1] - y[2] + y[[3, 0][i]]]),
    "NumPy's number": (np.float64(0.5) * T.logit(1) * np.int64(3), lambda y, i: [1.5 * y[1]]),
}
LISTS = {
    "of two kinds": ([T.contrast(1, [0]), margin], lambda y, i: [y[1] - y[0] if i == 0 else y[1] * y[2]]),
    "with an int and None": ([3, None], lambda y, i: [y[3] if i == 0 else y[BEST[1, 0]]]),
    "of sums": ([T.logit(1) - T.logit(2), 2 * T.logit(4)], lambda y, i: [y[1] - y[2] if i == 0 else 2 * y[4]]),
    "of one sum": (
        [T.logit(1) - T.logit(2), 2 * T.logit(4) + T.logit(0)],
        lambda y, i: [y[1] - y[2] if i == 0 else 2 * y[4] + y[0]],
    ),
    "of scales": ([T.probability(3), T.logit(3)], lambda y, i: [y.softmax(0)[3] if i == 0 else y[3]]),
    "of one scale": ((T.probability(3), T.probability()), lambda y, i: [y.softmax(0)[[3, BEST[1, 0]][i]]]),
    "of several scores": ([T.top(2), T.contrast(T.top(2), [4])], lambda y, i: [y[c] - (y[4] if i else 0) for c in BEST[i, :2]]),
    "of contrasts with as many": (
        [T.contrast(1, [0]), T.contrast(2, [3])],
        lambda y, i: [y[1] - y[0] if i == 0 else y[2] - y[3]],
    ),
    "of contrasts with more": (
        [T.contrast(1, [0]), T.contrast(2, [3, 4])],
        lambda y, i: [y[1] - y[0] if i == 0 else against(y, 2, [3, 4])],
    ),
    "in a sum": (T.logit(1) + T.named([T.logit(2), margin]), lambda y, i: [y[1] + (y[2] if i == 0 else y[1] * y[2])]),
}
OUTPUTS = {
    "one": (T.regression(2), lambda y, i: [y[2]]),
    "one each": (T.regression([4, 0]), lambda y, i: [y[[4, 0][i]]]),
    "several each": (T.regression(TABLE), lambda y, i: list(y[TABLE[i]])),
    "all": (T.regression("all"), lambda y, i: list(y)),
}
KINDS = {
    f"{what} {name}": kind
    for what, of in (("contrast", CONTRASTS), ("sum", SUMS), ("list", LISTS), ("regression", OUTPUTS))
    for name, kind in of.items()
}
SEVERAL = {"sum best one"} | {name for name, (_, score) in KINDS.items() if len(score(LOGITS[0], 0)) > 1}
every_kind = pytest.mark.parametrize("kind", KINDS)


def scores_of(target, output: Tensor) -> Tensor:
    score = T.resolve(target, output, len(output), output.device)
    return T.score_rows(score.of, output, score.rows)


@every_kind
def test_score_cam_is_a_plain_loop(kind):
    target, score = KINDS[kind]
    expected = score_cam_loop(NET, "features", X, lambda y, i: torch.stack(score(y, i)), raw=True)
    found = camfn.score_cam(NET, "features", X, target, normalize=False)
    close(found, expected if kind in SEVERAL else expected[:, 0], kind)


@every_kind
def test_grad_cam_is_autograd_of_the_score(kind):
    target, score = KINDS[kind]
    expected = grad_cam_loop(NET, "features", X, score)
    found = camfn.grad_cam(NET, "features", X, target, normalize=False)
    close(found, expected if kind in SEVERAL else expected[:, 0], kind)


def test_the_loops_tell_kinds_apart():
    maps = [grad_cam_loop(NET, "features", X, score)[:, 0] for _, score in KINDS.values()]
    assert sum(float((a - b).abs().max()) > 1e-6 for a in maps for b in maps) > 0.9 * len(maps) * (len(maps) - 1)


def test_the_maps_of_best_first_of_a_single_target_and_of_one_of_several_have_their_axes():
    for target, axes in (
        (T.top(1) + T.logit(2), 4),
        (T.logit(1) + T.logit(2), 3),
        ([T.top(1), T.top(1)], 4),
        ([T.top(1), 3], 4),
    ):
        assert camfn.grad_cam(NET, "features", X, target).ndim == axes


def test_a_contrast_is_the_difference_of_scores_of_one_sweep_of_the_classes():
    """In Score-CAM, whose weights are the softmax of scores: their logarithms are scores, to a number for each map."""
    run = functools.partial(camfn.METHODS["score_cam"].run, NET, "features", X)
    every = run("all").weights[0].log()
    for c in range(5):
        others = [d for d in range(5) if d not in (c, 2)]
        expected = (every[:, c] - 0.7 * every[:, others].mean(1)).softmax(-1)
        close(run(T.contrast(c, others, alpha=0.7)).weights[0][:, 0], expected, f"class {c}")


@pytest.mark.parametrize(("c", "others"), [([1, 4], None), ([2, 0], [[0, 1], [3, 2]])])
def test_a_contrast_through_gradients_is_torchcams_finer_cam(c, others):
    methods = pytest.importorskip("torchcam.methods")
    net, x = small_net(11).eval(), X.clone().requires_grad_()
    with methods.FinerCAM(net, "features", input_shape=(3, 8, 8), num_references=2) as finer:
        (theirs,) = finer(c, net(x), others, normalized=False)
    ours = camfn.grad_cam(net, "features", X, T.contrast(c, others, top=2, alpha=0.6), normalize=False)
    close(ours, theirs.detach())


def test_a_sum_costs_no_forward_more():
    plain, some = (camfn.explain(NET, "features", X, t) for t in (1, [T.logit(1) - T.contrast(2), margin]))
    assert some.forwards == plain.forwards


@pytest.mark.parametrize("kind", ["sum nested", "list of two kinds", "contrast of all"])
def test_several_methods_explain_it_in_one_call(kind):
    target = KINDS[kind][0]
    cards = camfn.explain(NET, "features", X, target, method=["grad_cam", "score_cam", "grad_cam"])
    for card in cards:
        close(card.maps, camfn.METHODS[card.method].function(NET, "features", X, target))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("contrast", "sum"))])
def test_cam_of_what_is_linear_in_the_logits_is_the_sum_of_the_classes_maps(kind):
    target, score = KINDS[kind]
    net = copy.deepcopy(NET).eval()
    every = torch.einsum("kc,nchw->nkhw", net.fc.weight, net.features(net.stem(X))).detach()
    linear = T.resolve(target, LOGITS, 2, LOGITS.device).linear
    assert linear == (kind not in ("sum of scales", "sum weighted", "sum several with several") and "callable" not in kind)
    if not linear:
        with says("cam", "must be classes"):
            camfn.cam(NET, "features", X, target, fc="fc")
        return
    found = camfn.cam(NET, "features", X, target, fc="fc", normalize=False)
    weights = [torch.func.jacrev(lambda y, i=i: torch.stack(score(y, i)))(LOGITS[i]) for i in range(2)]  # (t, classes)
    expected = torch.stack([torch.einsum("tc,chw->thw", w, maps) for w, maps in zip(weights, every)])
    close(found, expected if kind in SEVERAL else expected[:, 0], kind)


# ------------------------------------------------------------------------------------------------------- regression


class Regressor(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.net, self.shape = small_net(3, classes=1), shape

    def forward(self, x):
        return self.net(x).reshape(len(x), *self.shape)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("method", ["score_cam", "grad_cam"])
def test_the_output_of_a_regression(method, shape):
    function = functools.partial(camfn.METHODS[method].function, normalize=False, relu=False)
    for target, sign in ((T.regression(), 1), (T.regression(0), 1), (-T.regression(), -1), ([T.regression()] * 2, 1)):
        expected = function(Regressor((1,)), "net.features", X, lambda y, sign=sign: sign * y[0])
        close(function(Regressor(shape), "net.features", X, target), expected)


def test_the_output_of_a_regression_in_a_list_for_each_sample():
    y = torch.tensor([0.5, -2.0])
    assert scores_of(T.regression(), y).tolist() == [[0.5], [-2.0]]
    for output in (list(y), list(y[:, None])):
        score = T.resolve(T.regression(), output, 2, y.device)
        assert T.score_rows(score.of, output, score.rows).tolist() == [[0.5], [-2.0]]


# ------------------------------------------------------------------------------------------- how they are executed


@needs_compiler
def test_one_graph_serves_all_targets_of_a_kind(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter, real = CompileCounter(), _compat.compiled
    monkeypatch.setattr(_compat, "compiled", lambda function: real(function, backend=counter))
    torch._dynamo.reset()
    compiled, eager, prepared = Sweep(compile=True), Sweep(compile=False), camfn.prepare(NET)
    kinds = (
        [T.contrast(1, [0, 2]), T.contrast([3, 0], [2, 4], alpha=0.3), T.contrast(None, [[1], [0, 2]])],
        [T.logit(1) - 0.5 * T.logit(2), 3 * T.logit() + 1.5 * T.logit([0, 3])],
        [[T.logit(1), T.rest(2)], [T.logit(4), T.rest()]],
        [T.similarity(torch.ones(5)), T.similarity(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))],
    )
    for made, kind in enumerate(kinds, 1):
        for target in kind:
            ours = camfn.score_cam(prepared, "features", X, target, normalize=False, sweep=compiled)
            close(ours, camfn.score_cam(NET, "features", X, target, normalize=False, sweep=eager))
        assert counter.frame_count == made
    torch._dynamo.reset()


@needs_compiler
def test_what_a_target_holds_is_not_kept(monkeypatch):
    monkeypatch.setattr(_compat, "compiled", lambda function, real=_compat.compiled: real(function, backend="eager"))
    torch._dynamo.reset()
    embedding, model = torch.ones(5, dtype=torch.float64), camfn.prepare(small_net())
    gone = weakref.ref(embedding)
    for _ in range(2):
        camfn.score_cam(model, "features", X, T.similarity(embedding) - T.logit(1), sweep=Sweep(compile=True))
    del embedding
    gc.collect()
    assert gone() is None
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "kind", ["contrast nearest", "sum several with several", "sum a callable", "list of two kinds", "regression one each"]
)
@pytest.mark.parametrize("method", ["score_cam", "grad_cam"])
def test_mapped_over_states_it_is_a_loop_over_models(method, kind):
    target, empty, nets = KINDS[kind][0], small_net(9), [small_net(seed) for seed in (1, 2)]
    states = [camfn.state_of(net) for net in nets]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    run = functools.partial(camfn.METHODS[method].function, target=target, normalize=False, relu=False)
    found = vmap(lambda state: run(empty, "features", X, state=state))(stacked)
    for one, net in zip(found, nets):
        close(one, run(net, "features", X))


@pytest.mark.parametrize("kind", ["contrast of several classes", "sum of scales", "sum a callable", "list of two kinds"])
def test_maps_can_be_differentiated(kind):
    net, target = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(64, 5)).double(), KINDS[kind][0]
    x, direction = inputs(2, side=6, seed=3), inputs(2, side=6, seed=4)

    def total(x: Tensor) -> Tensor:
        maps = camfn.score_cam(net, "1", x, target, normalize=False, relu=False)
        return (maps * torch.linspace(-1, 2, maps.numel(), dtype=x.dtype).reshape(maps.shape)).sum()

    step = 1e-6
    expected = (total(x + step * direction) - total(x - step * direction)) / (2 * step)
    assert expected.abs() > 1e-3
    assert_close((grad(total)(x) * direction).sum(), expected, 1e-7)
    assert_close(jvp(total, (x,), (direction,))[1], expected, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@every_kind
def test_scores_are_wide(kind, dtype):
    target, score = KINDS[kind]
    y = (LOGITS / LOGITS.abs().max()).to(dtype)  # the order is that of LOGITS
    expected = torch.stack([torch.stack(score(one, i)) for i, one in enumerate(y.to(camfn.targets.classes.wide(dtype)))])
    found = scores_of(target, y)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    own = "callable" in kind or "list" in kind  # the caller's own is computed as he has it
    close(found, expected, units=16, dtype=dtype if own else None)


def test_rows_that_differ_are_told_from_those_that_do_not():
    """A rewritten model is compared by what each of them makes of an output."""
    a, b = torch.tensor([[1], [2], [1], [1]]), torch.tensor([[[0.5]], [[0.5]], [[0.5]], [[0.0]]])
    assert T.distinct(a) == [0, 1]
    assert T.distinct((a, (b,))) == [0, 1, 3]
    assert T.distinct((b[:1], a[:1])) == [0]


# ------------------------------------------------------------------------------------------------------------ names


NAMES = {
    "None": (None, 1, [("logit 2",), ("logit 0",)]),
    "int": (1, 1, [("logit 1",)] * 2),
    "all": ("all", 3, [("logit 0", "logit 1", "logit 2")] * 2),
    "top": (T.top(2), 2, [("logit 2", "logit 1"), ("logit 0", "logit 2")]),
    "log probability": (T.log_probability([1, 0]), 1, [("log probability 1",), ("log probability 0",)]),
    "contrast": (T.contrast(1, [0, 2]), 1, [("logit 1 - mean of 0, 2",)] * 2),
    "contrast each": (
        T.contrast([1, 0], [[2, 1], [2]], alpha=0.6),
        1,
        [("logit 1 - 0.6 * mean of 2",), ("logit 0 - 0.6 * mean of 2",)],
    ),
    "sum": (T.logit(0) - 0.5 * T.probability(1), 1, [("logit 0 - 0.5 * probability 1",)] * 2),
    "sum of several": (
        T.top(2) - T.logit(0),
        2,
        [("logit 2 - logit 0", "logit 1 - logit 0"), ("logit 0 - logit 0", "logit 2 - logit 0")],
    ),
    "minus a contrast": (-T.contrast(1, [0]) - 2 * T.rest(0), 1, [("-(logit 1 - mean of 0) - 2 * rest 0",)] * 2),
    "negative": (-2.5 * T.logit(1), 1, [("-2.5 * logit 1",)] * 2),
    "function": (margin, 1, [("margin",)] * 2),
    "lambda": (lambda y: y[:2], 2, [("a callable [0]", "a callable [1]")] * 2),
    "module": (nn.Flatten(0), 3, [("Flatten [0]", "Flatten [1]", "Flatten [2]")] * 2),
    "each": ([T.logit(1), margin], 1, [("logit 1",), ("margin",)]),
    "regression": (T.regression([1, 2]), 1, [("output 1",), ("output 2",)]),
    "similarity": (T.similarity(torch.ones(3)), 1, [("similarity to the embedding",)] * 2),
    "similarities": (T.similarity(torch.ones(2, 2, 3)), 2, [("similarity to embedding 0", "similarity to embedding 1")] * 2),
}


@pytest.mark.parametrize("kind", NAMES)
def test_every_target_has_a_name(kind):
    target, count, expected = NAMES[kind]
    y = torch.tensor([[0.0, 1.0, 3.0], [4.0, 0.0, 2.0]])
    score = T.resolve(target, y, 2, y.device)
    assert T.score_rows(score.of, y, score.rows).shape == (2, count)
    assert T.names(score, count) == tuple(expected)


# ----------------------------------------------------------------------------------------------------------- errors


WRONG = {
    "class 3 added": (lambda: T.logit(1) + 3, ("3 cannot be added", "camfn.targets.logit(3)", "callables")),
    "from a number": (lambda: 3 - T.logit(1), ("3 cannot be added", "or subtracted")),
    "0 on the right": (lambda: T.logit(1) + 0, ("0 cannot be added",)),
    "a list added": (lambda: operator.add(T.logit(1), [T.logit(2)]), ("cannot be added",)),
    "product": (lambda: T.logit(1) * T.logit(2), ("a target times", "a finite number", "callable")),
    "bool": (lambda: T.logit(1) * True, ("times True",)),
    "NaN": (lambda: float("nan") * T.logit(1), ("times nan", "finite")),
    "tensor": (lambda: T.logit(1) * torch.ones(2), ("times tensor",)),
    "by zero": (lambda: T.logit(1) / 0, ("divided by 0",)),
    "sizes": (lambda: T.top(2) + T.top(3), ("2 and 3 scores", "cannot be added")),
    "sizes of a callable": (lambda: T.logit("all") - (lambda y: y[:2]), ("2 and 5 scores",)),
    "wrong in a sum": (lambda: T.logit(1) + T.logit(9), ("target 9 is not a class", "0 to 4")),
    "negative in a sum": (lambda: T.logit(1) - T.logit(-2), ("target -2 is not a class",)),
    "several in a list": (lambda: [T.top(2), T.logit(1)], ("[2, 1] scores", "same number")),
    "list too long": (lambda: [T.logit(1)] * 3, ("3 entries", "batch of 2")),
    "wrong in a list": (lambda: [T.logit(1), T.contrast(7)], ("the target of image 1", "target 7", "0 to 4")),
    "against too many": (lambda: T.contrast(1, [[2], [3], [4]]), ("3 entries", "batch of 2")),
    "against too many in a table": (lambda: T.contrast(1, torch.ones(3, 1).long()), ("3 entries", "batch of 2")),
    "against itself": (lambda: T.contrast([1, 2], [2]), ("against=[2]", "no class other than")),
    "against an empty list": (lambda: T.contrast(1, [[2], []]), ("against=", "0 to 4")),
    "against high in a table": (lambda: T.contrast(1, torch.tensor([[2], [5]])), ("against=", "0 to 4")),
    "against floats": (lambda: T.contrast(1, torch.tensor([2.0])), ("against=", "long tensor", "torch.float32")),
    "against a word": (lambda: T.contrast(1, "23"), ("against='23'",)),
    "against a fraction": (lambda: T.contrast(1, [1.5]), ("target 1.5 is not a class",)),
    "near ones": (lambda: T.contrast(1, top=1.5), ("a whole number", "top=1.5")),
    "alpha": (lambda: T.contrast(1, alpha="1"), ("a number", "alpha='1'")),
    "output too high": (lambda: T.regression(5), ("target 5 is not an output", "outputs 0 to 4")),
    "output negative": (lambda: T.regression([0, -1]), ("target -1 is not an output",)),
    "no output said": (lambda: T.regression(), ("5 outputs", "targets.regression(0)", '"all"')),
    "best outputs": (lambda: T.regression(T.top(2)), ("targets.regression takes the number",)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_target(kind):
    make, words = WRONG[kind]
    with says(*words):
        camfn.grad_cam(NET, "features", X, make())


def test_nested_lists_of_classes_are_a_table():
    table = camfn.grad_cam(NET, "features", X, torch.tensor([[0, 3], [1, 2]]))
    for rows in ([[0, 3], [1, 2]], ((0, 3), (1, 2)), [torch.tensor([0, 3]), np.array([1, 2])], [[0, 3], T.logit([[1, 2]])]):
        assert_close(camfn.grad_cam(NET, "features", X, rows), table, 0)
    assert_close(camfn.grad_cam(NET, "features", X, T.regression([[0, 3], [1, 2]])), table, 0)
    for ragged in ([[0, 3], [1]], [[0, 3], 1]):
        with says("ragged", "as many classes for each image"):
            camfn.grad_cam(NET, "features", X, ragged)
    with says("3 entries", "batch of 2"):
        camfn.grad_cam(NET, "features", X, [[0], [1], [2]])


ONE = torch.tensor([[-3.0], [200.0], [0.5]], dtype=torch.float64)


@pytest.mark.parametrize("output", [ONE, ONE[:, 0]], ids=["(n, 1)", "(n,)"])
def test_the_probability_of_a_single_logit_is_its_sigmoid(output):
    p = 1 / (1 + (-ONE).exp())
    log = -(1 + (-ONE).exp()).log()
    expected = {T.probability(): p, T.probability(0): p, T.log_probability(): log, T.rest(0): ONE + log, None: ONE}
    for target, score in expected.items():
        close(scores_of(target, output), score)
    close(scores_of(T.as_probabilities(None), output), p)
    close(scores_of(T.logit("all") - T.probability(0), output), ONE - p)
    for c in (1, -1):
        with says(f"target {c} is not a class", "a single one, number 0", "targets.regression"):
            scores_of(c, output)


def test_independent_labels_have_the_sigmoid_of_each():
    y = torch.tensor([[-3.0, 0.5, 200.0], [1.0, -200.0, 2.0]], dtype=torch.float64)
    p, log = 1 / (1 + (-y).exp()), -(1 + (-y).exp()).log()
    close(scores_of(T.probability("all", multi_label=True), y), p)
    close(scores_of(T.log_probability("all", multi_label=True), y), log)
    close(scores_of(T.rest([2, 0], multi_label=True), y), torch.stack([(y + log)[0, 2:], (y + log)[1, :1]]))
    close(scores_of(T.probability(multi_label=True), y), p[[0, 1], [2, 2]][:, None])  # of the predicted class
    assert T.names(T.resolve(T.probability(1, multi_label=True), y, 2, y.device))[0] == ("multi-label probability 1",)
    with says("multi_label must be True or False", "found 1"):
        T.probability(1, multi_label=1)


@pytest.mark.parametrize("method", ["score_cam", "rise", "poly_cam"])
def test_methods_that_score_by_probabilities_score_a_single_logit_by_its_sigmoid(method):
    """The model with a logit of 0 beside the single one has the same probability, by a softmax."""
    options = {"recipe": "authors"} if method == "score_cam" else CHEAP.get(method, {})
    layer = None if method == "rise" else "features"
    one = Small(NET, lambda y: y[:, 1:2])
    two = Small(NET, lambda y: torch.stack([torch.zeros_like(y[:, 1]), y[:, 1]], 1))
    found, expected = (
        camfn.METHODS[method].function(net, layer, X, T.probability(c), normalize=False, relu=False, **options)
        for net, c in ((one, 0), (two, 1))
    )
    close(found, expected)
    assert float(found.std()) > 0
    close(camfn.METHODS[method].function(one, layer, X, normalize=False, relu=False, **options), found)


class Small(torch.nn.Module):
    """A network with another output."""

    def __init__(self, net, wrap):
        super().__init__()
        self.net, self.features, self.wrap = net, net.features, wrap

    def forward(self, x):
        return self.wrap(self.net(x))


def test_a_regression_of_positions():
    y = torch.zeros(2, 3, 4, 4)
    with says("targets.regression", "(n=2, k)", "(2, 3, 4, 4)"):
        T.resolve(T.regression(0), y, 2, y.device)


@pytest.mark.parametrize("target", [T.regression(1), T.contrast(1) + T.probability(2), [T.probability(1), T.logit(2)]], ids=str)
def test_a_recipe_of_probabilities_refuses_parts_that_are_none(target):
    with says("recipe scores by probabilities", "targets."):
        camfn.score_cam(NET, "features", X, target, recipe="authors")


def test_a_recipe_of_probabilities_takes_sums_and_lists_of_them():
    score = functools.partial(camfn.score_cam, NET, "features", X, recipe="authors", normalize=False)
    assert_close(score([T.probability(1), 2]), score(T.probability([1, 2])), 0)
    assert_close(score(T.probability(1) - 0.5 * T.probability(2)), score(T.probability(1)) - 0.5 * score(T.probability(2)), 1)


def test_operators_make_values():
    """A target that is used in a sum is what it was."""
    a, b = T.logit(1), T.logit(2)
    whole = a + b
    assert (a, b) == (T.logit(1), T.logit(2))
    assert 2 * whole != whole
    assert whole.terms == ((1.0, a), (1.0, b))

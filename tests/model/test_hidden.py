"""What a forward is seen doing: reaching the caller's own modules, drawing random numbers, using what a merge would take."""

import argparse
import collections
import contextvars
import functools
import itertools
import queue
import random
import re
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import camfn
from camfn import CamError, Sweep
from tests.oracles.loops import score_cam_loop
from tests.oracles.tiny import BOTH, NEAR, Net, as_they_were, filled, images, off, prepared, raw

both = pytest.mark.parametrize("of", BOTH)


# ------------------------------------------------------------------------------------------------ the caller's modules


def cached(model, part):
    model.f = functools.lru_cache(None)(part.forward)


def weak_method(model, part):
    model.w = held = weakref.WeakMethod(part.forward)
    model.f = lambda x: held()(x)


def weak(model, part):
    held = weakref.ref(part)
    model.f = lambda x: held()(x)


def weak_dict(model, part):
    held = weakref.WeakValueDictionary(part=part)
    model.f = lambda x: held["part"](x)


def weak_keys(model, part):
    held = weakref.WeakKeyDictionary({part: 1})
    model.f = lambda x: next(iter(held))(x)


def namespace(model, part):
    held = argparse.Namespace(part=part)
    model.f = lambda x: held.part(x)


def chain(model, part):
    held = collections.ChainMap({"part": part})
    model.f = lambda x: held["part"](x)


def proxy(model, part):
    held = types.MappingProxyType({"part": part})
    model.f = lambda x: held["part"](x)


def of_thread(model, part):
    held = threading.local()
    held.part = part
    model.f = lambda x: held.part(x)


def default(model, part):
    held = collections.defaultdict(functools.partial(getattr, model, part_name(model, part)))
    model.f = lambda x: held["k"](x)


def builtin(model, part):
    get = {"part": part}.get
    model.f = lambda x: get("part")(x)


def context(model, part):
    held = contextvars.ContextVar("held")
    held.set(part)
    model.f = lambda x: held.get()(x)


def iterator(model, part):
    held = iter([part] * 10_000)
    model.f = lambda x: next(held)(x)


def cycle(model, part):
    held = itertools.cycle([part])
    model.f = lambda x: next(held)(x)


def generator(model, part):
    def gives():
        while True:
            yield part

    held = gives()
    model.f = lambda x: next(held)(x)


def queued(model, part):
    held = queue.SimpleQueue()
    held.put(part)

    def call(x):
        one = held.get()
        held.put(one)
        return one(x)

    model.f = call


def of_class(model, part):
    type(model).held = [part]
    model.f = lambda x, cls=type(model): cls.held[0](x)


HELD = {}


def of_global(model, part):
    HELD["part"] = part
    model.f = lambda x: HELD["part"](x)


def part_name(model, part):
    return next(name for name, module in model.named_children() if module is part)


WAYS = [
    cached,
    weak_method,
    weak,
    weak_dict,
    weak_keys,
    namespace,
    chain,
    proxy,
    of_thread,
    default,
    builtin,
    context,
    iterator,
]
WAYS += [cycle, generator, queued, of_class, of_global]
ways = pytest.mark.parametrize("hide", WAYS, ids=lambda hide: hide.__name__)


def hidden(hide, part="bn"):
    """A model that reaches one of its own layers by a way that a copy does not follow."""

    class Hides(Net):
        def __init__(self):
            super().__init__()
            self.mix = nn.Conv2d(6, 6, 1)

        def feats(self, x):
            if part == "bn":
                return self.act(self.mix(self.f(self.conv(x))))
            return self.act(self.f(self.bn(self.conv(x))))

    model = filled(Hides())
    hide(model, getattr(model, part))
    return model


def plain_twin():
    class Plain(Net):
        def __init__(self):
            super().__init__()
            self.mix = nn.Conv2d(6, 6, 1)

        def feats(self, x):
            return self.act(self.mix(self.bn(self.conv(x))))

    return filled(Plain())


def follows_or_refuses(call, want, name):
    """The right result, or an error that names what was reached."""
    found = told = None
    try:
        found = call()
    except CamError as error:
        told = str(error)
    assert name in told if told else off(found, want) <= NEAR


CALLS = {
    "score_cam": lambda model, x: raw("score_cam", model, "act", x),
    "recipro_cam": lambda model, x: raw("recipro_cam", model, "act", x),
    "grad_cam": lambda model, x: raw("grad_cam", model, "act", x),
    "pure": lambda model, x: camfn.pure(model)(camfn.state_of(model), x),
    "tap": lambda model, x: camfn.tap(model, "act")(camfn.state_of(model), x),
}


@ways
@pytest.mark.parametrize("call", ["score_cam", "pure"])
def test_a_norm_of_the_callers_is_refused_before_it_moves(call, hide):
    model = hidden(hide).train()
    same = as_they_were(*model.parameters(), *model.buffers())
    follows_or_refuses(lambda: CALLS[call](model, images()), CALLS[call](plain_twin(), images()), "bn")
    assert int(model.bn.num_batches_tracked) == 0
    assert same()
    assert model.training


@pytest.mark.parametrize("hide", [cached, weak_dict, of_global, of_class], ids=lambda hide: hide.__name__)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("part", ["bn", "mix"])
def test_it_is_an_error_that_names_the_layer(part, call, hide):
    model = hidden(hide, part).train()
    same = as_they_were(*model.parameters(), *model.buffers())
    for subject in (model, prepared(model), model):
        with pytest.raises(CamError, match=part):
            CALLS[call](subject, images())
        assert same()


@pytest.mark.parametrize("hide", [cached, weak_dict, of_global], ids=lambda hide: hide.__name__)
def test_candidate_layers_and_no_layer_refuse_it_too(hide):
    model = hidden(hide).train()
    same = as_they_were(*model.parameters(), *model.buffers())
    for call in (camfn.candidate_layers, lambda model, x: camfn.grad_cam(model, None, x, 1)):
        with pytest.raises(CamError, match="bn"):
            call(model, images())
        assert same()


@ways
def test_a_layer_of_the_callers_with_another_state(hide):
    """The hidden layer would compute with the model's own weights, whatever the state says."""
    model, other = hidden(hide, "mix"), plain_twin()
    with torch.no_grad():
        other.mix.weight.mul_(3)
    want = raw("score_cam", other, "act", images())
    call = functools.partial(raw, "score_cam", model, "act", images(), state=camfn.state_of(other))
    follows_or_refuses(call, want, "mix")


SHARED = nn.BatchNorm2d(6).double()
PLAIN = nn.BatchNorm2d(6, affine=False).double()


@both
@pytest.mark.parametrize("norm", [SHARED, PLAIN], ids=["affine", "not affine"])
def test_a_norm_of_the_module_that_is_not_of_the_model(norm, of):
    class Uses(Net):
        def feats(self, x):
            return self.act(norm(self.conv(x)))

    model = filled(Uses()).train()
    norm.train()
    same = as_they_were(*norm.parameters(), *norm.buffers())
    for method in ("score_cam", "grad_cam"):
        with pytest.raises(CamError):
            raw(method, of(model), "act", images())
        assert same()


@both
def test_a_hidden_norm_without_weights(of):
    class Weak(Net):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(6, affine=False)
            held = weakref.WeakValueDictionary(part=self.bn)
            self.f = lambda x: held["part"](x)

        def feats(self, x):
            return self.act(self.f(self.conv(x)))

    model = filled(Weak()).train()
    same = as_they_were(*model.parameters(), *model.buffers())
    with pytest.raises(CamError, match="bn"):
        raw("score_cam", of(model), "act", images())
    assert same()


@both
def test_a_hidden_layer_below_a_sequence_is_named_in_full(of):
    class Deep(Net):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv2d(6, 6, 1)))
            held = weakref.WeakValueDictionary(part=self.body[1][0])
            self.f = lambda x: held["part"](x)

        def feats(self, x):
            return self.act(self.f(self.conv(x)))

    with pytest.raises(CamError, match=r"body\.1\.0"):
        raw("grad_cam", of(filled(Deep())), "act", images())


def test_a_hidden_dropout_in_train_mode_is_told_as_a_draw():
    class Drops(Net):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            held = weakref.WeakValueDictionary(part=self.drop)
            self.f = lambda x: held["part"](x)

        def feats(self, x):
            return self.f(super().feats(x))

    model = filled(Drops()).train()
    before = torch.get_rng_state()
    with pytest.raises(CamError, match="draws random numbers"):
        raw("score_cam", model, "act", images())
    assert torch.equal(before, torch.get_rng_state())


def closure(model, part):
    model.f = lambda x: part(x)


def partial(model, part):
    model.f = functools.partial(nn.Module.__call__, part)


def method(model, part):
    model.f = part.forward


def listed(model, part):
    model.held = [[part]]
    model.f = lambda x: model.held[0][0](x)


def keyed(model, part):
    model.held = {"of": {"it": part}}
    model.f = lambda x: model.held["of"]["it"](x)


def object_of_the_user(model, part):
    class Holder:
        def __init__(self, part):
            self.part = part

        def __call__(self, x):
            return self.part(x)

    model.f = Holder(part)


FOLLOWED = [closure, partial, method, listed, keyed, object_of_the_user]


@both
@pytest.mark.parametrize("call", ["score_cam", "pure"])
@pytest.mark.parametrize("hide", FOLLOWED, ids=lambda hide: hide.__name__)
def test_ways_that_the_copy_follows(hide, call, of):
    model = hidden(hide).train()
    same = as_they_were(*model.parameters(), *model.buffers())
    want = CALLS[call](plain_twin(), images())
    for _ in range(2):
        assert off(CALLS[call](of(model), images()), want) <= NEAR
    assert same()


@both
@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "recipro_cam", "lift_cam"])
def test_the_callers_own_tensors_may_be_handed_in_as_the_state(method, of):
    model = filled(Net())
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    want, subject = raw(method, filled(Net()), "act", images()), of(model)
    for state in (own, model.state_dict(keep_vars=True), model.state_dict()):
        assert off(raw(method, subject, "act", images(), state=state), want) <= NEAR
        assert off(camfn.pure(subject)(state, images()), model(images())) <= NEAR
        assert off(camfn.tap(subject, "act")(state, images()).output, model(images())) <= NEAR


def test_another_models_own_tensors_may_be_handed_in_as_the_state():
    model, other = filled(Net()), filled(Net(), seed=3)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert off(raw("score_cam", model, "act", images(), state=state), raw("score_cam", other, "act", images())) <= NEAR


def test_the_models_own_weights_may_be_an_input():
    class Similar(Net):
        def forward(self, x, t):
            return self.feats(x).mean((2, 3)) @ t.T

    model, weight = filled(Similar()), filled(Similar()).head[2].weight.detach()
    want = raw("score_cam", filled(Similar()), "act", (images(), weight))
    assert off(raw("score_cam", model, "act", (images(), model.head[2].weight)), want) <= NEAR


def test_two_models_that_share_layers():
    one, two = filled(Net()), filled(Net(), seed=2)
    two.conv, two.bn = one.conv, one.bn
    want = {id(m): raw("score_cam", filled_like(m), "act", images()) for m in (one, two)}
    subjects = [(one, one), (two, two), (prepared(one), one), (prepared(two), two)]
    for subject, model in subjects * 2:
        assert off(raw("score_cam", subject, "act", images()), want[id(model)]) <= NEAR


def filled_like(model):
    twin = filled(Net())
    twin.load_state_dict(model.state_dict())
    return twin


# -------------------------------------------------------------------------------------------------------------- draws


def in_attention(y):
    q = y[:, None, :, None]
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)[:, 0, :, 0]


def started(y):
    return y + nn.init.normal_(torch.empty(5, dtype=y.dtype))


DRAWS = {
    "rand": lambda y: y + torch.rand(5),
    "randn": lambda y: y + torch.randn(5),
    "rand_like": lambda y: y + torch.rand_like(y),
    "randn_like": lambda y: y + torch.randn_like(y),
    "randint": lambda y: y + torch.randint(0, 9, (5,)),
    "randint_like": lambda y: y + torch.randint_like(y, 9),
    "randperm": lambda y: y[:, torch.randperm(5)],
    "bernoulli": lambda y: y * torch.bernoulli(torch.full((5,), 0.5)),
    "multinomial": lambda y: y[:, torch.multinomial(torch.ones(5), 5)],
    "normal": lambda y: y + torch.normal(0.0, 1.0, (5,)),
    "poisson": lambda y: y + torch.poisson(torch.ones(5)),
    "uniform_": lambda y: y + torch.empty(5).uniform_(),
    "normal_": started,
    "bernoulli_": lambda y: y * torch.empty(5).bernoulli_(0.5),
    "exponential_": lambda y: y + torch.empty(5).exponential_(),
    "random_": lambda y: y + torch.empty(5).random_(9),
    "cauchy_": lambda y: y + torch.empty(5).cauchy_(),
    "geometric_": lambda y: y + torch.empty(5).geometric_(0.5),
    "log_normal_": lambda y: y + torch.empty(5).log_normal_(),
    "dropout": lambda y: F.dropout(y, 0.5, training=True),
    "dropout, as torch has it": lambda y: torch.dropout(y, 0.5, True),
    "dropout, in place": lambda y: F.dropout(y + 0, 0.5, training=True, inplace=True),
    "dropout2d": lambda y: F.dropout2d(y[:, :, None, None], 0.5, training=True).flatten(1),
    "dropout3d": lambda y: F.dropout3d(y[:, :, None, None, None], 0.5, training=True).flatten(1),
    "alpha_dropout": lambda y: F.alpha_dropout(y, 0.5, training=True),
    "feature_alpha_dropout": lambda y: F.feature_alpha_dropout(y[:, :, None, None], 0.5, training=True).flatten(1),
    "rrelu": lambda y: F.rrelu(y - 100, training=True),
    "gumbel_softmax|exponential_": lambda y: F.gumbel_softmax(y),
    "fractional_max_pool|rand": lambda y: F.fractional_max_pool2d(y[:, None, :, None].repeat(1, 1, 2, 2), 2, (5, 1)).flatten(1),
    "scaled_dot_product_attention": in_attention,
    "normal|standard_normal": lambda y: y + torch.distributions.Normal(0.0, 1.0).sample((5,)),
    "bernoulli|distributions": lambda y: y * torch.distributions.Bernoulli(0.5).sample((5,)),
    "multinomial|distributions": lambda y: y + torch.distributions.Categorical(torch.ones(3)).sample((5,)),
    "rand|uniform": lambda y: y + torch.distributions.Uniform(0.0, 1.0).rsample((5,)),
    "kaiming|uniform_": lambda y: y + nn.init.kaiming_uniform_(torch.empty(5, 5)).sum(0),
    "trunc_normal|uniform_": lambda y: y + nn.init.trunc_normal_(torch.empty(5)),
    "gamma|distributions": lambda y: y + torch.distributions.Gamma(1.0, 1.0).sample((5,)),
    "uniform_|linear": lambda y: nn.Linear(5, 5).to(y)(y),
}


def drawing(draw, when=lambda x: True):
    class Draws(Net):
        def forward(self, x):
            y = super().forward(x)
            return draw(y) if when(x) else y

    return filled(Draws())


@pytest.mark.parametrize("method", ["score_cam"])
@pytest.mark.parametrize("name", DRAWS)
def test_torchs_draws_are_refused_with_their_name(name, method):
    model = drawing(DRAWS[name])
    before, named = torch.get_rng_state(), "dropout|bernoulli" if "dropout" in name else name.replace("trunc_", "")
    with pytest.raises(CamError, match="draws random numbers") as caught:
        raw(method, model, "act", images())
    assert re.search(named, str(caught.value).lower())
    assert torch.equal(before, torch.get_rng_state())


@both
@pytest.mark.parametrize("call", ["pure", "tap", "recipro_cam"])
@pytest.mark.parametrize("name", ["rand", "dropout", "normal_", "rrelu"])
def test_draws_are_refused_everywhere(name, call, of):
    model, before = drawing(DRAWS[name]), torch.get_rng_state()
    with pytest.raises(CamError, match="draws random numbers"):
        CALLS[call](of(model), images())
    with pytest.raises(CamError, match="draws random numbers"):
        camfn.candidate_layers(of(model), images())
    with pytest.raises(CamError, match="draws random numbers"):
        camfn.explain(of(model), None, images(), 1, method=["grad_cam", "score_cam"])
    assert torch.equal(before, torch.get_rng_state())


def dark(x):
    return float(x.detach().abs().mean()) < 0.65


SWEEPS = {"all": Sweep(), "in chunks": Sweep(chunk=4), "one by one": Sweep(chunk=1)}


@both
@pytest.mark.filterwarnings("ignore:.*depends on the others of its batch:camfn.CamWarning")
@pytest.mark.parametrize("method", ["score_cam", "is_cam", "rise", "group_cam"])
@pytest.mark.parametrize("name", ["rand_like", "dropout", "uniform_"])
def test_draws_on_masked_inputs_alone_are_refused(name, method, of):
    model, before = drawing(DRAWS[name], dark), torch.get_rng_state()
    assert not dark(images())
    assert not any(dark(image) for image in images())
    with pytest.raises(CamError, match="draws random numbers") as caught:
        raw(method, of(model), "act", images())
    assert re.search("dropout|bernoulli" if name == "dropout" else name, str(caught.value))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore:.*depends on the others of its batch:camfn.CamWarning")
@pytest.mark.parametrize("sweep", SWEEPS)
def test_draws_in_any_chunk_are_refused(sweep):
    """The picture with the least left of it is not in the first chunk."""
    twin, kept = filled(Net()), []
    handle = twin.act.register_forward_hook(lambda module, args, out: kept.append(out.detach()))
    twin(images())
    handle.remove()
    low, high = kept[0].amin((2, 3), keepdim=True), kept[0].amax((2, 3), keepdim=True)
    masks = F.interpolate((kept[0] - low) / (high - low + 1e-8), (12, 12), mode="bilinear")
    left = (images()[:, None] * masks[:, :, None]).abs().mean((2, 3, 4)).flatten()
    assert int(left.argmin()) > 0
    least = float(left.sort().values[:2].mean())

    def least_of_all(x):
        return float(x.detach().abs().mean((1, 2, 3)).min()) < least

    model = drawing(DRAWS["rand_like"], least_of_all)
    with pytest.raises(CamError, match="draws random numbers"):
        raw("score_cam", model, "act", images(), sweep=SWEEPS[sweep])


class Attends(Net):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True)
        self.lstm = nn.LSTM(6, 6, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        tokens = self.feats(x).flatten(2).mT
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        return self.head[2](self.lstm(tokens)[0].mean(1))


def in_attention_without(y):
    q = y[:, None, :, None]
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.0)[:, 0, :, 0]


NO_DRAWS = {
    "p=0": lambda y: F.dropout(y, 0.0, training=True),
    "by position": lambda y: F.dropout(y, 0.5, False),
    "not training": lambda y: F.dropout(y, 0.5, training=False),
    "torch.dropout": lambda y: torch.dropout(y, 0.5, False),
    "torch.dropout, p=0": lambda y: torch.dropout(y, 0.0, True),
    "2d": lambda y: F.dropout2d(y[:, :, None, None], 0.5, training=False).flatten(1),
    "alpha": lambda y: F.alpha_dropout(y, 0.5, training=False),
    "feature alpha": lambda y: F.feature_alpha_dropout(y[:, :, None, None], 0.5, training=False).flatten(1),
    "rrelu": lambda y: F.rrelu(y, training=False),
    "attention": in_attention_without,
    "a layer": nn.Dropout(0.5).eval(),
}


@pytest.mark.parametrize("of", [prepared])
@pytest.mark.parametrize("method", ["score_cam", "recipro_cam"])
@pytest.mark.parametrize("name", NO_DRAWS)
def test_what_does_not_draw_is_no_draw(name, method, of):
    without = NO_DRAWS[name]

    class Twin(Net):
        def forward(self, x):
            y = super().forward(x)
            if name == "rrelu":
                return F.leaky_relu(y, (1 / 8 + 1 / 3) / 2)
            return in_attention_by_hand(y) if name == "attention" else y

    model = drawing(without)
    before = torch.get_rng_state()
    found = raw(method, of(model), "act", images())
    assert torch.equal(before, torch.get_rng_state())
    assert off(found, raw(method, filled(Twin()), "act", images())) <= NEAR


def in_attention_by_hand(y):
    return ((y[:, :, None] * y[:, None, :]).softmax(-1) @ y[:, :, None])[..., 0]


@both
@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "recipro_cam"])
def test_layers_with_dropout_in_eval_mode_do_not_draw(method, of):
    model = filled(Attends()).train()
    before = torch.get_rng_state()
    maps = raw(method, of(model), "act", images())
    assert maps.isfinite().all()
    assert torch.equal(before, torch.get_rng_state())


def python_draw(y):
    return y * (1 + random.random())


def numpy_draw(y):
    return y * (1 + np.random.rand())  # noqa: NPY002


def numpy_array(y):
    return y + torch.from_numpy(np.random.standard_normal(5))  # noqa: NPY002


def drawn_list(y):
    return y + torch.tensor([random.gauss(0, 1) for _ in range(5)])


@both
@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "eigen_cam"])
@pytest.mark.parametrize("draw", [python_draw, numpy_draw, numpy_array, drawn_list], ids=lambda draw: draw.__name__)
def test_draws_of_python_and_numpy_are_refused(draw, method, of):
    with pytest.raises(CamError, match=r"(?i)random|draw"):
        raw(method, of(drawing(draw)), "act", images())


def draws_for_nothing(y):
    random.random()
    np.random.rand()  # noqa: NPY002
    return y


def shuffles(y):
    order = list(range(5))
    random.shuffle(order)
    return y[:, order][:, torch.tensor(order).argsort()]


@both
@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "recipro_cam"])
@pytest.mark.parametrize("draw", [draws_for_nothing, shuffles], ids=lambda draw: draw.__name__)
def test_draws_that_the_output_does_not_depend_on_are_none(draw, method, of):
    found = raw(method, of(drawing(draw)), "act", images())
    assert off(found, raw(method, filled(Net()), "act", images())) <= NEAR


# ------------------------------------------------------------------------------------------------------- merged norms


class Gated(nn.Module):
    """Each picture goes its way by itself: bright ones through the norm, dark ones around it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
        self.setup()

    def setup(self):
        pass

    def around(self, a):
        return self.head(a)

    def forward(self, x):
        a = self.conv(x)
        bright = (x.abs().amax((1, 2, 3)) > 2)[:, None]
        through = self.head(self.act(self.bn(a)))
        return torch.where(bright, through, 30 * self.around(a))


class ByView(Gated):
    def around(self, a):
        return self.head(a.view_as(a).flatten(2).unflatten(2, a.shape[2:]))


class ByAttribute(Gated):
    def forward(self, x):
        self.last = None
        return super().forward(x)

    def around(self, a):
        self.last = a
        return self.head(self.last)


class ByHook(Gated):
    """A forward hook keeps the convolution's output."""

    def setup(self):
        self.kept = {}
        self.conv.register_forward_hook(self.keep)

    def keep(self, module, args, out):
        self.kept["out"] = out

    def around(self, a):
        return self.head(self.kept["out"])


class InThread(Gated):
    def around(self, a):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.head, a).result()


class Returned(Gated):
    """What is around the norm is put together by the target."""

    def forward(self, x):
        a = self.conv(x)
        bright = (x.abs().amax((1, 2, 3)) > 2)[:, None]
        return {"through": self.head(self.act(self.bn(a))), "bright": bright, "before": a}


class ByMethod(Gated):
    """The norm's input is read from what the norm was called with."""

    def setup(self):
        self.kept = {}
        self.bn.register_forward_pre_hook(self.keep)

    def keep(self, module, args):
        self.kept["in"] = args[0]

    def around(self, a):
        return self.head(self.kept["in"])


def gated(made):
    torch.manual_seed(0)
    model = made().eval()
    with torch.no_grad():
        model.bn.running_mean.uniform_(-1, 1)
        model.bn.running_var.uniform_(0.2, 2)
        model.bn.weight.uniform_(0.5, 2)
    return model


def bright_picture():
    x = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    x[..., 5, 5] = 2.5
    return x


@both
@pytest.mark.parametrize("made", [Gated, ByView, ByAttribute, ByHook, ByMethod, InThread], ids=lambda made: made.__name__)
def test_a_norm_is_not_merged_where_its_input_goes_elsewhere(made, of):
    want = score_cam_loop(gated(Gated), "act", bright_picture(), lambda y, i: y[1:2], raw=True)[:, 0]
    found = raw("score_cam", of(gated(made)), "act", bright_picture(), relu=True)
    assert off(found, want) <= 1e-3  # float32, weights of a softmax of scores up to 10
    model = gated(Gated)
    merged = nn.utils.fuse_conv_bn_eval(model.conv, model.bn)
    with torch.no_grad():
        assert off(model.head(merged(bright_picture())), model.head(model.conv(bright_picture()))) > 0.1


def test_a_norm_is_not_merged_where_the_convolution_is_returned():
    net = gated(Returned)

    def target(y):
        around = 30 * net.head[2](y["before"].mean((1, 2)))
        return torch.where(y["bright"][0], y["through"][1], around[1])

    with torch.no_grad():
        want = score_cam_loop(gated(Gated), "act", bright_picture(), lambda y, i: y[1:2], raw=True)[:, 0]
    found = raw("score_cam", net, "act", bright_picture(), target, relu=True)
    assert off(found, want) <= 1e-3


@both
def test_an_index_of_the_callers_behind_a_number_is_refused(of):
    """The second of the indices is a buffer of the caller's own module."""

    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("order", torch.arange(5))

    class Sorts(Net):
        def __init__(self):
            super().__init__()
            self.places = Places()

        def forward(self, x):
            y = super().forward(x)
            return y * torch.ones(2, 5, dtype=y.dtype)[0, HELD["places"].order]

    model = filled(Sorts())
    HELD["places"] = model.places
    with pytest.raises(CamError, match=r"places\.order"):
        raw("score_cam", of(model), "act", images())

"""Models that write to what they are given, and to their own parameters: the caller's tensors never change, and the map is
that of a twin which computes the same without writing."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, jvp, vmap

import camfn
from tests.oracles.networks import LAYERED
from tests.oracles.tiny import BOTH, NEAR, Net, as_they_were, filled, images, off, prepared, raw

# Where no group of channels adds to the blurred input, Group-CAM's map is flat.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:\d+ of \d+ maps at layer '.*' are flat:camfn.CamWarning"),
    pytest.mark.filterwarnings("ignore:layer=None:camfn.CamWarning"),
]

FEW = ("grad_cam", "score_cam", "ablation_cam", "recipro_cam", "lift_cam")
both = pytest.mark.parametrize("of", BOTH)


# ------------------------------------------------------------------------------------------------------- the inputs


def assigned(x):
    x[:, 0] = 0.3
    return x


def augmented(x):
    x -= 0.5
    return x


def put_at_indices(x):
    return x.index_put_((torch.arange(len(x)), torch.zeros(len(x), dtype=torch.long)), x.new_tensor(0.3))


def by_parts(x):
    for part in x.unbind(1):
        part.mul_(1.5)
    return x


def foreach(x):
    torch._foreach_mul_([x], 1.5)
    return x


def through_data(x):
    x.data.mul_(1.5)
    return x


def through_detach(x):
    x.detach().mul_(1.5)
    return x


def without_grad(x):
    with torch.no_grad():
        x.clamp_(min=-0.5)
    return x


def initialised(x):
    nn.init.constant_(x[:, :1], 0.3)
    return x


def through_a_view_kept(x):
    flat = x.flatten(2).transpose(1, 2)
    flat[..., 1].add_(1.0)
    return x


def of_a_part(x):
    torch.mul(x[:, 1], 1.5, out=x[:, 1])
    return x


HABITS = {
    "sub_": lambda x: x.sub_(0.5).div_(0.2),
    "-=": augmented,
    "[]=": assigned,
    "view": lambda x: x.view(len(x), -1).mul_(1.5).view_as(x),
    "a view of a view": through_a_view_kept,
    "unbind": by_parts,
    "out=": lambda x: torch.mul(x, 1.5, out=x),
    "out= of a part": of_a_part,
    "torch.relu_": torch.relu_,
    "F.relu": lambda x: F.relu(x, inplace=True),
    "F.hardtanh_": lambda x: F.hardtanh_(x, -0.5, 0.5),
    "nn.ReLU": nn.ReLU(inplace=True),
    "data": through_data,
    "detach": through_detach,
    "transpose_": lambda x: x.transpose_(2, 3),
    "foreach": foreach,
    "copy_": lambda x: x.copy_(x * 1.5),
    "index_put_": put_at_indices,
    "masked_fill_": lambda x: x.masked_fill_(x < 0, 0.0),
    "scatter_": lambda x: x.index_fill_(1, torch.tensor([2]), 0.7),
    "clamp_ in no_grad": without_grad,
    "nn.init": initialised,
    "operator": lambda x: operator.imul(x, 1.5),
    "an unbound method": lambda x: torch.Tensor.add_(x, 0.5),
}


class Writes(Net):
    """Does something to its input before all else; its twin does it to a copy."""

    def __init__(self, habit, copies=False):
        super().__init__()
        self.habit, self.copies = habit, copies

    def forward(self, x):
        return super().forward(self.habit(x.clone() if self.copies else x))


def pair(habit):
    return filled(Writes(habit)), filled(Writes(habit, copies=True))


def called(method, layer="act", **options):
    return lambda model, x: raw(method, model, layer, x, **options)


def head_of(model, x):
    state, value = camfn.state_of(model), torch.linspace(0, 1, 300, dtype=torch.float64).reshape(2, 6, 5, 5)
    return camfn.head(model, "act", x, value)(state, x, value)


def several(model, x):
    return [
        card.maps for card in camfn.explain(model, "act", x, 1, method=["grad_cam", "score_cam", "recipro_cam"], relu=False)
    ]


def found_layers(model, x):
    return [tuple(candidate) for candidate in camfn.candidate_layers(model, x)]


CALLS = {
    "tap": lambda model, x: camfn.tap(model, "act")(camfn.state_of(model), x),
    "tap, nudged": lambda model, x: camfn.tap(model, "act")(camfn.state_of(model), x, torch.ones(2, 6, 5, 5).double()),
    "tap, swapped": lambda model, x: camfn.tap(model, "act")(camfn.state_of(model), x, None, torch.ones(2, 6, 5, 5).double()),
    "pure": lambda model, x: camfn.pure(model)(camfn.state_of(model), x),
    "head": head_of,
    "grad_cam, no layer": called("grad_cam", None),
    "score_cam, no layer": called("score_cam", None),
    "recipro_cam, no layer": called("recipro_cam", None),
    "poly_cam, no layer": called("poly_cam", None),
    "several layers": called("grad_cam", ("conv", "act")),
    "fewer in a chunk": called("score_cam", sweep=camfn.Sweep(chunk=2)),
    "one at a time": called("score_cam", sweep=camfn.Sweep(fold=False)),
    "a part of the sweep": called("score_cam", budget=0.7),
    "explain": lambda model, x: camfn.explain(model, None, x, 1, method="grad_cam").maps,
    "explain, several": several,
    "factorize": lambda model, x: camfn.factorize(model, "act", x, 1, concepts=2, steps=3).maps,
    "smooth": lambda model, x: camfn.smooth(camfn.grad_cam)(model, "act", x, 1, relu=False),
    "augment": lambda model, x: camfn.augment(camfn.grad_cam)(model, "act", x, 1, relu=False),
    "integrate": lambda model, x: camfn.integrate(camfn.grad_cam, steps=3)(model, "act", x, 1, relu=False),
    "fuse_layers": lambda model, x: camfn.fuse_layers(camfn.grad_cam, ("conv", "act"))(model, None, x, 1, relu=False),
    "ensemble": lambda model, x: camfn.ensemble([camfn.grad_cam, camfn.mean_cam])(model, "act", x, 1),
    "multi_scale": lambda model, x: camfn.multi_scale(camfn.grad_cam, [12, 16])(model, "act", x, 1, relu=False),
}


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("call", ["tap", "score_cam, no layer"])
def test_an_input_written_to_in_any_way(call, habit):
    model, twin = pair(HABITS[habit])
    x = images()
    same = as_they_were(x)
    found = CALLS[call](model, x)
    assert same()
    assert off(found, CALLS[call](twin, images())) <= NEAR


@both
@pytest.mark.parametrize("call", CALLS)
def test_an_input_written_to_under_every_function(call, of):
    model, twin = pair(HABITS["sub_"])
    x, subject = images(), of(model)
    same = as_they_were(x)
    for _ in range(2 if of is prepared else 1):
        found = CALLS[call](subject, x)
        assert same()
        assert off(found, CALLS[call](twin, images())) <= NEAR


@pytest.mark.parametrize("method", LAYERED)
def test_an_input_written_to_under_every_method(method):
    model, twin = pair(HABITS["-="])
    x = images()
    same = as_they_were(x)
    found = raw(method, model, "act", x)
    assert same()
    assert off(found, raw(method, twin, "act", images())) <= NEAR


@both
def test_looking_for_layers_leaves_the_input(of):
    model, twin = pair(HABITS["[]="])
    x = images()
    same = as_they_were(x)
    assert str(found_layers(of(model), x)) == str(found_layers(twin, images()))
    assert same()


def test_the_maps_of_a_writer_by_hooks_alone():
    model, x, kept = filled(Writes(HABITS["sub_"])), images(), []
    handle = model.act.register_forward_hook(lambda module, args, out: kept.append(out))
    slope = torch.autograd.grad(model(x.clone())[:, 1].sum(), kept[0])[0]
    handle.remove()
    want = (slope.mean((2, 3), keepdim=True) * kept[0]).sum(1)
    assert off(raw("grad_cam", model, None, x), want) <= NEAR
    assert torch.equal(x, images())


class Broken(Writes):
    def forward(self, x):
        return super().forward(x) / 0


@both
@pytest.mark.parametrize("call", ["grad_cam, no layer", "explain", "fewer in a chunk"])
def test_an_input_written_to_before_an_error(call, of):
    model, x = filled(Broken(HABITS["sub_"])), images()
    same = as_they_were(x)
    with pytest.raises(camfn.CamError):
        CALLS[call](of(model), x)
    assert same()


@pytest.mark.parametrize("layer", ["nothing", "never", "act@2"])
def test_an_input_written_to_before_an_error_about_the_layer(layer):
    model, x = filled(Writes(HABITS["sub_"])), images()
    model.never = nn.ReLU()
    same = as_they_were(x)
    with pytest.raises(camfn.CamError):
        raw("grad_cam", model, layer, x)
    assert same()


@pytest.mark.parametrize("habit", ["-=", "[]=", "view", "nn.ReLU", "copy_"])
@pytest.mark.parametrize("method", ["grad_cam", "score_cam"])
def test_an_input_written_to_under_transforms(method, habit):
    model, twin = pair(HABITS[habit])
    x = images()
    same = as_they_were(x)

    def total(net):
        return lambda x: raw(method, net, "act", x).square().sum()

    def each(net):
        return vmap(lambda image: raw(method, net, "act", image[None])[0])

    assert off(grad(total(model))(x), grad(total(twin))(images())) <= NEAR
    assert off(each(model)(x), each(twin)(images())) <= NEAR
    assert off(jvp(total(model), (x,), (images(seed=2),)), jvp(total(twin), (images(),), (images(seed=2),))) <= NEAR
    assert same()


@pytest.mark.filterwarnings("ignore:the model's output for an input depends")  # as far as a value read in NumPy can tell
@pytest.mark.parametrize("method", ["grad_cam", "score_cam"])
def test_what_numpy_writes_to_the_input(method):
    def through_numpy(x):
        array = x.detach().numpy()
        array *= 1.5
        return x

    model, twin = pair(through_numpy)
    x = images()
    same = as_they_were(x)
    found = raw(method, model, "act", x)
    assert same()
    assert off(found, raw(method, twin, "act", images())) <= NEAR


def test_an_input_that_requires_grad_can_be_written_to():
    model, twin = pair(HABITS["sub_"])
    x = images().requires_grad_()
    same = as_they_were(x)
    assert off(raw("grad_cam", model, "act", x), raw("grad_cam", twin, "act", images())) <= NEAR
    assert same()


@both
def test_a_model_that_writes_to_nothing_is_given_the_input_itself(of):
    given = []

    class Looks(Net):
        def forward(self, x):
            given.append(x.data_ptr())
            return super().forward(x)

    x = images()
    CALLS["pure"](of(filled(Looks())), x)
    assert given[-1] == x.data_ptr()


# ------------------------------------------------------------------------------------------------ the companion inputs


class Beside(Net):
    """Compares its features with rows that it is given, each moved by one. Its twin makes new ones."""

    def __init__(self, copies=False):
        super().__init__()
        self.copies = copies

    def forward(self, x, t):
        t = t.clone() if self.copies else t
        t += 1.0
        return self.feats(x).mean((2, 3)) @ t.T


class Rowed(Beside):
    """One row for each image."""

    def forward(self, x, t):
        t = t.clone() if self.copies else t
        t[:, 0].mul_(2.0).add_(0.5)
        return self.head(self.feats(x) * t[:, :, None, None])


class UnderMasks(Beside):
    """Writes to them where the pictures are dark, so never on the clean inputs."""

    def forward(self, x, t):
        t = t.clone() if self.copies else t
        if float(x.detach().abs().mean()) < 0.7:
            t.fill_(3.0)
        return self.feats(x).mean((2, 3)) @ t.T


BESIDE = {"shared": (Beside, (4, 6)), "a row for each image": (Rowed, (2, 6)), "under masks": (UnderMasks, (4, 6))}


def companion(shape):
    return torch.linspace(-1, 1, shape[0] * shape[1], dtype=torch.float64).reshape(shape)


@pytest.mark.parametrize("method", [name for name in LAYERED if name not in ("cam", *FEW)])
def test_a_companion_input_written_to_under_every_method(method):
    model, twin = filled(Beside()), filled(Beside(copies=True))
    x, t = images(), companion((4, 6))
    same = as_they_were(x, t)
    found = raw(method, model, "act", (x, t))
    assert same()
    assert off(found, raw(method, twin, "act", (images(), companion((4, 6))))) <= NEAR


UNDER = [(kind, method) for kind in BESIDE for method in FEW if (kind, method) != ("under masks", "lift_cam")]
"""What LIFT-CAM rests on is a record, and of a forward that reads values there may be none."""


@both
@pytest.mark.filterwarnings("ignore:.*depends on the others of its batch:camfn.CamWarning")
@pytest.mark.parametrize(("kind", "method"), UNDER)
def test_a_companion_input_written_to(kind, method, of):
    made, shape = BESIDE[kind]
    model, twin = filled(made()), filled(made(copies=True))
    x, t, subject = images(), companion(shape), of(model)
    same = as_they_were(x, t)
    for _ in range(1 if of is not prepared else 2):
        found = raw(method, subject, "act", (x, t))
        assert same()
        assert off(found, raw(method, twin, "act", (images(), companion(shape)))) <= NEAR


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("method", ["score_cam", "ablation_cam", "recipro_cam"])
def test_every_chunk_begins_with_the_companion_as_it_was(method, chunk):
    model, twin = filled(Beside()), filled(Beside(copies=True))
    t, sweep = companion((4, 6)), camfn.Sweep(chunk=chunk)
    found = raw(method, model, "act", {"x": images(), "t": t}, sweep=sweep)
    assert torch.equal(t, companion((4, 6)))
    assert off(found, raw(method, twin, "act", {"x": images(), "t": companion((4, 6))})) <= NEAR


@pytest.mark.parametrize("call", ["tap", "pure", "explain", "explain, several", "smooth", "factorize"])
def test_a_companion_input_written_to_under_other_functions(call):
    model, twin = filled(Beside()), filled(Beside(copies=True))
    x, t = images(), companion((4, 6))
    same = as_they_were(x, t)
    found = CALLS[call](model, (x, t))
    assert same()
    assert off(found, CALLS[call](twin, (images(), companion((4, 6))))) <= NEAR


def test_a_list_and_numbers_beside_the_image_can_be_written_to():
    class Ids(Net):
        def __init__(self):
            super().__init__()
            self.rows = nn.Embedding(4, 6)

        def forward(self, x, ids):
            ids.clamp_(max=1)
            return self.head(self.feats(x) + self.rows(ids)[:, :, None, None])

    model, ids = filled(Ids()), torch.tensor([3, 0])
    found = raw("score_cam", model, "act", (images(), ids))
    assert ids.tolist() == [3, 0]
    assert off(found, raw("score_cam", filled(Ids()), "act", (images(), torch.tensor([1, 0])))) <= NEAR


@pytest.mark.parametrize("method", ["grad_cam", "score_cam"])
def test_a_companion_written_to_under_transforms(method):
    model, twin = filled(Beside()), filled(Beside(copies=True))
    x, t = images(), companion((4, 6))
    same = as_they_were(x, t)

    def slope(net, x, t):
        return grad(lambda pair: raw(method, net, "act", pair).square().sum())((x, t))

    def each(net, x, t):
        return vmap(lambda image: raw(method, net, "act", (image[None], t))[0])(x)

    for run in (slope, each):
        found = run(model, x, t)
        assert same()
        assert off(found, run(twin, images(), companion((4, 6)))) <= NEAR


# ------------------------------------------------------------------------------------------------- the parameters


class Gained(Net):
    """A gain that each forward writes to, of one parameter; the twin computes what would be there."""

    def __init__(self, write=None, value=None):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(-1, 1, 6))
        self.write, self.value = write, value

    def forward(self, x):
        if self.write:
            self.write(self.gain)
        gain = self.gain if self.write else self.value(self.gain)
        return self.head(self.feats(x) * (1 + gain[:, None, None]))


def _no_grad(write):
    def within(p):
        with torch.no_grad():
            write(p)

    return within


def _set_data(p):
    p.data = p.data * 3


def _set_part(p):
    p[0] = 5.0


PARAMETERS = {
    "clamp_": (_no_grad(lambda p: p.clamp_(min=0)), lambda p: p.clamp(min=0)),
    "add_": (_no_grad(lambda p: p.add_(1)), lambda p: p + 1),
    "data =": (_set_data, lambda p: p * 3),
    "data.clamp_": (lambda p: p.data.clamp_(min=0), lambda p: p.clamp(min=0)),
    "data.add_": (lambda p: p.data.add_(1), lambda p: p + 1),
    "data[]=": (lambda p: p.data.__setitem__(0, 5.0), lambda p: torch.cat([p.new_tensor([5.0]), p[1:]])),
    "[]=": (_no_grad(_set_part), lambda p: torch.cat([p.new_tensor([5.0]), p[1:]])),
    "detach": (lambda p: p.detach().mul_(2), lambda p: p * 2),
    "view": (_no_grad(lambda p: p.view(2, 3).mul_(2)), lambda p: p * 2),
    "out=": (_no_grad(lambda p: torch.mul(p, 2, out=p)), lambda p: p * 2),
    "copy_": (_no_grad(lambda p: p.copy_(p.abs())), lambda p: p.abs()),
    "nn.init": (lambda p: nn.init.constant_(p, 0.7), lambda p: torch.full_like(p, 0.7)),
    "foreach": (_no_grad(lambda p: torch._foreach_add_([p], 1.0)), lambda p: p + 1),
    "renorm_": (_no_grad(lambda p: p.view(6, 1).renorm_(2, 0, 0.5)), lambda p: p.clamp(-0.5, 0.5)),
}


def of_parameter(write):
    written, value = PARAMETERS[write]
    model, twin = filled(Gained(write=written)), filled(Gained(value=value))
    with torch.no_grad():
        for net in (model, twin):
            net.gain.copy_(torch.linspace(-1, 1, 6))
    return model, twin


def tensors_in(model):
    return as_they_were(*model.parameters(), *model.buffers())


@both
@pytest.mark.parametrize("method", ["score_cam", "lift_cam"])
@pytest.mark.parametrize("write", PARAMETERS)
def test_a_parameter_written_to_in_any_way(write, method, of):
    model, twin = of_parameter(write)
    same, subject = tensors_in(model), of(model)
    for _ in range(2 if of is prepared else 1):
        found = raw(method, subject, "act", images())
        assert same()
        assert off(found, raw(method, twin, "act", images())) <= 1e-7  # renorm adds 1e-7 to what it divides by


@pytest.mark.parametrize("method", LAYERED)
def test_a_parameter_written_to_under_every_method(method):
    model, twin = of_parameter("add_")
    same = tensors_in(model)
    found = raw(method, model, "act", images())
    assert same()
    assert off(found, raw(method, twin, "act", images())) <= NEAR


@both
@pytest.mark.parametrize("call", CALLS)
def test_a_parameter_written_to_under_every_function(call, of):
    model, twin = of_parameter("add_")
    same, subject = tensors_in(model), of(model)
    for _ in range(2 if of is prepared else 1):
        found = CALLS[call](subject, images())
        assert same()
        assert off(found, CALLS[call](twin, images())) <= NEAR


@both
def test_looking_for_layers_leaves_the_parameters(of):
    model, _ = of_parameter("add_")
    same = tensors_in(model)
    assert camfn.candidate_layers(of(model), images())
    assert same()


@both
@pytest.mark.parametrize("write", ["data =", "data.add_"])
def test_a_state_written_to(write, of):
    model, twin = of_parameter(write)
    state = {name: tensor.detach().clone() for name, tensor in camfn.state_of(model).items()}
    state["gain"].mul_(0.3)
    same, own, subject = as_they_were(*state.values()), tensors_in(model), of(model)
    for method in FEW:
        found = raw(method, subject, "act", images(), state=state)
        assert same()
        assert own()
        assert off(found, raw(method, twin, "act", images(), state=state)) <= NEAR


class Constrained(nn.Conv2d):
    """As in EEGNet: each forward brings the filters back to a norm."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


class Renormed(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, torch.renorm(self.weight, p=2, dim=0, maxnorm=0.5), self.bias)


def with_conv(made):
    net = Net()
    net.conv = made(3, 6, 3, stride=2)
    return filled(net)


class Looked(Net):
    """Rows by `nn.Embedding(max_norm=)`, which brings those that are asked for back to a norm, in place."""

    def __init__(self, max_norm=None):
        super().__init__()
        self.rows = nn.Embedding(4, 6, max_norm=max_norm)

    def forward(self, x, i):
        rows = self.rows(i) if self.rows.max_norm else torch.renorm(self.rows.weight, p=2, dim=0, maxnorm=0.5)[i]
        return self.head(self.feats(x) + rows[:, :, None, None])


class Functional(Looked):
    def forward(self, x, i):
        rows = F.embedding(i, self.rows.weight, max_norm=0.5)
        return self.head(self.feats(x) + rows[:, :, None, None])


ROWS = {
    "a constrained convolution": (lambda: with_conv(Constrained), lambda: with_conv(Renormed), images),
    "nn.Embedding": (lambda: filled(Looked(0.5)), lambda: filled(Looked()), lambda: (images(), torch.tensor([1, 2]))),
    "F.embedding": (lambda: filled(Functional()), lambda: filled(Looked()), lambda: (images(), torch.tensor([1, 2]))),
}


@both
@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "recipro_cam", "full_grad"])
@pytest.mark.parametrize("row", ROWS)
def test_parameters_that_are_brought_back_to_a_norm(row, method, of):
    made, made_twin, given = ROWS[row]
    model, twin = made(), made_twin()
    same, subject = tensors_in(model), of(model)
    for _ in range(2 if of is prepared else 1):
        found = raw(method, subject, "act", given())
        assert same()
        assert off(found, raw(method, twin, "act", given())) <= 1e-6  # renorm adds 1e-7 to what it divides by


@both
@pytest.mark.parametrize("row", ROWS)
def test_tap_and_pure_of_parameters_that_are_brought_back_to_a_norm(row, of):
    made, made_twin, given = ROWS[row]
    model, twin = made(), made_twin()
    same = tensors_in(model)
    for call in ("tap", "pure"):
        assert off(CALLS[call](of(model), given()), CALLS[call](twin, given())) <= 1e-6
    assert same()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of torch, which has no rule for clamp_
@pytest.mark.parametrize("write", ["clamp_", "add_", "copy_"])
@pytest.mark.parametrize("method", ["grad_cam", "score_cam"])
def test_a_parameter_written_to_under_transforms(method, write):
    model, twin = of_parameter(write)
    same = tensors_in(model)

    def slope(net):
        return grad(lambda x: raw(method, net, "act", x).square().sum())(images())

    def ensemble(net):
        x = images()
        states = {k: torch.stack([v, 1.2 * v if v.is_floating_point() else v]) for k, v in camfn.state_of(net).items()}
        return vmap(lambda state: raw(method, net, "act", x, state=state))(states)

    for run in (slope, ensemble):
        found = run(model)
        assert same()
        assert off(found, run(twin)) <= NEAR


# --------------------------------------------------------------------------------------------------- the buffers


class Counted(Net):
    """A buffer that counts forwards and scales the output; the twin knows that it is the second."""

    def __init__(self, counts=True):
        super().__init__()
        self.register_buffer("count", torch.ones(()))
        self.counts = counts

    def forward(self, x):
        if self.counts:
            self.count += 1
            self.bn.running_mean.mul_(0.9).add_(0.1)  # statistics moved by hand
            return super().forward(x) * self.count
        mean = self.bn.running_mean * 0.9 + 0.1
        f = F.batch_norm(self.conv(x), mean, self.bn.running_var, self.bn.weight, self.bn.bias)
        return self.head(self.act(f)) * (self.count + 1)


class OnTheBatch(Net):
    """A norm that always takes, and keeps, the statistics of its batch. The twin keeps none."""

    def __init__(self, keeps=True):
        super().__init__()
        self.keeps = keeps

    def feats(self, x):
        own = (self.bn.running_mean, self.bn.running_var) if self.keeps else (None, None)
        return self.act(F.batch_norm(self.conv(x), *own, self.bn.weight, self.bn.bias, training=True))


class Power(Net):
    """As spectral norm in train mode: a vector moves in each forward, and is read."""

    def __init__(self, keeps=True):
        super().__init__()
        self.register_buffer("u", torch.ones(6))
        self.keeps = keeps

    def forward(self, x):
        weight = self.head[2].weight
        with torch.no_grad():
            new = F.normalize(weight.mT @ (weight @ self.u), dim=0)
            if self.keeps:
                self.u.copy_(new)
        return super().forward(x) * (self.u if self.keeps else new).norm(p=1)


@both
@pytest.mark.filterwarnings("ignore:.*depends on the others of its batch:camfn.CamWarning")
@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "recipro_cam"])
@pytest.mark.parametrize("made", [Counted, OnTheBatch, Power])
def test_a_buffer_written_to(made, method, of):
    model, twin = filled(made()), filled(made(False))
    same, subject = tensors_in(model), of(model)
    for _ in range(2 if of is prepared else 1):
        found = raw(method, subject, "act", images())
        assert same()
        assert off(found, raw(method, twin, "act", images())) <= NEAR


@both
def test_the_batches_counted_by_a_norm_left_in_train_mode(of):
    model = filled(OnTheBatch()).train()
    same = tensors_in(model)
    raw("grad_cam", of(model), "act", images())
    assert same()
    assert model.training
    assert int(model.bn.num_batches_tracked) == 0


def test_the_rows_differ_from_a_model_without_the_habit():
    """So that a habit left out would show."""
    want = raw("mean_cam", filled(Net()), "act", images())
    for habit in HABITS:
        assert off(raw("mean_cam", pair(HABITS[habit])[1], "act", images()), want) > 1e-3, habit
    plain = Gained(value=lambda p: p)
    for write in PARAMETERS:
        model, twin = of_parameter(write)
        net = filled(plain)
        net.load_state_dict(model.state_dict())
        assert off(raw("grad_cam", twin, "act", images()), raw("grad_cam", net, "act", images())) > 1e-3, write

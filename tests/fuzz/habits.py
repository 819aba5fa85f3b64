"""The habits that models are built of, each with a twin: the same function of the same weights, written without the habit.

A habit fills one slot of a model (`models.PLACES`). Its fields are pieces of source text; `twin` has those that its twin has in
their place. In the text of a block, `$i` is its place and `$c` the number of its channels: it stands before or after the layer.

- `init`, `run`: lines of `__init__` and `forward`. `run` reads and writes `z`, `(n, c, h, w)`; in the slot `input` it makes the
  images `x` of the arguments `args`, in `head` it makes the logits `y`, in `attention` it changes tokens `(n, t, c)`.
- `top`, `methods`, `after`: code before the class, code in the class, and code that changes the finished `model`.
- `x`, `layer`, `layout`, `target`, `options`, `subject`, `out`: expressions of the call, and what `forward` returns.
- `before`, `within`: a statement before the call, and the context of the call.
- `prefix`: what the names of layers begin with. `dtype`: that of the model and its input.
"""

from typing import NamedTuple


class Habit(NamedTuple):
    slot: str
    fields: dict[str, str]
    twin: dict[str, str]
    n: int | None = None
    """The only number of images for which the model is a function of one image."""
    never: tuple[str, ...] = ()
    """The methods that ask another question of the model than of its twin."""


HABITS: dict[str, Habit] = {}


def habit(slot: str, name: str, twin: dict[str, str] | str = "", n: int | None = None, **fields: str) -> None:
    """Register a habit. A twin that is text is its `run`."""
    assert name not in HABITS, name
    HABITS[name] = Habit(slot, fields, {"run": twin} if isinstance(twin, str) else twin, n)


CONV = "own(nn.Conv2d($c, $c, 3, padding=1), 'conv $i')"
LINEAR = "own(nn.Linear($c, $c), 'linear $i')"
NORM = "own(nn.BatchNorm2d($c), 'norm $i')"
HELD = {"init": f"self.conv$i = {CONV}", "run": "z = self.conv$i(z)"}
"""A convolution, held and called in the plain way: the twin of many habits."""
LEAKY = "z = torch.nn.functional.leaky_relu(z, 0.1)"

# ---------------------------------------------------------------------------------------------------- blocks: writes

habit("block", "in-place ReLU", "z = z.relu()", init="self.act$i = nn.ReLU(inplace=True)", run="z = self.act$i(z)")
habit("block", "augmented assignment", "z = (z + 0.1) * 1.5", run="z += 0.1\nz *= 1.5")
habit(
    "block",
    "assignment to a slice",
    "z = torch.cat([torch.full_like(z[:, :1], 0.3), z[:, 1:]], 1)",
    run="z[:, 0] = 0.3",
)
habit("block", "write through a view", "z = z * 1.5", run="z.transpose(1, 3).mul_(1.5)")
habit("block", "write under a mask", LEAKY, run="z = z.clone()\nz[z < 0] *= 0.1")
habit("block", "masked_fill_", "z = torch.where(z < -0.5, -0.5, z)", run="z = z.masked_fill_(z < -0.5, -0.5)")
habit(
    "block",
    "write to a parameter",
    "z = z * 1.1",
    init="self.gain$i = nn.Parameter(torch.tensor(1.2, dtype=DTYPE))",
    run="with torch.no_grad():\n    self.gain$i.clamp_(max=1.1)\nz = z * self.gain$i",
)
habit(
    "block",
    "running average",
    "",
    init="self.register_buffer('mean$i', torch.zeros(1, dtype=DTYPE))",
    run="self.mean$i.lerp_(z.detach().mean().expand(1), 0.1)",
)
habit(
    "block",
    "buffer that counts calls",
    "",
    init="self.register_buffer('count$i', torch.zeros((), dtype=torch.long))",
    run="self.count$i += 1",
)
habit("block", "attribute that counts calls", "", init="self.count$i = 0", run="self.count$i += 1")
habit("block", "activations kept in a list", "", init="self.kept$i = []", run="self.kept$i.append(z)")
habit("block", "activation kept in an attribute", "", init="self.last$i = None", run="self.last$i = z")
habit(
    "block",
    "table kept by size",
    "z = z + torch.linspace(0, 1, z.shape[3], dtype=z.dtype)",
    init="self.tables$i = {}",
    run="if z.shape[3] not in self.tables$i:\n"
    "    self.tables$i[z.shape[3]] = torch.linspace(0, 1, z.shape[3], dtype=z.dtype)\n"
    "z = z + self.tables$i[z.shape[3]]",
)

# ------------------------------------------------------------------------------------------------ blocks: containers


def held(name: str, init: str, run: str, **fields: str) -> None:
    """A convolution that is held in an odd way."""
    habit("block", name, HELD, init=init.replace("$conv", CONV), run=run, **fields)


held("module in a dict", "self.parts$i = {'conv': $conv}", "z = self.parts$i['conv'](z)")
held("module in a list", "self.parts$i = [$conv]", "for part in self.parts$i:\n    z = part(z)")
held("module in a tuple in a dict", "self.parts$i = {'all': ($conv, 1)}", "z = self.parts$i['all'][0](z)")
held("module in a closure", "conv$i = $conv\nself.call$i = lambda z: conv$i(z)", "z = self.call$i(z)")
held("module as a default argument", "self.call$i = lambda z, conv=$conv: conv(z)", "z = self.call$i(z)")
held("module in a partial", "self.call$i = functools.partial(lambda conv, z: conv(z), $conv)", "z = self.call$i(z)")
held("module's bound method", "self.call$i = $conv.forward", "z = self.call$i(z)")
held("module in a dataclass", "self.part$i = Part($conv)", "z = self.part$i.module(z)")
held("module in a named tuple", "self.part$i = Pair($conv, 1)", "z = self.part$i.first(z)")
held("module in slots", "self.part$i = Slots($conv)", "z = self.part$i.module(z)")
held("module in __dict__", "self.__dict__['conv$i'] = $conv", "z = self.__dict__['conv$i'](z)")
held("module in a ModuleDict", "self.parts$i = nn.ModuleDict({'conv': $conv})", "z = self.parts$i['conv'](z)")
held("module in a ModuleList", "self.parts$i = nn.ModuleList([$conv])", "for part in self.parts$i:\n    z = part(z)")
held("module under two names", "self.one$i = self.two$i = $conv", "z = self.two$i(z)")
held(
    "module in a slice of a Sequential",
    "self.body$i = nn.Sequential($conv, nn.Sigmoid(), nn.Sigmoid())",
    "z = self.body$i[:-2](z)",
)
held(
    "module made in the first forward",
    "",
    f"if not hasattr(self, 'conv$i'):\n    self.conv$i = {CONV}\nz = self.conv$i(z)",
)
held("module called by its forward", "self.conv$i = $conv", "z = self.conv$i.forward(z)")
held("module that returns a dict", "self.part$i = Told($conv)", "z = self.part$i(image=z)['image']")
held("module traced", "self.conv$i = torch.jit.trace($conv, torch.ones(1, $c, 3, 3, dtype=DTYPE))", "z = self.conv$i(z)")
held(
    "module in a dict, made in inference mode",
    "with torch.inference_mode():\n    self.parts$i = {'conv': copy.deepcopy($conv)}",
    "z = self.parts$i['conv'](z)",
)
held("module in a global", "HELD['$i', type(self)] = $conv", "z = HELD['$i', type(self)](z)")
held("module by a weak reference", "self.conv$i = $conv\nself.weak$i = weakref.ref(self.conv$i)", "z = self.weak$i()(z)")

# ----------------------------------------------------------------------------------- blocks: values read in Python

habit(
    "block",
    "branch on a sample",
    "z = torch.where(z.mean((1, 2, 3), keepdim=True) > 0, z, 1.5 * z)",
    run="z = torch.stack([one if one.mean() > 0 else 1.5 * one for one in z])",
)
habit(
    "block",
    "branch on the batch",
    "z = torch.where(z.mean((1, 2, 3), keepdim=True) > 0, z, 1.5 * z)",
    n=1,
    run="if z.mean() <= 0:\n    z = 1.5 * z",
)
habit(
    "block",
    "item of a sample",
    "z = z * (1 + z.detach().mean((1, 2, 3), keepdim=True).tanh())",
    run="z = torch.stack([one * (1 + math.tanh(one.mean().item())) for one in z])",
)
habit(
    "block",
    "item of a parameter",
    "z = z * self.gain$i",
    init="self.gain$i = nn.Parameter(torch.tensor(1.2, dtype=DTYPE))",
    run="z = z * self.gain$i.item()",
)
habit("block", "assertion on values", "", run="assert z.isfinite().all()")
habit(
    "block",
    "NumPy",
    "z = z * (1 + z.detach().mean((1, 2, 3), keepdim=True).tanh())",
    run="gain = np.tanh(z.detach().mean((1, 2, 3), keepdim=True).numpy())\nz = z * (1 + torch.from_numpy(gain))",
)

# -------------------------------------------------------------------- blocks: functions, gradients, weights, hooks

for name, kind in {
    "custom Function": "Leaky",
    "custom Function with setup_context": "LeakySetUp",
    "custom Function, differentiable once": "LeakyOnce",
}.items():
    habit("block", name, LEAKY, run=f"z = {kind}.apply(z)")
habit("block", "checkpoint", HELD, init=HELD["init"], run="z = checkpoint(self.conv$i, z, use_reentrant=False)")
habit("block", "reentrant checkpoint", HELD, init=HELD["init"], run="z = checkpoint(self.conv$i, z, use_reentrant=True)")
habit(
    "block",
    "gradient inside",
    "z = z + 0.3 * z.detach() ** 2",
    run="with torch.enable_grad():\n"
    "    q = z.detach().clone().requires_grad_()\n"
    "    (slope,) = torch.autograd.grad((q**3).sum(), q)\n"
    "z = z + 0.1 * slope",
)
habit(
    "block",
    "vmap inside",
    "z = z * z.mean((1, 2, 3), keepdim=True)",
    run="z = torch.func.vmap(lambda one: one * one.mean())(z)",
)
habit(
    "block",
    "functional_call inside",
    {"init": f"self.conv$i = scaled({CONV}, 2)", "run": HELD["run"]},
    init=HELD["init"],
    run="z = torch.func.functional_call(self.conv$i, {'weight': 2 * self.conv$i.weight}, (z,))",
)
for name, made in {
    "weight norm": f"torch.nn.utils.parametrizations.weight_norm({CONV})",
    "weight norm by a hook": f"torch.nn.utils.weight_norm({CONV})",
    "spectral norm": f"spectral({CONV})",
    "own parametrization": f"parametrized({CONV})",
    "pruning": f"torch.nn.utils.prune.l1_unstructured({CONV}, 'weight', 5)",
}.items():
    habit("block", name, {**HELD, "init": f"self.conv$i = as_plain({made})"}, init=f"self.conv$i = {made}", run=HELD["run"])
habit(
    "block",
    "tied weights",
    {"init": f"self.one$i = {CONV}\nself.two$i = copy.deepcopy(self.one$i)", "run": "z = self.two$i(self.one$i(z).tanh())"},
    init=f"self.one$i = {CONV}\nself.two$i = {CONV}\nself.two$i.weight = self.one$i.weight",
    run="z = self.two$i(self.one$i(z).tanh())",
)
habit(
    "block",
    "layer called twice",
    {"init": f"self.one$i = {CONV}\nself.two$i = copy.deepcopy(self.one$i)", "run": "z = self.two$i(self.one$i(z))"},
    init=HELD["init"],
    run="z = self.conv$i(self.conv$i(z))",
)
for name, kind, code, twin in (
    ("hook that records", "forward_hook", "lambda m, a, o: seen$i.append(o)", HELD["run"]),
    ("hook that replaces the output", "forward_hook", "lambda m, a, o: 1.5 * o", "z = 1.5 * self.conv$i(z)"),
    ("hook that writes to the output", "forward_hook", "lambda m, a, o: o.mul_(1.5)", "z = 1.5 * self.conv$i(z)"),
    ("hook before, that replaces the input", "forward_pre_hook", "lambda m, a: (0.5 * a[0],)", "z = self.conv$i(0.5 * z)"),
    ("hook on the backward", "full_backward_hook", "lambda m, i, o: seen$i.append(o)", HELD["run"]),
):
    init = f"{HELD['init']}\nseen$i = []\nself.conv$i.register_{kind}({code})"
    habit("block", name, {"init": HELD["init"], "run": twin}, init=init, run=HELD["run"])

# ----------------------------------------------------------------------------------- blocks: norms, layouts, shapes

habit(
    "block",
    "batch norm after a layer that is read twice",
    {"run": "a = self.conv$i(z)\nz = self.norm$i(a.clone()) + a"},
    init=f"self.conv$i = {CONV}\nself.norm$i = {NORM}",
    run="a = self.conv$i(z)\nz = self.norm$i(a) + a",
)
habit(
    "block",
    "batch norm after a layer",
    {"run": "z = self.norm$i(self.conv$i(z).clone())"},
    init=f"self.body$i = nn.Sequential({CONV}, {NORM})\nself.conv$i, self.norm$i = self.body$i",
    run="z = self.body$i(z)",
)
habit(
    "block",
    "batch norm left in train mode",
    {"after": ""},
    init=f"self.norm$i = {NORM}",
    after="model.norm$i.train()",
    run="z = self.norm$i(z)",
)
habit(
    "block",
    "batch norm without statistics",
    "z = z + torch.nn.functional.instance_norm(z)",
    n=1,
    init="self.norm$i = nn.BatchNorm2d($c, affine=False, track_running_stats=False)",
    run="z = z + self.norm$i(z.contiguous())",  # torch 2.13's gradient is wrong without
)
habit("block", "transposed memory", "z = z * 1.5", run="z = 1.5 * z.mT.contiguous().mT")
habit("block", "channels last in memory", "z = z * 1.5", run="z = 1.5 * z.contiguous(memory_format=torch.channels_last)")
habit("block", "strided view", "", run="z = torch.nn.functional.pad(z, (1, 1, 1, 1))[..., 1:-1, 1:-1]")
habit("block", "batch second", "z = torch.softmax(z, 1)", run="z = torch.softmax(z.transpose(0, 1), 0).transpose(0, 1)")
habit(
    "block",
    "linear over NHWC",
    {"init": "self.linear$i = own(nn.Conv2d($c, $c, 1), 'linear $i')", "run": "z = self.linear$i(z)"},
    init=f"self.linear$i = {LINEAR}",
    run="z = self.linear$i(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)",
)
habit(
    "block",
    "einsum",
    "z = torch.nn.functional.conv2d(z, self.linear$i.weight[..., None, None])",
    init=f"self.linear$i = {LINEAR}",
    run="z = torch.einsum('nchw,dc->ndhw', z, self.linear$i.weight)",
)
habit(
    "block",
    "unfolded patches",
    "z = torch.nn.functional.conv2d(z, self.conv$i.weight, padding=1)",
    init=HELD["init"],
    run="p = torch.nn.functional.unfold(z, 3, padding=1)\nz = (self.conv$i.weight.flatten(1) @ p).unflatten(2, z.shape[2:])",
)
habit("block", "Fourier transform", "z = 1.5 * z", run="z = torch.fft.irfft2(1.5 * torch.fft.rfft2(z), s=z.shape[2:])")
habit(
    "block", "residual, in place", {"run": "z = z + self.conv$i(z)"}, init=HELD["init"], run="r = z\nz = self.conv$i(z)\nz += r"
)
habit(
    "block",
    "groups and dilation",
    {"init": "self.conv$i = dense(own(nn.Conv2d($c, $c, 3, padding=2, dilation=2, groups=2), 'conv $i'))"},
    init="self.conv$i = own(nn.Conv2d($c, $c, 3, padding=2, dilation=2, groups=2), 'conv $i')",
    run=HELD["run"],
)
habit("block", "dropout that asks for the mode", "", run="z = torch.nn.functional.dropout(z, 0.5, self.training)")
habit("block", "dropout that does not", "", run="z = torch.nn.functional.dropout(z, 0.5)")

# ------------------------------------------------------------------------------------------------------- the input

PLAIN_X = {"args": "x", "x": "IMAGES", "run": ""}
GRAY = {"x": "IMAGES[:, :1]", "run": "x = x.expand(-1, 3, -1, -1)", "options": ""}
for told, axes in (("", {}), (", told", {"last": "axes='nhwc'", "turned": "axes='nhcw'", "gray": "axes='nhw'"})):
    some = {name: {"options": text} for name, text in axes.items()}
    habit(
        "input",
        f"channels-last input{told}",
        {**PLAIN_X, "options": ""},
        x="IMAGES.permute(0, 2, 3, 1).contiguous()",
        run="x = x.permute(0, 3, 1, 2)",
        **some.get("last", {}),
    )
    habit(
        "input",
        f"channels between height and width{told}",
        {**PLAIN_X, "options": ""},
        x="IMAGES.transpose(1, 2)",
        run="x = x.transpose(1, 2)",
        **some.get("turned", {}),
    )
    habit(
        "input",
        f"images without a channel axis{told}",
        GRAY,
        x="IMAGES[:, 0]",
        run="x = x[:, None].expand(-1, 3, -1, -1)",
        **some.get("gray", {}),
    )
habit("input", "flat input", PLAIN_X, x="IMAGES.flatten(1)", run="x = x.unflatten(1, (3, 8, 12))")
habit("input", "mapping", PLAIN_X, x="{'pixels': IMAGES}", args="pixels", run="x = pixels")
habit(
    "input",
    "mapping with other things in it",
    PLAIN_X,
    x="{'pixels': IMAGES, 'flag': True, 'mask': None}",
    args="pixels, mask, flag",
    run="x = pixels if flag and mask is None else None",
)
habit("input", "list of images", PLAIN_X, x="list(IMAGES)", run="x = torch.stack(x)")
habit(
    "input",
    "companion with a row for each image",
    {**PLAIN_X, "x": "IMAGES * (1 + torch.arange(len(IMAGES), dtype=DTYPE))[:, None, None, None]"},
    x="(IMAGES, 1 + torch.arange(len(IMAGES), dtype=DTYPE))",
    args="x, gain",
    run="x = x * gain[:, None, None, None]",
)
habit(
    "input",
    "companion that all images share",
    {**PLAIN_X, "run": "x = 1.5 * x"},
    x="(IMAGES, torch.tensor(1.5, dtype=DTYPE))",
    args="x, gain",
    run="x = x * gain",
)
habit(
    "input",
    "shared companion with as many rows as images",
    {**PLAIN_X, "run": "x = 1.5 * x"},
    x="(IMAGES, torch.tensor([0.5, 1.0][-len(IMAGES):], dtype=DTYPE))",
    args="x, pair",
    run="x = x * (pair.sum() + 0.5 * (2 - len(pair)))",
)
habit(
    "input",
    "companion that is written to",
    {**PLAIN_X, "run": "x = 1.5 * x"},
    x="(IMAGES, torch.tensor(0.5, dtype=DTYPE))",
    args="x, gain",
    run="gain += 1\nx = x * gain",
)
habit("input", "input written to", "x = x - 0.1", run="x -= 0.1")
habit("input", "slice of the input written to", "x = torch.cat([0 * x[:, :1], x[:, 1:]], 1)", run="x[:, 0] = 0")
habit("input", "input of transposed memory", {"x": "IMAGES"}, x="IMAGES.mT.contiguous().mT")
habit("input", "input channels last in memory", {"x": "IMAGES"}, x="IMAGES.contiguous(memory_format=torch.channels_last)")
habit(
    "input", "expanded input", {"x": "IMAGES[:1].repeat(len(IMAGES), 1, 1, 1)"}, x="IMAGES[:1].expand(len(IMAGES), -1, -1, -1)"
)
habit("input", "input that requires a gradient", {"x": "IMAGES"}, x="IMAGES.clone().requires_grad_()")
habit("input", "input made in inference mode", {"x": "IMAGES"}, x="in_inference_mode(IMAGES)")

# ------------------------------------------------------------------------------------------------------- the layer

FEAT = "own(nn.Conv2d(4, 8, 3, 2, 1), 'feat')"
PLAIN_LAYER = {"init": f"self.feat = {FEAT}", "run": "z = self.feat(z)", "layer": "'feat'", "layout": "'auto'", "after": ""}


def layer(
    name: str, made: str = FEAT, run: str = "z = self.feat(z)", twin: dict[str, str] | None = None, **fields: str
) -> None:
    """A way to write the layer. `made`: the module `feat`."""
    habit("layer", name, {**PLAIN_LAYER, **(twin or {})}, **{"init": f"self.feat = {made}", "run": run, **fields})


GRID = "hw = [(side + 1) // 2 for side in z.shape[2:]]\n"
PREFIX = "z = z[:, $k:].mT.unflatten(2, hw) + z[:, :$k].mean(1)[..., None, None]"
OF_PREFIX = {
    "init": f"self.feat = {FEAT}\nself.prefix = own(Prefix($k), 'prefix')",
    "run": "z = self.feat(z) + self.prefix.tokens.mean(1)[..., None, None]",
}
for name, made, run, layout, twin in (
    ("NHWC activation", "Last()", "z = self.feat(z).permute(0, 3, 1, 2)", "'channels_last'", {}),
    ("tokens", "Tokens()", f"{GRID}z = self.feat(z).mT.unflatten(2, hw)", "layouts.tokens((4, 6), 0)", {}),
    (
        "tokens first",
        "TokensFirst()",
        f"{GRID}z = self.feat(z).permute(1, 2, 0).unflatten(2, hw)",
        "layouts.tokens((4, 6), 0)",
        {},
    ),
    (
        "class token",
        "Tokens(), own(Prefix(1), 'prefix')",
        f"{GRID}z = self.feat(z)\n{PREFIX}",
        "layouts.tokens((4, 6), 1)",
        OF_PREFIX,
    ),
    (
        "registers",
        "Tokens(), own(Prefix(4), 'prefix')",
        f"{GRID}z = self.feat(z)\n{PREFIX}",
        "layouts.tokens((4, 6), 4)",
        OF_PREFIX,
    ),
):
    count = "4" if name == "registers" else "1"
    run, twin = run.replace("$k", count), {key: text.replace("$k", count) for key, text in twin.items()}
    for told in ("", ", told"):
        layer(name + told, f"nn.Sequential({FEAT}, {made})", run, twin, **{"layout": layout} if told else {})
layer("layer in a tuple", f"Parts({FEAT})", "z = self.feat(z)[0]", layer="'feat:0'")
layer("layer in a tuple of one", f"Alone({FEAT})", "(z,) = self.feat(z)")
layer("layer in a dict", f"Named({FEAT})", "z = self.feat(z)['out']", layer="'feat:out'")
SECOND = "own(nn.Conv2d(8, 8, 3, 1, 1), 'mix')"
TWICE = {
    "init": f"self.down = {FEAT}\nself.one = {SECOND}\nself.two = copy.deepcopy(self.one)",
    "run": "z = self.two(self.one(self.down(z)))",
}
for call, name in (("1", "one"), ("2", "two")):
    layer(
        f"layer called twice, call {call}",
        run="z = self.mix(self.mix(self.down(z)))",
        init=f"self.down = {FEAT}\nself.mix = {SECOND}",
        layer=f"'mix@{call}'",
        twin={**TWICE, "layer": f"'{name}'"},
    )
layer("layer in a slice", init=f"self.body = nn.Sequential({FEAT}, nn.Sigmoid())", run="z = self.body[:1](z)", layer="'body.0'")
layer(
    "layer in a ModuleDict",
    init=f"self.parts = nn.ModuleDict({{'feat': {FEAT}}})",
    run="z = self.parts['feat'](z)",
    layer="'parts.feat'",
)
layer("layer under two names", init=f"self.feat = self.alias = {FEAT}", run="z = self.feat(z)", layer="'alias'")
layer("layer called by its forward", run="z = self.feat.forward(z)")
layer("layer as a module", after="HELD['layer'] = model.feat", layer="HELD['layer']")
layer(
    "layer in a list",
    init=f"self.parts = [{FEAT}]",
    run="z = self.parts[0](z)",
    after="HELD['layer'] = model.parts[0]",
    layer="HELD['layer']",
)
layer("layer whose weight is used", run="z = torch.nn.functional.conv2d(z, self.feat.weight, self.feat.bias, 2, 1)")
layer("layer then written to", run="z = self.feat(z)\nz += 0.1", twin={"run": "z = self.feat(z) + 0.1"})
layer("layer then written to by a ReLU", run="z = torch.relu_(self.feat(z))", twin={"run": "z = self.feat(z).relu()"})
layer(
    "layer then written to through a view",
    run="z = self.feat(z)\nz[:, 1].mul_(2)",
    twin={"run": "z = self.feat(z)\nz = torch.cat([z[:, :1], 2 * z[:, 1:2], z[:, 2:]], 1)"},
)
layer(
    "layer that works in place",
    init=f"self.conv, self.feat = {FEAT}, nn.ReLU(inplace=True)",
    run="z = self.feat(self.conv(z))",
    twin={"init": f"self.conv, self.feat = {FEAT}, nn.ReLU()", "run": "z = self.feat(self.conv(z))"},
)
layer(
    "layer that returns its input",
    init=f"self.conv, self.feat = {FEAT}, nn.Identity()",
    run="z = self.feat(self.conv(z))\nz *= 1.5",
    twin={"init": f"self.conv, self.feat = {FEAT}, nn.Identity()", "run": "z = self.feat(self.conv(z).clone()) * 1.5"},
)
layer("layer of transposed memory", f"nn.Sequential({FEAT}, Transposed())")
layer("layer under checkpoint", run="z = checkpoint(self.feat, z, use_reentrant=False)")
layer("layer under no_grad", run="with torch.no_grad():\n    z = self.feat(z)")
layer(
    "layer with weight norm",
    f"torch.nn.utils.parametrizations.weight_norm({FEAT})",
    twin={"init": f"self.feat = as_plain(torch.nn.utils.parametrizations.weight_norm({FEAT}))"},
)
layer(
    "layer with a hook that replaces its output",
    after="model.feat.register_forward_hook(lambda m, a, o: 1.5 * o)",
    twin={"run": "z = 1.5 * self.feat(z)"},
)
layer(
    "layer with a hook that writes to its output",
    after="model.feat.register_forward_hook(lambda m, a, o: o.mul_(1.5))",
    twin={"run": "z = 1.5 * self.feat(z)"},
)
layer(
    "layer with a hook that records",
    init=f"self.feat, seen = {FEAT}, []\nself.feat.register_forward_hook(lambda m, a, o: seen.append(o))",
)
layer("layer kept", init=f"self.feat, self.kept = {FEAT}, {{}}", run="z = self.kept['feat'] = self.feat(z)")

# -------------------------------------------------------------------------------------------------------- the head

FC = "self.fc = own(nn.Linear(8, 5), 'fc')"
MEAN = "y = self.fc(z.mean((2, 3)))"


def head(name: str, run: str, init: str = FC, twin: str = MEAN) -> None:
    habit("head", name, {"init": FC, "run": twin}, init=init, run=run)


head("convolution as the head", "y = self.fc(z).mean((2, 3))", "self.fc = own(nn.Conv2d(8, 5, 1), 'fc')")
head("einsum as the head", "y = torch.einsum('nchw,kc->nk', z, self.fc.weight) / z[0, 0].numel() + self.fc.bias")
head("functional head", "y = torch.nn.functional.linear(z.mean((2, 3)), self.fc.weight, self.fc.bias)")
head(
    "pooling, dropout",
    "y = self.fc(self.drop(self.pool(z).flatten(1)))",
    f"{FC}\nself.pool, self.drop = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5)",
)
head("tied head", MEAN, f"{FC}\nself.words = own(nn.Embedding(5, 8), 'words')\nself.words.weight = self.fc.weight")
head(
    "two heads",
    "m = z.mean((2, 3))\ny = torch.cat([self.one(m), self.two(m)], 1)",
    f"{FC}\nself.one, self.two = rows(self.fc, 0, 3), rows(self.fc, 3, 5)\ndel self.fc",
)
head("loop over samples", "y = torch.stack([self.fc(one.mean((1, 2))) for one in z])")
head("in-place scale", f"{MEAN}\ny /= 2", twin=f"{MEAN}\ny = y / 2")

# ------------------------------------------------------------------------------------------------------ the output


def output(name: str, out: str, target: str = "", twin: str = "", **fields: str) -> None:
    """What forward returns in place of the logits `y`; `target` and `twin`: where it takes one to read them."""
    told = {"target": target} if target else {}
    habit("output", name, {"out": "y", **({"target": twin} if twin else {})}, out=out, **told, **fields)


output("tuple", "y, z")
output("list", "[y, z]")
output("mapping with logits", "{'features': z, 'logits': y}")
output("mapping with out and aux", "collections.OrderedDict(out=y, aux=2 * y)")
output("mapping of other names", "{'z': z, 'scores': y}", "lambda o: o['scores'][1]", "lambda y: y[1]")
output("dataclass", "Record(y, z)")
output("model output", "ModelOutput(logits=y, hidden=z)")
output("model output with a loss", "ModelOutput(loss=y.mean(), logits=y)")
output("named tuple", "Logits(y, z)")
output("loss beside logits", "y.mean(), y", "lambda o: o[1][1]", "lambda y: y[1]")
output("mapping with a loss and words", "{'loss': y.sum(), 'logits': y, 'words': ['a', 'b', 'c'], 'none': None}")
output("deep supervision", "(y, 2 * y, z.mean((2, 3)))")
output("deep supervision, target of the second", "(2 * y, y)", "lambda o: o[1][1]", "lambda y: y[1]")
output("entry for each image", "[{'scores': one} for one in y]", "lambda o: o['scores'][1]", "lambda y: y[1]")
output("logits without an axis of classes", "y[:, 1]", "targets.regression(0)", "targets.regression(1)")
output("single logit", "y[:, 1:2]", "targets.regression(0)", "targets.regression(1)")
output("nested", "{'head': (y, {'deep': z})}", "lambda o: o['head'][0][1]", "lambda y: y[1]")
output("written to", "y.mul_(2)", "lambda y: y[1]", "lambda y: 2 * y[1]")

# ------------------------------------------------------------------------------------------- the model as a whole


def model(name: str, twin: dict[str, str] | None = None, **fields: str) -> None:
    habit("model", name, {**dict.fromkeys(fields, ""), **(twin or {})}, **fields)


model("train mode", after="model.train()")
model("frozen", after="model.requires_grad_(False)")
model("gradients there", after="for p in model.parameters():\n    p.grad = torch.ones_like(p)")
model("DataParallel", after="model = nn.DataParallel(model)")
model("wrapped", after="model = Wrapped(model)", prefix="net.")
model("float32", {"dtype": "torch.float32"}, dtype="torch.float32")
model("hook that records the output", after="model.seen = []\nmodel.register_forward_hook(lambda m, a, o: m.seen.append(o))")
model(
    "hook that wraps the input",
    {"top": ""},
    after="model.register_forward_pre_hook(lambda m, a, k: (a, dict(k)), with_kwargs=True)",
)
model(
    "forward without gradients",
    methods="def __call__(self, *args, **kwargs):\n    with torch.no_grad():\n        return super().__call__(*args, **kwargs)",
)
model("forward replaced by its own", after="model.forward = types.MethodType(type(model).forward, model)")
model(
    "forward replaced by a function",
    after="forward = model.forward\nmodel.forward = lambda *args, **kwargs: forward(*args, **kwargs)",
)
model(
    "train that stays in eval mode",
    methods="def train(self, mode=True):\n    return super().train(False)",
    after="model.train()",
)
model("destructor", methods="def __del__(self):\n    CLOSED.append(id(self))")
model(
    "call counted by the class",
    methods="calls = 0\n\n"
    "def __call__(self, *args, **kwargs):\n    self.calls += 1\n    return super().__call__(*args, **kwargs)",
)
model(
    "attributes found by name",
    methods="def __getattr__(self, name):\n    return torch.tanh if name == 'bend' else super().__getattr__(name)",
)
model("made in inference mode", after="model = made_in_inference_mode(model)")

# -------------------------------------------------------------------------------------------------------- the call

CALL = {"subject": "model", "before": "", "within": ""}
habit("call", "prepared", CALL, subject="camfn.prepare(model)")
habit(
    "call",
    "prepared, for another input first",
    CALL,
    before="prepared = camfn.prepare(model)\n$call(prepared, $other)",
    subject="prepared",
)
habit("call", "called twice", CALL, before="$call(model, $same)")
habit("call", "no_grad", CALL, within="torch.no_grad()")
habit("call", "inference mode", CALL, within="torch.inference_mode()")
habit("call", "state given", {**CALL, "options": ""}, options="state=camfn.state_of(model)")
habit("call", "another mode of threads", CALL, within="deterministic()")

# -------------------------------------------------------------------------------------------------- the attention


def attention(name: str, mix: str, twin: str = "") -> None:
    """How queries, keys and values `(n, heads, t, d)` are mixed."""
    plain = {"top": MIXED.replace("$mix", twin or EAGER), "init": BLOCKS}
    habit(
        "attention", name, plain, top=MIXED.replace("$mix", mix), init=BLOCKS, run="for block in self.blocks:\n    z = block(z)"
    )


EAGER = "return (q @ k.mT / 2).softmax(-1) @ v"
MIXED = "class $sideMix(Attention):\n    def mix(self, q, k, v):\n        $mix\n"
BLOCKS = "self.blocks = nn.ModuleList([Block($sideMix, 'block 1'), Block($sideMix, 'block 2')])"
attention("fused kernel", "return torch.nn.functional.scaled_dot_product_attention(q, k, v)")
attention(
    "einsum attention", "return torch.einsum('nhqk,nhkd->nhqd', torch.einsum('nhqd,nhkd->nhqk', q / 2, k).softmax(-1), v)"
)
attention("attention written in place", "s = q @ k.mT\n        s /= 2\n        return s.softmax(-1) @ v")
attention(
    "attention with a mask", "return (q @ k.mT / 2).masked_fill(torch.zeros(1, dtype=torch.bool), -torch.inf).softmax(-1) @ v"
)
attention("attention with dropout", "return torch.nn.functional.dropout((q @ k.mT / 2).softmax(-1), 0.5, self.training) @ v")
attention(
    "attention by bmm",
    "s = torch.bmm(q.flatten(0, 1) / 2, k.flatten(0, 1).mT)\n"
    "        return torch.bmm(s.softmax(-1), v.flatten(0, 1)).unflatten(0, q.shape[:2])",
)
attention("attention kept", "self.kept = (q @ k.mT / 2).softmax(-1)\n        return self.kept @ v")

# -------------------------------------------------------------------------------------------- what is another question

NEVER = {
    "branch on a sample": ("lift_cam",),  # it has no rule for what the twin does
    "branch on the batch": ("lift_cam",),
    "item of a sample": ("lift_cam",),
    "NumPy": ("lift_cam",),
    "batch norm without statistics": ("lift_cam",),
    "class token": ("lift_cam", "shapley_cam"),  # the tokens beside the grid are set to zero too, and are in the Hessian
    "registers": ("lift_cam", "shapley_cam"),
    "class token, told": ("lift_cam", "shapley_cam"),
    "registers, told": ("lift_cam", "shapley_cam"),
    "companion with a row for each image": ("smooth_grad_cam_pp",),  # the noise is as large as the input's range
    "convolution as the head": ("full_grad",),  # its bias has positions, and that of a linear layer has none
}
HABITS.update({name: HABITS[name]._replace(never=methods) for name, methods in NEVER.items()})

CLASHES = ({"gradient inside", "inference mode"}, {"module in a global", "made in inference mode"})
"""Habits of which no model can have both: it would not run."""

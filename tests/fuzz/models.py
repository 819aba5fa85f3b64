"""From habits to a model, its twin and a call of each, as a script that can be pasted and run."""

import collections
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import camfn
from tests.fuzz import prelude
from tests.fuzz.habits import BLOCKS, CLASHES, EAGER, HABITS, MIXED, Habit
from tests.oracles.networks import CHEAP

T = TypeVar("T")
Pick = Callable[[Sequence[T]], T]
"""Chooses one of several: `random.Random.choice`, or a draw of hypothesis."""

OF_ATTENTION = [name for name, row in camfn.METHODS.items() if "attention" in row.needs]

PLACES = {"input": "input", "early": "block", "attention": "attention", "layer": "layer", "late": "block"}
PLACES |= {"head": "head", "output": "output", "model": "model", "call": "call"}
"""The places of a model in the order of its code, and the slot of the habits which fill each."""

CHANNELS = {"early": "4", "late": "8"}

ALL = {"top": "", "methods": "", "after": "", "args": "x", "x": "IMAGES", "out": "y", "layer": "'feat'", "layout": "'auto'"}
ALL |= {"options": "", "subject": "model", "before": "", "within": "", "prefix": "", "dtype": "torch.float64"}

CONVOLUTION = {
    "layer": {"init": "self.feat = own(nn.Conv2d(4, 8, 3, 2, 1), 'feat')", "run": "z = self.feat(z)"},
    "attention": {},
}
TRANSFORMER = {
    "attention": {
        "top": MIXED.replace("$mix", EAGER),
        "init": BLOCKS,
        "run": "for block in self.blocks:\n    z = block(z)",
    },
    "layer": {"init": "self.feat = own(nn.LayerNorm(8), 'feat')", "run": "z = self.feat(z)\nz = z.mT.unflatten(2, hw)"},
}
HEAD = {"init": "self.fc = own(nn.Linear(8, 5), 'fc')", "run": "y = self.fc(z.mean((2, 3)))"}

CLASSES = {"1": 1, "None": None, "[3, 1][:len(IMAGES)]": [3, 1], "'all'": "all"}
TARGETS = [*CLASSES, "lambda y: y[2] - y[0]", "targets.probability(2)", "targets.contrast()", "targets.log_probability()"]


class Case(NamedTuple):
    """One model and one method."""

    method: str
    habits: dict[str, str]  # by place
    transformer: bool = False
    target: str = "1"
    n: int = 2
    seed: int = 0

    def smaller(self) -> Iterator["Case"]:
        """The cases with one habit less."""
        for place in self.habits:
            yield self._replace(habits={key: name for key, name in self.habits.items() if key != place})


class Script(NamedTuple):
    """The text of a case: what makes the models, and the statements that make the maps `found` and `wanted`."""

    setup: str
    found: str
    wanted: str
    layer: str  # of the twin
    target: str  # of the twin

    def __str__(self) -> str:
        return "\n".join([self.setup, self.found, self.wanted, "print((found - wanted).abs().max() / wanted.abs().max())"])


def drawn(pick: Pick[Any], method: str, first: str) -> Case:
    """A case of one to three habits that go together, of which `first` is one."""
    names = [name for name, habit in HABITS.items() if fits(habit, method)]
    slot = HABITS[first].slot
    transformer = method in OF_ATTENTION or slot == "attention" or (slot != "layer" and pick([True, *[False] * 4]))
    habits: dict[str, str] = {}
    for name in (first, *(pick(names) for _ in range(pick([0, 1, 1, 2])))):
        free = [place for place in places(transformer) if PLACES[place] == HABITS[name].slot and place not in habits]
        if free and not any({*habits.values(), name} >= both for both in CLASHES):
            habits[pick(free)] = name
    one = any(HABITS[name].n == 1 for name in habits.values())
    plain = method == "cam" or "output" in habits  # a function would read another output
    return Case(
        method, habits, transformer, pick([*CLASSES] if plain else TARGETS), 1 if one else pick([1, 2]), pick(range(100))
    )


def firsts(method: str) -> list[str]:
    """The habits that a model may have which the method is asked of."""
    fitting = [name for name, habit in HABITS.items() if fits(habit, method)]
    return [name for name in fitting if HABITS[name].slot != "layer" or method not in OF_ATTENTION]


def some(count: int, pick: Pick[Any]) -> list[Case]:
    """Cases in which each method, and then each habit, comes as often as any other."""
    methods, times, found = [*camfn.METHODS], collections.Counter(), []
    fitting = {method: firsts(method) for method in methods}
    for method in (methods[i % len(methods)] for i in range(count)):
        least = min(times[name] for name in fitting[method])
        first = pick([name for name in fitting[method] if times[name] == least])
        times[first] += 1
        found.append(drawn(pick, method, first))
    return found


def places(transformer: bool) -> list[str]:
    return [place for place in PLACES if place != ("layer" if transformer else "attention")]


def fits(habit: Habit, method: str) -> bool:
    """Whether the method asks the same of a model with the habit as of its twin."""
    of_layer = camfn.METHODS[method].of_layer
    if method == "cam" and (habit.slot == "attention" or habit.fields.get("target", "1").startswith(("lambda", "targets"))):
        return False  # it has a linear head behind a pooling, and a class
    return method not in habit.never and (of_layer or habit.slot != "layer")


def alone(habit: str, method: str) -> Iterator[Case]:
    """The cases of one habit and nothing else."""
    slot, n = HABITS[habit].slot, HABITS[habit].n or 2
    for transformer in (True, False):
        for place in places(transformer):
            if PLACES[place] == slot and (transformer or method not in OF_ATTENTION):
                yield Case(method, {place: habit}, transformer, n=n)


# --------------------------------------------------------------------------------------------------------- the text

CLASS = """\
$top
class $side(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = own(nn.Conv2d(3, 4, 3, padding=1), 'stem')
$init

    def forward(self, $args):
$run
        return $out
$methods


def make_$name():
    model = $side().eval()
$after
    return model


"""
TOKENS = "z = self.embed(z)\nhw = z.shape[2:]\nz = z.flatten(2).mT"
PRELUDE = Path(prelude.__file__).read_text(encoding="utf-8").partition('"""\n\n')[2]


def script(case: Case) -> Script:
    habit, twin = _side(case, False), _side(case, True)
    prelude_text = PRELUDE.replace("DTYPE, SEED = torch.float64, 0", f"DTYPE, SEED = {habit['dtype']}, {case.seed}")
    setup = [prelude_text, f"\n\nIMAGES, OTHER = images({case.n}, 1), images({case.n}, 2)\n\n"]
    setup += [_class("Model", habit), _class("Twin", twin)]
    setup += [f"model, twin = make_model(), make_twin()\nx, twin_x = {habit['x']}, {twin['x']}\n"]
    calls = _call(case, habit, "found", "model", "x"), _call(case, twin, "wanted", "twin", "twin_x")
    return Script("".join(setup), *calls, twin["layer"].strip("'"), twin["target"])


def _side(case: Case, twin: bool) -> dict[str, str]:
    """The pieces of the model, or of its twin, put together."""
    base = TRANSFORMER if case.transformer else CONVOLUTION
    made = {**ALL, "target": case.target, "init": "", "run": ""}
    if case.transformer:
        made["init"] = "self.embed = own(nn.Conv2d(4, 8, 2, 2), 'embed')"
    for place in PLACES:
        fields = {**base.get(place, {}), **({**HEAD} if place == "head" else {})}
        if place in case.habits:
            habit = HABITS[case.habits[place]]
            fields |= habit.fields | (habit.twin if twin else {})
        for key, text in fields.items():
            text = text.replace("$i", place).replace("$c", CHANNELS.get(place, "$c")) if place in CHANNELS else text
            together = key in ("top", "init", "run", "after", "methods")
            made[key] = f"{made[key]}\n{text}".strip("\n") if together else text
        after = {"input": "z = self.stem(x)", "late": "", "layer": "z = torch.nn.functional.silu(z)"}.get(place, "")
        after = TOKENS if place == "early" and case.transformer else after
        made["run"] = f"{made['run']}\n{after}".strip("\n")
    return made


def _class(side: str, made: dict[str, str]) -> str:
    text = CLASS
    for key, indent in {"init": 8, "run": 8, "methods": 4, "after": 4, "top": 0}.items():
        text = text.replace(f"${key}", textwrap.indent(made[key], " " * indent))
    for key in ("args", "out"):
        text = text.replace(f"${key}", made[key])
    return text.replace("$side", side).replace("$name", side.lower())


def _call(case: Case, made: dict[str, str], name: str, model: str, x: str) -> str:
    row = camfn.METHODS[case.method]
    options = {key: repr(value) for key, value in CHEAP.get(case.method, {}).items()}
    if case.method == "cam":
        options["fc"] = repr(f"{made['prefix']}fc")
    if row.of_layer:
        options["layout"] = made["layout"]
    told = [f"{key}={value}" for key, value in options.items()] + [made["options"]] * bool(made["options"])
    last = ", ".join([made["target"], *told, "relu=False", "normalize=False"])
    layer = made["layer"] if row.of_layer else "None"
    layer = layer.replace("'", f"'{made['prefix']}", 1) if layer.startswith("'") else layer

    def call(subject: str, x: str) -> str:
        return f"camfn.{case.method}({subject}, {layer}, {x}, {last})"

    before = made["before"].replace("$call(prepared, $other)", call("prepared", made["x"].replace("IMAGES", "OTHER")))
    before = before.replace("$call(model, $same)", call("model", x))
    line = f"{name} = {call(made['subject'].replace('model', model), x)}\n"
    if made["within"]:
        line = f"with {made['within']}:\n    {line}"
    return f"{before}\n{line}".lstrip("\n")

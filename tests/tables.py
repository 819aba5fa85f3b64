"""The tables of the pages that are made, not written: the methods, what works with each, how fast, how near.

    python tests/tables.py            # print them
    python tests/tables.py --write    # put them into README.md, docs/methods.md and docs/budgeted-scoring.md
    python tests/tables.py --catalog  # write camfn/cli/methods.jsonl alone, the methods for the command line

A cell is what came of trying: the checks are those of the contract tests, or stand here.
"""

import inspect
import json
import re
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
import torch.nn.functional as F

import camfn
from camfn import _compat
from tests import test_contract as contract
from tests import test_threads
from tests.methods import test_transformers as transformers
from tests.oracles.closeness import close
from tests.oracles.networks import SmallNet, inputs, small_net
from tests.oracles.vits import vit

ROOT = Path(__file__).resolve().parents[1]
README, METHODS, BUDGETS = ROOT / "README.md", ROOT / "docs" / "methods.md", ROOT / "docs" / "budgeted-scoring.md"
CATALOG = ROOT / "camfn" / "cli" / "methods.jsonl"
RESULTS = ROOT / "benchmarks" / "results"
WORKS, REFUSED, FAILS, UNKNOWN = "✓", "-", "✗", "?"
COMPILED = "`torch.compile`"
FLAT = r"\d+ of \d+ maps at layer '.*' are flat"
"""Group-CAM's, where no group of channels adds to the blurred input: so it is for most classes of a network drawn at random."""

Cells = dict[str, dict[str, str]]
"""What came of trying: by method, by column."""

# ------------------------------------------------------------------------------------------------------- the checks


TARGETS = {1: [4, 1], 2: [2, 1], 3: [2, 0]}
"""By axes: classes of the two inputs to which some group of channels adds, so that Group-CAM has a map."""


def dimensions(dims: int) -> Callable[[str], None]:
    """Maps of the grid's shape in [0, 1]; and a network with one axis more, of length 1, gives the same map."""

    def check(method: str) -> None:
        signed = {"relu": False} if {"gradients", "head"} & camfn.METHODS[method].needs else {}  # then none is nowhere positive
        found = contract.run(method, small_net(dims=dims), "features", inputs(dims=dims), TARGETS[dims], **signed)
        assert found.shape == (2, *contract.size_of(method, (4,) * dims, (8,) * dims))
        assert found.flatten(1).amin(1).tolist() == [0, 0]
        assert found.flatten(1).amax(1).tolist() == [1, 1]
        if method == "rise":
            return  # its masks are other ones where there are more axes
        fewer = max(1, dims - 1)
        thin, x = small_net(dims=fewer), inputs(dims=fewer)
        given = {"target": TARGETS[fewer], "normalize": False, **signed}
        expected = contract.run(method, thin, "features", x, **given)
        thick = contract.run(method, thickened(thin, fewer), "features", x[..., None], **given)
        close(thick[..., 0], expected, f"{fewer} and {fewer + 1} axes")

    return check


def thickened(net: SmallNet, dims: int) -> SmallNet:
    """The network with kernels that have one axis more, and are zero off its middle."""
    thick, state = small_net(dims=dims + 1), net.state_dict()
    thick.load_state_dict({name: F.pad(t[..., None], (1, 1)) if t.ndim > 2 else t for name, t in state.items()})
    return thick


def several_inputs(method: str) -> None:
    for kind in ("tuple", "dict"):
        contract.test_each_sample_keeps_its_own_other_inputs(method, kind)


def several_layers(method: str) -> None:
    net, x, layers = small_net(), inputs(), ("features", "act")
    if method not in contract.OF_LAYER:
        contract.FUNCTIONS[method](net, layers, x)
    pairs = list(zip(layers, contract.run(method, net, layers, x), strict=True))
    alone = pairs[-1:] if method == "poly_cam" else pairs  # its others build on this one: test_poly.py has a loop for them
    for layer, found in alone:
        close(found, contract.run(method, net, layer, x), layer)


def function_as_target(method: str) -> None:
    net, x = small_net(), inputs()
    close(
        contract.run(method, net, "features", x, lambda y: y[3]),
        contract.run(method, net, "features", x, camfn.targets.logit(3)),
    )


def any_mode(method: str) -> None:
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        contract.test_the_callers_grad_mode_does_not_matter(method, mode)


def narrow(dtype: torch.dtype) -> Callable[[str], None]:
    return lambda method: contract.test_narrow_dtypes_with_a_flat_channel_give_nearly_the_wide_map(method, "all", dtype)


def train_mode(method: str) -> None:
    contract.test_nothing_is_changed(method, "own")
    contract.test_a_model_in_train_mode_is_explained_in_eval_mode(method)


def differentiated(method: str) -> None:
    for wrt in ("x", "state="):
        contract.test_gradients_and_directional_derivatives_agree_with_finite_differences(method, wrt, False, {})


def compiled(method: str) -> None:
    if reason := _compat.can_compile():
        pytest.skip(reason)
    contract.test_a_method_can_be_called_in_compiled_code(method)


COLUMNS: dict[str, Callable[[str], None]] = {
    "1-D": dimensions(1),
    "2-D": dimensions(2),
    "3-D": dimensions(3),
    "several inputs": several_inputs,
    "several targets": contract.test_many_targets_from_one_call_are_the_maps_of_one_call_each,
    "callable target": function_as_target,
    "several layers": several_layers,
    "`vmap` over inputs": lambda method: contract.test_mapping_over_inputs_is_the_batch(method, "int"),
    "`vmap` over models": contract.test_mapping_over_stacked_states_is_a_loop_over_models,
    "`grad`, `jvp`": differentiated,
    COMPILED: compiled,
    "8 threads": test_threads.test_eight_threads_with_different_inputs_states_and_seeds_at_one_layer,
    "float16": narrow(torch.float16),
    "bfloat16": narrow(torch.bfloat16),
    "inference mode": any_mode,
    "train mode": train_mode,
}


OF_TRANSFORMERS: dict[str, Callable[[str], None]] = {
    "1-D": lambda method: transformers.test_one_to_three_axes(method, 1, True),
    "2-D": lambda method: transformers.test_every_model(method, "timm"),
    "3-D": lambda method: transformers.test_one_to_three_axes(method, 3, True),
    "several inputs": transformers.test_inputs_as_keywords,
    "several targets": transformers.test_several_targets_are_each_alone,
    "callable target": transformers.test_several_targets_are_each_alone,
    "several layers": lambda method: camfn.METHODS[method].function(vit("timm"), ("blocks.0", "blocks.1"), inputs(side=32)),
    "`vmap` over inputs": lambda method: transformers.test_under_vmap(method, "timm"),
    "`vmap` over models": transformers.test_an_ensemble_by_vmap_over_states,
    "`grad`, `jvp`": lambda method: [transformers.test_maps_are_differentiable(method, wrt, False) for wrt in ("x", "state=")],
    COMPILED: transformers.test_a_method_can_be_called_in_compiled_code,
    "8 threads": transformers.test_threads,
    "float16": lambda method: transformers.test_narrow_dtypes(method, torch.float16),
    "bfloat16": lambda method: transformers.test_narrow_dtypes(method, torch.bfloat16),
    "inference mode": lambda method: transformers.test_it_is_pure(method, "timm"),
    "train mode": lambda method: transformers.test_it_is_pure(method, "torchvision"),
}
"""The same, of those that follow attention."""


ASKED = {
    "`vmap` over inputs": (contract.test_mapping_over_inputs_is_the_batch, transformers.test_under_vmap),
    "`grad`, `jvp`": (
        contract.test_gradients_and_directional_derivatives_agree_with_finite_differences,
        transformers.test_maps_are_differentiable,
    ),
    COMPILED: (
        contract.test_a_method_can_be_called_in_compiled_code,
        transformers.test_a_method_can_be_called_in_compiled_code,
    ),
    "8 threads": (
        test_threads.test_eight_threads_with_different_inputs_states_and_seeds_at_one_layer,
        transformers.test_threads,
    ),
    "float16": (
        contract.test_narrow_dtypes_with_a_flat_channel_give_nearly_the_wide_map,
        transformers.test_narrow_dtypes,
    ),
    "bfloat16": (
        contract.test_narrow_dtypes_with_a_flat_channel_give_nearly_the_wide_map,
        transformers.test_narrow_dtypes,
    ),
    "inference mode": (contract.test_the_callers_grad_mode_does_not_matter, transformers.test_it_is_pure),
    "train mode": (contract.test_a_model_in_train_mode_is_explained_in_eval_mode, transformers.test_it_is_pure),
}
"""By column: the tests, of methods at a layer and of those that follow attention, that check every method for it anyway."""


def asked_anyway(method: str, column: str) -> bool:
    """Is the check of the column a test that has the method among its parameters?"""
    if column not in ASKED:
        return False
    test = ASKED[column]["attention" in camfn.METHODS[method].needs]
    asked = set()
    for mark in vars(test)["pytestmark"]:
        if mark.name == "parametrize":
            names, values = mark.args[:2]
            rows = zip(*values) if isinstance(names, tuple) else [values]
            asked |= set(dict(zip(names if isinstance(names, tuple) else [names], rows)).get("method", ()))
    return method in asked


def check_of(method: str, column: str) -> Callable[[str], None]:
    return (OF_TRANSFORMERS if "attention" in camfn.METHODS[method].needs else COLUMNS)[column]


def tried(method: str, column: str) -> str:
    """What comes of it."""
    try:
        check_of(method, column)(method)
    except camfn.CamError:
        return REFUSED
    except pytest.skip.Exception as reason:
        sys.stderr.write(f"{method}, {column}: cannot be tried here: {reason}\n")
        return UNKNOWN
    except Exception as error:
        sys.stderr.write(f"{method}, {column}: {error!r}\n")
        return FAILS
    return WORKS


# ------------------------------------------------------------------------------------------------------- the tables

LEGEND = (
    f"{WORKS} tried by the tests and equal to an oracle: a plain loop or call, finite differences, the same in a wider dtype "
    f"or in another number of dimensions; {REFUSED} refused by design, with a sentence that says why."
)

REASONS = {
    "callable target": "`cam` weights channels by a class's row of the linear layer, and a function has no row.",
    "several layers": "`cam` explains the layer before pooling; the others explain no layer.",
}
"""Why a use is refused by design, by column."""


def works(cells: Cells) -> str:
    """The table of what works, as markdown."""
    rows = [["", *COLUMNS], ["---", *(":-:" for _ in COLUMNS)]]
    rows += [[f"`{method}`", *(cells[method][column] for column in COLUMNS)] for method in cells]
    failing = [f"{FAILS} does not work."] * any(FAILS in row.values() for row in cells.values())
    refused = [REASONS[column] for column in COLUMNS if REFUSED in (row[column] for row in cells.values())]
    return _lines(rows) + "\n" + textwrap.fill(" ".join([LEGEND, *refused, *failing]), 128) + "\n"


def cells_of(block: str) -> Cells:
    """The cells of a table of what works."""
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if "|" in line]
    return {row[0].strip("`"): dict(zip(header[1:], row[1:])) for row in rows}


class Family(NamedTuple):
    """Methods of a kind, as the pages have them."""

    need: str  # of a method's needs, the one that makes it of this family and of none before
    said: str  # a heading


FAMILIES = {
    "activation": Family("activations", "From the activation"),
    "gradient": Family("gradients", "From the gradient"),
    "head": Family("head", "At the layer"),
    "masked": Family("masked inputs", "By masked inputs"),
    "attention": Family("attention", "For transformers"),
}
"""A method is of the last of these of which it has the need."""


def family(name: str) -> list[str]:
    """The methods of a family, the oldest paper first."""
    kin = [method for method, row in camfn.METHODS.items() if _family_of(row.needs) == name]
    return sorted(kin, key=lambda method: _paper(method).year)


def _family_of(needs: frozenset[str]) -> str:
    return next(name for name in reversed(FAMILIES) if FAMILIES[name].need in needs)


def methods(of: str) -> str:
    """The table of a family, as markdown: names, first sentences, needs, costs and papers are those of the code."""
    rows = [["method", "what it does", "needs", "forwards, and what else", "paper and formula"], ["---"] * 5]
    for name in family(of):
        method, paper = camfn.METHODS[name], _paper(name)
        needs = ["a layer"] * method.of_layer + sorted(map(str, method.needs - {camfn.methods.Need.ACTIVATIONS}))
        file = method.formula.__module__.replace(".", "/")
        link = f"[{paper.authors}, {paper.year}]({paper.link}), [formula](../{file}.py)"
        rows.append([f"`{name}`", _summary(name), ", ".join(needs), str(method.cost), link])
    return _lines(rows)


def names() -> str:
    """The methods of every family, by name, as markdown."""
    links = {name: f"[{said}](docs/methods.md#{said.lower().replace(' ', '-')})" for name, (_, said) in FAMILIES.items()}
    return "".join(f"- {link}: {', '.join(f'`{method}`' for method in family(name))}\n" for name, link in links.items())


def catalog() -> str:
    """The methods for the command line, which lists them without torch: `camfn.cli.catalog.Row`, one on each line."""
    lines = []
    for name, row in camfn.METHODS.items():
        options = inspect.signature(row.function).parameters
        unused = "tolerance" in options and "noise" not in options  # by default, the seed of these is
        given = {"seed": "seed" in options and not unused, "chunk": "sweep" in options}
        about = {"method": name, "needs": sorted(map(str, row.needs)), "cost": str(row.cost), "summary": _first_line(name)}
        lines.append(json.dumps({**about, **given}, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def _first_line(name: str) -> str:
    return _doc(name).strip().partition("\n")[0]


def _summary(name: str) -> str:
    """The first line of its docstring, without the name that it begins with."""
    return _doc(name).splitlines()[0].partition(": ")[2].rstrip(".")


def _doc(name: str) -> str:
    return camfn.METHODS[name].function.__doc__ or ""


class Paper(NamedTuple):
    """`Wang et al., Score-CAM, CVPR workshops 2020 (arXiv 1910.01279)`, or with a doi."""

    authors: str
    year: int
    link: str


def _paper(name: str) -> Paper:
    found = re.search(r"\n\n *(\w[^,]*),(?:[^()]|\n)* (\d{4})\s+\((arXiv|doi)\s+([^\s)]+)\)", _doc(name))
    assert found, f"{name}: no `Authors, Title, Venue YEAR (arXiv NUMBER)` in the docstring"
    authors, year, kind, number = found.groups()
    return Paper(authors, int(year), f"{'https://arxiv.org/abs' if kind == 'arXiv' else 'https://doi.org'}/{number}")


SPEED = {
    "camfn": "camfn",
    "camfn-compiled": "compiled",
    "camfn-bfloat16": "bfloat16",
    "camfn-budget": "`budget=0.1`",
    "camfn-budget-bfloat16": "`budget`, bfloat16",
    "camfn-top5": "5 classes",
    "camfn-all": "all classes",
    "torchcam-best": "torchcam, tuned",
    "grad-cam": "pytorch-grad-cam",
}


def speed() -> str:
    """Speed as a multiple of torchcam's, and camfn's share of the limit, from the records of `benchmarks/score_cam.py`."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("score_cam*.json"))]
    records.sort(key=lambda record: record["arguments"]["model"] != "resnet18")
    rows = [["x torchcam", *(record["arguments"]["model"] for record in records)], ["---", *["--:"] * len(records)]]
    for name, label in SPEED.items():
        cells = [_speed_of(record["contenders"].get(name)) for record in records]
        if any(cells):
            rows.append([label, *cells])
    shares = [record["contenders"]["camfn"].get("share_of_limit") for record in records]
    rows.append(["camfn, of limit", *(f"{share:.2f}" if share else "" for share in shares)])
    return _lines(rows)


def budgets() -> str:
    """How near maps of a budget are, from the record of `benchmarks/budget.py`."""
    made = json.loads((RESULTS / "budget.json").read_text(encoding="utf-8"))["summary"]
    near, kept = made["near"], made["tolerance"]
    rows = [["Pearson, mean (worst)", *(f"{name}, {budget:.0%}" for name in near for budget in (0.1, 0.2))]]
    rows.append(["---", *["--:"] * (len(rows[0]) - 1)])
    for order in ("predicted", "std", "max", "gradient", "bound"):
        cells = [near[name].get(f"{order} {budget:g}") for name in near for budget in (0.1, 0.2)]
        said = "true scores, the rest dropped" if order == "bound" else f'`order="{order}"`'
        rows.append([said, *(f"{c['mean pearson']:.3f} ({c['worst pearson']:.3f})" if c else "" for c in cells)])
    first = next(row for levels in kept.values() for row in levels.values())
    shown = {said: place for said, place in KEPT.items() if place[0] in first}  # an older record has fewer
    lines = [["tolerance", *shown], ["---", *["--:"] * len(shown)]]
    for name, levels in kept.items():
        for level, row in levels.items():
            lines.append([f"{name}, {level}", *(format(row[key], form) for key, form in shown.values())])
    return f"{_lines(rows)}\n{_lines(lines)}"


KEPT = {
    "stated error true": ("honest", ".0%"),
    "exceeded by at most": ("exceeded by", ".3f"),
    "error within the tolerance": ("within", ".0%"),
    "median stated": ("median stated", ".3f"),
    "median true": ("median true", ".3f"),
    "median share of the forwards": ("median share", ".0%"),
}


def precisions() -> str:
    """How near maps in bfloat16 are, and how fast, from the record of `benchmarks/precision.py`: without one, nothing."""
    record = RESULTS / "precision.json"
    if not record.exists():
        return ""
    networks = json.loads(record.read_text(encoding="utf-8"))["networks"]
    rows = [["in brackets: no channel scored again", *networks], ["---", *["--:"] * len(networks)]]
    for said, (name, form) in PRECISION.items():
        shown = [
            [format(of[name], form) for of in _both_ways(network) if of[name] is not None] for network in networks.values()
        ]
        rows.append([said, *(f"{first} ({rest[0]})" if rest else first for first, *rest in shown)])
    return _lines(rows)


PRECISION = {
    "maps within 0.03, correlation from 0.999": ("near", ".0%"),
    "median error": ("median error", ".3f"),
    "worst error": ("worst error", ".3f"),
    "stated error true": ("honest", ".0%"),
    "median stated": ("stated", ".3f"),
    "scored again, median": ("again", ".0%"),
    "scored again, at most": ("most", ".0%"),
    "times torchcam's speed": ("times as fast as torchcam", ".2f"),
    "times float32's speed": ("times as fast as float32", ".2f"),
}


def _both_ways(network: dict) -> list[dict]:
    """What is known of maps in bfloat16, and of those no channel of which was scored again."""
    return [network["summary"][way] | network["speed"]["contenders"][way] for way in ("bfloat16", "unrefined")]


def _speed_of(entry: dict | None) -> str:
    return f"{1 / entry['time_over']['torchcam']:.2f}" if entry and "torchcam" in entry["time_over"] else ""


def _lines(rows: list[list[str]]) -> str:
    return "".join("|" + "|".join(f" {cell} " for cell in row) + "|\n" for row in rows)


def block_of(text: str, name: str) -> str | None:
    """What stands between `<!-- name -->` and `<!-- /name -->`, each on a line of its own."""
    found = re.search(rf"^<!-- {name} -->\n(.*?)^<!-- /{name} -->$", text, re.DOTALL | re.MULTILINE)
    return found and found[1]


def main() -> None:
    if "--catalog" in sys.argv[1:]:
        CATALOG.write_text(catalog(), encoding="utf-8")
        return
    warnings.simplefilter("error", camfn.CamWarning)
    warnings.filterwarnings("ignore", FLAT, camfn.CamWarning)
    made = {
        README: {"methods": names(), "speed": speed()},
        BUDGETS: {"budget": budgets(), "precision": precisions()},
        METHODS: {name: methods(name) for name in FAMILIES},
    }
    cells = {method: {column: tried(method, column) for column in COLUMNS} for method in camfn.METHODS}
    made[METHODS]["works"] = works(cells)
    for blocks in made.values():
        sys.stdout.write("".join(f"<!-- {name} -->\n{block}<!-- /{name} -->\n\n" for name, block in blocks.items()))
    if "--write" in sys.argv[1:]:
        CATALOG.write_text(catalog(), encoding="utf-8")
        for page, blocks in made.items():
            _write(page, blocks)


def _write(page: Path, blocks: dict[str, str]) -> None:
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        old = block_of(text, name)
        if old is None or UNKNOWN in block:
            sys.exit(f"{page.name} is as it was: it has no block {name!r}, or something could not be tried here")
        text = text.replace(f"<!-- {name} -->\n{old}<", f"<!-- {name} -->\n{block}<")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""The tables of the pages that are made, not written: the methods, what works with each, how fast, how near.

    python tests/tables.py            # print them
    python tests/tables.py --write    # put them into README.md and docs/budgeted-scoring.md

A cell is what came of trying: the checks are those of the contract tests, or stand here.
"""

import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import test_contract as contract
import test_threads
import test_transformers as transformers
import torch
import torch.nn.functional as F
from support import SmallNet, assert_close, inputs, small_net
from vits import vit

import camfn
from camfn import _compat

ROOT = Path(__file__).resolve().parents[1]
README, BUDGETS = ROOT / "README.md", ROOT / "docs" / "budgeted-scoring.md"
RESULTS = ROOT / "benchmarks" / "results"
WORKS, REFUSED, FAILS, UNKNOWN = "✓", "-", "✗", "?"
COMPILED = "`torch.compile`"

Cells = dict[str, dict[str, str]]
"""What came of trying: by method, by column."""

# ------------------------------------------------------------------------------------------------------- the checks


def dimensions(dims: int) -> Callable[[str], None]:
    """Maps of the grid's shape in [0, 1]; and a network with one axis more, of length 1, gives the same map."""

    def check(method: str) -> None:
        signed = {"relu": False} if "gradients" in camfn.METHODS[method].needs else {}  # none of them is nowhere positive then
        found = contract.run(method, small_net(dims=dims), "features", inputs(dims=dims), [3, 1], **signed)
        assert found.shape == (2, *contract.size_of(method, (4,) * dims, (8,) * dims))
        assert found.flatten(1).amin(1).tolist() == [0, 0]
        assert found.flatten(1).amax(1).tolist() == [1, 1]
        if method == "rise":
            return  # its masks are other ones where there are more axes
        fewer = max(1, dims - 1)
        thin, x = small_net(dims=fewer), inputs(dims=fewer)
        expected = contract.run(method, thin, "features", x, [3, 1], normalize=False, **signed)
        thick = contract.run(method, thickened(thin, fewer), "features", x[..., None], [3, 1], normalize=False, **signed)
        assert_close(thick[..., 0], expected, contract.ROUNDING, f"{fewer} and {fewer + 1} axes")

    return check


def thickened(net: SmallNet, dims: int) -> SmallNet:
    """The network with kernels that have one axis more, and are zero off its middle."""
    thick, state = small_net(dims=dims + 1), net.state_dict()
    thick.load_state_dict({name: F.pad(t[..., None], (1, 1)) if t.ndim > 2 else t for name, t in state.items()})
    return thick


def several_inputs(method: str) -> None:
    pair = inputs(3), contract.GAIN
    for x in (pair, dict(zip(("image", "gain"), pair))):
        contract.test_each_sample_keeps_its_own_other_inputs(method, x)


def several_layers(method: str) -> None:
    net, x, layers = small_net(), inputs(), ("features", "act")
    if method not in contract.OF_LAYER:
        contract.FUNCTIONS[method](net, layers, x)
    for layer, found in zip(layers, contract.run(method, net, layers, x)):
        assert_close(found, contract.run(method, net, layer, x), contract.ROUNDING, layer)


def function_as_target(method: str) -> None:
    net, x = small_net(), inputs()
    assert_close(
        contract.run(method, net, "features", x, lambda y: y[3]),
        contract.run(method, net, "features", x, camfn.targets.logit(3)),
        0,
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
    contract.test_the_whole_method_can_be_compiled(method)


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
    COMPILED: transformers.test_the_whole_method_can_be_compiled,
    "8 threads": transformers.test_threads,
    "float16": lambda method: transformers.test_narrow_dtypes(method, torch.float16),
    "bfloat16": lambda method: transformers.test_narrow_dtypes(method, torch.bfloat16),
    "inference mode": lambda method: transformers.test_it_is_pure(method, "timm"),
    "train mode": lambda method: transformers.test_it_is_pure(method, "torchvision"),
}
"""The same, of those that follow attention."""


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
    f"or in another number of dimensions; {REFUSED} refused, with a sentence that says why."
)


def works(cells: Cells) -> str:
    """The table of what works, as markdown."""
    rows = [["", *COLUMNS], ["---", *(":-:" for _ in COLUMNS)]]
    rows += [[f"`{method}`", *(cells[method][column] for column in COLUMNS)] for method in cells]
    failing = f" {FAILS} does not work." if any(FAILS in row.values() for row in cells.values()) else ""
    return _lines(rows) + f"\n{LEGEND}{failing}\n"


def cells_of(block: str) -> Cells:
    """The cells of a table of what works."""
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if "|" in line]
    return {row[0].strip("`"): dict(zip(header[1:], row[1:])) for row in rows}


def methods() -> str:
    """The table of methods, as markdown: names, first sentences, costs and papers are those of the code."""
    rows = [["method", "what it does", "forwards", "paper"], ["---"] * 4]
    for name, method in camfn.METHODS.items():
        doc = method.function.__doc__ or ""
        rows.append([f"`{name}`", _summary(doc), method.cost, _paper(name, doc)])
    return _lines(rows)


def _summary(doc: str) -> str:
    """The first line, without the name that it begins with."""
    return doc.splitlines()[0].partition(": ")[2].rstrip(".")


def _paper(name: str, doc: str) -> str:
    """`Wang et al., Score-CAM, CVPR workshops 2020 (arXiv 1910.01279)`, or with a doi, as a link named by authors and year."""
    found = re.search(r"\n\n *(\w[^,]*),(?:[^()]|\n)* (\d{4}) \((arXiv|doi)\s+([^\s)]+)\)", doc)
    assert found, f"{name}: no `Authors, Title, Venue YEAR (arXiv NUMBER)` in the docstring"
    authors, year, kind, number = found.groups()
    return f"[{authors}, {year}]({'https://arxiv.org/abs' if kind == 'arXiv' else 'https://doi.org'}/{number})"


SPEED = {
    "camfn": "as it is, float32",
    "camfn-compiled": "compiled",
    "camfn-bfloat16": "`dtype=torch.bfloat16`",
    "camfn-budget": "`budget=0.1`",
    "camfn-budget-bfloat16": "`budget=0.1`, bfloat16",
    "camfn-top5": "five classes at once",
    "camfn-all": "all classes at once",
    "grad-cam": "pytorch-grad-cam",
}


def speed() -> str:
    """How many times as fast as torchcam, and the share of the limit, from the records of `benchmarks/score_cam.py`."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("score_cam*.json"))]
    records.sort(key=lambda record: record["arguments"]["model"] != "resnet18")
    heads = [f"{r['arguments']['model']}, `{r['arguments']['layer']}`, {r['channels']} channels" for r in records]
    rows = [["Score-CAM, times torchcam's speed", *heads], ["---", *["--:"] * len(records)]]
    for name, said in SPEED.items():
        cells = [_speed_of(record["contenders"].get(name)) for record in records]
        if any(cells):
            rows.append([said, *cells])
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
    head = [
        "tolerance",
        "stated error true",
        "exceeded by at most",
        "error within the tolerance",
        "median stated",
        "median true",
        "median share of the forwards",
    ]
    lines = [head, ["---", *["--:"] * 6]]
    for name, levels in kept.items():
        for level, row in levels.items():
            lines.append([f"{name}, {level}", *_kept(row)])
    return f"{_lines(rows)}\n{_lines(lines)}"


def _kept(row: dict) -> list[str]:
    shares = {"honest", "within", "median share"}
    shown = ("honest", "exceeded by", "within", "median stated", "median true", "median share")
    return [format(row[name], ".0%" if name in shares else ".3f") for name in shown]


def precisions() -> str:
    """How near maps in bfloat16 are, and how fast, from the record of `benchmarks/precision.py`."""
    networks = json.loads((RESULTS / "precision.json").read_text(encoding="utf-8"))["networks"]
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
    if not entry or "torchcam" not in entry["time_over"]:
        return ""
    share = entry.get("share_of_limit")
    return f"{1 / entry['time_over']['torchcam']:.2f}" + (f" ({share:.2f})" if share else "")


def _lines(rows: list[list[str]]) -> str:
    return "".join("|" + "|".join(f" {cell} " for cell in row) + "|\n" for row in rows)


def block_of(text: str, name: str) -> str | None:
    """What stands between `<!-- name -->` and `<!-- /name -->`, each on a line of its own."""
    found = re.search(rf"^<!-- {name} -->\n(.*?)^<!-- /{name} -->$", text, re.DOTALL | re.MULTILINE)
    return found and found[1]


def main() -> None:
    warnings.simplefilter("error", camfn.CamWarning)
    cells = {method: {column: tried(method, column) for column in COLUMNS} for method in camfn.METHODS}
    made = {
        README: {"methods": methods(), "works": works(cells), "speed": speed()},
        BUDGETS: {"budget": budgets(), "precision": precisions()},
    }
    for blocks in made.values():
        sys.stdout.write("".join(f"<!-- {name} -->\n{block}<!-- /{name} -->\n\n" for name, block in blocks.items()))
    if "--write" in sys.argv[1:]:
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

"""`camfn evaluate`: what maps are worth on many images. Torch is imported in the command."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camfn import _specs
from camfn._errors import CamError
from camfn.cli import catalog, options

if TYPE_CHECKING:
    import click

_SCENES = "scenes"
_COUNT = 100
"""The number of scenes, unless it is given."""

_EVALUATE = """Judge maps by metrics, beside controls that do not depend on the class.

\b
Example:
  camfn evaluate scenes --model demo --layer features --method grad_cam --method cam --limit 2
  camfn evaluate photos --model demo --layer features --metric other_class --metric deletion

\b
IMAGES is one of
  scenes          drawn scenes with exact masks, which ship with camfn (./scenes is a folder of this name)
  FOLDER, LIST.txt, TABLE.parquet, SHARDS.tar   as in camfn run
  RUN             the folder of camfn run: its maps are judged, and not made again

--boxes FILE.csv has the columns id, x0, y0, x1, y1, in pixels of the photo, and label, if you like: a class by index or name.
Without a label the predicted class of each image is explained. Metrics of localization need boxes or scenes.

A table with intervals is printed. --out writes it as evaluation.md and evaluation.csv, with evaluation.png.
"""


def evaluate() -> "click.Command":
    """The command `camfn evaluate`."""
    import click

    place = click.Path(readable=False, path_type=Path)

    @click.command("evaluate", help=_EVALUATE, short_help="Judge maps by metrics, beside controls.")
    @click.argument("images", metavar="IMAGES")
    @options.of_the_model
    @click.option("--layer", metavar="L", help="Dotted name.  [default: chosen by each method]")
    @click.option("--method", "methods", multiple=True, metavar="M", help="Repeatable, or all.  [default: grad_cam]")
    @click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Repeatable, or all.  [default: the cheap ones]")
    @click.option("--boxes", type=place, metavar="FILE.csv", help="Boxes of the objects.")
    @click.option("--target", metavar="T", help="The class to explain in all images.  [default: the label, or the predicted]")
    @click.option("--limit", type=click.IntRange(1), metavar="N", help=f"Only so many images.  [default: all; {_COUNT} scenes]")
    @click.option("--batch", type=click.IntRange(1), default=16, show_default=True, metavar="N", help="Images in a forward.")
    @click.option("--controls/--no-controls", default=True, help="Judge controls too.  [default: yes]")
    @click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Seed of all noise.")
    @click.option("--out", metavar="DIR", type=place, help="Folder for the table and the picture.")
    @options.no_progress
    def command(out: Path | None, no_progress: bool, **given: Any) -> None:
        with options.refusing() as stdout:
            _specs.check(given["model"])
            options.need("PIL", "tqdm", *(("matplotlib",) if out else ()))
            with _bar(no_progress) as progress:
                found, failed = _judged(progress, **given)
            click.echo(found.markdown(), file=stdout, nl=False)
            for id, why in failed.items():
                click.echo(f"note: {options.one_line(id)} is left out: {options.one_line(why)}", err=True)
            if out is not None:
                for path in _written(found, out):
                    click.echo(f"-> {options.one_line(path)}", file=stdout)

    return command


def _judged(progress: Any, *, images: str, model: str, boxes: Path | None, **given: Any) -> tuple[Any, dict[str, str]]:
    """The evaluation, and why images are missing."""
    from camfn import zoo
    from camfn.cli import models
    from camfn.evaluation import evaluate, evaluate_run, read_boxes, scenes
    from camfn.evaluation.annotations import Photos
    from camfn.runs import manifest
    from camfn.runs.sources import items_of

    shared = {"metrics": _all_or(given["metrics"]), "controls": given["controls"], "seed": given["seed"], "progress": progress}
    device, limit = models.device_of(given["device"]), given["limit"]
    known = None if boxes is None else read_boxes(boxes)
    with models.opened(model, given["weights"], given["no_pretrained"], device) as loaded:
        if images != _SCENES and (Path(images) / manifest.FILE).exists():
            if given["methods"] or given["layer"] or given["target"]:
                raise CamError("a run has its own methods, layer and target: leave --method, --layer and --target out")
            found, photos = evaluate_run(images, loaded, boxes=known, batch=given["batch"], **shared)
            return found, photos.failed
        methods = catalog.methods_of(given["methods"] or ("grad_cam",))
        if images == _SCENES:
            batches, failed = scenes(limit or _COUNT, batch=given["batch"]), {}
        else:
            items = list(items_of(images))[:limit]
            batches = Photos(loaded, items, boxes=known, target=given["target"], batch=given["batch"])
            failed = batches.failed
        with zoo.told("the model", loaded.file):
            zoo.check_layers(loaded.model, [given["layer"]] if given["layer"] else [])
            own = _own(loaded.spec, methods)
            return evaluate(loaded.model, given["layer"], batches, methods=methods, **own, **shared), failed


def _own(spec: str, methods: Sequence[str]) -> dict[str, Any]:
    """The options that the demo network needs: its classifier is a convolution."""
    from camfn.cli.demo import LINEAR

    heads = any("linear head" in catalog.ROWS[method].needs for method in methods)
    return {"fc": LINEAR} if heads and spec == "demo" else {}


def _all_or(names: tuple[str, ...]) -> Any:
    return catalog.ALL if catalog.ALL in names else list(names) or None


@contextmanager
def _bar(hidden: bool) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(unit="map", disable=hidden or None, leave=False) as bar:

        def progress(name: str) -> None:
            bar.set_description(name)
            bar.update()

        yield progress


def _written(found: Any, out: Path) -> list[Path]:
    from camfn.cli import files

    files.make(out)
    paths = [out / f"evaluation.{ending}" for ending in ("md", "csv", "png")]
    for path in paths:
        found.save(path)
    return paths

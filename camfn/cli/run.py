"""`camfn run` and `camfn convert`: the maps of whole datasets. Torch and pyarrow are imported in the commands."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from camfn import _specs
from camfn._errors import CamError
from camfn.cli import catalog, options

if TYPE_CHECKING:
    import click

_RUN = """Make the maps of many images, and store them in a folder. The same command again resumes a run that ended early.

\b
Example:
  camfn run photos --model demo --layer features --target top3 --out maps
  camfn run photos --model demo --layer features --target top3 --out maps --retry

\b
IMAGES is one of
  FOLDER          the pictures in it and in its subfolders
  LIST.txt        a path on each line, and after a tab a label
  TABLE.parquet   a column image (bytes) or path; columns id and label
  SHARDS.tar      the pictures in a tar file that is not compressed (WebDataset)

\b
DIR then has
  shards/         the maps: Parquet, a row for each image, layer, method and target
  failures/       the images that failed, with the reason
  manifest.json   the settings, the hash of the weights, and the versions

Maps are raw and of the layer's own grid. Read them with camfn.runs.read, pandas or any other reader of Parquet. Images that are
done are not made again. If settings or weights differ from the manifest's, an error names the difference. --device may name
several devices, as in cuda:0,cuda:1; each has its own process.

The exit status is 1 if images have failed, and 2 if the command failed as a whole.
"""

_CONVERT = """Write the maps of a run to files, as others read them.

\b
Example:
  camfn convert maps --to png --out overlays

\b
FORMAT is one of
  png     each map in color over its photo
  npy     the raw map, of the layer's grid
  wsol    for the evaluator of wsolevaluation: one .npy for each image, 224 x 224 over the whole image, from 0 to 1
  irn     for IRN: one .npy for each image, a dictionary of keys, cam and high_res
  nifti   for viewers of scans: one .nii for each map, with the raw map over the whole image
"""

_LAYER = "Dotted name; repeatable. Required, unless no method explains a layer; camfn layers lists the layers."

FORMATS = ("png", "npy", "wsol", "irn", "nifti")


def run() -> "click.Command":
    """The command `camfn run`."""
    import click

    place = click.Path(readable=False, path_type=Path)

    @click.command("run", help=_RUN, short_help="Make the maps of a whole dataset.")
    @click.argument("images", type=place, metavar="IMAGES")
    @options.of_the_model
    @click.option("--layer", "layers", multiple=True, metavar="L", help=_LAYER)
    @click.option("--method", "methods", multiple=True, default=(catalog.DEFAULT,), show_default=True, metavar="M")
    @click.option("--target", "targets", multiple=True, metavar="T", help=options.TARGET)
    @click.option("--out", required=True, metavar="DIR", type=place, help="Folder of the run.")
    @click.option("--retry", is_flag=True, help="Try the images again that failed, and only those.")
    @click.option("--batch", type=click.IntRange(1), default=16, show_default=True, metavar="N", help="Images in a forward.")
    @click.option("--workers", type=click.IntRange(0), metavar="N", help="Processes that decode.  [default: 1; 4 on a GPU]")
    @click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Seed of all noise.")
    @click.option("--budget", type=float, metavar="B", help="Share of the channels to score, such as 0.1 (Score-CAM).")
    @click.option("--tolerance", type=float, metavar="E", help="Error of the map at which scoring ends (Score-CAM).")
    @click.option(
        "--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True, help="Of the maps."
    )
    @click.option("--views/--no-views", default=True, help="Find where the network's input lies on each photo.  [default: yes]")
    @click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
    @click.option("--address", metavar="A", help="Cluster of Ray.  [default: one that is started here]")
    @options.no_progress
    def command(images: Path, no_progress: bool, no_pretrained: bool, **given: Any) -> None:
        with options.refusing() as stdout:
            methods = _checked(given.pop("methods"))
            _specs.check(given["model"])
            options.need("PIL", "tqdm")
            from camfn import runs
            from camfn.cli import models

            devices = (given.pop("device") or "").split(",")
            places = [str(models.device_of(each.strip())) for each in devices if each.strip()]
            summary = runs.run(
                images,
                layer=given.pop("layers"),
                methods=methods,
                target=list(given.pop("targets")) or None,
                devices=places or None,
                pretrained=not no_pretrained,
                progress_line=not no_progress,
                **given,
            )
            click.echo(_told(summary, given["out"]), file=stdout)
            if summary.failed:
                raise click.ClickException(f"{_images(summary.failed)} failed: see the reasons in {given['out'] / 'failures'}")

    return command


def _checked(methods: tuple[str, ...]) -> tuple[str, ...]:
    if catalog.ALL in methods:
        raise CamError(f"--method {catalog.ALL}: name the methods of a run, since each must fit the network")
    return catalog.methods_of(methods)


def _told(summary: Any, out: Path) -> str:
    rate = f", {summary.made / summary.seconds:.3g} a second" if summary.made else ""
    before = f", and {summary.done} {'was' if summary.done == 1 else 'were'} done before" if summary.done else ""
    return f"{_images(summary.made)} in {summary.seconds:.3g} s{rate}{before}: {options.one_line(out)}"


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"


def convert() -> "click.Command":
    """The command `camfn convert`."""
    import click

    place = click.Path(readable=False, path_type=Path)

    @click.command("convert", help=_CONVERT, short_help="Write the maps of a run to files.")
    @click.argument("run", type=place, metavar="RUN")
    @click.option("--to", "form", type=click.Choice(FORMATS), required=True, help="Format of the files.")
    @click.option("--out", required=True, metavar="DIR", type=place, help="Folder of the files.")
    @click.option("--method", metavar="M", help="Only this method.")
    @click.option("--layer", metavar="L", help="Only this layer.")
    @click.option(
        "--images", type=place, metavar="IMAGES", help="Images of the run, for png of those in a table or a tar file."
    )
    def command(run: Path, form: str, out: Path, **given: Any) -> None:
        with options.refusing() as stdout:
            options.need("PIL")
            from camfn import runs

            written = runs.convert(run, out, form, **given)
            click.echo(f"{written} file{'' if written == 1 else 's'} in {options.one_line(out)}", file=stdout)

    return command

"""The command line: the commands and their help texts.

Click is imported on use, and torch only when a command has been parsed: what a command does is imported in its body.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import camfn
from camfn import _specs
from camfn._errors import CamError, escaped
from camfn.cli import catalog, evaluate, options, run, streams, tables

if TYPE_CHECKING:
    import click

    from camfn.cli.cards import Written
    from camfn.cli.files import Source

_GROUP = """Class activation maps: where a network sees a class in a picture.

\b
Example:
  camfn explain photo.jpg --model demo
"""

_EXPLAIN = """Map where the network sees a class in each IMAGE. A FOLDER stands for all pictures in it, - for standard input.

\b
Example:
  camfn explain photo.jpg --model demo --target top3
  camfn explain - --model demo --style contour < photo.jpg

\b
--model is one of
  demo                         a small network that ships with camfn
  torchvision:NAME[:WEIGHTS]   a model of torchvision, with its weights
  timm:NAME                    a model of timm
  hf:NAME                      an image classifier of the Hugging Face hub, or a folder
  path/to/file.py:function     your own model

The file is run, and may import modules from its own folder: name only files that you trust. The function takes no argument and
returns the model, (model, preprocess), or (model, preprocess, class names). preprocess takes an RGB picture (PIL) and returns
the network's input, (channels, height, width). Without preprocess, the input is the picture with values from 0 to 1, not
resized.

For each image, layer, method and class new files are written. Existing files are never overwritten.

\b
  .png   the map over the photo; several maps of an image are in one picture, or have one each with --layout separate
  .npy   the raw map, not scaled to [0, 1], on the layer's own grid
  .json  class, score, probability (softmax; a single output: sigmoid), layer, method, cost, findings, notes

--method all skips the methods that do not fit the network; a note says why.

The map is laid where it belongs on the photo: preprocess's resizing and cropping are undone, and what was cropped away is dark
and gray. If they cannot be undone, the picture is the one that the network saw, and a note says why. It is so with --size input
too. Its colors are restored by undoing preprocess's scaling of each channel. If preprocess does anything else to colors, they
are stretched instead, and a note says so.

A picture that cannot be explained is reported, and the others are still processed. The exit status is 1 if any of several
pictures failed, and 2 if the command failed as a whole.
"""

_LAYERS = """List the layers that can be explained, in the order of execution, and mark the default layer.

The network is run on IMAGE, or on a noise picture of 224 x 224 pixels.

At most twenty layers are listed: the default layer, then those that lie in the fewest modules (layer4 before layer4.2), and of
these the last ones. Where there are more, a note says how many, and --all lists them.

\b
Example:
  camfn layers --model demo
"""

_DEMO = """Map where a small network, which ships with camfn, sees shapes in drawn scenes.

\b
Example:
  camfn demo --out maps
  camfn demo --method cam --method eigen_cam

A table over all objects of all scenes is printed: the share of the map's energy inside the object's outline, the number of maps
with their maximum there, the number of forwards, and the time. A picture of the maps is written to a new file.
"""

_METHODS = """List the methods, with what each needs of the network, and the number of forwards per picture and layer.

\b
Example:
  camfn methods
"""


def app() -> "click.Group":
    """Return the `camfn` command as a click group."""
    import click

    class Group(click.Group):
        """A group that prints click's own usage errors like camfn's: on one line, without control characters."""

        def make_context(self, *arguments: Any, **more: Any) -> click.Context:
            with escaping():
                return super().make_context(*arguments, **more)

        def invoke(self, ctx: click.Context) -> Any:
            with escaping():
                return super().invoke(ctx)

    @contextmanager
    def escaping() -> Iterator[None]:
        try:
            yield
        except click.UsageError as error:
            if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # its message is the whole help
                raise
            error.message = options.one_line(error.message)  # pyright: ignore[reportAttributeAccessIssue]
            raise

    @click.group("camfn", cls=Group, help=_GROUP, context_settings={"help_option_names": ["-h", "--help"]})
    @click.version_option(camfn.__version__, prog_name="camfn")
    def group() -> None:
        pass

    for command in (_explain(), _layers(), _methods(), _demo(), run.run(), run.convert(), evaluate.evaluate()):
        group.add_command(command)
    return group


def main() -> None:
    """Run the command. If click is missing, say what to install."""
    try:
        streams.take()
        options.need("click")
        app()(prog_name="camfn")
    except CamError as error:
        sys.stderr.write(f"Error: {options.one_line(error)}\n")
        sys.exit(2)


def _explain() -> "click.Command":
    import click

    methods = f"A method listed by `camfn methods`, or {catalog.ALL}; repeatable.  [default: {catalog.DEFAULT}]"
    place = click.Path(readable=False, path_type=Path)  # checked on reading, since click would print its usage

    @click.command("explain", help=_EXPLAIN)
    @click.argument("images", nargs=-1, required=True, metavar="IMAGE|FOLDER|-...")
    @options.of_the_model
    @click.option(
        "--layer", "layers", multiple=True, metavar="L", help="Dotted name; repeatable.  [default: chosen and printed]"
    )
    @click.option("--method", "methods", multiple=True, default=(catalog.DEFAULT,), metavar="M", help=methods)
    @click.option("--target", "targets", multiple=True, metavar="T", help=options.TARGET)
    @options.of_the_pictures
    @click.option("--seed", type=int, metavar="N", help="Seed of the methods that draw random numbers.")
    @click.option(
        "--chunk", type=click.IntRange(1), metavar="N", help="Masked inputs per forward.  [default: 32; fewer for large inputs]"
    )
    @click.option("--check", is_flag=True, help="Say whether each map is better than its controls; some fifty forwards more.")
    @click.option("--out", default="camfn-maps", show_default=True, metavar="DIR", type=place, help="Output folder.")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image, layer, method and class.")
    @options.no_progress
    def command(as_json: bool, **values: Any) -> None:
        with options.refusing() as stdout:
            wish = options.wish(**values)
            options.need("PIL", "tqdm")
            from camfn.cli import cards, files

            sources, failed = files.pictures(wish.images), []
            for source, found in _explained(wish, sources):
                for line in cards.lines(source, found, as_json):
                    click.echo(line, file=stdout)
                if isinstance(found, CamError):
                    if len(sources) == 1:
                        raise found
                    click.echo(f"Error: {options.one_line(found)}", err=True)
                    failed.append(escaped(source))
            if failed:
                raise click.ClickException(f"{len(failed)} of {len(sources)} pictures failed: {', '.join(failed)}")

    return command


def _explained(wish: options.Wish, sources: "Sequence[Source]") -> "Iterator[tuple[Source, Sequence[Written] | CamError]]":
    """Explain the pictures, unless none is there."""
    missing = [source.missing for source in sources]
    if all(missing):
        yield from ((source, error) for source, error in zip(sources, missing) if error)
        return
    from camfn.cli import explain

    yield from explain.run(wish, sources)


def _layers() -> "click.Command":
    import click

    @click.command("layers", help=_LAYERS, short_help="List the layers that can be explained.")
    @click.argument("image", required=False, metavar="[IMAGE|-]")
    @options.of_the_model
    @click.option("--all", "every", is_flag=True, help="List all layers, not only the twenty most useful.")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object per layer.")
    def command(image: str | None, as_json: bool, **source: Any) -> None:
        with options.refusing() as stdout:
            _specs.check(source["model"])
            options.need("PIL")
            from camfn.cli import files

            picture = None if image is None else files.source(image)
            if picture and picture.missing:
                raise picture.missing
            from camfn.cli import layers

            for line in tables.lines(layers.table(picture, **source), as_json):
                click.echo(line, file=stdout)

    return command


def _methods() -> "click.Command":
    import click

    @click.command("methods", help=_METHODS, short_help="List the methods, with needs and costs.")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object per method.")
    def command(as_json: bool) -> None:
        with options.refusing() as stdout:
            for line in tables.lines(tables.methods(), as_json):
                click.echo(line, file=stdout)

    return command


def _demo() -> "click.Command":
    import click

    methods = f"A method listed by `camfn methods`, or {catalog.ALL}; repeatable.  [default: {', '.join(catalog.SHOWN)}]"
    place = click.Path(readable=False, path_type=Path)

    @click.command("demo", help=_DEMO, short_help="Compare methods on drawn scenes with known shapes.")
    @click.option("--method", "methods", multiple=True, default=catalog.SHOWN, metavar="M", help=methods)
    @click.option("--out", default="camfn-demo", show_default=True, metavar="DIR", type=place, help="Output folder.")
    @options.no_progress
    def command(methods: Sequence[str], out: Path, no_progress: bool) -> None:
        with options.refusing() as stdout:
            chosen = catalog.fitting_of(methods)
            options.need("PIL", "matplotlib", "tqdm")
            from camfn.cli import demo

            demo.run(chosen, out, no_progress, lambda line: click.echo(line, file=stdout))

    return command

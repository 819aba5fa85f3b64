"""The command line: the commands and their help. What they do is in the files beside this one.

Click is imported where it is used.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import camfn
from camfn._errors import CamError, escaped
from camfn.cli import cards, demo, explain, files, job, options, streams, tables

if TYPE_CHECKING:
    import click

_GROUP = """Class activation maps: where in a picture a network sees a class.

\b
Example:
  camfn explain photo.jpg --model demo
"""

_EXPLAIN = """Map where in each IMAGE the network sees a class. A FOLDER stands for the pictures in it.

\b
Example:
  camfn explain photo.jpg --model demo --target top3

\b
--model is one of
  demo                         a small network that comes with camfn
  torchvision:NAME[:WEIGHTS]   of torchvision, with its weights
  timm:NAME                    of timm
  hf:NAME                      an image classifier of the Hugging Face hub, or a folder
  path/to/file.py:function     your own

The file is run, with its own folder importable, so name only files that you trust. The function takes no argument and returns
the model, or (model, preprocess), or (model, preprocess, class names). preprocess takes an RGB picture (PIL) and returns the
network's input, (channels, height, width); without it the picture goes in as it is, as numbers from 0 to 1, not resized.

For each image, layer, method and class three files are written, under a name that no file has yet:

\b
  .png   the map in colours over the picture, half and half
  .npy   the raw map, not scaled to [0, 1], of the size that --size says
  .json  class, score, probability (softmax), layer, method, cost, findings, notes

Several methods are drawn in one grid, too. Of --method all, those that do not fit the network are left out; a note says why.

The picture under the map is the one that the network saw, resized and cropped by preprocess, since that is what the map
belongs to. Its colours are brought back by undoing preprocess's scaling of each channel; where preprocess does something
else to colours, they are stretched instead, and a note says so.

A picture that cannot be explained is reported, and the others go on. The exit status is 1 if any of several pictures failed,
and 2 if the command cannot be carried out at all.
"""

_LAYERS = """List the layers that can be explained, in the order of execution, and the one that is chosen where none is named.

The network is shown IMAGE, or else a picture of noise, 224 x 224.

\b
Example:
  camfn layers --model demo
"""

_METHODS = """List the methods: what each needs of the network, and how many inputs go through it for each picture and layer.

\b
Example:
  camfn methods
"""


def app() -> "click.Group":
    """The `camfn` command, for click."""
    import click

    class Group(click.Group):
        """What click itself refuses is told as what we refuse is: in one line without control characters."""

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

    for command in (_explain(), _layers(), _methods(), demo.command()):
        group.add_command(command)
    return group


def main() -> None:
    """Run the command; without click, say what to install."""
    try:
        streams.take()
        options.need("click")
        app()(prog_name="camfn")
    except CamError as error:
        sys.stderr.write(f"Error: {options.one_line(error)}\n")
        sys.exit(2)


def _explain() -> "click.Command":
    import click

    methods = f"One of those that `camfn methods` lists, or {options.ALL}; repeatable.  [default: score_cam]"
    place = click.Path(readable=False, path_type=Path)  # checked where it is read: click would print its usage

    @click.command("explain", help=_EXPLAIN)
    @click.argument("images", nargs=-1, required=True, type=place, metavar="IMAGE|FOLDER...")
    @options.of_the_model
    @click.option("--layer", "layers", multiple=True, metavar="L", help="Dotted name; repeatable.  [default: chosen, and said]")
    @click.option("--method", "methods", multiple=True, default=("score_cam",), metavar="M", help=methods)
    @click.option("--target", metavar="T", help=options.TARGET)
    @click.option("--size", default="grid", show_default=True, metavar="S", help=options.SIZE)
    @click.option("--seed", type=int, metavar="N", help="Of the noise, where a method draws any.")
    @click.option(
        "--chunk", type=click.IntRange(1), metavar="N", help="Masked inputs per forward.  [default: 32; fewer of large ones]"
    )
    @click.option("--out", default="camfn-maps", show_default=True, metavar="DIR", type=place, help="Where the files go.")
    @click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each image, layer, method and class.")
    @options.no_progress
    def command(as_json: bool, **values: Any) -> None:
        with options.refusing() as stdout:
            options.need("PIL", "tqdm")
            wish = job.Wish(**values)
            paths, failed = files.pictures(wish.images), []
            for path, found in explain.run(wish, paths):
                for line in cards.lines(path, found, as_json):
                    click.echo(line, file=stdout)
                if isinstance(found, CamError):
                    if len(paths) == 1:
                        raise found
                    click.echo(f"Error: {options.one_line(found)}", err=True)
                    failed.append(escaped(path))
            if failed:
                raise click.ClickException(f"{len(failed)} of {len(paths)} pictures failed: {', '.join(failed)}")

    return command


def _layers() -> "click.Command":
    import click

    @click.command("layers", help=_LAYERS, short_help="List the layers that can be explained.")
    @click.argument("image", required=False, type=click.Path(readable=False, path_type=Path))
    @options.of_the_model
    @click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each layer.")
    def command(image: Path | None, as_json: bool, **source: Any) -> None:
        with options.refusing() as stdout:
            options.need("PIL")
            for line in tables.lines(tables.layers(image, **source), as_json):
                click.echo(line, file=stdout)

    return command


def _methods() -> "click.Command":
    import click

    @click.command("methods", help=_METHODS, short_help="List the methods, what each needs and costs.")
    @click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each method.")
    def command(as_json: bool) -> None:
        with options.refusing() as stdout:
            for line in tables.lines(tables.methods(), as_json):
                click.echo(line, file=stdout)

    return command

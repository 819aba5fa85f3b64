"""`camfn explain`: the loop over pictures."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import camfn
from camfn import zoo
from camfn._errors import CamError, escaped
from camfn.cli import catalog, drawing, files, models, options
from camfn.cli.cards import Facts, Written
from camfn.cli.facts import facts_of_class, facts_of_map, facts_of_picture, facts_of_run
from camfn.cli.files import Source
from camfn.cli.job import Job, Map, Seen, check_grid, maps_of, options_of, through
from camfn.cli.options import Wish
from camfn.explanation import Picture
from camfn.methods._common import read_layer
from camfn.model.forward import look
from camfn.model.layers import choose
from camfn.model.task import begin


def run(wish: Wish, sources: Sequence[Source]) -> Iterator[tuple[Source, list[Written] | CamError]]:
    """Explain every picture, and yield what was written for it, or its error. Errors of all pictures are raised first."""
    methods, device = catalog.methods_of(wish.methods), models.device_of(wish.device)
    given = options_of(methods, wish.seed, wish.chunk)
    if all(isinstance(_read(source), CamError) for source in sources):  # without loading the model
        yield from ((source, _read(source)) for source in sources)
        return
    with models.opened(wish.model, wish.weights, wish.no_pretrained, device) as loaded:
        if wish.layers:
            zoo.check_layers(loaded.model, list(dict.fromkeys(wish.layers)))
        targets = zoo.targets_of(wish.targets, loaded.names, "--target")
        job = Job(wish, loaded, tuple(dict.fromkeys(wish.layers)) or (None,), methods, device, targets, given, {})
        _check_pictures(job, sources)
        files.make(wish.out)
        for source in sources:
            picture = _read(source)
            yield source, picture if isinstance(picture, CamError) else _attempt(source, _explain, job, source, picture)


def _read(source: Source) -> Any:
    """Return the picture, or the error."""
    try:
        return source.read()
    except CamError as error:
        return error


def _attempt(source: Source, work: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of `work` on a picture, or the error."""
    try:
        return work(*arguments)
    except CamError as error:
        return CamError(f"{escaped(source)}: {error}")


# ---------------------------------------------------------------------------------------------------- the rehearsal


def _check_pictures(job: Job, sources: Sequence[Source]) -> None:
    """Check the pictures before any sweep, up to the first that passes. If none does, raise the error of the first."""
    errors = []
    for source in sources:
        picture = _read(source)
        if isinstance(picture, CamError):
            continue
        found = _attempt(source, through, job, picture)
        if not isinstance(found, CamError):
            classes = _attempt(source, zoo.classes_of, job.targets, found.outputs)
            if isinstance(classes, CamError):  # no other picture has more classes
                raise classes
            found = _attempt(source, _check_layers, job, source, found)
        if not isinstance(found, CamError):
            return
        errors.append(found)
    raise errors[0]


def _check_layers(job: Job, source: Source, seen: Seen) -> None:
    """Run the methods without a sweep, and check the layers of the others."""
    model, quick = job.loaded.model, tuple(method for method in job.methods if not catalog.ROWS[method].chunk)
    if quick and catalog.ALL not in job.wish.methods:
        given = options_of(quick, job.wish.seed, None)
        for layer in job.layers:
            maps_of(job._replace(methods=quick, options=given), source, seen, layer)
    if len(quick) == len(job.methods) or not any(camfn.METHODS[method].of_layer for method in job.methods):
        return
    with zoo.told("the model", job.loaded.file), torch.no_grad():
        names = [layer or choose(begin(model, seen.x, None)).name for layer in job.layers]
        forward = look(model, names, seen.x, None)
        for name, activation in zip(names, forward.activations):
            check_grid(name, read_layer(forward, name, activation, "auto").grid)


# -------------------------------------------------------------------------------------------------------- a picture


class Drawable(NamedTuple):
    """One map, to be drawn and written."""

    raw: Tensor  # (h, w)
    facts: Facts

    @property
    def scaled(self) -> Tensor:
        """The map in [0, 1]."""
        return camfn.maps.normalize(self.raw, (-2, -1))


def _explain(job: Job, source: Source, photo: Any) -> list[Written]:
    """Compute all maps of a picture, then write all files, so that an error leaves no files."""
    seen = through(job, photo)
    picture, notes = drawing.ground(job.wish, photo, seen.x, job.loaded.preprocess, job.views)
    made = [each for layer in job.layers for each in maps_of(job, source, seen, layer, job.wish.check)]
    made = [each._replace(notes=(*each.notes, *notes)) for each in made]
    for line in _lines(job, made):
        sys.stderr.write(f"note: {escaped(source)}: {options.one_line(line)}\n")
    run = {**facts_of_run(job, source, seen.x), **facts_of_picture(picture, photo)}
    drawn = []
    for each in made:
        for number, raw in enumerate(each.raw):
            explained = facts_of_class(each.card, number, seen.outputs, job.loaded.names)
            drawn.append(Drawable(raw, {**run, **explained, **facts_of_map(job, each)}))
    apart = job.wish.layout == "separate" or len(drawn) == 1
    written = (_write_apart if apart else _write_together)(job, source, picture, drawn)
    bases = [(each.base.name, files.plain(_name(source, each.facts))) for each in written]
    for cut in [base for base, name in bases if not base.startswith(name)][:1]:
        sys.stderr.write(f"note: {escaped(source)}: the name is too long for a file name, and is cut, as in {cut}\n")
    return written


def _lines(job: Job, made: Sequence[Map]) -> Iterator[str]:
    """The notes of all maps, each once. A note that is not of all methods begins with those that it is of."""
    methods: dict[str, dict[str, None]] = {}
    for each in made:
        for note in each.notes:
            methods.setdefault(note, {})[each.card.method] = None
    count = len({each.card.method for each in made})
    for note, own in methods.items():
        named = note.split(" ")[0].rstrip(":") in job.methods  # the note names its method itself
        yield note if named or len(own) == count else f"{_named(list(own))}: {note}"


def _named(methods: Sequence[str]) -> str:
    more = len(methods) - 3
    return ", ".join(methods[:3]) + (f" and {more} more" if more > 0 else "")


def _write_apart(job: Job, source: Source, picture: Picture, drawn: Sequence[Drawable]) -> list[Written]:
    """Write each map with a picture of its own."""
    written = []
    for each in drawn:
        caption = _caption(job, each.facts, method=True, layer=True) if job.wish.captions else ()
        overlay = drawing.single(job.wish, picture, each.scaled, caption)
        base = files.write(job.wish.out, _name(source, each.facts), overlay, each.raw.numpy(), each.facts)
        written.append(Written(each.facts, base, Path(f"{base}.{files.PICTURE}")))
    return written


def _write_together(job: Job, source: Source, picture: Picture, drawn: Sequence[Drawable]) -> list[Written]:
    """Write all maps, and one picture of them."""
    layers = {each.facts["layer"] for each in drawn}
    told = job.wish.captions is not False
    captions = [_caption(job, each.facts, layer=len(layers) > 1) if told else () for each in drawn]
    title = _title(job, source, layers) if told else ()
    group = len({each.facts["class"] for each in drawn})
    page = drawing.together(job.wish, picture, [each.scaled for each in drawn], captions, group, title)
    bases = [files.write(job.wish.out, _name(source, each.facts), None, each.raw.numpy(), each.facts) for each in drawn]
    place = files.write_picture(job.wish.out, f"{source.path.stem}-grid", page)
    return [Written(each.facts, base, place) for each, base in zip(drawn, bases)]


def _caption(job: Job, facts: Facts, *, method: bool = False, layer: bool) -> tuple[str, ...]:
    """The lines under a map: its class and probability, its method if there are several or it is wished, and its layer."""
    named = facts["class_name"] or f"class {facts['class']}"
    score = f"score {facts['score']:.3g}" if facts["probability"] is None else f"{facts['probability']:.1%}"
    own = facts["method"] if method or len(job.methods) > 1 else ""
    return tuple(line for line in (named, score, own, facts["layer"] if layer else "") if line)


def _title(job: Job, source: Source, layers: set[str | None]) -> tuple[str, ...]:
    """The lines above all maps: the picture, and the method and the layer if all maps are of one."""
    method = job.methods[0] if len(job.methods) == 1 else ""
    (layer,) = layers if len(layers) == 1 else (None,)
    shared = ", ".join(filter(None, (method, layer and f"layer {layer}")))
    return tuple(line for line in (source.path.name, shared) if line)


def _name(source: Source, facts: Facts) -> str:
    parts = (source.path.stem, facts["layer"], facts["method"], facts["class"])
    return "-".join(str(part) for part in parts if part is not None)

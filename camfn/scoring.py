"""The sweep: the score of every masked input, in chunks, through one kernel.

By definition the kernel is a function of one row, `(state, x, mask, target) -> score`, mapped over the rows of a chunk.
Folded, masking and targets are mapped and the model, which takes batches by nature, gets the chunk as its batch.
"""

import functools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map

from camfn import _compat, keep
from camfn._errors import CamError, warn
from camfn._types import Inputs, Scores, State, wide
from camfn.capture import pure_from
from camfn.layouts import Read
from camfn.masks import Rule, Variation, flat_channels, masked_input, noise_stream
from camfn.subject import Key, Subject, first_nonfinite, pick, with_input
from camfn.targets import Score, score_rows

Rows = dict[str, Tensor]
CHUNK = 32


class Sweep(NamedTuple):
    """How a sweep is carried out. Nothing here changes the result beyond rounding.

    - `chunk`: masked inputs per forward, 32 by default.
    - `compile`: `True` compiles the kernel with `torch.compile(fullgraph=True)`, which pays from thousands of forwards on,
      since the first call takes half a minute; `"auto"` uses a compiled kernel where this model and these shapes have one.
    - `fold=False` maps through the model, which then sees one row at a time: for models whose samples are not independent.
    - `progress`: `True` shows a bar (tqdm), a callable gets `(done, total)` forwards.
    """

    chunk: int | None = None
    compile: bool | Literal["auto"] = "auto"
    fold: bool = True
    progress: bool | Callable[[int, int], None] = False


class Plan(NamedTuple):
    """Which rows of an activation are swept: `(draw, channel, image)` of each, draws outermost, on the CPU."""

    read: Read
    rows: Tensor  # (r, 3)
    zeros: Tensor  # (m, 3): one row for each image with flat channels, where these share one
    flat: Tensor  # (n, c): which channels are flat

    @property
    def rows_in_all(self) -> int:
        """Masked inputs."""
        return len(self.rows) + len(self.zeros)


# ----------------------------------------------------------------------------------------------------- the kernel


def _of_images(x: Inputs, key: Key, image: Tensor, n: int, masked: Tensor) -> Inputs:
    """The inputs of a chunk: the masked one, and of the others the rows of the same images."""
    if key is None:
        return masked

    def pick(leaf: Any) -> Any:
        per_image = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == n
        return leaf.index_select(0, image) if per_image else leaf

    return with_input(tree_map(pick, x), key, masked)


def _mask_row(rule: Rule, images: Tensor, row: Rows) -> Tensor:
    image = images.index_select(0, row["image"].reshape(1))[0]
    return masked_input(rule, image, row["channel"], row["scale"], row.get("noise"))


def folded(
    call: Callable[[State, Inputs], Any], of: Any, rule: Rule, key: Key, state: State, x: Inputs, targets: Tensor, rows: Rows
) -> Tensor:
    """The scores `(b, t)` of a chunk of rows: masking and targets mapped, the chunk a batch of the model."""
    images = pick(x, key)
    masked = vmap(functools.partial(_mask_row, rule, images))(rows)
    output = call(state, _of_images(x, key, rows["image"], images.shape[0], masked))
    return score_rows(of, output, targets.index_select(0, rows["image"]))


def mapped(
    call: Callable[[State, Inputs], Any], of: Any, rule: Rule, key: Key, state: State, x: Inputs, targets: Tensor, rows: Rows
) -> Tensor:
    """The same by the definition: one row, model and all, mapped over the chunk."""

    def one(row: Rows) -> Tensor:
        return folded(call, of, rule, key, state, x, targets, {name: value[None] for name, value in row.items()})[0]

    return vmap(one)(rows)


# ------------------------------------------------------------------------------------------------------ the sweep


def plan(read: Read, variation: Variation) -> Plan:
    """The rows to sweep. Reads which channels are flat, except under a transform, where all are swept."""
    n, c, _ = read.values.shape
    recipe = variation.recipe
    draws, flat = len(variation.scales), flat_channels(read.values)
    alive = torch.ones(n, c, dtype=torch.bool, device="cpu") if _compat.transformed() else ~flat.cpu()
    if recipe.flat == "zero" and not variation.zeros_are_equal:
        alive = torch.ones_like(alive)
    rows = alive.T.expand(draws, c, n).nonzero()
    if recipe.flat == "skip":
        return Plan(read, rows, rows[:0], flat)
    first = (~alive).int().argmax(1)  # any flat channel of the image will do: its mask is zero
    image = torch.arange(n, device="cpu")
    zeros = torch.stack([torch.zeros_like(image), first, image], 1)[~alive.all(1)]
    return Plan(read, rows, zeros, flat)


def sweep(
    subject: Subject,
    score: Score,
    todo: Plan,
    variation: Variation,
    options: Sweep,
    tick: Callable[[int], None],
) -> Scores:
    """`S_k`: for every channel of every image, the mean score of its masked inputs."""
    size = tuple(subject.image.shape[2:])
    rule = Rule(variation.recipe, variation.noise, size, todo.read.values.dtype)
    kernel = _kernel_for(subject, score, rule, todo.read.grid, checked(options))
    index = torch.cat([todo.rows, todo.zeros])
    found = _in_chunks(kernel, _rows_from(subject, todo.read, variation, size), index, options, tick)
    if not _compat.transformed() and not bool(torch.isfinite(found).all()):
        bad = index[(~torch.isfinite(found)).any(1).nonzero()[0]]
        _raise_nonfinite(subject, rule, bad, _rows_from(subject, todo.read, variation, size)(bad))
    return _gather(found, todo, variation)


def _raise_nonfinite(subject: Subject, rule: Rule, index: Tensor, rows: Rows) -> NoReturn:
    masked = vmap(functools.partial(_mask_row, rule, subject.image))(rows)
    x = _of_images(subject.x, subject.key, rows["image"], subject.n, masked)
    _, channel, image = index[0].tolist()
    raise CamError(
        f"the score of image {image} masked by channel {channel} is not finite; "
        f"{first_nonfinite(subject.model, subject.state, x)}"
    )


def _rows_from(subject: Subject, read: Read, variation: Variation, size: tuple[int, ...]) -> Callable[[Tensor], Rows]:
    """From `(draw, channel, image)` to what the kernel needs to make the masked input."""
    n, c, _ = read.values.shape
    device = read.values.device
    channels = read.values.to(wide(read.values.dtype)).reshape(n * c, *read.grid)
    scales = torch.tensor(variation.scales, dtype=channels.dtype, device=device)
    shape = tuple(subject.image.shape[1:]) if variation.noise == "input" else size
    noise_of = noise_stream(variation, c, shape, device)

    def rows(index: Tensor) -> Rows:
        draw, channel, image = index.T.contiguous().to(device)
        noise = noise_of(index[:, :2])
        made = {"image": image, "channel": channels.index_select(0, image * c + channel), "scale": scales.index_select(0, draw)}
        return made if noise is None else {**made, "noise": noise}

    return rows


def _in_chunks(
    kernel: "Kernel", rows_of: Callable[[Tensor], Rows], index: Tensor, options: Sweep, tick: Callable[[int], None]
) -> Tensor:
    chunk = CHUNK if options.chunk is None else options.chunk
    if len(index) == 0:
        raise CamError("every channel of the layer is flat, and the recipe leaves flat channels out: there is nothing to sweep")
    found = []
    for part in index.split(chunk):
        used = len(part)
        if kernel.compiled and used < chunk:  # one shape, one graph
            part = torch.cat([part, part[-1:].expand(chunk - used, 3)])
        found.append(kernel.call(rows_of(part))[:used])
        tick(used)
    return torch.cat(found)


def _gather(found: Tensor, todo: Plan, variation: Variation) -> Scores:
    """Scores of rows to scores of channels: the mean over draws; flat channels have the score of their image's zeros."""
    (n, c), t = todo.flat.shape, found.shape[1]
    swept, zeros = found.split([len(todo.rows), len(todo.zeros)])
    _, channel, image = todo.rows.to(found.device).unbind(1)
    scores = found.new_zeros(n * c, t).index_add(0, image * c + channel, swept / len(variation.scales)).reshape(n, c, t)
    if variation.recipe.flat == "skip":
        return torch.where(todo.flat[..., None], 0, scores)  # under a transform they were swept
    if len(todo.zeros):
        shared = found.new_zeros(n, t).index_add(0, todo.zeros[:, 2].to(found.device), zeros)
        scores = torch.where(todo.flat[..., None], shared[:, None], scores)
    return scores


# ---------------------------------------------------------------------------------------------------- compilation


class Kernel(NamedTuple):
    """The kernel with all but the rows filled in."""

    call: Callable[[Rows], Tensor]
    compiled: bool


def _kernel_for(subject: Subject, score: Score, rule: Rule, grid: tuple[int, ...], options: Sweep) -> Kernel:
    body = folded if options.fold else mapped
    arguments = (pure_from(subject.shell), score.of, rule, subject.key, subject.state, subject.x, score.rows)
    eager = Kernel(functools.partial(body, *arguments), False)
    auto = options.compile == "auto"
    if options.compile is False or _compat.transformed() or (auto and not keep.has_any(subject.model)):
        return eager
    key = _kernel_key(subject, score, rule, grid, options)
    if auto and not keep.is_made(subject.model, key):
        return eager
    if reason := _compat.can_compile():
        warn(f"the kernel runs without compilation: {reason}")
        return eager
    return Kernel(functools.partial(_call_compiled, keep.slot_of(subject.model, key), body, arguments), True)


def _kernel_key(subject: Subject, score: Score, rule: Rule, grid: tuple[int, ...], options: Sweep) -> Any:
    leaves, tree = tree_flatten(subject.x)
    shapes = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
    state = tuple((t.dtype, t.device) for t in subject.state.values())
    of = (score.of.func, *map(_weakly, score.of.args), score.rows.shape)
    settings = (rule, grid, subject.key, options.fold, options.chunk)
    return "kernel", of, settings, shapes, str(tree), state, keep.structure(subject.shell)


def _weakly(value: Any) -> Any:
    """A caller's callable may lead to the model, which what is kept must not hold on to."""
    if isinstance(value, tuple):
        return tuple(map(_weakly, value))
    return weakref.ref(value) if callable(value) else value


def _call_compiled(slot: keep.Slot, body: Any, arguments: tuple[Any, ...], rows: Rows) -> Tensor:
    """Outside grad and inference mode, which would each be one more graph; the first call alone, since it compiles."""

    def plain(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf

    with torch.inference_mode(False), torch.no_grad():
        call, of, *tensors = arguments
        arguments = (call, of, *tree_map(plain, tensors))
        rows = tree_map(plain, rows)
        with slot.lock if slot.made is None else nullcontext():
            kernel = slot.made or _compat.compiled(body)
            try:
                scores = kernel(*arguments, rows)
            except Exception as error:
                if not type(error).__module__.startswith("torch._dynamo"):
                    raise
                found = str(error).strip().splitlines()[0]
                raise CamError(f"torch.compile does not take this model as one graph ({found}); use compile=False") from error
            slot.made = kernel
    return scores


def checked(options: Sweep) -> Sweep:
    """`options`, or a sentence about what is wrong with them."""
    if options.chunk is not None and not (isinstance(options.chunk, int) and options.chunk > 0):
        raise CamError(f"Sweep(chunk={options.chunk!r}): chunk must be None or a positive int, masked inputs per forward")
    if options.compile not in ("auto", True, False):
        raise CamError(f'Sweep(compile={options.compile!r}): compile must be "auto", True or False')
    return options


def counter(progress: bool | Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """A function that is told of every chunk how many forwards it was, and shows it."""
    if progress is False:
        return lambda used: None
    report, done = _bar(total) if progress is True else progress, 0

    def tick(used: int) -> None:
        nonlocal done
        done += used
        report(done, total)

    return tick


def _bar(total: int) -> Callable[[int, int], None]:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise CamError("progress=True needs tqdm (pip install 'camfn[cli]'); or pass a callable (done, total)") from error
    bar = tqdm(total=total, unit="forward")

    def report(done: int, total: int) -> None:
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return report

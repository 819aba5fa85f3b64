"""Removal of objects: whether a map predicts the change of the score when an object is removed. The protocols of FunnyBirds.

They are functions of the shares of a map on the objects (`object_energy`, or a sum of signed values), and of what the model
did without them. `camfn.demo.interventions` draws the pictures. A set of removed objects has a number: bit j is 1 if object j
is removed, and 0 is the whole picture.

Hesse et al., FunnyBirds: A Synthetic Vision Dataset for a Part-Based Analysis of Explainable AI Methods, ICCV 2023
(arXiv 2308.06248), section 4. A part of a bird is an object of a scene here.
"""

import itertools

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from camfn._errors import CamError
from camfn.metrics.pixels import correlation, known_where, ranks

IMPORTANT = 0.05
"""An object is important if it has more of a map: of the shipped scenes it covers a twentieth, the share of a flat map. The
authors try many values."""
IRRELEVANT = 0.05
"""An object is irrelevant if its removal takes less than this share of the score, as the authors have it."""


def single_deletion(
    shares: Float[Tensor, "... k"], drops: Float[Tensor, "... k"], *, ranked: bool = True
) -> Float[Tensor, "..."]:
    """The correlation of the shares of a map on objects with the drops of the score when each is removed. Higher is better.

    **Arguments**

    - `shares`: `(..., k)`: of the map on each of k objects, as `object_energy` gives them.
    - `drops`: `(..., k)`: the score of the whole picture minus that without the object.
    - `ranked`: Spearman's correlation, of ranks with ties shared, as the paper has it. False is Pearson's. An image with few
      objects has few ranks: flatten targets and objects, `shares.flatten(-2)`, for one value of an image, or all images.

    **Returns** `(...)`, from -1 to 1; the paper reports `(r + 1) / 2`. It is 0 if either is constant, and NaN if a share or
    a drop is not finite.

    **Raises** `CamError` if the shapes differ, or there are fewer than two objects.

    >>> import torch
    >>> single_deletion(torch.tensor([0.7, 0.1, 0.2]), torch.tensor([5.0, -1.0, 0.0]))
    tensor(1.)
    """
    if shares.shape != drops.shape or shares.shape[-1:] < (2,):
        raise CamError(
            f"shares have shape {tuple(shares.shape)} and drops {tuple(drops.shape)}: pass at least two objects, and the same "
            "shape"
        )
    known = (shares.isfinite() & drops.isfinite()).all(-1)
    pair = (ranks(values) if ranked else values.double() for values in (shares, drops))
    return known_where(known, _varied(*pair)).to(shares.dtype)


def _varied(a: Tensor, b: Tensor) -> Tensor:
    """Return the correlation, and 0 if both are constant: equal shares say nothing about equal drops."""
    constant = (a == a[..., :1]).all(-1) | (b == b[..., :1]).all(-1)
    return torch.where(constant, 0, correlation(a, b))


def preservation_check(
    shares: Float[Tensor, "... k"], held: Bool[Tensor, "... subsets"], *, threshold: float = IMPORTANT
) -> Float[Tensor, "..."]:
    """1 if the prediction holds when only the important objects stay, else 0. Higher is better.

    A map with energy on all objects removes none, and passes: report `deletion_check` beside it.

    **Arguments**

    - `shares`: `(..., k)`: of the map on each of k objects. A share that is NaN counts as 0.
    - `held`: bools `(..., 2**k)`: whether the prediction is that of the whole picture, for each set of removed objects.
    - `threshold`: an object is important if its share is above.

    **Returns** `(...)`, float32.

    **Raises** `CamError` if `held` is not of all sets.

    >>> import torch
    >>> held = torch.tensor([True, False, True, False])  # without none, the first, the second, both
    >>> preservation_check(torch.tensor([0.8, 0.0]), held), deletion_check(torch.tensor([0.8, 0.0]), held)
    (tensor(1.), tensor(1.))
    """
    return _held_without(~(shares > threshold), held).float()  # a NaN is not important, and goes


def deletion_check(
    shares: Float[Tensor, "... k"], held: Bool[Tensor, "... subsets"], *, threshold: float = IMPORTANT
) -> Float[Tensor, "..."]:
    """1 if the prediction changes when the important objects are removed, else 0. Higher is better.

    **Arguments**, **Returns** and **Raises** as in `preservation_check`.

    >>> import torch
    >>> held = torch.tensor([True, False, True, False])
    >>> deletion_check(torch.tensor([0.0, 0.8]), held)  # the second object is not what the prediction rests on
    tensor(0.)
    """
    return (~_held_without(shares > threshold, held)).float()


def _held_without(removed: Tensor, held: Tensor) -> Tensor:
    if not removed.ndim:
        raise CamError("shares have shape (): they must be (..., k), of k objects")
    count = removed.shape[-1]
    if held.dtype != torch.bool or held.shape != (*removed.shape[:-1], 2**count):
        raise CamError(
            f"held is {held.dtype} of shape {tuple(held.shape)}: it must be bools {(*removed.shape[:-1], 2**count)}, one for "
            f"each set of the {count} objects"
        )
    number = (removed * 2 ** torch.arange(count, device=removed.device)).sum(-1)
    return held.gather(-1, number[..., None])[..., 0]


def target_sensitivity(shares: Float[Tensor, "... k k"], drops: Float[Tensor, "... k k"]) -> Float[Tensor, "..."]:
    """How often the map of an object's class has more on the object than the map of another class has. Higher is better.

        mean over pairs i, j of [s_ii > s_ji] and [s_jj > s_ij]

    Only pairs count in which the model itself tells the two apart: removing object i lowers score i more than removing j
    does, and the other way round. A tie is a miss, as the authors have it, so that a map of no class scores 0. A share that
    is NaN is a miss, too.

    **Arguments**

    - `shares`: `(..., k, k)`: of the map of target i on object j, which is of class j.
    - `drops`: `(..., k, k)`: the drop of score i when object j is removed.

    **Returns** `(...)`, from 0 to 1, and NaN if no pair counts.

    **Raises** `CamError` if the shapes differ, or there are not as many targets as objects.

    >>> import torch
    >>> drops = torch.tensor([[5.0, -1.0], [0.0, 3.0]])
    >>> target_sensitivity(torch.tensor([[0.8, 0.1], [0.2, 0.5]]), drops)
    tensor(1.)
    >>> target_sensitivity(torch.tensor([[0.8, 0.1], [0.8, 0.1]]), drops)
    tensor(0.)
    """
    if shares.shape != drops.shape or shares.ndim < 2 or shares.shape[-2] != shares.shape[-1]:
        raise CamError(
            f"shares have shape {tuple(shares.shape)} and drops {tuple(drops.shape)}: both must be (..., k, k), of k targets "
            "and their objects"
        )
    hits, tried = [], []
    for i, j in itertools.permutations(range(shares.shape[-1]), 2):
        hits.append(shares[..., i, i] > shares[..., j, i])
        tried.append((drops[..., i, i] > drops[..., i, j]) & (drops[..., j, j] > drops[..., j, i]))
    if not hits:
        return torch.full(shares.shape[:-2], torch.nan, dtype=shares.dtype, device=shares.device)
    counted = torch.stack(tried, -1)
    total = counted.sum(-1)
    return known_where(total > 0, (torch.stack(hits, -1) & counted).sum(-1) / total.clamp(min=1)).to(shares.dtype)


def irrelevant(
    drops: Float[Tensor, "... k"], clean: Float[Tensor, "..."], *, least: float = IRRELEVANT
) -> Bool[Tensor, "... k"]:
    """Whether the removal of an object leaves the score: it takes less than a share of it, or raises it.

    **Arguments**

    - `drops`: `(..., k)`: the score of the whole picture minus that without the object.
    - `clean`: `(...)`: the score of the whole picture.
    - `least`: the share of `|clean|` from which on a drop counts. A logit has no zero of its own: shares of a probability
      mean more.

    **Returns** bools `(..., k)`.

    **Raises** `CamError` if the shapes differ.

    >>> import torch
    >>> irrelevant(torch.tensor([0.5, 0.01, -0.3]), torch.tensor(0.9))
    tensor([False,  True,  True])
    """
    if not drops.ndim or clean.shape != drops.shape[:-1]:
        raise CamError(f"drops have shape {tuple(drops.shape)} and clean {tuple(clean.shape)}: they must be (..., k) and (...)")
    return drops < least * clean.abs()[..., None]


def distractibility(
    shares: Float[Tensor, "... k"],
    drops: Float[Tensor, "... k"],
    clean: Float[Tensor, "..."],
    *,
    threshold: float = IMPORTANT,
    least: float = IRRELEVANT,
) -> Float[Tensor, "..."]:
    """The share of the irrelevant objects that the map does not call important. Higher is better.

    **Arguments**

    - `shares`, `threshold`: as in `preservation_check`; the objects include those of the ground.
    - `drops`, `clean`, `least`: as in `irrelevant`.

    **Returns** `(...)`, from 0 to 1, and NaN if no object is irrelevant.

    **Raises** `CamError` if the shapes differ.

    >>> import torch
    >>> distractibility(torch.tensor([0.6, 0.3, 0.0]), torch.tensor([0.5, 0.01, -0.3]), torch.tensor(0.9))
    tensor(0.5000)
    """
    if shares.shape != drops.shape or not drops.ndim or clean.shape != drops.shape[:-1]:
        raise CamError(
            f"shares have shape {tuple(shares.shape)}, drops {tuple(drops.shape)} and clean {tuple(clean.shape)}: the first "
            "two must be the same, and the last without the axis of objects"
        )
    idle = irrelevant(drops, clean, least=least)
    total = idle.sum(-1)
    return known_where(total > 0, (idle & ~(shares > threshold)).sum(-1) / total.clamp(min=1)).to(shares.dtype)


def background_independence(
    drops: Float[Tensor, "... k"], clean: Float[Tensor, "..."], *, least: float = IRRELEVANT
) -> Float[Tensor, "..."]:
    """The share of changes of the ground that leave the score. A property of the model, which maps are read with.

    **Arguments**

    - `drops`: `(..., k)`: the score of the picture minus that with each change: an object of the ground removed, or another
      ground.
    - `clean`, `least`: as in `irrelevant`.

    **Returns** `(...)`, from 0 to 1. Higher is more independent.

    **Raises** `CamError` if the shapes differ.

    >>> import torch
    >>> background_independence(torch.tensor([0.5, 0.01, -0.3, 0.0]), torch.tensor(0.9))
    tensor(0.7500)
    """
    return irrelevant(drops, clean, least=least).to(drops.dtype).mean(-1)

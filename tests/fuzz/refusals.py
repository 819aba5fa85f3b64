"""What may be refused: a habit, the methods for which it may be, words of the error, and why.

A CamError that is not here is a failure, as a wrong map is. What is refused although it need not be, or is wrong, is not here:
it is in `KNOWN` until it is mended.
"""

from typing import NamedTuple

import camfn
from tests.fuzz.models import Case

METHODS = frozenset(camfn.METHODS)
OF_LAYER = frozenset(name for name, row in camfn.METHODS.items() if row.of_layer)


def needing(*needs: str) -> frozenset[str]:
    """The methods that have one of the needs."""
    return frozenset(name for name, row in camfn.METHODS.items() if row.needs & {*needs})


class Row(NamedTuple):
    habit: str
    methods: frozenset[str]
    words: str  # of the error
    why: str

    def fits(self, case: Case, words: str) -> bool:
        return self.habit in case.habits.values() and case.method in self.methods and self.words in words


_UNCLEAR = "layers.md: where two layouts fit equally well, or none, an error says so"
_NO_RULE = "lift_cam: an operation without a rule is an error that names it"
_READ = "design.md: what reads values in Python has no record"
_CHECKPOINT = "gotchas.md: no gradient through a checkpointed block under a transform, in attention methods, and if reentrant"
_GRADIENTS = needing("gradients", "attention")
_ATTENTION = needing("attention")
_LIFT = frozenset({"lift_cam"})
_MASKS = needing("masked inputs") | {"smooth_grad_cam_pp", "cameras"}

REFUSALS = (
    Row("module traced", METHODS, "is scripted or traced", "layers.md: what is traced has no Python layers"),
    Row("module made in the first forward", METHODS, "draws random numbers in eval mode", "a new module draws its weights"),
    Row(
        "dropout that does not", METHODS, "draws random numbers in eval mode", "gotchas.md: a map of what is drawn anew is none"
    ),
    Row("forward replaced by a function", METHODS, "was replaced on the instance", "a copy would run the caller's forward"),
    Row(
        "module in a global",
        frozenset({"full_grad"}),
        "does not follow",
        "methods.md: full_grad needs the biases of all layers",
    ),
    Row("layer in a list", OF_LAYER, "is not a registered submodule", "a layer is a name, and this one has none"),
    Row("layer whose weight is used", OF_LAYER, "did not run in this forward", "no layer gave the activation"),
    Row("forward without gradients", _GRADIENTS, "no gradient", "there is no gradient"),
    Row("layer under no_grad", _GRADIENTS, "no gradient", "there is no gradient"),
    Row("checkpoint", _ATTENTION, "checkpoints its activations", _CHECKPOINT),
    Row("two heads", frozenset({"cam"}), "no layer named 'fc'", "methods.md: a linear head is a single layer"),
    Row("flat input", _MASKS, "masking needs (n, channels, *size)", "there are no axes to mask"),
    Row("flat input", frozenset({"full_grad"}), "needs spatial axes in the input", "its map is at the size of the input"),
    Row("flat input", OF_LAYER, "no grid of that many positions", _UNCLEAR),
    Row("flat input", OF_LAYER | _ATTENTION, "ways that fit equally well", _UNCLEAR),
    Row("masked_fill_", _LIFT, "has no rule", _NO_RULE),
    Row("assignment to a slice", _LIFT, "has no rule", _NO_RULE),
    *(Row(name, _LIFT, "lift_cam has no rule", _NO_RULE) for name in ("Fourier transform", "vmap inside", "batch second")),
    Row("assertion on values", _LIFT, "depends on values that are read in Python", _READ),
    Row("write under a mask", _LIFT, "depends on values that are read in Python", _READ),
    Row("gradient inside", _LIFT, "cannot be recorded", "design.md: a record runs the model under a transform"),
    Row("reentrant checkpoint", frozenset({"lift_cam", "shapley_cam"}), "checkpoints its activations", _CHECKPOINT),
    Row("reentrant checkpoint", frozenset({"full_grad"}), "records no gradient", "gotchas.md: none inside such a block"),
    *(
        Row(name, _LIFT, "cannot be recorded", "gotchas.md: a custom Function is not recorded")
        for name in ("custom Function", "custom Function with setup_context", "custom Function, differentiable once")
    ),
    Row(
        "custom Function, differentiable once",
        frozenset({"shapley_cam"}),
        "once_differentiable",
        "gotchas.md: no second derivative",
    ),
    Row("attention by bmm", _ATTENTION, "over windows or groups of tokens", "heads in the axis of the batch look like windows"),
)

DROWNED = "do not follow those of the input"
"""Words of the refusal of a random transformer whose attention drowns each token's own place. It is rare, and counted."""

KNOWN: tuple[Row, ...] = ()
"""Faults of camfn that are not mended yet. Each is seen to fail; the table is to be empty."""


def allowed(case: Case, words: str) -> bool:
    return (case.transformer and DROWNED in words) or any(row.fits(case, words) for row in REFUSALS)


def known(case: Case, words: str) -> bool:
    return any(row.fits(case, words) for row in KNOWN)

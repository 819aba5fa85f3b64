"""Batch-norm folding, and weights with the channels last. Both map a state to a new state.

They make the model faster and leave its function unchanged up to rounding. They change a private copy; the caller's model and
state are only read.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten

from camfn._types import Inputs, State, wide
from camfn.model.capture import watch_from
from camfn.model.guard import Origins, Watcher
from camfn.model.prepare import Call, Prepared, opened
from camfn.model.private_copy import PrivateCopy, with_slots
from camfn.model.randomness import TURNS
from camfn.targets import flatten


class Fold(NamedTuple):
    """The names of a convolution and of the batch norm that takes its output."""

    conv: str
    norm: str


class Found(NamedTuple):
    """Facts about a model from one forward pass: foldable pairs, weight reuse, output, peak memory."""

    folds: tuple[Fold, ...]  # the pairs that can be folded
    reuse: float  # output positions per convolution weight, averaged over the weights: how much a copy of the weights pays
    output: Any
    bytes: int  # peak memory of the forward pass
    asks: str  # the function that read a value of the input in Python, or a size that depends on one; or ""


def _passed(x: Tensor) -> Tensor:
    """The forward of a folded batch norm: the identity."""
    return x


def find_folds(model: nn.Module | Prepared | Call, state: State, x: Inputs, fixed: Sequence[Tensor] = ()) -> Found:
    """Find the pairs that can be folded, by one forward pass.

    Both layers are plain and run once, and the convolution's output goes to the norm and nowhere else. If the forward reads a
    value in Python, it may branch differently for a masked input, and what another thread or NumPy computes is not seen: in
    these cases no pair is returned. `fixed`: inputs that are the same in all forward passes.
    """
    private = opened(model).borrow()
    modules, uses = private.distinct(), Counter(private.slots.values())
    pairs: list[Fold] = []
    runs: Counter[str] = Counter()
    weights, used = 0, 0
    inputs = [leaf for leaf in tree_flatten(x)[0] if all(leaf is not same for same in fixed)]
    origins = Origins((*state.values(), *private.own_tensors(), *fixed), inputs)
    watcher = Watcher(origins)

    def see(name: str, args: tuple[Any, ...], out: Any) -> None:
        runs[name] += 1
        nonlocal weights, used
        module = modules[name]
        if isinstance(module, _CONVOLUTIONS) and isinstance(out, Tensor):
            weights += module.weight.numel()
            used += module.weight.numel() * math.prod(out.shape[2:])
        if _is_plain(module, _CONVOLUTIONS) and all(uses[t] == 1 for t in _tensors_of(private, name)):
            watcher.follow(out, name)
        elif _is_plain(module, (_BatchNorm,)) and module.running_var is not None and args and watcher.name_of(args[0]):
            pairs.append(Fold(str(watcher.name_of(args[0])), name))

    with torch.inference_mode(False), torch.no_grad(), TURNS, origins, watcher:
        output = watch_from(private, state, x, see)
    given = {watcher.name_of(leaf) for leaf in flatten(output)[0]}
    lone = [fold for fold in pairs if watcher.consumers[fold.conv] == [F.batch_norm] and fold.conv not in given]
    folds = tuple(fold for fold in lone if runs[fold.conv] == runs[fold.norm] == 1)
    seen_whole = not (watcher.reads or origins.reads or origins.unseen)
    return Found(folds if seen_whole else (), used / max(1, weights), output, origins.peak, origins.asks)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_plain(module: Any, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether the module computes what torch's class does, with its own parameters and without forward hooks."""
    cls = type(module)
    kind = next((kind for kind in kinds if isinstance(module, kind)), None)
    names = ("forward", "_conv_forward")
    own = kind is not None and all(getattr(cls, name, None) is getattr(kind, name, None) for name in names)
    return own and {"weight", "bias"} == set(module._parameters) and not (module._forward_hooks or module._forward_pre_hooks)


def _tensors_of(private: PrivateCopy, name: str) -> list[str]:
    return [private.aliases[full] for full in (f"{name}.weight", f"{name}.bias") if full in private.aliases]


def _merged_tensors(private: PrivateCopy, state: State, conv: str, norm: str) -> tuple[Tensor, Tensor]:
    """`W' = W g / sqrt(v + eps)` and `b' = (b - m) g / sqrt(v + eps) + beta`, computed in float32 or wider."""

    def of(name: str, part: str) -> Any:
        tensor = state.get(private.aliases.get(f"{name}.{part}", ""))
        return None if tensor is None else tensor.to(wide(tensor.dtype))

    weight, mean, var = of(conv, "weight"), of(norm, "running_mean"), of(norm, "running_var")
    module: Any = private.module.get_submodule(norm)
    gain, shift, bias = of(norm, "weight"), of(norm, "bias"), of(conv, "bias")
    scale = torch.rsqrt(var + module.eps) * (1 if gain is None else gain)
    merged = (-mean if bias is None else bias - mean) * scale + (0 if shift is None else shift)
    dtype = state[private.aliases[f"{conv}.weight"]].dtype
    return (weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))).to(dtype), merged.to(dtype)


def merge_norms(private: PrivateCopy, state: State, folds: tuple[Fold, ...]) -> tuple[PrivateCopy, State]:
    """Fold the batch norms of `folds`. Returns a private copy and its state; the copy that is passed is consumed."""
    state, slots = dict(state), dict(private.slots)
    for fold in folds:
        weight, bias = _merged_tensors(private, state, *fold)
        conv: Any = private.module.get_submodule(fold.conv)
        name = private.aliases.get(f"{fold.conv}.bias", f"{fold.conv}.bias")
        state[private.aliases[f"{fold.conv}.weight"]], state[name] = weight, bias
        if conv.bias is None:
            conv.bias = nn.Parameter(torch.empty_like(bias), requires_grad=False)
        slots[f"{fold.conv}.bias"] = name
        norm = private.module.get_submodule(fold.norm)
        for part in (*norm._parameters, *norm._buffers):
            slots.pop(f"{fold.norm}.{part}", None)
        norm.__dict__["forward"] = _passed  # its class and tensors stay, for a model whose forward reads them
    used = set(slots.values())
    return with_slots(private, slots), {name: tensor for name, tensor in state.items() if name in used}


def channels_last(state: State) -> State:
    """Store four-dimensional weights with the channels innermost; values and shapes do not change."""
    return {name: with_channels_last(tensor) for name, tensor in state.items()}


def with_channels_last(tensor: Tensor) -> Tensor:
    """Store a tensor of four axes with the channels innermost. Others have no such format."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

"""State in, state out: batch norms merged into the convolutions before them, weights laid out with the channels last.

Both leave the model's function as it is, to rounding, and make it faster. The shell is our own copy; the caller's model and
state are only read.
"""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from camfn._types import Inputs, State, wide
from camfn.capture import watch
from camfn.shell import Shell, shell_of


class Fold(NamedTuple):
    """A convolution and the batch norm that takes its output, by name."""

    conv: str
    norm: str


class _Passed(nn.Module):
    """What a merged batch norm becomes: nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def find_folds(model: nn.Module, state: State, x: Inputs) -> tuple[Fold, ...]:
    """The pairs that can be merged, seen in one forward: each runs once, and the merged convolution gives the norm's output.

    Whether the convolution's output goes anywhere else shows only in the model's output: check that once more when merged.
    """
    shell = shell_of(model)
    modules = dict(shell.module.named_modules())
    uses = Counter(shell.slots.values())
    made: dict[int, tuple[str, int, Any, Tensor]] = {}  # id of a convolution's output -> its name, version, inputs, itself
    found: list[Fold] = []
    runs: Counter[str] = Counter()

    def see(name: str, args: Any, out: Any) -> None:
        runs[name] += 1
        module = modules[name]
        if isinstance(module, _ConvNd) and _mergeable(module, ("weight", "bias"), uses, shell, name):
            made[id(out)] = name, out._version, args, out
        elif isinstance(module, _BatchNorm) and module.running_var is not None and len(args) == 1 and id(args[0]) in made:
            conv, version, given, same = made[id(args[0])]
            if same._version == version and _mergeable(module, (), uses, shell, name):
                weight, bias = _merged_tensors(shell, state, conv, name)
                if _agree(functional_call(_with_bias(modules[conv], bias), {"weight": weight, "bias": bias}, given), out):
                    found.append(Fold(conv, name))

    # Version counters tell whether a tensor was written to in between; inference mode has none.
    with torch.inference_mode(False), torch.no_grad():
        watch(model, state, x, see)
    return tuple(fold for fold in found if runs[fold.conv] == runs[fold.norm] == 1)


def _mergeable(module: nn.Module, own: tuple[str, ...], uses: Counter[str], shell: Shell, name: str) -> bool:
    """No hooks, which see or change what passes; nothing but a plain module's parameters, used nowhere else."""
    if module._forward_hooks or module._forward_pre_hooks or getattr(module, "transposed", False):
        return False
    known = [shell.aliases[f"{name}.{part}"] for part in own if f"{name}.{part}" in shell.aliases]
    plain = not list(module.children()) and (not own or set(module._parameters) == set(own))
    return plain and all(uses[tensor] == 1 for tensor in known)


def _agree(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and is_close(a, b, 100)


def is_close(a: Tensor, b: Tensor, times: float) -> bool:
    """Do they differ by at most `times` the dtype's eps, times the size of `b`?"""
    if not b.numel():
        return True
    bound = times * torch.finfo(b.dtype).eps * b.abs().amax()
    return bool(((a - b).abs() <= bound).all())


def _with_bias(conv: nn.Module, bias: Tensor) -> nn.Module:
    if conv._parameters["bias"] is None:
        conv._parameters["bias"] = nn.Parameter(torch.empty_like(bias), requires_grad=False)
    return conv


def _merged_tensors(shell: Shell, state: State, conv: str, norm: str) -> tuple[Tensor, Tensor]:
    """`W' = W g / sqrt(v + eps)` and `b' = (b - m) g / sqrt(v + eps) + beta`, computed in float32 or wider."""

    def of(name: str, part: str) -> Any:
        tensor = state.get(shell.aliases.get(f"{name}.{part}", ""))
        return None if tensor is None else tensor.to(wide(tensor.dtype))

    weight, mean, var = of(conv, "weight"), of(norm, "running_mean"), of(norm, "running_var")
    module: Any = shell.module.get_submodule(norm)
    gain, shift, bias = of(norm, "weight"), of(norm, "bias"), of(conv, "bias")
    scale = torch.rsqrt(var + module.eps) * (1 if gain is None else gain)
    merged = (-mean if bias is None else bias - mean) * scale + (0 if shift is None else shift)
    dtype = state[shell.aliases[f"{conv}.weight"]].dtype
    return (weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))).to(dtype), merged.to(dtype)


def merge_norms(shell: Shell, state: State, folds: tuple[Fold, ...]) -> tuple[Shell, State]:
    """The shell without the batch norms of `folds`, and its state. The shell given is ours alone, and is used up."""
    state, slots = dict(state), dict(shell.slots)
    for fold in folds:
        weight, bias = _merged_tensors(shell, state, *fold)
        conv: Any = shell.module.get_submodule(fold.conv)
        name = shell.aliases.get(f"{fold.conv}.bias", f"{fold.conv}.bias")
        state[shell.aliases[f"{fold.conv}.weight"]], state[name] = weight, bias
        _with_bias(conv, bias)
        slots[f"{fold.conv}.bias"] = name
        norm = shell.module.get_submodule(fold.norm)
        for part in (*norm._parameters, *norm._buffers):
            slots.pop(f"{fold.norm}.{part}", None)
        norm.__class__ = _Passed
        norm.__dict__["_parameters"], norm.__dict__["_buffers"] = {}, {}
    used = set(slots.values())
    return shell._replace(slots=slots), {name: tensor for name, tensor in state.items() if name in used}


def channels_last(state: State) -> State:
    """Weights of two-dimensional convolutions with the channels innermost; values and shapes stay."""
    last = torch.channels_last
    return {name: t.contiguous(memory_format=last) if t.ndim == 4 else t for name, t in state.items()}

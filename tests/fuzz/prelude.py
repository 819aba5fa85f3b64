"""What the models of the fuzzer are written with. Its text begins each script that a failure prints."""

import collections
import contextlib
import copy  # noqa: F401
import dataclasses
import functools  # noqa: F401
import math  # noqa: F401
import types  # noqa: F401
import weakref  # noqa: F401
import zlib

import numpy as np  # noqa: F401
import torch
import torch.nn.utils.prune
from torch import nn
from torch.utils.checkpoint import checkpoint  # noqa: F401

import camfn  # noqa: F401
from camfn import layouts, targets  # noqa: F401

DTYPE, SEED = torch.float64, 0
HELD, CLOSED = {}, []


def images(n, seed):
    return torch.randn(n, 3, 8, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DTYPE)


def own(module, name):
    """The module with weights that belong to the name, whatever draws elsewhere."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {SEED}".encode()))
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                new = torch.randn(tensor.numel(), generator=generator, dtype=torch.float64).reshape(tensor.shape)
                size = 1.5 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.3
                tensor.copy_(new.abs() + 0.5 if key.endswith("var") else size * new)
    return module.to(DTYPE).eval()


def with_weight(module, weight):
    module.weight = nn.Parameter(weight.detach().clone())
    return module


def scaled(module, factor):
    return with_weight(module, factor * module.weight)


def as_plain(conv):
    """A plain convolution of the weight that another has after all that is done to it."""
    conv.eval()(torch.zeros(1, conv.in_channels, 8, 8, dtype=DTYPE))
    made = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, dtype=DTYPE).eval()
    made.bias = nn.Parameter(conv.bias.detach().clone())
    return with_weight(made, conv.weight)


def dense(conv):
    """Of a convolution with groups and dilation, the plain one."""
    c, inside, k, _ = conv.weight.shape
    weight = torch.zeros(c, c, 2 * k - 1, 2 * k - 1, dtype=DTYPE)
    for g in range(conv.groups):
        own_rows = slice(g * c // conv.groups, (g + 1) * c // conv.groups)
        weight[own_rows, g * inside : (g + 1) * inside, ::2, ::2] = conv.weight[own_rows].detach()
    made = with_weight(nn.Conv2d(c, c, 2 * k - 1, padding=k - 1, dtype=DTYPE), weight).eval()
    made.bias = nn.Parameter(conv.bias.detach().clone())
    return made


def rows(linear, start, stop):
    """A linear layer of some of the rows of another."""
    made = with_weight(nn.Linear(linear.in_features, stop - start, dtype=DTYPE), linear.weight[start:stop])
    made.bias = nn.Parameter(linear.bias[start:stop].detach().clone())
    return made


def in_inference_mode(x):
    with torch.inference_mode():
        return x.clone()


def made_in_inference_mode(model):
    with torch.inference_mode():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = None if parameter is None else nn.Parameter(parameter.clone())
    return model


@contextlib.contextmanager
def deterministic():
    """A switch of torch that a user has set, which must be as it was."""
    before = torch.is_deterministic_algorithms_warn_only_enabled(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before[1], warn_only=before[0])


Pair = collections.namedtuple("Pair", "first second")
Logits = collections.namedtuple("Logits", "logits features")


@dataclasses.dataclass
class Part:
    module: nn.Module


@dataclasses.dataclass
class Record:
    logits: torch.Tensor
    features: torch.Tensor


class Slots:
    __slots__ = ("module",)

    def __init__(self, module):
        self.module = module


class ModelOutput(collections.OrderedDict):
    """As transformers has it: keys are attributes, and numbers are places."""

    def __getattr__(self, name):
        return self[name] if name in self else super().__getattribute__(name)

    def __getitem__(self, key):
        return tuple(self.values())[key] if isinstance(key, (int, slice)) else super().__getitem__(key)


class Around(nn.Module):
    """A module that does something to what another returns."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Told(Around):
    def forward(self, *, image):
        return {"image": self.module(image)}


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)


class Parts(Around):
    def forward(self, z):
        z = self.module(z)
        return z, z.mean()


class Alone(Around):
    def forward(self, z):
        return (self.module(z),)


class Named(Around):
    def forward(self, z):
        z = self.module(z)
        return {"out": z, "mean": z.mean((2, 3))}


class Last(nn.Module):
    def forward(self, z):
        return z.permute(0, 2, 3, 1)


class Tokens(nn.Module):
    def forward(self, z):
        return z.flatten(2).mT


class TokensFirst(nn.Module):
    def forward(self, z):
        return z.flatten(2).permute(2, 0, 1)


class Transposed(nn.Module):
    def forward(self, z):
        return z.mT.contiguous().mT


class Prefix(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, count, 8))

    def forward(self, z):
        return torch.cat([self.tokens.expand(len(z), -1, -1), z], 1)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(conv):
    nn.utils.parametrize.register_parametrization(conv, "weight", Doubled())
    return conv


def spectral(conv):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.utils.parametrizations.spectral_norm(conv).eval()


class Leaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return torch.where(z > 0, z, 0.1 * z)

    @staticmethod
    def backward(ctx, g):
        return torch.where(ctx.saved_tensors[0] > 0, g, 0.1 * g)


class LeakySetUp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return torch.where(z > 0, z, 0.1 * z)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    backward = Leaky.backward


class LeakyOnce(Leaky):
    backward = staticmethod(torch.autograd.function.once_differentiable(Leaky.backward))


class Attention(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.qkv, self.out = own(nn.Linear(8, 24), f"qkv {name}"), own(nn.Linear(8, 8), f"out {name}")

    def forward(self, z):
        q, k, v = self.qkv(z).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out(self.mix(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, kind, name):
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(8, dtype=DTYPE), nn.LayerNorm(8, dtype=DTYPE), kind(name)
        self.mlp = nn.Sequential(own(nn.Linear(8, 12), f"up {name}"), nn.GELU(), own(nn.Linear(12, 8), f"down {name}"))

    def forward(self, z):
        z = z + self.attention(self.norm1(z))
        return z + self.mlp(self.norm2(z))

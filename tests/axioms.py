"""Which axioms of attribution each method satisfies at a layer, measured on small networks. `python tests/axioms.py` writes
docs/axioms.md."""

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import camfn  # noqa: E402
from camfn.explanation.explain import takes  # noqa: E402
from camfn.methods.registry import Need, method_of  # noqa: E402
from tests.laws.laws import OPTIONS  # noqa: E402

PAGE = ROOT / "docs" / "axioms.md"
CLOSE = 1e-7
"""The largest difference, relative to the largest value, of maps that are equal. Networks are in float64."""
SEEDS = (0, 1, 2)
METHODS = tuple(name for name, row in camfn.METHODS.items() if "attention" not in row.needs)
Maps = Callable[..., Tensor]
"""A method with its options: signed, unscaled maps of a model, an input and a target, at the layer `features`."""


class Net(nn.Module):
    """A layer, and a head that is not linear: tanh, a convolution, softplus, pooling and a linear layer."""

    def __init__(self, seed: int, linear: bool = False) -> None:
        super().__init__()
        self.seed, self.linear = seed, linear
        self.features = nn.Conv2d(2, 4, 3, padding=1)
        self.mix = nn.Conv2d(4, 5, 3, padding=1)
        self.fc = nn.Linear(4 if linear else 5, 3)
        self.double()
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.parameters():
            nn.init.normal_(tensor, std=0.5, generator=generator)
        self.eval()

    def head(self, z: Tensor) -> Tensor:
        return self.fc(z.mean((2, 3)) if self.linear else F.softplus(self.mix(torch.tanh(z))).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Rewritten(nn.Module):
    """The function of a `Net` after the same layer, in other operations: products in the place of layers."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.features, self.net = net.features, (net,)  # out of sight of torch, so that its layers are not these
        self.first, self.last = nn.Linear(5, 5, bias=False).double(), nn.Linear(5, 3).double()
        turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64))[0]
        with torch.no_grad():
            self.first.weight.copy_(turn)
            self.last.weight.copy_(net.fc.weight @ turn.T)
            self.last.bias.copy_(net.fc.bias)
        self.weight, self.bias = nn.Parameter(net.mix.weight.detach().clone()), nn.Parameter(net.mix.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        z = self.features(x)
        patches = F.unfold(torch.sigmoid(2 * z) * 2 - 1, 3, padding=1)  # tanh
        mixed = (self.weight.flatten(1) @ patches + self.bias[:, None]).unflatten(2, z.shape[2:])
        pooled = torch.log1p(mixed.exp()).mean((2, 3))  # softplus
        return self.last(self.first(pooled))


class Changed(nn.Module):
    """A network whose layer is `grow(z)`, behind which `undo` follows."""

    def __init__(self, net: Net, grow: Callable[[Tensor], Tensor], undo: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.features, self.grow, self.undo = net, nn.Identity(), grow, undo

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.head(self.undo(self.features(self.grow(self.inner.features(x)))))


class Saturated(nn.Module):
    """One position alone has a value, 2, and the score is `1 - relu(1 - z)` there: it changes from 0 to 1, and is flat at 2."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Identity()
        self.fc = nn.Linear(1, 2).double()
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[1.0], [-1.0]]))
            self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(36 * (1 - F.relu(1 - self.features(x))).mean((2, 3)))


# ------------------------------------------------------------------------------------------------------------- axioms


def completeness(maps: Maps, net: Net, x: Tensor) -> float:
    """The map sums to the score less the score of a layer of zeros: `sum_p L_p = s(A) - s(0)`."""
    with torch.no_grad():
        change = (net(x) - net.head(0 * net.features(x)))[:, 1]
    return apart(maps(net, x, 1).flatten(1).sum(1), change)


def completeness_on_a_linear_head(maps: Maps, net: Net, x: Tensor) -> float:
    """Where the layer is pooled and weighted, the sum or the mean of the map is the score less that of zeros."""
    net = Net(net.seed, linear=True)
    with torch.no_grad():
        change = (net(x) - net.head(0 * net.features(x)))[:, 1]
    found = maps(net, x, 1).flatten(1)
    return min(apart(found.sum(1), change), apart(found.mean(1), change))


def sensitivity(maps: Maps, net: Net, x: Tensor) -> float:
    """Where one position alone changes the score, the map is not zero there, even if the gradient is."""
    one = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    one[0, 0, 2, 3] = 2
    found = maps(Saturated(), one, 0)
    return math.inf if float(found[0, 2, 3].abs()) < 1e-9 else 0.0


def dummy_channel(maps: Maps, net: Net, x: Tensor) -> float:
    """A further channel that nothing reads changes nothing."""
    grown = Changed(net, lambda z: torch.cat([z, z[:, :1].sin() + 0.3], 1), lambda z: z[:, :4])
    return apart(maps(grown, x, 1), maps(net, x, 1))


def symmetry(maps: Maps, net: Net, x: Tensor) -> float:
    """The order of the channels does not matter."""
    order = torch.tensor([2, 0, 3, 1])
    return apart(maps(Changed(net, lambda z: z[:, order], lambda z: z[:, order.argsort()]), x, 1), maps(net, x, 1))


def linearity(maps: Maps, net: Net, x: Tensor) -> float:
    """The map of a difference of scores is the difference of the maps."""
    both = camfn.targets.logit(0) - 3 * camfn.targets.logit(1)
    return apart(maps(net, x, both), maps(net, x, 0) - 3 * maps(net, x, 1))


def implementation_invariance(maps: Maps, net: Net, x: Tensor) -> float:
    """The same function of the layer, in other operations, has the same map."""
    if net.linear:
        raise camfn.CamError("the rewritten head is not linear")
    return apart(maps(Rewritten(net), x, 1), maps(net, x, 1))


AXIOMS = (
    completeness,
    completeness_on_a_linear_head,
    sensitivity,
    dummy_channel,
    symmetry,
    linearity,
    implementation_invariance,
)


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


# -------------------------------------------------------------------------------------------------------------- table


def asked(method: str) -> Maps:
    row = camfn.METHODS[method]
    own = {"layout": "channels_first", "relu": False, "normalize": False, **OPTIONS.get(method, {})}
    known = {key: value for key, value in own.items() if takes(method_of(method), key)}

    def maps(model: nn.Module, x: Tensor, target: Any) -> Tensor:
        layer = "features" if row.of_layer else None
        return camfn.explain(model, layer, x, target, method=method, **known).maps.detach()

    return maps


def holds(axiom: Callable[[Maps, Net, Tensor], float], method: str) -> bool | None:
    """Whether an axiom holds on all networks; None if the method takes none of them."""
    found = []
    for seed in SEEDS:
        x = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
        try:
            found.append(axiom(asked(method), Net(seed, linear=Need.LINEAR_HEAD in camfn.METHODS[method].needs), x) < CLOSE)
        except camfn.CamError:
            return None
    return all(found)


def table(methods: Sequence[str] = METHODS) -> dict[str, list[bool | None]]:
    return {method: [holds(axiom, method) for axiom in AXIOMS] for method in methods}


_HEAD = """# Axioms

Attribution axioms that each method satisfies for the positions of a layer. Measured by `tests/axioms.py` on three small
networks in float64. Their head after the layer is not linear; that of `cam` is. Maps are signed and unscaled. A dash means that
the method does not take these networks, or explains no layer.
"""
_FOOT = """Completeness, dummies, symmetry, linearity and implementation invariance are those of Sundararajan et al., Axiomatic
Attribution for Deep Networks, ICML 2017 (arXiv 1703.01365). A method can violate an axiom and be useful, and the other way
round: see [results.md](results.md).
"""


def named(axiom: Callable[..., float]) -> str:
    return axiom.__name__.replace("_", " ")


def lines() -> Iterator[str]:
    yield _HEAD
    yield "| axiom | meaning |"
    yield "| --- | --- |"
    for axiom in AXIOMS:
        yield f"| {named(axiom)} | {(axiom.__doc__ or '').strip()} |"
    yield ""
    yield f"| method | {' | '.join(map(named, AXIOMS))} |"
    yield f"| --- | {' | '.join(':-:' for _ in AXIOMS)} |"
    marks = {True: "yes", False: "no", None: "-"}
    for method, row in table().items():
        yield f"| `{method}` | {' | '.join(marks[each] for each in row)} |"
    yield ""
    yield _FOOT.rstrip()


@functools.cache
def page() -> str:
    return "\n".join(lines()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())

"""A network that takes a millisecond, its twins of other habits, and how maps of two are compared."""

import contextlib

import torch
from torch import Tensor, nn

import camfn
from camfn import CamError
from tests.oracles.networks import CHEAP


class Net(nn.Module):
    """conv with stride 2, batch norm, ReLU (`act`), and a pooled linear head."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))

    def feats(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward(self, x):
        return self.head(self.feats(x))


def images(n: int = 2, seed: int = 1, side: int = 12) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode and float64, with seeded weights and statistics, the same for the same names and shapes."""
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if tensor.is_floating_point():
                generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
                new = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(new.abs() + 0.5 if name.endswith("running_var") else new)
    return model


def raw(method: str, model, layer, x, target=1, **options) -> Tensor:
    """A method's map without the ReLU and the scaling, so that none is empty."""
    row = camfn.METHODS[method]
    options = {"relu": False, "normalize": False, **CHEAP.get(method, {}), **options}
    if method == "cam":
        options["fc"] = "head.2"
    return row.function(model, layer if row.of_layer else None, x, target, **options)


def tensors_of(found) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_flatten(found)[0] if isinstance(leaf, Tensor)]


def off(got, want) -> float:
    """The largest difference of two results, in units of the largest value of each tensor wanted."""
    pairs = list(zip(tensors_of(got), tensors_of(want)))
    assert pairs
    assert len(pairs) == len(tensors_of(got)) == len(tensors_of(want))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a.detach() - b.detach()).abs().max() / b.detach().abs().max().clamp_min(1e-30)) for a, b in pairs)


NEAR = 1e-9
"""In float64: thousands of roundings, of sums of some hundred terms."""


def agree(method, subject, twin, x, may_refuse=False, **options):
    """The map is the twin's; or an error, where there may be no record, and where the twin has no map either."""
    want = found = None
    with contextlib.suppress(*(CamError,) * may_refuse):
        want = raw(method, twin, "act", x, **options)
    with contextlib.suppress(*(CamError,) * may_refuse):
        found = raw(method, subject, "act", x, **options)
    if found is not None:
        assert want is not None, "a map where the twin has none"
        assert off(found, want) <= NEAR


def plain(model: nn.Module) -> nn.Module:
    return model


def prepared(model: nn.Module):
    return camfn.prepare(model)


BOTH = [plain, prepared]
"""A model as it is, and one prepared: the same, called for the first time and again."""


def as_they_were(*tensors: Tensor):
    """A function that says whether the tensors are bit for bit what, and lie where, they were."""

    def look():
        return [(t.detach().clone(), t.data_ptr(), tuple(t.shape), t.stride(), t.requires_grad) for t in tensors]

    before = look()

    def same() -> bool:
        return all(torch.equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(before, look()))

    return same

"""Where the graph from a layer to the score ends: one error that names the place, and no map of zeros."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import camfn
from tests.oracles.closeness import close

METHODS = ["grad_cam", "layer_cam", "shapley_cam", "opti_cam", "smooth_grad_cam_pp", "group_cam", "cameras"]


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x.detach() * 2


class Net(nn.Module):
    """A layer `conv`, a backbone and a head; `way` is how the values get from the first to the last."""

    def __init__(self, way) -> None:
        super().__init__()
        self.conv, self.backbone = nn.Conv2d(3, 6, 3), nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU())
        self.last, self.fc, self.way = nn.Identity(), nn.Linear(6, 4), way

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.way(self, self.conv(x))).mean((2, 3)))


def off(context):
    def way(net: Net, h: Tensor) -> Tensor:
        with context():
            out = net.backbone(h)
        return out.clone()

    return way


def written(net: Net, h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, :] = net.backbone(nn.functional.pad(h, (1, 1, 1, 1))).detach()
    return out


def logged(net: Net, h: Tensor) -> Tensor:
    """A harmless `detach`, before the one that cuts."""
    net.seen = h.detach().mean()
    with torch.no_grad():
        return net.backbone(h)


ENDS = {
    "no_grad": (off(torch.no_grad), r"in 'backbone\.0', where conv2d ran under torch\.no_grad\(\)"),
    "inference_mode": (off(torch.inference_mode), r"in 'backbone\.0', where conv2d ran under torch\.inference_mode\(\)"),
    "detach": (lambda net, h: net.backbone(h).detach(), "in the model's own forward, where detach cuts it"),
    "data": (lambda net, h: net.backbone(h).data, "in the model's own forward, where detach cuts it"),
    "in place": (written, "in the model's own forward, where detach cuts it"),
    "logged": (logged, r"in 'backbone\.0', where conv2d ran under torch\.no_grad\(\)"),
    "numpy": (lambda net, h: torch.from_numpy(np.maximum(h.detach().numpy(), 0)), "own forward, where detach cuts it"),
    "a number": (lambda net, h: torch.ones_like(h) * h.mean().item(), "where item gives a Python number"),
    "a comparison": (lambda net, h: (h > 0).to(h.dtype), "where gt gives torch.bool"),
    "a script": (lambda net, h: scripted(h), "though the score depends on it: .* that camfn does not see"),
}


def net(way) -> nn.Module:
    torch.manual_seed(0)
    return Net(way).double()


def image() -> Tensor:
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run(method: str, model: nn.Module, layer="conv", target=1, **options):
    cheap = {"opti_cam": {"steps": 2}, "cameras": {"factors": (1.5,)}}.get(method, {})
    return camfn.METHODS[method].function(model, layer, image(), target, **{**cheap, **options})


@pytest.mark.filterwarnings("ignore:the model's output for an input depends on the others:camfn.CamWarning")
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_error_names_where_the_graph_ends(method, end):
    way, place = ENDS[end]
    with pytest.raises(camfn.CamError, match=rf"^no gradient reaches (the masks of )?layer 'conv'.* {place}"):
        run(method, net(way))


@pytest.mark.parametrize("end", ["detach", "data", "numpy", "a script"])
def test_full_grad_needs_the_gradient_of_the_input(end):
    with pytest.raises(camfn.CamError, match=rf"^no gradient reaches the input.* {ENDS[end][1]}"):
        run("full_grad", net(ENDS[end][0]), None)


def test_lift_cam_follows_the_values_and_not_the_graph():
    plain = run("lift_cam", net(lambda net, h: net.backbone(h)))
    for end in ("no_grad", "detach"):
        close(run("lift_cam", net(ENDS[end][0])), plain)


def test_a_layer_behind_the_end_has_its_gradient():
    close(run("grad_cam", net(ENDS["no_grad"][0]), "last"), run("grad_cam", net(lambda net, h: net.backbone(h)), "last"))


class Aside(Net):
    """Another head, for which the score does not ask."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.conv(x)
        return {"logits": self.fc(h.mean((2, 3))), "other": self.fc(self.last(self.backbone(h)).mean((2, 3)))}


@pytest.mark.parametrize("method", [*(name for name in METHODS if name != "opti_cam"), "lift_cam"])
def test_a_layer_that_is_not_on_the_way_to_the_score_is_another_error(method):
    torch.manual_seed(0)
    with pytest.raises(camfn.CamError, match=r"^the score does not depend on layer 'last'"):
        run(method, Aside(None).double(), "last")


def other(output: dict[str, Tensor]) -> Tensor:
    """The other head. Its gradient reaches the layer."""
    return output["other"][1]


def test_the_other_target_depends_on_it():
    torch.manual_seed(0)
    assert run("grad_cam", Aside(None).double(), "last", other, relu=False).abs().max() > 0


def test_a_target_may_end_the_graph_too():
    with pytest.raises(camfn.CamError, match="the graph ends in the target, where detach cuts it"):
        run("grad_cam", net(lambda net, h: net.backbone(h)), target=lambda output: output.detach()[1])


@pytest.mark.filterwarnings("ignore:.* maps at layer 'conv' are flat:camfn.CamWarning")
@pytest.mark.parametrize("method", ["grad_cam", "lift_cam"])
def test_a_gradient_of_zero_is_no_missing_one(method):
    card = camfn.explain(net(lambda net, h: (h - 1e3).relu()), "conv", image(), 1, method=method)
    assert not card.maps.any()
    assert all("graph ends" not in note for note in card.notes)
    if method == "grad_cam":
        assert any("zero throughout, though the graph is whole" in note for note in card.notes)


# ------------------------------------------------------------------------------------------ several layers or methods


@pytest.mark.parametrize("method", ["grad_cam", "opti_cam"])
def test_among_several_layers_the_map_is_zeros_with_a_warning(method):
    model = net(ENDS["detach"][0])
    with pytest.warns(camfn.CamWarning) as caught:
        first, last = run(method, model, ["conv", "last"])
    said = [str(warning.message) for warning in caught]
    assert any("layer 'conv': the graph ends in the model's own forward" in sentence for sentence in said)
    assert not any("flat" in sentence for sentence in said)
    assert not first.any()
    if method == "grad_cam":
        close(last, run(method, model, "last"))


def test_among_several_methods_it_is_a_finding():
    model, methods = net(ENDS["detach"][0]), ["score_cam", "grad_cam", "opti_cam", "mean_cam"]
    cards = {card.method: card for card in camfn.explain(model, "conv", image(), 1, method=methods, steps=2)}
    for method, card in cards.items():
        found = [finding for finding in card.findings if finding.kind == "no gradient"]
        assert [finding.layer for finding in found] == (["conv"] if method in ("grad_cam", "opti_cam") else [])
        assert bool(card.maps.any()) != bool(found)
    close(cards["mean_cam"].maps, run("mean_cam", model))
    with pytest.raises(camfn.CamError, match="no gradient reaches layer 'conv'"):
        camfn.explain(model, "conv", image(), 1, method=["grad_cam"])


# -------------------------------------------------------------------------------------------------------- transformers


class Transformer(nn.Module):
    def __init__(self, frozen: int) -> None:
        super().__init__()
        self.embed, self.head, self.frozen = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 4), frozen
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).mT
        for number, block in enumerate(self.blocks):
            with torch.set_grad_enabled(number >= self.frozen):
                h = block(h)
        return self.head(h.mean(1))


def transformer(frozen: int) -> nn.Module:
    torch.manual_seed(0)
    return Transformer(frozen).double()


@pytest.mark.parametrize("method", ["gradient_attention", "legrad", "ag_cam"])
def test_attention_in_a_frozen_part_is_an_error_unless_it_is_left_out(method):
    with pytest.raises(camfn.CamError, match=r"attention layer 0 runs where the model records no gradient.*start="):
        run(method, transformer(2), None)
    close(run(method, transformer(2), None, start=2), run(method, transformer(0), None, start=2))

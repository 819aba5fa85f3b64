"""Tiny vision transformers of three libraries, with random weights, in float64; and their attention as they tell it themselves.

What they tell comes from plain hooks and from the libraries' own outputs, not from camfn.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.oracles.libraries import torchvision_models
from tests.oracles.networks import CONVS

TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
HF = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that make attention differ from token to token, which fresh ones hardly do."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * 1.5 / max(parameter[0].numel(), 4) ** 0.5 if parameter.ndim > 1 else 1 + 0.3 * noise)
    return model


class Patches(nn.Module):
    """Patches of 2 in one to three axes, a class token if asked, two of torch's own transformer layers, and a linear head."""

    def __init__(self, dims: int = 2, class_token: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = CONVS[dims](3, 8, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 8)) if class_token else None
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=True)
        self.batch_first = batch_first
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT
        if self.token is not None:
            tokens = torch.cat([self.token.expand(len(x), 1, 8), tokens], 1)
        tokens = self.blocks(tokens) if self.batch_first else self.blocks(tokens.transpose(0, 1)).transpose(0, 1)
        return self.head(tokens.mean(1) if self.token is None else tokens[:, 0])


def torchvision_vit() -> nn.Module:
    return torchvision_models().VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5)


def _timm(module: str, name: str, **options) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torchvision_models()  # timm imports torchvision
        models = pytest.importorskip("timm").models
        return getattr(getattr(models, module), name)(**{**TIMM, **options})

    return make


def _hugging_face(name: str, impl: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torchvision_models()
        transformers = pytest.importorskip("transformers")
        config = {"ViT": "ViTConfig", "CLIPVision": "CLIPVisionConfig", "Dinov2": "Dinov2Config"}[name]
        kind = "CLIPVisionModelWithProjection" if name == "CLIPVision" else f"{name}ForImageClassification"
        return getattr(transformers, kind)(getattr(transformers, config)(**HF, attn_implementation=impl))

    return make


MAKERS = {
    "torchvision": torchvision_vit,
    "timm": _timm("vision_transformer", "VisionTransformer"),
    "timm, registers, mean": _timm(
        "vision_transformer", "VisionTransformer", class_token=False, reg_tokens=4, global_pool="avg"
    ),
    "DeiT, distilled": _timm("deit", "VisionTransformerDistilled"),
    "BEiT": _timm("beit", "Beit", use_rel_pos_bias=True),
    "EVA": _timm("eva", "Eva", use_rot_pos_emb=True),
    "ViT, sdpa": _hugging_face("ViT", "sdpa"),
    "ViT, eager": _hugging_face("ViT", "eager"),
    "CLIP, sdpa": _hugging_face("CLIPVision", "sdpa"),
    "CLIP, eager": _hugging_face("CLIPVision", "eager"),
    "DINOv2, sdpa": _hugging_face("Dinov2", "sdpa"),
}
"""The fused kernel is what timm's models run; `unfused` makes them do without."""


def vit(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomised(MAKERS[name]())


def unfused(model: nn.Module) -> nn.Module:
    """A copy of a timm model that runs eager attention, whose probabilities go through a dropout layer of their own."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def logits(output) -> Tensor:
    """What the models return has many shapes."""
    for name in ("logits", "image_embeds"):
        output = getattr(output, name, output)
    return output


def told(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The attention probabilities of every layer, `(n, heads, q, k)`, as the model's own library shows them."""
    if hasattr(model, "config"):
        model = copy.deepcopy(model)
        model.set_attn_implementation("eager")
        return list(model(x, output_attentions=True).attentions)
    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        return _told_by_torch(model, x)
    found: list[Tensor] = []
    model = unfused(model)
    for module in model.modules():
        if hasattr(module, "attn_drop"):
            module.attn_drop.register_forward_hook(lambda _, args, out: found.append(args[0]))
    model(x)
    return found


def _told_by_torch(model: nn.Module, x: Tensor) -> list[Tensor]:
    """`nn.MultiheadAttention` tells its weights if asked."""
    found: list[Tensor] = []

    def ask(module: nn.MultiheadAttention, args) -> None:
        query, key, value = args[:3]
        found.append(module.forward(query, key, value, need_weights=True, average_attn_weights=False)[1])

    handles = [m.register_forward_pre_hook(ask) for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def hooked(model: nn.Module, x: Tensor, detached: bool = False) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Of a plain timm ViT: its logits, and every layer's probabilities, their logits and the block's output, with a graph.

    `detached`: what goes into each attention is detached, as the authors of AG-CAM have it in their copy of timm's ViT.
    """
    model = unfused(model)
    probabilities: list[Tensor] = []
    scaled: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args, out: Tensor) -> Tensor:
        if not out.requires_grad:
            out = out.requires_grad_()
        probabilities.append(out)
        return out

    def recompute(block: nn.Module, args, qkv: Tensor) -> None:
        n, count, _ = qkv.shape
        q, k, _ = qkv.reshape(n, count, 3, block.num_heads, -1).permute(2, 0, 3, 1, 4)
        scaled.append(q @ k.mT * q.shape[-1] ** -0.5)

    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(keep)
        block.attn.qkv.register_forward_hook(lambda _, args, out, attn=block.attn: recompute(attn, args, out))
        block.register_forward_hook(lambda _, args, out: outputs.append(out))
        if detached:
            block.norm1.register_forward_hook(lambda _, args, out: out.detach())
    return model(x), probabilities, scaled, outputs

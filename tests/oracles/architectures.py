"""Small networks of three libraries, each kind of architecture once: random weights, drawn from one seed, and an input."""

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import camfn
from tests.oracles.libraries import detectors, torchvision_models
from tests.oracles.vits import HF, TIMM

CLASSES = 10


class Case(NamedTuple):
    """What a method is given."""

    model: nn.Module
    x: Any
    target: Any = None


def made(name: str) -> Case:
    """The architecture of this name, in eval mode, and what it takes; the same every time.

    What is zero is drawn, weights are as large as their number of inputs asks, and batch norms know the statistics of one
    batch: or the signals of untrained networks die away.
    """
    torchvision_models()  # timm and transformers import torchvision
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # a library's own, of what it will change
        torch.manual_seed(0)
        case = ARCHITECTURES[name]()
        for parameter in case.model.parameters():
            _enliven(parameter)
        _settle(case.model.eval(), case.x)
    return case


def _enliven(parameter: Tensor) -> None:
    if parameter.ndim > 1:
        if not parameter.any():  # a head, or a token
            nn.init.normal_(parameter, std=0.02)
        parameter *= max(1.0, parameter[0].numel() ** -0.5 / float(parameter.square().mean().sqrt()))


def _settle(model: nn.Module, x: Any) -> None:
    norms = [(module, module.momentum) for module in model.modules() if isinstance(module, _NormBase)]
    for norm, _ in norms:
        norm.train().momentum = None  # the mean over batches, of one
    if isinstance(x, Tensor) and norms:
        model(torch.randn(8, *x.shape[1:]))
    elif norms:
        model([torch.rand_like(image) for image in x * 8]) if isinstance(x, list) else model(**_more(x))
    for norm, momentum in norms:
        norm.eval().momentum = momentum


def _more(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.randn(8, *value.shape[1:]) if value.is_floating_point() else value for key, value in x.items()}


def image(side: int = 64, n: int = 1) -> Tensor:
    return torch.randn(n, 3, side, side)


# ------------------------------------------------------------------------------------------------------ torchvision


def tv(name: str, *args: Any, x: Any = 64, **options: Any) -> Callable[[], Case]:
    """A class or function of `torchvision.models`, by its dotted name."""

    def make() -> Case:
        model = _found(f"torchvision.models.{name}")(*args, num_classes=CLASSES, **options)
        return Case(model, image(x) if isinstance(x, int) else torch.randn(x))

    return make


def _found(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(import_module(module), name)


def tv_resnet() -> Case:
    models = torchvision_models()
    return Case(models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES), image())


def tv_mobilenet_v3() -> Case:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig as Row
    from torchvision.models.mobilenetv3 import MobileNetV3

    rows = [Row(16, 3, 16, 16, True, "RE", 2, 1, 1), Row(16, 5, 32, 24, True, "HS", 2, 1, 1)]
    return Case(MobileNetV3(rows, 64, num_classes=CLASSES), image())


def tv_efficientnet() -> Case:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    rows = [MBConvConfig(1, 3, 1, 16, 8, 1, 1.0, 1.0), MBConvConfig(4, 5, 2, 8, 16, 2, 1.0, 1.0)]
    return Case(EfficientNet(rows, 0.2, num_classes=CLASSES), image())


def tv_regnet() -> Case:
    from torchvision.models.regnet import BlockParams, RegNet

    return Case(RegNet(BlockParams.from_init_params(6, 16, 8.0, 2.0, 8, se_ratio=0.25), num_classes=CLASSES), image())


def tv_convnext() -> Case:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return Case(ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)], num_classes=CLASSES), image())


SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
MAXVIT = {"stem_channels": 16, "partition_size": 2, "block_channels": [16, 32], "block_layers": [1, 1], "head_dim": 8}
MAXVIT |= {"stochastic_depth_prob": 0.0}


def tv_maxvit() -> Case:
    return Case(torchvision_models().MaxVit(input_size=(32, 32), num_classes=CLASSES, **MAXVIT), image(32))


def tv_segmentation(name: str) -> Callable[[], Case]:
    def make() -> Case:
        networks = torchvision_models().segmentation
        model = getattr(networks, name)(weights=None, weights_backbone=None, num_classes=CLASSES)
        return Case(model, image(), camfn.targets.segmentation())

    return make


def tv_detector(kind: str) -> Callable[[], Case]:
    """All that is found, however sure: with random weights nothing is. There is no predicted class of a list of boxes."""

    def make() -> Case:
        models = detectors()
        trunk = tv_mobilenet_v3().model.features
        levels, widths = {"0": "0", "1": "1", "2": "2", "3": "3"}, [16, 16, 24, 144]
        backbone = models.backbone_utils.BackboneWithFPN(trunk, levels, widths, 16)
        size: dict[str, Any] = {"num_classes": CLASSES, "min_size": 64, "max_size": 64}
        anchors = models.anchor_utils.AnchorGenerator(((16,), (16,), (32,), (32,), (64,)), ((1.0,),) * 5)
        if kind == "RetinaNet":
            model = models.RetinaNet(backbone, anchor_generator=anchors, score_thresh=0.0, topk_candidates=5, **size)
        else:
            few = {"box_score_thresh": 0.0, "rpn_pre_nms_top_n_test": 5, "rpn_post_nms_top_n_test": 5}
            heads = models.faster_rcnn.TwoMLPHead(16 * 49, 32), models.faster_rcnn.FastRCNNPredictor(32, CLASSES)
            size["num_classes"] = None
            model = models.FasterRCNN(
                backbone, rpn_anchor_generator=anchors, box_head=heads[0], box_predictor=heads[1], **few, **size
            )
        return Case(model, [torch.rand(3, 64, 64)], lambda found: found["scores"][:5].sum())

    return make


def tv_video() -> Case:
    from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

    model = VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1, 1, 1, 1], BasicStem, num_classes=CLASSES)
    return Case(model, torch.randn(1, 3, 8, 32, 32))


def tv_mvit() -> Case:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    def row(inside: int, outside: int, heads: int, stride: list[int]) -> Any:
        return MSBlockConfig(heads, inside, outside, [3, 3, 3], [3, 3, 3], stride, [1, 2, 2])

    rows = [row(16, 16, 1, [1, 1, 1]), row(16, 32, 2, [1, 2, 2]), row(32, 32, 2, [1, 1, 1])]
    model = MViT((32, 32), 4, rows, False, False, False, False, num_classes=CLASSES)
    return Case(model, torch.randn(1, 3, 4, 32, 32))


# ------------------------------------------------------------------------------------------------------------- timm


def timm(name: str, side: int = 64, **options: Any) -> Callable[[], Case]:
    """A model by its name, made small by options."""

    def make() -> Case:
        return Case(import_module("timm").create_model(name, num_classes=CLASSES, **options), image(side))

    return make


def timm_class(name: str, side: int = 32, **options: Any) -> Callable[[], Case]:
    """A class of `timm.models`, by its dotted name."""
    return lambda: Case(_found(f"timm.models.{name}")(num_classes=CLASSES, **options), image(side))


TINY = {key: value for key, value in TIMM.items() if key != "num_classes"}

# ----------------------------------------------------------------------------------------------------- transformers


def hf(name: str, kind: str, side: int = 32, **options: Any) -> Callable[[], Case]:
    """A model of `transformers` from its configuration, called by keywords as its processor gives them."""

    def make() -> Case:
        return Case(_hf(name, kind, **options), {"pixel_values": image(side)})

    return make


def _hf(name: str, kind: str, **options: Any) -> nn.Module:
    transformers = import_module("transformers")
    return getattr(transformers, kind)(getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options))


PLAIN = {key: value for key, value in HF.items() if key != "num_labels"}
STAGES = {"hidden_sizes": [8, 16, 32], "depths": [1, 1, 1]}


def hf_clip() -> Case:
    """Pictures and texts: the logits of a picture are for texts."""
    transformers = import_module("transformers")
    text = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"max_position_embeddings": 8, "eos_token_id": 19, "bos_token_id": 18, "pad_token_id": 1}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=PLAIN, projection_dim=16))
    texts = torch.tensor([[18, 3, 4, 19], [18, 5, 6, 19], [18, 7, 8, 19]])
    return Case(model, {"pixel_values": image(32), "input_ids": texts, "attention_mask": torch.ones_like(texts)})


def hf_tower(name: str, kind: str, **options: Any) -> Callable[[], Case]:
    """An image tower: it gives embeddings, and no classes; the score is how like one of them it is."""

    def make() -> Case:
        case = hf(name, kind, **options)()
        with torch.no_grad():
            out = case.model.eval()(**case.x)
        like = next(out[key] for key in ("image_embeds", "pooler_output") if key in out)
        return case._replace(target=camfn.targets.similarity(torch.randn(like.shape[-1])))

    return make


def hf_yolos() -> Case:
    model = _hf("Yolos", "YolosForObjectDetection", **{**PLAIN, "image_size": [32, 32]}, num_detection_tokens=5)
    return Case(model, {"pixel_values": image(32)}, lambda found: found["logits"].softmax(-1)[:, 0].sum())


def hf_segformer() -> Case:
    options = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4]}
    case = hf("Segformer", "SegformerForSemanticSegmentation", 64, decoder_hidden_size=24, **options)()
    return case._replace(target=camfn.targets.segmentation())


class Turned(nn.Module):
    """Channels before frames, for a model that wants them behind."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x.transpose(1, 2))


def hf_video(name: str, *, turned: bool = False, **options: Any) -> Callable[[], Case]:
    def make() -> Case:
        model = _hf(name, f"{name}ForVideoClassification", **PLAIN, num_frames=4, **options)
        x = torch.randn(1, 4, 3, 32, 32)
        return Case(Turned(model), x.transpose(1, 2)) if turned else Case(model, {"pixel_values": x})

    return make


def hf_wav2vec2() -> Case:
    small = {key: PLAIN[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    small |= {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    small |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16}
    return Case(_hf("Wav2Vec2", "Wav2Vec2ForSequenceClassification", **small), {"input_values": torch.randn(1, 400)})


def hf_ast() -> Case:
    small = {key: value for key, value in PLAIN.items() if key != "image_size"}
    small |= {"num_mel_bins": 32, "max_length": 48, "frequency_stride": 8, "time_stride": 8}
    return Case(_hf("AST", "ASTForAudioClassification", **small), {"input_values": torch.randn(1, 48, 32)})


# ------------------------------------------------------------------------------------------------------------ torch


class Residual1d(nn.Module):
    """Two convolutions along a line, and what goes round them."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(inside, outside, 7, stride, 3, bias=False), nn.BatchNorm1d(outside)
        self.conv2, self.bn2 = nn.Conv1d(outside, outside, 7, 1, 3, bias=False), nn.BatchNorm1d(outside)
        self.relu, self.down = nn.ReLU(inplace=True), nn.Conv1d(inside, outside, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + self.down(x))


def resnet1d() -> Case:
    layers = Residual1d(3, 16, 2), Residual1d(16, 32, 2), Residual1d(32, 64, 2)
    return Case(nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, CLASSES)), torch.randn(1, 3, 128))


class Classifier1d(nn.Module):
    """Torch's own transformer layers along a line of patches."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embed, self.encoder = nn.Conv1d(3, 16, 8, 8), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x).mT).mean(1))


def dense3d() -> Case:
    layers: list[nn.Module] = []
    for inside, outside in ((3, 8), (8, 16), (16, 32)):
        layers += [nn.Conv3d(inside, outside, 3, 2, 1), nn.BatchNorm3d(outside), nn.ReLU()]
    head = nn.Flatten(), nn.Linear(32 * 8, 16), nn.ReLU(), nn.Linear(16, CLASSES)
    return Case(nn.Sequential(*layers, *head), torch.randn(1, 3, 16, 16, 16))


# -------------------------------------------------------------------------------------------------------- all of them

ARCHITECTURES: dict[str, Callable[[], Case]] = {
    "torchvision ResNet": tv_resnet,
    "torchvision SqueezeNet": tv("squeezenet1_1"),
    "torchvision DenseNet": tv("DenseNet", 8, (2, 2, 2), 16),
    "torchvision GoogLeNet (Inception)": tv("googlenet", init_weights=False, aux_logits=True),
    "torchvision MobileNetV2": tv(
        "MobileNetV2", width_mult=0.25, inverted_residual_setting=[[1, 16, 1, 2], [6, 24, 1, 2], [6, 32, 1, 2]]
    ),
    "torchvision MobileNetV3": tv_mobilenet_v3,
    "torchvision ShuffleNetV2": tv("ShuffleNetV2", [1, 1, 1], [8, 16, 32, 64, 128]),
    "torchvision EfficientNet": tv_efficientnet,
    "torchvision RegNet": tv_regnet,
    "torchvision ConvNeXt": tv_convnext,
    "torchvision ViT": tv("VisionTransformer", 32, 8, 3, 2, 16, 32, x=32),
    "torchvision Swin": tv("SwinTransformer", [4, 4], window_size=[4, 4], **SWIN),
    "torchvision MaxViT": tv_maxvit,
    "torchvision LR-ASPP (segmentation)": tv_segmentation("lraspp_mobilenet_v3_large"),
    "torchvision DeepLabV3 (segmentation)": tv_segmentation("deeplabv3_mobilenet_v3_large"),
    "torchvision Faster R-CNN (detector)": tv_detector("Faster R-CNN"),
    "torchvision RetinaNet (detector)": tv_detector("RetinaNet"),
    "torchvision R3D (video)": tv_video,
    "torchvision MViT (video)": tv_mvit,
    "torchvision Swin3D (video)": tv("video.SwinTransformer3d", [2, 4, 4], window_size=[2, 4, 4], x=(1, 3, 4, 32, 32), **SWIN),
    "timm ResNet": timm("test_resnet"),
    "timm VGG": timm_class("vgg.VGG", 56, cfg=[8, "M", 16, "M", 32, "M"]),
    "timm ByobNet": timm("test_byobnet"),
    "timm EfficientNet": timm("test_efficientnet"),
    "timm GhostNet": timm("ghostnet_050"),
    "timm NFNet": timm("test_nfnet"),
    "timm ConvNeXt": timm("test_convnext"),
    "timm ConvNeXtV2": timm("test_convnext2"),
    "timm MambaOut": timm("test_mambaout"),
    "timm PoolFormer": timm_class("metaformer.MetaFormer", 64, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    "timm ConvMixer": timm_class("convmixer.ConvMixer", dim=16, depth=2, patch_size=4),
    "timm MLP-Mixer": timm_class("mlp_mixer.MlpMixer", img_size=32, patch_size=8, embed_dim=16, num_blocks=2),
    "timm ViT": timm_class("vision_transformer.VisionTransformer", **TINY),
    "timm ViT, registers, mean": timm_class(
        "vision_transformer.VisionTransformer", class_token=False, reg_tokens=4, global_pool="avg", **TINY
    ),
    "timm ViT, attention pooling": timm_class(
        "vision_transformer.VisionTransformer", class_token=False, global_pool="map", **TINY
    ),
    "timm ViT, relative positions": timm("test_vit_relpos", 64, img_size=64),
    "timm DINOv2, registers": timm("vit_small_patch14_reg4_dinov2", 56, img_size=56, embed_dim=16, depth=3, num_heads=2),
    "timm DINOv3": timm("vit_small_patch16_dinov3", 64, img_size=64, embed_dim=16, depth=3, num_heads=2),
    "timm DeiT, distilled": timm_class("deit.VisionTransformerDistilled", **TINY),
    "timm BEiT": timm_class("beit.Beit", use_rel_pos_bias=True, **TINY),
    "timm EVA": timm_class("eva.Eva", use_rot_pos_emb=True, **TINY),
    "timm CaiT": timm_class("cait.Cait", **TINY),
    "timm XCiT": timm_class("xcit.Xcit", **{**TINY, "depth": 2}, mlp_ratio=2.0, eta=1.0),
    "timm LeViT": timm("levit_128s", 128, img_size=128, embed_dim=(16, 32, 48), num_heads=(2, 2, 2), depth=(1, 1, 1)),
    "timm Swin": timm_class(
        "swin_transformer.SwinTransformer", 32, img_size=32, patch_size=4, window_size=4, **{**SWIN, "depths": (2, 2)}
    ),
    "timm SwinV2": timm_class(
        "swin_transformer_v2.SwinTransformerV2", 32, img_size=32, patch_size=4, window_size=4, **{**SWIN, "depths": (2, 2)}
    ),
    "timm PVTv2": timm_class(
        "pvt_v2.PyramidVisionTransformerV2", 64, embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4)
    ),
    "timm Twins": timm_class(
        "twins.Twins", 64, img_size=64, embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4)
    ),
    "timm CoAtNet": timm("test_coatnet", 64, img_size=64),
    "timm MaxViT": timm("test_maxvit", 64, img_size=64),
    "timm DaViT": timm_class("davit.DaVit", 64, depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4), window_size=4),
    "timm EdgeNeXt": timm("edgenext_xx_small", 64),
    "timm MobileViT": timm("mobilevit_xxs", 64),
    "timm FocalNet": timm_class(
        "focalnet.FocalNet", 64, embed_dim=16, depths=(1, 1), focal_levels=(2, 2), focal_windows=(3, 3)
    ),
    "timm Hiera": timm_class(
        "hiera.Hiera", 64, img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 1, 1), q_pool=2, mask_unit_size=(4, 4)
    ),
    "transformers ResNet": hf("ResNet", "ResNetForImageClassification", embedding_size=8, **STAGES),
    "transformers ConvNeXtV2": hf("ConvNextV2", "ConvNextV2ForImageClassification", 64, num_stages=3, **STAGES),
    "transformers MobileNetV1": hf("MobileNetV1", "MobileNetV1ForImageClassification", 64, depth_multiplier=0.1, min_depth=8),
    "transformers ViT": hf("ViT", "ViTForImageClassification", **PLAIN),
    "transformers DeiT, with its teacher": hf("DeiT", "DeiTForImageClassificationWithTeacher", **PLAIN),
    "transformers BEiT": hf("Beit", "BeitForImageClassification", **PLAIN),
    "transformers DINOv2, registers": hf("Dinov2WithRegisters", "Dinov2WithRegistersForImageClassification", **PLAIN),
    "transformers Swin": hf("Swin", "SwinForImageClassification", image_size=32, patch_size=4, window_size=4, **SWIN),
    "transformers PVTv2": hf(
        "PvtV2",
        "PvtV2ForImageClassification",
        64,
        image_size=64,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 3, 4],
    ),
    "transformers CLIP": hf_clip,
    "transformers CLIP image tower": hf_tower("CLIPVision", "CLIPVisionModelWithProjection", projection_dim=16, **PLAIN),
    "transformers SigLIP image tower": hf_tower("SiglipVision", "SiglipVisionModel", **PLAIN),
    "transformers SegFormer (segmentation)": hf_segformer,
    "transformers YOLOS (detector)": hf_yolos,
    "transformers VideoMAE (video)": hf_video("VideoMAE", tubelet_size=2),
    "transformers VideoMAE (video), turned": hf_video("VideoMAE", turned=True, tubelet_size=2),
    "transformers TimeSformer (video)": hf_video("Timesformer"),
    "transformers AST (spectrogram)": hf_ast,
    "transformers wav2vec 2.0 (sound)": hf_wav2vec2,
    "torch ResNet (1-D)": resnet1d,
    "torch transformer (1-D)": lambda: Case(Classifier1d(), torch.randn(1, 3, 160)),
    "torch CNN (3-D)": dense3d,
}

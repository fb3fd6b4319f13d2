"""What tests of models need: each family small, empty caches, and what a GPU refuses."""

import math
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import segmentation as tv

from seg_torch.models import (
    deeplabv3,
    fcn,
    hrnet,
    lraspp,
    smp,
    transformers,
    unet,
    unet_transposed,
    vit,
)

NUM_CLASSES = 3

SEGFORMER = {
    "model_type": "segformer",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 40, 64],
    "decoder_hidden_size": 16,
}

SWIN = {
    "model_type": "swin",
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 1, 1],
    "window_size": 2,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}

MASK2FORMER = {
    "model_type": "mask2former",
    "backbone_config": SWIN,
    "num_queries": 5,
    "train_num_points": 64,
    "feature_size": 64,  # of GroupNorm with 32 groups
    "mask_feature_size": 64,
    "hidden_dim": 64,
    "encoder_feedforward_dim": 16,
    "dim_feedforward": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
}

MASK_MODELS = {
    "mask2former": MASK2FORMER,
    "oneformer": {
        **{key: value for key, value in MASK2FORMER.items() if "feature" not in key},
        "model_type": "oneformer",
        "conv_dim": 64,
        "mask_dim": 64,
        "query_dec_layers": 1,
    },
    "maskformer": {
        "model_type": "maskformer",
        "backbone_config": SWIN,
        "fpn_feature_size": 64,
        "mask_feature_size": 16,
        "decoder_config": {
            "model_type": "detr",
            "num_queries": 5,
            "d_model": 16,
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "encoder_attention_heads": 2,
            "decoder_ffn_dim": 16,
        },
    },
    "eomt": {
        "model_type": "eomt",
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "num_blocks": 2,
        "num_queries": 5,
        "num_register_tokens": 1,
        "train_num_points": 64,
    },
}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "fcn": lambda: fcn(NUM_CLASSES, "resnet50", weights=None),
    "deeplabv3": lambda: deeplabv3(NUM_CLASSES, "resnet50", weights=None),
    "deeplabv3_mobilenet": lambda: deeplabv3(NUM_CLASSES, "mobilenet_v3_large", weights=None),
    "deeplabv3_without_aux": lambda: deeplabv3(
        NUM_CLASSES, "mobilenet_v3_large", weights=None, aux=False
    ),
    "unet": lambda: unet(NUM_CLASSES, "resnet18", weights=None),
    "unet_frozen": lambda: unet(NUM_CLASSES, "resnet18", weights=None, freeze_encoder=True),
    "unet_mobilenet": lambda: unet(NUM_CLASSES, "mobilenetv2_100", weights=None),
    "unet_efficientnet": lambda: unet(NUM_CLASSES, "efficientnet_b0", weights=None),
    "unet_convnext": lambda: unet(NUM_CLASSES, "convnext_atto", weights=None),  # no stride 2
    "unet_densenet": lambda: unet(NUM_CLASSES, "densenet121", weights=None),
    "unet_vgg": lambda: unet(  # feature maps also at stride 1
        NUM_CLASSES, "vgg11_bn", weights=None
    ),
    "unet_transposed": lambda: unet_transposed(NUM_CLASSES, "mobilenetv2_100", weights=None),
    "unet_transposed_frozen": lambda: unet_transposed(
        NUM_CLASSES, "densenet121", weights=None, freeze_encoder=True
    ),
    "unet_transposed_resnet": lambda: unet_transposed(NUM_CLASSES, "resnet18", weights=None),
    "hrnet": lambda: hrnet(NUM_CLASSES, "hrnet_w18_small", weights=None),
    "lraspp": lambda: lraspp(NUM_CLASSES, weights=None),
    "vit": lambda: vit(NUM_CLASSES, "test_vit", weights=None, fusion_channels=16),
    "vit_linear": lambda: vit(NUM_CLASSES, "test_vit", weights=None, head="linear"),
    "vit_frozen": lambda: vit(
        NUM_CLASSES, "test_vit", weights=None, freeze_encoder=True, fusion_channels=16
    ),
    "smp": lambda: smp(NUM_CLASSES, "Unet", "resnet18", weights=None),
    "transformers": lambda: transformers(NUM_CLASSES, SEGFORMER),
    **{name: partial(transformers, NUM_CLASSES, config) for name, config in MASK_MODELS.items()},
}

STRIDES = {  # of the logits, where not 1
    "fcn": 8,
    "deeplabv3": 8,
    "deeplabv3_mobilenet": 16,
    "deeplabv3_without_aux": 16,
    "hrnet": 4,
    "lraspp": 8,
    "vit": 2,
    "vit_linear": 16,
    "vit_frozen": 2,
    "transformers": 4,
    **dict.fromkeys(MASK_MODELS, 4),
    "eomt": 2,
}

# Those that pad images to a multiple of this. Where the stride of their logits does not divide the
# size of an image, they give them at its size.
PADDED = {
    "hrnet": 32,
    **dict.fromkeys(("vit", "vit_linear", "vit_frozen"), 16),
    **dict.fromkeys(("transformers", *MASK_MODELS), 32),
    "eomt": 8,
}

EXTRAS = {"smp": "segmentation_models_pytorch", "transformers": "transformers"}

EXTRAS |= dict.fromkeys(MASK_MODELS, "transformers")


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches and no network, on every machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def no_network(*args: object, **kwargs: object) -> None:
        raise urllib.request.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(torch.hub, "urlopen", no_network)


def torch_cache(tmp_path: Path) -> Path:
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def hugging_face_cache(tmp_path: Path, repository: str, revision: str = "0" * 40) -> Path:
    """Where the Hub client looks for the files of `repository`."""
    folder = tmp_path / "hf" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    return snapshot


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def enlarge(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def strided(size: Sequence[int], stride: int) -> tuple[int, ...]:
    return tuple(math.ceil(side / stride) for side in size)


def size_of_logits(name: str, size: tuple[int, int]) -> tuple[int, ...]:
    stride = STRIDES.get(name, 1)
    whole = name in PADDED and any(side % stride for side in size)
    return size if whole else strided(size, stride)


# trainer.deterministic on a GPU. Training on `meta` shows what it would call there: `meta` computes
# shapes alone, but takes the ways of a GPU wherever a library asks whether it is on a CPU.

# What raises an error on CUDA by the documentation of torch.use_deterministic_algorithms, as far as
# a network for images can call it at all, under the dispatcher's names.
REFUSED_ON_CUDA = {
    "aten.avg_pool3d_backward",
    "aten._adaptive_avg_pool2d_backward",
    "aten._adaptive_avg_pool3d_backward",
    "aten.adaptive_max_pool2d_backward",
    "aten.fractional_max_pool2d_backward",
    "aten.max_unpool2d",
    "aten.upsample_linear1d_backward",
    "aten.upsample_bicubic2d_backward",
    "aten.upsample_trilinear3d_backward",
    "aten.reflection_pad1d_backward",
    "aten.reflection_pad2d_backward",
    "aten.grid_sampler_2d_backward",
    "aten.put_",
    "aten.histc",
    "aten.median.dim",
    "aten.nll_loss2d_forward of a reduced loss",
}


class Calls(TorchDispatchMode):
    """Counts the operations that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removesuffix(".default")
        if name == "aten.nll_loss2d_forward" and args[3] != 0:  # reduction
            name += " of a reduced loss"
        self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def published_mobilenet(tmp_path: Path) -> tv.DeepLabV3:
    published = tv.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    )
    name = "deeplabv3_mobilenet_v3_large-fc3c493d.pth"
    torch.save(published.state_dict(), torch_cache(tmp_path) / name)
    return published


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Those of modules that list their tensors in one order."""
    tensors = zip(target.state_dict(), source.state_dict().values(), strict=True)
    target.load_state_dict(dict(tensors))

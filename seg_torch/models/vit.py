"""Plain vision transformers of timm, such as DINOv2's, with a DPT head or a linear one."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from seg_torch.errors import InputError, check_choice
from seg_torch.models.base import EncoderModel, pad_to_multiple, without_padding
from seg_torch.models.weights import timm_model


class ResidualConvUnit(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, beside an identity (Lin et al., RefineNet, 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Fusion(nn.Module):
    """Add a finer map, refines the sum and enlarges it."""

    def __init__(self, channels: int, has_skip: bool) -> None:
        super().__init__()
        self.skip_unit = ResidualConvUnit(channels) if has_skip else None
        self.unit = ResidualConvUnit(channels)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, skip: Tensor | None, size: Sequence[int]) -> Tensor:
        if self.skip_unit is not None:
            x = x + self.skip_unit(skip)
        x = F.interpolate(self.unit(x), size=size, mode="bilinear", align_corners=True)
        return self.projection(x)


class DPTHead(nn.Module):
    """Turn the tokens of four layers into a pyramid, and fuses it from coarse to fine.

    Source: Ranftl, Bochkovskiy & Koltun, Vision Transformers for Dense Prediction (2021), section
    3: strides of 1/4, 1/2, 1 and 2 patches, without the readout token. As in later work (Depth
    Anything, UniMatch V2) without BatchNorm and dropout before the last convolution.

    Args:
        in_channels: Channels of the tokens.
        num_classes: Number of classes K.
        fusion_channels: Channels of the fused maps.
    """

    num_layers = 4
    scale = 8

    def __init__(self, in_channels: int, num_classes: int, fusion_channels: int) -> None:
        super().__init__()
        channels = [in_channels // 8, in_channels // 4, in_channels // 2, in_channels]
        resizing = [
            nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
            nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
            nn.Identity(),
            nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
        ]
        self.reassemble = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_channels, each, 1),
                resize,
                nn.Conv2d(each, fusion_channels, 3, padding=1, bias=False),
            )
            for each, resize in zip(channels, resizing, strict=True)
        )
        self.fusions = nn.ModuleList(
            Fusion(fusion_channels, has_skip) for has_skip in (True, True, True, False)
        )
        self.classifier = nn.Sequential(
            nn.Conv2d(fusion_channels, fusion_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(fusion_channels, num_classes, 1),
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute logits of an eighth of a patch.

        Args:
            features: Four times float [N, in_channels, h, w], from early to late layers.

        Returns:
            Float [N, K, 8h, 8w].
        """
        maps = [reassemble(f) for reassemble, f in zip(self.reassemble, features, strict=True)]
        x = self.fusions[3](maps[3], None, maps[2].shape[-2:])
        x = self.fusions[2](x, maps[2], maps[1].shape[-2:])
        x = self.fusions[1](x, maps[1], maps[0].shape[-2:])
        height, width = maps[0].shape[-2:]
        return self.classifier(self.fusions[0](x, maps[0], (2 * height, 2 * width)))


class LinearHead(nn.Sequential):
    """BatchNorm and a 1x1 convolution of the last layer's tokens.

    Source: Oquab et al., DINOv2 (2023), section 7.4.
    """

    num_layers = 1
    scale = 1

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(nn.BatchNorm2d(in_channels), nn.Conv2d(in_channels, num_classes, 1))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return super().forward(features[-1])


class ViT(EncoderModel):
    """A vision transformer for images of every size, and a head on tokens of evenly spaced layers.

    The tokens are those behind the transformer's last normalisation, as DINOv2 (2023) has them.

    Args:
        encoder: timm's, made with `dynamic_img_size=True`.
        head: (features float [N, C, h, w] of each layer) -> logits [N, K, scale * h, scale * w],
            with `num_layers` and `scale`.
        freeze_encoder: Keep the encoder's parameters as they are; a number for so many epochs.
    """

    def __init__(
        self, encoder: nn.Module, head: DPTHead | LinearHead, freeze_encoder: bool | int
    ) -> None:
        super().__init__(encoder, freeze_encoder)
        depth, count = len(self.encoder.blocks), head.num_layers
        self.layers = [depth * i // count - 1 for i in range(1, count + 1)]
        self.encoder.prune_intermediate_layers(self.layers)  # of the classifier
        self.head = head
        self.patch_size: int = self.encoder.feature_info[0]["reduction"]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute logits.

        Args:
            x: Float [N, 3, H, W], H and W >= 32.

        Returns:
            `out`: float [N, K, H/s, W/s], where the stride s is a patch for the linear head and an
            eighth of it for DPT (1.75 for DINOv2), or [N, K, H, W] where that is no whole number.
        """
        size = x.shape[-2:]
        x = pad_to_multiple(x, self.patch_size)
        features = self.encoder.forward_intermediates(
            x, indices=self.layers, norm=True, intermediates_only=True
        )
        logits = self.head(features)
        return {"out": without_padding(logits, size, self.patch_size, self.head.scale)}


def vit(
    num_classes: int,
    encoder: str = "vit_small_patch14_dinov2",
    weights: str | Path | None = "imagenet",
    freeze_encoder: bool | int = False,
    head: str = "dpt",
    fusion_channels: int = 256,
) -> ViT:
    """Build a segmentation model from a plain vision transformer of timm.

    Args:
        num_classes: Number of classes K.
        encoder: Name of timm's, such as `vit_small_patch14_dinov2`, `vit_base_patch16_dinov3`,
            `eva02_small_patch14_224` or `vit_base_patch16_224`, also with the tag of its weights.
        weights: Of the encoder: `imagenet` (what timm publishes under the name, whatever images it
            was trained on), the path of a state dict of the timm model, or `None` for random ones.
        freeze_encoder: Keep the encoder's parameters as they are; a number for so many epochs.
        head: `dpt` (see `DPTHead`) or `linear` (see `LinearHead`).
        fusion_channels: Channels of DPT's fused maps; 256 in the paper.

    Returns:
        Module: float [N, 3, H, W] -> {"out": logits [N, K, h, w]}, see `ViT`.

    Raises:
        InputError: Unknown or unsuitable encoder or head, or weights that cannot be loaded or do
            not fit.
    """
    check_choice("model.head", head, ["dpt", "linear"])
    try:
        timm_encoder = timm_model(encoder, weights, num_classes=0, dynamic_img_size=True)
        plain = hasattr(timm_encoder, "blocks")
    except InputError as error:
        if "dynamic_img_size" not in str(error):
            raise
        plain = False
    if not plain:
        raise InputError(
            f"model.encoder is {encoder!r}, which is no plain vision transformer that takes images "
            "of every size; use one such as vit_small_patch14_dinov2 (see timm.list_models('vit_*')"
            " and 'eva*')"
        )
    channels = cast(int, timm_encoder.num_features)
    if head == "linear":
        return ViT(timm_encoder, LinearHead(channels, num_classes), freeze_encoder)
    return ViT(timm_encoder, DPTHead(channels, num_classes, fusion_channels), freeze_encoder)

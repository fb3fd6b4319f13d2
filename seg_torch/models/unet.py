"""U-Net with any of timm's convolutional encoders."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from seg_torch.errors import InputError
from seg_torch.models import cpu
from seg_torch.models.base import EncoderModel, ceil_div, fit
from seg_torch.models.weights import timm_model


class EncoderDecoder(EncoderModel):
    """What U-Nets have in common: an encoder whose feature maps halve in size, step by step.

    Args:
        encoder: Float [N, 3, H, W] -> list of feature maps, with timm's `feature_info` and
            `pretrained_cfg`; each stride is twice the one before.
        freeze_encoder: Keep the encoder's parameters and BatchNorm statistics as they are; a number
            for so many epochs.

    Raises:
        InputError: The encoder's feature maps do not fit.
    """

    def __init__(self, encoder: nn.Module, freeze_encoder: bool | int) -> None:
        super().__init__(encoder, freeze_encoder)
        self.encoder_channels: list[int] = self.encoder.feature_info.channels()
        self.encoder_strides: list[int] = self.encoder.feature_info.reduction()
        doubled = [2 * stride for stride in self.encoder_strides[:-1]]
        if self.encoder_strides[1:] != doubled or self.encoder_strides[-1].bit_count() != 1:
            raise InputError(
                f"the encoder's feature maps have strides {self.encoder_strides}; U-Net needs each "
                "to be twice the one before, as in model.encoder=resnet34"
            )
        pretrained_cfg = self.encoder.pretrained_cfg
        channels_last_axis = getattr(encoder, "output_fmt", "NCHW") == "NHWC"
        if channels_last_axis or pretrained_cfg.get("fixed_input_size"):
            raise InputError(
                f"{pretrained_cfg.get('architecture', 'the encoder')} gives feature maps with "
                "channels last or takes one image size only; use a convolutional encoder, such as "
                "model.encoder=resnet34 or convnext_tiny"
            )


class DecoderStage(nn.Module):
    """Nearest upsampling, a skip connection, and two 3x3 convolutions with BatchNorm and ReLU."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *Conv2dNormActivation(in_channels + skip_channels, out_channels),
            *Conv2dNormActivation(out_channels, out_channels),
        )

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        if cpu.can_convolve_doubled(self, x, size):
            return cpu.convolve_doubled(self.convolutions, x, skip)
        x = fit(F.interpolate(x, scale_factor=2, mode="nearest"), size)
        return self.convolutions(x if skip is None else torch.cat([x, skip], dim=1))


class UNet(EncoderDecoder):
    """Encoder, and a decoder that goes back up through the encoder's feature maps.

    Source: Ronneberger, Fischer & Brox, U-Net: Convolutional Networks for Biomedical Image
    Segmentation (2015); padded convolutions and a pretrained encoder instead of the original ones.

    Args:
        encoder: A convolutional timm model made with `features_only=True`; each stride is twice
            the one before.
        num_classes: Number of classes K.
        decoder_channels: Channels of the decoder's stages, one per halving of the encoder.
        freeze_encoder: Keep the encoder's parameters and BatchNorm statistics as they are; a number
            for so many epochs.

    Raises:
        InputError: The encoder's feature maps or the number of `decoder_channels` do not fit.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
        freeze_encoder: bool | int = False,
    ) -> None:
        super().__init__(encoder, freeze_encoder)
        deepest = self.encoder_strides[-1]
        self.decoder_strides = [2**i for i in reversed(range(deepest.bit_length() - 1))]
        if len(decoder_channels) != len(self.decoder_strides):
            raise InputError(
                f"model.decoder_channels is {list(decoder_channels)}; an encoder of stride "
                f"{deepest} needs {len(self.decoder_strides)} numbers"
            )
        encoder_channels = dict(zip(self.encoder_strides, self.encoder_channels, strict=True))
        self.decoder = nn.ModuleList()
        in_channels = encoder_channels[deepest]
        for stride, out_channels in zip(self.decoder_strides, decoder_channels, strict=True):
            # Most encoders have no feature map at stride 1, ConvNeXt none at stride 2 either.
            skip_channels = encoder_channels.get(stride, 0)
            self.decoder.append(DecoderStage(in_channels, skip_channels, out_channels))
            in_channels = out_channels
        self.classifier = nn.Conv2d(in_channels, num_classes, 3, padding=1)
        for module in self.decoder.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        nn.init.xavier_uniform_(self.classifier.weight)
        nn.init.zeros_(cast(Tensor, self.classifier.bias))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute logits.

        Args:
            x: Float [N, 3, H, W], H and W >= 32.

        Returns:
            `out`: float [N, K, H, W].
        """
        height, width = x.shape[-2:]
        features = dict(zip(self.encoder_strides, self.encoder(x), strict=True))
        x = features[self.encoder_strides[-1]]
        for stride, stage in zip(self.decoder_strides, self.decoder, strict=True):
            skip = features.get(stride)
            # The skip's own size: an odd one is not twice the size of the next deeper map.
            size = (ceil_div(height, stride), ceil_div(width, stride))
            x = stage(x, skip, size if skip is None else skip.shape[-2:])
        return {"out": self.classifier(x)}


def unet(
    num_classes: int,
    encoder: str = "resnet34",
    weights: str | Path | None = "imagenet",
    freeze_encoder: bool | int = False,
    decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
) -> UNet:
    """Build a U-Net with a timm encoder.

    Args:
        num_classes: Number of classes K.
        encoder: Name of a convolutional timm model whose strides double, such as
            `resnet34`, `mobilenetv2_100`, `convnext_tiny` or, with the tag of its weights,
            `resnet50.a1_in1k`.
        weights: Of the encoder: `imagenet` (what timm publishes under the name), the path of a
            state dict of the timm model, or `None` for random ones.
        freeze_encoder: Keep the encoder's parameters and BatchNorm statistics as they are; a number
            for so many epochs.
        decoder_channels: Channels of the decoder's stages, one per halving of the encoder.

    Returns:
        Module: float [N, 3, H, W] -> {"out": logits [N, K, H, W]}.

    Raises:
        InputError: Unknown or unsuitable encoder, or weights that cannot be loaded or do not fit.
    """
    timm_encoder = timm_model(encoder, weights, features_only=True)
    return UNet(timm_encoder, num_classes, decoder_channels, freeze_encoder)

"""U-Net with any of timm's convolutional encoders."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.models import FeatureInfo
from torch import Tensor, nn

from seg_torch.errors import InputError
from seg_torch.models.weights import download_from_hugging_face, read_state_dict


class DecoderStage(nn.Module):
    """Upsampling, a skip connection, and two 3x3 convolutions with BatchNorm and ReLU."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(in_channels + skip_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        x = F.interpolate(x, size=size, mode="nearest")
        return self.convolutions(x if skip is None else torch.cat([x, skip], dim=1))


class UNet(nn.Module):
    """Encoder, and a decoder that goes back up through the encoder's feature maps.

    Source: Ronneberger, Fischer & Brox, U-Net: Convolutional Networks for Biomedical Image
    Segmentation (2015); padded convolutions and a pretrained encoder instead of the original ones.

    Args:
        encoder: A convolutional timm model made with `features_only=True`; each stride is twice
            the one before.
        num_classes: Number of classes C.
        decoder_channels: Channels of the decoder's stages, one per halving of the encoder.
        freeze_encoder: Keep the encoder's parameters and BatchNorm statistics as they are.

    Attributes:
        mean: Channel means of the images that the encoder was trained with, scaled to [0, 1].
        std: Their standard deviations.

    Raises:
        InputError: The encoder's feature maps or the number of `decoder_channels` do not fit.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
        freeze_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        pretrained_cfg = cast(dict[str, Any], encoder.pretrained_cfg)
        self.mean: tuple[float, ...] = tuple(pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(pretrained_cfg["std"])
        self.freeze_encoder = freeze_encoder
        encoder.requires_grad_(not freeze_encoder)

        feature_info = cast(FeatureInfo, encoder.feature_info)
        self.encoder_strides: list[int] = feature_info.reduction()
        deepest = self.encoder_strides[-1]
        doubled = [2 * stride for stride in self.encoder_strides[:-1]]
        if self.encoder_strides[1:] != doubled or deepest.bit_count() != 1:
            raise InputError(
                f"the encoder's feature maps have strides {self.encoder_strides}; U-Net needs each "
                "to be twice the one before, as in model.encoder=resnet34"
            )
        channels_last_axis = getattr(encoder, "output_fmt", "NCHW") == "NHWC"
        if channels_last_axis or pretrained_cfg.get("fixed_input_size"):
            raise InputError(
                f"{pretrained_cfg.get('architecture', 'the encoder')} gives feature maps with "
                "channels last or takes one image size only; use a convolutional encoder, such as "
                "model.encoder=resnet34 or convnext_tiny"
            )
        self.decoder_strides = [2**i for i in reversed(range(deepest.bit_length() - 1))]
        if len(decoder_channels) != len(self.decoder_strides):
            raise InputError(
                f"model.decoder_channels is {list(decoder_channels)}; an encoder of stride "
                f"{deepest} needs {len(self.decoder_strides)} numbers"
            )
        encoder_channels = dict(zip(self.encoder_strides, feature_info.channels(), strict=True))
        self.decoder = nn.ModuleList()
        in_channels = encoder_channels[deepest]
        for stride, out_channels in zip(self.decoder_strides, decoder_channels, strict=True):
            # Most encoders have no feature map at stride 1, ConvNeXt none at stride 2 either.
            skip_channels = encoder_channels.get(stride, 0)
            self.decoder.append(DecoderStage(in_channels, skip_channels, out_channels))
            in_channels = out_channels
        self.classifier = nn.Conv2d(in_channels, num_classes, 1)
        self.train()

    def train(self, mode: bool = True) -> "UNet":
        """Set training mode, except for the statistics of a frozen encoder."""
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute logits.

        Args:
            x: Float [N, 3, H, W], H and W >= 32.

        Returns:
            `out`: float [N, C, H, W].
        """
        height, width = x.shape[-2:]
        features = dict(zip(self.encoder_strides, self.encoder(x), strict=True))
        x = features[self.encoder_strides[-1]]
        for stride, stage in zip(self.decoder_strides, self.decoder, strict=True):
            skip = features.get(stride)
            # The skip's own size: an odd one is not twice the size of the next deeper map.
            size = (-(-height // stride), -(-width // stride)) if skip is None else skip.shape[-2:]
            x = stage(x, skip, size)
        return {"out": self.classifier(x)}


def unet(
    num_classes: int,
    encoder: str = "resnet34",
    weights: str | Path | None = "imagenet",
    freeze_encoder: bool = False,
    decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
) -> UNet:
    """Build a U-Net with a timm encoder.

    Args:
        num_classes: Number of classes C.
        encoder: Name of a convolutional timm model whose strides double, such as
            `resnet34`, `mobilenetv2_100`, `convnext_tiny` or, with the tag of its weights,
            `resnet50.a1_in1k`.
        weights: Of the encoder: `imagenet` (what timm publishes under the name), the path of a
            state dict of the timm model, or `None` for random ones.
        freeze_encoder: Keep the encoder's parameters and BatchNorm statistics as they are.
        decoder_channels: Channels of the decoder's stages, one per halving of the encoder.

    Returns:
        Module: float [N, 3, H, W] -> {"out": logits [N, C, H, W]}.

    Raises:
        InputError: Unknown or unsuitable encoder, or weights that cannot be had or do not fit.
    """
    return UNet(_encoder(encoder, weights), num_classes, decoder_channels, freeze_encoder)


def _encoder(name: str, weights: str | Path | None) -> nn.Module:
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(nearest)}?" if nearest else "see timm.list_models()"
        raise InputError(f"model.encoder is {name!r}, which timm does not have; {hint}")
    try:
        if weights is None:
            return timm.create_model(name, features_only=True)
        file = _published_file(name) if weights == "imagenet" else Path(weights)
        state_dict = read_state_dict(file)
        encoder = timm.create_model(
            name, features_only=True, pretrained=True, pretrained_cfg_overlay={"file": str(file)}
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n")[:2])
        raise InputError(f"timm cannot make {name!r} with weights {weights}: {reason}") from error

    # timm loads what fits and leaves the rest random without a word.
    given = {_fingerprint(tensor) for tensor in state_dict.values()}
    random = [k for k, p in encoder.named_parameters() if _fingerprint(p) not in given]
    if random:
        raise InputError(
            f"{file} does not fit the encoder {name}: no weights for {len(random)} of its "
            f"parameters, such as {', '.join(random[:3])}"
        )
    return encoder


def _published_file(name: str) -> Path:
    pretrained_cfg = timm.get_pretrained_cfg(name)
    if pretrained_cfg is None or not pretrained_cfg.hf_hub_id:
        raise InputError(
            f"timm publishes no weights of {name}; use model.weights=null, a file, or another "
            "model.encoder"
        )
    return download_from_hugging_face(pretrained_cfg.hf_hub_id, "model.safetensors")


def _fingerprint(tensor: Tensor) -> tuple[int, float, float]:
    """Tell one weight tensor from another, also after timm has renamed or reshaped it."""
    flat = tensor.detach().flatten()
    return flat.numel(), flat[0].item(), flat[-1].item()

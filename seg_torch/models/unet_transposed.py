"""The U-Net of TensorFlow's segmentation tutorial, which upsamples by transposed convolutions."""

from collections.abc import Sequence
from pathlib import Path

import torch
from timm.models import FeatureGraphNet
from torch import Tensor, nn

from seg_torch.errors import InputError
from seg_torch.models.base import fit
from seg_torch.models.unet import EncoderDecoder
from seg_torch.models.weights import timm_model

# The layers whose outputs at strides 2, 4, 8, 16 and 32 the tutorials take, by timm's names. For
# other encoders it is timm's own choice.
_SKIPS = {
    # Keras: block_1_expand_relu, block_3_expand_relu, block_6_expand_relu, block_13_expand_relu,
    # block_16_project, which is the convolution without its BatchNorm
    "mobilenetv2": "blocks.1.0.bn1 blocks.2.0.bn1 blocks.3.0.bn1 blocks.5.0.bn1 "
    "blocks.6.0.conv_pwl",
    # Keras: conv1/relu, pool2_relu, pool3_relu, pool4_relu, relu
    "densenet": "features.norm0 features.transition1.norm features.transition2.norm "
    "features.transition3.norm features.norm5",
}


class TransposedUNet(EncoderDecoder):
    """Encoder, and a decoder of transposed convolutions.

    Each of the four stages of the decoder doubles the size by a 3x3 transposed convolution of
    stride 2, followed by BatchNorm and ReLU, and appends the encoder's feature map of that size. A
    fifth transposed convolution gives the logits. There is no other convolution.

    Source: TensorFlow tutorials, Image segmentation (2019), with `pix2pix.upsample` of
    tensorflow_examples.

    Args:
        encoder: Gives feature maps at strides 2, 4, 8, 16 and 32.
        num_classes: Number of classes K.
        freeze_encoder: Keep the encoder's parameters and BatchNorm statistics as they are; a number
            for so many epochs.

    Raises:
        InputError: The encoder's feature maps have other strides.
    """

    def __init__(
        self, encoder: nn.Module, num_classes: int, freeze_encoder: bool | int = False
    ) -> None:
        super().__init__(encoder, freeze_encoder)
        if self.encoder_strides != [2, 4, 8, 16, 32]:
            raise InputError(
                f"the encoder's feature maps have strides {self.encoder_strides}; unet_transposed "
                "needs 2, 4, 8, 16, 32, as in model.encoder=mobilenetv2_100 or densenet121"
            )
        *skip_channels, in_channels = self.encoder_channels
        self.decoder = nn.ModuleList()
        for channels, skip in zip((512, 256, 128, 64), reversed(skip_channels), strict=True):
            doubling = _doubling(in_channels, channels, bias=False)
            stage = nn.Sequential(doubling, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
            self.decoder.append(stage)
            in_channels = channels + skip
        self.classifier = _doubling(in_channels, num_classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute logits.

        Args:
            x: Float [N, 3, H, W], H and W >= 32.

        Returns:
            `out`: float [N, K, H, W].
        """
        size = x.shape[-2:]
        *skips, x = self.encoder(x)
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            x = torch.cat([fit(stage(x), skip.shape[-2:]), skip], dim=1)
        return {"out": fit(self.classifier(x), size)}


def unet_transposed(
    num_classes: int,
    encoder: str = "mobilenetv2_100",
    weights: str | Path | None = "imagenet",
    freeze_encoder: bool | int = False,
) -> TransposedUNet:
    """Build the tutorial's U-Net with a timm encoder.

    The skip connections of a MobileNetV2 are those of the tutorial: the expanded features that go
    into each strided convolution, and the projection that ends the last block, before its
    BatchNorm. Those of a DenseNet come, as its Keras variant has them, after the BatchNorm and ReLU
    of the stem, of each transition and of the end.

    Args:
        num_classes: Number of classes K.
        encoder: Name of a timm model with feature maps at strides 2, 4, 8, 16 and 32, such as
            `mobilenetv2_100`, `densenet121` or `resnet34`.
        weights: Of the encoder: `imagenet` (what timm publishes under the name), the path of a
            state dict of the timm model, or `None` for random ones.
        freeze_encoder: Keep the encoder's parameters and BatchNorm statistics as they are; a number
            for so many epochs.

    Returns:
        Module: float [N, 3, H, W] -> {"out": logits [N, K, H, W]}.

    Raises:
        InputError: Unknown or unsuitable encoder, or weights that cannot be loaded or do not fit.
    """
    family = next((family for family in _SKIPS if encoder.startswith(family)), None)
    if family is None:
        timm_encoder = timm_model(encoder, weights, features_only=True)
    else:
        whole = timm_model(encoder, weights, num_classes=0)
        timm_encoder = _features_of(whole, _SKIPS[family].split())
    return TransposedUNet(timm_encoder, num_classes, freeze_encoder)


def _features_of(model: nn.Module, layers: Sequence[str]) -> nn.Module:
    """Turn a timm model into an encoder that returns what these five layers of it give."""
    feature_info = []
    for layer, stride in zip(layers, (2, 4, 8, 16, 32), strict=True):
        channels = len(model.get_parameter(f"{layer}.weight"))
        feature_info.append({"module": layer, "num_chs": channels, "reduction": stride})
    model.feature_info = feature_info  # type: ignore[assignment]
    encoder = FeatureGraphNet(model, out_indices=(0, 1, 2, 3, 4))
    encoder.pretrained_cfg = model.pretrained_cfg
    return encoder


def _doubling(in_channels: int, out_channels: int, bias: bool = True) -> nn.ConvTranspose2d:
    """Keras's `Conv2DTranspose(out_channels, 3, strides=2, padding="same")`, from H to 2H.

    Each reverses the padding of its framework's strided convolutions: PyTorch's encoders put one
    pixel before the image, Keras's one behind it.
    """
    return nn.ConvTranspose2d(
        in_channels, out_channels, 3, stride=2, padding=1, output_padding=1, bias=bias
    )

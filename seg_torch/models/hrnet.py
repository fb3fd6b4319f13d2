"""HRNetV2: high resolution from the first layer to the last."""

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from seg_torch.errors import check_choice
from seg_torch.models.base import EncoderModel, pad_to_multiple, without_padding
from seg_torch.models.weights import timm_model


class HRNetV2(EncoderModel):
    """Four parallel branches, brought to the finest resolution and concatenated.

    Source: Sun, Zhao, Jiang, Cheng, Xiao, Liu, Mu, Wang, Liu & Wang, High-Resolution
    Representations for Labeling Pixels and Regions (2019).

    Args:
        encoder: timm's HRNet, giving its branches at strides 4, 8, 16 and 32.
        num_classes: Number of classes K.
        extra_background: See `hrnet`.
    """

    def __init__(
        self, encoder: nn.Module, num_classes: int, extra_background: bool = False
    ) -> None:
        super().__init__(encoder)
        self.extra_background = extra_background
        channels = sum(self.encoder.feature_info.channels())
        self.head = nn.Sequential(
            *Conv2dNormActivation(channels, channels, kernel_size=1),
            nn.Conv2d(channels, num_classes + extra_background, 1),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute logits.

        Args:
            x: Float [N, 3, H, W].

        Returns:
            `out`: float [N, K, H/4, W/4], or [N, K, H, W] where 4 does not divide both; in training
            with an extra background K + 1 channels.
        """
        size = x.shape[-2:]
        # The branches exchange features by factors of exactly 2, 4 and 8.
        branches = self.encoder(pad_to_multiple(x, 32))
        finest = branches[0].shape[-2:]
        branches = [
            F.interpolate(branch, size=finest, mode="bilinear", align_corners=False)
            for branch in branches
        ]
        logits = self.head(torch.cat(branches, dim=1))
        if self.extra_background and not self.training:
            logits = logits[:, :-1]
        return {"out": without_padding(logits, size, 4)}


def hrnet(
    num_classes: int,
    encoder: str = "hrnet_w48",
    weights: str | Path | None = "imagenet",
    extra_background: bool = False,
) -> HRNetV2:
    """Build HRNetV2 with timm's HRNet.

    Args:
        num_classes: Number of classes K.
        encoder: `hrnet_w18`, `hrnet_w30`, `hrnet_w32`, `hrnet_w40`, `hrnet_w44`, `hrnet_w48` or
            `hrnet_w64`, where the number is the channels of the finest branch, or one of timm's
            variants of them, such as `hrnet_w18_small`.
        weights: Of the encoder: `imagenet` (what timm publishes under the name), the path of a
            state dict of the timm model, or `None` for random ones.
        extra_background: Give the network one output more than there are classes, as some published
            networks have it (33 for the 32 classes of CamVid). It is the last one, so that class
            ids keep their places. No label has it: training pushes it down with the softmax over
            all K + 1 outputs, and in evaluation mode it is left out, so that it is never predicted.
            A loss with one weight per class does not fit the K + 1 outputs, and says so.

    Returns:
        Module: float [N, 3, H, W] -> {"out": logits [N, K, H/4, W/4]}, see `HRNetV2`.

    Raises:
        InputError: Unknown encoder, or weights that cannot be loaded or do not fit.
    """
    check_choice("model.encoder", encoder.split(".")[0], timm.list_models("hrnet_*"))
    branches = timm_model(
        encoder,
        weights,
        features_only=True,
        feature_location="",  # without the layers that widen the branches for classification
        out_indices=(1, 2, 3, 4),  # without the stem
    )
    return HRNetV2(branches, num_classes, extra_background)

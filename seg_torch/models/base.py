"""What models have in common: an encoder of timm, and sizes that a model takes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg_torch.errors import InputError
from seg_torch.upsample import upsample


class EncoderModel(nn.Module):
    """A model with an encoder of timm, frozen or not.

    Args:
        encoder: With timm's `pretrained_cfg`.
        freeze_encoder: Keep the encoder's parameters and BatchNorm statistics as they are; a number
            for so many epochs of training, see `follow_epoch`.

    Attributes:
        mean: Channel means of the images that the encoder was trained with, scaled to [0, 1].
        std: Their standard deviations.
        frozen: Whether the encoder is to stay as it is now.

    Raises:
        InputError: `freeze_encoder` is neither true, false nor a number of epochs.
    """

    encoder: Any  # with what timm adds to a module

    def __init__(self, encoder: nn.Module, freeze_encoder: bool | int = False) -> None:
        super().__init__()
        if not isinstance(freeze_encoder, int) or freeze_encoder < 0:
            raise InputError(
                f"model.freeze_encoder={freeze_encoder}: expected true, false or a number of epochs"
            )
        self.encoder = encoder
        self.mean, self.std = image_statistics(encoder)
        self.frozen_epochs = math.inf if freeze_encoder is True else freeze_encoder
        self.frozen = self.frozen_epochs > 0
        # For some epochs it is frozen by its gradients: optimizers, schedules and processes that
        # train together know all of their parameters from the start.
        encoder.requires_grad_(freeze_encoder is not True)
        self.train()

    def follow_epoch(self, epoch: int) -> None:
        """Train the encoder from the epoch on, counted from 0, that `freeze_encoder` says."""
        if self.frozen != (frozen := epoch < self.frozen_epochs):
            self.frozen = frozen
            self.encoder.train(self.training and not frozen)

    def drop_gradients(self) -> None:
        """Let an optimizer pass over the encoder while it is frozen, with its weight decay, too."""
        if self.frozen:
            self.encoder.zero_grad(set_to_none=True)

    def train(self, mode: bool = True) -> "EncoderModel":
        """Set training mode, except for the statistics of a frozen encoder."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self


def image_statistics(encoder: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the images that a timm model was trained with.

    Of each channel, for images scaled to [0, 1].
    """
    return tuple(encoder.pretrained_cfg["mean"]), tuple(encoder.pretrained_cfg["std"])


def ceil_div(length: int, divisor: int) -> int:
    """Return the quotient, rounded up.

    Not by -(-length // divisor): ONNX rounds negative quotients towards zero.
    """
    return (length + divisor - 1) // divisor


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until height and width are multiples of a number.

    What the model makes of the padding is cut off by `without_padding`. Repeated pixels continue
    the image; zeros would draw an edge along it.

    Args:
        x: Float [N, C, H, W].
        multiple: Such as the stride of the model's deepest feature map.

    Returns:
        Float [N, C, H', W'], H' >= H and W' >= W; `x` itself where nothing is to be done.
    """
    height, width = x.shape[-2:]
    # An exported graph is for images of other sizes, too.
    wanted = torch.compiler.is_exporting() or height % multiple or width % multiple
    bottom = ceil_div(height, multiple) * multiple - height
    right = ceil_div(width, multiple) * multiple - width
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if wanted else x


def fit(x: Tensor, size: Sequence[int]) -> Tensor:
    """Cut one row or column, or repeat the last one: odd sizes are not twice the next smaller."""
    height, width = size
    if not torch.compiler.is_exporting() and x.shape[-2:] == (height, width):
        return x  # an exported graph is for images of other sizes, too
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), mode="replicate")


def without_padding(logits: Tensor, size: Sequence[int], stride: int, cells: int = 1) -> Tensor:
    """Return the logits of an image from those of the image that `pad_to_multiple` has made.

    Where the last row or column of logits lies on both sides of the image's edge, they are brought
    to the resolution of the pixels, and cut off there. Logits that were cut off before would be
    squeezed into the image.

    Args:
        logits: Float [N, K, h, w] of the padded image.
        size: (height, width) of the image.
        stride: Pixels, along each side, that `cells` rows or columns of logits cover.
        cells: Their number.

    Returns:
        Float [N, K, ...], at the resolution of `logits` or float32 of height x width.
    """
    common = math.gcd(stride, cells) if cells > 1 else 1
    stride, cells = stride // common, cells // common
    height, width = size
    rows, columns = ceil_div(height, stride), ceil_div(width, stride)
    logits = logits[..., : rows * cells, : columns * cells]
    if not torch.compiler.is_exporting() and height % stride == width % stride == 0:
        return logits
    return upsample(logits, (rows * stride, columns * stride))[..., :height, :width]

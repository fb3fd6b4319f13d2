"""The loss of whole images, whose logits come in blocks: tiles, or chunks of rows."""

import logging
from functools import cache
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn

from seg_torch.hardware import total_memory
from seg_torch.labels import IGNORE_INDEX
from seg_torch.losses.base import SegmentationLoss, Sums, WeightedSum
from seg_torch.losses.upsampled import LOSS_BYTES

log = logging.getLogger(__name__)


class ImageLoss:
    """The loss of one image as a whole, however its logits come.

    The sums of a `SegmentationLoss` add up over the blocks. For other losses, and where an image's
    share of the sums needs all of its labels, the blocks are put together.

    Args:
        loss: (logits float [N, C, H, W], target) -> scalar, in evaluation mode.
        target: uint8 [H, W].

    Attributes:
        labelled: Whether a pixel is; without one there is no loss.
        too_large: Whether there is none because the loss has to see a whole that does not fit into
            half of the memory.
    """

    def __init__(self, loss: nn.Module, target: Tensor) -> None:
        self.loss, self.target = loss, target
        self.labelled = (target != IGNORE_INDEX).any()
        self.too_large = False
        self.parts: Any = loss.losses if isinstance(loss, WeightedSum) else [loss]
        self.sums: dict[nn.Module, Sums] = {}
        self.whole: Tensor | None = None

    def add(self, rows: slice, columns: slice, logits: Tensor) -> None:
        """Add a block: logits [C, h, w] of some rows and columns."""
        additive = [part for part in self.parts if _adds_up(part)]
        for part in additive:
            sums = part.sums(logits[None], self.target[None, rows, columns])
            before = self.sums.get(part, (0,) * len(sums))
            self.sums[part] = tuple(a + b for a, b in zip(before, sums, strict=True))
        if len(additive) < len(self.parts):
            self._put_together(rows, columns, logits)

    def _put_together(self, rows: slice, columns: slice, logits: Tensor) -> None:
        size = self.target.shape
        if logits.shape[1:] == size:
            self.whole = logits
            return
        if self.whole is None and not self.too_large:
            needed = len(logits) * self.target.numel() * LOSS_BYTES
            self.too_large = needed > total_memory(logits.device) / 2
            if self.too_large:
                _warn(*size, round(needed / 1e9))
            else:
                self.whole = logits.new_empty(len(logits), *size)
        if self.whole is not None:
            self.whole[:, rows, columns] = logits

    def value(self) -> Tensor:
        """Return the loss, a float32 scalar, when all blocks were added; not if `too_large`."""
        whole: Any = None if self.whole is None else self.whole[None]
        values = [
            part.loss(self.sums[part]) if part in self.sums else part(whole, self.target[None])
            for part in self.parts
        ]
        return self.loss.total(values) if isinstance(self.loss, WeightedSum) else values[0]


def _adds_up(loss: nn.Module) -> bool:
    """Return whether a loss is a function of sums to which each pixel adds its own share."""
    return isinstance(loss, SegmentationLoss) and not loss.per_image


@cache  # once for each size
def _warn(height: int, width: int, gigabytes: int) -> None:
    log.warning(
        "val/loss leaves out images of %d x %d pixels: this loss has to see the whole of an image, "
        "which would take %d GB of memory; ce, focal, dice and tversky do not",
        height,
        width,
        gigabytes,
    )


class MeanImageLoss(torchmetrics.Metric):
    """The mean of the losses of images, each counting once; those without a loss do not count."""

    full_state_update = False

    total: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("images", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, image: ImageLoss) -> None:
        """Count an image; on CUDA without waiting for the device."""
        if not image.too_large:
            self.total = self.total + torch.where(image.labelled, image.value(), 0)
            self.images = self.images + image.labelled

    def compute(self) -> Tensor | None:
        """Return the mean so far, a float32 scalar; `None` if no image counted."""
        return self.total / self.images if self.images else None

"""What the metrics of a test take, parts of images, and what they share: how they count."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torchmetrics
from torch import Tensor

from seg_torch.hardware import CACHE_VALUES, row_chunks

CONFIDENCE_STEPS = 65536
# On CUDA, torch.bincount asks for the largest value, and waits for the device.
BINCOUNT_DEVICES = ("cpu", "mps")


@dataclass(frozen=True)
class ScoredBlock:
    """A rectangle of an image, in which the network decided every pixel.

    The blocks of an image come from the top down, those of the same rows from left to right, and
    hold each pixel once.

    Attributes:
        image: Number of the image in the dataset, in 0..N-1.
        rows: Of the image that the block covers.
        columns: Of the image that the block covers.
        logits: Float [C, rows, columns].
        image_prediction: uint8 [H, W], class ids in 0..C-1 of the whole image, complete up to the
            block.
        image_target: uint8 [H, W], class ids in 0..C-1 or `IGNORE_INDEX` of the whole image.
    """

    image: int
    rows: slice
    columns: slice
    logits: Tensor
    image_prediction: Tensor
    image_target: Tensor

    @property
    def prediction(self) -> Tensor:
        """uint8 [rows, columns], class ids in 0..C-1."""
        return self.image_prediction[self.rows, self.columns]

    @property
    def target(self) -> Tensor:
        """uint8 [rows, columns], class ids in 0..C-1 or `IGNORE_INDEX`."""
        return self.image_target[self.rows, self.columns]

    @property
    def is_last(self) -> bool:
        """Whether the image is complete."""
        return (self.rows.stop, self.columns.stop) == self.image_target.shape

    @cached_property
    def confidence(self) -> Tensor:
        """Of the prediction, int32 [rows, columns], see `confidence_steps`."""
        return confidence_steps(self.logits)


def confidence_steps(logits: Tensor) -> Tensor:
    """Return how sure the prediction of each pixel is: the highest of its softmax probabilities.

    In whole numbers, whose sums do not depend on the order in which they are added up.

    Args:
        logits: Float [C, H, W].

    Returns:
        int32 [H, W], the probability in steps of 1 / 65536; 0 where it is not a number.
    """
    num_classes, height, width = logits.shape
    most = CACHE_VALUES if logits.device.type == "cpu" else logits.numel()
    chunks = [logits[:, rows] for rows in row_chunks(height, num_classes * width, most)]
    highest = torch.cat([1 / (part.float() - part.amax(0)).exp_().sum(0) for part in chunks])
    return (highest.nan_to_num_() * CONFIDENCE_STEPS).round_().to(torch.int32)


class PixelCounts(torchmetrics.Metric):
    """A metric that counts pixels; processes add their counts up.

    Args:
        shape: Of the counts.

    Attributes:
        counts: int64.
    """

    full_state_update = False

    counts: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        empty = torch.zeros(shape, dtype=torch.int64)
        self.add_state("counts", default=empty, dist_reduce_fx="sum")


def count(bins: Tensor, num_bins: int) -> Tensor:
    """Count how often each of 0..num_bins-1 occurs: integer [...] to int64 [num_bins]."""
    bins = bins.flatten()
    if bins.device.type in BINCOUNT_DEVICES:
        return torch.bincount(bins, minlength=num_bins)
    bins = bins.long()
    return bins.new_zeros(num_bins).scatter_add_(0, bins, bins.new_ones(1).expand_as(bins))

"""Samples and a network that take known seconds, by sleeping, and memory that is known."""

import time

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from seg_torch.datasets import base
from seg_torch.labels import Labels

LABELS = Labels(("a", "b"))


class SlowImages(Dataset):
    """Images of 32 x 32 pixels, each of which takes some seconds to decode.

    Args:
        split: Of `empty_split` no pixel is labelled.
        length: Their number.
        seconds: Of decoding one.
        empty_split: A split, or none.
    """

    labels = LABELS

    def __init__(self, split: str, length: int, seconds: float, empty_split: str = "") -> None:
        self.length, self.seconds, self.empty = length, seconds, split == empty_split

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple:
        time.sleep(self.seconds)
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (32, 32, 3), np.uint8)
        mask = (image[..., 0] > 127).astype(np.uint8)
        return base.as_sample(image, np.full_like(mask, 255) if self.empty else mask)


class SlowModel(nn.Module):
    """A network that takes some seconds for a training batch, and others for an image in scoring.

    Args:
        num_classes: Number of classes.
        training: Seconds of a training batch.
        scoring: Seconds of an image.
        megabytes: That it keeps of each training image for the gradient.
    """

    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    batches = 0  # trained on, of all such networks

    def __init__(
        self, num_classes: int, training: float = 0.0, scoring: float = 0.0, megabytes: int = 0
    ) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, num_classes, 1)
        self.seconds, self.megabytes = (training, scoring), megabytes

    def forward(self, x: Tensor) -> Tensor:
        training, scoring = self.seconds
        time.sleep(training if self.training else scoring * len(x))
        logits = self.head(x)
        if self.training:
            SlowModel.batches += x.device.type != "meta"  # where a network is only looked at
            weight = self.head.bias.sum().expand(len(x) * self.megabytes, 1 << 18)
            kept = weight.exp()  # which its own gradient needs
            return logits + 0 * kept.sum()
        return logits

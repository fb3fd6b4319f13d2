"""What each image by itself was scored, and whose labels are likely to be wrong."""

import numpy as np
import torch
import torchmetrics
from torch import Tensor

from seg_torch.labels import IGNORE_INDEX
from seg_torch.metrics.blocks import CONFIDENCE_STEPS, PixelCounts, ScoredBlock, count
from seg_torch.metrics.counts import COUNTS

LABEL_TEMPERATURE = 0.1


class ImageScores(PixelCounts):
    """What each image by itself was scored: counts from which its IoU and accuracy follow.

    Args:
        num_classes: Number of classes C.
        num_images: Number of images N of the dataset.
    """

    confidence: Tensor
    blocks: Tensor

    def __init__(self, num_classes: int, num_images: int) -> None:
        super().__init__(num_images, 3, num_classes)
        for name in ("confidence", "blocks"):
            empty = torch.zeros(num_images, dtype=torch.int64)
            self.add_state(name, default=empty, dist_reduce_fx="sum")

    def update(self, block: ScoredBlock) -> None:
        """Count a part of an image; on CUDA without waiting for the device."""
        num_classes = self.counts.shape[-1]
        prediction, target = block.prediction, block.target
        ignored = target == IGNORE_INDEX
        maps = (target.masked_fill(prediction != target, num_classes), target, prediction)
        bins = [each.to(torch.int16).masked_fill(ignored, num_classes) for each in maps]
        counts = [count(each, num_classes + 1)[:-1] for each in bins]
        self.counts[block.image] += torch.stack(counts)
        self.confidence[block.image] += block.confidence.masked_fill(ignored, 0).sum()
        self.blocks[block.image] += 1

    def compute(self) -> dict[str, np.ndarray]:
        """Return the counts so far, over the labelled pixels of each image.

        Returns:
            int64 [N, C] `intersection` (pixels of the class in both), `label_pixels`
            and `predicted_pixels`; float32 [N] `confidence`, the mean over the pixels, or nan for
            an image without labelled pixels; bool [N] `scored`, whether any part of it was counted.
        """
        arrays = dict(zip(COUNTS, self.counts.cpu().clone().numpy().swapaxes(0, 1), strict=True))
        with np.errstate(invalid="ignore"):
            confidence = self.confidence.cpu().numpy() / arrays["label_pixels"].sum(1)
        arrays["confidence"] = (confidence / CONFIDENCE_STEPS).astype(np.float32)
        return {**arrays, "scored": self.blocks.cpu().numpy() > 0}


class LabelQuality(torchmetrics.Metric):
    """How likely the label of each image is to be right: the softmin score of cleanlab.

    The mean over the labelled pixels of s, the probability that the network gives the label,
    weighted by exp((1 - s) / 0.1), so that a few improbable labels count more than many probable
    ones (Lad and Mueller 2023, "Estimating label quality and errors in semantic segmentation data
    via any model"; the temperature is that of their code).

    Args:
        num_images: Number of images N of the dataset.
    """

    full_state_update = False

    sums: Tensor

    def __init__(self, num_images: int) -> None:
        super().__init__()
        self.add_state("sums", default=torch.zeros(num_images, 2), dist_reduce_fx="sum")

    def update(self, block: ScoredBlock) -> None:
        """Count a part of an image; on CUDA without waiting for the device."""
        logits, ignored = block.logits.float(), block.target == IGNORE_INDEX
        of_label = logits.gather(0, block.target.masked_fill(ignored, 0).long()[None])[0]
        probability = (of_label - logits.logsumexp(0)).exp()
        weight = ((1 - probability) / LABEL_TEMPERATURE).exp().masked_fill(ignored, 0)
        self.sums[block.image] += torch.stack([(weight * probability).sum(), weight.sum()])

    def compute(self) -> np.ndarray:
        """Return float32 [N] in [0, 1], or nan for an image without labelled pixels."""
        weighted, weights = self.sums.cpu().double().unbind(1)
        return (weighted / weights).float().numpy()

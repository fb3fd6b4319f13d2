"""Which images have labels that are likely to be wrong."""

import numpy as np
import torch
import torchmetrics
from torch import Tensor

from seg_torch.labels import IGNORE_INDEX
from seg_torch.metrics.blocks import ScoredBlock

LABEL_TEMPERATURE = 0.1


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

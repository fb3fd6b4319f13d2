"""What the probabilities are worth: how well they rank the pixels, and whether they hold."""

from typing import Any

import torch
from torch import Tensor

from seg_torch.labels import IGNORE_INDEX
from seg_torch.metrics.blocks import CONFIDENCE_STEPS, PixelCounts, ScoredBlock, count
from seg_torch.metrics.counts import number_or_none

SCORE_STEPS = 1024  # scores are rounded to multiples of 1 / 1024
CALIBRATION_BINS = 15


class AveragePrecision(PixelCounts):
    """Average precision of each class against all others, over the pixels of a whole dataset.

    The sum over n of (R_n - R_n-1) P_n, as in scikit-learn's `average_precision_score`: R_n and P_n
    are recall and precision of the pixels that score at least the n-th highest value. Scores are
    rounded to multiples of 1 / 1024 and counted, so the memory does not grow with the dataset, and
    the result is the same for every batch size and number of processes. (torchmetrics' binned
    `MulticlassAveragePrecision` compares every score with every threshold, which takes 2,000 times
    as long, and gives 0 to a class without labels.)

    Args:
        num_classes: Number of classes C.
    """

    def __init__(self, num_classes: int) -> None:
        # By class, whether the label is that class, and score.
        super().__init__(num_classes, 2, SCORE_STEPS + 1)

    def update(self, block: ScoredBlock) -> None:
        """Count a part of an image; on CUDA without waiting for the device."""
        probabilities, target = block.logits.float().softmax(0), block.target
        ignored = target == IGNORE_INDEX
        num_scores = SCORE_STEPS + 1
        counts = []
        for class_id in range(len(self.counts)):  # class by class: a C-th of the memory
            bins = (probabilities[class_id] * SCORE_STEPS).round().to(torch.int16)
            bins += num_scores * (target == class_id)
            bins.masked_fill_(ignored, 2 * num_scores)
            counts.append(count(bins, 2 * num_scores + 1)[:-1].view(2, num_scores))
        self.counts = self.counts + torch.stack(counts)

    def compute(self) -> Tensor:
        """Return float64 [C] on the CPU, in [0, 1], or nan for a class that no label names."""
        # Both cumulative from the highest score down.
        true_positives = self.counts[:, 1].cpu().flip(1).cumsum(1)
        selected = self.counts.sum(1).cpu().flip(1).cumsum(1)
        precision = true_positives / selected.clamp(min=1).double()
        labelled = true_positives[:, -1:].double()
        recall = true_positives / labelled  # 0 / 0 is the nan that the docstring promises
        return (recall.diff(dim=1, prepend=0 * labelled) * precision).sum(1)


class Calibration(PixelCounts):
    """Whether predictions are right as often as they are confident, over the labelled pixels."""

    def __init__(self) -> None:
        # By whether the prediction is right, and by confidence.
        super().__init__(2, CONFIDENCE_STEPS + 1)

    def update(self, block: ScoredBlock) -> None:
        """Count a part of an image; on CUDA without waiting for the device."""
        num_steps = CONFIDENCE_STEPS + 1
        bins = block.confidence + num_steps * (block.prediction == block.target)
        bins.masked_fill_(block.target == IGNORE_INDEX, 2 * num_steps)
        self.counts = self.counts + count(bins, 2 * num_steps + 1)[:-1].view(2, num_steps)

    def compute(self) -> dict[str, Any]:
        """Return the calibration error and the curve behind it, as plain data.

        Source: Guo, Pleiss, Sun & Weinberger, On Calibration of Modern Neural Networks (2017),
        equation 3, with their 15 bins of equal width; a bin holds its upper end.

        Returns:
            `expected_calibration_error`: the mean over the pixels of |accuracy - confidence| of
            their bin, in [0, 1], or `None` without labelled pixels; `reliability`: for each bin,
            its upper end `up_to`, its `pixels`, and their `accuracy` and mean `confidence` (`None`
            in an empty bin).
        """
        counts = self.counts.cpu()
        steps = torch.arange(CONFIDENCE_STEPS + 1)
        # Rounded up, in whole numbers: 0 is in the first bin, too.
        bins = ((steps * CALIBRATION_BINS - 1) // CONFIDENCE_STEPS).clamp(min=0)

        def in_bins(values: Tensor) -> Tensor:
            return torch.zeros(CALIBRATION_BINS, dtype=torch.int64).index_add(0, bins, values)

        pixels, correct = in_bins(counts.sum(0)), in_bins(counts[1])
        confident = in_bins(counts.sum(0) * steps) / CONFIDENCE_STEPS
        error = (correct - confident).abs().sum() / pixels.sum()
        columns = {
            "up_to": torch.arange(1, CALIBRATION_BINS + 1) / CALIBRATION_BINS,
            "pixels": pixels,
            "accuracy": correct / pixels.double(),
            "confidence": confident / pixels,
        }
        rows = [
            {name: number_or_none(values[index]) for name, values in columns.items()}
            for index in range(CALIBRATION_BINS)
        ]
        return {"expected_calibration_error": number_or_none(error), "reliability": rows}

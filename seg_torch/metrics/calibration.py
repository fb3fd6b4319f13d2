"""Whether a model is right as often as it is confident."""

from typing import Any

import torch
from torch import Tensor

from seg_torch.labels import IGNORE_INDEX
from seg_torch.metrics.blocks import CONFIDENCE_STEPS, PixelCounts, ScoredBlock, count
from seg_torch.metrics.counts import number_or_none

CALIBRATION_BINS = 15


class Calibration(PixelCounts):
    """Whether predictions are right as often as they are confident, over the labelled pixels."""

    def __init__(self) -> None:
        super().__init__(2, CONFIDENCE_STEPS + 1)  # by whether the prediction is right

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

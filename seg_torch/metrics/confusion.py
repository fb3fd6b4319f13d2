"""The confusion matrix of a dataset, and the scores that derive from it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seg_torch.errors import InputError
from seg_torch.labels import check_labels
from seg_torch.metrics.blocks import PixelCounts, count
from seg_torch.metrics.counts import class_scores, counts_of_matrix, mean_scores, number_or_none


class ConfusionMatrix(PixelCounts):
    """Counts of (label, prediction) pairs over a whole dataset.

    The counts are integers that add up, so the result is the same for every batch size and every
    number of processes.

    Args:
        num_classes: Number of classes C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, num_classes)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count a batch; on CUDA without waiting for the device.

        Args:
            prediction: Integer [...], class ids in 0..C-1 (also where the label is ignored).
            target: Integer, the shape of `prediction`, class ids in 0..C-1 or `IGNORE_INDEX`.

        Raises:
            InputError: The shapes differ or, on the CPU, a value is none of the above.
        """
        if prediction.shape != target.shape:
            raise InputError(
                f"predictions have shape {tuple(prediction.shape)}, labels {tuple(target.shape)}"
            )
        num_classes = len(self.counts)
        if target.device.type == "cpu" and target.numel():
            lowest, highest = prediction.aminmax()
            if lowest < 0 or highest >= num_classes:
                raise InputError(
                    f"predictions hold the values {prediction.unique().tolist()}; "
                    f"allowed are 0..{num_classes - 1}"
                )
            check_labels(target, num_classes)
        # The row after the last class takes the ignored pixels. On the CPU 16-bit bins take less
        # than half the time of 64-bit ones.
        num_bins = (num_classes + 1) * num_classes
        dtype = torch.int16 if num_bins <= torch.iinfo(torch.int16).max else torch.int32
        bins = target.clamp(max=num_classes).to(dtype) * num_classes + prediction.to(dtype)
        counts = count(bins, num_bins)
        self.counts = self.counts + counts[: num_classes**2].view(num_classes, num_classes)

    def compute(self) -> Tensor:
        """Return the counts so far: int64 [C, C], rows label, columns prediction."""
        return self.counts


def scores(matrix: Tensor) -> dict[str, Tensor]:
    """Derive every score from a confusion matrix, see `seg_torch.metrics.counts`.

    Args:
        matrix: Integer [C, C], rows label, columns prediction.

    Returns:
        On the CPU: float64 [C] `iou`, `accuracy`, `precision`, `recall` (another name of accuracy)
        and `dice`; int64 [C] `pixels`, the labelled pixels of each class; float64 scalars
        `mean_iou`, `pixel_accuracy`, `mean_accuracy`, `mean_dice`, `mean_precision` and
        `mean_recall`. All in [0, 1] or nan.
    """
    counts = counts_of_matrix(matrix.cpu().numpy())
    derived = {**mean_scores(counts), **class_scores(counts), "pixels": counts[1]}
    return {name: torch.as_tensor(values) for name, values in derived.items()}


def report(
    matrix: Tensor, names: Sequence[str], others: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Arrange the scores of a confusion matrix as plain data for a JSON file.

    Args:
        matrix: Integer [C, C], rows label, columns prediction.
        names: The C class names.
        others: More scores, float [C] each.

    Returns:
        The scalars of `scores` under their names, `per_class` (class name -> `iou`, `accuracy`,
        `precision`, `recall`, `dice`, `pixels`) and `confusion_matrix` (a list of rows);
        those of `others` per class, and their means as `mean_<name>`. A score that is not defined
        is `None`.
    """
    results = scores(matrix)
    for name, values in (others or {}).items():
        results[name] = values
        results[f"mean_{name}"] = values.nanmean()
    scalars = {key: number_or_none(value) for key, value in results.items() if value.ndim == 0}
    vectors = {key: value for key, value in results.items() if value.ndim == 1}
    per_class = {
        name: {key: number_or_none(values[class_id]) for key, values in vectors.items()}
        for class_id, name in enumerate(names)
    }
    return {**scalars, "per_class": per_class, "confusion_matrix": matrix.tolist()}

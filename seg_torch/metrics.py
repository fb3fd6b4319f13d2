"""One streaming confusion matrix, and every score derived from it; average precision apart."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torchmetrics
from torch import Tensor

from seg_torch.errors import InputError


class ConfusionMatrix(torchmetrics.Metric):
    """Counts of (label, prediction) pairs over a whole dataset.

    The counts are integers that add up, so the result is the same for every batch size and every
    number of processes.

    Args:
        num_classes: Number of classes C.
        ignore_index: Label of the pixels to leave out.

    Raises:
        InputError: `ignore_index` is negative.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    matrix: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        super().__init__()
        if ignore_index < 0:
            raise InputError(f"ignore_index is {ignore_index}; it must be 0 or more, such as 255")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        empty = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("matrix", default=empty, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            prediction: Integer [...], class ids in 0..C-1 (also where the label is ignored).
            target: Integer, the shape of `prediction`, class ids in 0..C-1 or `ignore_index`.

        Raises:
            InputError: The shapes differ or a value is none of the above.
        """
        if prediction.shape != target.shape:
            raise InputError(
                f"predictions of shape {tuple(prediction.shape)} cannot be compared with labels of "
                f"shape {tuple(target.shape)}"
            )
        if target.numel() == 0:
            return
        num_classes = self.num_classes
        lowest, highest = (int(value) for value in prediction.aminmax())
        if lowest < 0 or highest >= num_classes:
            raise InputError(
                f"predictions hold the values {prediction.unique().tolist()}; "
                f"allowed are 0..{num_classes - 1}"
            )
        lowest, highest = (int(value) for value in target.aminmax())
        if lowest < 0 or highest > max(num_classes - 1, self.ignore_index):
            raise self._bad_labels(target)

        # A row for every label value up to the highest one: ignored labels fall into a row of their
        # own and wrong ones show up without another pass over the pixels. On the CPU 16-bit bins
        # take less than half the time of 64-bit ones.
        num_rows = max(highest + 1, num_classes)
        narrow = num_rows * num_classes <= torch.iinfo(torch.int16).max
        dtype = torch.int16 if narrow else torch.int32
        bins = target.to(dtype) * num_classes + prediction.to(dtype)
        counts = torch.bincount(bins.flatten(), minlength=num_rows * num_classes)
        counts = counts.view(num_rows, num_classes)
        if highest >= self.ignore_index:
            counts[self.ignore_index] = 0
        if highest >= num_classes and counts[num_classes:].any():
            raise self._bad_labels(target)
        self.matrix = self.matrix + counts[:num_classes]

    def compute(self) -> Tensor:
        """Return the counts so far: int64 [C, C], rows label, columns prediction."""
        return self.matrix

    def _bad_labels(self, target: Tensor) -> InputError:
        return InputError(
            f"labels hold the values {target.unique().tolist()}; "
            f"allowed are 0..{self.num_classes - 1} and {self.ignore_index} (ignored)"
        )


class AveragePrecision(torchmetrics.Metric):
    """Average precision of each class against all others, over the pixels of a whole dataset.

    The sum over n of (R_n - R_n-1) P_n, as in scikit-learn's `average_precision_score`: R_n and P_n
    are recall and precision of the pixels that score at least the n-th highest value. Scores are
    rounded to multiples of 1 / `resolution` and counted, so the memory does not grow with the
    dataset, and the result is the same for every batch size and number of processes.

    Args:
        num_classes: Number of classes C.
        ignore_index: Label of the pixels to leave out.
        resolution: Steps between the scores 0 and 1.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    counts: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255, resolution: int = 1024) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.resolution = resolution
        # By class, whether the label is that class, and score.
        empty = torch.zeros(num_classes, 2, resolution + 1, dtype=torch.int64)
        self.add_state("counts", default=empty, dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            probabilities: Float [N, C, H, W] in [0, 1].
            target: Integer [N, H, W], class ids in 0..C-1 or `ignore_index`.
        """
        valid = target != self.ignore_index
        labels = target[valid]
        num_scores = self.resolution + 1
        counts = []
        for class_id in range(self.num_classes):  # class by class: a C-th of the memory
            scores = probabilities[:, class_id][valid]
            bins = (scores * self.resolution).round().long() + num_scores * (labels == class_id)
            counts.append(torch.bincount(bins, minlength=2 * num_scores).view(2, num_scores))
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


def scores(matrix: Tensor) -> dict[str, Tensor]:
    """Derive every score from a confusion matrix.

    A score whose denominator is zero is nan and left out of the mean over classes:

    - a class in neither labels nor predictions has no score at all;
    - a class that is predicted but never labelled has no accuracy (recall), and IoU, Dice and
      precision 0;
    - a class that is labelled but never predicted has no precision, and IoU, Dice and accuracy 0.

    Args:
        matrix: Integer [C, C], rows label, columns prediction.

    Returns:
        On the CPU: float64 [C] `iou`, `accuracy`, `precision`, `recall` (another name of accuracy)
        and `dice`; int64 [C] `pixels`, the labelled pixels of each class; float64 scalars
        `mean_iou`, `pixel_accuracy`, `mean_accuracy`, `mean_dice`, `mean_precision` and
        `mean_recall`. All in [0, 1] or nan.
    """
    matrix = matrix.cpu()
    pixels = matrix.sum(dim=1)
    correct = matrix.diagonal().double()
    labelled = pixels.double()
    predicted = matrix.sum(dim=0).double()
    # Floating-point division makes 0 / 0 the nan that the docstring promises.
    iou = correct / (labelled + predicted - correct)
    accuracy = correct / labelled
    precision = correct / predicted
    dice = 2 * correct / (labelled + predicted)
    return {
        "mean_iou": iou.nanmean(),
        "pixel_accuracy": correct.sum() / labelled.sum(),
        "mean_accuracy": accuracy.nanmean(),
        "mean_dice": dice.nanmean(),
        "mean_precision": precision.nanmean(),
        "mean_recall": accuracy.nanmean(),
        "iou": iou,
        "accuracy": accuracy,
        "precision": precision,
        "recall": accuracy,
        "dice": dice,
        "pixels": pixels,
    }


def report(
    matrix: Tensor, names: Sequence[str], average_precision: Tensor | None = None
) -> dict[str, Any]:
    """Arrange the scores of a confusion matrix as plain data for a JSON file.

    Args:
        matrix: Integer [C, C], rows label, columns prediction.
        names: The C class names.
        average_precision: Float [C], where it was computed.

    Returns:
        The scalars of `scores` under their names, `per_class` (class name -> `iou`, `accuracy`,
        `precision`, `recall`, `dice`, `pixels`) and `confusion_matrix` (a list of rows); with
        `average_precision` also that of each class, and `mean_average_precision`. A score that is
        not defined is `None`.
    """
    results = scores(matrix)
    per_class_keys = ["iou", "accuracy", "precision", "recall", "dice", "pixels"]
    if average_precision is not None:
        results["average_precision"] = average_precision
        results["mean_average_precision"] = average_precision.nanmean()
        per_class_keys.append("average_precision")
    scalars = {key: _plain(value) for key, value in results.items() if value.ndim == 0}
    per_class = {
        name: {key: _plain(results[key][class_id]) for key in per_class_keys}
        for class_id, name in enumerate(names)
    }
    return {**scalars, "per_class": per_class, "confusion_matrix": matrix.tolist()}


def _plain(value: Tensor) -> float | None:
    number = value.item()
    return None if math.isnan(number) else number

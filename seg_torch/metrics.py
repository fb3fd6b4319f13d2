"""Scores over a dataset, from sums of integers that are counted batch by batch.

Most derive from one confusion matrix; each of the others has counts of its own. All are the same
for every batch size and number of processes, and take the same memory however many pixels there
are.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import Tensor

from seg_torch.errors import InputError
from seg_torch.labels import IGNORE_INDEX
from seg_torch.losses import check_labels

SCORE_STEPS = 1024  # of average precision: scores are rounded to multiples of 1 / 1024
CONFIDENCE_STEPS = 65536
LABEL_TEMPERATURE = 0.1


class ConfusionMatrix(torchmetrics.Metric):
    """Counts of (label, prediction) pairs over a whole dataset.

    The counts are integers that add up, so the result is the same for every batch size and every
    number of processes.

    Args:
        num_classes: Number of classes C.
    """

    full_state_update = False

    matrix: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        empty = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("matrix", default=empty, dist_reduce_fx="sum")

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
                f"predictions of shape {tuple(prediction.shape)} cannot be compared with labels of "
                f"shape {tuple(target.shape)}"
            )
        if target.numel() == 0:
            return
        num_classes = self.num_classes
        if target.device.type == "cpu":
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
        counts = _count(bins, num_bins)
        self.matrix = self.matrix + counts[: num_classes**2].view(num_classes, num_classes)

    def compute(self) -> Tensor:
        """Return the counts so far: int64 [C, C], rows label, columns prediction."""
        return self.matrix


class AveragePrecision(torchmetrics.Metric):
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

    full_state_update = False

    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        # By class, whether the label is that class, and score.
        empty = torch.zeros(num_classes, 2, SCORE_STEPS + 1, dtype=torch.int64)
        self.add_state("counts", default=empty, dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Count a batch; on CUDA without waiting for the device.

        Args:
            probabilities: Float [N, C, H, W] in [0, 1].
            target: Integer [N, H, W], class ids in 0..C-1 or `IGNORE_INDEX`.
        """
        ignored = target == IGNORE_INDEX
        num_scores = SCORE_STEPS + 1
        counts = []
        for class_id in range(self.num_classes):  # class by class: a C-th of the memory
            bins = (probabilities[:, class_id] * SCORE_STEPS).round().to(torch.int16)
            bins += num_scores * (target == class_id)
            bins.masked_fill_(ignored, 2 * num_scores)
            counts.append(_count(bins, 2 * num_scores + 1)[:-1].view(2, num_scores))
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


class ImageScores(torchmetrics.Metric):
    """What each image by itself was scored: counts from which its IoU and accuracy follow.

    Args:
        num_classes: Number of classes C.
        num_images: Number of images N of the dataset.
    """

    full_state_update = False

    counts: Tensor
    confidence: Tensor

    def __init__(self, num_classes: int, num_images: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        empty = torch.zeros(num_images, 3, num_classes, dtype=torch.int64)
        self.add_state("counts", default=empty, dist_reduce_fx="sum")
        self.add_state("confidence", default=empty[:, 0, 0].clone(), dist_reduce_fx="sum")

    def update(self, index: int, prediction: Tensor, target: Tensor, confidence: Tensor) -> None:
        """Counts an image or a part of it; on CUDA without waiting for the device.

        Args:
            index: Number of the image, in 0..N-1.
            prediction: Integer [...], class ids in 0..C-1.
            target: Integer, the shape of `prediction`, class ids in 0..C-1 or `IGNORE_INDEX`.
            confidence: Of the prediction, see `confidence_steps`.
        """
        num_classes = self.num_classes
        ignored = target == IGNORE_INDEX
        maps = (target.masked_fill(prediction != target, num_classes), target, prediction)
        bins = [each.to(torch.int16).masked_fill(ignored, num_classes) for each in maps]
        self.counts[index] += torch.stack([_count(b, num_classes + 1)[:-1] for b in bins])
        self.confidence[index] += confidence.masked_fill(ignored, 0).sum()

    def compute(self) -> dict[str, np.ndarray]:
        """Returns the counts so far, over the labelled pixels of each image.

        Returns:
            int64 [N, C] `intersection` (pixels of the class in both), `label_pixels`
            and `predicted_pixels`; float32 [N] `confidence`, the mean over the pixels, or nan for
            an image without labelled pixels.
        """
        intersection, labelled, predicted = self.counts.cpu().clone().unbind(1)
        confidence = self.confidence.cpu().double() / (CONFIDENCE_STEPS * labelled.sum(1))
        return {
            "intersection": intersection.numpy(),
            "label_pixels": labelled.numpy(),
            "predicted_pixels": predicted.numpy(),
            "confidence": confidence.float().numpy(),
        }


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

    def update(self, index: int, logits: Tensor, target: Tensor) -> None:
        """Counts an image or a part of it; on CUDA without waiting for the device.

        Args:
            index: Number of the image, in 0..N-1.
            logits: Float [C, H, W].
            target: Integer [H, W], class ids in 0..C-1 or `IGNORE_INDEX`.
        """
        logits, ignored = logits.float(), target == IGNORE_INDEX
        own = logits.gather(0, target.masked_fill(ignored, 0).long()[None])[0]
        probability = (own - logits.logsumexp(0)).exp()
        weight = ((1 - probability) / LABEL_TEMPERATURE).exp().masked_fill(ignored, 0)
        self.sums[index] += torch.stack([(weight * probability).sum(), weight.sum()])

    def compute(self) -> np.ndarray:
        """Returns float32 [N] in [0, 1], or nan for an image without labelled pixels."""
        weighted, weights = self.sums.cpu().double().unbind(1)
        return (weighted / weights).float().numpy()


def confidence_steps(logits: Tensor) -> Tensor:
    """Returns how sure the prediction of each pixel is: the highest of its softmax probabilities.

    In whole numbers, whose sums do not depend on the order in which they are added up.

    Args:
        logits: Float [C, H, W].

    Returns:
        int32 [H, W], the probability in steps of 1 / 65536; 0 where it is not a number.
    """
    logits = logits.float()
    highest = 1 / (logits - logits.amax(0)).exp_().sum(0)
    return (highest.nan_to_num_() * CONFIDENCE_STEPS).round_().to(torch.int32)


def _count(bins: Tensor, num_bins: int) -> Tensor:
    """Count how often each of 0..num_bins-1 occurs: integer [...] to int64 [num_bins]."""
    if bins.device.type in ("cpu", "mps"):
        return torch.bincount(bins.flatten(), minlength=num_bins)
    return _count_without_waiting(bins.flatten().long(), num_bins)


def _count_without_waiting(bins: Tensor, num_bins: int) -> Tensor:
    """Count int64 [n]; `torch.bincount` asks the device for the largest value and waits for it."""
    return bins.new_zeros(num_bins).scatter_add_(0, bins, bins.new_ones(1).expand_as(bins))


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
    accuracy = correct / labelled
    per_class = {
        # Floating-point division makes 0 / 0 the nan that the docstring promises.
        "iou": correct / (labelled + predicted - correct),
        "accuracy": accuracy,
        "precision": correct / predicted,
        "recall": accuracy,
        "dice": 2 * correct / (labelled + predicted),
    }
    means = {f"mean_{name}": values.nanmean() for name, values in per_class.items()}
    pixel_accuracy = correct.sum() / labelled.sum()
    return {**means, "pixel_accuracy": pixel_accuracy, **per_class, "pixels": pixels}


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
    if average_precision is not None:
        results["average_precision"] = average_precision
        results["mean_average_precision"] = average_precision.nanmean()
    scalars = {key: _plain(value) for key, value in results.items() if value.ndim == 0}
    vectors = {key: value for key, value in results.items() if value.ndim == 1}
    per_class = {
        name: {key: _plain(values[class_id]) for key, values in vectors.items()}
        for class_id, name in enumerate(names)
    }
    return {**scalars, "per_class": per_class, "confusion_matrix": matrix.tolist()}


def _plain(value: Tensor) -> float | None:
    number = value.item()
    return None if math.isnan(number) else number

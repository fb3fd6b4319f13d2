"""Scores over a dataset, from sums of integers that are counted batch by batch.

Most derive from one confusion matrix; each of the others has counts of its own. All are the same
for every batch size and number of processes, and take the same memory however many pixels there
are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor

from seg_torch.errors import InputError
from seg_torch.labels import IGNORE_INDEX
from seg_torch.losses import check_labels
from seg_torch.metrics.counts import class_scores, counts_of_matrix, mean_scores

SCORE_STEPS = 1024  # of average precision: scores are rounded to multiples of 1 / 1024
CONFIDENCE_STEPS = 65536
LABEL_TEMPERATURE = 0.1
CALIBRATION_BINS = 15

# Logits that are looked at together on a CPU, in whose cache they stay.
CPU_BAND = 1 << 19


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
        """Count an image or a part of it; on CUDA without waiting for the device.

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
        """Return the counts so far, over the labelled pixels of each image.

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
        """Count an image or a part of it; on CUDA without waiting for the device.

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
        """Return float32 [N] in [0, 1], or nan for an image without labelled pixels."""
        weighted, weights = self.sums.cpu().double().unbind(1)
        return (weighted / weights).float().numpy()


class Calibration(torchmetrics.Metric):
    """Whether predictions are right as often as they are confident, over the labelled pixels."""

    full_state_update = False

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        # By whether the prediction is right, and by confidence.
        empty = torch.zeros(2, CONFIDENCE_STEPS + 1, dtype=torch.int64)
        self.add_state("counts", default=empty, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor, confidence: Tensor) -> None:
        """Count a batch; on CUDA without waiting for the device.

        Args:
            prediction: Integer [...], class ids.
            target: Integer, the shape of `prediction`, class ids or `IGNORE_INDEX`.
            confidence: Of the prediction, see `confidence_steps`.
        """
        num_steps = CONFIDENCE_STEPS + 1
        bins = confidence + num_steps * (prediction == target)
        bins.masked_fill_(target == IGNORE_INDEX, 2 * num_steps)
        self.counts = self.counts + _count(bins, 2 * num_steps + 1)[:-1].view(2, num_steps)

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
            {name: _plain(values[index]) for name, values in columns.items()}
            for index in range(CALIBRATION_BINS)
        ]
        return {"expected_calibration_error": _plain(error), "reliability": rows}


class BoundaryScores(torchmetrics.Metric):
    """How well the boundaries of each class are met, over a whole dataset.

    *Boundary IoU*: the IoU of a class, of those of its pixels alone that lie within a width of its
    boundary: of the labels' boundary for the labels, of the prediction's for the prediction. A
    pixel does if the square of 2 * width + 1 pixels around it holds a pixel of another class or
    reaches beyond the image. Source: Cheng, Girshick, Dollár, Berg & Kirillov, Boundary IoU (2021),
    with the erosion by squares of their code; here over the pixels of all images together, as
    `scores` has the IoU.

    *Boundary F*: 2 P R / (P + R), where P is the share of the prediction's boundary pixels that
    have a boundary pixel of the same class in the labels within the width (as above, in a square),
    and R is the reverse. A boundary pixel of a class has a pixel of another among its eight
    neighbours. The edge of the image is no boundary here: both maps would always have it in common.
    Source: Csurka, Larlus & Perronnin, What is a good evaluation measure for semantic
    segmentation? (2013); here over the boundary pixels of all images together.

    Ignored pixels are no class: they are neither counted nor *another class* to the pixels around
    them, whatever is predicted there. So a pixel next to an ignored region is at a boundary only if
    a labelled pixel of another class is near, which may lie beyond the region. Labels that leave
    all boundaries unlabelled, such as VOC's, have no boundary pixels, thus no boundary F worth the
    name, but still a boundary IoU.

    Args:
        num_classes: Number of classes C.
        width: In pixels; `None` for 2 % of each image's diagonal, at least 1.

    Raises:
        InputError: The width is below 1.
    """

    full_state_update = False

    counts: Tensor

    def __init__(self, num_classes: int, width: int | None = None) -> None:
        super().__init__()
        if width is not None and (not isinstance(width, int) or width < 1):
            raise InputError(
                f"boundary={width}: expected true for 2 % of the image's diagonal, or a width in "
                "pixels, 1 or more"
            )
        self.num_classes = num_classes
        self.width = width
        empty = torch.zeros(7, num_classes, dtype=torch.int64)
        self.add_state("counts", default=empty, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count an image; on CUDA without waiting for the device.

        Args:
            prediction: uint8 [H, W], class ids in 0..C-1.
            target: uint8 [H, W], class ids in 0..C-1 or `IGNORE_INDEX`.
        """
        height, width = target.shape
        reach = self.width or max(1, round(0.02 * math.hypot(height, width)))
        near_edge = torch.ones_like(target, dtype=torch.bool)
        near_edge[reach : height - reach, reach : width - reach] = False
        labelled = target != IGNORE_INDEX
        prediction = prediction.masked_fill(~labelled, IGNORE_INDEX)
        maps = (target, prediction)
        bands = [labelled & (near_edge | _near_another_class(ids, reach)) for ids in maps]
        lines = [labelled & _near_another_class(ids, 1) for ids in maps]
        both = bands[0] & bands[1] & (prediction == target)
        matched = [torch.zeros_like(labelled), torch.zeros_like(labelled)]
        for class_id in range(self.num_classes):
            of_class = [line & (ids == class_id) for line, ids in zip(lines, maps, strict=True)]
            if target.device.type == "cpu" and not (of_class[0].any() and of_class[1].any()):
                continue  # a GPU would have to be waited for
            for own, other, found in zip(of_class, reversed(of_class), matched, strict=True):
                found |= own & _maximum_within(other.byte(), reach).bool()
        chosen = zip((*bands, both, *lines, *matched), (*maps, target, *maps, *maps), strict=True)
        bins = [torch.where(mask, ids, self.num_classes).to(torch.int16) for mask, ids in chosen]
        self.counts = self.counts + torch.stack(
            [_count(each, self.num_classes + 1)[:-1] for each in bins]
        )

    def compute(self) -> dict[str, Tensor]:
        """Return `boundary_iou` and `boundary_f`, each float64 [C] on the CPU.

        In [0, 1], or nan for a class without boundary pixels in both labels and predictions.
        """
        label_band, predicted_band, both, *of_lines = self.counts.cpu().double()
        label_line, predicted_line, label_matched, predicted_matched = of_lines
        precision, recall = predicted_matched / predicted_line, label_matched / label_line
        f = (2 * precision * recall / (precision + recall)).nan_to_num()  # nothing matches: 0
        exists = label_line + predicted_line > 0
        return {
            "boundary_iou": both / (label_band + predicted_band - both),
            "boundary_f": torch.where(exists, f, math.nan),
        }


def _near_another_class(ids: Tensor, reach: int) -> Tensor:
    """Find pixels with a labelled one of another class in the square of 2 * reach + 1 around them.

    Args:
        ids: uint8 [H, W] of class ids and `IGNORE_INDEX`.
        reach: In pixels.

    Returns:
        bool [H, W]; whatever at ignored pixels.
    """
    upwards, downwards = ids + 1, IGNORE_INDEX - ids  # both 0 at ignored pixels: 255 + 1 overflows
    higher = _maximum_within(upwards, reach) != upwards
    return higher | (_maximum_within(downwards, reach) != downwards)


def _maximum_within(values: Tensor, reach: int) -> Tensor:
    """Return the maximum of uint8 [H, W] over the square of 2 * reach + 1 around each pixel."""
    for _ in range(2):
        values = F.pad(values, (reach, reach))
        covered = 1
        while covered < 2 * reach + 1:
            step = min(covered, 2 * reach + 1 - covered)
            values = torch.maximum(values[:, :-step], values[:, step:])
            covered += step
        values = values.T
    return values


def confidence_steps(logits: Tensor) -> Tensor:
    """Return how sure the prediction of each pixel is: the highest of its softmax probabilities.

    In whole numbers, whose sums do not depend on the order in which they are added up.

    Args:
        logits: Float [C, H, W].

    Returns:
        int32 [H, W], the probability in steps of 1 / 65536; 0 where it is not a number.
    """
    num_classes, height, width = logits.shape
    rows = height
    if logits.device.type == "cpu":
        rows = CPU_BAND // max(1, num_classes * width)
    bands = logits.split(max(1, rows), dim=1)
    highest = torch.cat([1 / (band.float() - band.amax(0)).exp_().sum(0) for band in bands])
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
    found = {**mean_scores(counts), **class_scores(counts), "pixels": counts[1]}
    return {name: torch.as_tensor(values) for name, values in found.items()}


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

"""The formulas of the scores, from three counts of pixels of each class.

The confusion matrix of a dataset, the counts of one image and the sums of a resample of images are
all scored here, so that they cannot disagree. NumPy alone: `seg-torch compare` does without torch.

Counts are whole numbers [..., 3, C], the three of `COUNTS` for each class. In every score 0 / 0 is
nan, "absent", which the means over classes leave out:

- a class in neither label nor prediction has no score at all;
- a class that is predicted but never labelled has no accuracy (recall), and IoU, Dice and
  precision 0;
- a class that is labelled but never predicted has no precision, and IoU, Dice and accuracy 0.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# Pixels of the class in label and prediction, in the label, and in the prediction where labelled.
COUNTS = ("intersection", "label_pixels", "predicted_pixels")


def counts_of_matrix(matrix: np.ndarray) -> np.ndarray:
    """Return counts [3, C] of a confusion matrix [C, C], rows label, columns prediction."""
    return np.stack([matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)])


def stack_counts(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return counts [..., 3, C] from the arrays [..., C] that `COUNTS` names."""
    return np.stack([arrays[name] for name in COUNTS], axis=-2)


def class_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the scores of each class.

    Args:
        counts: Whole numbers [..., 3, C].

    Returns:
        `iou`, `accuracy`, `precision`, `recall` (another name of accuracy) and `dice`, each float64
        [..., C] in [0, 1], or nan.
    """
    correct, labelled, predicted = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    with np.errstate(invalid="ignore"):
        accuracy = correct / labelled
        return {
            "iou": correct / (labelled + predicted - correct),
            "accuracy": accuracy,
            "precision": correct / predicted,
            "recall": accuracy,
            "dice": 2 * correct / (labelled + predicted),
        }


def mean_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the scores that are one number.

    Args:
        counts: Whole numbers [..., 3, C].

    Returns:
        `mean_<name>` of all `class_scores`, and `pixel_accuracy`, each float64 [...] in [0, 1], or
        nan.
    """
    means = {f"mean_{name}": mean_over_classes(v) for name, v in class_scores(counts).items()}
    return {**means, "pixel_accuracy": pixel_accuracy(counts)}


def mean_over_classes(values: np.ndarray) -> np.ndarray:
    """Return the mean of scores [..., C] over the classes that have one; nan if none has."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=-1) / np.isfinite(values).sum(axis=-1)


def pixel_accuracy(counts: np.ndarray) -> np.ndarray:
    """Return the share of the labelled pixels [...] that counts [..., 3, C] say are right."""
    correct, labelled, _ = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    with np.errstate(invalid="ignore"):
        return correct.sum(axis=-1) / labelled.sum(axis=-1)


def number_or_none(value: Any) -> Any:
    """Return the number that an array of one element holds; `None` for nan, as in JSON."""
    number = value.item()
    return None if math.isnan(number) else number

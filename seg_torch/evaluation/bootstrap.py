"""How certain scores are: the bootstrap over the images of a dataset."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seg_torch.errors import InputError

RESAMPLES = 2000
METHOD = (
    f"95 % intervals by the percentile bootstrap over images: {RESAMPLES:,} resamples of as many "
    "images, drawn with replacement (seed 0); each is scored as a whole dataset is"
)


class ImageCounts(NamedTuple):
    """What `<split>_images.npz` holds: pixels of each image and class, from which all IoU follow.

    Attributes:
        names: Of the N images.
        intersection: int64 [N, C], pixels of the class in label and prediction.
        label_pixels: int64 [N, C], pixels of the class in the label.
        predicted_pixels: int64 [N, C], pixels of the class in the prediction, where labelled.
    """

    names: list[str]
    intersection: np.ndarray
    label_pixels: np.ndarray
    predicted_pixels: np.ndarray

    @property
    def stacked(self) -> np.ndarray:
        """int64 [N, 3, C]: intersection, label and prediction."""
        return np.stack(self[1:], axis=1)


def read_image_counts(path: Path) -> ImageCounts:
    """Read `<split>_images.npz`.

    Raises:
        InputError: There is no such file, or something else in it.
    """
    try:
        with np.load(path) as file:
            return ImageCounts(file["names"].tolist(), *(file[n] for n in ImageCounts._fields[1:]))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: cannot be read as scores of images: {error}") from None


def class_iou(sums: np.ndarray) -> np.ndarray:
    """IoU of every class from pixels [..., 3, C] (intersection, label, prediction).

    Returns:
        float64 [..., C] in [0, 1]; nan for a class that neither label nor prediction has.
    """
    correct, labelled, predicted = np.moveaxis(sums, -2, 0).astype(float)
    with np.errstate(invalid="ignore"):
        return correct / (labelled + predicted - correct)


def mean_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return the scores of `seg_torch.metrics.scores` that are one number, from pixels [..., 3, C].

    Returns:
        float64 [...] in [0, 1], by name.
    """
    correct, labelled, predicted = np.moveaxis(sums, -2, 0).astype(float)
    with np.errstate(invalid="ignore"):
        per_class = {
            "iou": class_iou(sums),
            "accuracy": correct / labelled,
            "dice": 2 * correct / (labelled + predicted),
        }
        means = {
            f"mean_{name}": np.nansum(values, -1) / np.isfinite(values).sum(-1)
            for name, values in per_class.items()
        }
        return {**means, "pixel_accuracy": correct.sum(-1) / labelled.sum(-1)}


def resampled_sums(counts: np.ndarray, seed: int = 0) -> np.ndarray:
    """Sum over the images of each resample.

    The same number of images gives the same resamples, so that scores of two runs on the same
    images are paired.

    Args:
        counts: Integer [N, ...], a row for each image.
        seed: Of the resamples.

    Returns:
        float64 [RESAMPLES, ...], exact up to 2^53.
    """
    generator, images = np.random.default_rng(seed), len(counts)
    flat = counts.reshape(images, -1).astype(float)
    parts = [
        # How often each image is drawn; a few resamples at a time, for the memory's sake.
        generator.multinomial(images, np.full(images, 1 / images), RESAMPLES // 20) @ flat
        for _ in range(20)
    ]
    return np.concatenate(parts).reshape(RESAMPLES, *counts.shape[1:])


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper limit of the 95 % interval of resampled values [RESAMPLES, ...].

    Resamples without a value (nan) are left out; without any the limits are nan.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the latter
        low, high = np.nanpercentile(values, (2.5, 97.5), axis=0)
    return low, high


def p_value(differences: np.ndarray) -> float:
    """Two-sided p-value of the hypothesis that there is no difference.

    Twice the share of resampled differences [RESAMPLES] on the rarer side of zero, counted as
    (k + 1) / (R + 1) (Davison and Hinkley 1997, section 4.2), so never 0.
    """
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2 * (int(rarer) + 1) / (len(differences) + 1))

"""How certain scores are: the bootstrap over the images of a dataset."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seg_torch.errors import InputError, reason
from seg_torch.metrics.counts import stack_counts

RESAMPLES = 2000
METHOD = (
    f"95 % intervals by the percentile bootstrap over images: {RESAMPLES:,} resamples of as many "
    "images, drawn with replacement (seed 0); each is scored as a whole dataset is"
)


class ImageCounts(NamedTuple):
    """What `<split>_images.npz` holds: pixels of each image and class, from which all IoU follow.

    Attributes:
        names: Of the N images, in alphabetical order.
        counts: int64 [N, 3, C], see `seg_torch.metrics.counts`.
    """

    names: list[str]
    counts: np.ndarray


def read_image_counts(path: Path) -> ImageCounts:
    """Read `<split>_images.npz`, by name.

    Raises:
        InputError: There is no such file, or something else in it.
    """
    try:
        with np.load(path) as file:
            order = np.argsort(file["names"], kind="stable")
            return ImageCounts(file["names"][order].tolist(), stack_counts(file)[order])
    except Exception as error:  # there is no end to what damaged files raise
        raise InputError(f"{path}: cannot be read as scores of images: {reason(error)}") from None


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

"""What to know of a dataset before training, in sentences, and which images are in two splits."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from seg_torch.data.check import DatasetStatistics
from seg_torch.datasets.base import BaseDataset, image_files
from seg_torch.images.resize import Resize, seen_size
from seg_torch.labels import IGNORE_INDEX, Labels, near_equal

Statistics = dict[str, DatasetStatistics]  # by split
# Two `splits`, and of each the `indices` and `names` of an image; whether they are `exact`ly the
# same, and the correlation of their thumbnails (`similarity`).
Duplicate = dict[str, Any]

# Correlation of two thumbnails. An image that was re-encoded, halved or made 15 % brighter reaches
# 0.99 with itself, neighbouring frames of CamVid 0.93, other images of a dataset less.
NEAR = 0.98
# A crop that shows less of an image lacks what its objects stand in.
SMALL_CROP, GOOD_CROP = 0.05, 0.25


def find_duplicates(
    statistics: Statistics, originals: Mapping[str, BaseDataset]
) -> list[Duplicate]:
    """Return for each image of a split the one most like it in each earlier split, if any is."""
    duplicates = []
    vectors = {split: _normalised(measured.thumbnails) for split, measured in statistics.items()}
    for first, second in combinations(statistics, 2):
        same = {digest: i for i, digest in enumerate(statistics[first].digests.tolist()) if digest}
        for start in range(0, len(vectors[second]), 256):  # a block needs 256 x N numbers
            similarity = vectors[first] @ vectors[second][start : start + 256].T
            for j, i in enumerate(similarity.argmax(axis=0).tolist(), start):
                value = float(similarity[i, j - start])
                twin = same.get(bytes(statistics[second].digests[j]))
                if twin is None and value <= NEAR:
                    continue
                pair = {first: i if twin is None else twin, second: j}
                names = [originals[s].name(index, "image") for s, index in pair.items()]
                duplicates.append(
                    {
                        "splits": [*pair],
                        "indices": [*pair.values()],
                        "names": names,
                        "exact": twin is not None,
                        "similarity": round(value, 4) if twin is None else 1.0,
                    }
                )
    return duplicates


def _normalised(thumbnails: np.ndarray) -> np.ndarray:
    """Return vectors [N, 256] of mean 0 and length 1, whose products are correlations.

    An image without contrast, which would resemble every other, becomes zero.
    """
    vectors = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    vectors -= vectors.mean(axis=1, keepdims=True)
    contrast = vectors.std(axis=1, keepdims=True)  # in grey levels
    length = contrast * vectors.shape[1] ** 0.5
    return np.where(contrast > 2, vectors / np.maximum(length, 1), 0)


def describe(statistics: Statistics, labels: Labels, duplicates: Sequence[Duplicate]) -> list[str]:
    """Return what the numbers say, in sentences."""
    notes = []
    unlabelled = [
        f"{percent(measured.pixels[IGNORE_INDEX] / measured.pixels.sum())} in {split}"
        for split, measured in statistics.items()
        if measured.pixels[IGNORE_INDEX]
    ]
    if unlabelled:
        notes.append(
            f"255 stands for pixels that are not labelled, {', '.join(unlabelled)}: no loss and no "
            "score counts them."
        )
    known = set(labels.names)
    for split, measured in statistics.items():
        seen = measured.pixels[: len(labels)] > 0
        absent = [name for name, found in zip(labels.names, seen, strict=True) if not found]
        if split == "train" and len(labels) - len(absent) == 1 < len(labels):
            (only,) = {*labels.names}.difference(absent)
            notes.append(
                f"Every labelled pixel of train is {only}, so there is nothing to learn. Are the "
                "annotations where the format expects them?"
            )
        new = ", ".join(name for name in absent if name in known)
        if new:
            what = "never learnt" if split == "train" else "without a score there"
            notes.append(f"Never seen in {split}, so {what}: {new}.")
        if split == "train":
            known -= set(absent)
    for names in near_equal(labels.names):
        listed = ", ".join(map(repr, names))
        notes.append(f"The classes {listed} have nearly the same name: should they be one?")
    for first, second in combinations(statistics, 2):
        pairs = [d for d in duplicates if d["splits"] == [first, second]]
        if pairs:
            exact = sum(d["exact"] for d in pairs)
            notes.append(
                f"{len(pairs)} of {len(statistics[second].digests)} images of {second} are in "
                f"{first}, too: {exact} exactly, {len(pairs) - exact} nearly. Take them out of one "
                "of the two, else the scores flatter the model. "
                f"The first: {' and '.join(pairs[0]['names'])}."
            )
    return notes


def listed_twice(split: str, dataset: BaseDataset) -> list[str]:
    """Return a note if files of images occur several times in a split."""
    images = Counter(image_files(dataset))
    twice = [image for image, count in images.items() if count > 1]
    if not twice:
        return []
    return [f"{len(twice)} images of {split} count more than once, such as {twice[0]}."]


def small_crop(sizes: np.ndarray, resize: Resize, crop: Sequence[int] | None) -> list[str]:
    """Return a note if a training crop shows little of an image.

    Args:
        sizes: Height and width of the training images, [N, 2]; 0 for unusable ones.
        resize: At which size the network sees them, see `seg_torch.images.resize.seen_size`.
        crop: (height, width) of the crops.
    """
    sizes = sizes[sizes[:, 0] > 0]
    if crop is None or not len(sizes):
        return []
    median = sizes[np.argsort(sizes.prod(axis=1))[len(sizes) // 2]].tolist()
    height, width = seen_size(resize, *median)
    share = crop[0] * crop[1] / (height * width)
    if share >= SMALL_CROP:
        return []
    factor = math.sqrt(share / GOOD_CROP)
    smaller = [max(32, 32 * round(side * factor / 32)) for side in (height, width)]
    setting = f"data.resize=[{smaller[0]},{smaller[1]}]"
    shapes = sizes[:, 0] / sizes[:, 1]
    if isinstance(resize, int) or (resize is None and shapes.max() > 1.05 * shapes.min()):
        setting = f"data.max_side={max(smaller)}"
    return [
        f"A training crop of {crop[1]} x {crop[0]} pixels shows {percent(share)} of an image of "
        f"{width} x {height}: {setting} would show more of it, in less time; a "
        "larger data.augment.crop keeps the detail."
    ]


def percent(share: float) -> str:
    """Return a share as a text, with two digits or more."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.1f} %"

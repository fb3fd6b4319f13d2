"""What the check of a dataset finds doubtful about its images, and train reads all the same."""

import os

import numpy as np

from seg_torch.data.check import TURNED, UNCLEAR, DatasetStatistics, Problem
from seg_torch.datasets.base import BaseDataset
from seg_torch.files import by_suffix, is_hidden
from seg_torch.images.convert import likely_white
from seg_torch.images.format import DARK

# Photos, arrays and videos that no reader takes, which may lie between images that one does.
UNREAD = (
    *(".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef", ".orf", ".psd", ".raf"),
    *(".rw2", ".dcm", ".npy", ".npz", ".avi", ".m4v", ".mkv", ".mov", ".mp4"),
)


def too_dark(statistics: DatasetStatistics, dataset: BaseDataset) -> list[Problem]:
    """Return a problem where images of more than 8 bits become nearly black in RGB of 8 bits."""
    largest = int(statistics.largest.max(initial=0))
    if not dataset.format.is_rgb or dataset.format.white is not None or not 0 < largest < DARK:
        return []
    file = dataset.name(int(statistics.largest.argmax()), "image")
    count, white = np.count_nonzero(statistics.largest), likely_white(largest)
    text = (
        f"{file}: the values of {count} images reach {largest:,} of 65,535, so they would be "
        f"nearly black. If they are of {int(white + 1).bit_length() - 1} bits, set "
        f"data.white={white:g}; if they are as dark as that, data.white=65535"
    )
    return [Problem(file, text, {})]


def describe(split: str, statistics: DatasetStatistics, dataset: BaseDataset) -> list[str]:
    """Return notes: on what is left out of files and folders, dark and turned images."""
    notes, count = _left_out(split, dataset), len(statistics.digests)
    total = int(statistics.pixels.sum())
    if total > statistics.measured:
        share = 100 * (1 - int(statistics.measured) / total)
        notes.append(
            f"{share:.2g} % of the pixels of {split} hold no data (by a no-data value, a mask, or "
            "transparency): they count as not labelled."
        )
    if bands := np.flatnonzero(statistics.bands).tolist():
        notes.append(
            f"{len(bands)} of {count} images of {split} have a band beside red, green and blue "
            "that is no transparency, and is left out; data.channels=4 trains with it. The first: "
            f"{dataset.name(bands[0], 'image')}."
        )
    largest = int(statistics.largest.max(initial=0))
    if not dataset.format.is_rgb and dataset.format.channels == 3 and 0 < largest < DARK:
        notes.append(
            f"The values of {split} reach {largest:,} of 65,535: data.white="
            f"{likely_white(largest):g} makes them as bright as images of 8 bits."
        )
    return notes + _turned(split, statistics, dataset)


def _left_out(split: str, dataset: BaseDataset) -> list[str]:
    """Return a note on files beside the images that look like images, and are not read."""
    if dataset.pairs is None:
        return []
    paths = (dataset.pairs.strings(i)[1] for i in range(len(dataset.pairs)))
    folders = {os.path.dirname(path) for path in paths}
    names = [name for folder in folders if os.path.isdir(folder) for name in os.listdir(folder)]
    left = [n for n in names if n.lower().endswith(UNREAD) and not is_hidden(n)]
    if not left:
        return []
    return [
        f"Left out beside the images of {split}, since these formats are not read: "
        f"{by_suffix(left)}. Converted to PNG or JPEG they would count."
    ]


def _turned(split: str, statistics: DatasetStatistics, dataset: BaseDataset) -> list[str]:
    """Return notes on masks of photos that are turned by their EXIF orientation."""
    notes = []
    if found := np.flatnonzero(statistics.turns == TURNED).tolist():
        notes.append(
            f"{len(found)} masks of {split} have the size of their photo as it is stored, before "
            "its EXIF orientation turns it, and are turned as it is. The first: "
            f"{dataset.name(found[0])}."
        )
    if unclear := np.flatnonzero(statistics.turns == UNCLEAR).tolist():
        likely = "so they are probably wrong" if found else "look at some of them (inspect.html)"
        notes.append(
            f"{len(unclear)} photos of {split} are turned by their EXIF orientation, and their "
            "masks are not, though the size is the same. That is right where they were drawn on "
            f"the photo as it is seen; {likely}. The first: {dataset.name(unclear[0])}."
        )
    return notes

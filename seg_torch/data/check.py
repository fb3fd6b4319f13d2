"""One pass over all samples of a dataset: what is wrong with them, and what is in them."""

import hashlib
import inspect
import logging
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.progress import track

from seg_torch.data.regions import outlines, regions
from seg_torch.datasets.base import (
    BaseDataset,
    Pair,
    as_seen,
    check_sizes,
    checked_sample,
    in_threads,
    without_missing,
)
from seg_torch.errors import InputError
from seg_torch.files import cache_folder, write_atomically
from seg_torch.images.format import as_array
from seg_torch.images.missing import missing
from seg_torch.images.read import doubts, orientation

log = logging.getLogger(__name__)

MANY = 500  # samples from which on the check shows how far it is
THUMBNAIL = 16  # height and width
UNCLEAR, TURNED = 1, 2  # masks of photos that EXIF data turn


class Problem(NamedTuple):
    """What makes a sample unusable: the file, a sentence that names it, and the wrong values."""

    file: str
    message: str
    pixels: dict[str, int]


@dataclass
class DatasetStatistics:
    """What is in a dataset, and what is wrong with it; pixels are those of the usable samples.

    Attributes:
        pixels: Number of pixels of each mask value, int64 [256].
        images: Number of masks that hold each value, int64 [256].
        moments: Sums over the pixels of each channel and of its square, scaled to 0..1, float64
            [2, C].
        sizes: Height and width of each image, int64 [N, 2]; 0 for an unusable sample.
        digests: SHA-256 of each image's size and pixels, bytes [N]; b"" for an unusable sample.
        thumbnails: Each image in grey, uint8 [N, 16, 16].
        measured: Number of pixels that have data, int64; the moments are of these.
        largest: Value of each image of more than 8 bits, int64 [N]; 0 for others.
        bands: Whether each image has a band that is left out, bool [N].
        turns: Of each mask whether its photo is turned by EXIF data and it is not: `UNCLEAR` where
            it may have been drawn on the photo as it is seen, `TURNED` where its size says that it
            was not, else 0; uint8 [N].
        regions: Sample, class, number of pixels, top, left, height and width of connected regions
            of the masks at their own size, int32 [R, 7]; see `regions`.
        grey: Whether each image is seen in grey, with three equal channels, bool [N].
        upper: Number of pixels of each mask value in the upper half of the masks, int64 [256]; a
            row in the middle is of the lower one.
        outlines: Sides of the pixels of each class that are next to other classes, int64 [256].
        problems: All of them.
    """

    pixels: np.ndarray
    images: np.ndarray
    moments: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    thumbnails: np.ndarray
    measured: np.ndarray
    largest: np.ndarray
    bands: np.ndarray
    turns: np.ndarray
    regions: np.ndarray
    grey: np.ndarray
    upper: np.ndarray
    outlines: np.ndarray
    problems: list[Problem] = field(default_factory=list)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of each channel over all pixels, scaled to 0..1."""
        mean, square = self.moments / max(1, int(self.measured))
        variance = square - mean**2
        variance[variance < 1e-12] = 0  # a rounding error of a channel of one value
        return mean.tolist(), np.sqrt(variance).tolist()


def check(dataset: BaseDataset, name: str = "the dataset") -> DatasetStatistics:
    """Read every sample of a dataset once, image and mask, in threads.

    The result for a dataset of files without problems is remembered in
    `~/.cache/seg_torch/checked` (or below `XDG_CACHE_HOME`) for as long as the
    `fingerprint` of the dataset stays the same.

    Args:
        dataset: Any.
        name: What messages call it.

    Returns:
        The result, with all problems.
    """
    remembered, count = _remembered(dataset), len(dataset)
    if remembered is not None:
        # There is none, or a power failure left it empty.
        with suppress(Exception), np.load(remembered) as arrays:
            return DatasetStatistics(**arrays)
    bar = count >= MANY and sys.stdout.isatty()
    if count >= MANY:
        log.info("checking the %d samples of %s; with data.check=false train does not", count, name)
    result = _nothing(count)
    found = [result.regions]
    with closing(in_threads(partial(_examine, dataset), range(count))) as samples:  # for Ctrl-C
        progress = track(samples, f"Checking {name}", count, transient=True, disable=not bar)
        for index, outcome in enumerate(progress):
            if count >= MANY and not bar and (index + 1) % -(-count // 10) == 0:
                log.info("checked %d of %d", index + 1, count)
            if isinstance(outcome, list):
                result.problems += outcome
                continue
            (largest, band, result.turns[index]), *outcome = outcome
            pixels, moments, measured, result.sizes[index] = outcome[:4]
            result.digests[index], result.thumbnails[index] = outcome[4:6]
            result.grey[index], upper, outline, in_mask = outcome[6:]
            found.append(np.insert(in_mask, 0, index, axis=1))
            result.upper += upper
            result.outlines += outline
            result.largest[index], result.bands[index] = largest, bool(band)
            result.measured += measured
            result.pixels += pixels
            result.images += pixels > 0
            result.moments = result.moments + moments
    result.regions = np.concatenate(found)
    if remembered is not None and not result.problems:
        content = {key: value for key, value in vars(result).items() if key != "problems"}
        with suppress(OSError):  # the home folder may be read-only
            write_atomically(remembered, lambda path: np.savez(path, **content))
    return result


def _nothing(count: int) -> DatasetStatistics:
    """Return the statistics of so many samples of which none has been looked at."""
    return DatasetStatistics(
        pixels=np.zeros(256, np.int64),
        images=np.zeros(256, np.int64),
        moments=np.zeros((2, 1)),
        sizes=np.zeros((count, 2), np.int64),
        digests=np.zeros(count, "S64"),
        thumbnails=np.zeros((count, THUMBNAIL, THUMBNAIL), np.uint8),
        measured=np.zeros((), np.int64),
        largest=np.zeros(count, np.int64),
        bands=np.zeros(count, bool),
        turns=np.zeros(count, np.uint8),
        regions=np.zeros((0, 7), np.int32),
        grey=np.zeros(count, bool),
        upper=np.zeros(256, np.int64),
        outlines=np.zeros(256, np.int64),
    )


def _examine(dataset: BaseDataset, index: int) -> tuple | list[Problem]:
    """Return the measures of one sample, or all that is wrong with it."""
    problems: list[Problem] = []
    doubtful: tuple = (0, "", 0)

    def attempt(file: object, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (InputError, OSError) as error:  # OSError: from a dataset that somebody wrote
            problems.append(Problem(str(file), str(error), getattr(error, "pixels", {})))

    if dataset.pairs is None:
        sample = attempt(dataset.name(index), lambda: checked_sample(dataset, index))
        if sample is not None:
            image, mask = as_array(sample[0]), sample[1].numpy()
    else:  # what is wrong with the one file does not hide what is wrong with the other
        names = dataset.name(index, "image"), dataset.name(index)
        image = attempt(names[0], lambda: dataset.image(index))
        mask = attempt(names[1], lambda: dataset.mask(index))
        if not problems:
            pair = dataset.pairs[index]
            doubtful = _doubts(dataset, pair, image, mask)
            mask = as_seen(mask, image, pair.image, pair.mask)
            attempt(names[1], lambda: check_sizes(image, mask, *names))
        if not problems:
            mask = without_missing(mask, image)
    return problems or (doubtful, *_measure(image, mask, dataset.format.shown(image)))


def _doubts(
    dataset: BaseDataset, pair: Pair, image: np.ndarray, mask: np.ndarray
) -> tuple[int, str, int]:
    """Return the largest value of more than 8 bits, why a band is left out, and what is turned."""
    if dataset.format.is_rgb:
        turn, largest, band = doubts(pair.image)
    else:
        turn, largest = orientation(pair.image), image.max() if image.dtype == np.uint16 else 0
        band = ""
    turns = 0
    if 2 <= turn <= 8 and pair.mask != pair.image and orientation(pair.mask) == 1:
        height, width = image.shape[:2]
        lies = turn >= 5 and height != width
        turns = UNCLEAR if not lies else TURNED if mask.shape == (width, height) else 0
    return int(largest), band, turns


def _measure(image: np.ndarray, mask: np.ndarray, rgb_shown: np.ndarray) -> tuple:
    """Return pixels by mask value, moments and their pixels, and what else the check measures."""
    halves = mask[: len(mask) // 2], mask[len(mask) // 2 :]
    upper, lower = (np.bincount(half.ravel(), minlength=256) for half in halves)
    red, green, blue = np.moveaxis(rgb_shown, 2, 0)
    grey = bool((red == green).all() and (green == blue).all())
    hidden, measured = missing(image), mask.size
    rgb_image = Image.fromarray(rgb_shown)
    values = np.linspace(0, 1, np.iinfo(image.dtype).max + 1)
    if image is rgb_shown:  # Pillow counts in a fraction of the time
        counts = np.array(rgb_image.histogram()).reshape(3, 256)
    else:
        image = np.ma.getdata(image)
        valid = image.reshape(-1, image.shape[2]) if hidden is None else image[~hidden]
        measured, channels = len(valid), valid.T
        counts = np.stack([np.bincount(c, minlength=len(values)) for c in channels])
    moments = np.stack([counts @ values, counts @ values**2])
    digest = hashlib.sha256(str(image.shape).encode())
    digest.update(image.tobytes())
    small = rgb_image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    about_image = image.shape[:2], digest.hexdigest(), np.asarray(small), grey
    return upper + lower, moments, measured, *about_image, upper, outlines(mask), regions(mask)


def _remembered(dataset: BaseDataset) -> Path | None:
    """Return where the result for exactly these files, read in this way, is remembered."""
    files = dataset.fingerprint()
    if files is None:
        return None
    source = inspect.getsource(_measure) + inspect.getsource(sys.modules[regions.__module__])
    digest = hashlib.sha256((files + source).encode()).hexdigest()
    return cache_folder() / "checked" / f"{digest}.npz"

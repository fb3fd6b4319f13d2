"""What is in a dataset, as far as settings depend on it."""

from dataclasses import dataclass

import numpy as np

from seg_torch.data.check import DatasetStatistics
from seg_torch.data.module import SegmentationDataModule
from seg_torch.labels import IGNORE_INDEX

# Images are upright where so much of the pixels has another class in the upper half than in the
# lower one, or the mean brightness differs by so much of its standard deviation.
OTHER_CLASSES, OTHER_BRIGHTNESS = 0.1, 0.5


@dataclass(frozen=True)
class Fingerprint:
    """What is in the training images, at their own size; C classes, N images.

    Attributes:
        names: Of the classes.
        images: Number of images by split; `test` is left out where val stands in for it.
        sizes: Height and width, int64 [N, 2].
        pixels: Of each class, int64 [C].
        holders: Images that hold each class, int64 [C].
        thickness: Mean width of what each class covers, in pixels: twice its area over the length
            of its outline, as of a strip; infinite where it has no outline, float [C].
        unlabelled: Share of the pixels.
        grey: Whether all images have three equal channels.
        channels: Of the images.
        upright: Whether upper and lower half differ, as they do where there is a sky or a ground.
    """

    names: tuple[str, ...]
    images: dict[str, int]
    sizes: np.ndarray
    pixels: np.ndarray
    holders: np.ndarray
    thickness: np.ndarray
    unlabelled: float
    grey: bool
    channels: int
    upright: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image of median area."""
        height, width = self.sizes[np.argsort(self.sizes.prod(axis=1))[len(self.sizes) // 2]]
        return int(height), int(width)

    @property
    def one_size(self) -> bool:
        """Whether all images have one size."""
        return bool((self.sizes == self.sizes[0]).all())

    @property
    def one_shape(self) -> bool:
        """Whether the ratios of height to width differ by less than a tenth."""
        ratios = self.sizes[:, 0] / self.sizes[:, 1]
        return bool(ratios.max() < 1.1 * ratios.min())

    @property
    def shares(self) -> np.ndarray:
        """Share of each class among the labelled pixels, float [C]."""
        return self.pixels / max(1, self.pixels.sum())

    @property
    def rarest(self) -> tuple[str, float]:
        """Name and share of the rarest class that occurs."""
        present = np.flatnonzero(self.pixels)
        index = present[self.pixels[present].argmin()]
        return self.names[index], float(self.shares[index])


def fingerprint(data: SegmentationDataModule) -> Fingerprint:
    """Return what is in a dataset: of files from the check that reads them anyway.

    Raises:
        InputError: A split cannot be read, or its files cannot be used.
    """
    found = data.statistics()
    classes = len(data.labels)
    splits = [
        split for split in ("train", "val", "test") if split != "test" or not data.test_is_val
    ]
    pixels, outlines = found.pixels[:classes], found.outlines[:classes]
    with np.errstate(divide="ignore", invalid="ignore"):
        thickness = np.where(outlines > 0, 2 * pixels / outlines, np.inf)
    return Fingerprint(
        names=data.labels.names,
        images={split: len(data.dataset(split)) for split in splits},
        sizes=found.sizes[found.sizes[:, 0] > 0],
        pixels=pixels,
        holders=found.images[:classes],
        thickness=thickness,
        unlabelled=float(found.pixels[IGNORE_INDEX] / max(1, found.pixels.sum())),
        grey=bool(found.grey.all()),
        channels=data.format.channels,
        upright=_is_upright(found, classes),
    )


def _is_upright(found: DatasetStatistics, classes: int) -> bool:
    """Return whether classes or brightness are others in the upper half than in the lower one."""
    upper = found.upper[:classes].astype(float)
    lower = found.pixels[:classes] - upper
    shares = [half / max(1.0, half.sum()) for half in (upper, lower)]
    moved = np.abs(shares[0] - shares[1]).sum() / 2
    thumbnails = found.thumbnails.astype(float)
    half = thumbnails.shape[1] // 2
    change = thumbnails[:, :half].mean((1, 2)) - thumbnails[:, half:].mean((1, 2))
    contrast = max(1.0, float(thumbnails.std((1, 2)).mean()))
    return bool(moved > OTHER_CLASSES or abs(change.mean()) / contrast > OTHER_BRIGHTNESS)

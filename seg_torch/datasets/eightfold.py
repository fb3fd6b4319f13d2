"""A training set made eight times as large beforehand, in the manner of TensorFlow tutorials."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf

from seg_torch.datasets import base
from seg_torch.images.resize import resize_image, resize_mask


def central_crop(pixels: torch.Tensor) -> torch.Tensor:
    """Return the middle 0.7 of an image or mask [..., S, S], as TensorFlow rounds it."""
    side = pixels.shape[-1]
    margin = int((side - side * 0.7) / 2)
    return pixels[..., margin : side - margin, margin : side - margin]


# Of images float [3, H, W] in [0, 1].
COLOURS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "brightness": lambda image: image + 0.1,
    "gamma": lambda image: image**0.1,
    "hue": lambda image: tvf.adjust_hue(image, -0.1),
}
# Of images and masks [..., S, S].
GEOMETRY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "central crop": central_crop,
    "horizontal flip": lambda pixels: pixels.flip(-1),
    "vertical flip": lambda pixels: pixels.flip(-2),
    "rotation": lambda pixels: pixels.rot90(1, (-2, -1)),
}
VARIANTS = ("original", *COLOURS, *GEOMETRY)


def eightfold(dataset: Callable[..., Any], split: str, side: int = 128, **kwargs: Any) -> Any:
    """Return any dataset with its training split as an `EightFold`, val and test unchanged.

    Args:
        dataset: `dataset(split=..., **kwargs)` gives the samples.
        split: "train", "val" or "test".
        side: Height and width of the training samples.
        kwargs: `root` and other arguments, passed on to `dataset`.

    Returns:
        The samples of the split.
    """
    samples = dataset(split=split, **kwargs)
    return EightFold(samples, side) if split == "train" else samples


class EightFold(base.BaseDataset):
    """All samples unchanged, then all of them in each of seven variants: 8 x n samples.

    Images are resized to `side` x `side` first. The variants compute what TensorFlow computes
    on images in [0, 1] (`tf.image`: `adjust_brightness(0.1)`, `adjust_gamma(gamma=0.1)`,
    `adjust_hue(-0.1)`, `central_crop(0.7)` and `resize` back, `flip_left_right`,
    `flip_up_down`, `rot90`, which turns counter-clockwise). The result is rounded to the
    nearest of 256 levels, an error of 1/510 at most, and what brightness lifts above 1 becomes 1;
    TensorFlow goes on with floats up to 1.1.

    Args:
        dataset: Samples (image uint8 [3, H, W], mask uint8 [H, W]) with `labels` and `mask(i)`.
        side: Height and width of the result; one number, since a rotation exchanges the two.

    Attributes:
        dataset: The original samples.
    """

    def __init__(self, dataset: Any, side: int) -> None:
        self.dataset = base.as_dataset(dataset)
        self.size = (side, side)
        self.labels = dataset.labels

    def __len__(self) -> int:
        return len(VARIANTS) * len(self.dataset)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        variant, original = divmod(index, len(self.dataset))
        image, mask = self.dataset[original]
        image = change_colours(resize_image(image, self.size), VARIANTS[variant])
        image = resize_image(change_geometry(image, VARIANTS[variant]), self.size)
        return tv_tensors.Image(image), tv_tensors.Mask(self._mask(mask, VARIANTS[variant]))

    @property
    def base_dataset(self) -> base.BaseDataset:
        """The original samples."""
        return self.dataset

    def name(self, index: int, kind: str = "mask") -> str:
        """Return what the original sample is called."""
        return self.dataset.name(index % len(self.dataset), kind)

    def mask(self, index: int) -> np.ndarray:
        """Return the mask alone, uint8 [side, side]."""
        variant, original = divmod(index, len(self.dataset))
        mask = torch.from_numpy(self.dataset.mask(original))
        return self._mask(mask, VARIANTS[variant]).numpy()

    def _mask(self, mask: torch.Tensor, variant: str) -> torch.Tensor:
        # By nearest neighbour both times. The tutorial resizes bilinearly, which averages ids: an
        # edge between hair (19) and background (0) becomes a bracelet (9).
        return resize_mask(change_geometry(resize_mask(mask, self.size), variant), self.size)


def change_colours(image: torch.Tensor, variant: str) -> torch.Tensor:
    """Return the image uint8 [3, H, W] with the colours of a variant, the same shape and type."""
    if variant not in COLOURS:
        return image
    return (COLOURS[variant](image / 255) * 255).round().clamp(max=255).to(torch.uint8)


def change_geometry(pixels: torch.Tensor, variant: str) -> torch.Tensor:
    """Return image or mask [..., S, S] with the geometry of a variant; the crop is [..., s, s]."""
    return GEOMETRY[variant](pixels) if variant in GEOMETRY else pixels

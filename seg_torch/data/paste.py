"""Regions of rare classes that are pasted from one training image into another.

A simple copy-paste as of Ghiasi et al. 2021, without blending, of single regions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision import tv_tensors

from seg_torch.data.rare import Regions
from seg_torch.errors import InputError
from seg_torch.images.resize import resize_image, resize_mask

MOST = 4  # regions that are pasted into an image

Box = tuple[int, int, int, int, int]  # class, top, left, height, width


class Donors:
    """Draws regions of the training images that are pasted into others.

    Args:
        samples: (image, mask) of each number, at the size that the network sees.
        regions: Those that may be pasted.
    """

    def __init__(self, samples: Any, regions: Regions) -> None:
        self.samples, self.regions = samples, regions
        self.ends = np.append(0.0, np.cumsum(regions.chances))

    def draw(self, image: int) -> tuple[Any, Any, list[Box]]:
        """Return another image, its mask, and up to `MOST` of its regions.

        Args:
            image: Which one they are not of.

        Returns:
            No regions, where all are of this image.
        """
        images, ends = self.regions.table[:, 0], self.ends
        own = np.searchsorted(images, (image, image + 1))
        before, after = ends[own]
        if own[1] - own[0] == len(images):
            return None, None, []
        place = torch.rand((), dtype=torch.float64).item() * (ends[-1] - (after - before))
        place += (after - before) * (place >= before)
        row = min(int(np.searchsorted(ends, place, "right")) - 1, len(images) - 1)
        first, last = np.searchsorted(images, (images[row], images[row] + 1))
        count = min(int(torch.randint(MOST, ())), last - first)
        chances = torch.from_numpy(self.regions.chances[first:last])
        others = [first + i for i in torch.multinomial(chances, count).tolist()] if count else []
        donor, mask = self.samples[int(images[row])]
        rows = dict.fromkeys([row, *others])
        return donor, mask, [self.regions.box(each, mask.shape) for each in rows]


class PasteRegions(nn.Module):
    """Pastes regions of rare classes from another training image, each at a random place.

    A region is scaled and flipped by itself. It covers neither pixels of a class that is rarer nor
    such as are not labelled.

    Args:
        probability: That anything is pasted into an image.
        scale: Range of a region's factor; `None` for no scaling.
        flip: Probability that a region is flipped horizontally.

    Attributes:
        draw: Gives what is pasted, see `Donors.draw`. `None` until the data module knows it:
            nothing is pasted.
        shares: Of the pixels of each value of a mask, see `Regions`.

    Raises:
        InputError: The probability is none.
    """

    draw: Callable[[], tuple[Any, Any, list[Box]]] | None = None
    shares: torch.Tensor

    def __init__(self, probability: float, scale: Sequence[float] | None, flip: float) -> None:
        super().__init__()
        if not isinstance(probability, int | float) or not 0 <= probability <= 1:
            raise InputError(f"augment.paste={probability}: expected 0 to 1")
        self.probability, self.flip = float(probability), float(flip)
        self.scale = (1.0, 1.0) if scale is None else (float(scale[0]), float(scale[1]))

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[Any, Any]:
        """Return a sample (image [C, H, W], mask uint8 [H, W]) with what is pasted into it."""
        if self.draw is None or torch.rand(()).item() >= self.probability:
            return image, mask
        image, mask = (part.as_subclass(torch.Tensor).clone() for part in (image, mask))
        donor, donor_mask, boxes = self.draw()
        for kind, top, left, height, width in boxes:
            place = slice(top, top + height), slice(left, left + width)
            pixels = donor.as_subclass(torch.Tensor)[:, place[0], place[1]]
            region = donor_mask.as_subclass(torch.Tensor)[place] == kind
            self._paste(image, mask, kind, *self._changed(pixels, region))
        return tv_tensors.Image(image), tv_tensors.Mask(mask)

    def _changed(
        self, pixels: torch.Tensor, region: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pixels [C, H, W] of a box and which are the region's, scaled and flipped."""
        smallest, largest = self.scale
        share, flip = torch.rand(2).tolist()
        factor = smallest + share * (largest - smallest)
        size = [max(1, round(side * factor)) for side in region.shape]
        pixels, region = resize_image(pixels, size), resize_mask(region.byte(), size).bool()
        return (pixels.flip(-1), region.flip(-1)) if flip < self.flip else (pixels, region)

    def _paste(
        self,
        image: torch.Tensor,
        mask: torch.Tensor,
        kind: int,
        pixels: torch.Tensor,
        region: torch.Tensor,
    ) -> None:
        """Write a region to a random place of an image and its mask; what is outside is cut off."""
        inside: list[slice] = []
        part: list[slice] = []
        for full, side, share in zip(mask.shape, region.shape, torch.rand(2).tolist(), strict=True):
            slack = full - side  # negative: the region is larger than the image
            first = min(0, slack) + int(share * (abs(slack) + 1))
            inside.append(slice(max(first, 0), min(first + side, full)))
            part.append(slice(inside[-1].start - first, inside[-1].stop - first))
        rows, columns = inside
        below = mask[rows, columns]
        written = region[part[0], part[1]] & (self.shares[below.long()] >= self.shares[kind])
        below[written] = kind
        image[:, rows, columns][:, written] = pixels[:, part[0], part[1]][:, written]

"""The one way in which images and masks are resized, in training as in prediction."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tvf

# (height, width) at which a network sees every image; or their longest side; or their own size.
Resize = Sequence[int] | int | None

SMALLEST = 32  # pixels of a side; networks need so many


def seen_size(resize: Resize, height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) at which a network sees an image.

    Args:
        resize: (height, width) for every image, whatever its shape; or a number, from 32, for
            images that are reduced, never enlarged, so that no side is longer, and keep their
            shape, but for a side that would come below 32 pixels; `None` for their own size.
        height: Of the image, like the width. In a graph that is exported it may be symbolic.
        width: Of the image.
    """
    if resize is None:
        return height, width
    if not isinstance(resize, int):
        return resize[0], resize[1]
    # Of an image that is not larger this is `resize`, and each side stays what it is.
    longest: Any = torch.sym_max(torch.sym_max(height, width), resize)
    seen = [(2 * side * resize + longest) // (2 * longest) for side in (height, width)]
    least: Any = [torch.sym_min(side, SMALLEST) for side in (height, width)]
    return torch.sym_max(seen[0], least[0]), torch.sym_max(seen[1], least[1])


def in_words(resize: Resize) -> str:
    """Return how a network sees images, such as "at [128, 128]"."""
    if isinstance(resize, int):
        return f"with no side longer than {resize} pixels"
    return f"at {'their own size' if resize is None else list(resize)}"


def resize_image(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return an image uint8 [..., H, W] at `size` = (height, width), bilinear and anti-aliased."""
    return tvf.resize_image(image, list(size), antialias=True)


def resize_mask(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return a mask uint8 [H, W] at `size` = (height, width).

    Each new pixel is the one under its centre, as in the bilinear resize of the image and in
    PyTorch's `nearest-exact`. torchvision's own resize of a mask uses `nearest`, which is off by
    half a pixel.
    """
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new)
        for new, old in zip(size, mask.shape, strict=True)
    )
    # NumPy's look-up takes a quarter of the time of PyTorch's interpolation.
    return torch.from_numpy(mask.numpy().take(rows, 0).take(columns, 1))

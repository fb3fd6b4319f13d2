"""Joint transforms of image and mask, built on torchvision.transforms.v2.

Masks are only ever moved by nearest neighbour, and every pixel that a transform invents is
`IGNORE_INDEX` in the mask, so no transform can make a label that was not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from seg_torch.errors import InputError
from seg_torch.labels import IGNORE_INDEX

# ImageNet's mean colour: padding that is close to zero after normalisation.
PADDING_COLOUR = (124.0, 116.0, 104.0)


def resize_image(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return an image uint8 [..., H, W] at `size` = (height, width), bilinear and anti-aliased."""
    return tvf.resize_image(image, list(size), antialias=True)


def resize_mask(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return a mask uint8 [H, W] at `size` = (height, width).

    `nearest-exact` takes the pixel under the centre of the new one, as the bilinear resize of the
    image does. torchvision's own resize of a mask uses `nearest`, which is off by half a pixel.
    """
    return torch.nn.functional.interpolate(mask[None, None], list(size), mode="nearest-exact")[0, 0]


class RandomScaleCrop(v2.Transform):
    """Scale by a random factor and cut a random window of fixed size.

    The window is cut from the original first and only then resized, which costs the same for every
    image size. Where the scaled image is smaller than the window, the rest of the image is
    ImageNet's mean colour and the rest of the mask is ignored.

    Args:
        size: (height, width) of the result.
        scale: Range of the factor; `None` for no scaling.

    Raises:
        InputError: The size is not two positive numbers, or the range is not positive and ordered.
    """

    def __init__(self, size: Sequence[int], scale: Sequence[float] | None = (0.5, 2.0)) -> None:
        super().__init__()
        self.size = _height_width("augment.crop", size)
        self.scale = (1.0, 1.0) if scale is None else (float(scale[0]), float(scale[1]))
        if not 0 < self.scale[0] <= self.scale[1]:
            raise InputError(f"augment.scale={list(self.scale)}: expected 0 < smallest <= largest")

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = torch.empty(1).uniform_(*self.scale).item()
        params = {}
        for side, full, target in zip("hw", tvf.get_size(flat_inputs[0]), self.size, strict=True):
            window = max(1, round(target / factor))
            slack = full - window  # negative: the window sticks out of the image
            low, high = min(0, slack), max(0, slack)
            params[side] = window
            params["top" if side == "h" else "left"] = int(torch.randint(low, high + 1, ()))
        return params

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        top, left, height, width = params["top"], params["left"], params["h"], params["w"]
        full_height, full_width = inpt.shape[-2:]
        window = inpt[
            ...,
            max(top, 0) : min(top + height, full_height),
            max(left, 0) : min(left + width, full_width),
        ]
        padding = [
            max(-left, 0),
            max(-top, 0),
            max(left + width - full_width, 0),
            max(top + height - full_height, 0),
        ]
        if isinstance(inpt, tv_tensors.Mask):
            if any(padding):
                window = tvf.pad_mask(window, padding, fill=IGNORE_INDEX)
            return tv_tensors.Mask(resize_mask(window, self.size))
        if any(padding):
            window = tvf.pad_image(window, padding, fill=list(PADDING_COLOUR))
        return tv_tensors.Image(resize_image(window, self.size))


def augment(
    crop: Sequence[int] | None = None,
    scale: Sequence[float] | None = (0.5, 2.0),
    flip: float = 0.5,
    jitter: float | Sequence[float] | None = 0.25,
    hue: float = 0.05,
) -> v2.Transform:
    """Return the training transform: random scale and crop, horizontal flip, colour jitter.

    Args:
        crop: (height, width) of the window; `None` leaves size and scale as they are.
        scale: Range of the random factor, `None` for none; needs `crop`.
        flip: Probability of a horizontal flip.
        jitter: Largest relative change of brightness, contrast and saturation, one number for all
            or three; `None` for no change of colour at all, hue included.
        hue: Largest change of hue, as a fraction of the colour circle.

    Returns:
        A transform of (image uint8 [3, H, W], mask uint8 [H, W]), both tv_tensors.

    Raises:
        InputError: `crop` or `scale` is not what `RandomScaleCrop` takes.
    """
    steps: list[v2.Transform] = []
    if crop is not None:
        steps.append(RandomScaleCrop(crop, scale))
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    if jitter is not None:
        brightness, contrast, saturation = (
            (jitter, jitter, jitter) if isinstance(jitter, int | float) else jitter
        )
        steps.append(v2.ColorJitter(brightness, contrast, saturation, hue))
    return v2.Compose(steps or [v2.Identity()])


def _height_width(name: str, size: Sequence[int]) -> tuple[int, int]:
    if isinstance(size, (str, int)) or len(size) != 2 or min(size) < 1:
        raise InputError(f"{name}={size}: expected [height, width]")
    return int(size[0]), int(size[1])

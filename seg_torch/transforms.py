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
        params: dict[str, Any] = {}
        before, after = [], []
        full_size = tvf.get_size(flat_inputs[0])
        for start, side, full, target in zip(
            ("top", "left"), "hw", full_size, self.size, strict=True
        ):
            window = max(1, round(target / factor))
            slack = full - window  # negative: the window sticks out of the image
            first = int(torch.randint(min(0, slack), max(0, slack) + 1, ()))
            before.append(max(-first, 0))
            after.append(max(first + window - full, 0))
            params |= {start: max(first, 0), side: window}
        # As torchvision takes it: left, top, right, bottom.
        return {**params, "padding": [*before[::-1], *after[::-1]]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        is_mask = isinstance(inpt, tv_tensors.Mask)
        if any(params["padding"]):
            fill: Any = IGNORE_INDEX if is_mask else list(PADDING_COLOUR)
            inpt = tvf.pad(inpt, params["padding"], fill=fill)
        window = tvf.crop(inpt, *(params[key] for key in ("top", "left", "h", "w")))
        if is_mask:
            return tv_tensors.Mask(resize_mask(window, self.size))
        return tv_tensors.Image(resize_image(window, self.size))


class _ColourJitter(v2.ColorJitter):
    """torchvision's on one thread, as in a worker process, so that both give the same bits.

    Contrast is relative to the mean of the image, whose last bits depend on the number of threads.
    """

    def forward(self, *inputs: Any) -> Any:
        threads = torch.get_num_threads()
        if threads == 1:
            return super().forward(*inputs)
        torch.set_num_threads(1)
        try:
            return super().forward(*inputs)
        finally:
            torch.set_num_threads(threads)


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
        changes = [jitter] * 3 if isinstance(jitter, int | float) else jitter
        steps.append(_ColourJitter(*changes, hue))
    return v2.Compose(steps or [v2.Identity()])


def _height_width(name: str, size: Sequence[int]) -> tuple[int, int]:
    if isinstance(size, (str, int)) or len(size) != 2 or min(size) < 1:
        raise InputError(f"{name}={size}: expected [height, width]")
    return int(size[0]), int(size[1])

"""Joint transforms of image and mask, built on torchvision.transforms.v2.

Masks are only ever moved by nearest neighbour, and every pixel that a transform invents is
`IGNORE_INDEX` in the mask, so no transform can make a label that was not there.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from seg_torch.data.paste import Box, Donors, PasteRegions
from seg_torch.errors import InputError
from seg_torch.images.resize import resize_image, resize_mask
from seg_torch.labels import IGNORE_INDEX

# ImageNet's mean colour: padding that is close to zero after normalisation.
PADDING_COLOUR = (124, 116, 104)

# From RGB to NTSC's luma and two chroma axes (FCC 1953); the first row is the grey of a colour.
YIQ = torch.tensor(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]],
    dtype=torch.float64,
)
RGB = torch.linalg.inv(YIQ)


class RandomScaleCrop(v2.Transform):
    """Scale by a random factor and cut a random window of fixed size.

    The window is cut from the original first and only then resized, which costs the same for every
    image size. Where the scaled image is smaller than the window, the rest of the image is
    ImageNet's mean colour (of other than three channels the image's own mean) and the rest of the
    mask is ignored.

    Args:
        size: (height, width) of the result.
        scale: Range of the factor; `None` for no scaling.

    Attributes:
        aim: The window shows the region of this box, at a random place in it, or a part of it where
            it is larger. `None`: it may be anywhere.

    Raises:
        InputError: The size is not two positive numbers, or the range is not positive and ordered.
    """

    aim: Box | None = None

    def __init__(self, size: Sequence[int], scale: Sequence[float] | None = (0.5, 2.0)) -> None:
        super().__init__()
        if isinstance(size, (str, int)) or len(size) != 2 or min(size) < 1:
            raise InputError(f"augment.crop={size}: expected [height, width]")
        self.size = int(size[0]), int(size[1])
        self.scale = (1.0, 1.0) if scale is None else (float(scale[0]), float(scale[1]))
        if not 0 < self.scale[0] <= self.scale[1]:
            raise InputError(f"augment.scale={list(self.scale)}: expected 0 < smallest <= largest")

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        smallest, largest = self.scale
        share, *shares = torch.rand(3).tolist()
        factor = smallest + share * (largest - smallest)
        params: dict[str, Any] = {}
        before, after = [], []
        full_size = tvf.get_size(flat_inputs[0])
        spans = [None, None] if self.aim is None else _spans(self.aim, flat_inputs)
        for start, side, full, target, share, span in zip(
            ("top", "left"), "hw", full_size, self.size, shares, spans, strict=True
        ):
            window = max(1, round(target / factor))
            slack = full - window  # negative: the window sticks out of the image
            lowest, highest = min(0, slack), max(0, slack)
            if span is not None:
                (begin, end), place = span
                begin, end = (begin, end) if end - begin <= window else (place, place + 1)
                lowest, highest = max(lowest, end - window), min(highest, begin)
            first = lowest + int(share * (highest - lowest + 1))
            before.append(max(-first, 0))
            after.append(max(first + window - full, 0))
            params |= {start: max(first, 0), side: window}
        # As torchvision takes it: left, top, right, bottom.
        return {**params, "padding": [*before[::-1], *after[::-1]]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        top, left, height, width = (params[key] for key in ("top", "left", "h", "w"))
        pixels = inpt.as_subclass(torch.Tensor)[..., top : top + height, left : left + width]
        if isinstance(inpt, tv_tensors.Mask):
            pixels = _padded(pixels[None], params["padding"], (IGNORE_INDEX,))[0]
            return tv_tensors.Mask(resize_mask(pixels, self.size))
        colour = PADDING_COLOUR
        if len(pixels) != 3 and any(params["padding"]):
            colour = inpt.as_subclass(torch.Tensor).float().mean((1, 2))
        pixels = _padded(pixels, params["padding"], colour)
        return tv_tensors.Image(resize_image(pixels, self.size))


def _spans(aim: Box, flat_inputs: list[Any]) -> list[tuple[tuple[int, int], int]]:
    """Return first and last row of a region, and the row of a random pixel of it; columns, too."""
    kind, top, left, height, width = aim
    place = (top + height // 2, left + width // 2)
    for mask in (part for part in flat_inputs if isinstance(part, tv_tensors.Mask)):
        box = mask.as_subclass(torch.Tensor)[top : top + height, left : left + width]
        if len(found := (box == kind).nonzero()):  # else the mask was resized, or is not the same
            row, column = found[torch.randint(len(found), ())].tolist()
            place = (top + row, left + column)
    return [((top, top + height), place[0]), ((left, left + width), place[1])]


def _padded(
    pixels: torch.Tensor, padding: Sequence[int], colour: Sequence[int] | torch.Tensor
) -> torch.Tensor:
    """Return pixels [C, H, W] with so many of a colour at left, top, right and bottom."""
    if not any(padding):
        return pixels
    left, top, right, bottom = padding
    height, width = top + pixels.shape[1] + bottom, left + pixels.shape[2] + right
    # Row by row, with the channels of a pixel side by side as they come from a file, this takes a
    # third of the time of torchvision's pad.
    row = torch.as_tensor(colour).to(pixels.dtype).repeat(width)
    canvas = row.repeat(height, 1).view(height, width, -1).permute(2, 0, 1)
    canvas[:, top : height - bottom, left : width - right] = pixels
    return canvas


class ColourJitter(v2.Transform):
    """Changes brightness, contrast, saturation and hue at random, in one pass over the image.

    The changes are those of `torchvision.transforms.v2.ColorJitter`, in random order, too. Each is
    linear in the three channels, so their product is one 3 x 3 matrix, which takes a tenth of
    the time. So values are clamped and rounded once, at the end, and the hue turns about the grey
    axis of YIQ (as in NVIDIA DALI's `color_twist`), not about that of HSV. The matrix is rounded
    to multiples of 2^-12: then float32 is exact, and the result the same for any number of threads.

    Images of other than three channels, or of 16 bits, stay as they are.

    Args:
        brightness: Largest relative change.
        contrast: Largest relative change of the distance from the image's mean grey.
        saturation: Largest relative change of the distance from each pixel's grey.
        hue: Largest change, as a fraction of the colour circle.

    Raises:
        InputError: A change is negative, or one of the hue above 0.5.
    """

    _transformed_types = (tv_tensors.Image,)

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float) -> None:
        super().__init__()
        self.changes = (float(brightness), float(contrast), float(saturation), float(hue))
        if min(self.changes) < 0 or hue > 0.5:
            raise InputError(
                f"augment.jitter={list(self.changes[:3])}, augment.hue={hue}: expected numbers "
                "from 0, for the hue at most 0.5"
            )

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        changes = [
            centre - min(change, 1) + share * (change + min(change, 1))
            for centre, change, share in zip(
                (1, 1, 1, 0), self.changes, torch.rand(4).tolist(), strict=True
            )
        ]
        return colour_matrices(*changes, torch.randperm(4).tolist())  # type: ignore[call-arg]

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        image = inpt.as_subclass(torch.Tensor)
        if len(image) != 3 or image.dtype != torch.uint8:
            return inpt
        # Columns first, in 32 bits: a fifth of the time of a sum in 64.
        mean = image.sum(1, dtype=torch.int32).sum(1).double() / image[0].numel()
        offset = _rounded(params["of_mean"] @ mean + 0.5)[:, None]  # 0.5: converting rounds down
        red, green, blue = _rounded(params["of_pixel"]).T[:, :, None]
        pixels = image.to(torch.float32, memory_format=torch.contiguous_format).flatten(1)
        changed = red * pixels[0]
        changed.addcmul_(green, pixels[1]).addcmul_(blue, pixels[2]).add_(offset)
        # By way of 16 bits, since PyTorch has vector instructions for these two conversions only.
        changed = changed.clamp_(0, 255).to(torch.int16).to(torch.uint8)
        return tv_tensors.Image(changed.view(inpt.shape))


def _rounded(values: torch.Tensor) -> torch.Tensor:
    return (values * 4096).round().div(4096).float()


def colour_matrices(
    brightness: float, contrast: float, saturation: float, hue: float, order: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Return changes of colour as matrices: new = `of_pixel` @ pixel + `of_mean` @ image's mean.

    Args:
        brightness: Factor of the pixel.
        contrast: Factor of its difference from the grey of the image's mean.
        saturation: Factor of its difference from its own grey.
        hue: Fraction of a turn by which red goes towards green.
        order: In which the four above (0 to 3) are applied.

    Returns:
        Two float64 [3, 3].
    """
    identity, grey = torch.eye(3, dtype=torch.float64), YIQ[:1].expand(3, 3)
    cos, sin = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    turn = torch.tensor([[1, 0, 0], [0, cos, sin], [0, -sin, cos]], dtype=torch.float64)
    change = (
        brightness * identity,
        contrast * identity,
        saturation * identity + (1 - saturation) * grey,
        RGB @ turn @ YIQ,
    )
    of_pixel, of_mean = identity, 0 * identity
    for step in order:
        mean = of_pixel + of_mean  # what the image's mean is before this step
        of_pixel, of_mean = change[step] @ of_pixel, change[step] @ of_mean
        if step == 1:
            of_mean = of_mean + (1 - contrast) * grey @ mean
    return {"of_pixel": of_pixel, "of_mean": of_mean}


def leaves_its_input(transform: Any) -> bool:
    """Return whether a transform is of those of `augment`, none of which works in place."""
    flips = (v2.RandomHorizontalFlip, v2.RandomVerticalFlip, v2.RandomRotation)
    known = (RandomScaleCrop, PasteRegions, *flips, ColourJitter, v2.Identity)
    return all(type(step) in known for step in steps(transform))


def steps(transform: Any) -> Iterator[Any]:
    """Yield the steps of a transform, also of those that it is composed of."""
    if type(transform) in (v2.Compose, v2.RandomApply):
        for step in transform.transforms:
            yield from steps(step)
    else:
        yield transform


def for_sample(transform: Any, image: int, aim: Box | None, donors: Donors | None) -> Any:
    """Return a transform as it is for one sample; what is somebody else's stays as it is.

    Args:
        transform: Of a sample.
        image: The number of the image.
        aim: Of its crop, see `RandomScaleCrop`.
        donors: Give what is pasted.
    """
    if type(transform) is v2.Compose:
        return v2.Compose([for_sample(step, image, aim, donors) for step in transform.transforms])
    if isinstance(transform, RandomScaleCrop) and aim is not None:
        transform = copy.copy(transform)
        transform.aim = aim
    elif isinstance(transform, PasteRegions) and donors is not None:
        transform = copy.copy(transform)
        transform.draw = partial(donors.draw, image)
        transform.shares = torch.from_numpy(donors.regions.shares)
    return transform


def augment(
    crop: Sequence[int] | None = None,
    scale: Sequence[float] | None = (0.5, 2.0),
    flip: float = 0.5,
    jitter: float | Sequence[float] | None = 0.25,
    hue: float = 0.05,
    paste: float | None = None,
    turn: bool = False,
) -> v2.Transform:
    """Return the training transform: random scale and crop, paste, flips, colour jitter.

    Args:
        crop: (height, width) of the window; `None` leaves size and scale as they are.
        scale: Range of the random factor, `None` for none; needs `crop`.
        flip: Probability of a horizontal flip.
        jitter: Largest relative change of brightness, contrast and saturation, one number for all
            or three; `None` for no change of colour at all, hue included.
        hue: Largest change of hue, as a fraction of the colour circle.
        paste: Probability that regions of rare classes from another training image are pasted into
            what the crop shows, in sizes of `scale` if there is a crop; see `PasteRegions`.
        turn: Of images that have no upright direction: instead of `flip`, flip both ways and, where
            the crop is square, turn by 90 degrees, each with a probability of 1/2. So all four
            symmetries of a rectangle, or all eight of a square, are equally likely.

    Returns:
        A transform of (image uint8 [C, H, W] or float32 of 0 to 255, mask uint8 [H, W]), both
        tv_tensors.

    Raises:
        InputError: `crop` or `scale` is not what `RandomScaleCrop` takes, or `paste` is no
            probability.
    """
    chosen: list[Any] = []
    if crop is not None:
        chosen.append(RandomScaleCrop(crop, scale))
    if paste:
        chosen.append(PasteRegions(paste, None if crop is None else scale, flip))
    if turn:
        chosen += [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
        if crop is not None and crop[0] == crop[1]:
            chosen.append(v2.RandomApply([v2.RandomRotation((90, 90))]))
    elif flip:
        chosen.append(v2.RandomHorizontalFlip(flip))
    if jitter is not None:
        changes = [jitter] * 3 if isinstance(jitter, int | float) else jitter
        chosen.append(ColourJitter(*changes, hue))  # type: ignore[call-arg]
    return v2.Compose(chosen or [v2.Identity()])

"""Shapes of annotations, drawn on a mask."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from seg_torch.errors import InputError

# Points so far outside, as a share of the image's sides, are cut off; points beyond belong to
# another image, or to another size of it.
MARGIN = 0.05


def checked_points(mask: Image.Image, points: Any, at_least: int) -> list[tuple[float, float]]:
    """Return points (x, y) in pixels as Pillow takes them.

    Raises:
        InputError: There are too few, or one is far outside of the image.
    """
    array = np.array(points, np.float64)
    if array.ndim == 1 and array.size % 2 == 0:  # x0, y0, x1, y1 ...
        array = array.reshape(-1, 2)
    if array.ndim != 2 or array.shape[1] != 2:
        raise InputError("its points are not pairs of x and y")
    if len(array) < at_least:
        raise InputError(f"{len(array)} points, but it takes at least {at_least}")
    margin = MARGIN * np.array(mask.size) + 1
    inside = ((array >= -margin) & (array <= mask.size + margin)).all(axis=1)
    if not inside.all():
        x, y = array[~inside][0]
        raise InputError(
            f"the point ({x:g}, {y:g}) is outside of the image of {mask.width} x {mask.height} "
            "pixels"
        )
    return [(x, y) for x, y in array.tolist()]


def draw_polygon(mask: Image.Image, value: int, points: Any) -> None:
    """Fill a polygon of points (x, y) in pixels, as labelme does: with its outline."""
    ImageDraw.Draw(mask).polygon(checked_points(mask, points, 3), fill=value, outline=value)


def draw_pixels(mask: Image.Image, value: int, pixels: np.ndarray, x: int = 0, y: int = 0) -> None:
    """Draw where an array [h, w] is not 0, with its upper left corner at (x, y)."""
    mask.paste(value, (x, y), Image.fromarray((pixels != 0).astype(np.uint8) * 255))

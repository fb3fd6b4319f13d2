"""Textured shapes, drawn on the fly: the dataset that needs no download.

The class is the shape: colours and textures come from one distribution for all classes. The
shapes have facets lit from the upper left; they overlap, turn and vary in size.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image
from torchvision import tv_tensors

from seg_torch.datasets.base import SPLITS, BaseDataset, as_sample, published_labels
from seg_torch.errors import InputError, check_choice
from seg_torch.labels import IGNORE_INDEX

SHAPES_LABELS = published_labels("shapes")


class Shape(NamedTuple):
    """One shape of a scene; lengths in units of the image's side, the angle in radians."""

    class_id: int
    x: float
    y: float
    radius: float
    angle: float


def _distance(shape: Shape, size: int) -> tuple[np.ndarray, tuple[slice, slice]]:
    """Return the distance to the outline in pixels, negative inside, and the window it covers.

    Polygons are folded into one of their equal sectors, where the outline is a straight line.
    """
    reach = shape.radius + 0.08
    left, right = (int(np.clip(shape.x + d, 0, 1) * size) for d in (-reach, reach))
    top, bottom = (int(np.clip(shape.y + d, 0, 1) * size) for d in (-reach, reach))
    dx = (np.arange(left, right, dtype=np.float32) + 0.5 - shape.x * size)[None]
    dy = (np.arange(top, bottom, dtype=np.float32) + 0.5 - shape.y * size)[:, None]
    cos, sin = float(np.cos(shape.angle)), float(np.sin(shape.angle))
    x, y = dx * cos + dy * sin, dy * cos - dx * sin
    outer = shape.radius * size
    name = SHAPES_LABELS.names[shape.class_id]
    if name == "disc":
        distance = np.hypot(x, y) - 0.85 * outer
    elif name == "ring":
        distance = np.abs(np.hypot(x, y) - 0.69 * outer) - 0.21 * outer
    else:
        # `points` corners at the outer radius, and as many at `waist` times that between them. For
        # regular polygons the waist lies on the straight edge.
        points, waist = {"triangle": (3, 0.5), "square": (4, 0.5**0.5), "star": (5, 0.45)}[name]
        sector = np.pi / points
        angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
        radius = np.hypot(x, y)
        x, y = radius * np.cos(angle), radius * np.sin(angle)
        # From the corner (outer, 0) along the edge to the waist at the angle of half a sector.
        along = np.array([waist * np.cos(sector) - 1, waist * np.sin(sector)])
        along /= np.hypot(*along)
        distance = (x - outer) * np.float32(along[1]) - y * np.float32(along[0])
    return distance, (slice(top, bottom), slice(left, right))


def _scene(rng: np.random.Generator) -> list[Shape]:
    """Return one to four shapes that may overlap, but stay recognisable."""
    scene: list[Shape] = []
    for _ in range(rng.integers(1, 5)):
        class_id = int(rng.integers(1, len(SHAPES_LABELS)))
        radius, angle = rng.uniform(0.17, 0.3), rng.uniform(0, 2 * np.pi)
        for x, y in rng.uniform(0.1, 0.9, (20, 2)):
            if all(np.hypot(x - s.x, y - s.y) > 0.75 * (radius + s.radius) for s in scene):
                scene.append(Shape(class_id, float(x), float(y), radius, angle))
                break
    return scene


def _texture(rng: np.random.Generator, size: int, window: tuple[slice, slice]) -> np.ndarray:
    """Return stripes, waves, checks, dots or clouds: float32 in 0 to 1 over the window."""
    height, width = (side.stop - side.start for side in window)
    kind, angle, phase = rng.integers(5), rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    frequency = rng.uniform(5, 14) * 2 * np.pi / size
    if kind == 4:
        coarse = Image.fromarray(rng.random((6, 6), np.float32))
        return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    x = np.arange(width, dtype=np.float32)[None] * np.float32(frequency)
    y = np.arange(height, dtype=np.float32)[:, None] * np.float32(frequency)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = x * cos + y * sin + np.float32(phase), y * cos - x * sin
    if kind == 0:
        wave = np.sin(u)
    elif kind == 1:
        wave = np.sin(u + 1.5 * np.sin(0.7 * v))
    elif kind == 2:
        wave = np.sin(u) * np.sin(v) * 2
    else:
        wave = np.cos(u) + np.cos(v) - 0.7
    return (0.5 + 1.2 * wave).clip(0, 1)


def _colours(rng: np.random.Generator, vivid: float) -> tuple[np.ndarray, np.ndarray]:
    """Return two related colours for a texture, float32 RGB in 0 to 255."""
    hue = rng.uniform(0, 1)
    turn, saturation, value = rng.uniform((-0.12, 0.45, 0.6), (0.12, 0.85, 0.98))
    hues = np.array([hue, hue + turn])[:, None] + np.array([0, 2 / 3, 1 / 3])
    # The usual piecewise linear hue wheel: each primary is full for a third of it.
    wheel = np.clip(np.abs(hues % 1 * 6 - 3) - 1, 0, 1)
    values = np.array([[value], [value * rng.uniform(0.75, 0.9)]])
    rgb = 255 * values * (1 - saturation * vivid * (1 - wheel))
    return rgb[0].astype(np.float32), rgb[1].astype(np.float32)


def _paint(
    rng: np.random.Generator, size: int, window: tuple[slice, slice], vivid: float
) -> np.ndarray:
    """Return a random texture in random colours, float32 RGB over the window in 0 to 255."""
    light, dark = _colours(rng, vivid)
    return dark + _texture(rng, size, window)[..., None] * (light - dark)


class Shapes(BaseDataset):
    """The dataset that `shapes` returns.

    Items are `(tv_tensors.Image uint8 [3, size, size], tv_tensors.Mask uint8 [size, size])`.
    """

    labels = SHAPES_LABELS

    def __init__(self, split: str, length: int, size: int, seed: int) -> None:
        self.length = length
        self.size = size
        self.key = [seed, SPLITS.index(split)]

    def __len__(self) -> int:
        return self.length

    def _generator(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return np.random.default_rng([*self.key, index])

    def _mask(self, scene: list[Shape]) -> np.ndarray:
        mask = np.zeros((self.size, self.size), np.uint8)
        for shape in scene:
            distance, window = _distance(shape, self.size)
            mask[window][distance < 1] = IGNORE_INDEX
            mask[window][distance < -1] = shape.class_id
        return mask

    def mask(self, index: int) -> np.ndarray:
        """Return the mask alone, uint8 [size, size]."""
        return self._mask(_scene(self._generator(index)))

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        rng = self._generator(index)
        scene = _scene(rng)
        everything = slice(0, self.size), slice(0, self.size)
        image = _paint(rng, self.size, everything, vivid=0.6)
        for shape in scene:
            distance, window = _distance(shape, self.size)
            shadow = 1 - 0.45 * np.exp(-np.maximum(distance, 0) * (40 / self.size))
            # The surface falls with the distance to the outline, so polygons have facets.
            slope_y, slope_x = np.gradient(distance)
            light = 1 - 0.25 * (slope_x + slope_y)
            cover = np.clip(0.5 - distance, 0, 1)[..., None]
            below = image[window] * shadow[..., None]
            above = _paint(rng, self.size, window, vivid=1) * light[..., None]
            image[window] = below + cover * (above - below)
        image += 6 * rng.standard_normal(image.shape, np.float32)
        return as_sample(np.rint(image).clip(0, 255).astype(np.uint8), self._mask(scene))


def shapes(
    split: str, size: int = 128, train: int = 1000, val: int = 100, test: int = 100, seed: int = 0
) -> Shapes:
    """Return images of overlapping shapes on a textured ground, with rims of ignored pixels.

    Six classes: background, disc, square, triangle, star and ring; one to four shapes an image.
    Nothing is stored: a sample follows from `(seed, split, index)` by a generator of its own, so
    it is the same on every machine and in every worker process.

    Args:
        split: "train", "val" or "test".
        size: Height and width of the images in pixels, 32 to 4,096.
        train: Number of training samples.
        val: Number of validation samples.
        test: Number of test samples.
        seed: Another seed gives another dataset.

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, the size is below 32 or above 4,096, or there are more
            than 10 million samples.
    """
    check_choice("split", split, SPLITS)
    if not 32 <= size <= 4096:
        raise InputError(f"shapes of size {size} cannot be drawn; set size to 32 to 4096")
    if not 0 <= max(train, val, test) <= 10_000_000:
        raise InputError(f"{max(train, val, test)} samples of shapes: at most 10,000,000 are made")
    return Shapes(split, {"train": train, "val": val, "test": test}[split], size, seed)

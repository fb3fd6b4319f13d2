"""Images of masks in the colours of the labels: overlays, sheets, legends."""

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from seg_torch.drawing.fonts import drawn_name
from seg_torch.errors import InputError
from seg_torch.labels import IGNORE_INDEX, Labels, palette_image

WRONG = Labels(("wrong",), np.array([[255, 0, 0]], dtype=np.uint8))
INK, PAPER = (32, 32, 32), (255, 255, 255)
GAP = 4  # pixels between the images of a sheet
JPEG_LIMIT = 65_500  # rows or columns, of libjpeg
STRIP = 256  # rows that are drawn at once: the whole of a large image would take several copies


def overlay(image: np.ndarray, mask: np.ndarray, labels: Labels, alpha: float = 0.5) -> Image.Image:
    """Blend the colours of the classes with an image; ignored pixels stay as they are.

    Args:
        image: RGB, uint8 [H, W, 3].
        mask: Class ids, uint8 [H, W].
        labels: The classes and their colours.
        alpha: Weight of the colours, 0 to 1.

    Returns:
        RGB image of W x H pixels.
    """
    page = Image.new("RGB", mask.shape[::-1])
    for number, strip in enumerate(_overlay_strips(image, mask, labels, alpha)):
        page.paste(strip, (0, number * STRIP))
    return page


def save_overlay(
    path: str, image: np.ndarray, mask: np.ndarray, labels: Labels, quality: int
) -> None:
    """Write the `overlay` as a JPEG file, of which only a strip is in memory.

    Pillow holds four bytes a pixel and writes whole images alone. Where a JPEG file has a restart
    marker, its code begins anew (ITU-T T.81, section F.1.1.5.3): strips that were encoded by
    themselves are one file with such markers between them.

    Raises:
        InputError: The image has more rows or columns than libjpeg takes.
    """
    if max(mask.shape) > JPEG_LIMIT:
        height, width = mask.shape
        raise InputError(
            f"no JPEG file holds an overlay of {height} x {width} pixels, {JPEG_LIMIT} a side at "
            "most: leave overlay out of save"
        )
    with open(path, "wb") as file:
        for number, strip in enumerate(_overlay_strips(image, mask, labels)):
            buffer = BytesIO()
            # A marker for each 16 rows of 16 pixels, thus none within a strip.
            strip.save(buffer, "JPEG", quality=quality, restart_marker_rows=STRIP // 16)
            jpeg = bytearray(buffer.getvalue())
            frame, code = _find_in_jpeg(jpeg)
            if number == 0:
                jpeg[frame + 5 : frame + 7] = len(mask).to_bytes(2, "big")
                file.write(jpeg[:-2])
            else:
                file.write(bytes([0xFF, 0xD0 + (number - 1) % 8]) + jpeg[code:-2])
        file.write(b"\xff\xd9")


def _find_in_jpeg(jpeg: bytes | bytearray) -> tuple[int, int]:
    """Return where the frame header of a baseline JPEG begins, and where its code does."""
    frame, start = 0, 2
    while True:
        marker, length = jpeg[start + 1], int.from_bytes(jpeg[start + 2 : start + 4], "big")
        if marker == 0xC0:
            frame = start
        start += 2 + length
        if marker == 0xDA:
            return frame, start


def _overlay_strips(
    image: np.ndarray, mask: np.ndarray, labels: Labels, alpha: float = 0.5
) -> Iterator[Image.Image]:
    """Yield an overlay from the top down, in strips."""
    for top in range(0, len(mask), STRIP):
        rows = slice(top, top + STRIP)
        original = Image.fromarray(image[rows])
        colours = palette_image(mask[rows], labels.drawn).convert("RGB")
        blended = Image.blend(original, colours, alpha)
        ignored = mask[rows] == IGNORE_INDEX
        if ignored.any():
            blended.paste(original, mask=Image.fromarray(ignored))
        yield blended


def side_by_side(
    image: np.ndarray, masks: dict[str, tuple[np.ndarray, Labels]], column: int = 640
) -> Image.Image:
    """Show an image beside its overlays, each with a title and a legend of the classes in it.

    Args:
        image: RGB, uint8 [H, W, 3].
        masks: Class ids, uint8 [H, W], and the labels, by title.
        column: Largest width of each column in pixels; small images are enlarged to 200.

    Returns:
        RGB image.
    """
    column = min(column, max(image.shape[1], 200))  # a title and a legend have to fit
    size = (column, max(1, round(column * image.shape[0] / image.shape[1])))
    images = [Image.fromarray(image)]
    keys = [Image.new("RGB", (1, 1), PAPER)]  # nothing below the image itself
    for mask, labels in masks.values():
        images.append(overlay(image, mask, labels))
        histogram = Image.fromarray(mask).histogram()[: len(labels)]
        keys.append(legend(labels, [i for i, count in enumerate(histogram) if count], column))
    row = [item.resize(size, Image.Resampling.LANCZOS) for item in images]
    return _sheet(["image", *masks], [row, keys], column)


def legend(
    labels: Labels, ids: Sequence[int] | None = None, width: int = 640, columns: int | None = None
) -> Image.Image:
    """Draw the colour and the name of each class, in as many columns as `width` pixels hold.

    Args:
        labels: The classes and their colours.
        ids: Those to show, by default all.
        width: Width of the legend in pixels.
        columns: Number of columns, instead of `width`; the legend is as wide as they need.

    Returns:
        RGB image.
    """
    ids = range(len(labels)) if ids is None else ids
    texts = [_name_and_font(labels, i) for i in ids]
    swatch, gap, line = 16, 6, 24
    widest = max((font.getlength(name) for name, font in texts), default=0)
    column = int(gap + swatch + gap + widest + 2 * gap)
    if columns is None:
        columns = max(1, min(len(ids) or 1, width // column))
    else:
        width = columns * column
    rows = -(-len(ids) // columns)
    page = Image.new("RGB", (max(width, column), rows * line + gap), PAPER)
    draw = ImageDraw.Draw(page)
    for position, (i, (name, font)) in enumerate(zip(ids, texts, strict=True)):
        x, y = gap + position % columns * column, gap + position // columns * line
        colour = tuple(labels.drawn.palette[i].tolist())
        draw.rectangle((x, y, x + swatch, y + swatch), colour, outline=(128, 128, 128))
        draw.text((x + swatch + gap, y + swatch / 2), name, INK, font, anchor="lm")
    return page


def _name_and_font(labels: Labels, class_id: int) -> tuple[str, Any]:
    name, file = drawn_name(labels, class_id)
    return name, ImageFont.load_default(14) if file is None else ImageFont.truetype(file, 14)


def sample_sheet(
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    labels: Labels,
    tile: int = 256,
) -> Image.Image:
    """Show one row per sample, image | label | prediction, and a legend of the classes in them.

    Args:
        images: RGB, uint8 [H, W, 3] each.
        masks: Class ids and 255, uint8 [H, W] each.
        predictions: Class ids, uint8 [H, W] each.
        labels: The classes and their colours.
        tile: Width of a column in pixels.

    Returns:
        RGB image.
    """
    rows = []
    for image, *maps in zip(images, masks, predictions, strict=True):
        size = (tile, max(1, round(tile * image.shape[0] / image.shape[1])))
        # Shrinking averages colours, enlarging must not: pixels of small masks stay visible.
        shrinks = size[0] < image.shape[1]
        colour_filter = Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST
        colours = [palette_image(m, labels.drawn).convert("RGB") for m in maps]
        coloured = [item.resize(size, colour_filter) for item in colours]
        rows.append([Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), *coloured])
    shown = np.unique(np.concatenate([m.ravel() for m in (*masks, *predictions)])).tolist()
    rows.append([legend(labels, [i for i in shown if i != IGNORE_INDEX], 3 * tile + 2 * GAP)])
    return _sheet(["image", "label", "prediction"], rows, tile)


def _sheet(titles: Sequence[str], rows: Sequence[Sequence[Image.Image]], tile: int) -> Image.Image:
    """Arrange rows of images in columns of `tile` pixels, with a title above each column."""
    y = header = 24
    lefts = [column * (tile + GAP) for column in range(len(titles))]
    heights = [max(item.height for item in row) + GAP for row in rows]
    width = max(left + item.width for row in rows for left, item in zip(lefts, row, strict=False))
    page = Image.new("RGB", (width, header + sum(heights) - GAP), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left + tile / 2, header / 2), title, INK, font, anchor="mm")
    for row, height in zip(rows, heights, strict=True):
        for left, item in zip(lefts, row, strict=False):
            page.paste(item, (left, y))
        y += height
    return page


def error_overlay(image: np.ndarray, mask: np.ndarray, prediction: np.ndarray) -> Image.Image:
    """Show in red where the prediction is not the label; ignored pixels are no errors.

    Args:
        image: RGB, uint8 [H, W, 3].
        mask: Class ids and 255, uint8 [H, W].
        prediction: Class ids, uint8 [H, W].

    Returns:
        RGB image of W x H pixels.
    """
    right = (mask == prediction) | (mask == IGNORE_INDEX)
    return overlay(image, right.astype(np.uint8) * IGNORE_INDEX, WRONG, alpha=0.7)

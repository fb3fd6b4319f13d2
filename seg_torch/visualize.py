"""Pictures of masks, scores and learning curves, in the colours of the labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from seg_torch.files import write_atomically
from seg_torch.labels import IGNORE_INDEX, Labels, decode_segmap, palette_image

INK, PAPER = (32, 32, 32), (255, 255, 255)


def overlay(image: np.ndarray, mask: np.ndarray, labels: Labels, alpha: float = 0.5) -> Image.Image:
    """The colours of the classes laid over a picture; ignored pixels stay as they are.

    Args:
        image: RGB, uint8 [H, W, 3].
        mask: class ids, uint8 [H, W].
        labels: whose palette to use.
        alpha: weight of the colours, 0 to 1.
    """
    height, width = mask.shape
    page = Image.new("RGB", (width, height))
    for top in range(0, height, 256):  # bands, since the whole would take several copies
        rows = slice(top, top + 256)
        photo = Image.fromarray(image[rows])
        colours = palette_image(mask[rows], labels).convert("RGB")
        blended = Image.blend(photo, colours, alpha)
        ignored = mask[rows] == IGNORE_INDEX
        if ignored.any():
            blended.paste(photo, mask=Image.fromarray(ignored))
        page.paste(blended, (0, top))
    return page


def additive_overlay(
    image: np.ndarray, mask: np.ndarray, labels: Labels, strength: float = 0.6
) -> Image.Image:
    """The colours of the classes added to a picture: image x 1.0 + colours x `strength`.

    Sums above 255 become 255, as in OpenCV's `addWeighted`; ignored pixels stay as they are.

    Args:
        image: RGB, uint8 [H, W, 3].
        mask: class ids, uint8 [H, W].
        labels: whose palette to use.
        strength: factor of the colours, 0 or more.
    """
    colours = decode_segmap(mask, labels).astype(np.float32)
    colours[mask == IGNORE_INDEX] = 0
    return Image.fromarray(np.rint(image + strength * colours).clip(max=255).astype(np.uint8))


def side_by_side(
    image: np.ndarray, masks: dict[str, tuple[np.ndarray, Labels]], column: int = 640
) -> Image.Image:
    """A picture beside its overlays, each with a title and a legend of the classes that occur.

    Args:
        image: RGB, uint8 [H, W, 3].
        masks: class ids, uint8 [H, W], and the labels, by title.
        column: largest width of each picture in pixels; small ones are enlarged to 200.
    """
    column = min(column, max(image.shape[1], 200))  # a title and a legend have to fit
    size = (column, max(1, round(column * image.shape[0] / image.shape[1])))
    header, gap = 24, 4
    pictures = {"photo": Image.fromarray(image)}
    keys = []
    for title, (mask, labels) in masks.items():
        pictures[title] = overlay(image, mask, labels)
        occurring = Image.fromarray(mask).histogram()[: len(labels)]
        keys.append(legend(labels, [i for i, n in enumerate(occurring) if n], column))
    page_width = max(len(pictures) * (column + gap) - gap, *(key.width for key in keys))
    page_height = header + size[1] + gap + max(key.height for key in keys)
    page = Image.new("RGB", (page_width, page_height), PAPER)
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(14)
    for i, (title, picture) in enumerate(pictures.items()):
        left = i * (column + gap)
        draw.text((left + column / 2, header / 2), title, INK, font, anchor="mm")
        page.paste(picture.resize(size, Image.Resampling.LANCZOS), (left, header))
        if i > 0:
            page.paste(keys[i - 1], (left, header + size[1] + gap))
    return page


def legend(
    labels: Labels,
    ids: Sequence[int] | None = None,
    width: int = 640,
    columns: int | None = None,
) -> Image.Image:
    """A swatch and the name of each class, in as many columns as `width` pixels hold.

    Args:
        labels: the classes.
        ids: those to show, by default all.
        width: of the picture in pixels.
        columns: instead of `width`: so many columns, and a picture as wide as they need.
    """
    ids = range(len(labels)) if ids is None else ids
    font = ImageFont.load_default(14)
    swatch, gap, line = 16, 6, 24
    widest = max((font.getlength(labels.names[i]) for i in ids), default=0)
    column = int(gap + swatch + gap + widest + 2 * gap)
    if columns is None:
        columns = max(1, min(len(ids) or 1, width // column))
    else:
        width = columns * column
    rows = -(-len(ids) // columns)
    page = Image.new("RGB", (max(width, column), rows * line + gap), PAPER)
    draw = ImageDraw.Draw(page)
    for position, i in enumerate(ids):
        x, y = gap + position % columns * column, gap + position // columns * line
        draw.rectangle(
            (x, y, x + swatch, y + swatch), tuple(labels.palette[i].tolist()), (128, 128, 128)
        )
        draw.text((x + swatch + gap, y + swatch / 2), labels.names[i], INK, font, anchor="lm")
    return page


def sample_sheet(
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    labels: Labels,
    tile: int = 256,
) -> Image.Image:
    """One row a sample: image | label | prediction; below them a legend of the classes shown.

    Args:
        images: RGB, uint8 [H, W, 3] each.
        masks: class ids and 255, uint8 [H, W] each.
        predictions: class ids, uint8 [H, W] each.
        labels: the classes.
        tile: width of a column in pixels.
    """
    rows = []
    for image, mask, prediction in zip(images, masks, predictions, strict=True):
        size = (tile, max(1, round(tile * image.shape[0] / image.shape[1])))
        # Shrinking averages colours, enlarging must not: pixels of small masks stay visible.
        colour_filter = (
            Image.Resampling.BOX if size[0] < image.shape[1] else Image.Resampling.NEAREST
        )
        rows.append(
            [
                Image.fromarray(image).resize(size, Image.Resampling.LANCZOS),
                Image.fromarray(decode_segmap(mask, labels)).resize(size, colour_filter),
                Image.fromarray(decode_segmap(prediction, labels)).resize(size, colour_filter),
            ]
        )
    shown = np.unique(np.concatenate([m.ravel() for m in (*masks, *predictions)]))
    key = legend(labels, [i for i in shown.tolist() if i != IGNORE_INDEX], 3 * tile + 8)
    header, gap = 24, 4
    height = header + sum(row[0].height + gap for row in rows) + key.height
    page = Image.new("RGB", (key.width, height), PAPER)
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(14)
    for column, title in enumerate(("image", "label", "prediction")):
        draw.text((column * (tile + gap) + tile / 2, header / 2), title, INK, font, anchor="mm")
    y = header
    for row in rows:
        for column, picture in enumerate(row):
            page.paste(picture, (column * (tile + gap), y))
        y += row[0].height + gap
    page.paste(key, (0, y))
    return page


def save_curves(history: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Losses and scores by epoch, as a picture.

    Args:
        history: one row an epoch, with `epoch` and any of `train_loss`, `val_loss`,
            `val_mean_iou`, `val_pixel_accuracy`.
        path: of the PNG.
    """
    from matplotlib.figure import Figure  # a second of import time that prediction can do without

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = {
        "loss": {"train_loss": "training", "val_loss": "validation"},
        "validation score": {"val_mean_iou": "mean IoU", "val_pixel_accuracy": "pixel accuracy"},
    }
    for axes, (title, lines) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for key, name in lines.items():
            points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    write_atomically(path, figure.savefig)


def save_confusion_matrix(matrix: np.ndarray, labels: Labels, path: str | Path) -> None:
    """A confusion matrix as a picture: each row is a label and adds up to one.

    Args:
        matrix: pixels, int [C, C]; rows: label, columns: prediction.
        labels: the classes.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 3 + 0.3 * len(labels)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels.names, rotation=90)
    axes.set_yticks(range(len(labels)), labels.names)
    axes.set(xlabel="prediction", ylabel="label")
    if len(labels) <= 25:
        for row, column in np.argwhere(shares >= 0.005):
            share = shares[row, column]
            colour = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{share:.2f}"[1:] if share < 0.995 else "1",
                      ha="center", va="center", color=colour, fontsize=6)  # fmt: skip
    write_atomically(path, figure.savefig)

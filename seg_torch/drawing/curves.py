"""Learning curves, reliability and confusion as figures of matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from seg_torch.drawing.fonts import drawn_name
from seg_torch.files import write_atomically
from seg_torch.labels import Labels


def curves(history: Sequence[dict[str, Any]], narrow: bool = False) -> Figure:
    """Draw losses and scores by epoch. An epoch without a value has no point.

    Args:
        history: One row per epoch, with `epoch` and any of `train_loss`, `val_loss`,
            `val_mean_iou`, `val_pixel_accuracy`; None where there is no value.
        narrow: The one above the other, not side by side.
    """
    figure = Figure(figsize=(5, 7) if narrow else (10, 4), layout="constrained")
    panels = {
        "loss": {"train_loss": "training", "val_loss": "validation"},
        "validation score": {"val_mean_iou": "mean IoU", "val_pixel_accuracy": "pixel accuracy"},
    }
    panels_axes = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    for axes, (title, lines) in zip(panels_axes, panels.items(), strict=True):
        for key, name in lines.items():
            points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    return figure


def save_curves(history: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draw `curves` into a file, whose suffix chooses the format."""
    write_atomically(path, curves(history).savefig)


def reliability(bins: Sequence[dict[str, Any]]) -> Figure:
    """Draw how often predictions are right against how confident they are.

    Args:
        bins: By confidence, each with its upper end `up_to`, its `pixels`, and their `accuracy` and
            mean `confidence`; None in an empty bin.
    """
    figure = Figure(figsize=(5, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = [row for row in bins if row["pixels"]]
    upper.plot((0, 1), (0, 1), color="grey", linestyle="dashed", label="calibrated")
    points = [[row[name] for row in filled] for name in ("confidence", "accuracy")]
    upper.plot(*points, marker=".", label="model")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    upper.legend()
    total = sum(row["pixels"] for row in filled)
    ends = [row["up_to"] for row in filled]
    shares = [row["pixels"] / total for row in filled]
    lower.bar(ends, shares, width=-0.9 / len(bins), align="edge")
    lower.set(xlabel="confidence", ylabel="share of pixels")
    return figure


def confusion_matrix(matrix: np.ndarray, labels: Labels) -> Figure:
    """Draw a confusion matrix whose rows, one per label, add up to one.

    Args:
        matrix: Pixels, int [C, C]; rows: label, columns: prediction.
        labels: The classes.
    """
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    names, fonts = zip(*(drawn_name(labels, i) for i in range(len(labels))), strict=True)
    short = [name if len(name) <= 40 else f"{name[:39]}…" for name in names]
    # Cells of 0.4 inches, which hold their digits. 2,000 pixels: more takes seconds to draw.
    side = min(0.9 + 0.09 * max(map(len, short)) + 0.4 * len(labels), 20)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), short, rotation=90)
    axes.set_yticks(range(len(labels)), short)
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        for tick, font in zip(ticks, fonts, strict=True):
            tick.set(parse_math=False, **({} if font is None else {"font": Path(font)}))
    axes.set(xlabel="prediction", ylabel="label")
    if len(labels) <= 25:
        for row, column in np.argwhere(shares >= 0.005):
            share = shares[row, column]
            colour = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{share:.2f}"[1:] if share < 0.995 else "1",
                      ha="center", va="center", color=colour, fontsize=10)  # fmt: skip
    return figure

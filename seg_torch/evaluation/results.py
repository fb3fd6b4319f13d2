"""What scoring gives: scores of the dataset and of each image, as values, files and tables."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from seg_torch.drawing.curves import confusion_matrix
from seg_torch.files import write_atomically, write_json
from seg_torch.labels import Labels
from seg_torch.metrics.counts import class_scores, pixel_accuracy, stack_counts

# Columns of the two tables: one would be too wide for a terminal.
TABLES = (
    ("iou", "dice", "accuracy", "precision", "average_precision"),
    ("boundary_iou", "boundary_f"),
)


@dataclass(frozen=True, eq=False)
class Results:
    """The results of a split.

    Attributes:
        scores: Plain data, what `<split>_metrics.json` holds; see `seg_torch.metrics.report`. Of
            which images they are is in `split` (`val` where it stands in for test), `images` and
            `images_of_split`.
        images: Of the images that were scored, see `seg_torch.metrics.ImageScores`;
            `label_quality` [N], where it was asked for.
        names: Of these images.
        indices: Of these images in their dataset.
        labels: The classes.
    """

    scores: dict[str, Any]
    images: dict[str, np.ndarray]
    names: list[str]
    indices: list[int]
    labels: Labels

    def scored_on(self, split: str) -> str:
        """Say what was scored, such as "12 images of test", where `split` was asked for."""
        scored, of_split = self.scores["images"], self.scores["images_of_split"]
        count = f"{of_split:,}" if scored == of_split else f"{scored:,} of {of_split:,}"
        text = f"{count} image{'s' * (of_split != 1)} of {self.scores['split']}"
        return text if self.scores["split"] == split else f"{text}: there are none of {split}"

    def write(self, folder: Path, split: str) -> None:
        """Write `<split>_metrics.json`, `_images.npz` and `.csv`, and `_confusion_matrix.png`.

        The `.npz` holds the arrays of `images`, and `names`.

        Raises:
            OSError: A file cannot be written.
        """
        arrays: dict[str, Any] = {"names": np.array(self.names), **self.images}
        figure = confusion_matrix(np.array(self.scores["confusion_matrix"]), self.labels)
        write_json(folder / f"{split}_metrics.json", self.scores, durable=True)
        images = folder / f"{split}_images.npz"
        write_atomically(images, lambda name: np.savez_compressed(name, **arrays))
        write_atomically(images.with_suffix(".csv"), self._write_images)
        write_atomically(folder / f"{split}_confusion_matrix.png", figure.savefig)

    def _write_images(self, path: str) -> None:
        """Write a row of scores per image."""
        counts = stack_counts(self.images)
        accuracy, iou = pixel_accuracy(counts), class_scores(counts)["iou"]
        scores = np.column_stack([accuracy, self.images["confidence"], iou])
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            classes = [f"iou {label}" for label in self.labels.names]
            writer.writerow(["name", "pixel_accuracy", "confidence", *classes])
            for image, row in zip(self.names, scores, strict=True):
                writer.writerow([image, *("" if np.isnan(v) else f"{v:.6f}" for v in row)])

    def print(self, split: str) -> None:
        """Print the scores as a table with a row per class, and one of boundaries, if any."""
        console, per_class = Console(), self.scores["per_class"]
        pixels = sum(row["pixels"] for row in per_class.values())
        for names in TABLES:
            columns = [name for name in names if f"mean_{name}" in self.scores]
            if not columns:
                continue
            table = Table(
                title=self.scored_on(split),
                box=SIMPLE_HEAD,
                padding=(0, 1, 0, 0),
                show_edge=False,
            )
            table.add_column("class", overflow="fold")
            for name in (*columns, "pixels"):
                table.add_column(name, justify="right")
            for name, row in per_class.items():
                table.add_row(Text(name), *(_cell(row[c]) for c in columns), f"{row['pixels']:,}")
            table.add_section()
            means = (_cell(self.scores[f"mean_{column}"]) for column in columns)
            table.add_row("mean", *means, f"{pixels:,}", style="bold")
            console.print(table)
        accuracy = _cell(self.scores["pixel_accuracy"])
        error = _cell(self.scores["expected_calibration_error"])
        console.print(f"pixel accuracy {accuracy}, expected calibration error {error}")


def _cell(value: float | None) -> str:
    return "absent" if value is None else f"{value:.4f}"

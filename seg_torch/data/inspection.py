"""What is in a dataset, whether it can be trained on, and a page that shows both."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from seg_torch.data.check import DatasetStatistics, Problem
from seg_torch.data.module import SegmentationDataModule
from seg_torch.data.notes import Duplicate, Statistics, find_duplicates, percent
from seg_torch.datasets.base import SPLITS, BaseDataset, checked_sample
from seg_torch.drawing.page import Figure, figure, render
from seg_torch.drawing.visualize import overlay
from seg_torch.errors import InputError
from seg_torch.files import write_json, write_text
from seg_torch.images.format import RGB, ImageFormat, as_array
from seg_torch.labels import IGNORE_INDEX
from seg_torch.losses import class_weights

SAMPLES, DUPLICATES = 6, 12  # on the page: samples of each split, pairs of duplicates


def inspect_dataset(
    dataset: Callable[..., Any],
    root: str | Path | None = None,
    output_dir: str | Path | None = None,
    format: ImageFormat = RGB,
) -> dict[str, Any]:
    """Read every sample of a dataset's splits and find out what is in them.

    Args:
        dataset: `dataset(split=...)` or, with `root`, `dataset(root=..., split=...)` gives the
            samples of `train`, `val` and `test`; see `seg_torch.datasets`.
        root: The dataset's folder.
        format: How files become images.
        output_dir: Where `inspect.json` and `inspect.html` go; by default they are not written.

    Returns:
        What `inspect.json` holds:

        - `dataset`: the folder.
        - `refused`: whether training would be, because of the `problems`. Each of these has a
          `message`, `file` ("" where it is not about a single one) and `pixels`: how many have
          each value that is no class.
        - `notes`: what else to know before training, as sentences.
        - `splits`: `images`, `pixels` and `unlabelled_pixels` of each.
        - `classes`: of each class `pixels` and `images` by split, and its `weight` in
          `loss=weighted_ce`.
        - `mean` and `std` of each channel over all training pixels, scaled to 0..1.
        - `duplicates`: images that are in two splits: the two `splits`, `indices` and `names`,
          whether the pixels are `exact`ly the same, and the correlation (`similarity`).
    """
    folder = None if root is None else str(root)
    return inspect_data(SegmentationDataModule(dataset, folder, **format.settings()), output_dir)


def inspect_data(
    data: SegmentationDataModule, output_dir: str | Path | None = None
) -> dict[str, Any]:
    """Do what `inspect_dataset` does for the data of a command."""
    statistics: Statistics = {}
    problems: dict[str, Problem] = {}  # by message: all splits of a folder have the same ones
    notes = []
    for split in SPLITS:
        try:
            if split == "test" and "val" in statistics and data.test_is_val:
                notes.append("There are no test images of their own: val stands in for test.")
                continue
            statistics[split] = data.checked(split)
            of_split = statistics[split].problems
        except InputError as error:
            of_split = [Problem("", text, {}) for text in error.problems or [str(error)]]
        problems |= {problem.message: problem for problem in of_split}
    problems |= {problem.message: problem for problem in data.overlaps([*statistics])}
    originals = {split: data.dataset(split).base_dataset for split in statistics}
    labels = data.labels if statistics else None
    duplicates = find_duplicates(statistics, originals)
    notes += data.describe(statistics, duplicates)
    title = str(Path(data.root).expanduser().absolute()) if data.root else data.dataset_name or ""
    findings: dict[str, Any] = {
        "dataset": title,
        "refused": bool(problems),
        "problems": [problem._asdict() for problem in problems.values()],
        "notes": notes,
        **_contents(statistics, () if labels is None else labels.names),
        "duplicates": duplicates,
    }
    if output_dir is not None:
        write_json(Path(output_dir, "inspect.json"), findings)
        page = _page(findings, statistics, originals, labels)
        write_text(Path(output_dir, "inspect.html"), page)
    return findings


def _contents(statistics: Statistics, names: Sequence[str]) -> dict[str, Any]:
    """Return the findings that are numbers of images and pixels."""
    splits = {
        split: {
            "images": len(measured.digests),
            "pixels": int(measured.pixels.sum()),
            "unlabelled_pixels": int(measured.pixels[IGNORE_INDEX]),
        }
        for split, measured in statistics.items()
    }
    mean = std = None
    weights: list[float | None] = [None] * len(names)
    if "train" in statistics and splits["train"]["pixels"]:
        mean, std = statistics["train"].mean_and_std()
        weights = class_weights(torch.from_numpy(statistics["train"].pixels[: len(names)])).tolist()
    classes = {
        name: {
            "pixels": {split: int(measured.pixels[i]) for split, measured in statistics.items()},
            "images": {split: int(measured.images[i]) for split, measured in statistics.items()},
            "weight": weights[i],
        }
        for i, name in enumerate(names)
    }
    return {"splits": splits, "classes": classes, "mean": mean, "std": std}


def class_cells(findings: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """Return share of the pixels and number of images of a class by split, and its weight."""
    cells = []
    for split, pixels in row["pixels"].items():
        share = percent(pixels / max(findings["splits"][split]["pixels"], 1))
        cells.append(f"{share}\n{row['images'][split]:,}" if pixels else "never")
    return [*cells, "" if row["weight"] is None else f"{row['weight']:.4g}"]


# The page


def _page(
    findings: dict[str, Any], statistics: Statistics, originals: dict[str, BaseDataset], labels: Any
) -> str:
    """Return the findings as HTML, with images of some samples and of the duplicates."""
    pairs = sorted(findings["duplicates"], key=lambda pair: -pair["similarity"])[:DUPLICATES]
    splits = findings["splits"].items()
    return render(
        "inspect.html",
        title=f"Dataset {findings['dataset']}",
        findings=findings,
        labels=labels,
        duplicates=[_duplicate_figure(pair, originals) for pair in pairs],
        samples=[(split, *_samples(originals[split], statistics[split])) for split in statistics],
        header=["class", *(f"{split}: {c['images']:,} images" for split, c in splits), "weight"],
        rows=[class_cells(findings, row) for row in findings["classes"].values()],
    )


def _duplicate_figure(pair: Duplicate, originals: dict[str, BaseDataset]) -> Figure:
    images, names = [], []
    for split, index, name in zip(pair["splits"], pair["indices"], pair["names"], strict=True):
        dataset = originals[split]
        images.append(Image.fromarray(dataset.format.shown(as_array(dataset[index][0]))))
        names.append(f"{split}: {Path(name).name}")
    how = "the same pixels" if pair["exact"] else f"correlation {pair['similarity']}"
    return figure(images, f"{', '.join(names)} ({how})")


def _samples(dataset: BaseDataset, statistics: DatasetStatistics) -> tuple[list[Figure], list[int]]:
    """Return a few samples beside their overlays, evenly spaced, and the classes in them."""
    usable = np.flatnonzero(statistics.digests != b"").tolist()
    figures, class_ids = [], set[int]()
    for index in usable[:: -(-len(usable) // SAMPLES) or 1]:
        image, mask = checked_sample(dataset, index)
        class_ids |= set(mask.unique().tolist())
        pixels = dataset.format.shown(as_array(image))
        images = [Image.fromarray(pixels), overlay(pixels, mask.numpy(), dataset.labels)]
        figures.append(figure(images, Path(dataset.name(index, "image")).name))
    return figures, sorted(class_ids - {IGNORE_INDEX})

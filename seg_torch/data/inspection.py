"""What is in a dataset, whether it can be trained on, and a page that shows both."""

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from seg_torch.data import doubts
from seg_torch.data.check import DatasetStatistics, Problem
from seg_torch.data.module import SegmentationDataModule
from seg_torch.datasets.base import SPLITS, BaseDataset, checked_sample
from seg_torch.drawing.page import Figure, figure, render
from seg_torch.drawing.visualize import overlay
from seg_torch.errors import InputError
from seg_torch.files import write_json, write_text
from seg_torch.images.format import RGB, ImageFormat, as_array
from seg_torch.labels import IGNORE_INDEX
from seg_torch.losses import class_weights

Statistics = dict[str, DatasetStatistics]  # by split

# Correlation of two thumbnails. An image that was re-encoded, halved or made 15 % brighter reaches
# 0.99 with itself, neighbouring frames of CamVid 0.93, other images of a dataset less.
NEAR = 0.98
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
            notes += doubts.describe(split, statistics[split], data.dataset(split).base_dataset)
        except InputError as error:
            of_split = [Problem("", text, {}) for text in error.problems or [str(error)]]
        problems |= {problem.message: problem for problem in of_split}
    originals = {split: data.dataset(split).base_dataset for split in statistics}
    labels = data.labels if statistics else None
    title = str(Path(data.root).expanduser().absolute()) if data.root else data.dataset_name or ""
    findings: dict[str, Any] = {
        "dataset": title,
        "refused": bool(problems),
        "problems": [problem._asdict() for problem in problems.values()],
        "notes": notes,
        **_contents(statistics, () if labels is None else labels.names),
        "duplicates": _duplicates(statistics, originals),
    }
    notes += _notes(findings)
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


def _duplicates(statistics: Statistics, originals: dict[str, BaseDataset]) -> list[dict[str, Any]]:
    """Return for each image of a split the one most like it in each earlier split, if any is."""
    duplicates = []
    vectors = {split: _normalised(measured.thumbnails) for split, measured in statistics.items()}
    for first, second in combinations(statistics, 2):
        same = {digest: i for i, digest in enumerate(statistics[first].digests.tolist()) if digest}
        for start in range(0, len(vectors[second]), 256):  # a block needs 256 x N numbers
            similarity = vectors[first] @ vectors[second][start : start + 256].T
            for j, i in enumerate(similarity.argmax(axis=0).tolist(), start):
                value = float(similarity[i, j - start])
                twin = same.get(bytes(statistics[second].digests[j]))
                if twin is None and value <= NEAR:
                    continue
                pair = {first: i if twin is None else twin, second: j}
                names = [originals[s].name(index, "image") for s, index in pair.items()]
                duplicates.append(
                    {
                        "splits": [*pair],
                        "indices": [*pair.values()],
                        "names": names,
                        "exact": twin is not None,
                        "similarity": round(value, 4) if twin is None else 1.0,
                    }
                )
    return duplicates


def _normalised(thumbnails: np.ndarray) -> np.ndarray:
    """Return vectors [N, 256] of mean 0 and length 1, whose products are correlations.

    An image without contrast, which would resemble every other, becomes zero.
    """
    vectors = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    vectors -= vectors.mean(axis=1, keepdims=True)
    contrast = vectors.std(axis=1, keepdims=True)  # in grey levels
    length = contrast * vectors.shape[1] ** 0.5
    return np.where(contrast > 2, vectors / np.maximum(length, 1), 0)


def _notes(findings: dict[str, Any]) -> list[str]:
    """Return what the numbers say, in sentences."""
    splits, classes, notes = findings["splits"], findings["classes"], []
    unlabelled = [
        f"{_percent(counts['unlabelled_pixels'] / counts['pixels'])} of {split}"
        for split, counts in splits.items()
        if counts["unlabelled_pixels"]
    ]
    if unlabelled:
        notes.append(
            f"255 stands for pixels that are not labelled, {', '.join(unlabelled)}: no loss and no "
            "score counts them."
        )
    known = set(classes)
    for split in splits:
        absent = [name for name, row in classes.items() if not row["pixels"][split]]
        new = ", ".join(name for name in absent if name in known)
        if new:
            what = "never learnt" if split == "train" else "without a score there"
            notes.append(f"Never seen in {split}, so {what}: {new}.")
        if split == "train":
            known -= set(absent)
    for first, second in combinations(splits, 2):
        exact = [d["exact"] for d in findings["duplicates"] if d["splits"] == [first, second]]
        if exact:
            notes.append(
                f"{len(exact)} of {splits[second]['images']} images of {second} are in {first}, "
                f"too: {sum(exact)} exactly, {len(exact) - sum(exact)} nearly. Take them out of "
                "one of the two, else the scores flatter the model."
            )
    return notes


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.1f} %"


def class_cells(findings: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """Return share of the pixels and number of images of a class by split, and its weight."""
    cells = []
    for split, pixels in row["pixels"].items():
        share = _percent(pixels / max(findings["splits"][split]["pixels"], 1))
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


def _duplicate_figure(pair: dict[str, Any], originals: dict[str, BaseDataset]) -> Figure:
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

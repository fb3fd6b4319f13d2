"""What is in a dataset, whether it can be trained on, and a page that shows both."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from seg_torch.data.check import DatasetStatistics, Problem
from seg_torch.data.module import SegmentationDataModule
from seg_torch.datasets.base import SPLITS, BaseDataset, checked_sample
from seg_torch.drawing.page import figure, grid, key, page, table
from seg_torch.drawing.visualize import overlay
from seg_torch.errors import InputError
from seg_torch.files import write_atomically
from seg_torch.images.format import RGB, ImageFormat, as_array
from seg_torch.labels import IGNORE_INDEX, Labels
from seg_torch.losses import class_weights

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
    """Read every sample of a dataset's splits and report what is in them.

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
    place = None if root is None else str(root)
    data = SegmentationDataModule(dataset, place, **format.settings())
    checks: dict[str, DatasetStatistics] = {}
    problems: dict[str, Problem] = {}  # by message: all splits of a folder have the same ones
    notes = []
    for split in SPLITS:
        try:
            if split == "test" and "val" in checks and data.test_is_val:
                notes.append("There are no test images of their own: val stands in for test.")
                continue
            checks[split] = data.checked(split)
            found = checks[split].problems
        except InputError as error:
            found = [Problem("", text, {}) for text in error.problems or [str(error)]]
        problems |= {problem.message: problem for problem in found}
    samples = {split: data.dataset(split).base_dataset for split in checks}
    report: dict[str, Any] = {
        "dataset": "" if root is None else str(Path(root).expanduser().absolute()),
        "refused": bool(problems),
        "problems": [problem._asdict() for problem in problems.values()],
        "notes": notes,
        **_contents(checks, data.labels if checks else None),
        "duplicates": _duplicates(checks, samples),
    }
    notes += _notes(report)
    if output_dir is not None:
        texts = {"json": json.dumps(report, indent=1), "html": _page(report, checks, samples)}
        for kind, text in texts.items():
            # File names may be any bytes.
            content = text.encode("utf-8", "surrogateescape")
            write_atomically(Path(output_dir, f"inspect.{kind}"), _writer(content))
    return report


def _writer(content: bytes) -> Callable[[str], object]:
    return lambda path: Path(path).write_bytes(content)


def _contents(checks: dict[str, DatasetStatistics], labels: Labels | None) -> dict[str, Any]:
    """Return the parts of the report that are numbers of images and pixels."""
    splits = {
        split: {
            "images": len(found.digests),
            "pixels": int(found.pixels.sum()),
            "unlabelled_pixels": int(found.pixels[IGNORE_INDEX]),
        }
        for split, found in checks.items()
    }
    names = () if labels is None else labels.names
    mean = std = None
    weights: list[float | None] = [None] * len(names)
    if "train" in checks and splits["train"]["pixels"]:
        mean, std = checks["train"].mean_and_std()
        weights = class_weights(torch.from_numpy(checks["train"].pixels[: len(names)])).tolist()
    classes = {
        name: {
            "pixels": {split: int(found.pixels[i]) for split, found in checks.items()},
            "images": {split: int(found.images[i]) for split, found in checks.items()},
            "weight": weights[i],
        }
        for i, name in enumerate(names)
    }
    return {"splits": splits, "classes": classes, "mean": mean, "std": std}


def _duplicates(
    checks: dict[str, DatasetStatistics], samples: dict[str, BaseDataset]
) -> list[dict[str, Any]]:
    """Return for each image of a split the one most like it in each earlier split, if any is."""
    duplicates = []
    vectors = {split: _normalised(check.thumbnails) for split, check in checks.items()}
    for first, second in combinations(checks, 2):
        same = {digest: i for i, digest in enumerate(checks[first].digests.tolist()) if digest}
        for start in range(0, len(vectors[second]), 256):  # a block needs 256 x N numbers
            similarity = vectors[first] @ vectors[second][start : start + 256].T
            for j, i in enumerate(similarity.argmax(axis=0).tolist(), start):
                value = float(similarity[i, j - start])
                twin = same.get(bytes(checks[second].digests[j]))
                if twin is not None or value > NEAR:
                    pair = {first: i if twin is None else twin, second: j}
                    duplicates.append(
                        {
                            "splits": [*pair],
                            "indices": [*pair.values()],
                            "names": [samples[s].name(k, "image") for s, k in pair.items()],
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


def _notes(report: dict[str, Any]) -> list[str]:
    """Return what the numbers say, in sentences."""
    splits, classes, notes = report["splits"], report["classes"], []
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
        exact = [d["exact"] for d in report["duplicates"] if d["splits"] == [first, second]]
        if exact:
            notes.append(
                f"{len(exact)} of {splits[second]['images']} images of {second} are in {first}, "
                f"too: {sum(exact)} exactly, {len(exact) - sum(exact)} nearly. Take them out of "
                "one of the two, else the scores flatter the model."
            )
    return notes


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.1f} %"


def class_cells(report: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """Return share of the pixels and number of images of a class by split, and its weight."""
    cells = []
    for split, pixels in row["pixels"].items():
        share = _percent(pixels / max(report["splits"][split]["pixels"], 1))
        cells.append(f"{share}\n{row['images'][split]:,}" if pixels else "never")
    return [*cells, "" if row["weight"] is None else f"{row['weight']:.4g}"]


# The page


def _page(
    report: dict[str, Any], checks: dict[str, DatasetStatistics], samples: dict[str, BaseDataset]
) -> str:
    """Return the report as HTML, with images of some samples and of the duplicates."""
    problems, duplicates = report["problems"], report["duplicates"]
    verdict = "No problems: ready to train."
    parts = []
    if problems:
        verdict = f"Training would be refused: {len(problems)} problem{'s' * (len(problems) > 1)}."
        rows = [
            (escape(p["message"]), "\n".join(f"{v}: {n:,}" for v, n in p["pixels"].items()))
            for p in problems
        ]
        parts = ["<h2>Problems</h2>", table(("problem", "value: pixels"), rows)]
    parts.insert(0, f'<p class="verdict{" bad" * bool(problems)}">{verdict}</p>')
    parts += [f"<p>{escape(note)}</p>" for note in report["notes"]]
    if duplicates:
        most = sorted(duplicates, key=lambda d: -d["similarity"])[:DUPLICATES]
        parts += ["<h2>Duplicates</h2>", f"<p>The nearest {len(most)} of {len(duplicates)}.</p>"]
        parts.append(grid(_duplicate_figure(d, samples) for d in most))
    for split, found in checks.items():
        parts += [f"<h2>Samples of {split}</h2>", _sample_figures(samples[split], found)]
    if checks:
        parts += ["<h2>Classes</h2>", "<p>Share of the pixels, and images with the class.</p>"]
        parts.append(_class_table(report, next(iter(samples.values())).labels))
    if report["mean"]:
        parts += ["<h2>Settings from the training images</h2>", _settings(report)]
    return page(f"Dataset {report['dataset']}", parts)


def _class_table(report: dict[str, Any], labels: Labels) -> str:
    header = [f"{split}: {c['images']:,} images" for split, c in report["splits"].items()]
    rows = enumerate(report["classes"].values())
    cells = [[key(labels, i), *class_cells(report, row)] for i, row in rows]
    return table(["class", *header, "weight"], cells)


def _settings(report: dict[str, Any]) -> str:
    values = {f"preprocessing.{key}": report[key] for key in ("mean", "std")}
    weights = [row["weight"] for row in report["classes"].values()]
    values["loss=weighted_ce loss.weights"] = weights
    lines = [f"{key}=[{','.join(f'{v:.4f}' for v in vs)}]" for key, vs in values.items()]
    return (
        "<p>Mean and standard deviation are for models without published weights; others bring "
        "their own. The weights are those that loss=weighted_ce takes by itself.</p>"
        f"<pre>{chr(10).join(lines)}</pre>"
    )


def _duplicate_figure(duplicate: dict[str, Any], samples: dict[str, BaseDataset]) -> str:
    places = zip(duplicate["splits"], duplicate["indices"], strict=True)
    images = [
        Image.fromarray(_shown(samples[split], samples[split][index][0])) for split, index in places
    ]
    names = [
        f"{split}: {Path(name).name}"
        for split, name in zip(duplicate["splits"], duplicate["names"], strict=True)
    ]
    how = "the same pixels" if duplicate["exact"] else f"correlation {duplicate['similarity']}"
    return figure(images, f"{', '.join(names)} ({how})")


def _shown(dataset: BaseDataset, image: torch.Tensor) -> np.ndarray:
    return dataset.format.shown(as_array(image))


def _sample_figures(samples: BaseDataset, found: DatasetStatistics) -> str:
    """Return a few samples, evenly spaced, beside their overlays, with a legend."""
    usable = np.flatnonzero(found.digests != b"").tolist()
    figures, shown = [], set()
    for index in usable[:: -(-len(usable) // SAMPLES) or 1]:
        image, mask = checked_sample(samples, index)
        shown |= set(mask.unique().tolist())
        pixels = _shown(samples, image)
        images = [Image.fromarray(pixels), overlay(pixels, mask.numpy(), samples.labels)]
        figures.append(figure(images, Path(samples.name(index, "image")).name))
    legend = " ".join(key(samples.labels, i) for i in sorted(shown - {IGNORE_INDEX}))
    return f"{grid(figures)}<p>{legend}</p>"

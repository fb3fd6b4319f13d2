"""What is in a dataset, whether it can be trained on, and a page that shows both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from seg_torch.datamodule import SegmentationDataModule
from seg_torch.datasets.base import SPLITS, SegmentationDataset, checked_sample, mask_name
from seg_torch.datasets.check import Check, Problem, rgb
from seg_torch.errors import InputError
from seg_torch.files import write_atomically
from seg_torch.labels import IGNORE_INDEX, Labels
from seg_torch.losses import class_weights
from seg_torch.page import figure, page, table
from seg_torch.visualize import overlay

# Correlation of two thumbnails. An image that was re-encoded, halved or made 15 % brighter reaches
# 0.99 with itself, neighbouring frames of CamVid 0.93, other images of a dataset less.
NEAR = 0.98
SHOWN = 6  # samples of each split on the page
TWICE_SHOWN = 12  # pairs of duplicates on the page


def inspect_dataset(
    dataset: Callable[..., Any],
    root: str | Path | None = None,
    output_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Read every sample of a dataset's splits and report what is in them.

    Args:
        dataset: `dataset(split=...)` or, with `root`, `dataset(root=..., split=...)` gives the
            samples of `train`, `val` and `test`; see `seg_torch.datasets`.
        root: The dataset's folder.
        output_dir: Where `inspect.json` and `inspect.html` go; by default they are not written.

    Returns:
        What `inspect.json` holds:

        - `dataset`: the folder.
        - `refused`: whether training would be, because of the `problems`. Each of these has
          `file`, `problem` and, of values that are no class, `pixels` by value.
        - `notes`: what else to know before training, as sentences.
        - `splits`: `images`, `pixels` and `unlabelled_pixels` of each.
        - `classes`: of each class `pixels` and `images` by split, and its `weight` in
          `loss=weighted_ce`.
        - `mean` and `std` of red, green and blue over all training pixels, scaled to 0..1.
        - `duplicates`: images that are in two splits, by split, with `exact` (the same pixels) or
          not (`similarity`, a correlation).
    """
    data = SegmentationDataModule(dataset, None if root is None else str(root))
    checks: dict[str, Check] = {}
    problems: dict[str, Problem] = {}  # by message: all splits of a folder have the same ones
    notes = []
    for split in SPLITS:
        try:
            if split == "test" and "val" in checks and data.test_is_val:
                notes.append("There are no test images of their own: val stands in for test.")
                continue
            found = checks[split] = data.checked(split)
        except InputError as error:
            of_split = [Problem("", text, {}) for text in error.problems or [str(error)]]
        else:
            of_split = found.problems
        problems |= {problem.message: problem for problem in of_split}
    found_twice = doubles(checks)
    report: dict[str, Any] = {
        "dataset": None if root is None else str(Path(root).expanduser().absolute()),
        "refused": bool(problems),
        "problems": [
            {"file": p.file or None, "problem": p.message, "pixels": p.pixels}
            for p in problems.values()
        ],
        "notes": notes,
        **_contents(data, checks),
        "duplicates": [
            {
                d.first: _name(data.originals(d.first), d.i),
                d.second: _name(data.originals(d.second), d.j),
                "exact": d.exact,
                "similarity": d.similarity,
            }
            for d in found_twice
        ],
    }
    notes += _notes(report)
    if output_dir is not None:
        folder, html = Path(output_dir), _page(report, data, checks, found_twice)
        for name, text in (("json", json.dumps(report, indent=1)), ("html", html)):
            content = text.encode("utf-8", "surrogateescape")  # file names may be any bytes
            write_atomically(folder / f"inspect.{name}", partial(_write, content))
    return report


def _write(content: bytes, path: str) -> None:
    Path(path).write_bytes(content)


def _contents(data: SegmentationDataModule, checks: dict[str, Check]) -> dict[str, Any]:
    """Return the parts of the report that are numbers of images and pixels."""
    contents: dict[str, Any] = {"splits": {}, "classes": {}, "mean": None, "std": None}
    for split, found in checks.items():
        contents["splits"][split] = {
            "images": len(found.digests),
            "pixels": int(found.pixels.sum()),
            "unlabelled_pixels": int(found.pixels[IGNORE_INDEX]),
        }
    train = checks.get("train")
    if train is not None and train.pixels.any():
        contents["mean"], contents["std"] = train.mean_and_std()
    weights = None
    if train is not None:
        weights = class_weights(torch.from_numpy(train.pixels[: len(data.labels)])).tolist()
    for i, name in enumerate(data.labels.names if checks else []):
        contents["classes"][name] = {
            "pixels": {split: int(found.pixels[i]) for split, found in checks.items()},
            "images": {split: int(found.images[i]) for split, found in checks.items()},
            "weight": weights and weights[i],
        }
    return contents


class Double(NamedTuple):
    """Sample `i` of the split `first` and sample `j` of `second` have the same image, or nearly."""

    first: str
    i: int
    second: str
    j: int
    exact: bool
    similarity: float


def doubles(checks: dict[str, Check]) -> list[Double]:
    """Return for each image of a split the one most like it in each earlier split.

    Exact ones have the same pixels; of the others, thumbnails in grey have a correlation above
    `NEAR`. Images without contrast have exact doubles only.

    Args:
        checks: The result of the check by split.
    """
    found = []
    vectors = {split: _normalised(check.thumbnails) for split, check in checks.items()}
    for first, second in combinations(checks, 2):
        same = {digest: i for i, digest in enumerate(checks[first].digests.tolist()) if digest}
        for start in range(0, len(vectors[second]), 256):  # a block needs 256 x N numbers
            similarity = vectors[first] @ vectors[second][start : start + 256].T
            nearest = similarity.argmax(axis=0).tolist()
            for column, i in enumerate(nearest):
                j, value = start + column, float(similarity[i, column])
                digest = bytes(checks[second].digests[j])
                if digest in same:
                    found.append(Double(first, same[digest], second, j, True, 1.0))
                elif value > NEAR:
                    found.append(Double(first, i, second, j, False, round(value, 4)))
    return found


def _normalised(thumbnails: np.ndarray) -> np.ndarray:
    """Return vectors [N, 256] of mean 0 and length 1, whose products are correlations.

    An image without contrast, which would resemble every other, becomes zero.
    """
    vectors = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    vectors -= vectors.mean(axis=1, keepdims=True)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    contrast = length / thumbnails[0].shape[0]  # the standard deviation, in grey levels
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
    if "train" in splits:
        never = [name for name, row in classes.items() if not row["pixels"]["train"]]
        if never:
            notes.append(f"Never seen in train, so never learnt: {', '.join(never)}.")
        for split in [split for split in splits if split != "train"]:
            absent = [n for n, r in classes.items() if n not in never and not r["pixels"][split]]
            if absent:
                notes.append(
                    f"Never seen in {split}, so without a score there: {', '.join(absent)}."
                )
    for first, second in combinations(splits, 2):
        pairs = [d for d in report["duplicates"] if {first, second} <= d.keys()]
        if pairs:
            exact = sum(d["exact"] for d in pairs)
            notes.append(
                f"{len(pairs)} of {splits[second]['images']} images of {second} are in {first}, "
                f"too: {exact} exactly, {len(pairs) - exact} nearly. Take them out of one of the "
                "two, else the scores flatter the model."
            )
    return notes


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.1f} %"


def _page(
    report: dict[str, Any],
    data: SegmentationDataModule,
    checks: dict[str, Check],
    found_twice: list[Double],
) -> str:
    problems, splits = report["problems"], report["splits"]
    verdict = "No problems: ready to train."
    if problems:
        verdict = f"Training would be refused: {len(problems)} problem{'s' * (len(problems) > 1)}."
    parts = [f'<p class="verdict{" bad" * bool(problems)}">{verdict}</p>']
    if problems:
        rows = [
            (escape(p["problem"]), "\n".join(f"{escape(v)}: {n:,}" for v, n in p["pixels"].items()))
            for p in problems
        ]
        parts += ["<h2>Problems</h2>", table(("problem", "value: pixels"), rows)]
    parts += [f"<p>{escape(note)}</p>" for note in report["notes"]]
    if found_twice:
        most = sorted(found_twice, key=lambda d: -d.similarity)[:TWICE_SHOWN]
        parts += ["<h2>Duplicates</h2>", f"<p>The nearest {len(most)} of {len(found_twice)}.</p>"]
        parts.append(_grid(_double_figure(data, double) for double in most))
    for split in splits:
        parts += [f"<h2>Samples of {split}</h2>", _samples(data.originals(split), checks[split])]
    if splits:
        parts += ["<h2>Classes</h2>", _class_table(report, data.labels)]
    if report["mean"]:
        weights = [row["weight"] for row in report["classes"].values()]
        settings = "\n".join(
            f"{key}=[{','.join(f'{value:.4f}' for value in values)}]"
            for key, values in (
                ("preprocessing.mean", report["mean"]),
                ("preprocessing.std", report["std"]),
                ("loss=weighted_ce loss.weights", weights),
            )
        )
        parts.append(
            "<h2>Settings from the training images</h2><p>Mean and standard deviation are for "
            "models without published weights; others bring their own. The weights are those "
            f"that loss=weighted_ce takes by itself.</p><pre>{settings}</pre>"
        )
    return page(f"Dataset {report['dataset'] or ''}", parts)


def _class_table(report: dict[str, Any], labels: Labels) -> str:
    """Return share of the pixels and number of images of each class."""
    header = [f"{split}: {c['images']:,} images" for split, c in report["splits"].items()]
    rows = enumerate(report["classes"].values())
    cells = [[_key(labels, i), *class_cells(report, row)] for i, row in rows]
    return table(["share of the pixels, images with the class", *header, "weight"], cells)


def class_cells(report: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """Return share of the pixels and number of images of a class by split, and its weight."""
    cells = []
    for split, pixels in row["pixels"].items():
        share = _percent(pixels / max(report["splits"][split]["pixels"], 1))
        cells.append(f"{share}\n{row['images'][split]:,}" if pixels else "never")
    return [*cells, "" if row["weight"] is None else f"{row['weight']:.4g}"]


def _key(labels: Labels, i: int) -> str:
    colour = bytes(labels.palette[i]).hex()
    return f'<span class="key"><i style="background:#{colour}"></i>{escape(labels.names[i])}</span>'


def _grid(figures: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def _double_figure(data: SegmentationDataModule, double: Double) -> str:
    names, images = [], []
    for split, index in ((double.first, double.i), (double.second, double.j)):
        dataset = data.originals(split)
        names.append(f"{split}: {Path(_name(dataset, index)).name}")
        images.append(_fitted(Image.fromarray(rgb(dataset[index][0]))))
    how = "the same pixels" if double.exact else f"correlation {double.similarity}"
    return figure(images, f"{', '.join(names)} ({how})")


def _samples(dataset: Any, found: Check) -> str:
    """Return a few samples, evenly spaced, beside their overlays, with a legend."""
    usable = np.flatnonzero(found.digests != b"").tolist()
    figures, shown = [], set()
    for index in usable[:: -(-len(usable) // SHOWN) or 1]:
        image, mask = checked_sample(dataset, index)
        pixels = rgb(image)
        shown |= set(np.unique(mask).tolist())
        beside = overlay(pixels, mask.numpy(), dataset.labels)
        name = Path(_name(dataset, index)).name
        figures.append(figure(map(_fitted, (Image.fromarray(pixels), beside)), name))
    legend = " ".join(_key(dataset.labels, i) for i in sorted(shown - {IGNORE_INDEX}))
    return f"{_grid(figures)}<p>{legend}</p>"


def _name(dataset: Any, index: int) -> str:
    files = isinstance(dataset, SegmentationDataset)
    return str(dataset.pairs[index].image) if files else mask_name(dataset, index)


def _fitted(image: Image.Image) -> Image.Image:
    """Return an image of at most 360 x 360 pixels; small ones are not enlarged."""
    copy = image.copy()
    copy.thumbnail((360, 360))
    return copy

"""seg-torch report: how good a model is and where it fails, in one HTML file."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable, Iterator
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from seg_torch.checkpoints import checkpoint
from seg_torch.datasets.base import checked_sample
from seg_torch.drawing.page import SORT, figure, grid, key, page, plot, table
from seg_torch.drawing.visualize import confusion_matrix, curves, errors, reliability
from seg_torch.evaluation.bootstrap import (
    METHOD,
    ImageCounts,
    interval,
    read_image_counts,
    resampled_sums,
)
from seg_torch.evaluation.results import Results
from seg_torch.evaluation.scorer import Scorer, score
from seg_torch.evaluation.setup import Model, open_for_scoring
from seg_torch.files import write_atomically
from seg_torch.images.format import ImageFormat
from seg_torch.labels import Labels, palette_image
from seg_torch.metrics.counts import class_scores, mean_over_classes, mean_scores
from seg_torch.prediction.segmentation import segment
from seg_torch.training.run import COLUMNS, read_table
from seg_torch.version import __version__

log = logging.getLogger(__name__)

WORST, BEST, DOUBTFUL = 6, 3, 6  # images that are shown
PACKAGES = ("torch", "torchvision", "lightning", "timm", "numpy")
CLASS_SCORES = (
    "dice",
    "accuracy",
    "precision",
    "average_precision",
    "boundary_iou",
    "boundary_f",
)


def report(cfg: DictConfig) -> None:
    """Scores a checkpoint and writes `report.html` beside the scores."""
    trainer, scorer, data, folder, model = open_for_scoring(cfg, label_quality=True)
    results = score(trainer, scorer, data, folder, cfg.split)
    if not trainer.is_global_zero:
        return
    scores = results.scores
    counts = read_image_counts(folder / f"{cfg.split}_images.npz")
    dataset = data.dataset(cfg.split)
    shown = _shown(scorer, results, dataset, counts, data.format)
    parts = [
        *_scores(scores, counts, cfg.split),
        *_classes(scores, counts, scorer.labels),
        "<h2>Confusion matrix</h2>",
        "<p>Shares of the pixels of each label.</p>",
        plot(confusion_matrix(np.array(scores["confusion_matrix"]), scorer.labels), "confusion"),
        *_calibration(scores),
        *_learning_curves(cfg.checkpoint),
        *shown,
        *_origin(cfg, model, scores["precision"], trainer),
        SORT,
    ]
    content = page(f"Report on {cfg.checkpoint}", parts)
    path = folder / "report.html"
    # File names may be any bytes.
    write_atomically(
        path, lambda name: Path(name).write_bytes(content.encode("utf-8", "surrogateescape"))
    )
    log.info("%s", path)


def _scores(scores: dict[str, Any], counts: ImageCounts, split: str) -> Iterator[str]:
    """Return the scores that are one number, with intervals where counts of images give them."""
    limits = {
        name: interval(values)
        for name, values in mean_scores(resampled_sums(counts.counts)).items()
    }
    rows = []
    for name, value in scores.items():
        # Recall is another name of accuracy.
        if name != "mean_recall" and (value is None or isinstance(value, float)):
            limit = _interval(*limits[name]) if name in limits else ""
            rows.append((_words(name), _number(value), limit))
    found = f"{_number(scores['mean_iou'])} ({_interval(*limits['mean_iou'])})"
    images = f"{len(counts.names):,} images of {split}"
    yield f'<p class="verdict">Mean IoU {found} on the {images}.</p>'
    yield "<h2>Scores</h2>"
    yield table(("score", "value", "95 % interval"), rows)
    yield (
        f"<p>{METHOD}. They are too narrow where there are few images, or where these depend on "
        "each other, as the frames of a video do.</p>"
    )


def _classes(scores: dict[str, Any], counts: ImageCounts, labels: Labels) -> Iterator[str]:
    limits = interval(class_scores(resampled_sums(counts.counts))["iou"])
    per_class = list(scores["per_class"].values())
    more = [name for name in CLASS_SCORES if name in per_class[0]]
    rows = []
    for i, (row, low, high) in enumerate(zip(per_class, *limits, strict=True)):
        width = 100 * (row["iou"] or 0)
        rows.append(
            (
                key(labels, i),
                f'{_number(row["iou"])}<span class="bar" style="width:{width:.1f}%"></span>',
                _interval(low, high),
                *(_number(row[name]) for name in more),
                f"{row['pixels']:,}",
            )
        )
    yield "<h2>Classes</h2>"
    header = ("class", "IoU", "95 % interval", *map(_words, more), "pixels")
    yield table(header, rows)


def _calibration(scores: dict[str, Any]) -> Iterator[str]:
    if bins := scores.get("reliability"):
        yield "<h2>Reliability</h2>"
        yield (
            "<p>How often the predictions of a confidence are right. The expected calibration "
            f"error is {_number(scores['expected_calibration_error'])}.</p>"
        )
        yield plot(reliability(bins), "accuracy by confidence")


def _learning_curves(path: str) -> Iterator[str]:
    run = checkpoint.run_of(path)
    history = [] if run is None else read_table(run / "metrics.csv", COLUMNS)
    if history:
        yield "<h2>Training</h2>"
        yield plot(curves(history), "losses and validation scores by epoch")


# Images


def _shown(
    scorer: Scorer,
    results: Results,
    dataset: Any,
    counts: ImageCounts,
    format: ImageFormat,
) -> Iterator[str]:
    """Return the worst and best images, and those whose labels are most likely to be wrong.

    One image at a time is predicted once more, as it was scored.
    """
    iou = mean_over_classes(class_scores(counts.counts)["iou"])
    quality, confidence = results.images["label_quality"], results.images["confidence"]

    def figures(indices: Iterable[int]) -> str:
        return grid(
            figure(
                _views(scorer, format, *checked_sample(dataset, i)),
                f"{counts.names[i]}: mean IoU {iou[i]:.3f}, confidence {confidence[i]:.3f}, "
                f"label quality {quality[i]:.3f}",
            )
            for i in indices
        )

    order = _lowest(iou)
    worst, best = order[:WORST], order[WORST:][-BEST:][::-1]
    yield "<h2>Worst images</h2>"
    yield (
        "<p>By mean IoU over the classes in label or prediction. Image and label, prediction and "
        "errors (red).</p>"
    )
    yield " ".join(key(scorer.labels, i) for i in range(len(scorer.labels)))
    yield figures(worst)
    if best:
        yield "<h2>Best images</h2>"
        yield figures(best)
    yield "<h2>Labels most likely to be wrong</h2>"
    yield (
        "<p>By the softmin score (Lad and Mueller 2023): the mean probability that the network "
        "gives the label of a pixel, in which improbable ones count most.</p>"
    )
    yield figures(_lowest(quality)[:DOUBTFUL])


def _lowest(values: np.ndarray) -> list[int]:
    """Return the indices from the lowest to the highest value, without nan."""
    order = np.argsort(values, kind="stable")
    return [int(i) for i in order if np.isfinite(values[i])]


def _views(
    scorer: Scorer, format: ImageFormat, image: torch.Tensor, mask: torch.Tensor
) -> list[Image.Image]:
    """Image, label, prediction and errors."""
    label, labels = mask.numpy(), scorer.labels
    (result,) = segment(scorer.inference, labels, [format.checked(image)], format)
    coloured = [palette_image(ids, labels).convert("RGB") for ids in (label, result.mask)]
    return [
        Image.fromarray(result.image),
        *coloured,
        errors(result.image, label, result.mask),
    ]


# Where it comes from


def _origin(cfg: DictConfig, model: Model, precision: str, trainer: Trainer) -> Iterator[str]:
    run = checkpoint.run_of(cfg.checkpoint)
    if run is not None:
        config = (run / "config.yaml").read_text(encoding="utf-8")
    else:
        config = OmegaConf.to_yaml(model.config)
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    rows = [
        ("seg_torch", __version__),
        *((package, version(package)) for package in PACKAGES),
        ("Python", platform.python_version()),
        ("device", f"{device.type} {name}"),
        ("precision", precision),
        ("tiles", str(cfg.tile)),
        ("test-time augmentation", str(cfg.tta)),
    ]
    yield "<h2>Versions and settings</h2>"
    yield table(("", ""), [(escape(k), escape(v)) for k, v in rows])
    yield f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>"


def _words(name: str) -> str:
    return name.replace("_", " ").replace("iou", "IoU")


def _number(value: float | None) -> str:
    return "absent" if value is None else f"{value:.4f}"


def _interval(low: Any, high: Any) -> str:
    return "" if np.isnan(low) else f"{low:.3f} to {high:.3f}"

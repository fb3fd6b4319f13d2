"""The page of seg-torch report: how good a model is and where it fails."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from seg_torch.checkpoints import checkpoint
from seg_torch.datasets.base import checked_sample
from seg_torch.drawing.curves import confusion_matrix, curves, reliability
from seg_torch.drawing.page import Figure, figure, plot, render
from seg_torch.drawing.visualize import error_overlay
from seg_torch.evaluation.bootstrap import METHOD, interval, resampled_sums
from seg_torch.evaluation.results import Results
from seg_torch.evaluation.setup import Setup
from seg_torch.labels import palette_image
from seg_torch.metrics.counts import class_scores, mean_scores, stack_counts
from seg_torch.prediction.segmentation import segment
from seg_torch.training.run import COLUMNS, read_table
from seg_torch.version import __version__

WORST, BEST, DOUBTFUL = 6, 3, 6  # images that are shown
PACKAGES = ("torch", "torchvision", "lightning", "timm", "numpy")


def report_page(cfg: DictConfig, setup: Setup, results: Results) -> str:
    """Return the page, for which a few images are predicted once more, as they were scored.

    Args:
        cfg: Settings of the command.
        setup: What was scored.
        results: Of the scoring, with `label_quality`.
    """
    scores, counts = results.scores, stack_counts(results.images)
    sums = resampled_sums(counts)
    iou = mean_scores(counts)["mean_iou"]
    order = _lowest(iou)
    doubtful = _lowest(results.images["label_quality"])[:DOUBTFUL]
    run = checkpoint.run_of(cfg.checkpoint)
    config = OmegaConf.to_yaml(setup.model.config)
    history: list[dict[str, Any]] = []
    if run is not None:
        config = (run / "config.yaml").read_text(encoding="utf-8")
        history = read_table(run / "metrics.csv", COLUMNS)
    matrix, bins = np.array(scores["confusion_matrix"]), scores["reliability"]
    return render(
        "report.html",
        title=f"Report on {cfg.checkpoint}",
        scored_on=results.scored_on(cfg.split),
        labels=results.labels,
        scores=scores,
        limits={name: interval(values) for name, values in mean_scores(sums).items()},
        class_limits=np.transpose(interval(class_scores(sums)["iou"])),
        method=METHOD,
        confusion_matrix=plot(confusion_matrix(matrix, results.labels)),
        reliability=plot(reliability(bins)) if bins else None,
        curves=plot(curves(history, narrow=True)) if history else None,
        worst=_figures(setup, results, iou, order[:WORST]),
        best=_figures(setup, results, iou, order[WORST:][-BEST:][::-1]),
        doubtful=_figures(setup, results, iou, doubtful),
        versions_and_settings=_versions_and_settings(cfg, setup),
        config=config,
    )


def _lowest(values: np.ndarray) -> list[int]:
    """Return the indices from the lowest to the highest value, without nan."""
    return np.argsort(values, kind="stable")[: np.isfinite(values).sum()].tolist()


def _figures(
    setup: Setup, results: Results, iou: np.ndarray, indices: Sequence[int]
) -> list[Figure]:
    """Return image, label, prediction and errors of each of some images."""
    labels, format, inference = results.labels, setup.data.format, setup.scorer.inference
    # The Trainer has left the device, and the network in the mode of training.
    setup.scorer.to(setup.trainer.strategy.root_device).eval()
    quality, confidence = results.images["label_quality"], results.images["confidence"]
    dataset = setup.data.dataset(setup.data.test_split)
    figures = []
    for i in indices:
        image, mask = checked_sample(dataset, results.indices[i])
        (result,) = segment(inference, labels, [format.checked(image)], format)
        maps = [
            palette_image(ids, labels.drawn).convert("RGB") for ids in (mask.numpy(), result.mask)
        ]
        errors = error_overlay(result.image, mask.numpy(), result.mask)
        caption = (
            f"{results.names[i]}: mean IoU {iou[i]:.3f}, confidence {confidence[i]:.3f}, "
            f"label quality {quality[i]:.3f}"
        )
        figures.append(figure([Image.fromarray(result.image), *maps, errors], caption))
    return figures


def _versions_and_settings(cfg: DictConfig, setup: Setup) -> dict[str, Any]:
    device = setup.trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "seg_torch": __version__,
        **{package: version(package) for package in PACKAGES},
        "Python": platform.python_version(),
        "device": f"{device.type} {name}",
        "precision": setup.scorer.inference.precision,
        "tiles": cfg.tile,
        "test-time augmentation": cfg.tta,
    }

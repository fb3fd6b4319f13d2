"""seg-torch export: a network as one file that other programs run."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Subset

from seg_torch.checkpoints import checkpoint
from seg_torch.checkpoints.exported import (
    SUFFIXES,
    ExportedNetwork,
    Graph,
    Run,
    load_network,
    open_exported,
    write,
)
from seg_torch.datasets import shapes
from seg_torch.errors import InputError, check_choice
from seg_torch.evaluation.setup import Model, open_data
from seg_torch.files import PARTIAL
from seg_torch.images.resize import resize_image
from seg_torch.metrics import ConfusionMatrix, scores
from seg_torch.upsample import upsample

log = logging.getLogger(__name__)

SIZES = ((64, 96), (161, 225), (250, 187))  # of the images on which both are compared
SAME = 0.999  # the share of the pixels that must be the same in float32
CALIBRATION = 100  # images


def export(cfg: DictConfig) -> None:
    """Export a checkpoint, and compares the file with the network.

    Raises:
        InputError: The checkpoint or a setting cannot be used, the model cannot be exported, or
            what was exported differs from it.
    """
    check_choice("format", cfg.format, SUFFIXES)
    if cfg.int8 and cfg.format != "openvino":
        raise InputError(f"int8=true needs format=openvino, not {cfg.format}")
    network, labels, description = load_network(cfg.checkpoint, cfg.trust)
    if isinstance(network, ExportedNetwork):
        raise InputError(f"checkpoint={cfg.checkpoint} is exported already; give the checkpoint")
    format = checkpoint.image_format(description)
    if format.bits != 8:
        raise InputError("exported graphs take images of 8 bits, and this network those of 16")
    source = checkpoint.locate(cfg.checkpoint)
    if cfg.checkpoint.startswith(checkpoint.HUB_SCHEME) and not cfg.output:
        raise InputError(f"checkpoint={cfg.checkpoint} lies in a cache: give output=FILE")
    suffix = SUFFIXES[cfg.format]
    path = Path(cfg.output) if cfg.output else source.with_name(source.stem + suffix)
    if not path.name.endswith(suffix):
        raise InputError(f"output={path}: a file of format={cfg.format} is called NAME{suffix}")
    resize = description["preprocessing"]["resize"]
    model = Model(cfg.checkpoint, network, labels, resize, format, description)
    samples = _validation(cfg, model) if cfg.int8 else None
    images = [_seen(samples[i][0], resize) for i in range(len(samples))] if samples else None
    graph = Graph(network.eval(), resize, cfg.probabilities)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as folder:
        draft = Path(folder, path.name)
        write(graph, draft, cfg.format, description, images)
        run, _ = open_exported(draft, trusted=True)
        same = _compare(graph, run)
        if samples is not None:
            _score(graph, run, samples, len(labels))
        del run  # Windows moves no file that is open
        if same < SAME and not cfg.int8:
            raise InputError(
                f"{100 * (1 - same):.2f} % of the pixels differ from those of the network, so "
                f"{path} was not written: format={cfg.format} does not do what this model needs"
            )
        _move(draft, path)
    megabytes = [sum(f.stat().st_size for f in files) / 1e6 for files in ([source], _files(path))]
    log.info("%s: %.1f MB; the checkpoint has %.1f MB", path, megabytes[1], megabytes[0])


def _validation(cfg: DictConfig, model: Model) -> Subset[Any]:
    """Return validation images, evenly spaced, since neighbours are often alike."""
    dataset = open_data(cfg, model).dataset("val")
    return Subset(dataset, range(0, len(dataset), -(-len(dataset) // CALIBRATION)))


def _seen(image: Tensor, resize: Sequence[int] | None) -> np.ndarray:
    """Return an image uint8 [1, C, H, W], at the size at which the network sees it."""
    return (image if resize is None else resize_image(image, resize)).numpy()[None]


def _score(graph: Graph, run: Run, samples: Subset[Any], num_classes: int) -> None:
    """Log what int8 costs on validation images: the pixels that change, and the mean IoU."""
    before, after, changes = (ConfusionMatrix(num_classes) for _ in range(3))
    for i in range(len(samples)):
        image, mask = samples[i]
        images, target = image.as_subclass(Tensor)[None], mask.as_subclass(Tensor)[None]
        with torch.no_grad():
            expected = graph(images)[0]
        (found,) = run(images, ["classes"])
        before.update(expected, target)
        after.update(found, target)
        changes.update(found, expected)
    log.info(
        "int8 on %d validation images: %.2f %% of the pixels as in float32; mean IoU %.4f, "
        "in float32 %.4f",
        len(samples),
        100 * scores(changes.compute())["pixel_accuracy"].item(),
        scores(after.compute())["mean_iou"].item(),
        scores(before.compute())["mean_iou"].item(),
    )


def _compare(graph: Graph, run: Run) -> float:
    """Print how an exported graph compares; returns the smallest share of equal pixels."""
    table = Table(title="exported against the network")
    for column in ("image", "pixels the same", "probabilities differ by", "network", "exported"):
        table.add_column(column, justify="right")
    shares = []
    channels = len(graph.network.mean)
    image, _ = shapes("val", size=max(map(max, SIZES)))[0]
    scene = torch.as_tensor(image)[torch.arange(channels) % len(image)]
    for height, width in SIZES:
        images = scene[None, :, :height, :width].contiguous()
        with torch.no_grad():
            expected, before = _timed(partial(graph, images))
        try:
            found, after = _timed(partial(run, images, graph.outputs))
        except Exception as error:  # there is no end to what the runtimes raise
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"what was exported does not run on an image of {height} x {width}: {reason}"
            ) from error
        shares.append((found[0] == expected[0]).double().mean().item())
        chosen = [upsample(o[1], (height, width)).softmax(1) for o in (expected, found)]
        probabilities = [*chosen, *expected[2:], *found[2:]]
        difference = max((p - probabilities[0]).abs().max().item() for p in probabilities)
        times = (f"{1000 * seconds:.1f} ms" for seconds in (before, after))
        row = (f"{height} x {width}", f"{100 * shares[-1]:.3f} %", f"{difference:.1e}")
        table.add_row(*row, *times)
    Console().print(table)
    return min(shares)


def _timed(function: Callable[[], Any]) -> tuple[list[Tensor], float]:
    """Return the result, and the median of three times after a first call."""
    result, times = function(), []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return list(result), median(times)


def _files(path: Path) -> list[Path]:
    """Return an exported network's files, in the order in which they are replaced."""
    return [path.with_suffix(".bin"), path] if path.suffix == ".xml" else [path]


def _move(draft: Path, path: Path) -> None:
    """Put the files in their place. A process that is killed never leaves two that do not fit."""
    if len(_files(path)) > 1:
        path.unlink(missing_ok=True)
    for new, old in zip(_files(draft), _files(path), strict=True):
        os.replace(new, old)

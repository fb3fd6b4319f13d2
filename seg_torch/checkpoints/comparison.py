"""How an exported network compares with the network that it came from."""

import logging
import timeit
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from seg_torch.checkpoints.exported import Graph, GraphRunner
from seg_torch.datasets import shapes
from seg_torch.drawing.table import print_table
from seg_torch.errors import InputError, reason
from seg_torch.metrics import ConfusionMatrix, scores
from seg_torch.upsample import upsample

log = logging.getLogger(__name__)

# Images on which both are compared: how many at once, and their size, the first the smallest.
SIZES = ((2, 32, 32), (1, 64, 96), (1, 161, 225), (1, 250, 187))


@torch.no_grad()
def compare(graph: Graph, run: GraphRunner) -> float:
    """Print how an exported graph compares, and return the smallest share of equal pixels."""
    header = ("image", "pixels the same", "probabilities differ by", "network", "exported")
    rows, shares = [], []
    channels = len(graph.network.mean)
    side = graph.resize
    sizes = [*SIZES, (1, side + 64, side + 32)] if isinstance(side, int) else SIZES
    image, _ = shapes("val", size=max(map(max, sizes)))[0]
    scene = torch.as_tensor(image)[torch.arange(channels) % len(image)]
    for count, height, width in sizes:
        images = torch.stack([scene[:, i : i + height, :width] for i in range(count)])
        expected, before = _timed(partial(graph, images))
        size = f"{count} x " * (count > 1) + f"{height} x {width}"
        try:
            result, after = _timed(partial(run, images, graph.outputs))
        except Exception as error:  # there is no end to what the runtimes raise
            raise InputError(
                f"what was exported does not run on an image of {size}: {reason(error)}"
            ) from error
        shares.append((result[0] == expected[0]).double().mean().item())
        chosen = [upsample(o[1], (height, width)).softmax(1) for o in (expected, result)]
        probabilities = [*chosen, *expected[2:], *result[2:]]
        difference = max((p - probabilities[0]).abs().max().item() for p in probabilities)
        times = (f"{1000 * seconds:.1f} ms" for seconds in (before, after))
        rows.append([size, f"{100 * shares[-1]:.3f} %", f"{difference:.1e}", *times])
    print_table("exported against the network", header, rows)
    return min(shares)


def _timed(function: Callable[[], Any]) -> tuple[list[Tensor], float]:
    """Return the result, and the median of three times after a first call."""
    return list(function()), median(timeit.repeat(function, number=1, repeat=3))


@torch.no_grad()
def log_int8_scores(graph: Graph, run: GraphRunner, samples: DataLoader, num_classes: int) -> None:
    """Log what int8 costs on validation images: the pixels that change, and the mean IoU."""
    before, after, changes = (ConfusionMatrix(num_classes) for _ in range(3))
    for images, target in samples:
        expected = graph(images)[0]
        (result,) = run(images, ["classes"])
        before.update(expected, target)
        after.update(result, target)
        changes.update(result, expected)
    log.info(
        "int8 on %d validation images: %.2f %% of the pixels as in float32; mean IoU %.4f, "
        "in float32 %.4f",
        len(samples),
        100 * scores(changes.compute())["pixel_accuracy"].item(),
        scores(after.compute())["mean_iou"].item(),
        scores(before.compute())["mean_iou"].item(),
    )

"""Colouring masks and counting confusions, against the usual ways, in one run.

python benchmarks/tables.py
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

import numpy as np
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from seg_torch import decode_segmap
from seg_torch.labels import VOC_PALETTE
from seg_torch.metrics import ConfusionMatrix

PALETTE = VOC_PALETTE[:21]


def decode_by_loop(mask: np.ndarray) -> np.ndarray:
    """The usual tutorial's way: a pass over the image for each class and channel."""
    r, g, b = (np.zeros_like(mask) for _ in range(3))
    for i, colour in enumerate(PALETTE):
        here = mask == i
        r[here], g[here], b[here] = colour
    return np.stack([r, g, b], axis=-1)


def milliseconds(function: Callable[[], object]) -> float:
    return min(timeit.repeat(function, number=3, repeat=7)) / 3 * 1000


def compare(name: str, usual: Callable[[], object], ours: Callable[[], object]) -> None:
    slow, fast = milliseconds(usual), milliseconds(ours)
    print(f"{name}: {slow:.1f} ms against {fast:.2f} ms, {slow / fast:.0f} times as fast")


generator = np.random.default_rng(0)
mask = generator.integers(0, 21, (1024, 2048)).astype(np.uint8)
assert np.array_equal(decode_by_loop(mask), decode_segmap(mask, PALETTE))
compare(
    "decode_segmap, 1024 x 2048, 21 classes",
    lambda: decode_by_loop(mask),
    lambda: decode_segmap(mask, PALETTE),
)

prediction = torch.from_numpy(generator.integers(0, 21, (8, 520, 520)))
target = torch.from_numpy(generator.integers(0, 21, (8, 520, 520)).astype(np.uint8))
jaccard = MulticlassJaccardIndex(21, ignore_index=255)
long_target = target.long()
confusion = ConfusionMatrix(21)
compare(
    "confusion matrix, 8 x 520 x 520, 21 classes",
    lambda: jaccard.update(prediction, long_target),
    lambda: confusion.update(prediction, target),
)

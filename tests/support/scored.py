"""Random maps, and the blocks as which the metrics of a test take them."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor
from torchmetrics import Metric

from seg_torch.metrics import ScoredBlock

NUM_CLASSES = 5


def random_maps(num_classes: int = NUM_CLASSES, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(num_classes, (7, 13, 17), generator=generator, dtype=torch.uint8)
    prediction = torch.randint(num_classes, (7, 13, 17), generator=generator)
    agreeing = torch.rand(target.shape, generator=generator) < 0.5
    prediction = torch.where(agreeing, target.long(), prediction)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    return prediction, target


def scikit_matrix(prediction: Tensor, target: Tensor, num_classes: int) -> np.ndarray:
    valid = target != 255
    return confusion_matrix(target[valid], prediction[valid], labels=range(num_classes))


# 120 and 200 classes lie on both sides of the largest matrix that 16-bit bins can count.


def random_probabilities(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Probabilities that favour the label, float [7, C, 13, 17], and labels with ignored pixels."""
    _, target = random_maps(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, NUM_CLASSES, 13, 17, generator=generator)
    is_class = target.unsqueeze(1) == torch.arange(NUM_CLASSES).view(1, -1, 1, 1)
    return (logits + 1.5 * is_class).softmax(1), target


def blocks_of(
    target: Tensor,
    prediction: Tensor | None = None,
    logits: Tensor | None = None,
    image: int = 0,
    rows: int = 1000,
) -> Iterator[ScoredBlock]:
    """Yields the blocks of an image.

    Args:
        target: Integer [H, W].
        prediction: Integer [H, W], by default the argmax of the logits.
        logits: Float [C, H, W], by default of one class.
        image: Its number in the dataset.
        rows: Of each block.
    """
    height, width = target.shape
    if logits is None:
        logits = torch.zeros(1, height, width, device=target.device)
    if prediction is None:
        prediction = logits.argmax(0)
    for top in range(0, height, rows):
        part = slice(top, min(top + rows, height))
        maps = prediction.to(torch.uint8), target.to(torch.uint8)
        yield ScoredBlock(image, part, slice(0, width), logits[:, part], *maps)


def updated(metric: Metric, blocks: Iterable[ScoredBlock]) -> Metric:
    """Returns the metric after it has counted blocks."""
    for block in blocks:
        metric.update(block)
    return metric


def blocks_of_images(
    probabilities: Iterable[Tensor], target: Iterable[Tensor], rows: int = 1000
) -> Iterator[ScoredBlock]:
    """Yields the blocks of images of which the network gives probabilities, float [C, H, W]."""
    for image, (values, ids) in enumerate(zip(probabilities, target, strict=True)):
        yield from blocks_of(ids, logits=values.log(), image=image, rows=rows)

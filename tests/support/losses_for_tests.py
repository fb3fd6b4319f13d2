"""What tests of losses need: one of each, a batch with ignored pixels, papers' formulas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from seg_torch.losses import (
    BoundaryLoss,
    CrossEntropyLoss,
    DiceLoss,
    FocalLoss,
    LovaszSoftmaxLoss,
    OhemCrossEntropyLoss,
    TverskyLoss,
    WeightedSum,
)

NUM_CLASSES = 4
COUNTS = torch.tensor([500, 0, 100, 25])  # class 1 does not occur

# Height and width of the logits and of the labels: strides 4 and 8, no whole ratio, equal, smaller.
SIZES = [
    ((6, 5), (24, 20)),
    ((4, 3), (32, 24)),
    ((7, 9), (33, 41)),
    ((9, 7),) * 2,
    ((12, 9), (8, 7)),
]


def dataset_weighted() -> CrossEntropyLoss:
    loss = CrossEntropyLoss(weights="dataset")
    loss.set_pixel_counts(COUNTS)
    return loss


LOSSES = {
    "ce": CrossEntropyLoss,
    "ce_list": lambda: CrossEntropyLoss(weights=[0.5, 2.0, 1.0, 3.0]),
    "ce_dataset": dataset_weighted,
    "ce_image": lambda: CrossEntropyLoss(weights="image"),
    "dice": DiceLoss,
    "dice_image": lambda: DiceLoss(weights="image"),
    "ce_dice": lambda: WeightedSum([CrossEntropyLoss(), DiceLoss()], [1.0, 0.5]),
    "ce_smoothed": lambda: CrossEntropyLoss(label_smoothing=0.1),
    "focal": FocalLoss,
    "focal_half": lambda: FocalLoss(gamma=0.5),  # whose power has an infinite slope at 0
    "focal_image": lambda: FocalLoss(weights="image"),
    "tversky": TverskyLoss,
    "focal_tversky": lambda: TverskyLoss(gamma=4 / 3),
    "lovasz": LovaszSoftmaxLoss,
    "ohem": lambda: OhemCrossEntropyLoss(threshold=1e-3, min_kept=0.5),
    "boundary": BoundaryLoss,
    "ohem_lovasz_dice": lambda: WeightedSum(
        [LOSSES["ohem"](), LovaszSoftmaxLoss(), DiceLoss()], [1.0, 2.0, 0.1]
    ),
}


def small_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, NUM_CLASSES, 9, 7, generator=generator)
    target = torch.randint(NUM_CLASSES, (2, 9, 7), generator=generator, dtype=torch.uint8)
    target[0, :3] = 255
    target[1, 4, 2:] = 255
    return logits, target


def value_and_gradient(loss: nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits, target)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


def one_hot(target: Tensor, num_classes: int) -> Tensor:
    return (target[:, None] == torch.arange(num_classes).view(1, -1, 1, 1)).long()


def assert_formula(
    make: Callable[[int], nn.Module],
    formula: Callable[[np.ndarray, np.ndarray], float],
    num_classes: int,
) -> None:
    """Compare a loss with its formula in float64.

    Args:
        make: The loss of so many classes.
        formula: Over p and t: probabilities and one-hot labels [C, pixels].
        num_classes: Their number.
    """
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, num_classes, 13, 19, generator=generator)
    target = torch.randint(num_classes - 1, (2, 13, 19), generator=generator)  # the last is absent
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    right = torch.rand(target.shape, generator=generator) < 0.5
    logits += 8 * one_hot(target, num_classes) * right[:, None]
    valid = (target != 255).flatten().numpy()
    p, t = (
        values.double().movedim(1, 0).flatten(1).numpy()[:, valid]
        for values in (logits.double().softmax(1), one_hot(target, num_classes))
    )
    value = make(num_classes)(logits, target.byte())
    assert value.item() == pytest.approx(formula(p, t), rel=2e-6)


def sized_batch(small: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 4, *small, generator=generator)
    target = torch.randint(4, (3, *size), generator=generator, dtype=torch.uint8)
    target[0, : size[0] // 2] = 255
    target[1] = 255
    return logits, target

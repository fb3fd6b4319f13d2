"""Lovász-softmax: its definition, and the IoU that it extends."""

import numpy as np
import pytest
import torch
from losses_for_tests import NUM_CLASSES, assert_formula, one_hot, small_batch
from sklearn.metrics import jaccard_score

from seg_torch.losses import LovaszSoftmaxLoss


def lovasz(p: np.ndarray, t: np.ndarray) -> float:
    """The extension by its definition: the Jaccard loss of growing sets of wrong pixels."""
    values = []
    for pixels, errors in zip(t[t.any(1)] == 1, np.abs(t - p)[t.any(1)], strict=True):
        wrong, before, total = np.zeros_like(pixels), 0.0, 0.0
        for pixel in np.argsort(-errors):
            wrong[pixel] = True
            jaccard_loss = wrong.sum() / (pixels | wrong).sum()
            total += errors[pixel] * (jaccard_loss - before)
            before = jaccard_loss
        values.append(total)
    return np.mean(values)


@pytest.mark.promise(10)
@pytest.mark.parametrize("num_classes", [2, NUM_CLASSES, 150])
def test_the_lovasz_softmax_loss_is_its_papers_formula_in_float64(num_classes):
    assert_formula(lambda c: LovaszSoftmaxLoss(), lovasz, num_classes)


def test_lovasz_of_decided_pixels_is_one_minus_the_iou():
    """At the corners of its domain the extension is the function itself."""
    prediction = torch.randint(NUM_CLASSES, (2, 9, 7), generator=torch.Generator().manual_seed(3))
    target = small_batch()[1]
    valid = target != 255
    iou = jaccard_score(target[valid], prediction[valid], average="macro")
    value = LovaszSoftmaxLoss()(1e4 * one_hot(prediction, NUM_CLASSES).float(), target)
    assert value.item() == pytest.approx(1 - iou, rel=1e-6)

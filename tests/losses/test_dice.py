"""Dice and Tversky: their formulas, and classes that are absent."""

import math

import numpy as np
import pytest
import torch
from losses_for_tests import NUM_CLASSES, assert_formula, small_batch, value_and_gradient

from seg_torch.errors import InputError
from seg_torch.losses import DiceLoss, TverskyLoss


def dice(p: np.ndarray, t: np.ndarray) -> float:
    present = t.any(1)
    index = (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    return (1 - index)[present].mean()


def tversky(p: np.ndarray, t: np.ndarray, gamma: float = 1) -> float:
    present = t.any(1)
    true, false = (p * t).sum(1)[present], (p * (1 - t)).sum(1)[present]
    missed = ((1 - p) * t).sum(1)[present]
    index = (true + 1) / (true + 0.3 * false + 0.7 * missed + 1)
    return ((1 - index) ** (1 / gamma)).mean()


REFERENCES = {
    "dice": (lambda c: DiceLoss(), dice),
    "tversky": (lambda c: TverskyLoss(), tversky),
    "focal tversky": (lambda c: TverskyLoss(gamma=4 / 3), lambda p, t: tversky(p, t, 4 / 3)),
}


@pytest.mark.promise(10)
@pytest.mark.parametrize("num_classes", [2, NUM_CLASSES, 150])
@pytest.mark.parametrize("name", REFERENCES)
def test_dice_and_tversky_losses_are_their_papers_formulas_in_float64(name, num_classes):
    assert_formula(*REFERENCES[name], num_classes)


def test_tversky_of_equal_prices_is_dice():
    tversky = TverskyLoss(alpha=0.5, beta=0.5, smooth=1.0)
    torch.testing.assert_close(tversky(*small_batch()), DiceLoss(smooth=2.0)(*small_batch()))


# Two images of 2 x 2 pixels. With logits (ln 3, 0) the probabilities are 3/4 and 1/4.
TWO_IMAGES = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1).expand(2, 2, 2, 2)
# First image: three pixels of class 0, one of class 1. Second: one of class 1, the rest ignored.
TWO_LABELS = torch.tensor([[[0, 0], [0, 1]], [[1, 255], [255, 255]]], dtype=torch.uint8)


def test_dice_by_hand():
    # Five valid pixels with probabilities 3/4 and 1/4; three of class 0 and two of class 1.
    # Class 0: (2 * 3 * 3/4 + 1) / (5 * 3/4 + 3 + 1) = 5.5 / 7.75
    # Class 1: (2 * 2 * 1/4 + 1) / (5 * 1/4 + 2 + 1) = 2 / 4.25
    expected = 1 - (5.5 / 7.75 + 2 / 4.25) / 2
    value = DiceLoss(smooth=1.0)(TWO_IMAGES, TWO_LABELS)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_image_weighted_dice_by_hand():
    # Weights as above: 1/4 for three pixels, 3/4 for the fourth, and 0 for the second image's.
    # Intersection: 3 * 1/4 * 3/4 + 3/4 * 1/4 = 3/4; labels and predictions: 3/2 each.
    expected = 1 - (2 * 3 / 4 + 1) / (3 / 2 + 3 / 2 + 1)
    value = DiceLoss(smooth=1.0, weights="image")(TWO_IMAGES, TWO_LABELS)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_image_weighted_dice_of_one_class_only_is_a_finite_zero():
    logits, target = small_batch()  # one class has weight (n - n) / n = 0
    for smooth in (0.0, 1.0):
        loss = DiceLoss(smooth=smooth, weights="image")
        value, gradient = value_and_gradient(loss, logits, torch.ones_like(target))
        assert value == 0
        assert torch.all(gradient == 0)


def test_dice_leaves_absent_classes_out():
    # One class, certain and right: its Dice is 1, and the absent ones do not drag the mean down.
    logits = torch.zeros(1, 3, 8, 8)
    logits[:, 2] = 100
    target = torch.full((1, 8, 8), 2, dtype=torch.uint8)
    assert DiceLoss()(logits, target).item() == pytest.approx(0, abs=1e-6)


def test_impossible_settings_of_dice_losses_are_refused():
    for make, message in (
        (lambda: DiceLoss(weights="dataset"), "'dataset'; the Dice loss takes null or image"),
        (lambda: TverskyLoss(alpha=-0.1), "are -0.1, 0.7 and 1.0"),
        (lambda: TverskyLoss(gamma=0), "are 0.3, 0.7 and 0"),
    ):
        with pytest.raises(InputError, match=message):
            make()

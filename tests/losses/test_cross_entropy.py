"""Cross-entropy, focal loss and hard pixels: their formulas, and weights of classes."""

import logging
import math

import numpy as np
import pytest
import torch
from losses_for_tests import (
    COUNTS,
    NUM_CLASSES,
    assert_formula,
    dataset_weighted,
    small_batch,
    value_and_gradient,
)
from sklearn.utils.class_weight import compute_class_weight

from seg_torch.errors import InputError
from seg_torch.losses import (
    CrossEntropyLoss,
    DiceLoss,
    FocalLoss,
    OhemCrossEntropyLoss,
    WeightedSum,
)


def smoothed(p: np.ndarray, t: np.ndarray) -> float:
    return -((0.9 * t + 0.1 / len(t)) * np.log(p)).sum(0).mean()


def focal(p: np.ndarray, t: np.ndarray) -> float:
    p_t = (p * t).sum(0)
    return ((1 - p_t) ** 2 * -np.log(p_t)).mean()


def focal_balanced(p: np.ndarray, t: np.ndarray) -> float:
    alpha = np.arange(1, len(t) + 1)[:, None]
    p_t = (p * t).sum(0)
    return ((1 - p_t) ** 0.5 * -np.log(p_t) * (alpha * t).sum(0)).sum() / (alpha * t).sum()


def ohem(p: np.ndarray, t: np.ndarray, threshold: float, min_kept: float) -> float:
    p_t = np.sort((p * t).sum(0))
    kept = max(math.ceil(min_kept * len(p_t)), (p_t < threshold).sum())
    return -np.log(p_t[:kept]).mean()


REFERENCES = {
    "smoothing": (lambda c: CrossEntropyLoss(label_smoothing=0.1), smoothed),
    "focal": (lambda c: FocalLoss(), focal),
    "focal, balanced": (
        lambda c: FocalLoss(0.5, weights=[*map(float, range(1, c + 1))]),
        focal_balanced,
    ),
    "ohem by threshold": (lambda c: OhemCrossEntropyLoss(), lambda p, t: ohem(p, t, 0.7, 1 / 16)),
    "ohem of all": (
        lambda c: OhemCrossEntropyLoss(threshold=1.0),
        lambda p, t: ohem(p, t, 1.0, 1 / 16),
    ),
    "ohem by number": (
        lambda c: OhemCrossEntropyLoss(0.001, 0.3125),
        lambda p, t: ohem(p, t, 0.001, 0.3125),
    ),
}


@pytest.mark.promise(10)
@pytest.mark.parametrize("num_classes", [2, NUM_CLASSES, 150])
@pytest.mark.parametrize("name", REFERENCES)
def test_cross_entropies_are_their_papers_formulas_in_float64(name, num_classes):
    assert_formula(*REFERENCES[name], num_classes)


@pytest.mark.promise(18)
def test_inverse_weights_are_scikit_learns_balanced_weights():
    labels = np.repeat(np.arange(4), COUNTS.numpy())
    expected = compute_class_weight("balanced", classes=np.array([0, 2, 3]), y=labels)
    weights = dataset_weighted().class_weights
    np.testing.assert_allclose(weights[[0, 2, 3]].numpy(), expected, rtol=1e-6)
    assert weights[1] == 0  # absent


def test_median_frequency_weights_are_median_over_frequency():
    loss = CrossEntropyLoss(weights="dataset", balance="median_frequency")
    loss.set_pixel_counts(COUNTS)
    # Frequencies 500, 100 and 25 of 625; their median is 100: 100/500, 100/100, 100/25.
    torch.testing.assert_close(loss.class_weights, torch.tensor([0.2, 0.0, 1.0, 4.0]))


def test_dataset_weights_enter_like_listed_weights():
    loss = dataset_weighted()
    listed = CrossEntropyLoss(weights=loss.class_weights.tolist())
    torch.testing.assert_close(loss(*small_batch()), listed(*small_batch()))


@pytest.mark.promise(18)
def test_dataset_weights_are_logged_and_stay_out_of_the_checkpoint(caplog):
    with caplog.at_level(logging.INFO):
        loss = dataset_weighted()
    assert "class weights (inverse): [0.4167, 0.0, 2.0833, 8.3333]" in caplog.text
    assert loss.state_dict() == {}


def test_pixel_counts_are_asked_for_until_they_are_given():
    nested = WeightedSum([CrossEntropyLoss(weights="dataset"), DiceLoss()], [1, 1])
    asking = [m for m in nested.modules() if getattr(m, "needs_pixel_counts", False)]
    assert asking == [nested.losses[0]]
    with pytest.raises(RuntimeError, match="set_pixel_counts"):
        nested(*small_batch())
    asking[0].set_pixel_counts(COUNTS)
    assert not asking[0].needs_pixel_counts
    assert nested(*small_batch()).isfinite()


def test_only_absent_classes_in_the_labels_is_a_finite_zero():
    logits, target = small_batch()
    value, gradient = value_and_gradient(dataset_weighted(), logits, torch.ones_like(target))
    assert value == 0
    assert torch.all(gradient == 0)


def test_a_focal_loss_without_focus_is_cross_entropy():
    torch.testing.assert_close(
        FocalLoss(gamma=0)(*small_batch()), CrossEntropyLoss()(*small_batch())
    )
    weights = [0.5, 2.0, 1.0, 3.0]
    weighted = FocalLoss(gamma=0, weights=weights)(*small_batch())
    torch.testing.assert_close(weighted, CrossEntropyLoss(weights=weights)(*small_batch()))


# Two images of 2 x 2 pixels. With logits (ln 3, 0) the probabilities are 3/4 and 1/4.
TWO_IMAGES = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1).expand(2, 2, 2, 2)
# First image: three pixels of class 0, one of class 1. Second: one of class 1, the rest ignored.
TWO_LABELS = torch.tensor([[[0, 0], [0, 1]], [[1, 255], [255, 255]]], dtype=torch.uint8)


def test_image_weights_by_hand():
    # First image: weights (4 - 3)/4 = 1/4 and (4 - 1)/4 = 3/4; second: class 1 has (1 - 1)/1 = 0.
    # Five valid pixels: 3 * 1/4 * -ln(3/4), 1 * 3/4 * -ln(1/4) and 0.
    expected = (3 * 0.25 * -math.log(0.75) + 0.75 * -math.log(0.25) + 0) / 5
    value = CrossEntropyLoss(weights="image")(TWO_IMAGES, TWO_LABELS)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_wrong_number_of_weights_is_refused():
    with pytest.raises(InputError, match="2 class weights for 4 classes"):
        CrossEntropyLoss(weights=[1.0, 2.0])(*small_batch())


def test_impossible_settings_of_cross_entropies_are_refused():
    for make, message in (
        (lambda: CrossEntropyLoss(weights="datset"), "'datset'; use null, dataset, image"),
        (
            lambda: CrossEntropyLoss(weights="dataset", balance="median"),
            "'median'; use one of inverse, median_frequency",
        ),
        (lambda: CrossEntropyLoss(weights=[1.0, float("nan")]), "finite"),
        (lambda: CrossEntropyLoss(label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: FocalLoss(gamma=-1), "gamma is -1"),
        (lambda: OhemCrossEntropyLoss(threshold=0), "threshold is 0"),
        (lambda: OhemCrossEntropyLoss(min_kept=100000), "min_kept is 100000"),
    ):
        with pytest.raises(InputError, match=message):
            make()

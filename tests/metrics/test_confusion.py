import inspect
import json
import warnings

import numpy as np
import pytest
import torch
from scored import NUM_CLASSES, random_maps, scikit_matrix
from sklearn.metrics import jaccard_score, precision_recall_fscore_support
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from seg_torch import labels
from seg_torch.errors import InputError
from seg_torch.metrics import (
    AveragePrecision,
    ConfusionMatrix,
    boundary,
    images,
    probabilities,
    report,
    scores,
)


def matrix_of(prediction: Tensor, target: Tensor, num_classes: int = NUM_CLASSES) -> Tensor:
    metric = ConfusionMatrix(num_classes)
    metric.update(prediction, target)
    return metric.compute()


@pytest.mark.promise(2)
@pytest.mark.parametrize("num_classes", [2, NUM_CLASSES, 120, 200])
def test_counts_equal_scikit_learn(num_classes):
    prediction, target = random_maps(num_classes)
    matrix = matrix_of(prediction, target, num_classes)
    assert matrix.dtype == torch.int64
    np.testing.assert_array_equal(matrix, scikit_matrix(prediction, target, num_classes))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_type_counts_alike(dtype):
    prediction, target = random_maps()
    typed = matrix_of(prediction.to(dtype), target.to(dtype))
    assert torch.equal(typed, matrix_of(prediction, target))


@pytest.mark.promise(2)
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_scores_do_not_depend_on_the_batch_size(batch_size):
    prediction, target = random_maps()
    metric = ConfusionMatrix(NUM_CLASSES)
    for p, t in zip(prediction.split(batch_size), target.split(batch_size), strict=True):
        metric.update(p, t)
    np.testing.assert_array_equal(metric.compute(), scikit_matrix(prediction, target, NUM_CLASSES))


@pytest.mark.promise(5)
def test_matrices_of_two_processes_are_added_up():
    prediction, target = random_maps()
    metric, other = ConfusionMatrix(NUM_CLASSES), ConfusionMatrix(NUM_CLASSES)
    metric.update(prediction[:5], target[:5])
    other.update(prediction[5:], target[5:])
    metric.merge_state(other)
    assert torch.equal(metric.compute(), matrix_of(prediction, target))


def test_an_earlier_result_is_not_changed_by_later_updates():
    prediction, target = random_maps()
    metric = ConfusionMatrix(NUM_CLASSES)
    metric.update(prediction, target)
    before = metric.compute()
    copy = before.clone()
    metric.update(prediction, target)
    assert torch.equal(before, copy)
    assert torch.equal(metric.compute(), 2 * copy)


def test_reset_forgets():
    metric = ConfusionMatrix(NUM_CLASSES)
    metric.update(*random_maps())
    metric.reset()
    assert metric.counts.sum() == 0


@pytest.mark.promise(4)
def test_a_perfect_prediction_with_absent_classes_scores_one():
    target = torch.tensor([[0, 0, 3], [3, 255, 0]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 0, 3], [3, 4, 0]])  # the 4 lies on an ignored pixel
    result = scores(matrix_of(prediction, target))
    assert result["mean_iou"] == 1
    assert result["iou"].isnan().tolist() == [False, True, True, False, True]


@pytest.mark.promise(3)
def test_ignored_pixels_do_not_count():
    prediction, target = random_maps()
    other = torch.where(target == 255, (prediction + 1) % NUM_CLASSES, prediction)
    assert torch.equal(matrix_of(prediction, target), matrix_of(other, target))


def test_only_ignored_pixels_and_no_pixels_give_no_scores():
    metric = ConfusionMatrix(3)
    metric.update(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255))
    metric.update(torch.zeros(0, 2, 2, dtype=torch.int64), torch.zeros(0, 2, 2, dtype=torch.uint8))
    result = scores(metric.compute())
    assert result.pop("pixels").tolist() == [0, 0, 0]
    assert all(value.isnan().all() for value in result.values())


@pytest.mark.promise(3)
def test_d13_no_metric_has_an_ignored_label_of_its_own():
    for metric in (ConfusionMatrix, AveragePrecision):
        assert list(inspect.signature(metric).parameters) == ["num_classes"]
        assert not hasattr(metric(2), "ignore_index")
    for module in (boundary, images, probabilities):
        assert module.IGNORE_INDEX is labels.IGNORE_INDEX


@pytest.mark.promise(25)
def test_deterministic_algorithms_give_the_same_counts():
    prediction, target = random_maps()
    expected = matrix_of(prediction, target)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(matrix_of(prediction, target), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("value", [5, 254, 300, -1])
def test_a_label_that_is_no_class_is_named(value):
    target = torch.zeros(4, 4, dtype=torch.int64)
    target[0, 0], target[1, 1] = value, 255
    with pytest.raises(InputError, match=rf"{value}\b.*allowed are 0\.\.4 and 255"):
        ConfusionMatrix(NUM_CLASSES).update(torch.zeros_like(target), target)


# 65541 is 5 in the lowest 16 bits, 65536 is 0.
@pytest.mark.parametrize("value", [5, -1, 255, 65541, 65536])
def test_a_prediction_that_is_no_class_is_named(value):
    prediction = torch.zeros(4, 4, dtype=torch.int64)
    prediction[0, 0] = value
    with pytest.raises(InputError, match=rf"{value}\b.*allowed are 0\.\.4"):
        ConfusionMatrix(NUM_CLASSES).update(prediction, torch.zeros_like(prediction))


def test_maps_of_different_shape_are_refused():
    with pytest.raises(InputError, match=r"\(2, 3\).*\(3, 2\)"):
        ConfusionMatrix(2).update(torch.zeros(2, 3).int(), torch.zeros(3, 2).int())


def test_scores_equal_scikit_learn():
    prediction, target = random_maps()
    valid = target != 255
    labels, predicted = target[valid].numpy(), prediction[valid].numpy()
    precision, recall, dice, pixels = precision_recall_fscore_support(labels, predicted)
    expected = {
        "iou": jaccard_score(labels, predicted, average=None),
        "mean_iou": jaccard_score(labels, predicted, average="macro"),
        "precision": precision,
        "mean_precision": precision.mean(),
        "recall": recall,
        "mean_recall": recall.mean(),
        "accuracy": recall,
        "mean_accuracy": recall.mean(),
        "dice": dice,
        "mean_dice": dice.mean(),
        "pixels": pixels,
        "pixel_accuracy": (labels == predicted).mean(),
    }
    result = scores(matrix_of(prediction, target))
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-12, err_msg=name)


def test_mean_iou_equals_torchmetrics_also_with_an_absent_class():
    prediction, target = random_maps()
    reference = MulticlassJaccardIndex(NUM_CLASSES + 1, ignore_index=255)  # the last is absent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = reference(prediction, target.long())
    result = scores(matrix_of(prediction, target, NUM_CLASSES + 1))
    assert result["mean_iou"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_undefined_scores_are_nan_and_left_out_of_means():
    # Class 0: 6 of 8 right, 2 taken for class 1. Class 1: predicted (2), never labelled.
    # Class 2: labelled (4), never predicted, taken for class 0. Class 3: neither.
    matrix = torch.tensor([[6, 2, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0], [0, 0, 0, 0]])
    result = scores(matrix)
    nan = float("nan")
    expected = {
        "iou": [6 / 12, 0, 0, nan],  # 6 / (8 + 10 - 6)
        "dice": [12 / 18, 0, 0, nan],  # 2 * 6 / (8 + 10)
        "accuracy": [6 / 8, nan, 0, nan],
        "recall": [6 / 8, nan, 0, nan],
        "precision": [6 / 10, 0, nan, nan],
        "pixels": [8, 0, 4, 0],
        "mean_iou": (6 / 12) / 3,
        "mean_dice": (12 / 18) / 3,
        "mean_accuracy": (6 / 8) / 2,
        "mean_recall": (6 / 8) / 2,
        "mean_precision": (6 / 10) / 2,
        "pixel_accuracy": 6 / 12,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, err_msg=name)


def test_scores_of_many_pixels_are_exact():
    # 2^53 + 1 is not a float64, let alone a float32; ratios near one must not become one.
    matrix = torch.tensor([[10**9, 1], [0, 10**9]])
    error = 1 - scores(matrix)["pixel_accuracy"].item()
    assert error == pytest.approx(0.5e-9, rel=1e-6)  # 1 of 2 * 10^9 + 1


def test_report_is_plain_json_with_null_for_undefined():
    matrix = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    result = report(matrix, ("road", "sky", "car"))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result) == {
        "mean_iou",
        "pixel_accuracy",
        "mean_accuracy",
        "mean_dice",
        "mean_precision",
        "mean_recall",
        "per_class",
        "confusion_matrix",
    }
    assert result["confusion_matrix"] == matrix.tolist()
    assert result["mean_iou"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert result["per_class"]["road"] == {
        "iou": 3 / 4,
        "accuracy": 3 / 4,
        "precision": 1.0,
        "recall": 3 / 4,
        "dice": pytest.approx(6 / 7),
        "pixels": 4,
    }
    assert result["per_class"]["car"] == {
        "iou": None,
        "accuracy": None,
        "precision": None,
        "recall": None,
        "dice": None,
        "pixels": 0,
    }


def test_report_holds_average_precision_where_it_is_given():
    matrix = torch.tensor([[3, 1], [0, 4]])
    average_precision = torch.tensor([0.5, float("nan")])
    result = report(matrix, ("road", "sky"), {"average_precision": average_precision})
    assert result["mean_average_precision"] == 0.5
    assert result["per_class"]["road"]["average_precision"] == 0.5
    assert result["per_class"]["sky"]["average_precision"] is None

import inspect
import json
import warnings

import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import torch
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    jaccard_score,
    precision_recall_fscore_support,
)
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError, MulticlassJaccardIndex

from seg_torch import labels
from seg_torch.errors import InputError
from seg_torch.metrics import (
    AveragePrecision,
    BoundaryScores,
    Calibration,
    ConfusionMatrix,
    ImageScores,
    LabelQuality,
    confidence_steps,
    report,
    scores,
)
from seg_torch.metrics import base as metrics

NUM_CLASSES = 5


def random_maps(num_classes: int = NUM_CLASSES, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(num_classes, (7, 13, 17), generator=generator, dtype=torch.uint8)
    prediction = torch.randint(num_classes, (7, 13, 17), generator=generator)
    agreeing = torch.rand(target.shape, generator=generator) < 0.5
    prediction = torch.where(agreeing, target.long(), prediction)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    return prediction, target


def matrix_of(prediction: Tensor, target: Tensor, num_classes: int = NUM_CLASSES) -> Tensor:
    metric = ConfusionMatrix(num_classes)
    metric.update(prediction, target)
    return metric.compute()


def scikit_matrix(prediction: Tensor, target: Tensor, num_classes: int) -> np.ndarray:
    valid = target != 255
    return confusion_matrix(target[valid], prediction[valid], labels=range(num_classes))


# 120 and 200 classes lie on both sides of the largest matrix that 16-bit bins can count.
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
    assert metric.matrix.sum() == 0


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
    assert metrics.IGNORE_INDEX is labels.IGNORE_INDEX


def test_d30_no_metric_waits_for_the_device():
    # Tensors on "meta" have no values, so asking for one fails, as it would synchronise on CUDA.
    target = torch.zeros(2, 8, 8, dtype=torch.uint8, device="meta")
    confusion = ConfusionMatrix(NUM_CLASSES).to("meta")
    confusion.update(target.long(), target)
    assert confusion.compute().shape == (NUM_CLASSES, NUM_CLASSES)
    average_precision = AveragePrecision(NUM_CLASSES).to("meta")
    average_precision.update(torch.zeros(2, NUM_CLASSES, 8, 8, device="meta"), target)
    assert average_precision.counts.device.type == "meta"
    logits = torch.zeros(NUM_CLASSES, 8, 8, device="meta")
    images, calibration = ImageScores(NUM_CLASSES, 2).to("meta"), Calibration().to("meta")
    images.update(1, target[1], target[1], confidence_steps(logits))
    calibration.update(target[1], target[1], confidence_steps(logits))
    BoundaryScores(NUM_CLASSES).to("meta").update(target[1], target[1])
    LabelQuality(2).to("meta").update(1, logits, target[1])


@pytest.mark.promise(25)
@pytest.mark.parametrize("deterministic", [False, True])
def test_d30_counts_of_the_way_that_gpus_take_are_exact(monkeypatch, deterministic):
    monkeypatch.setattr(
        metrics, "_count", lambda bins, n: metrics._count_without_waiting(bins.flatten().long(), n)
    )
    monkeypatch.setattr(torch, "bincount", None)
    torch.use_deterministic_algorithms(deterministic)
    try:
        for num_classes in (2, NUM_CLASSES, 200):
            prediction, target = random_maps(num_classes)
            matrix = matrix_of(prediction, target, num_classes)
            assert matrix.dtype == torch.int64
            np.testing.assert_array_equal(matrix, scikit_matrix(prediction, target, num_classes))
        probabilities, target = random_probabilities()
        values = average_precision_of(probabilities, target)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = scikit_average_precision(probabilities, target)
    np.testing.assert_allclose(values, expected, atol=2e-3)


@pytest.mark.promise(25)
def test_deterministic_algorithms_give_the_same_counts():
    prediction, target = random_maps()
    expected = matrix_of(prediction, target)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(matrix_of(prediction, target), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("deterministic", [False, True])
def test_d30_cuda_counts_like_the_cpu_and_never_synchronises(deterministic):
    prediction, target = random_maps()
    probabilities, _ = random_probabilities()
    inputs = [tensor.cuda() for tensor in (prediction, probabilities, target)]
    boundary, images, calibration = (
        metric.cuda()
        for metric in (BoundaryScores(NUM_CLASSES), ImageScores(NUM_CLASSES, 2), Calibration())
    )
    class_ids = inputs[1][0].argmax(0).to(torch.uint8)
    confusion, precision = ConfusionMatrix(NUM_CLASSES).cuda(), AveragePrecision(NUM_CLASSES).cuda()
    torch.use_deterministic_algorithms(deterministic)
    torch.cuda.set_sync_debug_mode("error")
    try:
        confusion.update(inputs[0], inputs[2])
        precision.update(inputs[1], inputs[2])
        boundary.update(class_ids, inputs[2][0])
        confidence = confidence_steps(inputs[1][0].log())
        images.update(1, class_ids, inputs[2][0], confidence)
        calibration.update(class_ids, inputs[2][0], confidence)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    assert torch.equal(confusion.compute().cpu(), matrix_of(prediction, target))
    assert torch.equal(precision.compute(), average_precision_of(probabilities, target))
    on_cpu = BoundaryScores(NUM_CLASSES)
    on_cpu.update(class_ids.cpu(), target[0])
    assert torch.equal(boundary.counts.cpu(), on_cpu.counts)
    rows = calibration.compute()["reliability"]
    assert sum(row["pixels"] for row in rows) == (target[0] != 255).sum()
    assert images.compute()["label_pixels"].sum(1).tolist() == [0, (target[0] != 255).sum()]


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


def random_probabilities(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Probabilities that favour the label, float [7, C, 13, 17], and labels with ignored pixels."""
    _, target = random_maps(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, NUM_CLASSES, 13, 17, generator=generator)
    is_class = target.unsqueeze(1) == torch.arange(NUM_CLASSES).view(1, -1, 1, 1)
    return (logits + 1.5 * is_class).softmax(1), target


def average_precision_of(probabilities: Tensor, target: Tensor, batch_size: int = 7) -> Tensor:
    metric = AveragePrecision(NUM_CLASSES)
    batches = zip(probabilities.split(batch_size), target.split(batch_size), strict=True)
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


def scikit_average_precision(probabilities: Tensor, target: Tensor) -> list[float]:
    valid = target != 255
    columns = [probabilities[:, c][valid].numpy() for c in range(NUM_CLASSES)]
    return [average_precision_score(target[valid] == c, s) for c, s in enumerate(columns)]


def test_average_precision_is_scikit_learns_but_for_the_rounding_of_scores():
    probabilities, target = random_probabilities()
    expected = scikit_average_precision(probabilities, target)
    assert 0.3 < min(expected) < max(expected) < 0.9
    np.testing.assert_allclose(average_precision_of(probabilities, target), expected, atol=2e-3)


def test_average_precision_of_rounded_scores_is_exactly_scikit_learns():
    probabilities, target = random_probabilities()
    rounded = (probabilities * 1024).round() / 1024
    rounded[:, :, 0], rounded[:, :, 1] = 0, 1  # both ends, and many ties
    expected = scikit_average_precision(rounded, target)
    np.testing.assert_allclose(average_precision_of(rounded, target), expected, rtol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_average_precision_does_not_depend_on_the_batch_size(batch_size):
    probabilities, target = random_probabilities()
    whole = average_precision_of(probabilities, target)
    assert torch.equal(average_precision_of(probabilities, target, batch_size), whole)


def test_average_precision_by_hand():
    # By falling score: right, wrong, right, so precision 1 at recall 1/2 and 2/3 at recall 1.
    probabilities = torch.tensor([0.75, 0.5, 0.25]).view(1, 1, 1, 3)
    probabilities = torch.cat([probabilities, 1 - probabilities], 1)
    metric = AveragePrecision(2)
    metric.update(probabilities, torch.tensor([[[0, 1, 0]]]))
    assert metric.compute()[0].item() == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)


def test_a_class_without_labels_has_no_average_precision():
    probabilities, target = random_probabilities()
    target[target == 2] = 255
    values = average_precision_of(probabilities, target)
    assert values.isnan().tolist() == [False, False, True, False, False]
    empty = average_precision_of(probabilities, torch.full_like(target, 255))
    assert empty.isnan().all()


def test_average_precision_memory_does_not_grow():
    metric = AveragePrecision(NUM_CLASSES)
    shape = metric.counts.shape
    for seed in range(3):
        metric.update(*random_probabilities(seed))
    assert metric.counts.shape == shape
    assert metric.counts.dtype == torch.int64


def test_report_holds_average_precision_where_it_is_given():
    matrix = torch.tensor([[3, 1], [0, 4]])
    average_precision = torch.tensor([0.5, float("nan")])
    result = report(matrix, ("road", "sky"), {"average_precision": average_precision})
    assert result["mean_average_precision"] == 0.5
    assert result["per_class"]["road"]["average_precision"] == 0.5
    assert result["per_class"]["sky"]["average_precision"] is None


def image_scores_of(prediction: Tensor, target: Tensor, rows: int = 13) -> dict[str, np.ndarray]:
    metric = ImageScores(NUM_CLASSES, len(target))
    for index in range(len(target)):
        confidence = torch.full(target.shape[1:], 16384 * (index % 4), dtype=torch.int32)
        parts = (each.split(rows) for each in (prediction[index], target[index], confidence))
        for part in zip(*parts, strict=True):
            metric.update(index, *part)
    return metric.compute()


@pytest.mark.parametrize("rows", [1, 5, 13])
def test_counts_of_each_image_are_scikit_learns_in_whatever_parts_it_comes(rows):
    prediction, target = random_maps()
    found = image_scores_of(prediction, target, rows)
    for index in range(len(target)):
        matrix = scikit_matrix(prediction[index], target[index], NUM_CLASSES)
        np.testing.assert_array_equal(found["intersection"][index], matrix.diagonal())
        np.testing.assert_array_equal(found["label_pixels"][index], matrix.sum(1))
        np.testing.assert_array_equal(found["predicted_pixels"][index], matrix.sum(0))
        assert found["confidence"][index] == (index % 4) / 4


def test_one_image_without_labels_has_counts_of_zero_and_no_confidence():
    prediction, target = random_maps()
    found = image_scores_of(prediction[:1], torch.full_like(target[:1], 255))
    assert found["confidence"].shape == (1,)
    assert np.isnan(found["confidence"]).all()
    assert not any(found[name].any() for name in ("intersection", "label_pixels"))


def test_confidence_is_the_highest_softmax_probability():
    logits = 5 * torch.randn(NUM_CLASSES, 13, 17, generator=torch.Generator().manual_seed(0))
    expected = scipy.special.softmax(logits.double().numpy(), 0).max(0)
    np.testing.assert_allclose(confidence_steps(logits) / 65536, expected, atol=0.6 / 65536)
    extreme = torch.tensor([[1e4, -1e4, 3.0], [0.0, 0.0, 3.0], [-1e4, -1e4, float("nan")]])
    assert confidence_steps(extreme[:, None]).tolist() == [[65536, 32768 * 2, 0]]


def calibration_of(probabilities: Tensor, target: Tensor, batch_size: int = 7) -> dict:
    metric = Calibration()
    batches = zip(probabilities.split(batch_size), target.split(batch_size), strict=True)
    for p, t in batches:
        confidence = torch.stack([confidence_steps(image.log()) for image in p])
        metric.update(p.argmax(1), t, confidence)
    return metric.compute()


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_calibration_error_is_torchmetrics_for_every_batch_size(batch_size):
    probabilities, target = random_probabilities()
    reference = MulticlassCalibrationError(NUM_CLASSES, n_bins=15, norm="l1", ignore_index=255)
    found = calibration_of(probabilities, target, batch_size)
    assert found == calibration_of(probabilities, target)
    expected = reference(probabilities, target.long()).item()
    assert expected > 0.02
    assert found["expected_calibration_error"] == pytest.approx(expected, abs=2e-5)


def test_the_reliability_curve_is_that_of_the_bins_counted_one_by_one():
    probabilities, target = random_probabilities()
    confidence, prediction = (each.numpy() for each in probabilities.max(1))
    valid = target.numpy() != 255
    rows = calibration_of(probabilities, target)["reliability"]
    for index, row in enumerate(rows):
        within = valid & (confidence > index / 15) & (confidence <= (index + 1) / 15)
        assert row["up_to"] == pytest.approx((index + 1) / 15)
        assert row["pixels"] == within.sum()
        if not within.any():
            assert row["accuracy"] is row["confidence"] is None
            continue
        assert row["confidence"] == pytest.approx(confidence[within].mean(), abs=1e-5)
        assert row["accuracy"] == pytest.approx((prediction == target.numpy())[within].mean())
    assert sum(row["pixels"] for row in rows) == valid.sum()


def test_confidence_at_the_ends_of_bins_falls_into_the_lower_one():
    steps = torch.tensor([[0, 65536, 13107, 13108]])  # 1/5, at which bin 3 of 15 ends, is 13107.2
    metric = Calibration()
    metric.update(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4), steps)
    pixels = [row["pixels"] for row in metric.compute()["reliability"]]
    assert [i for i, n in enumerate(pixels) if n] == [0, 2, 3, 14]


def test_without_labels_there_is_no_calibration_error():
    probabilities, target = random_probabilities()
    found = calibration_of(probabilities, torch.full_like(target, 255))
    assert found["expected_calibration_error"] is None
    assert json.dumps(found, allow_nan=False)


def blobs(seed: int, size: tuple[int, int] = (40, 56)) -> tuple[Tensor, Tensor]:
    """Maps with regions of some pixels across: prediction and labels, some of them ignored."""
    rng = np.random.default_rng(seed)
    maps = scipy.ndimage.gaussian_filter(rng.normal(size=(NUM_CLASSES, *size)), (0, 4, 4))
    other = scipy.ndimage.gaussian_filter(rng.normal(size=(NUM_CLASSES, *size)), (0, 4, 4))
    target = maps.argmax(0)
    prediction = (maps + 0.6 * other).argmax(0)
    hole = scipy.ndimage.gaussian_filter(rng.normal(size=size), 3)
    target[hole > np.quantile(hole, 0.85)] = 255
    return torch.from_numpy(prediction).byte(), torch.from_numpy(target).byte()


def boundary_reference(images: list, width: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Both scores by SciPy's erosions and distances, class by class."""
    sums = np.zeros((6, NUM_CLASSES))
    square = np.ones((3, 3))
    for prediction, target in images:
        ignored = target.numpy() == 255
        reach = width or max(1, round(0.02 * np.hypot(*target.shape)))
        for c in range(NUM_CLASSES):
            bands, lines = [], []
            for ids in (target.numpy(), prediction.numpy()):
                region = ids == c
                eroded = scipy.ndimage.binary_erosion(region | ignored, square, reach)
                bands.append(region & ~ignored & ~eroded)
                inner = scipy.ndimage.binary_erosion(region | ignored, square, border_value=1)
                lines.append(region & ~ignored & ~inner)
            far = np.full(target.shape, 10**6)
            near = [
                (scipy.ndimage.distance_transform_cdt(~line, "chessboard") if line.any() else far)
                <= reach
                for line in lines
            ]
            sums[0, c] += (bands[0] & bands[1]).sum()
            sums[1, c] += (bands[0] | bands[1]).sum()
            sums[2, c] += (lines[1] & near[0]).sum()
            sums[3, c] += lines[1].sum()
            sums[4, c] += (lines[0] & near[1]).sum()
            sums[5, c] += lines[0].sum()
    precision, recall = sums[2] / sums[3], sums[4] / sums[5]
    return sums[0] / sums[1], 2 * precision * recall / (precision + recall)


def boundary_scores_of(images: list, width: int | None = None) -> dict[str, Tensor]:
    metric = BoundaryScores(NUM_CLASSES, width)
    for image in images:
        metric.update(*image)
    return metric.compute()


@pytest.mark.parametrize("width", [None, 1, 3, 30])
def test_boundary_scores_are_those_of_scipys_erosions_and_distances(width):
    # The first image has a diagonal of 69 pixels, thus a width of 1, the second of 144, thus 3.
    images = [blobs(0), blobs(1, (80, 120)), blobs(2)]
    iou, f = boundary_reference(images, width)
    assert 0.1 < iou.min() < iou.max() < 0.95
    found = boundary_scores_of(images, width)
    np.testing.assert_allclose(found["boundary_iou"], iou, rtol=1e-12)
    np.testing.assert_allclose(found["boundary_f"], f, rtol=1e-12)


def test_boundary_scores_of_two_processes_add_up():
    images = [blobs(seed) for seed in range(3)]
    metric, other = BoundaryScores(NUM_CLASSES, 2), BoundaryScores(NUM_CLASSES, 2)
    metric.update(*images[0])
    for image in images[1:]:
        other.update(*image)
    metric.merge_state(other)
    for name, values in boundary_scores_of(images, 2).items():
        assert torch.equal(metric.compute()[name], values)


def test_an_ignored_region_makes_no_boundary_and_its_prediction_does_not_matter():
    target = torch.zeros(20, 20, dtype=torch.uint8)
    target[8:12, 8:12] = 255  # a hole in the only class
    prediction = torch.zeros_like(target)
    metric = BoundaryScores(2, 2)
    metric.update(prediction, target)
    # Of the class, 2 pixels along each edge of the image are at a boundary: 20^2 - 16^2.
    assert metric.counts[0].tolist() == metric.counts[1].tolist() == [144, 0]
    assert metric.compute()["boundary_f"].isnan().all()
    other = BoundaryScores(2, 2)
    other.update(torch.where(target == 255, 1, prediction), target)
    assert torch.equal(other.counts, metric.counts)


def test_a_boundary_is_seen_across_a_band_of_ignored_pixels():
    target = torch.zeros(20, 20, dtype=torch.uint8)
    target[:, 9:11], target[:, 11:] = 255, 1
    metric = BoundaryScores(2, 3)
    metric.update((torch.arange(20) >= 10).byte().expand(20, 20), target)
    # Within 3 of the other class: column 8 of class 0 and 11 of class 1. And 3 along each edge,
    # which leaves 14 rows, of which columns 3 to 7 and 12 to 16 are inside.
    assert metric.counts[:3].tolist() == [[20 * 9 - 14 * 5] * 2] * 3
    assert metric.counts[3:].sum() == 0
    assert metric.compute()["boundary_iou"].tolist() == [1, 1]


def test_a_missed_class_scores_zero_and_an_absent_one_nothing():
    target = torch.zeros(20, 20, dtype=torch.uint8)
    target[5:10, 5:10] = 1
    metric = BoundaryScores(3, 1)
    metric.update(torch.zeros_like(target), target)
    found = metric.compute()
    assert found["boundary_f"].tolist()[:2] == [0, 0]
    assert found["boundary_iou"][1] == 0
    assert found["boundary_iou"][2].isnan()
    assert found["boundary_f"][2].isnan()


@pytest.mark.parametrize("width", [0, -1, 2.5, False])
def test_an_impossible_width_is_refused(width):
    with pytest.raises(InputError, match=f"boundary={width}: expected true for 2 %"):
        BoundaryScores(3, width)


@pytest.mark.parametrize("rows", [1, 5, 13])
def test_the_quality_of_a_label_is_the_softmin_of_the_probabilities_of_its_pixels(rows):
    """cleanlab's formula: the product of the pixels' scores s with softmax((1 - s) / 0.1)."""
    _, target = random_maps()
    logits = 4 * torch.randn(len(target), NUM_CLASSES, *target.shape[1:])
    target[1] = 255
    metric = LabelQuality(len(target))
    for index in reversed(range(len(target))):
        for part in zip(logits[index].split(rows, 1), target[index].split(rows), strict=True):
            metric.update(index, *part)
    found = metric.compute()
    for index, (label, values) in enumerate(zip(target.numpy(), logits, strict=True)):
        probabilities = scipy.special.softmax(values.double().numpy(), 0)
        valid = label != 255
        if index == 1:
            assert np.isnan(found[index])
            continue
        s = np.take_along_axis(probabilities, label[None] * valid, 0)[0][valid]
        assert found[index] == pytest.approx(s @ scipy.special.softmax((1 - s) / 0.1), rel=1e-5)


def test_a_few_wrong_labels_lower_the_quality_more_than_doubts_everywhere():
    logits = torch.zeros(2, 2, 10, 10)
    logits[:, 0] = torch.tensor([6.0, 0.8])[:, None, None]
    target = torch.zeros(10, 10, dtype=torch.uint8)
    target[:3, :3] = 1
    metric = LabelQuality(2)
    metric.update(0, logits[0], target)  # sure, and nine pixels have another label
    metric.update(1, logits[1], torch.zeros_like(target))  # unsure of all
    assert metric.compute()[0] < 0.02 < 0.6 < metric.compute()[1]

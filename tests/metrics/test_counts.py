"""The formulas of the scores, against scikit-learn, for any leading dimensions."""

import numpy as np
import pytest
import torch
from scored import blocks_of, updated
from sklearn.metrics import jaccard_score, precision_recall_fscore_support

from seg_torch.evaluation.bootstrap import read_image_counts
from seg_torch.metrics import ConfusionMatrix, ImageScores, report
from seg_torch.metrics.counts import (
    class_scores,
    mean_over_classes,
    mean_scores,
    pixel_accuracy,
)


def counts_of(label: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """Intersection, label and prediction [3, C] of one image."""
    maps = (label[label == prediction], label, prediction)
    return np.stack([np.bincount(ids, minlength=num_classes) for ids in maps])


def random_maps(seed: int, size: int = 500) -> tuple[np.ndarray, np.ndarray]:
    label, prediction = np.random.default_rng(seed).integers(0, 4, (2, size))
    prediction[: size // 2] = label[: size // 2]
    return label, prediction


def test_scores_of_sums_are_scikit_learns_with_absent_classes_left_out():
    label, prediction = random_maps(0)
    counts = counts_of(label, prediction, 6)  # classes 4 and 5 are nowhere
    expected = jaccard_score(label, prediction, average=None, labels=range(4))
    precision, recall, dice, _ = precision_recall_fscore_support(label, prediction)
    scores = class_scores(counts)
    for name, values in {
        "iou": expected,
        "accuracy": recall,
        "recall": recall,
        "precision": precision,
        "dice": dice,
    }.items():
        np.testing.assert_allclose(scores[name][:4], values, rtol=1e-12)
        assert np.isnan(scores[name][4:]).all()
        assert mean_scores(counts)[f"mean_{name}"] == pytest.approx(values.mean(), rel=1e-12)
    assert mean_scores(counts)["pixel_accuracy"] == pytest.approx((label == prediction).mean())


def test_many_datasets_are_scored_at_once_as_each_by_itself():
    each = [counts_of(*random_maps(seed), 5) for seed in range(6)]
    stacked = np.reshape(each, (2, 3, 3, 5))
    for name, values in {**class_scores(stacked), **mean_scores(stacked)}.items():
        alone = [{**class_scores(counts), **mean_scores(counts)}[name] for counts in each]
        np.testing.assert_array_equal(values, np.reshape(alone, values.shape))


def test_without_labelled_pixels_there_are_no_means():
    nothing = np.zeros((2, 3, 4), dtype=np.int64)
    assert all(np.isnan(values).all() for values in mean_scores(nothing).values())
    assert np.isnan(pixel_accuracy(nothing)).all()
    assert mean_over_classes(np.array([[np.nan, 0.5, 0.0]])).tolist() == [0.25]


def test_the_bootstraps_point_estimate_is_the_reported_score(tmp_path):
    generator = torch.Generator().manual_seed(0)
    num_classes, num_images = 9, 7  # the last class is absent
    confusion, images = ConfusionMatrix(num_classes), ImageScores(num_classes, num_images)
    for index in range(num_images):
        target = torch.randint(num_classes - 1, (13, 17 + index), generator=generator)
        prediction = target.where(torch.rand(target.shape, generator=generator) < 0.6, 3)
        target[:2, :5] = 255
        confusion.update(prediction, target)
        updated(images, blocks_of(target, prediction, image=index))
    reported = report(confusion.compute(), [f"class {i}" for i in range(num_classes)])
    names = np.array([f"image {i}" for i in range(num_images)])
    np.savez(tmp_path / "test_images.npz", names=names, **images.compute())
    sums = read_image_counts(tmp_path / "test_images.npz").counts.sum(axis=0)
    for name, value in mean_scores(sums).items():
        assert value == reported[name], name
    for name, values in class_scores(sums).items():
        rows = [row[name] for row in reported["per_class"].values()]
        np.testing.assert_array_equal(values, np.array(rows, dtype=float), err_msg=name)

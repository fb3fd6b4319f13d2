import numpy as np
import pytest
import torch
from scored import NUM_CLASSES, blocks_of, random_maps, scikit_matrix, updated
from torch import Tensor

from seg_torch.metrics import ImageScores

CONFIDENCES = (1.0, 0.25, 0.5, 0.75)  # of all pixels of an image


def image_scores_of(prediction: Tensor, target: Tensor, rows: int = 13) -> dict[str, np.ndarray]:
    metric = ImageScores(NUM_CLASSES, len(target))
    for index in range(len(target)):
        highest = CONFIDENCES[index % 4]
        logits = torch.full((NUM_CLASSES, *target.shape[1:]), (1 - highest) / (NUM_CLASSES - 1))
        logits[0] = highest
        updated(metric, blocks_of(target[index], prediction[index], logits.log(), index, rows))
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
        assert found["confidence"][index] == CONFIDENCES[index % 4]


def test_one_image_without_labels_has_counts_of_zero_and_no_confidence():
    prediction, target = random_maps()
    found = image_scores_of(prediction[:1], torch.full_like(target[:1], 255))
    assert found["confidence"].shape == (1,)
    assert np.isnan(found["confidence"]).all()
    assert not any(found[name].any() for name in ("intersection", "label_pixels"))

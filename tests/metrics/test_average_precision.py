import numpy as np
import pytest
import torch
from scored import NUM_CLASSES, blocks_of, blocks_of_images, random_probabilities, updated
from sklearn.metrics import average_precision_score
from torch import Tensor

from seg_torch.metrics import AveragePrecision


def average_precision_of(probabilities: Tensor, target: Tensor) -> Tensor:
    blocks = blocks_of_images(probabilities, target)
    return updated(AveragePrecision(NUM_CLASSES), blocks).compute()


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
    rounded[:, -1] += 1 - rounded.sum(1)  # as probabilities of a softmax do, they add up to one
    assert rounded.min() >= 0
    for class_id in range(NUM_CLASSES):  # both ends, and many ties
        rounded[:, :, class_id] = torch.eye(NUM_CLASSES)[class_id][:, None]
    expected = scikit_average_precision(rounded, target)
    np.testing.assert_allclose(average_precision_of(rounded, target), expected, rtol=1e-12)


@pytest.mark.parametrize("rows", [1, 3])
def test_average_precision_does_not_depend_on_the_parts_and_order_in_which_images_come(rows):
    probabilities, target = random_probabilities()
    blocks = [*blocks_of_images(probabilities, target, rows)]
    metric = updated(AveragePrecision(NUM_CLASSES), blocks[4:][::-1])
    metric.merge_state(updated(AveragePrecision(NUM_CLASSES), blocks[:4]))  # of another process
    found = updated(AveragePrecision(NUM_CLASSES), blocks).compute()
    assert torch.equal(found, metric.compute())
    np.testing.assert_allclose(found, average_precision_of(probabilities, target), atol=1e-4)


def test_average_precision_by_hand():
    # By falling score: right, wrong, right, so precision 1 at recall 1/2 and 2/3 at recall 1.
    probabilities = torch.tensor([0.75, 0.5, 0.25]).view(1, 1, 3)
    probabilities = torch.cat([probabilities, 1 - probabilities])
    blocks = blocks_of(torch.tensor([[0, 1, 0]]), logits=probabilities.log())
    metric = updated(AveragePrecision(2), blocks)
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
        updated(metric, blocks_of_images(*random_probabilities(seed)))
    assert metric.counts.shape == shape
    assert metric.counts.dtype == torch.int64

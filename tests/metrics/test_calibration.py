import json

import pytest
import torch
from scored import NUM_CLASSES, blocks_of, blocks_of_images, random_probabilities, updated
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError

from seg_torch.metrics import Calibration


def calibration_of(probabilities: Tensor, target: Tensor) -> dict:
    return updated(Calibration(), blocks_of_images(probabilities, target)).compute()


@pytest.mark.parametrize("rows", [1, 5, 13])
def test_calibration_error_is_torchmetrics_in_whatever_parts_and_order_images_come(rows):
    probabilities, target = random_probabilities()
    reference = MulticlassCalibrationError(NUM_CLASSES, n_bins=15, norm="l1", ignore_index=255)
    blocks = [*blocks_of_images(probabilities, target, rows)]
    found = updated(Calibration(), blocks).compute()
    metric = updated(Calibration(), blocks[4:][::-1])
    metric.merge_state(updated(Calibration(), blocks[:4]))  # of another process
    assert found == metric.compute()
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
    # 1/5, at which bin 3 of 15 ends, is 13107.2. The first is not a number, which counts as 0.
    steps = torch.tensor([torch.nan, 65536, 13107, 13108])
    highest = steps.view(1, 1, 4) / 65536
    probabilities = torch.cat([highest, ((1 - highest) / 9).expand(9, 1, 4)])
    blocks = [*blocks_of(torch.zeros(1, 4), logits=probabilities.log())]
    assert blocks[0].confidence.tolist() == [[0, 65536, 13107, 13108]]
    metric = updated(Calibration(), blocks)
    pixels = [row["pixels"] for row in metric.compute()["reliability"]]
    assert [i for i, n in enumerate(pixels) if n] == [0, 2, 3, 14]


def test_without_labels_there_is_no_calibration_error():
    probabilities, target = random_probabilities()
    found = calibration_of(probabilities, torch.full_like(target, 255))
    assert found["expected_calibration_error"] is None
    assert json.dumps(found, allow_nan=False)

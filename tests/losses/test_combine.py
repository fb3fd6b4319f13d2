"""Weighted sums of losses."""

import pytest
import torch
from losses_for_tests import small_batch

from seg_torch.errors import InputError
from seg_torch.losses import CrossEntropyLoss, DiceLoss, WeightedSum


def test_weighted_sum_adds_up():
    expected = 2 * CrossEntropyLoss()(*small_batch()) + 0.5 * DiceLoss()(*small_batch())
    total = WeightedSum([CrossEntropyLoss(), DiceLoss()], [2, 0.5])(*small_batch())
    torch.testing.assert_close(total, expected)


def test_weighted_sum_refuses_lists_of_different_length():
    with pytest.raises(InputError, match="2 losses and 1 weights"):
        WeightedSum([CrossEntropyLoss(), DiceLoss()], [1.0])

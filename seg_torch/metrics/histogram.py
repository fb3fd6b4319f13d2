"""Counting of whole numbers."""

import torch
from torch import Tensor

# On CUDA, torch.bincount asks for the largest value, and waits for the device.
BINCOUNT_DEVICES = ("cpu", "mps")


def count(bins: Tensor, num_bins: int) -> Tensor:
    """Count how often each of 0..num_bins-1 occurs: integer [...] to int64 [num_bins]."""
    bins = bins.flatten()
    if bins.device.type in BINCOUNT_DEVICES:
        return torch.bincount(bins, minlength=num_bins)
    bins = bins.long()
    return bins.new_zeros(num_bins).scatter_add_(0, bins, bins.new_ones(1).expand_as(bins))

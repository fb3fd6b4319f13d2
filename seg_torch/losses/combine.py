"""Several losses as one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from seg_torch.errors import InputError


class WeightedSum(nn.Module):
    """Weighted sum of several losses.

    Args:
        losses: Modules called with (logits, target).
        weights: One factor per loss.

    Raises:
        InputError: The two lists differ in length.
    """

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        if len(losses) != len(weights):
            raise InputError(
                f"{len(losses)} losses and {len(weights)} weights; give loss.weights one number "
                "per loss"
            )
        self.losses = nn.ModuleList(losses)
        self.weights = [float(weight) for weight in weights]

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Add the losses up: float [N, C, H, W] and integer [N, H, W] to a float32 scalar."""
        return self.total([loss(logits, target) for loss in self.losses])

    def total(self, values: Sequence[Tensor]) -> Tensor:
        """Add up values of the losses."""
        terms = zip(self.weights, values, strict=True)
        return torch.stack([weight * value for weight, value in terms]).sum()

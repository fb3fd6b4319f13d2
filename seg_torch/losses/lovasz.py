"""Lovász-softmax."""

import torch
from torch import Tensor, nn

from seg_torch.losses.base import flat_pixels, mean_over_present


class LovaszSoftmaxLoss(nn.Module):
    """Lovász-softmax: a convex surrogate of 1 - mean IoU.

    For each class that the batch's labels contain, the errors |t - p| of all valid pixels, from
    the largest down, each times what the IoU loses by it; the mean over the classes. Source:
    Berman, Triki & Blaschko, The Lovász-Softmax loss (2018), algorithm 1; over the batch, not image
    by image. Each of several processes has the IoU of its own batch.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss, in [0, 1]; arguments and result as those of `SegmentationLoss`."""
        logits, target, valid = flat_pixels(logits, target)
        losses, pixels = [], []
        with torch.autocast(logits.device.type, enabled=False):
            probabilities = logits.softmax(dim=1)
            for class_id in range(logits.shape[1]):  # class by class: a C-th of the memory
                is_class = target == class_id
                errors = (is_class.float() - probabilities[:, class_id]).abs()
                errors = torch.where(valid, errors, 0)
                losses.append((errors * _jaccard_losses(errors.detach(), is_class)).sum())
                pixels.append(is_class.sum())
            return mean_over_present(torch.stack(losses), torch.stack(pixels))


def _jaccard_losses(errors: Tensor, is_class: Tensor) -> Tensor:
    """Return what the IoU of a class loses by each pixel if those of larger error are wrong, too.

    These are the differences of algorithm 1, but without subtracting numbers that are almost equal.

    Args:
        errors: float32 [...], 0 at ignored pixels: they come last, where nothing counts.
        is_class: bool [...], the pixels of the class.

    Returns:
        float32 [...].
    """
    if errors.device.type == "cpu" and not is_class.any():
        return torch.zeros_like(errors)  # will not count; a GPU would have to be waited for
    order = errors.flatten().argsort(descending=True, stable=True)
    wrong = is_class.flatten()[order]
    missed = wrong.cumsum(0)  # whole numbers: exact, and deterministic on CUDA
    ranks = torch.arange(1, len(order) + 1, device=order.device)
    intersection = is_class.sum() - missed
    union = is_class.sum() + ranks - missed
    # A missed pixel takes 1 from the intersection, a false one adds 1 to the union.
    losses = torch.where(wrong, 1, intersection / (union - 1).clamp(min=1)) / union
    return torch.empty_like(losses).scatter_(0, order, losses).view_as(errors)

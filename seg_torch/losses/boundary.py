"""The boundary loss, and the distances that it takes."""

import torch
from torch import Tensor

from seg_torch.hardware import row_chunks
from seg_torch.losses.base import SegmentationLoss, Sums, flat_pixels

# Distances that are compared together: what stays in a CPU's cache, what keeps a GPU busy.
CPU_DISTANCES = 1 << 18
GPU_DISTANCES = 1 << 26


class BoundaryLoss(SegmentationLoss):
    """The distance of what is predicted from where it belongs: a loss to add to another.

    The mean over valid pixels and classes of p_c phi_c, where p are the softmax probabilities and
    phi_c is a pixel's distance to class c in its image's labels, in pixels: to the nearest pixel of
    the class, or, negative, from a pixel of the class to the nearest of another class, less one.
    Ignored pixels are of no class. A class that an image lacks, or has alone, has no boundary
    there, and phi_c is 0. Negative where most is right, so it comes with another loss, see
    `loss=ce_boundary`. Source: Kervadec et al., Boundary loss for highly unbalanced segmentation
    (2019), with the distances of the authors' code.

    The distances are exact and computed where the labels are. They take H * W^2 operations for each
    class of an image, which is little for a GPU but not for a CPU.
    """

    has_one_sum = True
    per_image = True

    def sums(self, logits: Tensor, target: Tensor) -> Sums:
        """Add up probabilities times distances, and counts what they are divided by."""
        shape, num_classes = logits.shape, logits.shape[1]
        logits, _, valid = flat_pixels(logits.contiguous(), target)
        with torch.autocast(logits.device.type, enabled=False):
            probabilities = logits.softmax(dim=1).view(shape)
            distances = torch.stack([_signed_distances(ids, num_classes) for ids in target])
            valid = valid.view_as(target)
            total = torch.where(valid.unsqueeze(1), probabilities * distances, 0).sum()
            return total, valid.sum() * num_classes


def _signed_distances(ids: Tensor, num_classes: int) -> Tensor:
    """Return the phi of `BoundaryLoss` of one image: [H, W] to float32 [C, H, W]."""
    is_class = ids == torch.arange(num_classes, device=ids.device)[:, None, None]
    distances = torch.stack([_distances(mask) for mask in is_class])
    # A pixel's own class has distance 0, so the second smallest is that to another class.
    to_another = distances.topk(2, dim=0, largest=False).values[1]
    signed = torch.where(is_class, 1 - to_another, distances)
    present = is_class.any(2).any(1)
    return torch.where((present & (present.sum() > 1))[:, None, None], signed, 0)


def _distances(mask: Tensor) -> Tensor:
    """Return how far each pixel is from the nearest one of a mask, as the crow flies.

    Source: Felzenszwalb & Huttenlocher, Distance Transforms of Sampled Functions (2012): first
    along the columns, then along the rows.

    Args:
        mask: bool [H, W].

    Returns:
        float32 [H, W], H + W or more if the mask is empty.
    """
    height, width = mask.shape
    far = height + width
    if mask.device.type == "cpu" and not mask.any():
        return torch.full(mask.shape, float(far))  # a GPU would have to be waited for
    rows = torch.arange(height, device=mask.device)[:, None]
    above = rows - torch.where(mask, rows, -far).cummax(0).values
    below = torch.where(mask, rows, height + far).flip(0).cummin(0).values.flip(0) - rows
    squares = torch.minimum(above, below).float().square()
    columns = torch.arange(width, device=mask.device).float()
    offsets = (columns[:, None] - columns).square()
    most = CPU_DISTANCES if mask.device.type == "cpu" else GPU_DISTANCES
    chunks = row_chunks(height, width**2, most)
    parts = [(squares[rows, None] + offsets).amin(2) for rows in chunks]
    return torch.cat(parts).sqrt()

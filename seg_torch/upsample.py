"""From the resolution at which a head works to that of the labels: logits, and losses of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seg_torch.hardware import total_memory
from seg_torch.losses import SegmentationLoss, Sums, WeightedSum

# What a loss takes of memory for each logit at label size, with its gradient.
LOSS_BYTES = 20

# Numbers of logits: of a few rows, which stay in a CPU's cache; many keep a GPU busy.
CPU_BAND = 1 << 20
GPU_BAND = 1 << 26

# Logits of one image at label size that are made at once to be decided: a quarter of a gigabyte.
WHOLE_IMAGE = 1 << 26


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Brings logits to the size of the labels, bilinearly and in float32.

    This comes before anything is decided (argmax): deciding first and enlarging class ids loses
    accuracy at every boundary.

    Args:
        logits: [N, C, h, w] of any floating type.
        size: (height, width) of the result.

    Returns:
        float32 [N, C, *size]; `logits` themselves where they have this size.
    """
    if logits.shape[-2:] == tuple(size):
        return logits
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


def upsampled_bands(logits: Tensor, size: Sequence[int]) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield logits at the size of the labels, image by image; of a large image in bands of rows.

    With 150 classes those of a large image at once would take gigabytes. Whether there are bands
    depends on the sizes alone, and the values do not depend on where the bands begin. They are
    those of `upsample` but for rounding, which between PyTorch's own implementations differs, too.

    Args:
        logits: [N, C, h, w] of any floating type.
        size: (height, width) of the labels.

    Yields:
        The number of the image, the rows, and their logits [C, rows, width].
    """
    height, width = size
    large = logits.shape[1] * height * width > WHOLE_IMAGE
    if large and logits.shape[-2:] != (height, width):
        for band in _bands(logits, size):
            part = logits[band.image, :, band.sources]
            yield band.image.start, band.rows, band.upsampled(part)[0]
        return
    for index in range(len(logits)):
        yield index, slice(0, height), upsample(logits[index : index + 1], size)[0]


def upsampled_loss(loss: nn.Module, logits: Tensor, target: Tensor) -> Tensor:
    """Return the loss of logits that are first brought to the size of the labels.

    With many classes, the logits at that size and what a loss makes of them take more memory than
    the whole network. Where that is more than a quarter of the device's memory they are made for a
    band of rows at a time; where the loss is more than one sum (Dice), once more for the gradient.
    Value and gradient are the same but for rounding.

    Args:
        loss: (logits float32 [N, C, H, W], target) -> scalar. Any that is not a
            `SegmentationLoss`, or a weighted sum of such, gets all logits at once.
        logits: [N, C, h, w] of any floating type.
        target: uint8 [N, H, W].

    Returns:
        Scalar, float32.
    """
    size = target.shape[-2:]
    parts: Any = loss.losses if isinstance(loss, WeightedSum) else [loss]
    taken = target.numel() * logits.shape[1] * LOSS_BYTES
    large = taken > total_memory(logits.device) / 4
    if not large or not all(isinstance(part, SegmentationLoss) for part in parts):
        return loss(upsample(logits, size), target)
    sums = iter(_BandedSums.apply(logits, target, parts))
    values = [part.loss(tuple(next(sums) for _ in range(part.num_sums))) for part in parts]
    return loss.total(values) if isinstance(loss, WeightedSum) else values[0]


class _Band(NamedTuple):
    """Rows of one image, and what they are interpolated from.

    Attributes:
        image: The image, as a slice of the batch.
        rows: Those of the label.
        width: Of the label.
        sources: Those of the logits that they depend on.
        above: int64 [rows], for each the row of the sources above it.
        below: int64 [rows], that below it.
        share: float32 [rows, 1], of the row below.
    """

    image: slice
    rows: slice
    width: int
    sources: slice
    above: Tensor
    below: Tensor
    share: Tensor

    def upsampled(self, logits: Tensor) -> Tensor:
        """Return the logits at label size, float32 [1, C, rows, width], from their `sources`.

        To the width of the label first, while there are fewer rows: on a CPU the backward of
        interpolation takes longer than the cross-entropy, that of lerp a fraction of it.
        """
        wide = upsample(logits.float(), (logits.shape[2], self.width))
        above, below = wide.index_select(2, self.above), wide.index_select(2, self.below)
        return torch.lerp(above, below, self.share)

    def sums(self, losses: Sequence[SegmentationLoss], logits: Tensor, target: Tensor) -> Sums:
        """Return the sums of all losses over this band, from the `sources` of its logits."""
        labels = target[self.image, self.rows]
        with torch.autocast(logits.device.type, enabled=False):
            at_size = self.upsampled(logits)
            return tuple(total for loss in losses for total in loss.sums(at_size, labels))


class _BandedSums(torch.autograd.Function):
    """The sums of losses over logits at label size, of which only a band exists at a time.

    Where one number is all that has a gradient, as with cross-entropy, the gradient is computed
    band by band together with it, and scaled in backward. Else what a band contributes depends on
    the sums over all of them, and the bands are made once more.
    """

    @staticmethod
    def forward(
        context: Any, logits: Tensor, target: Tensor, losses: Sequence[SegmentationLoss]
    ) -> Sums:
        gradient = None
        at_once = context.needs_input_grad[0]
        all_sums = []
        for band in _bands(logits, target.shape[-2:], losses):
            part = logits[band.image, :, band.sources].detach()
            with torch.set_grad_enabled(at_once):
                sums = band.sums(losses, part.requires_grad_(at_once), target)
            all_sums.append([each.detach() for each in sums])
            used = [each for each in sums if each.requires_grad]
            at_once = len(used) == 1 and used[0].ndim == 0
            if at_once:
                if gradient is None:
                    gradient = torch.zeros_like(logits, dtype=torch.float32)
                gradient[band.image, :, band.sources] += torch.autograd.grad(used, part)[0]
                context.used = [each.requires_grad for each in sums].index(True)
        context.losses = losses
        context.save_for_backward(logits, target, gradient)
        return tuple(torch.stack(parts).sum(0) for parts in zip(*all_sums, strict=True))

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, gradient = context.saved_tensors
        if gradient is not None:
            return (gradient * gradients[context.used]).to(logits.dtype), None, None
        total = torch.zeros_like(logits, dtype=torch.float32)
        for band in _bands(logits, target.shape[-2:], context.losses):
            part = logits[band.image, :, band.sources].detach().requires_grad_()
            with torch.enable_grad():
                sums = band.sums(context.losses, part, target)
            used = [i for i, each in enumerate(sums) if each.requires_grad]
            (gradient,) = torch.autograd.grad(
                [sums[i] for i in used], part, [gradients[i] for i in used]
            )
            total[band.image, :, band.sources] += gradient
        return total.to(logits.dtype), None, None


def _bands(
    logits: Tensor, size: Sequence[int], losses: Sequence[SegmentationLoss] = ()
) -> Iterator[_Band]:
    height, width = size
    band = CPU_BAND if logits.device.type == "cpu" else GPU_BAND
    rows = max(1, band // (logits.shape[1] * width))
    if any(loss.per_image for loss in losses):
        rows = height
    # As F.interpolate does it with align_corners=False.
    position = ((torch.arange(height) + 0.5) * (logits.shape[2] / height) - 0.5).clamp(min=0)
    above = position.long()
    below = (above + 1).clamp(max=logits.shape[2] - 1)
    share = (position - above)[:, None]
    for image in range(len(logits)):
        for top in range(0, height, rows):
            here = slice(top, min(top + rows, height))
            first = int(above[top])
            sources = slice(first, int(below[here.stop - 1]) + 1)
            places = above[here] - first, below[here] - first, share[here]
            on_device = (place.to(logits.device, non_blocking=True) for place in places)
            yield _Band(slice(image, image + 1), here, width, sources, *on_device)

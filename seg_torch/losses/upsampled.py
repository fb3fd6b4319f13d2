"""Losses of logits at label size, in a fraction of the memory that these would take."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seg_torch.hardware import total_memory
from seg_torch.losses.base import SegmentationLoss, Sums, WeightedSum
from seg_torch.upsample import RowChunk, split_rows, upsample

# What a loss takes of memory for each logit at label size, with its gradient.
LOSS_BYTES = 20


def upsampled_loss(loss: nn.Module, logits: Tensor, target: Tensor) -> Tensor:
    """Return the loss of logits that are first brought to the size of the labels.

    With many classes, the logits at that size and what a loss makes of them take more memory than
    the whole network. Where that is more than a quarter of the device's memory they are made for
    some rows at a time; where the loss is more than one sum (Dice), once more for the gradient.
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
    large = target.numel() * logits.shape[1] * LOSS_BYTES > total_memory(logits.device) / 4
    if not large or not all(isinstance(part, SegmentationLoss) for part in parts):
        return loss(upsample(logits, size), target)
    # Without a gradient there is no second pass.
    one_sum = len(parts) == 1 and parts[0].has_one_sum and logits.requires_grad
    sums = iter((OneSum if one_sum else SeveralSums).apply(logits, target, parts))
    values = [part.loss(tuple(next(sums) for _ in range(part.num_sums))) for part in parts]
    return loss.total(values) if isinstance(loss, WeightedSum) else values[0]


class OneSum(torch.autograd.Function):
    """The sums of a loss that has one, such as cross-entropy: the rest does not depend on logits.

    Then its gradient is computed together with it, chunk by chunk, and scaled in backward.
    """

    @staticmethod
    def forward(
        context: Any, logits: Tensor, target: Tensor, losses: Sequence[SegmentationLoss]
    ) -> Sums:
        gradient = torch.zeros_like(logits, dtype=torch.float32)
        all_sums = []
        for chunk in _chunks(logits, target, losses):
            part = logits[chunk.sources].detach().requires_grad_()
            with torch.enable_grad():
                sums = _sums(losses, chunk, part, target)
            gradient[chunk.sources] += torch.autograd.grad(sums[0], part)[0]
            all_sums.append([each.detach() for each in sums])
        context.dtype = logits.dtype
        context.save_for_backward(gradient)
        return _total(all_sums)

    @staticmethod
    @once_differentiable
    def backward(context: Any, of_sum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        return (gradient * of_sum).to(context.dtype), None, None


class SeveralSums(torch.autograd.Function):
    """The sums of losses where what a chunk contributes to the gradient depends on all of them.

    So backward makes the chunks once more.
    """

    @staticmethod
    def forward(
        context: Any, logits: Tensor, target: Tensor, losses: Sequence[SegmentationLoss]
    ) -> Sums:
        context.losses = losses
        context.save_for_backward(logits, target)
        chunks = _chunks(logits, target, losses)
        return _total([_sums(losses, chunk, logits[chunk.sources], target) for chunk in chunks])

    @staticmethod
    @once_differentiable
    def backward(context: Any, *of_sums: Tensor) -> tuple[Tensor | None, ...]:
        logits, target = context.saved_tensors
        gradient = torch.zeros_like(logits, dtype=torch.float32)
        for chunk in _chunks(logits, target, context.losses):
            part = logits[chunk.sources].detach().requires_grad_()
            with torch.enable_grad():
                sums = _sums(context.losses, chunk, part, target)
            pairs = zip(sums, of_sums, strict=True)
            used, of_used = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
            gradient[chunk.sources] += torch.autograd.grad(used, part, of_used)[0]
        return gradient.to(logits.dtype), None, None


def _chunks(
    logits: Tensor, target: Tensor, losses: Sequence[SegmentationLoss]
) -> Iterator[RowChunk]:
    return split_rows(logits, target.shape[-2:], any(loss.per_image for loss in losses))


def _sums(
    losses: Sequence[SegmentationLoss], chunk: RowChunk, logits: Tensor, target: Tensor
) -> Sums:
    """Return the sums of all losses over a chunk, from the `sources` of its logits."""
    labels = target[chunk.image, chunk.rows]
    with torch.autocast(logits.device.type, enabled=False):
        at_size = chunk.upsampled(logits)
        return tuple(total for loss in losses for total in loss.sums(at_size, labels))


def _total(all_sums: Sequence[Sequence[Tensor]]) -> Sums:
    return tuple(torch.stack(parts).sum(0) for parts in zip(*all_sums, strict=True))

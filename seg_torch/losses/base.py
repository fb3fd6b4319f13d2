"""What losses have in common: sums over pixels, also over those of several processes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from seg_torch.errors import InputError
from seg_torch.labels import IGNORE_INDEX, check_labels

Sums = tuple[Tensor, ...]


class SegmentationLoss(nn.Module):
    """A loss that is a function of sums over pixels, so that it can be taken part by part.

    When several processes train, these are the sums over the pixels of all of them, so the loss is
    that of one process with all images. All have to call it equally often in training.

    Attributes:
        num_sums: How many `sums` returns.
        has_one_sum: Whether of these the first alone depends on the logits, and is one number.
        per_image: Whether an image's share of the sums needs the labels of all of it.
    """

    num_sums = 2
    has_one_sum = False
    per_image = False

    def sums(self, logits: Tensor, target: Tensor) -> Sums:
        """Add up over the pixels of a batch, or of some of its rows; arguments as in `forward`."""
        raise NotImplementedError

    def from_sums(self, sums: Sums) -> Tensor:
        """Turn the sums over all pixels into the loss, a float32 scalar: divide the two."""
        total, divisor = sums
        return total / torch.where(divisor > 0, divisor, 1)

    def loss(self, sums: Sums) -> Tensor:
        """Return the loss from the sums over the pixels of this process."""
        return self.from_sums(over_processes(sums) if self.training else sums)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            logits: Float [N, C, H, W].
            target: uint8 or int64 [N, H, W], class ids in 0..C-1 or `IGNORE_INDEX`.

        Returns:
            Scalar, float32.

        Raises:
            InputError: The shapes do not fit, there is only one class, (on the CPU) the target
                holds another value, or the number of class weights is not C.
        """
        return self.loss(self.sums(logits, target))


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


def flat_pixels(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check logits and labels, and return them pixel by pixel, in the order of [N, H, W].

    The logits are float32; those of float16, which overflow, without the ignored pixels: the
    softmax of an infinity is nan, and so is its gradient, even where it is multiplied by zero.

    Where a pixel's logits lie side by side (channels_last), a CPU compares classes for one pixel at
    a time, or copies all of them across its cache. Row by row it takes half the time.

    Args:
        logits: Float [N, C, H, W].
        target: Integer [N, H, W].

    Returns:
        Logits [n, C, p], target int64 [n, p], and which pixels are valid, bool [n, p]: n is N, or
        N * H.

    Raises:
        InputError: See `SegmentationLoss.forward`.
    """
    if logits.ndim != 4 or target.shape != logits[:, 0].shape:
        raise InputError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(target.shape)} "
            "do not belong together; expected [N, C, H, W] and [N, H, W]"
        )
    if logits.shape[1] == 1:
        raise InputError(
            "the model has one output channel, and a softmax over one class is always 1; "
            "use two classes, background and foreground (num_classes=2, two lines in classes.txt)"
        )
    check_labels(target, logits.shape[1])
    valid = target != IGNORE_INDEX
    if logits.dtype == torch.float16:
        logits = logits.masked_fill(~valid.unsqueeze(1), 0)
    if logits.device.type == "cpu" and not logits.is_contiguous():
        logits = logits.movedim(1, 2).contiguous().float().flatten(0, 1)
    else:
        logits = logits.float().flatten(2)
    shape = logits[:, 0].shape
    return logits, target.long().reshape(shape), valid.reshape(shape)


def mean_over_present(values: Tensor, pixels: Tensor) -> Tensor:
    """Average values [C] over the classes that have pixels, a number [C] each."""
    present = pixels > 0
    return torch.where(present, values, 0).sum() / present.sum().clamp(min=1)


def weights_by_image(ids: Tensor, valid: Tensor, images: int, num_classes: int) -> Tensor:
    """Weigh each pixel by its class: (total - count) / total of its image's valid pixels.

    Args:
        ids: int64 [n, p], class ids; any of them where not valid.
        valid: bool [n, p].
        images: Number of images N, of which these are the pixels in order.
        num_classes: Number of classes C.

    Returns:
        Float32 [n, p].
    """
    of_image = ids.view(images, -1)
    counts = ids.new_zeros(images, num_classes)
    counts.scatter_add_(1, of_image, valid.view(images, -1).long())
    totals = counts.sum(dim=1, keepdim=True)
    weights = (totals - counts) / totals.clamp(min=1)
    return weights.gather(1, of_image).view_as(ids)


def over_processes(sums: Sums) -> Sums:
    """Add sums up over the processes that train together, if there are several.

    The gradient is that of this process's share times the number of processes: the mean of the
    gradients of all, which is what the optimizer gets, is that of the total. A share that is not
    finite is so in its own process alone, which can then be told from the others.
    """
    processes = _processes()
    if processes == 1:
        return sums
    share = torch.cat([each.flatten().float() for each in sums])
    total = share.detach().nan_to_num(nan=0, posinf=0, neginf=0)
    torch.distributed.all_reduce(total)
    total = total + processes * (share - share.detach())
    parts = total.split([each.numel() for each in sums])
    return tuple(part.view(each.shape) for part, each in zip(parts, sums, strict=True))


def mean_over_processes(value: Tensor) -> Tensor:
    """Average a scalar without gradient over the processes that train together."""
    (total,) = over_processes((value,))
    return total / _processes()


def _processes() -> int:
    """Return how many processes train together."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1

"""Losses: plain modules that turn logits and a label map of the same size into a scalar.

Every loss here leaves pixels labelled `IGNORE_INDEX` out exactly (their logits get zero gradient),
returns a finite zero with zero gradients when every pixel is ignored, and computes in float32
whatever type the model ran in. None of them makes the CPU wait for a GPU.
"""

import logging
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg_torch.errors import InputError
from seg_torch.labels import IGNORE_INDEX

log = logging.getLogger(__name__)

Sums = tuple[Tensor, ...]


class SegmentationLoss(nn.Module):
    """A loss that is a function of sums over pixels, so that it can be taken part by part.

    Attributes:
        num_sums: How many `sums` returns.
        per_image: Whether an image's share of the sums needs the labels of all of it.
    """

    num_sums: int
    per_image = False

    def sums(self, logits: Tensor, target: Tensor) -> Sums:
        """Adds up over the pixels of a batch, or of some of its rows; arguments as in `forward`."""
        raise NotImplementedError

    def from_sums(self, sums: Sums) -> Tensor:
        """Turns the sums over all pixels into the loss, a float32 scalar."""
        raise NotImplementedError

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            logits: Float [N, C, H, W].
            target: uint8 or int64 [N, H, W], class ids in 0..C-1 or `IGNORE_INDEX`.

        Returns:
            Scalar, float32.

        Raises:
            InputError: The shapes do not fit, there is only one class, (on the CPU) the target
                holds another value, or the number of class weights is not C.
        """
        return self.from_sums(self.sums(logits, target))


class CrossEntropyLoss(SegmentationLoss):
    """Cross-entropy per pixel, with optional class weights.

    When several processes train, each divides by the mean of their divisors. Their gradients are
    averaged, which makes them those of the mean over the pixels of all processes together, however
    many of them are ignored in each. So all processes have to call it equally often in training.

    Args:
        weights: How much each class counts.

            - `None`: the mean over valid pixels.
            - A list of C numbers: the weighted mean of `torch.nn.CrossEntropyLoss`, divided by the
              sum of the weights of the valid pixels.
            - `"dataset"`: the same, with weights from the number of pixels each class has in the
              training set. `needs_pixel_counts` is true until `set_pixel_counts` gives them.
            - `"image"`: weights from each image by itself, (total - count_c) / total, where total
              is the image's number of valid pixels and count_c its pixels of class c. As in the
              source, the weighted loss is averaged over valid pixels, not divided by the sum of the
              weights. Source: Ganegedara, TensorFlow in Action (2022), chapter 8.
        balance: The formula behind `weights="dataset"`, where freq_c = count_c / total.

            - `"inverse"`: total / (number of present classes * count_c).
            - `"median_frequency"`: median(freq) / freq_c over the present classes. Source: Eigen &
              Fergus (2015), section 6.3.2; there freq_c is relative to the images that contain
              class c, here to the whole training set.

            A class without a pixel in the training set gets weight 0.

    Raises:
        InputError: `weights` or `balance` is not one of the above.
    """

    class_weights: Tensor
    num_sums = 2

    def __init__(
        self,
        weights: Sequence[float] | Literal["dataset", "image"] | None = None,
        balance: Literal["inverse", "median_frequency"] = "inverse",
    ) -> None:
        super().__init__()
        if isinstance(weights, str) and weights not in ("dataset", "image"):
            raise InputError(
                f"loss.weights is {weights!r}; use null, dataset, image or a list with one number "
                "per class"
            )
        if balance not in ("inverse", "median_frequency"):
            raise InputError(f"loss.balance is {balance!r}; use inverse or median_frequency")
        self.balance = balance
        self.per_image = weights == "image"
        self.needs_pixel_counts = weights == "dataset"
        self.weighted = weights is not None and not self.per_image
        listed = [] if weights is None or isinstance(weights, str) else [float(w) for w in weights]
        if any(not 0 <= w < float("inf") for w in listed):
            raise InputError(f"loss.weights is {listed}; every weight must be finite and >= 0")
        self.register_buffer("class_weights", torch.tensor(listed), persistent=False)

    def set_pixel_counts(self, counts: Tensor) -> None:
        """Derive the weights of `weights="dataset"` from the training set.

        Args:
            counts: Integer [C], pixels per class in the training set, ignored pixels left out.
        """
        weights = class_weights(counts, self.balance)
        self.class_weights = weights.to(self.class_weights)
        self.needs_pixel_counts = False
        rounded = [round(weight, 4) for weight in weights.tolist()]
        log.info("class weights (%s): %s", self.balance, rounded)

    def sums(self, logits: Tensor, target: Tensor) -> Sums:
        """Adds up the loss of the pixels, and what it is divided by.

        Raises:
            RuntimeError: `weights="dataset"` and `set_pixel_counts` was not called.
        """
        _check(logits, target)
        if self.needs_pixel_counts:
            raise RuntimeError(
                'CrossEntropyLoss(weights="dataset") has no pixel counts yet: call '
                "set_pixel_counts(counts) with the training set's pixels per class"
            )
        num_classes = logits.shape[1]
        if self.weighted and len(self.class_weights) != num_classes:
            raise InputError(
                f"{len(self.class_weights)} class weights for {num_classes} classes; "
                "give loss.weights one number per class"
            )
        target = target.long()
        valid = target != IGNORE_INDEX
        ids = target.masked_fill(~valid, 0)  # something to look up; the loss there is zero
        with torch.autocast(logits.device.type, enabled=False):
            # reduction="none" is the one that CUDA computes deterministically.
            pixel_loss = F.cross_entropy(
                logits.float(),
                target,
                weight=self.class_weights if self.weighted else None,
                ignore_index=IGNORE_INDEX,
                reduction="none",
            )
            if self.per_image:
                pixel_loss = pixel_loss * _weights_by_image(ids, valid, num_classes)
            divisor = (self.class_weights[ids] * valid).sum() if self.weighted else valid.sum()
            return pixel_loss.sum(), divisor

    def from_sums(self, sums: Sums) -> Tensor:
        """Divides the one by the other."""
        loss, divisor = sums
        if self.training:
            divisor = mean_over_processes(divisor)
        return loss / torch.where(divisor > 0, divisor, 1)


def class_weights(counts: Tensor, balance: str = "inverse") -> Tensor:
    """Weigh classes by how rare they are, with the formulas of `CrossEntropyLoss`.

    Args:
        counts: Integer [C], pixels per class, ignored pixels left out.
        balance: "inverse" or "median_frequency".

    Returns:
        float64 [C]; 0 for a class without a pixel.
    """
    present = counts > 0
    present_counts = counts[present].double()
    usual = present_counts.mean() if balance == "inverse" else present_counts.quantile(0.5)
    weights = torch.zeros(len(counts), dtype=torch.float64, device=counts.device)
    weights[present] = usual / present_counts
    return weights


class OwnLoss(CrossEntropyLoss):
    """In training the loss that the model brings itself, see `Network.forward`; in validation,
    where there are logits alone, cross-entropy."""

    def __init__(self) -> None:
        super().__init__()


class DiceLoss(SegmentationLoss):
    """Soft multi-class Dice loss.

    1 - mean_c (2 sum(p_c t_c) + smooth) / (sum(p_c) + sum(t_c) + smooth), where p are the softmax
    probabilities, t the one-hot labels and the sums run over all valid pixels of the batch. The
    mean runs over the classes that the batch's labels contain. Source: Milletari, Navab & Ahmadi,
    V-Net (2016), section 3, without the squares in the denominator.

    Args:
        smooth: Added to numerator and denominator; keeps the gradient of rare classes bounded.
        weights: `"image"` instead takes all classes together, where each pixel counts with the
            weight of its class that `CrossEntropyLoss(weights="image")` gives it. Source:
            Ganegedara, TensorFlow in Action (2022), listing 8.15.

    Raises:
        InputError: `weights` is not one of the above.
    """

    def __init__(self, smooth: float = 1.0, weights: Literal["image"] | None = None) -> None:
        super().__init__()
        if weights not in (None, "image"):
            raise InputError(f"loss.weights is {weights!r}; the Dice loss takes null or image")
        self.smooth = smooth
        self.per_image = weights == "image"
        self.num_sums = 2 if self.per_image else 3

    def sums(self, logits: Tensor, target: Tensor) -> Sums:
        """Adds up where the two agree, the probabilities and the labels, each [C]; or weighted."""
        _check(logits, target)
        with torch.autocast(logits.device.type, enabled=False):
            probabilities = logits.float().softmax(dim=1)
            valid = (target != IGNORE_INDEX).unsqueeze(1)
            class_ids = torch.arange(logits.shape[1], device=target.device).view(1, -1, 1, 1)
            # Booleans of one byte and torch.where: no one-hot of floats, and unlike gather,
            # deterministic on CUDA.
            is_class = (target.long().unsqueeze(1) == class_ids) & valid
            if self.per_image:
                ids = target.long().masked_fill(~valid[:, 0], 0)
                weights = _weights_by_image(ids, valid[:, 0], logits.shape[1]) * valid[:, 0]
                right = torch.where(is_class, probabilities, 0).sum(1)
                return (weights * right).sum(), weights.sum()
            intersection = torch.where(is_class, probabilities, 0).sum((0, 2, 3))
            predicted = torch.where(valid, probabilities, 0).sum((0, 2, 3))
            return intersection, predicted, is_class.sum((0, 2, 3))

    def from_sums(self, sums: Sums) -> Tensor:
        """Computes the loss, in [0, 1]."""
        if self.per_image:
            # Over all classes, probabilities and labels both add up to one a pixel.
            right, weights = sums
            numerator = 2 * right + self.smooth
            denominator = 2 * weights + self.smooth
            return (denominator - numerator) / torch.where(denominator > 0, denominator, 1)
        intersection, predicted, labelled = sums
        dice = (2 * intersection + self.smooth) / (predicted + labelled + self.smooth)
        present = labelled > 0
        return torch.where(present, 1 - dice, 0).sum() / present.sum().clamp(min=1)


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
        """Adds the losses up: float [N, C, H, W] and integer [N, H, W] to a float32 scalar."""
        return self.total([loss(logits, target) for loss in self.losses])

    def total(self, values: Sequence[Tensor]) -> Tensor:
        """Adds up values of the losses."""
        terms = zip(self.weights, values, strict=True)
        return torch.stack([weight * value for weight, value in terms]).sum()


def _check(logits: Tensor, target: Tensor) -> None:
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


def check_labels(target: Tensor, num_classes: int) -> None:
    """Refuse label values that are no class, on the CPU only: a GPU would have to be waited for.

    Args:
        target: Integer [...].
        num_classes: Number of classes C.

    Raises:
        InputError: A value is neither in 0..C-1 nor `IGNORE_INDEX`.
    """
    if target.device.type != "cpu" or target.numel() == 0:
        return
    lowest, highest = target.masked_fill(target == IGNORE_INDEX, 0).aminmax()
    if lowest < 0 or highest >= num_classes:
        raise InputError(
            f"the labels hold the values {target.unique().tolist()}; allowed are "
            f"0..{num_classes - 1} and {IGNORE_INDEX} (ignored)"
        )


def mean_over_processes(value: Tensor) -> Tensor:
    """Average a scalar over the processes that train together, if there are several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total = value.float()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def _weights_by_image(ids: Tensor, valid: Tensor, num_classes: int) -> Tensor:
    """Weigh each pixel by its class: (total - count) / total of its image's valid pixels.

    Args:
        ids: int64 [N, H, W], class ids; any of them where not valid.
        valid: bool [N, H, W].
        num_classes: Number of classes C.

    Returns:
        Float32 [N, H, W].
    """
    counts = ids.new_zeros(len(ids), num_classes)
    counts.scatter_add_(1, ids.flatten(1), valid.flatten(1).long())
    totals = counts.sum(dim=1, keepdim=True)
    weights = (totals - counts) / totals.clamp(min=1)
    return weights.gather(1, ids.flatten(1)).view_as(ids)

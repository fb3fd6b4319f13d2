"""Cross-entropy, also weighted, focal and of the hardest pixels alone."""

import logging
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg_torch.errors import InputError, check_choice
from seg_torch.labels import IGNORE_INDEX
from seg_torch.losses import base

log = logging.getLogger(__name__)


class CrossEntropyLoss(base.SegmentationLoss):
    """Cross-entropy per pixel, with optional class weights and label smoothing.

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
        label_smoothing: The share of each pixel's label that is spread evenly over all classes, in
            [0, 1), as in `torch.nn.CrossEntropyLoss`. Source: Szegedy et al., Rethinking the
            Inception Architecture (2016), section 7.

    Raises:
        InputError: `weights`, `balance` or `label_smoothing` is not one of the above.
    """

    class_weights: Tensor
    has_one_sum = True

    def __init__(
        self,
        weights: Sequence[float] | Literal["dataset", "image"] | None = None,
        balance: Literal["inverse", "median_frequency"] = "inverse",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise InputError(
                f"loss.label_smoothing is {label_smoothing}; use a number from 0 to less than 1"
            )
        self.label_smoothing = label_smoothing
        if isinstance(weights, str) and weights not in ("dataset", "image"):
            raise InputError(
                f"loss.weights is {weights!r}; use null, dataset, image or a list with one number "
                "per class"
            )
        check_choice("loss.balance", balance, ("inverse", "median_frequency"))
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
        log.info("class weights (%s): %s", self.balance, [round(w, 4) for w in weights.tolist()])

    def sums(self, logits: Tensor, target: Tensor) -> base.Sums:
        """Add up the loss of the pixels, and what it is divided by.

        Raises:
            RuntimeError: `weights="dataset"` and `set_pixel_counts` was not called.
        """
        images, num_classes = logits.shape[:2]
        logits, target, valid = base.flat_pixels(logits, target)
        if self.needs_pixel_counts:
            raise RuntimeError(
                'CrossEntropyLoss(weights="dataset") has no pixel counts yet: call '
                "set_pixel_counts(counts) with the training set's pixels per class"
            )
        if self.weighted and len(self.class_weights) != num_classes:
            raise InputError(
                f"{len(self.class_weights)} class weights for {num_classes} classes; "
                "give loss.weights one number per class"
            )
        ids = target.masked_fill(~valid, 0)  # something to look up; the loss there is zero
        with torch.autocast(logits.device.type, enabled=False):
            pixel_loss = self.pixel_loss(logits, target, ids)
            if self.per_image:
                pixel_loss = pixel_loss * base.weights_by_image(ids, valid, images, num_classes)
            divisor = (self.class_weights[ids] * valid).sum() if self.weighted else valid.sum()
            return pixel_loss.sum(), divisor

    def pixel_loss(self, logits: Tensor, target: Tensor, ids: Tensor) -> Tensor:
        """Compute the loss of each pixel with its class weight.

        Args:
            logits: float32 [n, C, p].
            target: int64 [n, p].
            ids: `target`, with class ids in place of `IGNORE_INDEX`.

        Returns:
            float32 [n, p], 0 at ignored pixels.
        """
        # reduction="none" is the one that CUDA computes deterministically.
        return F.cross_entropy(
            logits,
            target,
            weight=self.class_weights if self.weighted else None,
            ignore_index=IGNORE_INDEX,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )


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
    typical = present_counts.mean() if balance == "inverse" else present_counts.quantile(0.5)
    weights = torch.zeros(len(counts), dtype=torch.float64, device=counts.device)
    weights[present] = typical / present_counts
    return weights


class FocalLoss(CrossEntropyLoss):
    """Cross-entropy in which pixels that are already right count little: (1 - p)^gamma times.

    p is the softmax probability of the pixel's label. Source: Lin, Goyal, Girshick, He & Dollár,
    Focal Loss for Dense Object Detection (2017), equation 5. Their alpha is `weights`, and the sum
    is divided as that of `CrossEntropyLoss`: without weights by the number of valid pixels.

    Args:
        gamma: 0 for cross-entropy; the larger, the more the hard pixels count.
        weights: As of `CrossEntropyLoss`.
        balance: As of `CrossEntropyLoss`.

    Raises:
        InputError: `gamma` is negative, or as `CrossEntropyLoss` does.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        weights: Sequence[float] | Literal["dataset", "image"] | None = None,
        balance: Literal["inverse", "median_frequency"] = "inverse",
    ) -> None:
        super().__init__(weights, balance)
        if gamma < 0:
            raise InputError(f"loss.gamma is {gamma}; use 0 or more")
        self.gamma = gamma

    def pixel_loss(self, logits: Tensor, target: Tensor, ids: Tensor) -> Tensor:
        """Compute the loss of each pixel, see `CrossEntropyLoss.pixel_loss`."""
        loss = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="none")
        wrong = -torch.expm1(-loss)  # 1 - p
        # The slope of a power below 1 is infinite at 0, where the loss is 0.
        loss = wrong.clamp(min=1e-12) ** self.gamma * loss
        return loss * self.class_weights[ids] if self.weighted else loss


class OhemCrossEntropyLoss(nn.Module):
    """Cross-entropy of the hard pixels alone (online hard example mining).

    The mean over those whose label has a softmax probability below `threshold`; where these are
    fewer than `min_kept` of the valid pixels, over that many of the hardest. The pixels of all
    images of the batch compete; each of several processes chooses from its own, and the
    mean is over what all have chosen, as in `CrossEntropyLoss`. Source: Shrivastava, Gupta &
    Girshick (2016); per pixel: Wu, Shen & van den Hengel, High-performance Semantic Segmentation
    Using Very Deep Fully Convolutional Networks (2016), "online bootstrapping".

    Args:
        threshold: In (0, 1].
        min_kept: Share of the batch's valid pixels, in (0, 1].

    Raises:
        InputError: One of them is not in its range.
    """

    def __init__(self, threshold: float = 0.7, min_kept: float = 0.0625) -> None:
        super().__init__()
        for name, value in (("threshold", threshold), ("min_kept", min_kept)):
            if not 0 < value <= 1:
                raise InputError(f"loss.{name} is {value}; use a number above 0, up to 1")
        self.threshold = threshold
        self.min_kept = min_kept

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss; arguments and result as those of `SegmentationLoss`."""
        logits, target, valid = base.flat_pixels(logits, target)
        with torch.autocast(logits.device.type, enabled=False):
            loss = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="none")
            with torch.no_grad():
                hardest = torch.where(valid, loss, -1).flatten().sort(descending=True).values
                last = (self.min_kept * valid.sum()).ceil().long() - 1
                least = hardest.gather(0, last.clamp(0, len(hardest) - 1)[None])
                # Not >=, which would leave out losses that are not numbers.
                kept = valid & ~(loss < least.clamp(max=-math.log(self.threshold)))
            sums = (torch.where(kept, loss, 0).sum(), kept.sum())
            total, divisor = base.over_processes(sums) if self.training else sums
            return total / divisor.clamp(min=1)


class ModelLoss(CrossEntropyLoss):
    """The loss that the model brings itself, see `Network.forward`.

    In validation, where there are logits alone, it is cross-entropy.
    """

    def __init__(self) -> None:
        super().__init__()

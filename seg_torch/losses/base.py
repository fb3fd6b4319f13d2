"""Losses: plain modules that turn logits and a label map of the same size into a scalar.

Every loss here leaves pixels labelled `IGNORE_INDEX` out exactly (their logits get zero gradient),
returns a finite zero with zero gradients when every pixel is ignored, and computes in float32
whatever type the model ran in. None of them makes the CPU wait for a GPU.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seg_torch.errors import InputError
from seg_torch.labels import IGNORE_INDEX

log = logging.getLogger(__name__)

Sums = tuple[Tensor, ...]

# Distances that are compared together: what stays in a CPU's cache, what keeps a GPU busy.
CPU_DISTANCES = 1 << 18
GPU_DISTANCES = 1 << 26


class SegmentationLoss(nn.Module):
    """A loss that is a function of sums over pixels, so that it can be taken part by part.

    When several processes train, these are the sums over the pixels of all of them, so the loss is
    that of one process with all images. All have to call it equally often in training.

    Attributes:
        num_sums: How many `sums` returns.
        per_image: Whether an image's share of the sums needs the labels of all of it.
    """

    num_sums: int
    per_image = False

    def sums(self, logits: Tensor, target: Tensor) -> Sums:
        """Add up over the pixels of a batch, or of some of its rows; arguments as in `forward`."""
        raise NotImplementedError

    def from_sums(self, sums: Sums) -> Tensor:
        """Turn the sums over all pixels into the loss, a float32 scalar."""
        raise NotImplementedError

    def loss(self, sums: Sums) -> Tensor:
        """Return the loss from the sums over the pixels of this process."""
        return self.from_sums(_over_processes(sums) if self.training else sums)

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


class CrossEntropyLoss(SegmentationLoss):
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
    num_sums = 2

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
        """Add up the loss of the pixels, and what it is divided by.

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
            logits = _pixels(logits, valid)
            shape = logits[:, 0].shape
            pixel_loss = self.pixel_loss(logits, target.reshape(shape), ids.reshape(shape))
            if self.per_image:
                weights = _weights_by_image(ids, valid, num_classes)
                pixel_loss = pixel_loss * weights.reshape(shape)
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

    def from_sums(self, sums: Sums) -> Tensor:
        """Divides the one by the other."""
        loss, divisor = sums
        return loss / torch.where(divisor > 0, divisor, 1)


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
        _check(logits, target)
        target = target.long()
        valid = target != IGNORE_INDEX
        with torch.autocast(logits.device.type, enabled=False):
            logits = _pixels(logits, valid)
            shape = logits[:, 0].shape
            target, valid = target.reshape(shape), valid.reshape(shape)
            loss = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="none")
            with torch.no_grad():
                hardest = torch.where(valid, loss, -1).flatten().sort(descending=True).values
                last = (self.min_kept * valid.sum()).ceil().long() - 1
                least = hardest.gather(0, last.clamp(0, len(hardest) - 1)[None])
                # Not >=, which would leave out losses that are not numbers.
                kept = valid & ~(loss < least.clamp(max=-math.log(self.threshold)))
            sums = (torch.where(kept, loss, 0).sum(), kept.sum())
            total, divisor = _over_processes(sums) if self.training else sums
            return total / divisor.clamp(min=1)


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
    """The loss that the model brings itself, see `Network.forward`.

    In validation, where there are logits alone, it is cross-entropy.
    """

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
        """Add up where the two agree, the probabilities and the labels, each [C]; or weighted."""
        _check(logits, target)
        valid = target != IGNORE_INDEX
        ids = target.long().masked_fill(~valid, 0)
        with torch.autocast(logits.device.type, enabled=False):
            logits = _pixels(logits, valid)
            shape = logits[:, 0].shape
            if not self.per_image:
                return _DiceSums.apply(logits, ids.reshape(shape), valid.reshape(shape))
            weights = _weights_by_image(ids, valid, logits.shape[1]) * valid
            loss = F.cross_entropy(logits, ids.reshape(shape), reduction="none")  # -log p
            return (weights.reshape(shape) * torch.exp(-loss)).sum(), weights.sum()

    def from_sums(self, sums: Sums) -> Tensor:
        """Compute the loss, in [0, 1]."""
        if self.per_image:
            # Over all classes, probabilities and labels both add up to one a pixel.
            right, weights = sums
            numerator = 2 * right + self.smooth
            denominator = 2 * weights + self.smooth
            return (denominator - numerator) / torch.where(denominator > 0, denominator, 1)
        intersection, predicted, labelled = sums
        dice = (2 * intersection + self.smooth) / (predicted + labelled + self.smooth)
        return _mean_over_present(1 - dice, labelled)


class _DiceSums(torch.autograd.Function):
    """sum(p_c t_c), sum(p_c) and sum(t_c), each [C], over valid pixels, from float32 [n, C, p].

    Of the three, only the probabilities are kept for backward, and no one-hot labels are made: on a
    CPU that takes a fraction of the time of what autograd would do.
    """

    @staticmethod
    def forward(context: Any, logits: Tensor, ids: Tensor, valid: Tensor) -> Sums:
        num_classes = logits.shape[1]
        probabilities = logits.softmax(1).masked_fill_(~valid.unsqueeze(1), 0)
        right = probabilities.gather(1, ids.unsqueeze(1))
        if logits.device.type == "cpu":
            flat, sums = ids.flatten(), right.new_zeros(num_classes, dtype=torch.float64)
            intersection = sums.scatter_add(0, flat, right.flatten().double()).float()
            labelled = sums.long().scatter_add_(0, flat, valid.flatten().long())
        else:  # where adding up by class would depend on the order
            classes = torch.arange(num_classes, device=ids.device).view(1, -1, 1)
            is_class = (ids.unsqueeze(1) == classes) & valid.unsqueeze(1)
            intersection = torch.where(is_class, probabilities, 0).sum((0, 2))
            labelled = is_class.sum((0, 2))
        context.save_for_backward(probabilities, ids)
        context.mark_non_differentiable(labelled)
        return intersection, probabilities.sum((0, 2)), labelled

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return p (g - sum(p g)), the gradient of a softmax p; g is that of the loss by p."""
        probabilities, ids = context.saved_tensors
        of_right, of_predicted, _ = gradients
        right = probabilities.gather(1, ids.unsqueeze(1)) * of_right[ids].unsqueeze(1)
        gradient = probabilities * of_predicted.view(1, -1, 1)
        mean = gradient.sum(1, keepdim=True) + right
        gradient.addcmul_(probabilities, mean, value=-1)
        return gradient.scatter_add_(1, ids.unsqueeze(1), right), None, None


class TverskyLoss(DiceLoss):
    """Soft multi-class Tversky loss: Dice with a price each for false positives and negatives.

    The mean over the classes that the batch's labels contain of (1 - T)^(1 / gamma), where T is
    (TP + smooth) / (TP + alpha FP + beta FN + smooth), TP = sum(p t), FP = sum(p (1 - t)) and
    FN = sum((1 - p) t), over all valid pixels of the batch. With alpha = beta = 0.5 it is the Dice
    loss of twice the `smooth`. Sources: Salehi, Erdogmus & Gholipour (2017), with gamma = 1;
    Abraham & Khan, A novel focal Tversky loss function (2019), with gamma = 4/3.

    Args:
        alpha: Of false positives.
        beta: Of false negatives; above `alpha` for classes that are rather missed.
        gamma: Above 1, classes that are already right count more than by the loss itself.
        smooth: Added to numerator and denominator; keeps the gradient of rare classes bounded.

    Raises:
        InputError: A price is negative, or `gamma` not above 0.
    """

    def __init__(
        self, alpha: float = 0.3, beta: float = 0.7, gamma: float = 1.0, smooth: float = 1.0
    ) -> None:
        super().__init__(smooth)
        if min(alpha, beta) < 0 or gamma <= 0:
            raise InputError(
                f"loss.alpha, beta and gamma are {alpha}, {beta} and {gamma}; use numbers above 0"
            )
        self.alpha, self.beta, self.gamma = alpha, beta, gamma

    def from_sums(self, sums: Sums) -> Tensor:
        """Compute the loss, in [0, 1]."""
        true, predicted, labelled = sums
        wrong = self.alpha * (predicted - true) + self.beta * (labelled - true)
        loss = wrong / torch.where(labelled > 0, true + wrong + self.smooth, 1)
        # The slope of a power below 1 is infinite at 0.
        return _mean_over_present(loss.clamp(min=1e-7) ** (1 / self.gamma), labelled)


class LovaszSoftmaxLoss(nn.Module):
    """Lovász-softmax: a convex surrogate of 1 - mean IoU.

    For each class that the batch's labels contain, the errors |t - p| of all valid pixels, from
    the largest down, each times what the IoU loses by it; the mean over the classes. Source:
    Berman, Triki & Blaschko, The Lovász-Softmax loss (2018), algorithm 1; over the batch, not image
    by image. Each of several processes has the IoU of its own batch.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss, in [0, 1]; arguments and result as those of `SegmentationLoss`."""
        _check(logits, target)
        valid = target != IGNORE_INDEX
        losses, pixels = [], []
        with torch.autocast(logits.device.type, enabled=False):
            probabilities = _pixels(logits, valid).softmax(dim=1)
            shape = probabilities[:, 0].shape
            target, valid = target.reshape(shape), valid.reshape(shape)
            for class_id in range(logits.shape[1]):  # class by class: a C-th of the memory
                is_class = target == class_id
                errors = (is_class.float() - probabilities[:, class_id]).abs()
                errors = torch.where(valid, errors, 0)
                losses.append((errors * _jaccard_losses(errors.detach(), is_class)).sum())
                pixels.append(is_class.sum())
            return _mean_over_present(torch.stack(losses), torch.stack(pixels))


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

    num_sums = 2
    per_image = True

    def sums(self, logits: Tensor, target: Tensor) -> Sums:
        """Add up probabilities times distances, and counts what they are divided by."""
        _check(logits, target)
        num_classes = logits.shape[1]
        valid = target != IGNORE_INDEX
        with torch.autocast(logits.device.type, enabled=False):
            probabilities = _pixels(logits.contiguous(), valid).softmax(dim=1).view(logits.shape)
            distances = torch.stack([_signed_distances(ids, num_classes) for ids in target])
            total = torch.where(valid.unsqueeze(1), probabilities * distances, 0).sum()
            return total, valid.sum() * num_classes

    def from_sums(self, sums: Sums) -> Tensor:
        """Divides the one by the other."""
        total, divisor = sums
        return total / divisor.clamp(min=1)


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
    together = CPU_DISTANCES if mask.device.type == "cpu" else GPU_DISTANCES
    bands = squares.split(max(1, together // width**2))
    parts = [(band[:, None] + offsets).amin(2) for band in bands]
    return torch.cat(parts).sqrt()


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


def _mean_over_present(values: Tensor, pixels: Tensor) -> Tensor:
    """Average values [C] over the classes that have pixels, a number [C] each."""
    present = pixels > 0
    return torch.where(present, values, 0).sum() / present.sum().clamp(min=1)


def _pixels(logits: Tensor, valid: Tensor) -> Tensor:
    """Return float32 logits; those of float16, which overflow, without the ignored pixels.

    The softmax of an infinity is nan, and so is its gradient, even where it is multiplied by zero.

    Where a pixel's logits lie side by side (channels_last), a CPU compares classes for one pixel at
    a time, or copies all of them across its cache. Row by row it takes half the time.

    Args:
        logits: Float [N, C, H, W].
        valid: bool [N, H, W].

    Returns:
        [n, C, p], the pixels in the order of [N, H, W]: n is N, or N * H.
    """
    if logits.dtype == torch.float16:
        logits = logits.masked_fill(~valid.unsqueeze(1), 0)
    if logits.device.type == "cpu" and not logits.is_contiguous():
        return logits.movedim(1, 2).contiguous().float().flatten(0, 1)
    return logits.float().flatten(2)


def _over_processes(sums: Sums) -> Sums:
    """Add sums up over the processes that train together, if there are several.

    The gradient is that of this process's share times the number of processes: the mean of the
    gradients of all, which is what the optimizer gets, is that of the total. A share that is not
    finite is so in its own process alone, which can then be told from the others.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums
    own = torch.cat([each.flatten().float() for each in sums])
    total = own.detach().nan_to_num(nan=0, posinf=0, neginf=0)
    torch.distributed.all_reduce(total)
    total = total + torch.distributed.get_world_size() * (own - own.detach())
    parts = total.split([each.numel() for each in sums])
    return tuple(part.view(each.shape) for part, each in zip(parts, sums, strict=True))


def mean_over_processes(value: Tensor) -> Tensor:
    """Averages a scalar without gradient over the processes that train together."""
    (total,) = _over_processes((value,))
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return total / torch.distributed.get_world_size() if distributed else total


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

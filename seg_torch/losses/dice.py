"""Dice and Tversky: how much what is predicted and what is labelled overlap."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seg_torch.errors import InputError
from seg_torch.losses import base


class DiceLoss(base.SegmentationLoss):
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
        self.has_one_sum = self.per_image
        self.num_sums = 2 if self.per_image else 3

    def sums(self, logits: Tensor, target: Tensor) -> base.Sums:
        """Add up where the two agree, the probabilities and the labels, each [C]; or weighted."""
        images, num_classes = logits.shape[:2]
        logits, target, valid = base.flat_pixels(logits, target)
        ids = target.masked_fill(~valid, 0)
        with torch.autocast(logits.device.type, enabled=False):
            if not self.per_image:
                return _DiceSums.apply(logits, ids, valid)
            weights = base.weights_by_image(ids, valid, images, num_classes) * valid
            loss = F.cross_entropy(logits, ids, reduction="none")  # -log p
            return (weights * torch.exp(-loss)).sum(), weights.sum()

    def from_sums(self, sums: base.Sums) -> Tensor:
        """Compute the loss, in [0, 1]."""
        if self.per_image:
            # Over all classes, probabilities and labels both add up to one a pixel.
            right, weights = sums
            numerator = 2 * right + self.smooth
            denominator = 2 * weights + self.smooth
            return (denominator - numerator) / torch.where(denominator > 0, denominator, 1)
        intersection, predicted, labelled = sums
        dice = (2 * intersection + self.smooth) / (predicted + labelled + self.smooth)
        return base.mean_over_present(1 - dice, labelled)


class _DiceSums(torch.autograd.Function):
    """sum(p_c t_c), sum(p_c) and sum(t_c), each [C], over valid pixels, from float32 [n, C, p].

    Of the three, only the probabilities are kept for backward, and no one-hot labels are made: on a
    CPU that takes a fraction of the time of what autograd would do.
    """

    @staticmethod
    def forward(context: Any, logits: Tensor, ids: Tensor, valid: Tensor) -> base.Sums:
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

    def from_sums(self, sums: base.Sums) -> Tensor:
        """Compute the loss, in [0, 1]."""
        true, predicted, labelled = sums
        wrong = self.alpha * (predicted - true) + self.beta * (labelled - true)
        loss = wrong / torch.where(labelled > 0, true + wrong + self.smooth, 1)
        # The slope of a power below 1 is infinite at 0.
        return base.mean_over_present(loss.clamp(min=1e-7) ** (1 / self.gamma), labelled)

"""Mask classification: what its queries say of each pixel, and its loss at labelled pixels."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg_torch.labels import IGNORE_INDEX
from seg_torch.losses.base import mean_over_processes
from seg_torch.upsample import upsample


def semantic_logits(classes: Tensor, masks: Tensor) -> Tensor:
    """Return the logarithm of each class's score at each pixel.

    The score is the sum over the queries of the probability of the class times that of the pixel
    being in the query's mask: "semantic inference" of Cheng et al. (2021), section 3.4.

    Args:
        classes: Logits [N, Q, K + 1] of the classes of each query, "no object" the last.
        masks: Logits [N, Q, h, w] of each query's mask.

    Returns:
        float32 [N, K, h, w].
    """
    with torch.autocast(classes.device.type, enabled=False):
        probabilities = classes.float().softmax(-1)[..., :-1]
        scores = torch.einsum("nqk,nqhw->nkhw", probabilities, masks.float().sigmoid())
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()


class MaskLoss(nn.Module):
    """The loss of a mask-classification model of transformers, where ignored pixels do not count.

    It takes the place of the model's criterion, which would count ignored pixels as outside of
    every mask, and has its terms, weights and numbers. Each class of an image is matched with one
    query, whose mask and class are compared with it (Cheng et al. 2021, 2022):

    - Masks are matched at all labelled pixels of their own resolution, as MaskFormer does it.
    - A matched mask is compared at labelled pixels: for MaskFormer at all of them, for the others
      at as many as the criterion has points, most of them where the mask is least certain. A point
      is the centre of a pixel, where the criterion's may be between pixels.
    - The class loss knows no pixels: queries that no class is matched with learn "no object". An
      image in which all is ignored has no part in it.

    Args:
        criterion: That of the model.
    """

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion: Any = criterion
        library: Any = sys.modules[type(criterion).__module__]
        focal = hasattr(library, "sigmoid_focal_loss")
        kind = "sigmoid_focal_loss" if focal else "sigmoid_cross_entropy_loss"
        self.losses = {"loss_mask": getattr(library, kind), "loss_dice": library.dice_loss}
        self.mask_cost = getattr(library, f"pair_wise_{kind}")
        self.dice_cost = library.pair_wise_dice_loss

    def forward(
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Tensor,
        class_labels: Tensor,
        auxiliary_predictions: Sequence[dict[str, Tensor]] | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        """Compute the terms, by the names and with the arguments of the library's criterion.

        Args:
            masks_queries_logits: [N, Q, h, w].
            class_queries_logits: [N, Q, K + 1].
            mask_labels: Integer [N, H, W], class ids or `IGNORE_INDEX`, where H / h = W / w.
            class_labels: Not used.
            auxiliary_predictions: The logits of the layers before the last.

        Returns:
            float32 scalars, not yet weighted; 0 where all pixels are ignored.
        """
        layers = [
            (each["class_queries_logits"], each["masks_queries_logits"])
            for each in auxiliary_predictions or ()
        ]
        layers.append((class_queries_logits, masks_queries_logits))
        size = masks_queries_logits.shape[-2:]
        coarse = F.interpolate(mask_labels[:, None].float(), size=size, mode="nearest")
        present = [target[target != IGNORE_INDEX].unique().long() for target in mask_labels]
        count = torch.tensor(float(sum(map(len, present))), device=mask_labels.device)
        num_masks = mean_over_processes(count).clamp(min=1)
        terms: dict[str, Tensor] = {}
        for i, (classes, masks) in enumerate(layers):
            with torch.autocast(mask_labels.device.type, enabled=False):
                logits = classes.float(), masks.float()
                values = self._terms(*logits, mask_labels, coarse[:, 0], present, num_masks)
            terms |= {f"{name}_{i}": value for name, value in values.items()}
        return terms

    def _terms(
        self,
        classes: Tensor,
        masks: Tensor,
        targets: Tensor,
        coarse: Tensor,
        present: list[Tensor],
        num_masks: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the terms of one layer; `present` holds the classes of each image."""
        none = 0 * (classes.sum() + masks.sum())  # so that there always is a gradient
        terms = {"loss_cross_entropy": none, "loss_mask": none, "loss_dice": none}
        expected = torch.full_like(classes[..., 0], -100, dtype=torch.long)  # -100: left out
        for i, target in enumerate(targets.flatten(1)):
            if not len(present[i]):
                continue
            queries, columns = self._match(classes[i], masks[i], coarse[i], present[i])
            expected[i] = classes.shape[-1] - 1
            expected[i, queries] = present[i][columns]
            logits = upsample(masks[i : i + 1, queries], targets.shape[-2:])[0].flatten(1)
            points = self._points(logits, (target != IGNORE_INDEX).nonzero()[:, 0])
            inside = (target[points] == present[i][columns, None]).float()
            for name, loss in self.losses.items():
                terms[name] = terms[name] + loss(logits.gather(1, points), inside, num_masks)
        if any(map(len, present)):
            # As rows, which a GPU can do deterministically.
            terms["loss_cross_entropy"] = F.cross_entropy(
                classes.flatten(0, 1), expected.flatten(), self.criterion.empty_weight
            )
        return terms

    @torch.no_grad()
    def _match(
        self, classes: Tensor, masks: Tensor, target: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the queries that classes are matched with, and the places of these in `present`.

        Args:
            classes: [Q, K + 1].
            masks: [Q, h, w].
            target: [h, w].
            present: Class ids [k].
        """
        from scipy.optimize import linear_sum_assignment  # which transformers needs for it, too

        ids = target.flatten()
        labelled = ids != IGNORE_INDEX
        logits = masks.flatten(1)[:, labelled]
        inside = (ids[labelled] == present[:, None]).float()
        matcher = self.criterion.matcher
        cost = (
            matcher.cost_mask * self.mask_cost(logits, inside)
            + matcher.cost_dice * self.dice_cost(logits, inside)
            - matcher.cost_class * classes.softmax(-1)[:, present]
        )
        # A diverged network is told by its loss, not by an error in here.
        queries, columns = linear_sum_assignment(cost.nan_to_num(1e30, 1e30, -1e30).cpu())
        return torch.tensor(queries, device=cost.device), torch.tensor(columns, device=cost.device)

    def _points(self, logits: Tensor, labelled: Tensor) -> Tensor:
        """Return the labelled positions int64 [k, P] at which masks [k, H * W] are compared.

        Source: Kirillov et al. (2020), section 3.1.
        """
        count = getattr(self.criterion, "num_points", None)
        if count is None:
            return labelled.expand(len(logits), -1)

        def draw(number: int) -> Tensor:
            shape = (len(logits), number)
            return labelled[torch.randint(len(labelled), shape, device=logits.device)]

        candidates = draw(int(self.criterion.oversample_ratio * count))
        certainty = logits.detach().gather(1, candidates).abs()
        uncertain = int(self.criterion.importance_sample_ratio * count)
        chosen = certainty.topk(uncertain, largest=False).indices
        return torch.cat([candidates.gather(1, chosen), draw(count - uncertain)], 1)

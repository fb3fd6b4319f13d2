"""How well the boundaries of the classes are met."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from seg_torch.errors import InputError
from seg_torch.labels import IGNORE_INDEX
from seg_torch.metrics.blocks import PixelCounts, ScoredBlock, count


class BoundaryScores(PixelCounts):
    """How well the boundaries of each class are met, over a whole dataset.

    *Boundary IoU*: the IoU of a class, of those of its pixels alone that lie within a width of its
    boundary: of the labels' boundary for the labels, of the prediction's for the prediction. A
    pixel does if the square of 2 * width + 1 pixels around it holds a pixel of another class or
    reaches beyond the image. Source: Cheng, Girshick, Dollár, Berg & Kirillov, Boundary IoU (2021),
    with the erosion by squares of their code; here over the pixels of all images together, as
    `scores` has the IoU.

    *Boundary F*: 2 P R / (P + R), where P is the share of the prediction's boundary pixels that
    have a boundary pixel of the same class in the labels within the width (as above, in a square),
    and R is the reverse. A boundary pixel of a class has a pixel of another among its eight
    neighbours. The edge of the image is no boundary here: both maps would always have it in common.
    Source: Csurka, Larlus & Perronnin, What is a good evaluation measure for semantic
    segmentation? (2013); here over the boundary pixels of all images together.

    Ignored pixels are no class: they are neither counted nor *another class* to the pixels around
    them, whatever is predicted there. So a pixel next to an ignored region is at a boundary only if
    a labelled pixel of another class is near, which may lie beyond the region. Labels that leave
    all boundaries unlabelled, such as VOC's, have no boundary pixels, thus no boundary F, whatever
    is predicted, but still a boundary IoU.

    Args:
        num_classes: Number of classes C.
        width: In pixels; `None` for 2 % of each image's diagonal, at least 1.

    Raises:
        InputError: The width is below 1.
    """

    def __init__(self, num_classes: int, width: int | None = None) -> None:
        super().__init__(7, num_classes)
        if width is not None and (not isinstance(width, int) or width < 1):
            raise InputError(
                f"boundary={width}: expected true for 2 % of the image's diagonal, or a width in "
                "pixels, 1 or more"
            )
        self.num_classes = num_classes
        self.width = width

    def update(self, block: ScoredBlock) -> None:
        """Count an image when its last block comes; on CUDA without waiting for the device."""
        if not block.is_last:
            return
        prediction, target = block.image_prediction, block.image_target
        height, width = target.shape
        reach = self.width or max(1, round(0.02 * math.hypot(height, width)))
        near_edge = torch.ones_like(target, dtype=torch.bool)
        near_edge[reach : height - reach, reach : width - reach] = False
        labelled = target != IGNORE_INDEX
        prediction = prediction.masked_fill(~labelled, IGNORE_INDEX)
        maps = (target, prediction)
        regions = [labelled & (near_edge | _near_another_class(ids, reach)) for ids in maps]
        lines = [labelled & _near_another_class(ids, 1) for ids in maps]
        both = regions[0] & regions[1] & (prediction == target)
        matched = [torch.zeros_like(labelled), torch.zeros_like(labelled)]
        for class_id in range(self.num_classes):
            of_class = [line & (ids == class_id) for line, ids in zip(lines, maps, strict=True)]
            if target.device.type == "cpu" and not (of_class[0].any() and of_class[1].any()):
                continue  # a GPU would have to be waited for
            for line, other, matches in zip(of_class, of_class[::-1], matched, strict=True):
                matches |= line & _maximum_within(other.byte(), reach).bool()
        chosen = zip((*regions, both, *lines, *matched), (*maps, target, *maps, *maps), strict=True)
        bins = [torch.where(mask, ids, self.num_classes).to(torch.int16) for mask, ids in chosen]
        counts = [count(each, self.num_classes + 1)[:-1] for each in bins]
        self.counts = self.counts + torch.stack(counts)

    def compute(self) -> dict[str, Tensor]:
        """Return `boundary_iou` and `boundary_f`, each float64 [C] on the CPU.

        In [0, 1], or nan: the IoU for a class in neither labels nor predictions, F for one without
        boundary pixels in the labels.
        """
        label_region, predicted_region, both, *of_lines = self.counts.cpu().double()
        label_line, predicted_line, label_matched, predicted_matched = of_lines
        precision, recall = predicted_matched / predicted_line, label_matched / label_line
        f = (2 * precision * recall / (precision + recall)).nan_to_num()  # nothing matches: 0
        return {
            "boundary_iou": both / (label_region + predicted_region - both),
            "boundary_f": torch.where(label_line > 0, f, math.nan),
        }


def _near_another_class(ids: Tensor, reach: int) -> Tensor:
    """Find pixels with a labelled one of another class in the square of 2 * reach + 1 around them.

    Args:
        ids: uint8 [H, W] of class ids and `IGNORE_INDEX`.
        reach: In pixels.

    Returns:
        bool [H, W]; whatever at ignored pixels.
    """
    upwards, downwards = ids + 1, IGNORE_INDEX - ids  # both 0 at ignored pixels: 255 + 1 overflows
    higher = _maximum_within(upwards, reach) != upwards
    return higher | (_maximum_within(downwards, reach) != downwards)


def _maximum_within(values: Tensor, reach: int) -> Tensor:
    """Return the maximum of uint8 [H, W] over the square of 2 * reach + 1 around each pixel."""
    for _ in range(2):
        values = F.pad(values, (reach, reach))
        covered = 1
        while covered < 2 * reach + 1:
            step = min(covered, 2 * reach + 1 - covered)
            values = torch.maximum(values[:, :-step], values[:, step:])
            covered += step
        values = values.T
    return values

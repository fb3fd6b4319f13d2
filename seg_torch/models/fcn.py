"""Fully convolutional network."""

from pathlib import Path

from torchvision.models import segmentation as tv

from seg_torch.errors import InputError
from seg_torch.models.weights import load_torchvision_weights

_BACKBONES = {
    "resnet50": (tv.fcn_resnet50, tv.FCN_ResNet50_Weights),
    "resnet101": (tv.fcn_resnet101, tv.FCN_ResNet101_Weights),
}


def fcn(
    num_classes: int,
    backbone: str = "resnet101",
    weights: str | Path | None = "COCO_WITH_VOC_LABELS_V1",
    aux: bool = True,
) -> tv.FCN:
    """Build torchvision's FCN with a dilated ResNet, output stride 8.

    Source: Long, Shelhamer & Darrell, Fully Convolutional Networks for Semantic Segmentation
    (2015).

    Args:
        num_classes: Number of classes C.
        backbone: `resnet50` or `resnet101`.
        weights: `COCO_WITH_VOC_LABELS_V1` (COCO images of the 21 Pascal VOC classes), the path of a
            state dict, or `None` for random ones. A last layer for another number of classes is
            new, and the skipped keys are logged.
        aux: Add an auxiliary head on the third stage, for training.

    Returns:
        Module: float [N, 3, H, W] -> {"out": logits [N, C, H, W], "aux": the same, if `aux`}.

    Raises:
        InputError: Unknown backbone or weights, or weights that cannot be had.
    """
    if backbone not in _BACKBONES:
        raise InputError(f"model.backbone is {backbone!r}; use one of {', '.join(_BACKBONES)}")
    builder, published = _BACKBONES[backbone]
    # weights_backbone: its default would be downloaded even with weights=None.
    model = builder(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=aux)
    if weights is not None:
        load_torchvision_weights(model, weights, published, ("classifier.4.", "aux_classifier."))
    return model

"""LR-ASPP."""

from pathlib import Path

from torchvision.models import segmentation as tv

from seg_torch.models.weights import load_torchvision_weights


def lraspp(num_classes: int, weights: str | Path | None = "COCO_WITH_VOC_LABELS_V1") -> tv.LRASPP:
    """Build torchvision's LR-ASPP with a dilated MobileNetV3-Large, output stride 16.

    Source: Howard, Sandler, Chu, Chen, Chen, Tan, Wang, Zhu, Pang, Vasudevan, Le & Adam, Searching
    for MobileNetV3 (2019).

    Args:
        num_classes: Number of classes C.
        weights: `COCO_WITH_VOC_LABELS_V1` (COCO images of the 21 Pascal VOC classes), the path of a
            state dict, or `None` for random ones. Last layers for another number of classes are
            new, and the skipped keys are logged.

    Returns:
        Module: float [N, 3, H, W] -> {"out": logits [N, C, H, W]}.

    Raises:
        InputError: Unknown weights, or weights that cannot be had.
    """
    # weights_backbone: its default would be downloaded even with weights=None.
    model = tv.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=num_classes
    )
    if weights is not None:
        load_torchvision_weights(
            model,
            weights,
            tv.LRASPP_MobileNet_V3_Large_Weights,
            ("classifier.low_classifier.", "classifier.high_classifier."),
        )
    return model

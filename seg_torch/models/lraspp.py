"""LR-ASPP."""

from pathlib import Path

from torch import Tensor, nn
from torchvision.models import get_model

from seg_torch.models.weights import load_torchvision_weights


class LRASPP(nn.Module):
    """torchvision's LR-ASPP, which leaves its logits at the stride of its features.

    Args:
        backbone: Float [N, 3, H, W] -> {"low": features of stride 8, "high": of stride 16}.
        classifier: These features -> logits [N, K, ceil(H/8), ceil(W/8)].
    """

    def __init__(self, backbone: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute logits.

        Args:
            x: Float [N, 3, H, W].

        Returns:
            `out`: float [N, K, ceil(H/8), ceil(W/8)].
        """
        return {"out": self.classifier(self.backbone(x))}


def lraspp(num_classes: int, weights: str | Path | None = "COCO_WITH_VOC_LABELS_V1") -> LRASPP:
    """Build torchvision's LR-ASPP with a dilated MobileNetV3-Large; logits at stride 8.

    Source: Howard, Sandler, Chu, Chen, Chen, Tan, Wang, Zhu, Pang, Vasudevan, Le & Adam, Searching
    for MobileNetV3 (2019).

    Args:
        num_classes: Number of classes K.
        weights: `COCO_WITH_VOC_LABELS_V1` (COCO images of the 21 Pascal VOC classes), the path of a
            state dict, or `None` for random ones. Last layers for another number of classes are
            new, and the skipped keys are logged.

    Returns:
        Module: float [N, 3, H, W] -> {"out": logits [N, K, ceil(H/8), ceil(W/8)]}.

    Raises:
        InputError: Unknown weights, or weights that cannot be loaded.
    """
    # weights_backbone: its default would be downloaded even with weights=None.
    name = "lraspp_mobilenet_v3_large"
    parts = get_model(name, weights_backbone=None, num_classes=num_classes)
    model = LRASPP(parts.backbone, parts.classifier)
    new_layers = ("classifier.low_classifier.", "classifier.high_classifier.")
    load_torchvision_weights(model, name, weights, new_layers)
    return model

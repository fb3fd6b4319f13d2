"""Fully convolutional network."""

from pathlib import Path

from torch import Tensor
from torchvision.models import get_model
from torchvision.models import segmentation as tv

from seg_torch.errors import check_choice
from seg_torch.models.weights import load_torchvision_weights

_BACKBONES = ("resnet50", "resnet101")


class FCN(tv.FCN):
    """torchvision's FCN, which leaves its logits at the stride of its features."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute logits.

        Args:
            x: Float [N, 3, H, W].

        Returns:
            `out`, and in training `aux` if there is an auxiliary head: float
            [N, K, ceil(H/8), ceil(W/8)].
        """
        features = self.backbone(x)
        outputs = {"out": self.classifier(features["out"])}
        if self.training and self.aux_classifier is not None:
            outputs["aux"] = self.aux_classifier(features["aux"])
        return outputs


def fcn(
    num_classes: int,
    backbone: str = "resnet101",
    weights: str | Path | None = "COCO_WITH_VOC_LABELS_V1",
    aux: bool = True,
) -> FCN:
    """Build torchvision's FCN with a dilated ResNet, output stride 8.

    Source: Long, Shelhamer & Darrell, Fully Convolutional Networks for Semantic Segmentation
    (2015).

    Args:
        num_classes: Number of classes K.
        backbone: `resnet50` or `resnet101`.
        weights: `COCO_WITH_VOC_LABELS_V1` (COCO images of the 21 Pascal VOC classes), the path of a
            state dict, or `None` for random ones. A last layer for another number of classes is
            new, and the skipped keys are logged.
        aux: Add an auxiliary head on the third stage, for training.

    Returns:
        Module: float [N, 3, H, W] -> {"out": logits [N, K, ceil(H/8), ceil(W/8)]}, and in
        training with `aux` the same again under "aux".

    Raises:
        InputError: Unknown backbone or weights, or weights that cannot be loaded.
    """
    check_choice("model.backbone", backbone, _BACKBONES)
    name = f"fcn_{backbone}"
    # weights_backbone: its default would be downloaded even with weights=None.
    parts = get_model(name, weights_backbone=None, num_classes=num_classes, aux_loss=aux)
    model = FCN(parts.backbone, parts.classifier, parts.aux_classifier)
    load_torchvision_weights(model, name, weights, ("classifier.4.", "aux_classifier."))
    return model

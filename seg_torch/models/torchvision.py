"""torchvision's FCN, DeepLabv3 and LR-ASPP, which here leave logits at the stride of features."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models import segmentation as tv

from seg_torch.errors import InputError, check_choice
from seg_torch.models.weights import load_torchvision_weights


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
    check_choice("model.backbone", backbone, ("resnet50", "resnet101"))
    name = f"fcn_{backbone}"
    # weights_backbone: its default would be downloaded even with weights=None.
    parts = get_model(name, weights_backbone=None, num_classes=num_classes, aux_loss=aux)
    model = FCN(parts.backbone, parts.classifier, parts.aux_classifier)
    load_torchvision_weights(model, name, weights, ("classifier.4.", "aux_classifier."))
    return model


class DeepLabV3(FCN):
    """torchvision's DeepLabv3, which leaves its logits at the stride of its features."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute logits.

        Args:
            x: Float [N, 3, H, W].

        Returns:
            `out`, and in training `aux` if there is an auxiliary head: float [N, K, h, w], each at
            the stride of its features.

        Raises:
            InputError: In training, N is 1.
        """
        pooled_norm = self.classifier[0].convs[-1][2]
        # One image pools to one value per channel, which has no variance. SyncBatchNorm takes the
        # variance over the images of all processes.
        alone = pooled_norm.training and not isinstance(pooled_norm, nn.SyncBatchNorm)
        if alone and len(x) == 1:  # in this order: an exported graph takes any number of images
            raise InputError(
                "DeepLabv3 cannot train on a batch of one image: its image pooling normalises over "
                "the batch; use data.batch_size=2 or more"
            )
        return super().forward(x)


def deeplabv3(
    num_classes: int,
    backbone: str = "resnet101",
    weights: str | Path | None = "COCO_WITH_VOC_LABELS_V1",
    aux: bool = True,
    atrous_rates: Sequence[int] = (12, 24, 36),
) -> DeepLabV3:
    """Build torchvision's DeepLabv3; output stride 8 with a ResNet, 16 with a MobileNet.

    Source: Chen, Papandreou, Schroff & Adam, Rethinking Atrous Convolution for Semantic Image
    Segmentation (2017).

    Args:
        num_classes: Number of classes K.
        backbone: `resnet50`, `resnet101` or `mobilenet_v3_large`.
        weights: `COCO_WITH_VOC_LABELS_V1` (COCO images of the 21 Pascal VOC classes), `imagenet`
            (the backbone's alone, IMAGENET1K_V1), the path of a state dict, or `None` for random
            ones. A last layer for another number of classes is new, and the skipped keys are
            logged.
        aux: Add an auxiliary head on an earlier stage, for training.
        atrous_rates: Of the three 3x3 convolutions of the pyramid; the published weights were
            trained with the default, which the paper gives for output stride 8.

    Returns:
        Module: float [N, 3, H, W] -> {"out": logits [N, K, ceil(H/8), ceil(W/8)]}, with a MobileNet
        ceil(H/16) and ceil(W/16); in training with `aux` more logits under "aux", of stride 8.

    Raises:
        InputError: Unknown backbone or weights, or weights that cannot be loaded.
    """
    check_choice("model.backbone", backbone, ("resnet50", "resnet101", "mobilenet_v3_large"))
    name = f"deeplabv3_{backbone}"
    # weights_backbone: its default would be downloaded even with weights=None.
    parts = get_model(name, weights_backbone=None, num_classes=num_classes, aux_loss=aux)
    in_channels = parts.classifier[0].convs[0][0].in_channels
    classifier = tv.deeplabv3.DeepLabHead(in_channels, num_classes, atrous_rates)
    model = DeepLabV3(parts.backbone, classifier, parts.aux_classifier)
    if weights == "imagenet":
        load_torchvision_weights(model.backbone, backbone, "IMAGENET1K_V1", ())
    else:
        load_torchvision_weights(model, name, weights, ("classifier.4.", "aux_classifier."))
    return model


class LRASPP(FCN):
    """torchvision's LR-ASPP, which leaves its logits at the stride of its features.

    Args:
        backbone: Float [N, 3, H, W] -> {"low": features of stride 8, "high": of stride 16}.
        classifier: These features -> logits [N, K, ceil(H/8), ceil(W/8)].
    """

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

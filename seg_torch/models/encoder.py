"""What models with an encoder of timm have in common."""

from typing import Any, cast

from torch import nn


class EncoderModel(nn.Module):
    """A model with an encoder of timm, frozen or not.

    Args:
        encoder: With timm's `pretrained_cfg`.
        freeze_encoder: Keep the encoder's parameters and BatchNorm statistics as they are.

    Attributes:
        mean: Channel means of the images that the encoder was trained with, scaled to [0, 1].
        std: Their standard deviations.
    """

    def __init__(self, encoder: nn.Module, freeze_encoder: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.mean, self.std = image_statistics(encoder)
        self.freeze_encoder = freeze_encoder
        encoder.requires_grad_(not freeze_encoder)
        self.train()

    def train(self, mode: bool = True) -> "EncoderModel":
        """Set training mode, except for the statistics of a frozen encoder."""
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self


def image_statistics(encoder: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the images that a timm model was trained with.

    Of each channel, for images scaled to [0, 1].
    """
    pretrained_cfg = cast(dict[str, Any], encoder.pretrained_cfg)
    return tuple(pretrained_cfg["mean"]), tuple(pretrained_cfg["std"])

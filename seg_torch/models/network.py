"""The one place where images become what a model expects, and its answer becomes logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Network(nn.Module):
    """A model with its preprocessing, so that training, evaluation and prediction cannot disagree.

    Args:
        model: float [N, 3, H, W] -> {"out": logits [N, C, H, W], "aux": ...} or the logits alone.
        mean: of the channels of the model's input, for images scaled to [0, 1]; by default what
            the model says its weights were trained with (``model.mean``), else ImageNet's.
        std: standard deviation, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)  # faster on CPU and GPU alike
        mean = getattr(model, "mean", IMAGENET_MEAN) if mean is None else mean
        std = getattr(model, "std", IMAGENET_STD) if std is None else std
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images uint8 [N, 3, H, W] -> {"out": logits [N, C, H, W], "aux": ... if there is one}."""
        x = images.to(self.mean.dtype).div(255).sub(self.mean).div(self.std)
        out = self.model(x.contiguous(memory_format=torch.channels_last))
        return {"out": out} if isinstance(out, Tensor) else out

    def logits(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """Images uint8 [N, 3, H, W] -> logits float32 [N, C, *size].

        Logits are brought to the size of the labels before anything is decided (argmax): deciding
        first and enlarging class ids loses accuracy at every boundary.
        """
        logits = self(images)["out"].float()
        if logits.shape[-2:] == tuple(size):
            return logits
        return nn.functional.interpolate(logits, list(size), mode="bilinear", align_corners=False)

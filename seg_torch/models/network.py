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
            the model says its weights were trained with (`model.mean`), else ImageNet's.
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
        logits = self(images)["out"]
        return enlarge_rows(logits, size, 0, size[0]).float()


def enlarge_rows(logits: Tensor, size: Sequence[int], top: int, bottom: int) -> Tensor:
    """Rows `top` to `bottom` of what logits become at another size, bilinearly.

    The rows are the same numbers, to the last bit, whichever others are computed with them. So a
    picture can be decided band by band: at its full size the logits of all classes may not fit
    into memory.

    Args:
        logits: [N, C, h, w] of any floating type.
        size: (height, width) of the whole result.
        top: first row.
        bottom: the row after the last.

    Returns:
        [N, C, bottom - top, width], float32; of the type of `logits` if their size stays the same.
    """
    x = logits.movedim(1, -1)  # the memory order of channels_last
    x = _resample(x, 1, size[0], top, bottom)
    x = _resample(x, 2, size[1], 0, size[1])
    return x.movedim(-1, 1)


def _resample(x: Tensor, dim: int, size: int, start: int, stop: int) -> Tensor:
    """`interpolate` (linear, align_corners=False) along one dimension, `start` to `stop`.

    The kernels of `interpolate` itself round differently from one band to the next.
    """
    length = x.shape[dim]
    if length == size:
        return x.narrow(dim, start, stop - start)
    centres = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * (length / size) - 0.5
    centres = centres.clamp(min=0)
    before = centres.long()
    after = (before + 1).clamp(max=length - 1)
    weight = (centres - before).float().to(x.device).view(-1, *[1] * (x.dim() - dim - 1))
    near = x.index_select(dim, before.to(x.device)).float().mul_(1 - weight)
    return near.add_(x.index_select(dim, after.to(x.device)).float().mul_(weight))

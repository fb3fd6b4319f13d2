"""Models: one file per family, plain modules with forward(x) -> {"out": logits, ...}."""

from seg_torch.models.deeplabv3 import deeplabv3
from seg_torch.models.fcn import fcn
from seg_torch.models.unet import UNet, unet

__all__ = ["UNet", "deeplabv3", "fcn", "unet"]

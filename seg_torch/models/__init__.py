"""Models: one file per family, plain modules with forward(x) -> {"out": logits, ...}."""

from seg_torch.models.deeplabv3 import deeplabv3
from seg_torch.models.fcn import fcn
from seg_torch.models.hrnet import hrnet
from seg_torch.models.lraspp import lraspp
from seg_torch.models.smp import smp
from seg_torch.models.transformers import transformers
from seg_torch.models.unet import UNet, unet
from seg_torch.models.unet_transposed import unet_transposed

__all__ = [
    "UNet",
    "deeplabv3",
    "fcn",
    "hrnet",
    "lraspp",
    "smp",
    "transformers",
    "unet",
    "unet_transposed",
]

"""Models: one file per family, plain modules with forward(x) -> {"out": logits, ...}."""

from seg_torch.models.hrnet import hrnet as hrnet
from seg_torch.models.smp import smp as smp
from seg_torch.models.torchvision import deeplabv3 as deeplabv3
from seg_torch.models.torchvision import fcn as fcn
from seg_torch.models.torchvision import lraspp as lraspp
from seg_torch.models.transformers import transformers as transformers
from seg_torch.models.unet import UNet as UNet
from seg_torch.models.unet import unet as unet
from seg_torch.models.unet_transposed import unet_transposed as unet_transposed
from seg_torch.models.vit import ViT as ViT
from seg_torch.models.vit import vit as vit

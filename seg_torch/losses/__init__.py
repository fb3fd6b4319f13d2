"""Losses: plain modules that turn logits and a label map of the same size into a scalar.

Every loss here leaves pixels labelled `IGNORE_INDEX` out exactly (their logits get zero gradient),
returns a finite zero with zero gradients when every pixel is ignored, and computes in float32
whatever type the model ran in. None of them makes the CPU wait for a GPU.
"""

from seg_torch.losses.base import SegmentationLoss as SegmentationLoss
from seg_torch.losses.base import WeightedSum as WeightedSum
from seg_torch.losses.boundary import BoundaryLoss as BoundaryLoss
from seg_torch.losses.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from seg_torch.losses.cross_entropy import FocalLoss as FocalLoss
from seg_torch.losses.cross_entropy import ModelLoss as ModelLoss
from seg_torch.losses.cross_entropy import OhemCrossEntropyLoss as OhemCrossEntropyLoss
from seg_torch.losses.cross_entropy import class_weights as class_weights
from seg_torch.losses.dice import DiceLoss as DiceLoss
from seg_torch.losses.dice import TverskyLoss as TverskyLoss
from seg_torch.losses.lovasz import LovaszSoftmaxLoss as LovaszSoftmaxLoss
from seg_torch.losses.upsampled import upsampled_loss as upsampled_loss

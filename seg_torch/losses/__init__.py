"""Losses of logits and class ids: exact where pixels are ignored, and for several processes."""

from seg_torch.losses.base import CPU_DISTANCES as CPU_DISTANCES
from seg_torch.losses.base import GPU_DISTANCES as GPU_DISTANCES
from seg_torch.losses.base import BoundaryLoss as BoundaryLoss
from seg_torch.losses.base import CrossEntropyLoss as CrossEntropyLoss
from seg_torch.losses.base import DiceLoss as DiceLoss
from seg_torch.losses.base import FocalLoss as FocalLoss
from seg_torch.losses.base import LovaszSoftmaxLoss as LovaszSoftmaxLoss
from seg_torch.losses.base import OhemCrossEntropyLoss as OhemCrossEntropyLoss
from seg_torch.losses.base import OwnLoss as OwnLoss
from seg_torch.losses.base import SegmentationLoss as SegmentationLoss
from seg_torch.losses.base import Sums as Sums
from seg_torch.losses.base import TverskyLoss as TverskyLoss
from seg_torch.losses.base import WeightedSum as WeightedSum
from seg_torch.losses.base import check_labels as check_labels
from seg_torch.losses.base import class_weights as class_weights
from seg_torch.losses.base import mean_over_processes as mean_over_processes

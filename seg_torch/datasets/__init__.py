"""One function per dataset: `name(root, split) -> SegmentationDataset`; `eightfold` wraps one."""

from seg_torch.datasets.ade20k import ade20k
from seg_torch.datasets.base import Pair, SegmentationDataset
from seg_torch.datasets.camvid import camvid
from seg_torch.datasets.camvid32 import camvid32
from seg_torch.datasets.cityscapes import cityscapes
from seg_torch.datasets.clothing import clothing
from seg_torch.datasets.coco_stuff import coco_stuff
from seg_torch.datasets.eightfold import EightFold, eightfold
from seg_torch.datasets.folder import folder, write_folder
from seg_torch.datasets.pet import pet
from seg_torch.datasets.shapes import shapes
from seg_torch.datasets.voc import voc, voc_sbd

__all__ = [
    "EightFold",
    "Pair",
    "SegmentationDataset",
    "ade20k",
    "camvid",
    "camvid32",
    "cityscapes",
    "clothing",
    "coco_stuff",
    "eightfold",
    "folder",
    "pet",
    "shapes",
    "voc",
    "voc_sbd",
    "write_folder",
]

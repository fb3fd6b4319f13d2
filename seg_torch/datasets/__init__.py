"""One function per dataset: `name(root, split) -> SegmentationDataset`; `eightfold` wraps one."""

from seg_torch.datasets.ade20k import ade20k as ade20k
from seg_torch.datasets.base import Pair as Pair
from seg_torch.datasets.base import SegmentationDataset as SegmentationDataset
from seg_torch.datasets.camvid import camvid as camvid
from seg_torch.datasets.camvid32 import camvid32 as camvid32
from seg_torch.datasets.cityscapes import cityscapes as cityscapes
from seg_torch.datasets.clothing import clothing as clothing
from seg_torch.datasets.coco_stuff import coco_stuff as coco_stuff
from seg_torch.datasets.eightfold import EightFold as EightFold
from seg_torch.datasets.eightfold import eightfold as eightfold
from seg_torch.datasets.folder import folder as folder
from seg_torch.datasets.folder import write_folder as write_folder
from seg_torch.datasets.pet import pet as pet
from seg_torch.datasets.shapes import shapes as shapes
from seg_torch.datasets.voc import voc as voc
from seg_torch.datasets.voc import voc_sbd as voc_sbd

"""One function per dataset: `name(root, split) -> SegmentationDataset`; `eightfold` wraps one."""

from seg_torch.datasets.ade20k import ade20k as ade20k
from seg_torch.datasets.auto import auto as auto
from seg_torch.datasets.base import Pair as Pair
from seg_torch.datasets.base import SegmentationDataset as SegmentationDataset
from seg_torch.datasets.camvid import camvid as camvid
from seg_torch.datasets.camvid32 import camvid32 as camvid32
from seg_torch.datasets.cityscapes import cityscapes as cityscapes
from seg_torch.datasets.clothing import clothing as clothing
from seg_torch.datasets.coco import coco as coco
from seg_torch.datasets.coco import coco_panoptic as coco_panoptic
from seg_torch.datasets.coco_stuff import coco_stuff as coco_stuff
from seg_torch.datasets.eightfold import EightFold as EightFold
from seg_torch.datasets.eightfold import eightfold as eightfold
from seg_torch.datasets.folder import folder as folder
from seg_torch.datasets.folder import write_folder as write_folder
from seg_torch.datasets.hf import hf as hf
from seg_torch.datasets.label_studio import label_studio as label_studio
from seg_torch.datasets.labelme import labelme as labelme
from seg_torch.datasets.pet import pet as pet
from seg_torch.datasets.roboflow import roboflow as roboflow
from seg_torch.datasets.shapes import shapes as shapes
from seg_torch.datasets.voc import voc as voc
from seg_torch.datasets.voc import voc_sbd as voc_sbd
from seg_torch.datasets.voc_style import cvat as cvat
from seg_torch.datasets.voc_style import labelme_voc as labelme_voc
from seg_torch.datasets.yolo import yolo as yolo

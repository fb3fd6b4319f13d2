"""One function per dataset: `name(root, split) -> SegmentationDataset`; `eightfold` wraps one."""

from seg_torch.datasets.annotations.coco import coco as coco
from seg_torch.datasets.annotations.coco import coco_panoptic as coco_panoptic
from seg_torch.datasets.annotations.label_studio import label_studio as label_studio
from seg_torch.datasets.annotations.labelme import labelme as labelme
from seg_torch.datasets.annotations.masks import cvat as cvat
from seg_torch.datasets.annotations.masks import labelme_voc as labelme_voc
from seg_torch.datasets.annotations.masks import roboflow as roboflow
from seg_torch.datasets.annotations.yolo import yolo as yolo
from seg_torch.datasets.auto import auto as auto
from seg_torch.datasets.base import Pair as Pair
from seg_torch.datasets.base import SegmentationDataset as SegmentationDataset
from seg_torch.datasets.eightfold import EightFold as EightFold
from seg_torch.datasets.eightfold import eightfold as eightfold
from seg_torch.datasets.folder import folder as folder
from seg_torch.datasets.folder import write_folder as write_folder
from seg_torch.datasets.hub import hf as hf
from seg_torch.datasets.published.ade20k import ade20k as ade20k
from seg_torch.datasets.published.camvid import camvid as camvid
from seg_torch.datasets.published.camvid32 import camvid32 as camvid32
from seg_torch.datasets.published.cityscapes import cityscapes as cityscapes
from seg_torch.datasets.published.clothing import clothing as clothing
from seg_torch.datasets.published.coco_stuff import coco_stuff as coco_stuff
from seg_torch.datasets.published.pet import pet as pet
from seg_torch.datasets.published.voc import voc as voc
from seg_torch.datasets.published.voc import voc_sbd as voc_sbd
from seg_torch.datasets.shapes import shapes as shapes

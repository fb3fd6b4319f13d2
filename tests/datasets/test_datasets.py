"""A battery over every dataset on its tiny copy (make_data.py)."""

from __future__ import annotations

import logging
import pickle
import shutil

import numpy as np
import pytest
import torch
from tiny_copies import TinyCopies
from torchvision import tv_tensors

from seg_torch import datasets
from seg_torch.data.check import check
from seg_torch.errors import InputError

ON_DISK = [
    "ade20k",
    "auto",
    "camvid",
    "camvid32",
    "cityscapes",
    "clothing",
    "coco",
    "coco_panoptic",
    "coco_stuff",
    "cvat",
    "folder",
    "label_studio",
    "labelme",
    "labelme_voc",
    "pet",
    "roboflow",
    "voc",
    "voc_sbd",
    "yolo",
]


# dataset: classes, and items in train, val and test of the tiny copy
FACTS = {
    "ade20k": (150, 3, 2, 2),
    "auto": (3, 4, 2, 2),
    "camvid": (11, 4, 3, 3),
    "camvid32": (32, 2, 1, 2),
    "cityscapes": (19, 3, 2, 2),
    "clothing": (59, 4, 2, 2),
    "coco": (3, 4, 2, 2),
    "coco_panoptic": (2, 4, 2, 2),
    "coco_stuff": (171, 3, 2, 2),
    "cvat": (3, 4, 1, 1),
    "folder": (3, 8, 2, 2),
    "label_studio": (4, 4, 1, 1),
    "labelme": (5, 5, 1, 1),
    "labelme_voc": (3, 4, 1, 1),
    "pet": (3, 4, 3, 3),
    "roboflow": (3, 3, 2, 1),
    "voc": (21, 4, 5, 5),
    "voc_sbd": (21, 7, 5, 5),
    "yolo": (3, 3, 2, 2),
    "shapes": (6, 1000, 100, 100),
}


pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder with the tiny copy of each dataset, by name."""
    return TinyCopies(tmp_path_factory)


@pytest.fixture
def build(copies):
    """build(name, split): the dataset."""
    return copies.build


@pytest.mark.parametrize("name", FACTS)
def test_items_are_8_bit_images_with_masks_of_the_same_size(build, name):
    image, mask = build(name, "train")[0]
    assert isinstance(image, tv_tensors.Image)
    assert isinstance(mask, tv_tensors.Mask)
    assert image.dtype == mask.dtype == torch.uint8
    assert image.shape == (3, *mask.shape)


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_masks_hold_class_ids_and_255_only(build, name, split):
    dataset = build(name, split)
    for i in range(min(len(dataset), 10)):
        assert set(np.unique(dataset.mask(i))) <= {*range(len(dataset.labels)), 255}


@pytest.mark.parametrize("name", FACTS)
def test_the_mask_alone_is_the_mask_of_the_item(build, name):
    dataset = build(name, "val")
    for i in range(min(len(dataset), 10)):
        mask = dataset.mask(i)
        assert mask.dtype == np.uint8
        assert (mask == dataset[i][1].numpy()).all()


@pytest.mark.parametrize("name", FACTS)
def test_number_of_classes_and_of_items(build, name):
    lengths = [len(build(name, split)) for split in ("train", "val", "test")]
    assert (len(build(name, "val").labels), *lengths) == FACTS[name]


@pytest.mark.parametrize("name", FACTS)
def test_every_class_has_one_name_and_one_colour(build, name):
    labels = build(name, "train").labels
    assert len(set(labels.names)) == len(labels.names) == len(labels.palette)
    assert all(each == each.strip() != "" for each in labels.names)
    assert len({tuple(colour) for colour in labels.palette}) == len(labels)


@pytest.mark.parametrize("name", FACTS)
def test_a_worker_process_gets_the_same_items(build, name):
    dataset = build(name, "train")
    copy = pickle.loads(pickle.dumps(dataset))
    for original, copied in zip(dataset[1], copy[1], strict=True):
        assert torch.equal(original, copied)


@pytest.mark.parametrize("name", FACTS)
def test_train_and_val_share_no_image(build, name):
    if name == "shapes":
        train, val = ({d[i][0].sum().item() for i in range(20)} for d in _splits(build, name))
    else:
        train, val = ({pair.image for pair in d.pairs} for d in _splits(build, name))
    assert not train & val


def _splits(build, name):
    return build(name, "train"), build(name, "val")


@pytest.mark.parametrize("name", FACTS)
def test_an_unknown_split_is_refused_with_the_known_ones(build, name):
    with pytest.raises(InputError, match=r"'validation'.*train, val, test"):
        build(name, "validation")


@pytest.mark.parametrize("name", ON_DISK)
def test_a_missing_root_says_where_it_looked_and_what_to_do(tmp_path, name):
    with pytest.raises(InputError) as error:
        getattr(datasets, name)(tmp_path / "nowhere", "train")
    assert str(tmp_path / "nowhere") in str(error.value)
    assert "no such folder" in str(error.value)
    assert "data.root=" in str(error.value)
    assert "To get it: " in str(error.value)


@pytest.mark.parametrize("name", ON_DISK)
def test_an_empty_root_is_called_empty(tmp_path, name):
    with pytest.raises(InputError, match="the folder is empty"):
        getattr(datasets, name)(tmp_path, "val")


def test_an_incomplete_root_says_what_is_missing(copies, tmp_path):
    shutil.copytree(copies["voc"], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass")
    with pytest.raises(
        InputError, match=r"it holds VOCdevkit.\n.*; missing: \S*SegmentationClass\.\n"
    ):
        datasets.voc(tmp_path, "train")


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "clothing", "coco_stuff", "pet", "voc"])
def test_val_in_place_of_test_is_said(build, name, caplog):
    with caplog.at_level(logging.INFO, "seg_torch"):
        test = build(name, "test")
    assert [pair.name for pair in test.pairs] == [pair.name for pair in build(name, "val").pairs]
    assert "the test split is val" in caplog.text


@pytest.mark.promise(21)
@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "clothing", "coco_stuff", "pet", "voc"])
def test_a_mask_without_its_image_is_named(copies, tmp_path, name):
    root = tmp_path / name
    shutil.copytree(copies[name], root)
    image = getattr(datasets, name)(root, "train").pairs[0].image
    image.unlink()
    with pytest.raises(InputError, match=f"1 files are missing(.|\n)*{image.name}"):
        getattr(datasets, name)(root, "train")


@pytest.mark.parametrize("name", ON_DISK)
def test_d12_every_dataset_passes_and_its_pixels_are_counted(build, name):
    train = build(name, "train")
    expected = sum(np.bincount(train.mask(i).ravel(), minlength=256) for i in range(len(train)))
    assert (check(train).pixels == expected).all()
    assert (check(train).pixels == expected).all(), "as remembered"

"""Oxford-IIIT Pet, Cityscapes, ADE20K, COCO-Stuff."""

from __future__ import annotations

import shutil

import make_data
import numpy as np
import pytest
from PIL import Image
from tiny_copies import TinyCopies

from seg_torch import datasets
from seg_torch.datasets.published.ade20k import ADE20K_LABELS
from seg_torch.datasets.published.cityscapes import CITYSCAPES_LABELS, to_label_ids, to_train_ids
from seg_torch.datasets.published.coco_stuff import COCO_STUFF_LABELS
from seg_torch.errors import InputError


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder with the tiny copy of each dataset, by name."""
    return TinyCopies(tmp_path_factory)


@pytest.fixture
def build(copies):
    """build(name, split): the dataset."""
    return copies.build


def test_trimaps_count_from_0(copies, build):
    trimaps = copies["pet"] / "oxford-iiit-pet" / "annotations" / "trimaps"
    stored = np.asarray(Image.open(trimaps / "Abyssinian_1.png"))
    assert (build("pet", "train").mask(0) == stored - 1).all()
    assert build("pet", "train").labels.names == ("pet", "background", "outline")


@pytest.mark.parametrize("value", [0, 4, 255])
def test_a_trimap_with_another_value_is_refused(copies, tmp_path, value):
    shutil.copytree(copies["pet"], tmp_path, dirs_exist_ok=True)
    dataset = datasets.pet(tmp_path, "val")
    make_data.save(make_data.blocks(0, [1, value], void=None), dataset.pairs[0].mask)
    with pytest.raises(InputError, match=rf"{sorted([1, value])[1]}\].*\[1, 2, 3\]"):
        dataset.mask(0)


# From the table in the Cityscapes scripts (labels.py): label id -> train id, -1 for void.
TRAIN_IDS = {
    **dict.fromkeys([-1, 0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30], 255),
    **{7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11},
    **{25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18},
}


def test_cityscapes_ids_go_to_train_ids():
    ids = np.array(sorted(TRAIN_IDS))
    assert len(ids) == 35
    assert to_train_ids(ids).tolist() == [TRAIN_IDS[i] for i in ids.tolist()]


def test_cityscapes_train_ids_go_back():
    back = to_label_ids(np.array([*range(19), 255], np.uint8))
    assert to_train_ids(back).tolist() == [*range(19), 255]
    assert back[-1] == 0


@pytest.mark.parametrize(("convert", "value"), [(to_train_ids, 34), (to_label_ids, 19)])
def test_cityscapes_ids_out_of_range_are_refused(convert, value):
    with pytest.raises(InputError, match=f"not Cityscapes ids.*{value}"):
        convert(np.array([[7, value]]))


def test_cityscapes_masks_are_the_train_ids_of_the_file(build):
    dataset = build("cityscapes", "val")
    stored = np.asarray(Image.open(dataset.pairs[0].mask))
    expected = np.array([TRAIN_IDS[i] for i in stored.ravel().tolist()]).reshape(stored.shape)
    assert (dataset.mask(0) == expected).all()
    assert dataset.pairs[0].name == "lindau/lindau_000000_000019"
    assert CITYSCAPES_LABELS.names[13] == "car"


def test_ade20k_counts_from_1_and_0_is_void(build):
    dataset = build("ade20k", "train")
    stored = np.asarray(Image.open(dataset.pairs[0].mask)).astype(int)
    assert {0, 1, 2, 75} <= set(np.unique(stored))
    assert (dataset.mask(0) == np.where(stored == 0, 255, stored - 1)).all()
    names = ADE20K_LABELS.names
    assert (names[0], names[12], names[74], names[149]) == ("wall", "person", "computer", "flag")


def test_coco_stuff_closes_the_gaps_of_the_category_ids(build):
    # Categories 1 person, 11 fire hydrant, 13 stop sign, 90 toothbrush, 92 banner, 182 wood; the
    # numbers 12, 26, 29, 30, 45, 66, 68, 69, 71, 83 and 91 are not used. A pixel is one less.
    dataset = build("coco_stuff", "train")
    names = COCO_STUFF_LABELS.names
    expected = {0: "person", 10: "fire hydrant", 12: "stop sign", 89: "toothbrush", 91: "banner"}
    found = {}
    for i in range(len(dataset)):
        stored, mask = np.asarray(Image.open(dataset.pairs[i].mask)), dataset.mask(i)
        assert ((stored == 255) == (mask == 255)).all()
        found |= {int(v): names[mask[stored == v][0]] for v in np.unique(stored) if v != 255}
    assert found == expected | {181: "wood"}
    assert names.index("toothbrush") == 79


def test_a_coco_stuff_value_in_a_gap_is_refused(copies, tmp_path):
    shutil.copytree(copies["coco_stuff"], tmp_path, dirs_exist_ok=True)
    dataset = datasets.coco_stuff(tmp_path, "val")
    make_data.save(make_data.blocks(0, [0, 11]), dataset.pairs[0].mask)  # 12, street sign
    with pytest.raises(InputError, match=r"mask values \[0, 11, 255\]"):
        dataset.mask(0)


def test_coco_stuff_maps_may_lie_in_annotations(copies, tmp_path):
    shutil.copytree(copies["coco_stuff"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "stuffthingmaps").rename(tmp_path / "annotations")
    assert len(datasets.coco_stuff(tmp_path, "val")) == 2

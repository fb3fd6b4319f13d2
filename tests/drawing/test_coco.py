"""COCO annotations, read back by pycocotools."""

import json

import numpy as np
import pytest
from pycocotools.coco import COCO

from seg_torch.drawing.regions import write_coco
from seg_torch.labels import Labels
from seg_torch.prediction.segmentation import Segmentation

RING = np.zeros((20, 30), np.uint8)
RING[3:17, 4:24] = 1
RING[6:12, 8:14] = 0  # a hole
RING[8:10, 10:12] = 1  # with an island
RING[6:12, 17:20] = 255  # and what belongs to no class
NOISE = np.random.default_rng(0).integers(0, 7, (60, 91)).astype(np.uint8)
NOISE[NOISE == 6] = 255
ONE_CLASS = np.ones((5, 5), np.uint8)
NOTHING = np.full((4, 6), 255, np.uint8)


def test_pycocotools_gives_the_masks_back_with_holes_and_islands(tmp_path):
    """Of several images in one file; area and bounding box are counted here."""
    masks = {"ring": RING, "noise": NOISE, "one class": ONE_CLASS, "nothing": NOTHING}
    labels = Labels(tuple("abcdef"))
    entries = [
        (name, mask.shape[1], mask.shape[0], Segmentation(mask, labels, mask).coco())
        for name, mask in masks.items()
    ]
    write_coco(str(tmp_path / "all.json"), entries, labels)
    dataset = COCO(tmp_path / "all.json")
    assert [c["name"] for c in dataset.loadCats(range(6))] == list("abcdef")
    for image, (name, mask) in zip(dataset.dataset["images"], masks.items(), strict=True):
        assert image["file_name"] == name
        annotations = dataset.imgToAnns[image["id"]]
        assert [a["category_id"] for a in annotations] == np.setdiff1d(mask, [255]).tolist()
        for annotation in annotations:
            inside = mask == annotation["category_id"]
            assert np.array_equal(dataset.annToMask(annotation), inside)
            assert annotation["area"] == inside.sum()
            rows, columns = np.nonzero(inside)
            x, y, width, height = annotation["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
            assert annotation["iscrowd"] == 0


@pytest.mark.parametrize("name", ["a", "straße/木"])
def test_a_saved_file_is_a_coco_dataset_of_one_image(tmp_path, name):
    labels = Labels(("dark", "bright"))
    Segmentation(RING, labels, np.zeros((20, 30, 3), np.uint8)).save(tmp_path, name, ["coco"])
    content = json.loads((tmp_path / f"coco/{name}.json").read_text(encoding="utf-8"))
    assert content["categories"] == [{"id": 0, "name": "dark"}, {"id": 1, "name": "bright"}]
    assert content["images"] == [{"id": 1, "file_name": name, "width": 30, "height": 20}]
    assert [(a["id"], a["image_id"]) for a in content["annotations"]] == [(1, 1), (2, 1)]

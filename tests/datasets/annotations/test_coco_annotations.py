"""COCO's JSON, and COCO panoptic."""

from __future__ import annotations

from functools import partial

import make_data
import numpy as np
import pytest
from annotation_copies import (
    HEIGHT,
    WIDTH,
    all_masks,
    edit,
    tiny_copy,
)
from pycocotools import mask as rle
from pycocotools.coco import COCO

from seg_torch import datasets
from seg_torch.data.inspection import inspect_dataset
from seg_torch.drawing.regions import coco_annotations, write_coco
from seg_torch.errors import InputError
from seg_torch.labels import Labels

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture
def make(tmp_path):
    """make(name): a folder with the tiny copy of a format, to be broken by the test."""
    return partial(tiny_copy, tmp_path)


def test_coco_masks_are_those_of_its_own_api_with_the_smaller_object_on_top(make):
    root = make("coco")
    dataset = datasets.coco(root, "train")
    assert dataset.labels.names == ("background", "car", "traffic light")
    api = COCO(str(root / "annotations" / "instances_train2017.json"))
    for i, pair in enumerate(dataset.pairs):
        (number,) = (n for n, im in api.imgs.items() if im["file_name"] == pair.image.name)
        expected = np.zeros((HEIGHT, WIDTH), np.uint8)
        objects = api.loadAnns(api.getAnnIds(number))
        for each in sorted(objects, key=lambda a: (-a["iscrowd"], -int(rle.area(api.annToRLE(a))))):
            expected[api.annToMask(each) == 1] = {3: 1, 7: 2}[each["category_id"]]
        assert (dataset.mask(i) == expected).all()


def test_coco_run_lengths_may_have_holes(make):
    mask = datasets.coco(make("coco"), "train").mask(0)
    assert (mask[0:7, 50:57] == 2).sum() == 49 - 9
    assert not mask[2:5, 52:55].any()
    assert (mask[40:44, 2:8] == 1).all()


def test_a_coco_crowd_lies_below_larger_objects_and_a_missing_area_is_counted(make):
    root = make("coco")

    def change(content):
        crowd = {"size": [HEIGHT, WIDTH], "counts": [0, 48 * 10, 48 * 54]}  # ten columns
        square = [[0, 0, 40, 0, 40, 40, 0, 40]]
        content["annotations"] = [
            {"id": 1, "image_id": 100, "category_id": 3, "segmentation": square},
            {"id": 2, "image_id": 100, "category_id": 7, "segmentation": crowd, "iscrowd": 1},
            {"id": 3, "image_id": 100, "category_id": 7, "segmentation": [[1, 1, 5, 1, 5, 5]]},
        ]

    edit(root / "annotations" / "instances_train2017.json", change)
    mask = datasets.coco(root, "train").mask(0)
    assert mask[20, 5] == 1
    assert mask[45, 5] == 2
    assert mask[2, 4] == 2


def test_coco_parts_of_one_object_are_filled_together(make):
    root = make("coco")

    def change(content):
        parts = [[1, 1, 9, 1, 9, 9, 1, 9], [20, 20, 29, 20, 29, 29, 20, 29]]
        content["annotations"] = [{**content["annotations"][1], "segmentation": parts}]

    edit(root / "annotations" / "instances_train2017.json", change)
    mask = datasets.coco(root, "train").mask(0)
    assert mask[5, 5] == mask[25, 25] == 1
    assert mask[15, 15] == 0


@pytest.mark.parametrize("layout", ["cvat", "roboflow", "one"])
def test_coco_is_read_in_the_layouts_of_the_tools(tmp_path, layout):
    names = [f"photo_{i}.jpg" for i in range(6)]
    if layout == "roboflow":
        for split, part in (("train", names[:3]), ("valid", names[3:5]), ("test", names[5:])):
            content = make_data.coco_content(part)
            # The project itself, as Roboflow has it.
            content["categories"] += [{"id": 0, "name": "vehicle", "supercategory": "none"}]
            make_data.write_json(tmp_path / split / "_annotations.coco.json", content)
            for i, name in enumerate(part):
                make_data.save(make_data.picture(i), tmp_path / split / name)
        expected = [3, 2, 1]
    else:
        file = "annotations/instances_default.json" if layout == "cvat" else "result.json"
        content = make_data.coco_content(names)
        make_data.write_json(tmp_path / file, content)
        for i, name in enumerate(names):
            make_data.save(make_data.picture(i), tmp_path / "images" / "default" / name)
        expected = [5, 1, 1]
    found = [datasets.coco(tmp_path, split) for split in ("train", "val", "test")]
    assert [len(dataset) for dataset in found] == expected
    assert {dataset.labels.names for dataset in found} == {("background", "car", "traffic light")}


def test_one_file_is_split_by_lists_or_by_a_hash_that_the_seed_changes(tmp_path):
    names = [f"photo_{i}.jpg" for i in range(8)]
    make_data.write_json(tmp_path / "annotations.json", make_data.coco_content(names))
    for i, name in enumerate(names):
        make_data.save(make_data.picture(i), tmp_path / name)

    def val(**options):
        return [pair.name for pair in datasets.coco(tmp_path, "val", **options).pairs]

    assert val() == val()
    assert len(val(val_fraction=0.5)) == 4
    assert val(val_fraction=0.5) != val(val_fraction=0.5, seed=1)
    make_data.write_lines(tmp_path / "train.txt", ["photo_0.jpg"])
    make_data.write_lines(tmp_path / "val.txt", ["photo_5", "photo_2"])
    assert val() == ["photo_5", "photo_2"]


def test_what_predict_writes_as_coco_is_read_back_pixel_by_pixel(tmp_path):
    labels = Labels(("background", "car", "sky"))
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 3, (HEIGHT, WIDTH)).astype(np.uint8) for _ in range(3)]
    images = []
    for i, mask in enumerate(masks):
        make_data.save(make_data.picture(i), tmp_path / f"photo_{i}.jpg")
        images.append((f"photo_{i}.jpg", WIDTH, HEIGHT, coco_annotations(mask)))
    write_coco(str(tmp_path / "annotations.json"), images, labels)
    read = all_masks(datasets.coco, tmp_path)
    assert datasets.coco(tmp_path, "train").labels == labels
    for i, mask in enumerate(masks):
        assert (read[f"photo_{i}"] == mask).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(category_id=99), "category 99 is not in"),
        (lambda c: c["annotations"][0].update(image_id=99), "image 99 is not in the images"),
        (lambda c: c["annotations"][0].update(segmentation=[]), "no segmentation, only a box"),
        (lambda c: c["annotations"][0].pop("segmentation"), "'segmentation' is missing"),
        (lambda c: c["images"][0].pop("file_name"), "'file_name' is missing"),
        (lambda c: c["images"][0].pop("width"), "'width' is missing"),
        (lambda c: c["images"][0].update(width="wide"), "image 100: its width is 'wide', which is no number"),
        (lambda c: c["annotations"].append("nothing"), "annotations: 'nothing' is no object"),
        (lambda c: c["categories"][0].update(id=3), "the id 3 is that of traffic light and car"),
        (lambda c: c.pop("categories"), "hold no COCO dataset"),
    ],
)
def test_what_is_wrong_in_a_coco_file_is_said(make, change, message):
    root = make("coco")
    path = root / "annotations" / "instances_train2017.json"
    edit(path, change)
    (root / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(InputError, match=message) as error:
        datasets.coco(root, "train")
    assert path.name in str(error.value)


def test_panoptic_segments_become_classes_and_the_rest_is_not_labelled(make):
    root = make("coco_panoptic")
    for split, start in (("train", 0), ("val", 4)):
        dataset = datasets.coco_panoptic(root, split)
        assert dataset.labels.names == ("car", "sky")
        for i in range(len(dataset)):
            expected = make_data.blocks(start + i, [255, 0, 1], void=None)
            assert (dataset.mask(i) == expected).all()


def test_a_panoptic_segment_without_a_class_is_a_finding(make):
    root = make("coco_panoptic")
    path = root / "annotations" / "panoptic_train2017.json"
    edit(path, lambda content: content["annotations"][0]["segments_info"].pop())
    (problem,) = inspect_dataset(datasets.coco_panoptic, root)["problems"]
    assert "segments [70000] are not in the segments_info" in problem["message"]
    assert problem["file"].endswith("000000000000.png")

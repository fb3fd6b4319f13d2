"""Exports with masks: CVAT, labelme2voc, Roboflow."""

from __future__ import annotations

import shutil
from functools import partial

import make_data
import numpy as np
import pytest
from annotation_copies import (
    HEIGHT,
    WIDTH,
    tiny_copy,
)

from seg_torch import datasets
from seg_torch.data.inspection import inspect_dataset
from seg_torch.errors import InputError

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture
def make(tmp_path):
    """make(name): a folder with the tiny copy of a format, to be broken by the test."""
    return partial(tiny_copy, tmp_path)


@pytest.mark.parametrize("name", ["cvat", "labelme_voc", "roboflow"])
def test_masks_of_exports_are_read_as_they_were_made(make, name):
    root = make(name)
    parts = ("train", "val", "test") if name == "roboflow" else ("train", "val")
    seen = 0
    for split in parts:
        dataset = getattr(datasets, name)(root, split)
        assert dataset.labels.names == ("background", "car", "traffic light")
        for i, pair in enumerate(dataset.pairs):
            index = int(pair.name.split("_jpg")[0].split("_")[-1])
            expected = make_data.tool_mask(index)
            expected[:2] = 255 if name == "labelme_voc" else expected[:2]
            assert (dataset.mask(i) == expected).all()
            seen += 1
    assert seen == (6 if name == "roboflow" else 5)


def test_cvat_colours_are_those_of_the_labelmap(make):
    labels = datasets.cvat(make("cvat"), "train").labels
    assert labels.palette.tolist() == [[0, 0, 0], [250, 50, 83], [51, 221, 255]]


def test_lists_of_cvat_subsets_make_the_split(make):
    root = make("cvat")
    lists = root / "ImageSets" / "Segmentation"
    (lists / "default.txt").unlink()
    make_data.write_lines(lists / "Train.txt", ["photo_0", "more/photo_3"])
    make_data.write_lines(lists / "Validation.txt", ["photo_1"])
    names = {s: [p.name for p in datasets.cvat(root, s).pairs] for s in ("train", "val", "test")}
    assert names == {"train": ["more/photo_3", "photo_0"], "val": ["photo_1"], "test": ["photo_1"]}


def test_a_cvat_export_without_images_says_how_to_export_them(make):
    root = make("cvat")
    shutil.rmtree(root / "JPEGImages")
    with pytest.raises(InputError, match=r'missing: JPEGImages(.|\n)*"Save images"'):
        datasets.cvat(root, "train")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["car:1,2"], r"the line 'car:1,2' is not name:R,G,B:parts:actions"),
        (["car:1,2,3::", "sky:1,2,3::"], r"two classes have the colour \(1, 2, 3\)"),
        (["# nothing"], "0 class names"),
        (["car:1,2,300::"], "the palette has shape"),
    ],
)
def test_a_bad_labelmap_is_refused_by_name(make, lines, message):
    root = make("cvat")
    make_data.write_lines(root / "labelmap.txt", lines)
    with pytest.raises(InputError, match=rf"labelmap\.txt: .*{message}"):
        datasets.cvat(root, "train")


def test_a_colour_that_is_not_in_the_labelmap_is_a_finding(make):
    root = make("cvat")
    make_data.save(np.full((HEIGHT, WIDTH, 3), 9, np.uint8), root / "SegmentationClass/photo_0.png")
    (problem,) = inspect_dataset(datasets.cvat, root)["problems"]
    assert problem["file"].endswith("photo_0.png")
    assert problem["pixels"] == {"(9, 9, 9)": HEIGHT * WIDTH}


def test_labelme2voc_of_older_versions_is_read_too(make):
    root = make("labelme_voc")
    (root / "SegmentationClass").rename(root / "SegmentationClassPNG")
    (root / "SegmentationClass").mkdir()
    np.save(root / "SegmentationClass" / "2011_000000.npy", make_data.tool_mask(0))
    assert len(datasets.labelme_voc(root, "train")) == 4


def test_roboflow_classes_that_differ_between_folders_are_refused(make):
    root = make("roboflow")
    path = root / "valid" / "_classes.csv"
    path.write_text(path.read_text().replace("car", "bus"))
    with pytest.raises(InputError, match=r"valid/_classes\.csv: other classes than in"):
        datasets.roboflow(root, "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("300, bus", r"pixel values \[0, 1, 2, 300\]; masks hold 0 to 255"),
        ("3, car", "class names given more than once: car"),
        ("bus", "not enough values to unpack"),
    ],
)
def test_a_bad_list_of_roboflow_classes_is_refused_by_name(make, line, message):
    root = make("roboflow")
    for path in root.rglob("_classes.csv"):
        path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(InputError, match=rf"_classes\.csv: {message}"):
        datasets.roboflow(root, "train")


def test_a_roboflow_value_that_is_no_class_is_a_finding(make):
    root = make("roboflow")
    mask = datasets.roboflow(root, "val").pairs[0].mask
    make_data.save(np.full((HEIGHT, WIDTH), 7, np.uint8), mask)
    (problem,) = inspect_dataset(datasets.roboflow, root)["problems"]
    assert (problem["file"], problem["pixels"]) == (str(mask), {"7": HEIGHT * WIDTH})


def test_a_roboflow_export_without_valid_is_split(make):
    root = make("roboflow")
    shutil.rmtree(root / "valid")
    parts = [datasets.roboflow(root, split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [2, 1, 1]
    assert parts[2].pairs[0].name.startswith("test/")

"""Exports with masks: CVAT, labelme2voc, Roboflow."""

from __future__ import annotations

import logging
import shutil
from functools import partial

import make_data
import numpy as np
import pytest
from annotation_copies import (
    HEIGHT,
    WIDTH,
    all_masks,
    tiny_copy,
)

from seg_torch import datasets
from seg_torch.data.inspection import inspect_dataset
from seg_torch.data.module import SegmentationDataModule
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
        (["car:1,2,3::", "sky:::"], "1 of 2 classes have a colour"),
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


def test_e78_a_frame_without_objects_of_cvat_is_background(make):
    # CVAT lists it and writes no mask.
    root = make("cvat")
    for kind in ("SegmentationClass", "SegmentationObject"):
        (root / kind / "photo_1.png").unlink()
    masks = all_masks(datasets.cvat, root)
    assert len(masks) == 5
    assert masks["photo_1"].shape == (HEIGHT, WIDTH)
    assert not masks["photo_1"].any()
    assert (masks["photo_2"] == make_data.tool_mask(2)).all()
    assert not SegmentationDataModule(datasets.cvat, str(root)).check_files()


def test_a_frame_without_objects_and_without_a_background_is_refused(make):
    root = make("cvat")
    text = (root / "labelmap.txt").read_text()
    (root / "labelmap.txt").write_text(text.replace("background", "sky"))
    (root / "SegmentationClass" / "photo_1.png").unlink()
    with pytest.raises(InputError, match=r"SegmentationClass/photo_1\.png"):
        datasets.cvat(root, "train")


@pytest.mark.parametrize("name", ["valid", "Validation", "val_2"])
def test_e72_the_subset_valid_of_cvat_is_val(make, name):
    root = make("cvat")
    lists = root / "ImageSets" / "Segmentation"
    (lists / "default.txt").unlink()
    make_data.write_lines(lists / "train.txt", ["photo_0", "photo_2"])
    make_data.write_lines(lists / f"{name}.txt", ["photo_1", "more/photo_3"])
    names = {s: [p.name for p in datasets.cvat(root, s).pairs] for s in ("train", "val")}
    assert names == {"train": ["photo_0", "photo_2"], "val": ["more/photo_3", "photo_1"]}


def test_e72_a_list_that_is_no_split_is_named(make, caplog):
    root = make("cvat")
    lists = root / "ImageSets" / "Segmentation"
    (lists / "default.txt").unlink()
    make_data.write_lines(lists / "train.txt", ["photo_0", "photo_2"])
    make_data.write_lines(lists / "val.txt", ["photo_1"])
    make_data.write_lines(lists / "holdout.txt", ["photo_4"])
    with caplog.at_level(logging.INFO, "seg_torch"):
        datasets.cvat(root, "train")
    assert "left out: 2 names that are in no split (more/photo_3, photo_4)" in caplog.text


@pytest.mark.parametrize("name", ["cvat", "labelme_voc"])
def test_e07_a_name_in_the_lists_of_two_splits_is_refused(make, name):
    root = make(name)
    first, second, *_ = sorted(path.stem for path in (root / "SegmentationClass").glob("*.png"))
    lists = root / "ImageSets" / "Segmentation"
    (lists / "default.txt").unlink(missing_ok=True)
    make_data.write_lines(lists / "train.txt", [first, second])
    make_data.write_lines(lists / "val.txt", [second])
    with pytest.raises(InputError, match=rf"{second}: in val\.txt, and in the list of train"):
        getattr(datasets, name)(root, "train")


@pytest.mark.parametrize("name", ["cvat", "labelme_voc", "roboflow"])
def test_e06_two_images_of_one_mask_are_refused(make, name):
    root = make(name)
    pair = getattr(datasets, name)(root, "train").pairs[0]
    make_data.save(make_data.picture(9), pair.image.with_suffix(".png"))
    with pytest.raises(InputError, match=rf"ambiguous, there is also .*{pair.image.stem}\.png"):
        getattr(datasets, name)(root, "train")


def test_e07_roboflow_photos_that_are_called_test_stay_in_their_folder(make):
    root = make("roboflow")
    for path in [*(root / "train").glob("photo_0*")]:
        path.rename(path.with_name(path.name.replace("photo", "test")))
    train = datasets.roboflow(root, "train")
    assert sorted(pair.name.split("_jpg")[0] for pair in train.pairs) == [
        *("train/photo_1", "train/photo_2", "train/test_0")
    ]


def test_e70_a_roboflow_image_without_a_mask_is_refused(make):
    root = make("roboflow")
    make_data.save(make_data.picture(9), root / "train" / "lost.jpg")
    with pytest.raises(InputError, match=r"1 images have no mask NAME_mask\.png (.|\n)*lost\.jpg"):
        datasets.roboflow(root, "train")


def test_e83_white_masks_of_roboflow_are_told_about_in_its_own_words(make):
    root = make("roboflow")
    for path in root.rglob("*_mask.png"):
        make_data.save(np.where(np.arange(64) < 9, 255, 0).astype(np.uint8)[None], path)
        make_data.save(make_data.picture(1, 1, 64), path.with_name(f"{path.name[:-9]}.jpg"))
    problems = inspect_dataset(datasets.roboflow, root)["problems"]
    assert "say so in each _classes.csv:\n0, background\n255, car" in problems[0]["message"]
    for path in root.rglob("_classes.csv"):
        make_data.write_lines(path, ["Pixel Value, Class", "0, background", "255, car"])
    assert not inspect_dataset(datasets.roboflow, root)["problems"]


def test_a_labelmap_of_datumaro_without_colours_means_those_of_voc(make):
    root = make("cvat")
    expected = all_masks(datasets.cvat, root)
    make_data.write_lines(root / "labelmap.txt", ["background:::", "car:::", "traffic light:::"])
    for name, mask in expected.items():
        (path,) = (root / "SegmentationClass").rglob(f"{name}.png")
        make_data.save(np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0)], np.uint8)[mask], path)
    found = all_masks(datasets.cvat, root)
    assert all((found[name] == expected[name]).all() for name in expected)


def test_e70_labelme2voc_images_without_a_mask_are_counted(make, caplog):
    root = make("labelme_voc")
    make_data.save(make_data.picture(9), root / "JPEGImages" / "lost.jpg")
    with caplog.at_level(logging.INFO, "seg_torch"):
        datasets.labelme_voc(root, "train")
    assert "left out: 1 names that are in no split (lost)" in caplog.text


def test_e72_a_list_of_val_and_one_of_all_leave_the_others_to_train(make):
    root = make("cvat")
    make_data.write_lines(root / "ImageSets" / "Segmentation" / "val.txt", ["photo_0", "photo_4"])
    names = {s: [p.name for p in datasets.cvat(root, s).pairs] for s in ("train", "val")}
    expected = {"train": ["more/photo_3", "photo_1", "photo_2"], "val": ["photo_0", "photo_4"]}
    assert names == expected

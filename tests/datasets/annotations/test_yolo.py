"""YOLO's polygons."""

from __future__ import annotations

import logging
import shutil
from functools import partial

import make_data
import pytest
from annotation_copies import (
    all_masks,
    every_mask,
    tiny_copy,
)

from seg_torch import datasets
from seg_torch.errors import InputError

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture
def make(tmp_path):
    """make(name): a folder with the tiny copy of a format, to be broken by the test."""
    return partial(tiny_copy, tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2 0.2", "4 numbers are a box"),
        ("5 0.1 0.1 0.2 0.1 0.2 0.2", r"class 5 is not in the names \[0, 1\]"),
        ("0.5 0.1 0.1 0.2 0.1 0.2 0.2", r"class 0.5 is not in the names"),
        ("0 0.1 0.1 0.2 0.1 0.2", "5 numbers are no pairs"),
        ("0 0.1 zero 0.2 0.1 0.2 0.1", "could not convert string to float: 'zero'"),
    ],
)
def test_a_line_that_is_no_polygon_is_refused_with_file_and_number(make, line, message):
    root = make("yolo")
    text = root / "labels" / "train" / "photo_1.txt"
    text.write_text(f"{text.read_text()}{line}\n")
    with pytest.raises(InputError, match=rf"{text}: object 3: {message}"):
        datasets.yolo(root, "train")


def test_yolo_as_roboflow_and_cvat_write_it(make):
    root = make("yolo")
    expected = {s: every_mask(datasets.yolo(root, s)) for s in ("train", "val")}
    for kind in ("images", "labels"):
        for split, folder in (("train", "train"), ("val", "valid")):
            (root / folder).mkdir(exist_ok=True)
            (root / kind / split).rename(root / folder / kind)
    lines = ["train: ../train/images", "val: ../valid/images", "test: ../test/images", "nc: 2"]
    make_data.write_lines(root / "data.yaml", [*lines, "names: ['car', 'traffic light']"])
    for split, masks in expected.items():
        found = every_mask(datasets.yolo(root, split))
        assert found.keys() == masks.keys()
        assert all((found[name] == masks[name]).all() for name in masks)
    make_data.write_lines(root / "train.txt", [f"train/images/photo_{i}.jpg" for i in range(3)])
    make_data.write_lines(
        root / "data.yaml", ["path: ./", "train: train.txt", "names:", "  0: car", "  1: light"]
    )
    shutil.rmtree(root / "valid")
    (root / "train.txt").rename(root / "lists.txt")  # no list of a split for `folder`'s rule
    text = (root / "data.yaml").read_text().replace("train.txt", "lists.txt")
    (root / "data.yaml").write_text(text)
    assert [len(datasets.yolo(root, split)) for split in ("train", "val")] == [2, 1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["train: images/train"], "no names"),
        (["names: [car, traffic light]"], "no train and val"),
        (["names: [car, traffic light]", "train: pictures"], "train: pictures does not exist in"),
        (["names: car", "train: images/train"], "names: 'car' is no list of class names"),
        (["names: [car", "train: x"], r"data\.yaml: while parsing"),
    ],
)
def test_a_data_yaml_that_says_too_little_is_refused(make, lines, message):
    root = make("yolo")
    make_data.write_lines(root / "data.yaml", lines)
    with pytest.raises(InputError, match=rf"data\.yaml: (.|\n)*{message}|{message}"):
        datasets.yolo(root, "train")


def test_e72_validation_of_fiftyone_is_val(make):
    root = make("yolo")
    expected = every_mask(datasets.yolo(root, "val"))
    (root / "data.yaml").rename(root / "dataset.yaml")
    lines = ["names: [car, traffic light]", "nc: 2", "path: .", "train: ./images/train/"]
    make_data.write_lines(root / "dataset.yaml", [*lines, "validation: ./images/val/"])
    found = every_mask(datasets.yolo(root, "val"))
    assert len(datasets.yolo(root, "train")) == 3
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)


def test_e72_an_entry_of_images_that_is_no_split_is_named(make, caplog):
    root = make("yolo")
    with (root / "data.yaml").open("a") as file:
        file.write("holdout: images/val\n")
    with caplog.at_level(logging.INFO, "seg_torch"):
        datasets.yolo(root, "train")
    assert "1 entries of data.yaml that are neither train, val nor test (holdout)" in caplog.text


def test_e74_poses_are_refused(make):
    root = make("yolo")
    with (root / "data.yaml").open("a") as file:
        file.write("kpt_shape: [3, 2]\n")
    with pytest.raises(
        InputError, match=r"data\.yaml: kpt_shape: these are poses; export polygons"
    ):
        datasets.yolo(root, "train")


@pytest.mark.parametrize("prefix", ["", "data/", "/home/somebody/datasets/mine/"])
@pytest.mark.parametrize("names", [("train", None), ("Train", "Validation")])
def test_e78_the_exports_of_cvat(make, prefix, names):
    # As "Ultralytics YOLO Segmentation" of CVAT has it, with and without subsets of the task.
    root = make("yolo")
    expected = all_masks(datasets.yolo, root)
    (root / "labels" / "val" / "photo_4.txt").unlink(missing_ok=True)
    lines = ["names:", "  0: car", "  1: traffic light", "path: ."]
    listed = {subset: [] for subset in names if subset}
    for name, folder in zip(names, ("train", "val"), strict=True):
        target = name or names[0]
        images = sorted((root / "images" / folder).iterdir())
        listed[target] += [f"{prefix}images/{target}/{path.name}" for path in images]
        for kind in ("images", "labels"):
            moved = root / f"{kind}_new" / target
            moved.mkdir(parents=True, exist_ok=True)
            for path in (root / kind / folder).iterdir():
                path.rename(moved / path.name)
    for kind in ("images", "labels"):
        shutil.rmtree(root / kind)
        (root / f"{kind}_new").rename(root / kind)
    for subset, paths in listed.items():
        make_data.write_lines(root / f"{subset}.txt", paths)
    lines += [f"{subset}: {subset}.txt" for subset in listed]
    make_data.write_lines(root / "data.yaml", lines)
    found = all_masks(datasets.yolo, root)
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)
    if names[1]:
        assert len(datasets.yolo(root, "val")) == 2


def test_e06_two_images_of_one_text_file_are_refused(make):
    root = make("yolo")
    make_data.save(make_data.picture(9), root / "images" / "train" / "photo_0.png")
    with pytest.raises(InputError, match=r"photo_0\.png are both annotated in .*photo_0\.txt"):
        datasets.yolo(root, "train")


def test_e18_images_without_any_text_file_are_refused(make):
    root = make("yolo")
    (root / "labels").rename(root / "annotations")
    message = r"none of 3 images of train has a text file: of .*/photo_0\.jpg it is .*/labels/train"
    with pytest.raises(InputError, match=message):
        datasets.yolo(root, "train")


def test_e70_text_files_without_an_image_are_counted(make, caplog):
    root = make("yolo")
    (root / "images" / "train" / "photo_0.jpg").unlink()
    with caplog.at_level(logging.INFO, "seg_torch"):
        datasets.yolo(root, "train")
    assert "left out: 1 text files without an image" in caplog.text


def test_a_folder_relative_to_the_current_one_is_read(make, monkeypatch):
    root = make("yolo")
    expected = all_masks(datasets.yolo, root)
    monkeypatch.chdir(root.parent)
    found = all_masks(datasets.yolo, root.name)
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)


def test_another_yaml_file_beside_that_of_the_dataset_is_no_dataset(make):
    root = make("yolo")
    (root / "data.yaml").rename(root / "mine.yaml")
    make_data.write_lines(root / "args.yaml", ["task: segment", "epochs: 100"])
    assert len(datasets.yolo(root, "train")) == 3


def test_e16_labels_outside_of_the_folder_are_read_anew(make, tmp_path):
    root = make("yolo")
    home = tmp_path / "elsewhere"
    home.mkdir()
    (root / "data.yaml").rename(home / "data.yaml")
    text = (home / "data.yaml").read_text().replace("../datasets/mine", str(root))
    (home / "data.yaml").write_text(text)
    assert datasets.yolo(home, "val").mask(0).any()
    (root / "labels" / "val" / "photo_3.txt").write_text("")
    assert not datasets.yolo(home, "val").mask(0).any()

"""YOLO's polygons."""

from __future__ import annotations

import shutil
from functools import partial

import make_data
import pytest
from annotation_copies import (
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
        (["names: [car", "train: x"], r"data\.yaml: while parsing"),
    ],
)
def test_a_data_yaml_that_says_too_little_is_refused(make, lines, message):
    root = make("yolo")
    make_data.write_lines(root / "data.yaml", lines)
    with pytest.raises(InputError, match=rf"data\.yaml: (.|\n)*{message}|{message}"):
        datasets.yolo(root, "train")

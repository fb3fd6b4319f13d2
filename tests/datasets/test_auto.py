"""data=auto recognises the format of a folder."""

from __future__ import annotations

import logging
from functools import partial

import make_data
import pytest
from annotation_copies import (
    FORMATS,
    saved_table,
    tiny_copy,
)

from seg_torch import datasets
from seg_torch.datasets.auto import recognise
from seg_torch.errors import InputError

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture
def make(tmp_path):
    """make(name): a folder with the tiny copy of a format, to be broken by the test."""
    return partial(tiny_copy, tmp_path)


@pytest.fixture
def table(tmp_path):
    """table(): a folder as `save_to_disk` writes it, with 0 for what is not labelled."""
    pytest.importorskip("datasets")
    return partial(saved_table, tmp_path / "table")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("coco", "the images, annotations and categories in annotations/instances_train2017.json"),
        ("coco_panoptic", "the segments_info in annotations/panoptic_train2017.json"),
        ("cvat", "labelmap.txt and SegmentationClass"),
        ("folder", "its folders images and masks"),
        ("label_studio", "the tasks with annotations in project-1-at-2025-02-01.json"),
        ("labelme", "the shapes and the imagePath in json/photo_4.json"),
        ("labelme_voc", "class_names.txt and SegmentationClass"),
        ("roboflow", "test/_classes.csv"),
        ("yolo", "the names and splits in data.yaml"),
    ],
)
def test_auto_says_what_it_found_and_why_and_uses_it(make, caplog, name, reason):
    root = make(name)
    with caplog.at_level(logging.INFO, "seg_torch"):
        found = datasets.auto(root, "train")
    assert f"data=auto: {root} is read as data={name}, because of {reason}" in caplog.text
    expected = getattr(datasets, name)(root, "train")
    assert found.pairs == expected.pairs
    assert found.labels == expected.labels


def test_auto_names_the_formats_where_it_finds_none(tmp_path):
    make_data.save(make_data.picture(0), tmp_path / "photo.jpg")
    make_data.write_json(tmp_path / "notes.json", {"hello": 1})
    with pytest.raises(InputError) as error:
        datasets.auto(tmp_path, "train")
    text = str(error.value)
    assert text.startswith(f"data=auto: {tmp_path} holds notes.json, photo.jpg and is in none")
    assert all(f"  {name} " in text for name in [*FORMATS, "folder", "hf"])


def test_auto_reads_what_save_to_disk_wrote(table):
    root = table()
    assert recognise(root) == (datasets.hf, "dataset_dict.json")
    assert len(datasets.auto(root, "val")) == 4
    assert datasets.auto(root, "val", unlabelled=0).labels.names == ("car", "sky")
    with pytest.raises(InputError, match=r"data\.dataset\.background: data=hf has no such .*seed"):
        datasets.auto(root, "val", background="car")

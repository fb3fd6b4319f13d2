"""labelme's JSON files."""

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
    edit,
    tiny_copy,
)
from PIL import Image, ImageOps

from seg_torch import datasets
from seg_torch.data.inspection import inspect_dataset
from seg_torch.data.module import SegmentationDataModule
from seg_torch.errors import InputError

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture
def make(tmp_path):
    """make(name): a folder with the tiny copy of a format, to be broken by the test."""
    return partial(tiny_copy, tmp_path)


def test_labelme_shapes_of_every_type_are_drawn(make):
    root = make("labelme")
    names = datasets.labelme(root, "train").labels.names
    assert names == ("background", "car", "pole", "sign", "traffic light")
    masks, (pole, sign) = all_masks(datasets.labelme, root), (2, 3)
    one, two, three = (masks[f"photo_{i}"] for i in (1, 2, 3))
    assert (one[2:11, 50:61] == sign).all()  # both corners belong to the rectangle
    assert not (one[11, 50:61] == sign).any()
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.hypot(x - 10, y - 40)
    assert (one[distance < 3.5] == sign).all()
    assert not (one[(distance > 5) & (x < 40)] == sign).any()
    assert (two[10, :7] == pole).all()  # a line 10 pixels wide around x = 2
    assert not (two[10, 8:12] == pole).any()
    assert two[11, 55] == two[33, 55] == pole
    for centre in (30, 40, 50):
        assert (two[np.hypot(x - centre, y - 40) < 4.5] == sign).all()
    assert (three[1:5, 55:59] == np.where(np.eye(4) == 1, sign, 0)).all()
    assert (three[40:48, :21] == 255).all()


def test_later_labelme_shapes_lie_on_top(make):
    root = make("labelme")
    edit(root / "photo_0.json", lambda content: content["shapes"].reverse())
    masks = all_masks(datasets.labelme, root)
    assert not (masks["photo_0"] == 4).any()  # the traffic light is inside of the car
    assert (masks["photo_1"] == 4).any()


def test_labelme_images_inside_of_the_json_are_read(make):
    root = make("labelme")
    samples = {}
    for split in ("train", "val"):
        dataset = datasets.labelme(root, split)
        samples |= {pair.name: dataset[i][0] for i, pair in enumerate(dataset.pairs)}
    pixels = samples["photo_5"].permute(1, 2, 0).numpy()
    assert (pixels == np.asarray(make_data.picture(5))).all()
    assert not SegmentationDataModule(datasets.labelme, str(root)).check_files()


def test_damaged_image_data_of_labelme_is_a_finding(make):
    root = make("labelme")
    edit(root / "photo_5.json", lambda content: content.update(imageData="AAAA"))
    problems = inspect_dataset(datasets.labelme, root)["problems"]
    assert {problem["file"] for problem in problems} == {str(root / "photo_5.json")}
    assert "imageData: " in problems[0]["message"]


def test_labels_txt_gives_the_order_and_refuses_other_labels(make):
    root = make("labelme")
    listed = ["__ignore__", "_background_", "traffic light", "sign", "pole", "car"]
    make_data.write_lines(root / "labels.txt", listed)
    dataset = datasets.labelme(root, "train")
    assert dataset.labels.names == tuple(listed[1:])
    assert all_masks(datasets.labelme, root)["photo_3"][45, 5] == 255
    make_data.write_lines(root / "labels.txt", listed[:-1])
    with pytest.raises(InputError, match=r"photo_0\.json: \['car'\] are not in labels\.txt"):
        datasets.labelme(root, "train")


def test_labelme_folders_make_the_split(make, caplog):
    root = make("labelme")
    for i, folder in enumerate(["train", "train", "val", "test"]):
        (root / folder).mkdir(exist_ok=True)
        for suffix in ("jpg", "json"):
            (root / f"photo_{i}.{suffix}").rename(root / folder / f"photo_{i}.{suffix}")
    with caplog.at_level(logging.INFO, "seg_torch"):
        splits = {s: datasets.labelme(root, s) for s in ("train", "val", "test")}
    names = {split: [pair.name for pair in dataset.pairs] for split, dataset in splits.items()}
    assert "2 images are in no split" in caplog.text
    assert names == {
        "train": ["train/photo_0", "train/photo_1"],
        "val": ["val/photo_2"],
        "test": ["test/photo_3"],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(shape_type="spiral"), "shapes of the type 'spiral' are not known"),
        (lambda s: s.update(shape_type="circle"), "a circle of 5 points, it has 2"),
        (lambda s: s.update(shape_type="mask", points=[[0, 0], [1, 1]], mask="AAAA"), "its mask: "),
    ],
)
def test_a_labelme_shape_of_a_wrong_kind_is_refused(make, change, message):
    root = make("labelme")
    edit(root / "photo_0.json", lambda content: change(content["shapes"][0]))
    with pytest.raises(
        InputError, match=rf"photo_0\.json: photo_0\.jpg, shape 1 \(car\): .*{message}"
    ):
        all_masks(datasets.labelme, root)


@pytest.mark.parametrize("kind", ["rectangle", "rotation", "quadrilateral"])
def test_e79_shapes_of_four_corners_of_x_anylabeling(make, kind):
    root = make("labelme")
    corners = [[10, 5], [30, 5], [30, 25], [10, 25]]
    if kind != "rectangle":
        corners = [[30, 5], [45, 20], [30, 35], [15, 20]]
    # As X-AnyLabeling 2 writes it.
    shape = {
        **{"label": "car", "score": None, "points": corners, "group_id": None},
        **{"description": "", "difficult": False, "shape_type": kind, "flags": {}},
        **{"attributes": {}, "kie_linking": []},
    }
    shape |= {"direction": 0.7} if kind == "rotation" else {}
    edit(root / "photo_0.json", lambda content: content.update(shapes=[shape]))
    mask = all_masks(datasets.labelme, root)["photo_0"]
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    expected = (x >= 10) & (x <= 30) & (y >= 5) & (y <= 25)
    if kind != "rectangle":
        expected = abs(x - 30) + abs(y - 20) <= 15
    assert (mask == expected).all()


@pytest.mark.parametrize("copy", ["photo_0 - copy.json", "backup/photo_0.json"])
def test_e06_two_files_of_one_image_are_refused(make, copy):
    root = make("labelme")
    target = root / copy
    target.parent.mkdir(exist_ok=True)
    target.write_text((root / "photo_0.json").read_text())
    edit(target, lambda content: content["shapes"].pop())
    with pytest.raises(InputError, match=r"photo_0\.jpg is annotated in .*json, too; keep one"):
        datasets.labelme(root, "train")


def test_a_shape_without_a_label_is_refused(make):
    root = make("labelme")
    edit(root / "photo_0.json", lambda content: content["shapes"][1].update(label=None))
    with pytest.raises(InputError, match=r"photo_0\.json: shape 2: its label is None"):
        datasets.labelme(root, "train")


def test_an_image_is_found_whatever_way_its_name_is_written(make):
    root = make("labelme")
    (root / "photo_0.jpg").rename(root / "Strasse u\u0308ber 0.JPG")  # as macOS has it
    edit(root / "photo_0.json", lambda c: c.update(imagePath="strasse \u00fcber 0.jpg"))
    assert "photo_0" in all_masks(datasets.labelme, root)


def test_e12_points_on_the_photo_as_it_is_stored_are_turned_with_it(make):
    """Where the size that the annotation states is that of the stored photo."""
    for orientation in (5, 6, 7, 8):
        root = make("labelme")
        plain = all_masks(datasets.labelme, root)
        exif = Image.Exif()
        exif[0x0112] = orientation
        photos = [*root.glob("*.jpg"), *root.glob("*.png")]  # others lie in their JSON file
        assert len(photos) > 2
        for path in photos:
            with Image.open(path) as image:
                image.load()
            image.save(path, exif=exif)
        masks = all_masks(datasets.labelme, root)
        for name in (path.stem for path in photos):
            image = Image.fromarray(plain[name])
            image.getexif()[0x0112] = orientation
            assert masks[name].tolist() == np.asarray(ImageOps.exif_transpose(image)).tolist()
        shutil.rmtree(root)


def test_e07_folders_that_are_called_after_their_photos_are_no_splits(make):
    root = make("labelme")
    for i, folder in enumerate(["test_drive", "test_drive", "train_station", "city"]):
        (root / folder).mkdir(exist_ok=True)
        for suffix in ("jpg", "json"):
            (root / f"photo_{i}.{suffix}").rename(root / folder / f"photo_{i}.{suffix}")
    train, val, test = (datasets.labelme(root, split) for split in ("train", "val", "test"))
    assert (len(train), len(val)) == (5, 1)
    assert test.pairs == val.pairs

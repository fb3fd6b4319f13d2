"""Label Studio's JSON."""

from __future__ import annotations

import json
import logging
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
from PIL import Image

from seg_torch import datasets
from seg_torch.datasets.annotations.label_studio import decode_brush
from seg_torch.errors import InputError

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture
def make(tmp_path):
    """make(name): a folder with the tiny copy of a format, to be broken by the test."""
    return partial(tiny_copy, tmp_path)


def test_a_brush_is_decoded_as_label_studio_encoded_it():
    # Written by encode_rle of label_studio_sdk 2.1.2 from these opacities, each four times.
    opacity = [0, 0, 255, 255, 255, 255, 0, 7, 0, 0, 0, 0]
    content = [0, 0, 0, 48, 57, 27, 252, 224, 23, 255, 227, 0, 140, 30, 248, 0]
    assert decode_brush(content, 3, 4).ravel().tolist() == opacity


def test_a_brush_of_colours_that_differ_is_decoded():
    rgba = np.random.default_rng(0).integers(0, 256, (2, 3, 4)).astype(np.uint8)
    bits = f"{rgba.size:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}"
    bits += f"0{2:02b}{rgba.size - 1:08b}" + "".join(f"{v:08b}" for v in rgba.ravel())
    bits += "0" * (-len(bits) % 8)
    content = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    assert (decode_brush(content, 2, 3) == rgba[..., 3]).all()
    with pytest.raises(InputError, match="cut off"):
        decode_brush(content[:-3], 2, 3)
    with pytest.raises(InputError, match="a brush of 6 pixels on an image of 2 x 2"):
        decode_brush(content, 2, 2)


def test_label_studio_rectangles_ellipses_and_brushes(make):
    root = make("label_studio")
    masks = all_masks(datasets.label_studio, root)
    sign = 2  # background, car, sign, traffic light
    one = masks["00000001-photo 1"]
    assert (one[6:16, 49:56] == sign).all()
    assert not (one[2:4, 49:56] == sign).any()
    assert one[43, 13] == sign  # 20 % of 64 and 90 % of 48
    two = masks["00000002-photo 2"]
    assert (two[2:8, 50:60] == sign).all()
    assert (two[:8] == sign).sum() == 60


def test_a_turned_rectangle_turns_clockwise_about_its_corner(make):
    root = make("label_studio")
    value = {"x": 50.0, "y": 25.0, "width": 25.0, "height": 12.5, "rotation": 90}
    turned = make_data.region("rectanglelabels", "car", value)
    edit(
        next(root.glob("*.json")),
        lambda content: content[0]["annotations"][0].update(result=[turned]),
    )
    mask = all_masks(datasets.label_studio, root)["00000000-photo 0"]
    # From (32, 12): 16 pixels down and 6 to the left.
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (12, 28, 26, 32)


@pytest.mark.parametrize(
    ("place", "flags", "number"),
    [
        (1, {}, 2),
        (1, {"ground_truth": True}, 1),
        (0, {"was_cancelled": True}, 1),
        (1, {"updated_at": "2026-01-01"}, 1),
    ],
)
def test_which_annotation_of_an_image_counts(make, place, flags, number):
    root = make("label_studio")
    edit(next(root.glob("*.json")), lambda content: content[0]["annotations"][place].update(flags))
    mask = all_masks(datasets.label_studio, root)["00000000-photo 0"]
    assert mask.any() == (number == 2)  # the first one has no regions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(image_rotation=90), "the image was turned in Label Studio"),
        (lambda r: r["value"].update(polygonlabels=["a", "b"]), "2 labels, it takes one"),
        (lambda r: r.update(type="polygon"), "its label is a tag of its own"),
        (lambda r: r.pop("original_width"), "'original_width' is missing"),
        (lambda r: r.pop("value"), "'value' is missing"),
    ],
)
def test_what_cannot_be_read_of_label_studio_is_said(make, change, message):
    root = make("label_studio")
    path = next(root.glob("*.json"))
    edit(path, lambda content: change(content[1]["annotations"][0]["result"][0]))
    with pytest.raises(InputError, match=rf"{path.name}: task 2: .*{message}"):
        datasets.label_studio(root, "train")


def test_json_min_of_label_studio_is_refused(make):
    root = make("label_studio")
    path = next(root.glob("*.json"))
    path.write_text(json.dumps([{"image": "/data/upload/1/a.jpg", "id": 1, "label": []}]))
    with pytest.raises(InputError, match="hold no annotated tasks of Label Studio"):
        datasets.label_studio(root, "train")


def test_e06_two_tasks_of_one_image_are_refused(make):
    root = make("label_studio")
    path = next(root.glob("*.json"))

    def change(content):
        content[1]["data"] = content[0]["data"]

    edit(path, change)
    message = rf"{path.name}: task 2: images/.*photo 0\.jpg is annotated in task 1 of {path.name}"
    with pytest.raises(InputError, match=message):
        datasets.label_studio(root, "train")


def bitmask(mask: np.ndarray) -> str:
    """Black pixels on nothing, as Label Studio exports them."""
    pixels = np.zeros((*mask.shape, 4), np.uint8)
    pixels[..., 3] = mask * 255
    return f"data:image/png;base64,{make_data.png(Image.fromarray(pixels))}"


def test_e70_bitmasks_are_drawn(make):
    root = make("label_studio")
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[3:9, 20:50] = True
    expected[5, 30:40] = False
    each = make_data.region("bitmasklabels", "sign", {"imageDataURL": bitmask(expected)})
    path = next(root.glob("*.json"))
    edit(path, lambda content: content[0]["annotations"][0].update(result=[each]))
    mask = all_masks(datasets.label_studio, root)["00000000-photo 0"]
    assert datasets.label_studio(root, "train").labels.names[2] == "sign"
    assert (mask == np.where(expected, 2, 0)).all()


def test_a_bitmask_of_another_size_is_a_finding(make):
    root = make("label_studio")
    value = {"imageDataURL": bitmask(np.ones((20, 30), bool))}
    each = make_data.region("bitmasklabels", "car", value)
    path = next(root.glob("*.json"))
    edit(path, lambda content: content[0]["annotations"][0].update(result=[each]))
    with pytest.raises(InputError, match="a bitmask in mode RGBA of 30 x 20 pixels; expected is"):
        all_masks(datasets.label_studio, root)


def key_point(label: str) -> dict:
    return make_data.region("keypointlabels", label, {"x": 50.0, "y": 50.0, "width": 0.5})


def test_e70_regions_without_an_area_are_counted(make, caplog):
    root = make("label_studio")
    path = next(root.glob("*.json"))
    choice = {"type": "choices", "value": {"choices": ["sunny"]}, "id": "c"}

    def change(content):
        content[0]["annotations"][0]["result"] += [key_point("car"), key_point("car"), choice]

    before = all_masks(datasets.label_studio, root)
    edit(path, change)
    with caplog.at_level(logging.INFO, "seg_torch"):
        after = all_masks(datasets.label_studio, root)
    assert all((after[name] == before[name]).all() for name in before)
    assert "left out: 2 results of the type keypointlabels (task 1, task 1)" in caplog.text
    assert "left out: 1 results of the type choices (task 1)" in caplog.text
    assert "left out: 1 tasks without annotation (task 6)" in caplog.text


def test_e70_a_class_or_an_image_without_an_area_is_refused(make):
    root = make("label_studio")
    path = next(root.glob("*.json"))

    def add(content):
        content[0]["annotations"][0]["result"].append(key_point("person"))

    edit(path, add)
    with pytest.raises(InputError, match=r"all regions of \['person'\] are without an area"):
        datasets.label_studio(root, "train")

    def only(content):
        content[0]["annotations"][0]["result"] = [key_point("car")]

    edit(path, only)
    message = rf"{path.name}: task 1: its regions have no area, so \['car'\] would be lost"
    with pytest.raises(InputError, match=message):
        datasets.label_studio(root, "train")


@pytest.mark.parametrize(
    "address",
    [
        "/data/local-files/?d=project/b/photo.jpg",
        "s3://bucket/b/photo.jpg?X-Amz-Signature=1%2F2",
        "project\\b\\photo.jpg",
    ],
)
def test_images_of_one_name_are_told_apart_by_their_folders(make, address):
    root = make("label_studio")
    for folder in "abc":
        make_data.save(make_data.picture(1), root / folder / "photo.jpg")
    path = next(root.glob("*.json"))
    edit(path, lambda content: content[0]["data"].update(image=address))
    assert "b/photo" in {
        pair.name for split in ("train", "val") for pair in datasets.label_studio(root, split).pairs
    }


def test_regions_on_two_images_of_a_task_are_refused(make):
    root = make("label_studio")
    path = next(root.glob("*.json"))
    edit(path, lambda c: c[0]["annotations"][0]["result"][0].update(to_name="other"))
    with pytest.raises(InputError, match="task 1: its regions are on several images"):
        datasets.label_studio(root, "train")

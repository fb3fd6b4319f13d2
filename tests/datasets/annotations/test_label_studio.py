"""Label Studio's JSON."""

from __future__ import annotations

import json
from functools import partial

import make_data
import numpy as np
import pytest
from annotation_copies import (
    all_masks,
    edit,
    tiny_copy,
)

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

"""Polygons of masks, filled again by rasterio and by matplotlib."""

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.path import Path
from rasterio.features import rasterize
from scipy import ndimage
from test_coco import NOISE, NOTHING, ONE_CLASS, RING

from seg_torch.labels import Labels
from seg_torch.prediction.segmentation import Segmentation

LABELS = Labels(tuple("abcdef"))
SMALL = arrays(
    np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 2)
)


def polygons(mask: np.ndarray) -> list[dict]:
    collection = Segmentation(mask, LABELS, mask).polygons()
    assert collection["type"] == "FeatureCollection"
    return collection["features"]


def filled(features: list[dict], shape: tuple[int, int]) -> np.ndarray:
    shapes = [(f["geometry"], f["properties"]["class_id"]) for f in features]
    return rasterize(shapes, shape, fill=255, dtype="uint8") if shapes else np.full(shape, 255)


@settings(max_examples=60, deadline=None)
@given(SMALL)
def test_filling_them_gives_the_mask_back_and_nothing_where_it_is_255(mask):
    mask[mask == 2] = 255
    features = polygons(mask)
    assert np.array_equal(filled(features, mask.shape), mask)


@pytest.mark.parametrize("mask", [RING, NOISE, ONE_CLASS, NOTHING])
def test_every_polygon_is_a_connected_region_with_its_number_of_pixels(mask):
    """SciPy finds regions; matplotlib pixels, with centres inside an odd number of rings."""
    height, width = mask.shape
    centres = np.array([(x + 0.5, y + 0.5) for y, x in product(range(height), range(width))])
    features = polygons(mask)
    found = []
    for feature in features:
        inside = np.zeros(mask.shape, bool)
        for ring in feature["geometry"]["coordinates"]:
            inside ^= Path(ring).contains_points(centres).reshape(mask.shape)
        properties = feature["properties"]
        assert properties["area"] == inside.sum()
        found.append((properties["class_id"], inside.tobytes()))
    expected = []
    for class_id in np.setdiff1d(mask, [255]):
        regions, number = ndimage.label(mask == class_id)
        expected += [(class_id, (regions == i + 1).tobytes()) for i in range(number)]
    assert sorted(found) == sorted(expected)


def test_rings_are_closed_turn_as_the_standard_says_and_have_no_point_on_a_straight_line():
    """RFC 7946, 3.1.6: the outer ring runs counterclockwise, holes clockwise."""
    rings = [f["geometry"]["coordinates"] for f in polygons(RING)]
    assert max(map(len, rings)) > 2
    for ring, index in ((ring, i) for part in rings for i, ring in enumerate(part)):
        assert ring[0] == ring[-1]
        x, y = np.array(ring[:-1]).T
        area = (x * np.roll(y, -1) - y * np.roll(x, -1)).sum()
        assert area < 0 if index else area > 0
        ahead = np.stack([np.roll(x, -1) - x, np.roll(y, -1) - y])
        behind = np.roll(ahead, 1, axis=1)
        assert (ahead[0] * behind[1] != ahead[1] * behind[0]).all()


def test_a_single_pixel_by_hand(tmp_path):
    mask = np.full((4, 6), 255, np.uint8)
    mask[2, 4] = 1
    labels = Labels(("sky", "straße"), np.array([[0, 0, 0], [255, 128, 1]]))
    Segmentation(mask, labels, mask).save(tmp_path, "a", ["polygons"])
    content = json.loads((tmp_path / "polygons" / "a.geojson").read_text(encoding="utf-8"))
    (feature,) = content.pop("features")
    assert content == {"type": "FeatureCollection"}
    assert feature["type"] == "Feature"
    properties = {"class_id": 1, "name": "straße", "colour": "#ff8001", "area": 1}
    assert feature["properties"] == properties
    (ring,) = feature["geometry"]["coordinates"]
    assert sorted(ring[1:]) == [[4.0, 2.5], [4.5, 2.0], [4.5, 3.0], [5.0, 2.5]]


def test_files_hold_what_the_method_returns(tmp_path):
    for name, mask in {"noise": NOISE, "nothing": NOTHING}.items():
        segmentation = Segmentation(mask, LABELS, mask)
        segmentation.save(tmp_path, name, ["polygons"])
        content = json.loads((tmp_path / f"polygons/{name}.geojson").read_text())
        assert content == segmentation.polygons()

"""Polygons in the place on earth of a GeoTIFF, as rasterio (GDAL) and fiona's rules have it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rasterio
import scenes
from affine import Affine
from PIL import Image
from predictions import LABELS, Threshold
from rasterio.crs import CRS
from rasterio.features import rasterize
from rasterio.transform import from_gcps, from_origin
from rasterio.warp import transform_geom
from scenes import pixels

from seg_torch import Segmenter
from seg_torch.images.geotiff import place
from seg_torch.models.network import Network

PLACES = {
    "UTM": ("EPSG:32633", from_origin(500_000, 5_600_000, 10, 10), {}),
    "longitude, latitude": ("EPSG:4326", from_origin(13.2, 52.6, 1e-4, 2e-4), {}),
    "ETRS89": ("EPSG:4258", from_origin(13.2, 52.6, 1e-4, 2e-4), {}),
    "turned": ("EPSG:25832", Affine(3, 1, 400_000, -1, -4, 5_700_000), {}),
    "south up": ("EPSG:32633", Affine(10, 0, 500_000, 0, 10, 5_600_000), {}),
    "points": ("EPSG:32633", from_origin(500_000, 5_600_000, 10, 10), {"point": True}),
    "BigTIFF": ("EPSG:32633", from_origin(500_000, 5_600_000, 10, 10), {"bigtiff": "yes"}),
    "big-endian": ("EPSG:32633", from_origin(500_000, 5_600_000, 10, 10), {"endianness": "big"}),
}


def segmenter() -> Segmenter:
    return Segmenter(Network(Threshold(), (0, 0, 0), (1, 1, 1)), LABELS, device="cpu")


@pytest.mark.parametrize("name", PLACES)
def test_e67_polygons_lie_where_the_scene_lies(tmp_path, name):
    crs, transform, options = PLACES[name]
    point = options.pop("point", False) if "point" in (options := dict(options)) else False
    path = scenes.write(tmp_path / "a.tif", pixels(), crs=crs, transform=transform, **options)
    if point:
        with rasterio.open(path, "r+") as file:
            file.update_tags(AREA_OR_POINT="Point")
    with rasterio.open(path) as file:
        transform = file.transform
    result = segmenter().predict(path)
    result.save(tmp_path, "a", ["polygons"])
    text = (tmp_path / "polygons/a.geojson").read_text()
    found = json.loads(text)
    assert found == result.polygons()
    named = CRS.from_user_input(found["crs"]["properties"]["name"])
    assert named == CRS.from_user_input("OGC:CRS84" if crs == "EPSG:4326" else crs)
    drawn = [(f["geometry"], f["properties"]["class_id"]) for f in found["features"]]
    again = rasterize(drawn, result.mask.shape, fill=255, transform=transform)
    assert again.tolist() == result.mask.tolist()
    for feature in found["features"][:50]:
        for number, ring in enumerate(feature["geometry"]["coordinates"]):
            assert ring[0] == ring[-1]
            assert (area(ring) > 0) == (number == 0)  # RFC 7946: the outer one counter-clockwise


def area(ring: list) -> float:
    x, y = np.array(ring).T
    x, y = x - x[0], y - y[0]
    return float(x[:-1] @ y[1:] - x[1:] @ y[:-1])


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_e67_without_a_place_they_are_in_pixels(tmp_path, suffix):
    scene = np.moveaxis(pixels(), 0, 2)
    Image.fromarray(scene).save(tmp_path / f"a.{suffix}")
    result = segmenter().predict(tmp_path / f"a.{suffix}")
    for found in (result.polygons(), segmenter().predict(scene).polygons()):
        assert "crs" not in found
        drawn = [(f["geometry"], f["properties"]["class_id"]) for f in found["features"]]
        again = rasterize(drawn, result.mask.shape, fill=255)
        assert again.tolist() == result.mask.tolist()


def test_e67_a_system_without_a_number_is_called_what_the_file_calls_it(tmp_path):
    own = CRS.from_proj4("+proj=laea +lat_0=50 +lon_0=9 +ellps=GRS80 +units=m")
    path = scenes.write(tmp_path / "a.tif", pixels(), crs=own)
    found = place(path)
    assert found.crs not in ("", "urn:ogc:def:crs:EPSG::32767")
    path = scenes.write(tmp_path / "b.tif", pixels(), crs=None)
    assert place(path).crs == ""


def test_e67_points_of_reference_alone_are_no_place(tmp_path):
    points = [
        rasterio.control.GroundControlPoint(r, c, 10 * c, 10 * r)
        for r, c in ((0, 0), (0, 60), (40, 60))
    ]
    assert from_gcps(points)
    path = scenes.write(tmp_path / "a.tif", pixels(), transform=Affine.identity())
    with rasterio.open(path, "r+") as file:
        file.gcps = (points, CRS.from_epsg(32633))
    assert place(path) is None


def test_e67_other_programs_find_it_on_the_map(tmp_path):
    """By the name of the reference system, a corner of the scene has its longitude."""
    path = scenes.write(tmp_path / "a.tif", pixels())
    found = segmenter().predict(path).polygons()
    name = found["crs"]["properties"]["name"]
    corner = {"type": "Point", "coordinates": [500_000, 5_600_000]}
    assert transform_geom(name, "OGC:CRS84", corner)["coordinates"][0] == pytest.approx(15)

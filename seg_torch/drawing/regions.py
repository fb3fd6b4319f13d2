"""Masks as annotations for other programs: of COCO, and polygons with holes in GeoJSON (RFC 7946).

COCO's format is that of Lin et al., Microsoft COCO: Common Objects in Context (2014); the encoding
by run lengths, which can have holes, is done by its authors' library, pycocotools.

The outlines of polygons are those of marching squares (Lorensen and Cline, Marching Cubes, 1987, in
two dimensions), found by contourpy. They run half-way between the centres of neighbouring pixels,
one inside and one outside, so that a polygon holds the centres of its own pixels and no others.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from contourpy import FillType, contour_generator
from PIL import Image
from pycocotools import mask as rle

from seg_torch.labels import IGNORE_INDEX, Labels

Ring = list[list[float]]  # x and y of its points; the first one again at the end


def coco_annotations(mask: np.ndarray) -> list[dict[str, Any]]:
    """Return one annotation for each class that occurs in a mask.

    Args:
        mask: Class ids, uint8 [H, W]; pixels of 255 belong to no class.

    Returns:
        Dictionaries with `category_id` (the class id), `segmentation` (compressed run lengths:
        `size` [H, W] and `counts`), `area` (number of pixels), `bbox` ([x, y, width, height]) and
        `iscrowd` (0: the tools accept run lengths with it, and leave crowds out of training).
    """
    columns_first = np.asfortranarray(mask)
    annotations = []
    for category, area in enumerate(Image.fromarray(mask).histogram()[:IGNORE_INDEX]):
        if area:
            encoded = rle.encode((columns_first == category).view(np.uint8))
            encoded["counts"] = encoded["counts"].decode()
            annotation = {"category_id": category, "segmentation": encoded, "area": area}
            box = [int(side) for side in rle.toBbox(encoded)]
            annotations.append({**annotation, "bbox": box, "iscrowd": 0})
    return annotations


def write_coco(
    path: str, images: Iterable[tuple[str, int, int, list[dict[str, Any]]]], labels: Labels
) -> None:
    """Write a COCO dataset, one image after the other.

    Args:
        path: Of the JSON file.
        images: File name, width, height and annotations of each.
        labels: Their names become the categories; category ids are class ids.
    """
    categories = [{"id": i, "name": name} for i, name in enumerate(labels.names)]
    entries: list[dict[str, Any]] = []
    number = 0
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')
        for name, width, height, annotations in images:
            entry = {"id": len(entries) + 1, "file_name": name, "width": width, "height": height}
            entries.append(entry)
            for annotation in annotations:
                file.write(",\n" if number else "\n")
                number += 1
                json.dump({**annotation, "id": number, "image_id": len(entries)}, file)
        file.write(f'],\n"images": {json.dumps(entries)}}}\n')


def polygon_features(
    mask: np.ndarray, labels: Labels, matrix: Sequence[float] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a GeoJSON Feature, a polygon with holes, for each connected region of a class.

    Pixels that only touch at a corner are not connected. Coordinates are in pixels, x to the right
    and y down: (0, 0) is the corner of the image, (0.5, 0.5) the centre of its first pixel. Filling
    the polygons by the centres of pixels gives the mask back.

    Args:
        mask: Class ids, uint8 [H, W]; pixels of 255 belong to no class.
        labels: The classes.
        matrix: a, b, c, d, e, f: coordinates are a x + b y + c and d x + e y + f instead of x and
            y, and the points of a ring come in the order that RFC 7946 says.

    Yields:
        In the order of the classes, with the properties `class_id`, `name`, `colour` (#rrggbb) and
        `area` (number of pixels).
    """
    for class_id, pixels in enumerate(Image.fromarray(mask).histogram()[:IGNORE_INDEX]):
        if not pixels:
            continue
        name, colour = labels.names[class_id], labels.colour(class_id)
        for rings, area in _polygons(mask == class_id):
            if matrix is not None:
                rings = [_moved(ring, matrix) for ring in rings]
            properties = {"class_id": class_id, "name": name, "colour": colour, "area": area}
            geometry = {"type": "Polygon", "coordinates": rings}
            yield {"type": "Feature", "properties": properties, "geometry": geometry}


def collection(crs: str = "") -> dict[str, Any]:
    """Return a FeatureCollection without features.

    RFC 7946 has no other coordinates than longitude and latitude on WGS 84, "where all involved
    parties have a prior arrangement" excepted. Its arrangement is the member `crs` of GeoJSON 2008,
    which GDAL and QGIS write and read.
    """
    named = {"crs": {"type": "name", "properties": {"name": crs}}} if crs else {}
    return {"type": "FeatureCollection", **named, "features": []}


def write_polygons(
    path: str,
    mask: np.ndarray,
    labels: Labels,
    matrix: Sequence[float] | None = None,
    crs: str = "",
) -> None:
    """Write the FeatureCollection of a mask, one polygon after the other."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(collection(crs), separators=(",", ":"))[: -len("]}")])
        for number, feature in enumerate(polygon_features(mask, labels, matrix)):
            file.write(",\n" if number else "\n")
            file.write(json.dumps(feature, separators=(",", ":")))
        file.write("]}\n")


def _moved(ring: Ring, matrix: Sequence[float]) -> Ring:
    """Return a ring in other coordinates, in which its area has the sign that it had."""
    a, b, c, d, e, f = matrix
    moved = [[a * x + b * y + c, d * x + e * y + f] for x, y in ring]
    return moved if a * e > b * d else moved[::-1]


def _polygons(region: np.ndarray) -> Iterator[tuple[list[Ring], int]]:
    """Yield the rings of each connected part, the outer one first, and its number of pixels."""
    top, bottom = np.flatnonzero(region.any(1))[[0, -1]]
    left, right = np.flatnonzero(region.any(0))[[0, -1]]
    padded = np.pad(region[top : bottom + 1, left : right + 1], 1)
    contours: Any = contour_generator(z=padded, fill_type=FillType.ChunkCombinedOffsetOffset)
    [points], [starts], [parts] = contours.filled(0.5, 2)
    # Counted from the corner of the image, no longer from the centre of the border's first pixel.
    points += (left - 0.5, top - 0.5)

    last = starts[1:] - 1  # of each ring: its first point again
    following = np.roll(points, -1, axis=0)
    previous = np.roll(points, 1, axis=0)
    previous[starts[:-1]] = points[last - 1]
    corners = _cross(points - previous, following - points) != 0
    corners[last] = False

    # The shoelace formula, negative for holes. A ring cuts a triangle of 1/8 pixel off wherever its
    # pixels have a corner and fills one where they have a notch. There are four corners more.
    doubled = _cross(points, following)
    doubled[last] = 0
    areas = np.add.reduceat(doubled, starts[:-1]) / 2
    pixels = np.rint(areas + np.copysign(0.5, areas)).astype(int)

    ends = np.cumsum(corners)[last].tolist()
    kept = points[corners].tolist()
    rings = [kept[a:b] + kept[a : a + 1] for a, b in pairwise([0, *ends])]
    for a, b in pairwise(parts.tolist()):
        yield rings[a:b], int(pixels[a:b].sum())


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]

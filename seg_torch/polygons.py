"""Masks as COCO polygons (Lin et al., Microsoft COCO: Common Objects in Context, 2014).

COCO polygons have no notion of a hole, and tools fill every ring of an annotation. So a region with
holes is one ring: around the outside, along a cut to a hole, around the hole the other way, back
along the same cut. The cut has no width, and every tool that fills polygons leaves the hole open.

Coordinates are COCO's: x to the right and y down from the corner of the picture, so that the centre
of the first pixel is (0.5, 0.5). Outlines run midway between the centres of pixels that belong to
the class and of those that do not; filling them gives the pixels of the mask back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from contourpy import FillType, contour_generator
from PIL import Image

from seg_torch.labels import IGNORE_INDEX, Labels


def coco_annotations(mask: np.ndarray) -> list[dict[str, Any]]:
    """One annotation for each class that occurs in a mask.

    Args:
        mask: class ids, uint8 [H, W]; pixels of 255 belong to no class.

    Returns:
        Dictionaries with `category_id` (the class id), `segmentation` (a list of rings
        [x, y, x, y, ...]), `area` (in pixels, counted), `bbox` ([x, y, width, height]) and
        `iscrowd` (0).
    """
    annotations = []
    for category, area in enumerate(Image.fromarray(mask).histogram()[:IGNORE_INDEX]):
        if area == 0:
            continue
        inside = mask == category
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        top, left = int(rows[0]), int(columns[0])
        height, width = int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left
        annotations.append(
            {
                "category_id": category,
                "segmentation": _rings(inside[top : top + height, left : left + width], left, top),
                "area": area,
                "bbox": [left, top, width, height],
                "iscrowd": 0,
            }
        )
    return annotations


def write_coco(
    path: str, pictures: Iterable[tuple[str, int, int, list[dict[str, Any]]]], labels: Labels
) -> None:
    """Writes a COCO dataset, one picture after the other.

    Args:
        path: of the JSON file.
        pictures: file name, width, height and annotations of each.
        labels: whose names become the categories; their ids are the class ids.
    """
    categories = [{"id": i, "name": name} for i, name in enumerate(labels.names)]
    images: list[dict[str, Any]] = []
    number = 0
    with open(path, "w") as file:
        file.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')
        for name, width, height, annotations in pictures:
            images.append(
                {"id": len(images) + 1, "file_name": name, "width": width, "height": height}
            )
            for annotation in annotations:
                file.write(",\n" if number else "\n")
                number += 1
                json.dump({**annotation, "id": number, "image_id": len(images)}, file)
        file.write(f'],\n"images": {json.dumps(images)}}}\n')


def _rings(inside: np.ndarray, left: int, top: int) -> list[list[float]]:
    """The outlines of a boolean mask [H, W] whose corner lies at (left, top)."""
    padded = np.pad(inside, 1).astype(np.float32)
    contours = contour_generator(z=padded, fill_type=FillType.OuterOffset)
    rings = []
    for points, offsets in zip(*contours.filled(0.5, 1.5), strict=True):
        # Pixel (0, 0) has its centre at (1, 1) of the padded grid and at (0.5, 0.5) of COCO.
        points = points - 0.5 + (left, top)
        outer, *holes = (
            _without_straight_points(points[start:end]) for start, end in pairwise(offsets)
        )
        cut = [point for hole in holes for point in (*hole, outer[0])]
        rings.append(np.concatenate([outer, *([cut] if cut else [])]).ravel().tolist())
    return rings


def _without_straight_points(ring: np.ndarray) -> np.ndarray:
    """A closed ring [N, 2] without the points at which it does not turn."""
    before = ring[1:] - np.roll(ring[1:], 1, axis=0)
    after = np.roll(before, -1, axis=0)
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    corners = ring[1:][turns]
    return np.concatenate([corners, corners[:1]])

"""Masks as COCO annotations with run-length encoded areas.

The format is that of Lin et al., Microsoft COCO: Common Objects in Context (2014); the encoding is
done by its authors' library, pycocotools. Runs of pixels, unlike polygons, can have holes.
"""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from seg_torch.labels import IGNORE_INDEX, Labels


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

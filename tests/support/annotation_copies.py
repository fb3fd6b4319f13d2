"""Tiny copies of what annotation tools write, and the masks that are read of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import make_data
import numpy as np
from PIL import Image

FORMATS = [
    *("coco", "coco_panoptic", "cvat", "label_studio", "labelme", "labelme_voc", "roboflow"),
    "yolo",
]
HEIGHT, WIDTH = make_data.HEIGHT, make_data.WIDTH


def tiny_copy(root: Path, name: str) -> Path:
    """Make the tiny copy of a format in a folder, which is returned."""
    getattr(make_data, f"make_{name}")(root)
    return root


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def every_mask(dataset: Any) -> dict[str, np.ndarray]:
    """The masks of a dataset by the last part of their names."""
    return {Path(pair.name).name: dataset.mask(i) for i, pair in enumerate(dataset.pairs)}


def all_masks(read: Callable[..., Any], root: Path, **options: Any) -> dict[str, np.ndarray]:
    """Those of train and val."""
    return every_mask(read(root, "train", **options)) | every_mask(read(root, "val", **options))


def saved_table(
    folder: Path,
    column: str = "label",
    splits: Sequence[str] = ("train", "validation"),
    names: Sequence[str] = ("unlabeled", "car", "sky"),
) -> Path:
    """A folder as `save_to_disk` of the library `datasets` writes it, and its `id2label.json`."""
    import datasets as hub

    features = hub.Features(
        {"image": hub.Image(), column: hub.Image(), "caption": hub.Value("string")}
    )
    parts = {}
    for start, split in enumerate(splits):
        indices = range(5 * start, 5 * start + 5 - start)
        parts[split] = hub.Dataset.from_dict(
            {
                "image": [make_data.picture(i) for i in indices],
                column: [Image.fromarray(make_data.tool_mask(i)) for i in indices],
                "caption": ["" for _ in indices],
            },
            features=features,
        )
    hub.DatasetDict(parts).save_to_disk(folder)
    ids = {str(i): name for i, name in enumerate(names)}
    make_data.write_json(folder / "id2label.json", ids)
    return folder

"""labelme and X-AnyLabeling: a JSON file for each image."""

import base64
import math
import posixpath
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from seg_torch.datasets import base
from seg_torch.datasets.annotations import annotated
from seg_torch.errors import InputError
from seg_torch.images.read import opened, read_image

LINE_WIDTH, POINT_RADIUS = 10, 5  # labelme's own, in pixels
KEPT = ("shape_type", "points", "mask")  # what is drawn of a shape
# Corners one after the other: those of labelme, and two that X-AnyLabeling has beside them.
POLYGONS = ("polygon", "oriented_rectangle", "rotation", "quadrilateral")
# How many points a shape has, where it is not any number of them.
POINTS = {"rectangle": 2, "circle": 2, "line": 2, "point": 1, "mask": 2}


def labelme(
    root: str | Path,
    split: str,
    background: str | None = "background",
    val_fraction: float = 0.2,
    seed: int = 0,
) -> annotated.AnnotatedDataset:
    """Return images annotated with labelme, or with X-AnyLabeling, which writes the same files.

    `root` holds a JSON file for each image, with subfolders, and the images beside them, elsewhere
    or inside the JSON files (`imageData`). Folders of them, or of the images, that are named train,
    val (or valid) and test make the split; else `train.txt` and `val.txt` do, or a hash of each
    name.

    Shapes are drawn as labelme draws them: lines 10 pixels wide, points as discs with a radius of
    5. Where shapes overlap, the later one in the file lies on top. The label `_background_` means
    the background, `__ignore__` pixels that are not labelled. The classes are the lines of
    `labels.txt`, where `root` has it; else those found, sorted by name.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".
        background: Name of the class of pixels outside of all shapes, the first one unless the
            labels have it; `None`: these pixels are not labelled.
        val_fraction: Fraction of the images in val, where nothing else makes the split.
        seed: Seed of that random split.

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, there are no annotations, a file is malformed, an image
            is missing, two files annotate one, or a label is not in `labels.txt`.
    """
    source = "annotate images with labelme and keep its JSON files beside them"
    home, files = annotated.files_in(root, (".json",), "labelme annotations", "IMAGE.json", source)
    return annotated.dataset(
        home, files, _read, _draw, split, background, val_fraction, seed, LabelmeDataset
    )


class LabelmeDataset(annotated.AnnotatedDataset):
    """Images with labelme's annotations, some of which hold their image."""

    def image(self, index: int) -> np.ndarray:
        """Return the image alone, uint8 [H, W, 3]."""
        pair = self.pairs[index]
        if pair.image != pair.mask:
            return super().image(index)
        with base.parsing(pair.mask, "imageData: "):
            content = base64.b64decode(base.read_json(pair.mask)["imageData"])
            return read_image(pair.mask, content, self.format.white)


def is_labelme(content: Any) -> bool:
    """Return whether the content of a JSON file has the parts of labelme's."""
    return isinstance(content, dict) and {"shapes", "imagePath"} <= content.keys()


def _read(folder: annotated.AnnotatedFolder) -> list[str]:
    """Read all files; those that are not labelme's are left out."""
    path = folder.home / "labels.txt"
    listed = base.read_list(path) if path.is_file() else []
    names: set[str] = set()
    for file, content in folder.contents(is_labelme, "annotations of labelme"):
        with folder.part(file):
            for number, shape in enumerate(content["shapes"], 1):
                if not isinstance(shape["label"], str | int) or shape["label"] == "":
                    raise InputError(f"shape {number}: its label is {shape['label']!r}")
            shapes = [
                (str(shape["label"]), {key: shape.get(key) for key in KEPT})
                for shape in content["shapes"]
            ]
            used = {name for name, _ in shapes}
            if listed and not used <= {*listed}:
                raise InputError(f"{sorted(used.difference(listed))} are not in labels.txt")
            image = file  # holds it
            with suppress(InputError) if content.get("imageData") else nullcontext():
                image = folder.find_image(content["imagePath"], file)
            size = int(content.get("imageWidth") or 0), int(content.get("imageHeight") or 0)
            folders = [f"{posixpath.dirname(path)}/" for path in (file, image)]
            split = base.split_of(folders[0]) or base.split_of(folders[1])
            folder.add(file, image, file, shapes, split, size)
            names |= used
    special = {annotated.BACKGROUND, annotated.IGNORED}
    return listed or [*sorted(names & special), *sorted(names - special)]


def _draw(mask: Image.Image, value: int, shape: dict[str, Any]) -> None:
    """Draw one of labelme's shapes, as its `shape_to_mask` does."""
    kind, draw = shape["shape_type"] or "polygon", ImageDraw.Draw(mask)
    corners = kind == "rectangle" and len(shape["points"]) == 4  # of X-AnyLabeling
    if kind in POLYGONS or corners:
        return annotated.draw_polygon(mask, value, shape["points"])
    points = annotated.checked_points(mask, shape["points"], 2 if kind == "linestrip" else 1)
    if len(points) != POINTS.get(kind, len(points)):
        raise InputError(f"a {kind} of {len(points)} points, it has {POINTS[kind]}")
    (x0, y0), (x1, y1) = points[0], points[-1]
    if kind == "rectangle":
        box = [(min(x0, x1), min(y0, y1)), (max(x0, x1), max(y0, y1))]
        draw.rectangle(box, fill=value, outline=value)
    elif kind == "circle":
        draw.circle((x0, y0), math.hypot(x1 - x0, y1 - y0), fill=value, outline=value)
    elif kind in ("line", "linestrip"):
        draw.line(points, fill=value, width=LINE_WIDTH)
    elif kind in ("point", "points"):
        for point in points:
            draw.circle(point, POINT_RADIUS, fill=value, outline=value)
    elif kind == "mask":
        with opened("its mask", "a mask", base64.b64decode(shape["mask"])) as image:
            annotated.draw_pixels(mask, value, np.array(image), int(x0), int(y0))
    else:
        raise InputError(f"shapes of the type {kind!r} are not known")
    return None

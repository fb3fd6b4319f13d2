"""YOLO's polygons, as Ultralytics, CVAT and Roboflow write them."""

import posixpath
import re
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from seg_torch.datasets import base
from seg_torch.datasets.annotations import annotated
from seg_torch.errors import InputError
from seg_torch.images.read import IMAGE_SUFFIXES

# What data.yaml calls the splits.
KEYS = {"train": "train", "val": "val", "valid": "val", "test": "test"}


def yolo(
    root: str | Path,
    split: str,
    background: str | None = "background",
    val_fraction: float = 0.2,
    seed: int = 0,
) -> annotated.AnnotatedDataset:
    """Return images with YOLO's text files of polygons.

    `root` holds `data.yaml` (or another YAML file) with `names`, and with `train`, `val` and
    `test`: folders of images, text files that list images, or lists of these. The annotation of
    `images/a.jpg` is `labels/a.txt`, one object per line: class id, x and y of each corner as
    fractions of the image. An image without such a file has no objects. Without `val` in
    `data.yaml` the split is made as in `folder`.

    Of objects that overlap, the smaller one lies on top, as in Ultralytics' own masks.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".
        background: Name of the class of pixels outside of all objects, the first one unless
            `names` has it; `None`: these pixels are not labelled.
        val_fraction: Fraction of the images in val, where nothing else makes the split.
        seed: Seed of that random split.

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, `data.yaml` or what it names is missing, or a text file
            is malformed or has boxes in place of polygons.
    """
    source = "export YOLO segmentation with images from the annotation tool and unpack it there"
    home, files = annotated.files_in(root, (".yaml", ".yml"), "A YOLO dataset", "data.yaml", source)
    config = "data.yaml" if "data.yaml" in files else files[0]
    return annotated.dataset(home, [config], _read, _draw, split, background, val_fraction, seed)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return what a `data.yaml` holds, which has `names` and a split at least.

    Raises:
        InputError: It has not, or is no YAML.
    """
    with base.parsing(path):
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(content, dict) or not content.get("names") or not KEYS.keys() & content:
            raise InputError("it has no names of classes, or no train and val: no YOLO dataset")
        return content


def _read(folder: annotated.AnnotatedFolder) -> list[str]:
    """Read all text files that belong to the images of `data.yaml`."""
    config = folder.home / folder.files[0]
    content = read_yaml(config)
    with base.parsing(config, "names: "):
        names = content["names"]
        classes = names if isinstance(names, dict) else dict(enumerate(names))
        classes = {int(i): str(name) for i, name in sorted(classes.items())}
    images = [
        (split, image) for key, split in KEYS.items() for image in _images(config, content, key)
    ]
    has_val = {"train", "val"} <= {split for split, _ in images}
    for split, image in images:
        # The last folder of that name, as Ultralytics has it.
        below = re.sub(r"(.*/|^)images/", r"\1labels/", image)
        text = Path(annotated.name_of(below) + ".txt")
        name = image.removeprefix(f"{folder.home.as_posix()}/")
        with folder.collected():
            shapes = _polygons(text, classes) if text.exists() else []
            file = str(text if text.exists() else config)
            folder.add(name, image, file, shapes, split if has_val or split == "test" else "")
    return list(dict.fromkeys(classes.values()))


def _images(config: Path, content: dict[str, Any], key: str) -> list[str]:
    """Return the paths of the images of a split."""
    entries = content.get(key) or []
    images: list[str] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        path = _find(config, content, str(entry))
        if path is None and key == "test":
            continue  # Roboflow names one, whether there is one or not
        if path is None:
            raise InputError(f"{config}: {key}: {entry} does not exist in {config.parent}")
        if path.is_dir():
            images += [f"{path.as_posix()}/{f}" for f in base.list_files(path, IMAGE_SUFFIXES)]
        else:
            paths = {line: _find(config, content, line) for line in base.read_list(path)}
            missing = [line for line, image in paths.items() if image is None]
            what = f"images that {path} lists do not exist"
            base.raise_problems(missing, what, f"{path} lists this image, but it does not exist")
            images += [image.as_posix() for image in paths.values() if image is not None]
    return images


def _find(config: Path, content: dict[str, Any], entry: str) -> Path | None:
    """Return the path of an entry, relative to `path` or to the file itself, if it exists.

    Files are moved after they were written, and Roboflow writes `../train/images` for a folder
    beside `data.yaml`.
    """
    home, stated = config.parent, Path(str(content.get("path") or ""))
    inside = entry.lstrip("./") if entry.startswith(".") else entry
    for path in (home / stated / entry, home / entry, home / inside, home / stated.name / inside):
        if path.exists():
            return Path(posixpath.normpath(path.as_posix()))
    return None


def _polygons(path: Path, classes: dict[int, str]) -> list[tuple[str, list[float]]]:
    """Return class and coordinates of each line, the largest polygon first."""
    shapes = []
    for number, line in enumerate(base.read_list(path), 1):
        with base.parsing(path, f"object {number}: "):
            first, *values = map(float, line.split())
            if int(first) != first or int(first) not in classes:
                raise InputError(f"class {first:g} is not in the names {[*classes]} of data.yaml")
            if len(values) == 4:
                raise InputError("4 numbers are a box; export polygons (YOLO segmentation)")
            if len(values) % 2:
                raise InputError(f"{len(values)} numbers are no pairs of x and y")
            shapes.append((classes[int(first)], values))
    return sorted(shapes, key=lambda shape: -_area(shape[1]))


def _area(coordinates: list[float]) -> float:
    """Return the area of a polygon x0, y0, x1, y1 ..., by the shoelace formula."""
    x, y = np.array(coordinates).reshape(-1, 2).T
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


def _draw(mask: Image.Image, value: int, shape: list[float]) -> None:
    """Draw a polygon x0, y0, x1, y1 ... of fractions of the image."""
    annotated.draw_polygon(mask, value, np.reshape(shape, (-1, 2)) * mask.size)

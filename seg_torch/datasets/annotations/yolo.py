"""YOLO's polygons, as Ultralytics, CVAT and Roboflow write them."""

import posixpath
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from seg_torch.datasets import base
from seg_torch.datasets.annotations import annotated
from seg_torch.errors import InputError
from seg_torch.images.read import IMAGE_SUFFIXES


def yolo(
    root: str | Path,
    split: str,
    background: str | None = "background",
    val_fraction: float = 0.2,
    seed: int = 0,
) -> annotated.AnnotatedDataset:
    """Return images with YOLO's text files of polygons.

    `root` holds `data.yaml` (or another YAML file) with `names`, and with `train`, `val` (or valid,
    validation) and `test`: folders of images, text files that list images, or lists of these. The
    annotation of `images/a.jpg` is `labels/a.txt`, one object per line: class id, x and y of each
    corner as fractions of the image. An image without such a file has no objects. Without `val` in
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
        InputError: The split is unknown, `data.yaml` or what it names is missing, no image has a
            text file, or one is malformed or has boxes or poses in place of polygons.
    """
    source = "export YOLO segmentation with images from the annotation tool and unpack it there"
    home, files = annotated.files_in(root, (".yaml", ".yml"), "A YOLO dataset", "data.yaml", source)
    if "data.yaml" in files:
        files = ["data.yaml"]
    config = next((file for file in files if is_yolo(home / file)), files[0])
    content = read_yaml(home / config)
    # A train.txt that data.yaml names is no list of `folder`: CVAT writes one without a val.txt.
    listed = any(str(content[key]).endswith(".txt") for key in _keys(content))
    return annotated.dataset(
        home,
        [config],
        _read,
        _draw,
        split,
        background,
        val_fraction,
        seed,
        lists=home / config if listed else home,
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Return what a `data.yaml` holds, which has `names` and a split at least.

    Raises:
        InputError: It has not, is no YAML, or is that of a dataset of poses.
    """
    with base.parsing(path):
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(content, dict) or not content.get("names") or not _keys(content):
            raise InputError("it has no names of classes, or no train and val: no YOLO dataset")
        if content.get("kpt_shape"):
            raise InputError("kpt_shape: these are poses; export polygons (YOLO segmentation)")
        return content


def is_yolo(path: Path) -> bool:
    """Return whether a YAML file is that of a YOLO dataset."""
    with suppress(InputError):
        return bool(read_yaml(path))
    return False


def _keys(content: dict[str, Any]) -> dict[str, str]:
    """Return which split the keys of a `data.yaml` stand for, such as `validation` for val."""
    return {key: split for key in map(str, content) if (split := base.split_of(key))}


def _read(folder: annotated.AnnotatedFolder) -> list[str]:
    """Read all text files that belong to the images of `data.yaml`."""
    config = folder.home / folder.files[0]
    content = read_yaml(config)
    with base.parsing(config, "names: "):
        names = content["names"]
        if not isinstance(names, dict | list):
            raise InputError(f"{names!r} is no list of class names")
        classes = names if isinstance(names, dict) else dict(enumerate(names))
        classes = {int(i): str(name) for i, name in sorted(classes.items())}
    keys = _keys(content)
    for key, entry in content.items():
        if key not in (*keys, "path") and isinstance(entry, str) and _find(config, content, entry):
            folder.leave_out("entries of data.yaml that are neither train, val nor test", key)
    images = [
        (split, image) for key, split in keys.items() for image in _images(config, content, key)
    ]
    images = [each for split in base.SPLITS for each in _annotated(config, images, split)]
    has_val = {"train", "val"} <= {split for split, _ in images}
    home = f"{posixpath.normpath(folder.home.absolute().as_posix())}/"
    texts: dict[str, str] = {}
    for split, image in images:
        text = _text_of(image)
        name = image.removeprefix(home)
        with folder.collected():
            if texts.setdefault(str(text), image) != image:
                raise InputError(f"{texts[str(text)]} and {image} are both annotated in {text}")
            shapes = _polygons(text, classes) if text.exists() else []
            file = text.as_posix().removeprefix(home) if text.exists() else folder.files[0]
            folder.add(name, name, file, shapes, split if has_val or split == "test" else "")
    for parent in sorted({Path(text).parent for text in texts}):
        if "labels" in parent.parts:
            there = {str(parent / file) for file in base.list_files(parent, (".txt",))}
            for other in sorted(there - texts.keys()):
                folder.leave_out("text files without an image", other)
    return list(dict.fromkeys(classes.values()))


def _annotated(config: Path, images: list[tuple[str, str]], split: str) -> list[tuple[str, str]]:
    """Return the images of a split, none for a test set without text files, which has no labels.

    Raises:
        InputError: No image for training or validation has a text file.
    """
    chosen = [each for each in images if each[0] == split]
    if not chosen or any(_text_of(image).exists() for _, image in chosen):
        return chosen
    if split == "test":
        return []
    image = chosen[0][1]
    raise InputError(
        f"{config}: none of {len(chosen)} images of {split} has a text file: of {image} it is "
        f"{_text_of(image)}"
    )


def _text_of(image: str) -> Path:
    """Return the path of the text file that annotates an image."""
    # The last folder of that name, as Ultralytics has it.
    below = re.sub(r"(.*/|^)images/", r"\1labels/", image)
    return Path(annotated.name_of(below) + ".txt")


def _images(config: Path, content: dict[str, Any], key: str) -> list[str]:
    """Return the paths of the images of a split."""
    entries = content.get(key) or []
    images: list[str] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        path = _find(config, content, str(entry))
        if path is None and base.split_of(key) == "test":
            continue  # Roboflow names one, whether there is one or not
        if path is None:
            raise InputError(f"{config}: {key}: {entry} does not exist in {config.parent}")
        if path.is_dir():
            images += [f"{path.as_posix()}/{f}" for f in base.list_files(path, IMAGE_SUFFIXES)]
        else:
            paths = {line: _find_listed(config, content, line) for line in base.read_list(path)}
            missing = [line for line, image in paths.items() if image is None]
            what = f"images that {path} lists do not exist"
            base.raise_problems(missing, what, f"{path} lists this image, but it does not exist")
            images += [image.as_posix() for image in paths.values() if image is not None]
    if entries:
        annotated.refuse_empty(f"{config}: {key}: {entries}", base.split_of(key), images)
    return images


def _find(config: Path, content: dict[str, Any], entry: str) -> Path | None:
    """Return the path of an entry, relative to `path` or to the file itself, if it exists.

    Files are moved after they were written, and Roboflow writes `../train/images` for a folder
    beside `data.yaml`.
    """
    home, stated = config.parent.absolute(), Path(str(content.get("path") or ""))
    inside = entry.lstrip("./") if entry.startswith(".") else entry
    for path in (home / stated / entry, home / entry, home / inside, home / stated.name / inside):
        if path.exists():
            return Path(posixpath.normpath(path.as_posix()))
    return None


def _find_listed(config: Path, content: dict[str, Any], line: str) -> Path | None:
    """Return the path of a listed image, if it exists.

    CVAT writes `data/images/train/a.jpg` for `images/train/a.jpg`, others absolute paths.
    """
    parts = line.replace("\\", "/").split("/")
    places = ["/".join(parts[start:]) for start in range(max(len(parts) - 1, 1))]
    return next((path for place in places if (path := _find(config, content, place))), None)


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
    return sorted(shapes, key=lambda shape: -annotated.polygon_area(annotated.pairs(shape[1])))


def _draw(mask: Image.Image, value: int, shape: list[float]) -> None:
    """Draw a polygon x0, y0, x1, y1 ... of fractions of the image."""
    annotated.draw_polygon(mask, value, np.reshape(shape, (-1, 2)) * mask.size)

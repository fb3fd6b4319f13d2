"""COCO's JSON, as CVAT, Roboflow, Label Studio and `predict` write it, and COCO panoptic."""

import json
import logging
import posixpath
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from seg_torch.datasets import base
from seg_torch.datasets.annotations import annotated
from seg_torch.errors import InputError
from seg_torch.images.convert import upright
from seg_torch.images.read import opened
from seg_torch.labels import IGNORE_INDEX

log = logging.getLogger(__name__)


def coco(
    root: str | Path,
    split: str,
    background: str | None = "background",
    val_fraction: float = 0.2,
    seed: int = 0,
) -> annotated.AnnotatedDataset:
    """Return images with COCO annotations (Lin et al., ECCV 2014).

    `root` holds one or several JSON files, itself or in folders such as `annotations` or `train`,
    and the images anywhere. Files whose names or folders say train, val (or valid) and test make
    the split, or folders of the images do; else `train.txt` and `val.txt`, or a hash of each
    image's name. Where there are `instances_*.json`, other files beside them are not read. Several
    files may annotate the same images, such as one for each class.

    Polygons are filled, several of one object together; run lengths, which can have holes, are
    read in both forms. Of objects that overlap the smaller one lies on top, by the area that the
    file gives; crowds (`iscrowd`) belong to their class and lie below all objects. Classes are the
    categories in the order of their ids, whether they have objects or not; the category that
    stands for a project of Roboflow is none. An image without objects is background.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".
        background: Name of the class of pixels outside of all objects, the first one unless the
            categories have it; `None`: these pixels are not labelled.
        val_fraction: Fraction of the images in val, where nothing else makes the split.
        seed: Seed of that random split.

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, there are no annotations, a file is malformed, or images
            or categories are missing.
    """
    home, files = _files(root, "COCO annotations", "instances", "annotations.json and its images")
    return annotated.dataset(home, files, _read, _draw, split, background, val_fraction, seed)


def coco_panoptic(
    root: str | Path, split: str, val_fraction: float = 0.2, seed: int = 0
) -> annotated.AnnotatedDataset:
    """Return images with COCO panoptic annotations (Kirillov et al., CVPR 2019).

    `root` holds JSON files such as `annotations/panoptic_train2017.json`, of each the PNG files in
    a folder of the same name without `.json`, beside it or elsewhere, or in its own folder (as in
    Mapillary Vistas), and the images anywhere. The split is made as in `coco`. Things and stuff are
    classes, in the order of their ids; pixels of no segment (0) are not labelled, and images
    without segments are left out.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".
        val_fraction: Fraction of the images in val, where nothing else makes the split.
        seed: Seed of that random split.

    Returns:
        The samples of the split.

    Raises:
        InputError: As `coco`, or a PNG file is missing.
    """
    home, files = _files(
        root, "COCO panoptic", "panoptic", "panoptic_train.json, its PNG files and the images"
    )
    return annotated.dataset(
        home, files, _read_panoptic, _draw, split, None, val_fraction, seed, PanopticDataset
    )


class PanopticDataset(annotated.AnnotatedDataset):
    """Images with masks of segments, whose ids are the colours of a PNG file."""

    def mask(self, index: int) -> np.ndarray:
        """Return the mask alone, uint8 [H, W].

        Raises:
            InputError: The PNG file cannot be read, or has a colour that is no segment.
        """
        path = self.pairs[index].mask
        with opened(path, "a mask") as image:
            red, green, blue = np.moveaxis(np.array(upright(image).convert("RGB"), np.int32), 2, 0)
        segments, inverse = np.unique(red + 256 * green + 65536 * blue, return_inverse=True)
        ids = {0: IGNORE_INDEX} | {i: self.values[name] for name, i in self.shapes(index)}
        unknown = [i for i in segments.tolist() if i not in ids]
        if unknown:
            raise InputError(f"{path}: segments {unknown[:5]} are not in the segments_info")
        table = np.array([ids[i] for i in segments.tolist()], np.uint8)
        return table[inverse].reshape(red.shape)


def _files(root: str | Path, dataset: str, prefix: str, expected: str) -> tuple[Path, list[str]]:
    """Return the folder and its JSON files: those of the prefix where there are any."""
    source = "export COCO JSON with images from the annotation tool and unpack it there"
    home, files = annotated.files_in(root, (".json",), dataset, expected, source)
    named = [file for file in files if posixpath.basename(file).startswith(f"{prefix}_")]
    others = [file for file in files if file not in named]
    if named and others:
        log.info("%s: beside %s, not read are %s", home, named[0], ", ".join(others[:5]))
    return home, named or files


def is_coco(content: Any) -> bool:
    """Return whether the content of a JSON file has the parts of a COCO dataset."""
    parts = ("images", "annotations", "categories")
    return isinstance(content, dict) and all(isinstance(content.get(p), list) for p in parts)


class _File(NamedTuple):
    """What a file holds: images by id, annotations, and the names of the categories by id."""

    images: dict[str, dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: dict[int, str]


def _contents(folder: annotated.AnnotatedFolder) -> tuple[dict[str, _File], list[str]]:
    """Return what the COCO files of a folder hold, and the names of the classes in order."""
    what = "COCO dataset, which has the lists images, annotations and categories"
    contents: dict[str, _File] = {}
    first_ids: dict[str, int] = {}
    for file, content in folder.contents(is_coco, what):
        for part in ("images", "annotations", "categories"):
            wrong = [entry for entry in content[part] if not isinstance(entry, dict)]
            if wrong:
                raise InputError(f"{folder.home / file}: {part}: {wrong[0]!r} is no object {{...}}")
        categories: dict[int, str] = {}
        with base.parsing(folder.home / file, "categories: "):
            for category in content["categories"]:
                if not isinstance(category["name"], str | int):
                    raise InputError(f"one has the name {category['name']!r}")
                number, name = _id(category["id"]), str(category["name"])
                if categories.setdefault(number, name) != name:
                    raise InputError(f"the id {number} is that of {categories[number]} and {name}")
            project = _project(file, content)
            categories = {i: name for i, name in categories.items() if i != project}
        for number, name in categories.items():
            first_ids[name] = min(number, first_ids.get(name, number))
        images: dict[str, dict[str, Any]] = {}
        with base.parsing(folder.home / file, "images: "):
            for image in content["images"]:
                other = images.setdefault(str(image["id"]), image)["file_name"]
                if other != image["file_name"]:
                    names = f"{other} and {image['file_name']}"
                    raise InputError(f"the id {image['id']} is that of {names}")
        contents[file] = _File(images, content["annotations"], categories)
    return contents, sorted(first_ids, key=first_ids.__getitem__)


def _project(file: str, content: dict[str, Any]) -> int | None:
    """Return the id of the category that stands for a project of Roboflow, if this is one."""
    of_roboflow = "roboflow" in str(content.get("info")).lower()
    if of_roboflow or posixpath.basename(file) == "_annotations.coco.json":
        ordered = sorted(content["categories"], key=lambda category: _id(category["id"]))
        first: dict[str, Any] = ordered[0] if ordered else {}
        groups = {category.get("supercategory") for category in content["categories"]}
        if first.get("supercategory") == "none" and first.get("name") in groups:
            return _id(first["id"])
    return None


def _id(value: Any) -> int:
    """Return the id of a category, which some tools write as text."""
    try:
        if int(value) == float(value):
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"the id {value!r} is no whole number")


class _Image(NamedTuple):
    """An image, the file that annotates it, its size, and order, class and shape of its objects."""

    path: str
    file: str
    size: tuple[int, int]
    objects: list[tuple[float, str, Any]]


def _read(folder: annotated.AnnotatedFolder) -> list[str]:
    """Read all images of all files; those of an image that several files annotate are united."""
    contents, names = _contents(folder)
    found: dict[tuple[str, str], _Image] = {}
    united: dict[str, str] = {}
    for file, (images, annotations, categories) in contents.items():
        annotated.refuse_empty(folder.home / file, base.split_of(file), images)
        of_file: dict[str, _Image] = {}
        for number, image in images.items():
            with folder.part(file, f"image {number}: "):
                path, size = folder.find_image(image["file_name"], file), _size(image)
                split = base.split_of(file) or base.split_of(f"{posixpath.dirname(path)}/")
                each = found.setdefault((path, split), _Image(path, file, size, []))
                if (0, 0) != size != each.size:
                    if each.size != (0, 0):
                        raise InputError(f"it has {size} pixels, in {each.file} {each.size}")
                    each = found[path, split] = each._replace(size=size)
                if each.file != file:
                    united[path] = f"{each.file} and {file}"
                of_file[number] = each
        for annotation in annotations:
            with folder.part(file, f"annotation {annotation.get('id')}: "):
                number = str(annotation["image_id"])
                if number not in images:
                    raise InputError(f"image {number} is not in the images")
                if number in of_file:
                    of_file[number].objects.append(_object(annotation, categories))
    for path, files in [*united.items()][:1]:
        log.info("%s: %d images, such as %s, are in %s", folder.home, len(united), path, files)
    for (path, split), each in found.items():
        if split or not any((path, other) in found for other in base.SPLITS):
            shapes = [item[1:] for item in sorted(each.objects, key=lambda item: item[0])]
            folder.add(path, path, each.file, shapes, split, each.size)
    return names


def _size(image: Mapping[str, Any]) -> tuple[int, int]:
    """Return width and height of an image, (0, 0) where the file says null, as Label Studio does.

    Raises:
        InputError: One is no number.
    """
    width, height = (_number(image[side] or 0, side) for side in ("width", "height"))
    return (int(width), int(height)) if width and height else (0, 0)


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"its {what} is {value!r}, which is no number") from None


def _object(annotation: Mapping[str, Any], categories: Mapping[int, str]) -> tuple[float, str, Any]:
    """Return what an annotation's place is sorted by, crowds and then by area, class and shape."""
    if "segments_info" in annotation:
        raise InputError("it has segments_info, so this is data=coco_panoptic")
    category, shape = _id(annotation["category_id"]), annotation["segmentation"]
    if category not in categories:
        raise InputError(f"category {category} is not in the categories {[*categories]}")
    if not shape:
        raise InputError("it has no segmentation, only a box; export polygons or masks")
    order, area = -np.inf, annotation.get("area")
    if not _number(annotation.get("iscrowd") or 0, "iscrowd"):
        order = -(_area(shape) if area is None else _number(area, "area"))
    return order, categories[category], {"id": annotation.get("id"), "segmentation": shape}


def _area(shape: Any) -> float:
    """Return the area of polygons or run lengths in pixels."""
    if isinstance(shape, dict):
        lengths = _run_lengths(shape)
        counts = lengths["counts"]
        return float(sum(counts[1::2]) if isinstance(counts, list) else rle.area(lengths))
    return sum(annotated.polygon_area(annotated.pairs(ring)) for ring in _rings(shape))


def _rings(shape: Any) -> list[list[Any]]:
    """Return the polygons of a segmentation; a single one may be without the outer list."""
    if isinstance(shape, list) and all(isinstance(value, int | float) for value in shape):
        return [shape]
    if not isinstance(shape, list) or not all(isinstance(ring, list) for ring in shape):
        raise _no_segmentation(shape)
    return shape


def _run_lengths(shape: dict[str, Any]) -> dict[str, Any]:
    """Return run lengths of the types and signs that pycocotools takes for granted."""
    size, counts = shape.get("size"), shape.get("counts")
    lists = [size, counts] if isinstance(counts, list) else [size]
    if not isinstance(counts, list | str) or not all(
        isinstance(values, list) and all(isinstance(v, int) and v >= 0 for v in values)
        for values in lists
    ):
        raise _no_segmentation(shape)
    return shape


def _no_segmentation(shape: Any) -> InputError:
    text = textwrap.shorten(json.dumps(shape), 80, placeholder=" ...")
    forms = "[[x0, y0, x1, y1, ...], ...] or {size: [height, width], counts: ...}"
    return InputError(f"its segmentation is {text}; polygons are expected, or run lengths: {forms}")


def _draw(mask: Image.Image, value: int, shape: dict[str, Any]) -> None:
    """Draw the segmentation of an annotation: polygons, or run lengths."""
    segmentation, (width, height) = shape["segmentation"], mask.size
    with base.parsing(f"annotation {shape['id']}"):
        if not isinstance(segmentation, dict):
            # pycocotools takes whatever coordinates there are, and ends the process.
            points = [annotated.checked_points(mask, ring, 3) for ring in _rings(segmentation)]
            flat = [np.ravel(ring).tolist() for ring in points]
            lengths = rle.merge(rle.frPyObjects(flat, height, width))
        else:
            lengths = _run_lengths(segmentation)
            if lengths["size"] != [height, width]:
                raise InputError(
                    f"the size of the run lengths is {lengths['size']}, not {[height, width]}"
                )
            if isinstance(lengths["counts"], list):
                if sum(lengths["counts"]) != height * width:
                    raise InputError(f"the run lengths add up to {sum(lengths['counts'])} pixels")
                lengths = rle.frPyObjects(lengths, height, width)
        annotated.draw_pixels(mask, value, rle.decode(lengths))


def _read_panoptic(folder: annotated.AnnotatedFolder) -> list[str]:
    """Read all images of all files; their shapes are the ids of the segments."""
    contents, names = _contents(folder)
    maps: dict[tuple[str, int], str] = {}
    for file, content in contents.items():
        for number, annotation in enumerate(content.annotations):
            with folder.part(file, f"image {annotation.get('image_id')}: "):
                if "segments_info" not in annotation:
                    raise InputError("it has no segments_info, so this may be data=coco")
                maps[file, number] = _find_map(folder, file, annotation["file_name"])
    # An image may be a PNG file of the same name.
    pngs = {*maps.values()}
    for name, paths in folder.images.items():
        folder.images[name] = [path for path in paths if path not in pngs]
    for file, (images, annotations, categories) in contents.items():
        annotated.refuse_empty(folder.home / file, base.split_of(file), images)
        for number, annotation in enumerate(annotations):
            with folder.part(file, f"image {annotation.get('image_id')}: "):
                if (file, number) not in maps:
                    continue
                image = str(annotation["image_id"])
                if image not in images:
                    raise InputError(f"image {image} is not in the images")
                path = folder.find_image(images[image]["file_name"], file)
                split = base.split_of(file) or base.split_of(f"{posixpath.dirname(path)}/")
                segments = _segments(annotation["segments_info"], categories)
                folder.add(path, path, maps[file, number], segments, split)
    return names


def _find_map(folder: annotated.AnnotatedFolder, file: str, name: str) -> str:
    """Return the path of a PNG file of segments, below the folder."""
    stem, home = posixpath.basename(file).removesuffix(".json"), posixpath.dirname(file)
    images = folder.images.get(annotated.same_name(posixpath.basename(name)), [])
    below = posixpath.join(home, stem, name)
    elsewhere = [image for image in images if f"/{image}".endswith(f"/{stem}/{name}")]
    beside = posixpath.join(home, name)
    if below in images or (not elsewhere and beside in images):
        return below if below in images else beside
    return folder.find_image(f"{stem}/{name}", file)


def _segments(infos: list[dict[str, Any]], categories: Mapping[int, str]) -> list[tuple[str, int]]:
    """Return class and id of each segment; category 0 without a name is not labelled."""
    names = {0: annotated.IGNORED} | dict(categories)
    segments: dict[int, str] = {}
    if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
        raise InputError(f"its segments_info are {infos!r}, which is no list of objects {{...}}")
    for info in infos:
        number, category = _id(info["id"]), _id(info["category_id"] or 0)
        if category not in names:
            raise InputError(f"category {category} is not in the categories {[*categories]}")
        if segments.setdefault(number, names[category]) != names[category]:
            raise InputError(f"the segment {number} has two classes")
    return [(name, number) for number, name in segments.items()]

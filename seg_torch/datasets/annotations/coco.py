"""COCO's JSON, as CVAT, Roboflow, Label Studio and `predict` write it, and COCO panoptic."""

import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from seg_torch.datasets import base
from seg_torch.datasets.annotations import annotated
from seg_torch.errors import InputError
from seg_torch.images.convert import upright
from seg_torch.images.read import opened
from seg_torch.labels import IGNORE_INDEX


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
    the split; else `train.txt` and `val.txt` do, or a hash of each image's name. Where there are
    `instances_*.json`, other files beside them are not read.

    Polygons are filled, several of one object together; run lengths, which can have holes, are
    read in both forms. Of objects that overlap the smaller one lies on top, by the area that the
    file gives; crowds (`iscrowd`) belong to their class and lie below all objects. Classes are the
    categories in the order of their ids; one that only names others' `supercategory` is none.

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
    a folder of the same name without `.json`, beside it or elsewhere, and the images anywhere. The
    split is made as in `coco`. Things and stuff are classes, in the order of their ids; pixels of
    no segment (0) are not labelled.

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
    return home, named or files


def is_coco(content: Any) -> bool:
    """Return whether the content of a JSON file has the parts of a COCO dataset."""
    parts = ("images", "annotations", "categories")
    return isinstance(content, dict) and all(isinstance(content.get(p), list) for p in parts)


def _contents(folder: annotated.AnnotatedFolder) -> tuple[dict[str, Any], dict[int, str]]:
    """Return what the COCO files of a folder hold, and all categories by id, in order."""
    what = "COCO dataset, which has the lists images, annotations and categories"
    contents = dict(folder.contents(is_coco, what))
    names: dict[int, str] = {}
    used, groups = set(), set()
    for file, content in contents.items():
        with base.parsing(folder.home / file, "categories: "):
            for category in content["categories"]:
                number, name = int(category["id"]), str(category["name"])
                if names.setdefault(number, name) != name:
                    raise InputError(f"{number} is {name!r}, in another file {names[number]!r}")
                groups.add(category.get("supercategory"))
        with base.parsing(folder.home / file, "annotations: "):
            for annotation in content["annotations"]:
                segments = annotation.get("segments_info", [annotation])
                used |= {int(segment["category_id"]) for segment in segments}
    # Roboflow gives the project itself the id 0.
    return contents, {i: names[i] for i in sorted(names) if i in used or names[i] not in groups}


def _read(folder: annotated.AnnotatedFolder) -> list[str]:
    """Read all images of all files."""
    contents, categories = _contents(folder)
    for file, content in contents.items():
        with base.parsing(folder.home / file, "images: "):
            sizes = {i["id"]: (int(i["width"]), int(i["height"])) for i in content["images"]}
        shapes: dict[Any, list[tuple[float, str, Any]]] = {number: [] for number in sizes}
        for annotation in content["annotations"]:
            with folder.part(file, f"annotation {annotation.get('id')}: "):
                image = annotation["image_id"]
                if image not in sizes:
                    raise InputError(f"image {image} is not in the images")
                order, name = _order_and_class(annotation, categories, sizes[image])
                shapes[image].append((order, name, annotation["segmentation"]))
        for image in content["images"]:
            with folder.part(file, f"image {image['id']}: "):
                path = folder.find_image(image["file_name"], file)
                ordered = sorted(shapes[image["id"]], key=lambda shape: shape[0])
                named = [(name, shape) for _, name, shape in ordered]
                folder.add(path, path, file, named, base.split_of(file), sizes[image["id"]])
    return list(dict.fromkeys(categories.values()))


def _order_and_class(
    annotation: Mapping[str, Any], categories: Mapping[int, str], size: tuple[int, int]
) -> tuple[float, str]:
    """Return what an annotation's place is sorted by, crowds and then by area, and its class."""
    category, shape = annotation["category_id"], annotation["segmentation"]
    if category not in categories:
        raise InputError(f"category {category} is not in the categories {[*categories]}")
    if not shape:
        raise InputError("it has no segmentation, only a box; export polygons or masks")
    if annotation.get("iscrowd"):
        return -np.inf, categories[category]
    area = annotation.get("area")
    return -float(rle.area(_encoded(shape, *size)) if area is None else area), categories[category]


def _encoded(shape: Any, width: int, height: int) -> dict[str, Any]:
    """Return polygons or run lengths as compressed run lengths."""
    if isinstance(shape, list):
        return rle.merge(rle.frPyObjects([[*map(float, ring)] for ring in shape], height, width))
    if list(shape["size"]) != [height, width]:
        raise InputError(f"the size of the run lengths is {shape['size']}, not {[height, width]}")
    if isinstance(shape["counts"], list):
        if sum(shape["counts"]) != height * width:
            raise InputError(f"the run lengths add up to {sum(shape['counts'])} pixels")
        return rle.frPyObjects(shape, height, width)
    return shape


def _draw(mask: Image.Image, value: int, shape: Any) -> None:
    """Draw a COCO segmentation: a list of polygons, or run lengths."""
    if isinstance(shape, list):
        for ring in shape:
            annotated.checked_points(mask, ring, 3)
    annotated.draw_pixels(mask, value, rle.decode(_encoded(shape, *mask.size)))


def _read_panoptic(folder: annotated.AnnotatedFolder) -> list[str]:
    """Read all images of all files; their shapes are the ids of the segments."""
    contents, categories = _contents(folder)
    for file, content in contents.items():
        with base.parsing(folder.home / file, "images: "):
            file_names = {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in content["annotations"]:
            with folder.part(file, f"image {annotation.get('image_id')}: "):
                path = folder.find_image(file_names[annotation["image_id"]], file)
                png = folder.find_image(f"{Path(file).stem}/{annotation['file_name']}", file)
                segments = [
                    (categories[segment["category_id"]], segment["id"])
                    for segment in annotation["segments_info"]
                ]
                folder.add(path, path, png, segments, base.split_of(file))
    return list(dict.fromkeys(categories.values()))

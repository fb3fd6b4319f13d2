"""Label Studio's JSON export: polygons, brushes, bitmasks, rectangles and ellipses."""

import base64
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageDraw

from seg_torch.datasets import base
from seg_torch.datasets.annotations import annotated
from seg_torch.errors import InputError
from seg_torch.images.read import opened

# The kinds of regions that have an area, and where their class is.
KINDS = ("polygonlabels", "brushlabels", "bitmasklabels", "rectanglelabels", "ellipselabels")
WITHOUT_LABEL = ("polygon", "brush", "bitmask", "rectangle", "ellipse")


def label_studio(
    root: str | Path,
    split: str,
    background: str | None = "background",
    val_fraction: float = 0.2,
    seed: int = 0,
) -> annotated.AnnotatedDataset:
    """Return images annotated with Label Studio.

    `root` holds the file of the export "JSON" (not JSON-MIN) and the images, in any folder, with
    or without the eight characters that Label Studio puts in front of uploaded names. Files named
    train, val and test make the split, or folders of the images do; else it is made as in `folder`.

    Polygons, brushes (run lengths), bitmasks, rectangles and ellipses are drawn in the order of the
    file: where they overlap, the later one lies on top. Regions without an area, such as key
    points, are counted and left out, unless a class or an image has no others. Of several
    annotations of an image the ground truth counts or, without one, the one that was changed last;
    cancelled ones and predictions do not count, and images without annotation are left out. The
    classes are those found, sorted by name.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".
        background: Name of the class of pixels outside of all regions, the first one unless the
            labels have it; `None`: these pixels are not labelled.
        val_fraction: Fraction of the images in val, where nothing else makes the split.
        seed: Seed of that random split.

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, there is no export, it is malformed, an image is
            missing, or two tasks annotate one.
    """
    source = "export JSON from Label Studio, and put it and the images there"
    home, files = annotated.files_in(
        root, (".json",), "A Label Studio export", "project.json", source
    )
    return annotated.dataset(home, files, _read, _draw, split, background, val_fraction, seed)


def is_label_studio(content: Any) -> bool:
    """Return whether the content of a JSON file is a list of Label Studio's tasks."""
    tasks = content if isinstance(content, list) else []
    parts = {"annotations", "data"}
    return bool(tasks) and all(isinstance(task, dict) and parts <= task.keys() for task in tasks)


def _read(folder: annotated.AnnotatedFolder) -> list[str]:
    """Read all tasks of the files that hold some."""
    names: set[str] = set()
    without_area: set[str] = set()
    tasks: dict[str, str] = {}
    for file, content in folder.contents(is_label_studio, "annotated tasks of Label Studio"):
        for task in content:
            number = f"task {task.get('id')}"
            with folder.part(file, f"{number}: "):
                results = _results(task["annotations"])
                if results is None:
                    folder.leave_out("tasks without annotation", number)
                    continue
                regions = [r for r in results if r["type"] in (*KINDS, *WITHOUT_LABEL)]
                others = [r for r in results if r not in regions]
                for other in others:
                    folder.leave_out(f"results of the type {other['type']}", number)
                lost = {str(name) for r in others for name in _labels(r)}
                if lost and not regions:
                    raise InputError(f"its regions have no area, so {sorted(lost)} would be lost")
                shapes = [_shape(region) for region in regions]
                path = _image(folder, task["data"], file)
                first = tasks.setdefault(path, f"{number} of {file}")
                if first != f"{number} of {file}":
                    raise InputError(f"{path} is annotated in {first}, too; delete one of the two")
                split = base.split_of(file) or base.split_of(f"{posixpath.dirname(path)}/")
                folder.add(path, path, file, shapes, split, _size(regions))
                names |= {name for name, _ in shapes}
                without_area |= lost
    if without_area - names:
        classes = sorted(without_area - names)
        folder.problems.append(f"{folder.home}: all regions of {classes} are without an area")
    return sorted(names)


def _labels(result: Mapping[str, Any]) -> list[Any]:
    """Return the classes of a region, none of what is said of the whole image."""
    is_region = str(result["type"]).endswith("labels")
    return result["value"].get(result["type"], []) if is_region else []


def _size(regions: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return (width, height) of the image that regions were drawn on, (0, 0) without any."""
    images = {
        (r.get("to_name"), int(r["original_width"]), int(r["original_height"])) for r in regions
    }
    if len(images) > 1:
        raise InputError(f"its regions are on several images: {sorted(map(str, images))}")
    return images.pop()[1:] if images else (0, 0)


def _results(annotations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Return the regions of the annotation that counts, `None` where there is none."""
    finished = [each for each in annotations if not each.get("was_cancelled")]
    order = [(bool(each.get("ground_truth")), str(each.get("updated_at"))) for each in finished]
    return finished[order.index(max(order))]["result"] if finished else None


def _shape(result: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return class and shape of a region."""
    kind, value = result["type"], result["value"]
    if kind in WITHOUT_LABEL:
        raise InputError(f"region {result.get('id')}: its label is a tag of its own; use {KINDS}")
    if result.get("image_rotation"):
        raise InputError(f"region {result.get('id')}: the image was turned in Label Studio")
    if len(value[kind]) != 1:
        raise InputError(f"region {result.get('id')}: {len(value[kind])} labels, it takes one")
    if not isinstance(value[kind][0], str):
        raise InputError(f"region {result.get('id')}: its label is {value[kind][0]!r}")
    return value[kind][0], {"kind": kind, **value}


def _image(folder: annotated.AnnotatedFolder, data: Mapping[str, Any], file: str) -> str:
    """Return the path of a task's image: its own name, or the one that it was uploaded with."""
    # `image` is the name in Label Studio's templates.
    address = data.get("image") or next((v for v in data.values() if isinstance(v, str)), None)
    if not isinstance(address, str):
        raise InputError(f"its data name no image: {[*data]}")
    if re.match(r"\w+://", address):
        address = address.split("?")[0]  # a signature
    path = unquote(address.split("?d=")[-1]).replace("\\", "/")
    name = posixpath.basename(path)
    if annotated.same_name(name) not in folder.images:
        path = re.sub(r"^[0-9a-f]{8}-", "", name)
    return folder.find_image(path, file)


def _draw(mask: Image.Image, value: int, shape: dict[str, Any]) -> None:
    """Draw a region; all of its lengths are percentages of the image's sides."""
    kind, size = shape["kind"], np.array(mask.size)
    if kind == "polygonlabels":
        annotated.draw_polygon(mask, value, annotated.pairs(shape["points"]) * size / 100)
    elif kind == "brushlabels":
        opacity = decode_brush(shape["rle"], mask.height, mask.width)
        annotated.draw_pixels(mask, value, opacity >= 128)
    elif kind == "bitmasklabels":
        annotated.draw_pixels(mask, value, _bitmask(shape["imageDataURL"], mask.size) >= 128)
    else:
        # What is turned or round may go over the edge, but begins inside.
        corner = np.array([shape["x"], shape["y"]]) * size / 100
        (start,) = annotated.checked_points(mask, corner, 1)
        if kind == "ellipselabels":
            radii = np.array([shape["radiusX"], shape["radiusY"]]) * size / 100
            angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
            corners = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii
        else:
            width, height = np.array([shape["width"], shape["height"]]) * size / 100
            corners = np.array([(0, 0), (width, 0), (width, height), (0, height)])
        turn = np.deg2rad(shape.get("rotation", 0))  # clockwise, about (x, y)
        matrix = [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
        points = (corners @ matrix + start).ravel().tolist()
        ImageDraw.Draw(mask).polygon(points, fill=value, outline=value)


def _bitmask(address: str, size: tuple[int, int]) -> np.ndarray:
    """Return the opacity of a bitmask, a PNG file of black on nothing in a data URL."""
    content = base64.b64decode(address.partition("base64,")[2])
    with opened("its bitmask", "a mask", content) as image:
        if image.size != size or "A" not in image.getbands():
            raise InputError(
                f"a bitmask in mode {image.mode} of {image.width} x {image.height} pixels; "
                f"expected is RGBA of {size[0]} x {size[1]}"
            )
        return np.array(image.getchannel("A"))


def decode_brush(content: Sequence[int], height: int, width: int) -> np.ndarray:
    """Return the opacity of a brush region.

    The bytes are a stream of bits in the format of thi.ng/rle-pack: 32 for the number of values
    (four for each pixel, of which the last is the opacity), 5 for their width less one, four times
    4 for the widths of run lengths less one. Then come runs: 1 bit whether it is one value
    repeated, 2 bits which width its length has, the length less one, and one value or all of them.

    Args:
        content: The bytes.
        height: Of the image.
        width: Of the image.

    Returns:
        uint8 [H, W].

    Raises:
        InputError: It is cut off, or of another size.
    """
    bits = np.unpackbits(np.array(content, np.uint8))
    text = (bits + ord("0")).tobytes()
    offset = 0

    def number(length: int) -> int:
        nonlocal offset
        offset += length
        return int(text[offset - length : offset], 2)

    count, bits_of_value = number(32), number(5) + 1
    if count != 4 * height * width or bits_of_value != 8:
        raise InputError(f"a brush of {count // 4} pixels on an image of {width} x {height}")
    lengths = [number(4) + 1 for _ in range(4)]
    values, start = np.zeros(count, np.uint8), 0
    while start < count:
        repeated = number(1)
        end = start + number(lengths[number(2)]) + 1
        if repeated:
            values[start:end] = number(8)
        else:
            each = bits[offset : offset + 8 * (end - start)]
            if len(each) < 8 * (end - start):
                raise InputError("the run lengths of a brush are cut off")
            values[start:end] = np.packbits(each)
            offset += len(each)
        start = end
    return values.reshape(height, width, 4)[..., 3]

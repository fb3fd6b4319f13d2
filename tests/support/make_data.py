"""Tiny copies of each dataset in its exact format on disk, with made-up images.

`make_NAME(root)` writes what `seg_torch.datasets.NAME(root, split)` reads.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from scipy.io import savemat
from scipy.sparse import csc_matrix

HEIGHT, WIDTH = 48, 64
VOID = 255


def picture(index: int, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Smooth colours with some grain, RGB."""
    rng = np.random.default_rng(index)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray(
        (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype("uint8")
    )


def blocks(
    index: int, ids: list[int], void: int | None = VOID, height: int = HEIGHT, width: int = WIDTH
) -> np.ndarray:
    """A mask of three vertical bands, with a rim of void between them, uint8 [H, W]."""
    mask = np.zeros((height, width), np.uint8)
    for band in range(3):
        mask[:, band * width // 3 :] = ids[(3 * index + band) % len(ids)]
    if void is not None:
        mask[:, width // 3 - 1 : width // 3 + 1] = void
    return mask


def save(image: Image.Image | np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path)


def save_palette_png(mask: np.ndarray, path: Path) -> None:
    """As VOC's masks: indices with a palette whose colours have nothing to do with their value."""
    image = Image.fromarray(mask)
    image.putpalette(bytes(range(255, -1, -1)) * 3)
    save(image, path)


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def make_folder(root: Path) -> None:
    """Ten pairs, one of them in a subfolder, with three classes as grey indices."""
    names = [f"photo_{i}" for i in range(9)] + ["more/photo_9"]
    for i, name in enumerate(names):
        save(picture(i), root / "images" / f"{name}.jpg")
        save(blocks(i, [0, 1, 2]), root / "masks" / f"{name}.png")
    write_lines(root / "classes.txt", ["# my classes", "", "background", "traffic light", "car"])


def make_camvid(root: Path) -> None:
    for split, count in (("train", 4), ("val", 3)):
        lines = []
        for i in range(count):
            name = f"0001TP_{i:06}.png"
            save(picture(i), root / split / name)
            save(blocks(i, list(range(11)), void=11), root / f"{split}annot" / name)
            prefix = "/SegNet/CamVid"
            lines.append(f"{prefix}/{split}/{name} {prefix}/{split}annot/{name}")
        write_lines(root / f"{split}.txt", lines)


# Two of train, one of val and two of test, in the standard split.
CAMVID32_FRAMES = (
    "0001TP_008520",
    "0016E5_08640",
    "0016E5_07961",
    "0001TP_008550",
    "Seq05VD_f00000",
)


def make_camvid32(root: Path) -> None:
    colours = np.array([(128, 64, 128), (128, 128, 128), (0, 0, 0), (64, 192, 0)], np.uint8)
    for i, name in enumerate(CAMVID32_FRAMES):
        save(picture(i), root / "701_StillsRaw_full" / f"{name}.png")
        mask = colours[blocks(i, [0, 1, 2, 3], void=None)]
        save(mask, root / "LabeledApproved_full" / f"{name}_L.png")


def make_clothing(root: Path) -> None:
    """Six annotated photos and one without annotation, as most of the real ones are."""
    for i in range(1, 8):
        save(picture(i, 64, 48), root / "photos" / f"{i:04}.jpg")
    annotations = root / "annotations" / "pixel-level"
    annotations.mkdir(parents=True)
    for i in range(1, 7):
        mask = blocks(i, [0, 19, 41, 58], void=None, height=64, width=48)
        savemat(annotations / f"{i:04}.mat", {"groundtruth": mask})


def make_voc(root: Path) -> None:
    voc = root / "VOCdevkit" / "VOC2012"
    for split, start, count in (("train", 0, 4), ("val", 4, 5)):
        names = [f"2007_{i:06}" for i in range(start, start + count)]
        for i, name in enumerate(names, start):
            save(picture(i), voc / "JPEGImages" / f"{name}.jpg")
            save_palette_png(blocks(i, list(range(21))), voc / "SegmentationClass" / f"{name}.png")
        write_lines(voc / "ImageSets" / "Segmentation" / f"{split}.txt", names)


def make_voc_sbd(root: Path) -> None:
    """SBD as its archive unpacks: one image of VOC train, one of VOC val, three of its own."""
    make_voc(root)
    sbd = root / "benchmark_RELEASE" / "dataset"
    train = ["2007_000001", "2007_000005", "2008_000001"]
    val = ["2008_000002", "2008_000003"]
    (sbd / "cls").mkdir(parents=True)
    for i, name in enumerate(train + val):
        save(picture(20 + i), sbd / "img" / f"{name}.jpg")
        edges = np.empty((20, 1), object)
        edges[:, 0] = [csc_matrix((HEIGHT, WIDTH), dtype=np.uint8) for _ in range(20)]
        mask = blocks(i, [0, 7, 20], void=None)
        fields = {
            "Boundaries": edges,
            "Segmentation": mask,
            "CategoriesPresent": np.array([[7], [20]], np.uint8),
        }
        savemat(sbd / "cls" / f"{name}.mat", {"GTcls": fields})
    write_lines(sbd / "train.txt", train)
    write_lines(sbd / "val.txt", val)


def make_pet(root: Path) -> None:
    pet = root / "oxford-iiit-pet"
    for listing, start, count in (("trainval", 1, 4), ("test", 5, 3)):
        names = [f"Abyssinian_{i}" for i in range(start, start + count)]
        for i, name in enumerate(names, start):
            save(picture(i), pet / "images" / f"{name}.jpg")
            mask = blocks(i, [1, 2, 3], void=None)
            save(mask, pet / "annotations" / "trimaps" / f"{name}.png")
        write_lines(pet / "annotations" / f"{listing}.txt", [f"{name} 1 1 1" for name in names])


def make_cityscapes(root: Path) -> None:
    ids = [0, 1, 4, 7, 8, 11, 23, 24, 26, 33]
    for split, city, count in (("train", "aachen", 3), ("val", "lindau", 2), ("test", "bonn", 1)):
        for i in range(count):
            name = f"{city}_{i:06}_000019"
            save(picture(i), root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
            mask = blocks(i, ids if split != "test" else [3], void=None)
            home = root / "gtFine" / split / city
            save(mask, home / f"{name}_gtFine_labelIds.png")
            save(mask, home / f"{name}_gtFine_instanceIds.png")


def make_ade20k(root: Path) -> None:
    home = root / "ADEChallengeData2016"
    for split, short, count in (("training", "train", 3), ("validation", "val", 2)):
        for i in range(count):
            name = f"ADE_{short}_{i + 1:08}"
            save(picture(i), home / "images" / split / f"{name}.jpg")
            save(blocks(i, [1, 2, 75, 150], void=0), home / "annotations" / split / f"{name}.png")


def make_coco_stuff(root: Path) -> None:
    for split, count in (("train2017", 3), ("val2017", 2)):
        for i in range(count):
            name = f"{i + 139:012}"
            save(picture(i), root / "images" / split / f"{name}.jpg")
            mask = blocks(i, [0, 10, 12, 89, 91, 181])
            save(mask, root / "stuffthingmaps" / split / f"{name}.png")


# Exports of annotation tools. What is annotated is the same in all of them that can express it.

NAMES = ["car", "traffic light"]


def polygon(index: int, number: int) -> list[list[float]]:
    """Corners of the object `number` of an image: a car is larger and below its traffic light."""
    x, y = 6 + 3 * index, 8 + 2 * index
    if number == 0:
        return [[x, y + 6], [x + 10, y], [x + 30, y + 2], [x + 32, y + 18], [x + 4, y + 20]]
    return [[x + 12, y + 4], [x + 20, y + 4], [x + 18, y + 14]]


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def coco_content(names: list[str], start: int = 0) -> dict[str, Any]:
    """As the files of COCO 2017, with polygons, both kinds of run lengths and a crowd."""
    images, annotations = [], []
    for i, name in enumerate(names, start):
        images.append({"id": i + 100, "file_name": name, "width": WIDTH, "height": HEIGHT})
        ring = [[value for point in polygon(i, number) for value in point] for number in (0, 1)]
        square = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
        square[40:44, 2:8] = 1
        ring_of_pixels = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
        ring_of_pixels[0:7, 50:57] = 1
        ring_of_pixels[2:5, 52:55] = 0  # a hole
        compressed = rle.encode(ring_of_pixels)
        compressed["counts"] = compressed["counts"].decode()
        flat = square.ravel(order="F")
        ends = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff([0, *ends, flat.size]).tolist()
        segmentations = [
            # The smaller object first: not the order of the file decides which lies on top.
            (7, [ring[1]], 0),
            (3, [ring[0]], 0),
            (3, {"size": [HEIGHT, WIDTH], "counts": counts}, 1),
            (7, compressed, 0),
        ]
        for category, segmentation, crowd in segmentations:
            encoded = segmentation
            if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
                encoded = rle.frPyObjects(segmentation, HEIGHT, WIDTH)
            encoded = rle.merge(encoded) if isinstance(encoded, list) else encoded
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 100,
                    "category_id": category,
                    "segmentation": segmentation,
                    "area": float(rle.area(encoded)),
                    "bbox": rle.toBbox(encoded).tolist(),
                    "iscrowd": crowd,
                }
            )
    return {
        "info": {"description": "made up", "year": 2017},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": 7, "name": NAMES[1], "supercategory": "outdoor"},
            {"id": 3, "name": NAMES[0], "supercategory": "vehicle"},
        ],
    }


def make_coco(root: Path) -> None:
    """The layout of COCO 2017, with another file of annotations beside the instances."""
    for split, start, count in (("train2017", 0, 4), ("val2017", 4, 2)):
        names = [f"{i:012}.jpg" for i in range(start, start + count)]
        for i, name in enumerate(names, start):
            save(picture(i), root / split / name)
        write_json(
            root / "annotations" / f"instances_{split}.json", coco_content(names, start=start)
        )
        write_json(root / "annotations" / f"captions_{split}.json", {"annotations": []})


def make_coco_panoptic(root: Path) -> None:
    ids = {3: 1000, 7: 70000}  # category: segment
    for split, start, count in (("train2017", 0, 4), ("val2017", 4, 2)):
        images, annotations = [], []
        for i in range(start, start + count):
            name = f"{i:012}"
            save(picture(i), root / split / f"{name}.jpg")
            segments = blocks(i, [0, 1, 2], void=None).astype(np.int32)
            segments = np.array([0, *ids.values()])[segments]
            rgb = np.stack([segments % 256, segments // 256 % 256, segments // 65536], axis=2)
            png = root / "annotations" / f"panoptic_{split}" / f"{name}.png"
            save(rgb.astype(np.uint8), png)
            images.append({"id": i, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT})
            infos = [
                {"id": segment, "category_id": category, "iscrowd": 0, "area": 1, "bbox": []}
                for category, segment in ids.items()
            ]
            annotations.append({"image_id": i, "file_name": f"{name}.png", "segments_info": infos})
        categories = [
            {
                "id": 3,
                "name": "car",
                "isthing": 1,
                "color": [0, 0, 142],
                "supercategory": "vehicle",
            },
            {"id": 7, "name": "sky", "isthing": 0, "color": [70, 130, 180], "supercategory": "sky"},
        ]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_json(root / "annotations" / f"panoptic_{split}.json", content)


def labelme_shape(label: str, points: list[list[float]], kind: str, mask: Any = None) -> dict:
    return {
        "label": label,
        "points": points,
        "group_id": None,
        "description": "",
        "shape_type": kind,
        "flags": {},
        "mask": mask,
    }


def write_labelme(path: Path, shapes: list[dict], image: str, data: str | None = None) -> None:
    content = {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": image,
        "imageData": data,
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
    }
    write_json(path, content)


def make_labelme(root: Path) -> None:
    """Images beside their JSON, elsewhere (as labelme on Windows says it) and inside it."""
    for i in range(6):
        shapes = [labelme_shape(NAMES[number], polygon(i, number), "polygon") for number in (0, 1)]
        if i == 1:
            shapes.append(labelme_shape("sign", [[60, 10], [50, 2]], "rectangle"))
            shapes.append(labelme_shape("sign", [[10, 40], [10, 44]], "circle"))
        if i == 2:
            shapes.append(labelme_shape("pole", [[2, 2], [2, 46]], "line"))
            shapes.append(labelme_shape("pole", [[60, 2], [50, 20], [60, 46]], "linestrip"))
            shapes.append(labelme_shape("sign", [[30, 40]], "point"))
            shapes.append(labelme_shape("sign", [[40, 40], [50, 40]], "points"))
        if i == 3:
            corner = Image.fromarray(np.eye(4, dtype=np.uint8))
            shapes.append(labelme_shape("sign", [[55, 1], [58, 4]], "mask", png(corner)))
            shapes.append(labelme_shape("__ignore__", [[0, 40], [20, 47]], "rectangle"))
        if i < 4:
            save(picture(i), root / f"photo_{i}.jpg")
            write_labelme(root / f"photo_{i}.json", shapes, f"photo_{i}.jpg")
        elif i == 4:
            save(picture(i), root / "images" / f"photo_{i}.jpg")
            write_labelme(root / "json" / f"photo_{i}.json", shapes, f"..\\images\\photo_{i}.jpg")
        else:
            write_labelme(root / f"photo_{i}.json", shapes, f"photo_{i}.jpg", png(picture(i)))


def tool_mask(index: int) -> np.ndarray:
    """The class ids of `polygon`, with background 0, as bands that a tool would have drawn."""
    return blocks(index, [0, 1, 2], void=None)


def make_cvat(root: Path) -> None:
    colours = np.array([(0, 0, 0), (250, 50, 83), (51, 221, 255)], np.uint8)
    names = ["background", *NAMES]
    lines = [f"{n}:{r},{g},{b}::" for n, (r, g, b) in zip(names, colours.tolist(), strict=True)]
    write_lines(root / "labelmap.txt", ["# label:color_rgb:parts:actions", *lines])
    files = ["photo_0", "photo_1", "photo_2", "more/photo_3", "photo_4"]
    for i, name in enumerate(files):
        save(picture(i), root / "JPEGImages" / f"{name}.jpg")
        save(colours[tool_mask(i)], root / "SegmentationClass" / f"{name}.png")
        save(colours[tool_mask(i)], root / "SegmentationObject" / f"{name}.png")
    write_lines(root / "ImageSets" / "Segmentation" / "default.txt", files)


def make_labelme_voc(root: Path) -> None:
    write_lines(root / "class_names.txt", ["_background_", *NAMES])
    for i in range(5):
        name = f"2011_{i:06}"
        mask = tool_mask(i)
        mask[:2] = VOID  # -1 in memory
        save(picture(i), root / "JPEGImages" / f"{name}.jpg")
        save_palette_png(mask, root / "SegmentationClass" / f"{name}.png")
        save(picture(i), root / "SegmentationClassVisualization" / f"{name}.jpg")


def make_roboflow(root: Path) -> None:
    for split, start, count in (("train", 0, 3), ("valid", 3, 2), ("test", 5, 1)):
        for i in range(start, start + count):
            name = f"photo_{i}_jpg.rf.{i:032x}"
            save(picture(i), root / split / f"{name}.jpg")
            save(tool_mask(i), root / split / f"{name}_mask.png")
        lines = ["Pixel Value, Class", *(f"{i}, {n}" for i, n in enumerate(["background", *NAMES]))]
        write_lines(root / split / "_classes.csv", lines)


def make_yolo(root: Path) -> None:
    """As Ultralytics' own sets; the last image has no objects and no text file."""
    for split, start, count in (("train", 0, 3), ("val", 3, 2)):
        for i in range(start, start + count):
            save(picture(i), root / "images" / split / f"photo_{i}.jpg")
            lines = []
            for number in (1, 0):  # the smaller one first
                points = [c for x, y in polygon(i, number) for c in (x / WIDTH, y / HEIGHT)]
                lines.append(f"{number} " + " ".join(f"{c:.6f}" for c in points))
            if i < 4:
                write_lines(root / "labels" / split / f"photo_{i}.txt", lines)
    lines = ["path: ../datasets/mine", "train: images/train", "val: images/val", "test:", "names:"]
    write_lines(root / "data.yaml", [*lines, *(f"  {i}: {name}" for i, name in enumerate(NAMES))])


def brush(opacity: np.ndarray) -> list[int]:
    """Label Studio's run lengths of uint8 [H, W], written as its format says."""
    values = np.repeat(opacity.ravel(), 4)
    bits = f"{len(values):032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}"
    starts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    for start, end in itertools.pairwise(starts):
        for first in range(start, end, 65536):
            length = min(end - first, 65536) - 1
            width, choice = next((w, c) for c, w in enumerate((3, 4, 8, 16)) if length < 2**w)
            bits += f"1{choice:02b}{length:0{width}b}{values[start]:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def make_label_studio(root: Path) -> None:
    """Images with and without the characters of an upload, two annotators, and one task undone."""
    tasks = []
    for i in range(6):
        name = f"{i:08x}-photo {i}.jpg" if i < 3 else f"photo {i}.jpg"
        save(picture(i), root / "images" / name)
        results = []
        for number in (0, 1):
            points = [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in polygon(i, number)]
            value: dict[str, Any] = {"points": points, "closed": True}
            results.append(region("polygonlabels", NAMES[number], value))
        if i == 1:
            value = {"x": 75.0, "y": 10.0, "width": 12.5, "height": 25.0, "rotation": 0}
            results.append(region("rectanglelabels", "sign", value))
            value = {"x": 20.0, "y": 90.0, "radiusX": 5.0, "radiusY": 5.0, "rotation": 0}
            results.append(region("ellipselabels", "sign", value))
        if i == 2:
            opacity = np.zeros((HEIGHT, WIDTH), np.uint8)
            opacity[2:8, 50:60] = 255
            results.append(region("brushlabels", "sign", {"format": "rle", "rle": brush(opacity)}))
        old = {"id": 1, "was_cancelled": False, "ground_truth": False, "result": []}
        new = {**old, "id": 2, "result": results, "updated_at": "2025-02-01T00:00:00Z"}
        old["updated_at"] = "2025-01-01T00:00:00Z"
        tasks.append(
            {
                "id": i + 1,
                "annotations": [new, old] if i < 5 else [],
                "predictions": [],
                "file_upload": f"{i:08x}-photo_{i}.jpg",
                "data": {"image": f"/data/upload/1/{i:08x}-photo%20{i}.jpg"},
            }
        )
    write_json(root / "project-1-at-2025-02-01.json", tasks)


def region(kind: str, label: str, value: dict[str, Any]) -> dict[str, Any]:
    return {
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "image_rotation": 0,
        "value": {**value, kind: [label]},
        "id": f"{label[:4]}",
        "from_name": "label",
        "to_name": "image",
        "type": kind,
        "origin": "manual",
    }


def make_auto(root: Path) -> None:
    make_coco(root)

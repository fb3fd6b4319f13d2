"""Every `data=` on the same odd folders: read rightly, or refused or noted by naming the odd."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_data
import numpy as np
import pytest
from annotation_copies import edit
from PIL import Image
from tiny_copies import TinyCopies

from seg_torch import datasets, files
from seg_torch.data.module import SegmentationDataModule
from seg_torch.errors import InputError

pytestmark = pytest.mark.usefixtures("new_cache_folder")

TOOLS = [
    *("coco", "coco_panoptic", "cvat", "folder", "label_studio", "labelme", "labelme_voc"),
    *("roboflow", "yolo"),
]
PUBLISHED = [
    *("ade20k", "camvid", "camvid32", "cityscapes", "clothing", "coco_stuff", "pet", "voc"),
    "voc_sbd",
]
# Folders of the formats whose masks are images in them.
MASKS = {
    "camvid": ["trainannot", "valannot"],
    "cvat": ["SegmentationClass"],
    "folder": ["masks"],
    "labelme_voc": ["SegmentationClass"],
    "pet": ["oxford-iiit-pet/annotations/trimaps"],
    "voc": ["VOCdevkit/VOC2012/SegmentationClass"],
}

Samples = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder with the tiny copy of each dataset, by name."""
    return TinyCopies(tmp_path_factory)


@pytest.fixture
def copy(copies, tmp_path):
    """copy(name): a folder with the tiny copy of a dataset, to be changed by the test."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(copies[name], tmp_path / "data"))

    return copy


def samples(name: str, root: Path) -> Samples:
    """Image and mask of each sample, by its split and the end of its name."""
    found: Samples = {}
    for split in ("train", "val", "test"):
        dataset = getattr(datasets, name)(root, split)
        for i, pair in enumerate(dataset.pairs):
            assert (split, pair.name) not in found
            found[split, pair.name] = dataset.image(i), dataset.mask(i)
    return found


def same(found: Samples, expected: Samples) -> bool:
    """Whether both have the same samples, whatever the folders before their names are."""

    def content(each: Samples) -> list:
        return sorted(
            (split, name.split("/")[-1], image.tobytes(), mask.tobytes())
            for (split, name), (image, mask) in each.items()
        )

    return content(found) == content(expected)


def refusal(name: str, root: Path) -> str:
    """What is said where the dataset is refused, by its reader or by the check before training."""
    try:
        SegmentationDataModule(getattr(datasets, name), str(root)).check_files()
    except InputError as error:
        return "\n".join([str(error), *error.problems])
    return ""


def images_of(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.suffix in (".jpg", ".png"))


# Copies, links and folders that cannot be read


@pytest.mark.parametrize("name", [*TOOLS, *PUBLISHED])
def test_e36_e73_hidden_files_and_folders_change_nothing(copies, copy, name):
    root = copy(name)
    for path in [p for p in root.rglob("*") if p.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
        for folder in (".ipynb_checkpoints", "@eaDir"):
            (path.parent / folder).mkdir(exist_ok=True)
            shutil.copy(path, path.parent / folder / path.name)
        twin = root / "__MACOSX" / path.relative_to(root)
        twin.parent.mkdir(parents=True, exist_ok=True)
        twin.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
    assert same(samples(name, root), samples(name, copies[name]))


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
@pytest.mark.parametrize("name", [*TOOLS, *PUBLISHED])
def test_e20_links_change_nothing_and_loops_end(copies, copy, tmp_path, name):
    root = copy(name)
    holding = {path.parent for path in root.rglob("*") if path.is_file()} - {root}
    for number, folder in enumerate(sorted(holding, key=lambda f: -len(f.parts))):
        elsewhere = tmp_path / f"disk{number}"
        folder.rename(elsewhere)
        folder.symlink_to(elsewhere)
        (elsewhere / "loop").symlink_to(folder)
    assert same(samples(name, root), samples(name, copies[name]))


@pytest.mark.parametrize("name", [*TOOLS, *PUBLISHED])
def test_e20_a_folder_that_cannot_be_read_is_named(copies, copy, monkeypatch, name):
    root = copy(name)
    locked = getattr(datasets, name)(root, "train").pairs[0].image.parent
    scandir = os.scandir

    def as_a_user(path: Any) -> Any:
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(files.os, "scandir", as_a_user)
    if name == "camvid":  # its lists name the files
        assert same(samples(name, root), samples(name, copies[name]))
    else:
        assert f"{locked}: this folder cannot be read (Permission denied)" in refusal(name, root)


@pytest.mark.parametrize("name", [*TOOLS, *PUBLISHED])
def test_a_folder_of_another_name_is_missed_or_understood(copies, tmp_path, caplog, name):
    original = copies[name]
    expected = samples(name, original)
    parts = [getattr(datasets, name)(original, split).pairs for split in ("train", "val")]
    used = {file.parent for pairs in parts for pair in pairs for file in pair[1:]}
    caplog.set_level(logging.INFO, "seg_torch")
    for number, folder in enumerate(sorted(used - {original})):
        root = Path(shutil.copytree(original, tmp_path / str(number)))
        renamed = root / folder.relative_to(original)
        renamed.rename(renamed.with_name(f"{renamed.name}_x"))
        caplog.clear()
        said, found = "", {}
        try:
            found = samples(name, root)
        except InputError as error:
            said = str(error)
        assert bool(said) != bool(found)
        if name == "labelme":  # whose names, and so the random split, are the paths of the files
            found, expected = (
                {("", n[-12:]): v for (_, n), v in s.items()} for s in (found, expected)
            )
        assert folder.name in said or same(found, expected) or f"{folder.name}_x" in caplog.text


# Names and annotations that are there twice


@pytest.mark.parametrize("name", [*TOOLS, *PUBLISHED])
def test_e06_two_images_that_differ_in_the_suffix_are_no_mix_up(copies, copy, caplog, name):
    root = copy(name)
    caplog.set_level(logging.INFO, "seg_torch")
    pairs = getattr(datasets, name)(root, "train").pairs
    image = next(pair.image for pair in pairs if pair.image.suffix in (".jpg", ".png"))
    second = image.with_suffix(".png" if image.suffix == ".jpg" else ".jpg")
    make_data.picture(77).save(second)
    said = refusal(name, root)
    if not said:
        assert same(samples(name, root), samples(name, copies[name]))
        assert name in PUBLISHED or second.name in caplog.text
    assert not said or second.name in said


def second_mask(root: Path) -> str:
    make_data.save(make_data.blocks(1, [0, 1]), root / "masks/photo_0.tif")
    return "photo_0.tif"


def second_panoptic_map(root: Path) -> str:
    def change(content: Any) -> None:
        first, second = content["annotations"][:2]
        content["annotations"].append({**second, "image_id": first["image_id"]})

    edit(root / "annotations/panoptic_train2017.json", change)
    return "000000000000.jpg"


def second_task(root: Path) -> str:
    def change(tasks: Any) -> None:
        tasks.append({**tasks[1], "id": 77, "data": tasks[0]["data"]})

    edit(root / "project-1-at-2025-02-01.json", change)
    return "task 77"


def second_json(root: Path) -> str:
    path = root / "photo_0 - copy.json"
    shutil.copy(root / "photo_0.json", path)
    edit(path, lambda content: content["shapes"].pop())
    return path.name


def both_lists(root: Path, first: str) -> str:
    lists = root / "ImageSets/Segmentation"
    names = [path.stem for path in (root / "SegmentationClass").glob("*.png")]
    shutil.rmtree(lists, ignore_errors=True)
    make_data.write_lines(lists / "train.txt", sorted(names)[:3])
    make_data.write_lines(lists / "val.txt", [*sorted(names)[3:], first])
    return first


def image_of_the_other_list(root: Path) -> str:
    make_data.write_lines(root / "train.txt", ["photo_0", "photo_1"])
    make_data.write_lines(root / "val.txt", ["photo_1", "photo_2"])
    return "photo_1"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("folder", second_mask),
        ("coco_panoptic", second_panoptic_map),
        ("label_studio", second_task),
        ("labelme", second_json),
    ],
)
def test_e06_a_second_annotation_of_an_image_is_named(copy, name, change):
    root = copy(name)
    assert change(root) in refusal(name, root)


def test_e06_the_objects_of_an_image_may_be_in_two_files_of_coco(copies, copy):
    root = copy("coco")
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    for category in (3, 7):
        objects = [a for a in content["annotations"] if a["category_id"] == category]
        part = path.with_name(f"instances_train2017_{category}.json")
        make_data.write_json(part, {**content, "annotations": objects})
    path.unlink()
    assert same(samples("coco", root), samples("coco", copies["coco"]))


# Splits


def coco_twice(root: Path, kind: str = "instances") -> str:
    train = json.loads((root / f"annotations/{kind}_train2017.json").read_text())
    image = train["images"][0]

    def change(content: Any) -> None:
        content["images"].append(image)
        of_image = [a for a in train["annotations"] if a["image_id"] == image["id"]]
        content["annotations"] += [{**a, "id": 900 + i} for i, a in enumerate(of_image)]

    edit(root / f"annotations/{kind}_val2017.json", change)
    return image["file_name"]


def panoptic_twice(root: Path) -> str:
    for path in (root / "annotations/panoptic_train2017").glob("*0.png"):
        shutil.copy(path, root / "annotations/panoptic_val2017")
    return coco_twice(root, "panoptic")


def yolo_twice(root: Path) -> str:
    text = (root / "data.yaml").read_text()
    both = "val: [images/val, images/train]"
    (root / "data.yaml").write_text(text.replace("val: images/val", both))
    return "photo_0.jpg"


def listed_twice(val: str, train: str) -> Callable[[Path], str]:
    def change(root: Path) -> str:
        first = (root / train).read_text().splitlines()[0]
        with (root / val).open("a") as file:
            file.write(f"{first}\n")
        return first.split()[0].split("/")[-1]

    return change


VOC_LISTS = "VOCdevkit/VOC2012/ImageSets/Segmentation"
PET_LISTS = "oxford-iiit-pet/annotations"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("coco", coco_twice),
        ("coco_panoptic", panoptic_twice),
        ("cvat", lambda root: both_lists(root, "photo_0")),
        ("folder", image_of_the_other_list),
        ("labelme", image_of_the_other_list),
        ("labelme_voc", lambda root: both_lists(root, "2011_000000")),
        ("yolo", yolo_twice),
        ("camvid", listed_twice("val.txt", "train.txt")),
        ("voc", listed_twice(f"{VOC_LISTS}/val.txt", f"{VOC_LISTS}/train.txt")),
        ("pet", listed_twice(f"{PET_LISTS}/test.txt", f"{PET_LISTS}/trainval.txt")),
    ],
)
def test_e21_e76_an_image_of_two_splits_is_named(copy, name, change):
    root = copy(name)
    image = change(root)
    said = refusal(name, root)
    assert image in said
    assert "train" in said
    assert "val" in said


def no_images(path: str) -> Callable[[Path], str]:
    def change(root: Path) -> str:
        edit(root / path, lambda content: content.update(images=[], annotations=[]))
        return path

    return change


def no_lines(path: str, train: str = "photo_0") -> Callable[[Path], str]:
    def change(root: Path) -> str:
        make_data.write_lines(root / "train.txt", [train])
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("")
        return path

    return change


def no_files(path: str, keep: str = "") -> Callable[[Path], str]:
    def change(root: Path) -> str:
        for file in [p for p in (root / path).rglob("*") if p.is_file() and p.name != keep]:
            file.unlink()
        return path

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("coco", no_images("annotations/instances_val2017.json")),
        ("coco_panoptic", no_images("annotations/panoptic_val2017.json")),
        ("cvat", no_lines("ImageSets/Segmentation/val.txt")),
        ("folder", no_lines("val.txt")),
        ("labelme", no_lines("val.txt")),
        ("label_studio", no_lines("val.txt", "images/photo 3")),
        ("labelme_voc", no_lines("ImageSets/Segmentation/val.txt")),
        ("roboflow", no_files("valid", keep="_classes.csv")),
        ("yolo", no_files("images/val")),
        ("camvid", no_files("val")),
        ("ade20k", no_files("ADEChallengeData2016/annotations/validation")),
    ],
)
def test_e18_an_empty_split_is_named_and_not_filled_by_chance(copy, name, change):
    root = copy(name)
    assert change(root) in refusal(name, root)


# What is in the files


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("name", MASKS)
def test_e12_a_mask_is_turned_as_its_own_exif_data_say(copies, copy, name, orientation):
    """All masks lie upside down (3) or on their side (6), and say so, as viewers show them."""
    root = copy(name)
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for folder in MASKS[name]:
        for path in (root / folder).rglob("*.png"):
            Image.open(path).transpose(turn).save(path, exif=exif)
    assert same(samples(name, root), samples(name, copies[name]))
    assert refusal(name, root) == ""


def reordered(path: Path, palette: np.ndarray) -> np.ndarray:
    """Store a mask of ids in their colours, numbered in another order; the ids."""
    ids = np.asarray(Image.open(path))
    ids = np.where(ids == 255, 0, ids)
    image = Image.fromarray((len(palette) - 1 - ids).astype(np.uint8))
    image.putpalette(np.ascontiguousarray(palette[::-1]).tobytes())
    image.save(path)
    return ids


def test_e05_palettes_that_contradict_are_named_or_read_by_colour(copies, copy, tmp_path):
    root = copy("folder")
    colours = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)
    lines = [f"{n} {r} {g} {b}" for n, (r, g, b) in zip("abc", colours.tolist(), strict=True)]
    make_data.write_lines(root / "classes.txt", lines)
    for path in (root / "masks").rglob("*.png"):
        reordered(path, colours)
    assert "photo_0.png: its palette contradicts the classes" in refusal("folder", root)

    root = Path(shutil.copytree(copies["labelme_voc"], tmp_path / "labelme_voc"))
    for path in (root / "SegmentationClass").glob("*.png"):
        reordered(path, datasets.labelme_voc(root, "train").labels.palette)
    assert "2011_000000.png: its palette contradicts" in refusal("labelme_voc", root)

    root = Path(shutil.copytree(copies["cvat"], tmp_path / "cvat"))
    expected = samples("cvat", root)
    for path in (root / "SegmentationClass").rglob("*.png"):
        Image.open(path).quantize(16).save(path)
    assert same(samples("cvat", root), expected)


@pytest.mark.parametrize("name", [*TOOLS, "camvid", "voc"])
def test_e19_images_of_10_bits_are_not_nearly_black(copy, name):
    root = copy(name)
    pairs = [p for s in ("train", "val") for p in getattr(datasets, name)(root, s).pairs]
    for image in {pair.image for pair in pairs if pair.image.suffix in (".jpg", ".png")}:
        grey = np.asarray(Image.open(image).convert("L"), np.uint16) * 4
        Image.fromarray(grey).save(image, format="PNG")
    said = refusal(name, root)
    if not said:
        assert all(image.max() > 150 for image, _ in samples(name, root).values())
    assert not said or ("data.white" in said and any(pair.image.name in said for pair in pairs))


@pytest.mark.parametrize("name", [*TOOLS, "camvid", "voc"])
def test_e31_one_huge_image_among_thumbnails_is_read_like_the_others(copies, copy, name, caplog):
    root = copy(name)
    dataset = getattr(datasets, name)(root, "val")
    before = samples(name, root)
    huge = dataset.pairs[len(dataset) - 1]
    if name in ("camvid", "cvat", "folder", "labelme_voc", "roboflow", "voc"):
        Image.open(huge.mask).resize((640, 480), Image.Resampling.NEAREST).save(huge.mask)
        Image.open(huge.image).resize((640, 480)).save(huge.image)
        found = samples(name, root)
        for key, (image, mask) in before.items():
            is_huge = key[0] != "train" and key[1] == huge.name
            assert found[key][1].shape == ((480, 640) if is_huge else mask.shape)
            assert is_huge or (found[key][0] == image).all()
        assert refusal(name, root) == ""
    elif huge.image.suffix != ".json":
        # Annotations are of one size, which the image does not have.
        Image.open(huge.image).resize((640, 480)).save(huge.image)
        said = refusal(name, root)
        if name in ("yolo", "label_studio"):  # fractions of the image
            assert said == "" or huge.image.name in said
        else:
            assert huge.image.name in said
            assert "640 x 480" in said

"""Where images, masks and splits are looked for in a folder of one's own."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import make_data
import numpy as np
import pytest
from PIL import Image

from seg_torch import datasets, files
from seg_torch.data.inspection import inspect_dataset
from seg_torch.data.module import SegmentationDataModule
from seg_torch.datasets.base import read_index_mask
from seg_torch.errors import InputError
from seg_torch.prediction.folder import find_images

pytestmark = pytest.mark.usefixtures("new_cache_folder")
links = pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
LONG = {"train": "training", "val": "validation"}
SPLITS = {"train": range(6), "val": (6, 7), "test": (8,)}


@pytest.fixture
def own(tmp_path):
    """Nine pairs and another one in a subfolder, to be moved by the test."""
    root = tmp_path / "own"
    make_data.make_folder(root)
    return root


def without_subfolder(root: Path) -> Path:
    shutil.rmtree(root / "images/more")
    shutil.rmtree(root / "masks/more")
    return root


def move(root: Path, image: str, mask: str) -> None:
    """Move the nine pairs to other places, in which {i} and {split} are replaced.

    {SPLIT} is the split in upper case, {long} its other name.
    """
    without_subfolder(root)
    for split, numbers in SPLITS.items():
        for i in numbers:
            for old, new in ((f"images/photo_{i}.jpg", image), (f"masks/photo_{i}.png", mask)):
                path = root / new.format(
                    i=i, split=split, SPLIT=split.upper(), long=LONG.get(split, split)
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                (root / old).rename(path)
    for folder in ("images", "masks"):
        if not any(path.is_file() for path in (root / folder).rglob("*")):
            shutil.rmtree(root / folder)


def numbers_of(root: Path, dataset=datasets.folder) -> dict[str, list[int]]:
    """The numbers of the images in each split, checked by the content of images and masks."""
    found: dict[str, list[int]] = {}
    for split in SPLITS:
        samples = dataset(root, split)
        found[split] = []
        for i in range(len(samples)):
            number = int("".join(c for c in samples.pairs[i].image.stem if c.isdigit()))
            expected = make_data.blocks(number, [0, 1, 2])
            assert (samples.mask(i) == expected).all()
            original = np.asarray(make_data.picture(number), np.int16)
            assert abs(samples.image(i).astype(np.int16) - original).mean() < 12
            found[split].append(number)
    return found


GIVEN = {"train": [0, 1, 2, 3, 4, 5], "val": [6, 7], "test": [8]}
BY_FOLDER = [
    ("images/{split}/photo_{i}.jpg", "masks/{split}/photo_{i}.png"),
    ("{split}/images/photo_{i}.jpg", "{split}/masks/photo_{i}.png"),
    ("{split}/img/photo_{i}.jpg", "{split}/gt/photo_{i}.png"),
    ("{split}/photo_{i}.jpg", "{split}/photo_{i}_mask.png"),
    ("{split}/{i}_sat.jpg", "{split}/{i}_mask.png"),
    ("{SPLIT}/Images/photo_{i}.JPG", "{SPLIT}/Labels/photo_{i}.PNG"),
    ("{long}/imgs/photo_{i}.jpg", "{long}/Ground-Truth/photo_{i}.TIF"),
    ("images/{SPLIT}/photo_{i}.jpg", "masks/{long}/photo_{i}.png"),
    ("{split}_images/photo_{i}.jpg", "{split}_masks/photo_{i}.png"),
    ("{split}/photo_{i}.jpg", "{split}_labels/photo_{i}_L.png"),
    ("Images-{long}/photo_{i}.jpg", "Annotations-{long}/photo_{i}.png"),
    ("{split}/photo_{i}.jpg", "{split}annot/photo_{i}.png"),
    ("{split}/photo_{i}.jpg", "{split}/masks/photo_{i}.png"),
    ("dataset/images/{split}/photo_{i}.jpg", "dataset/gt/{split}/photo_{i}.png"),
    ("a/b/{split}/images/photo_{i}.jpg", "a/b/{split}/labels/photo_{i}.png"),
]
AT_RANDOM = [
    ("images/photo_{i}.jpg", "masks/photo_{i}_mask.png"),
    ("images/photo_{i}.jpg", "masks/photo_{i}-label.png"),
    ("images/photo_{i}.jpg", "labels/photo_{i}.png"),
    ("JPEGImages/photo_{i}.jpg", "SegmentationClass/photo_{i}.png"),
    ("photo_{i}.jpg", "photo_{i}_mask.png"),
    ("images/{i}_sat.jpg", "masks/{i}_mask.png"),
    ("img/photo_{i}.jpg", "annotations/photo_{i}.png"),
    ("JPEGImages/photo_{i}.JPG", "gt/photo_{i}.TIF"),
    ("photo_{i}.jpg", "photo_{i}_label.png"),
    ("photo_{i}.JPG", "photo_{i}-gt.PNG"),
    ("photo_{i}.jpg", "masks/photo_{i}.png"),
    ("dataset/Images/photo_{i}.jpg", "dataset/GroundTruth/photo_{i}.png"),
    ("data/photo_{i}.jpg", "data/photo_{i}_mask.png"),
    ("case_{i}/photo_{i}.jpg", "case_{i}/photo_{i}_mask.png"),
]


@pytest.mark.parametrize("dataset", [datasets.folder, datasets.auto])
@pytest.mark.parametrize(("image", "mask"), BY_FOLDER)
def test_e48_e71_folders_of_the_splits_are_honoured(own, image, mask, dataset):
    move(own, image, mask)
    assert numbers_of(own, dataset) == GIVEN


@pytest.mark.parametrize(("image", "mask"), AT_RANDOM)
def test_e48_other_names_of_folders_and_masks_are_understood(own, image, mask):
    expected = {s: set(v) for s, v in numbers_of(without_subfolder(own)).items()}
    assert sorted(expected["train"] | expected["val"]) == [*range(9)]
    make_data.make_folder(own)
    move(own, image, mask)
    for folder in {*own.rglob("*/"), own}:  # what is no image changes nothing
        for name in ("Thumbs.db", "notes.txt", "table.csv", "settings.json"):
            (folder / name).write_text("{}")
    for dataset in (datasets.folder, datasets.auto):
        found = numbers_of(own, dataset)
        assert sorted(found["train"] + found["val"]) == [*range(9)]
        assert len(found["val"]) == 2


def test_e48_a_missing_mask_is_named_in_another_layout(own):
    move(own, "photo_{i}.jpg", "photo_{i}_mask.png")
    (own / "photo_3_mask.png").unlink()
    with pytest.raises(InputError, match=r"1 files cannot be paired.*_mask(.|\n)*photo_3\.jpg: no"):
        datasets.folder(own, "train")


def test_e48_what_may_mean_two_things_is_refused_and_the_patterns_are_named(own):
    (own / "masks").rename(own / "labels")
    shutil.copytree(own / "labels", own / "gt")
    with pytest.raises(InputError, match=r"folders gt, labels could hold the masks(.|\n)*mv .*gt"):
        datasets.folder(own, "train")
    (own / "gt").rename(own / "masks")  # as the message says
    numbers_of(own)
    (own / "images").rename(own / "img")  # masks/ is still the one that is meant
    numbers_of(own)
    (own / "img").rename(own / "images")
    (own / "masks").rename(own / "gt")
    shutil.rmtree(own / "labels")
    shutil.rmtree(own / "gt")
    with pytest.raises(InputError, match=r"images/.*masks/.*train/images.*a_mask\.png"):
        datasets.folder(own, "train")


def test_e48_a_split_without_masks_is_named(own):
    move(own, "{split}/images/photo_{i}.jpg", "{split}/masks/photo_{i}.png")
    shutil.rmtree(own / "val/masks")
    with pytest.raises(InputError, match=r"val: no images with masks here, unlike in test"):
        datasets.folder(own, "train")


TWO_MASKS = [
    ("images/photo_{i}.jpg", "masks/photo_{i}.png", "images/photo_{i}_mask.png"),
    ("photo_{i}.jpg", "masks/photo_{i}.png", "photo_{i}_mask.png"),
    ("photo_{i}.jpg", "photo_{i}_label.png", "photo_{i}_mask.png"),
    ("train/photo_{i}.jpg", "train/photo_{i}-gt.png", "train/photo_{i}_mask.png"),
]


@pytest.mark.parametrize(("image", "mask", "second"), TWO_MASKS)
def test_an_image_with_masks_of_two_kinds_is_refused_with_both(own, image, mask, second):
    move(own, image, mask)
    for i in range(9):
        shutil.copy(own / mask.format(i=i), own / second.format(i=i))
    with pytest.raises(
        InputError, match=r"photo_0\.jpg has two masks, .*: move the files"
    ) as error:
        datasets.folder(own, "train")
    assert str(own / mask.format(i=0)) in str(error.value)
    assert str(own / second.format(i=0)) in str(error.value)
    for i in range(9):
        (own / second.format(i=i)).unlink()  # as the message says
    datasets.folder(own, "train")


def test_several_datasets_in_a_folder_are_refused_with_each_of_them(tmp_path):
    for name in ("cats", "my dogs"):
        make_data.make_folder(tmp_path / name)
    with pytest.raises(InputError, match="2 folders hold images and masks") as error:
        datasets.folder(tmp_path, "train")
    assert f"data.root={tmp_path}/cats\n" in str(error.value)
    assert str(error.value).endswith(f"data.root='{tmp_path}/my dogs'")


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{split}/images/photo_{i}.jpg", "{split}/masks/photo_{i}.png"),
        ("images/{split}/photo_{i}.jpg", "masks/{split}/photo_{i}.png"),
        ("{split}/photo_{i}.jpg", "{split}_labels/photo_{i}.png"),
    ],
)
def test_test_images_without_masks_are_left_out_and_said_so(own, caplog, image, mask):
    move(own, image, mask)
    folder = (own / mask.format(split="test", i=0)).parent
    shutil.rmtree(folder)
    with caplog.at_level(logging.INFO, "seg_torch"):
        assert numbers_of(own) == {**GIVEN, "test": GIVEN["val"]}
    images = (own / image.format(split="test", i=0)).parent
    images = images.parent if images.name == "images" else images
    assert caplog.text.count(f"{images}: there are no masks of these images") == 1


def test_lists_are_found_where_voc_has_them(own):
    move(own, "JPEGImages/photo_{i}.jpg", "SegmentationClass/photo_{i}.png")
    for split, numbers in SPLITS.items():
        lists = own / f"ImageSets/Segmentation/{split}.txt"
        make_data.write_lines(lists, [f"photo_{i}" for i in numbers])
    assert numbers_of(own, datasets.auto) == GIVEN


def test_lists_of_segnet_are_understood(own):
    move(own, "{split}/photo_{i}.jpg", "{split}annot/photo_{i}.png")
    for split, numbers in SPLITS.items():
        start = f"/SegNet/CamVid/{split}"
        lines = [f"{start}/photo_{i}.jpg {start}annot/photo_{i}.png" for i in numbers]
        make_data.write_lines(own / f"{split}.txt", lines)
    assert numbers_of(own, datasets.auto) == GIVEN


def test_classes_and_lists_may_lie_beside_the_folder_of_the_dataset(own):
    move(own, "dataset/images/photo_{i}.jpg", "dataset/masks/photo_{i}.png")
    make_data.write_lines(own / "train.txt", ["dataset/images/photo_0.jpg"])
    make_data.write_lines(own / "val.txt", ["photo_1"])
    assert numbers_of(own) == {"train": [0], "val": [1], "test": [1]}
    assert datasets.folder(own, "val").labels.names[1] == "traffic light"


SAID = [
    (
        *("images/photo_{i}.jpg", "labels/photo_{i}.png"),
        "images: 9 *.jpg in images/; masks: 9 *.png in labels/",
        "splits: train 7, val 2, by chance (data.dataset.val_fraction=0.2)",
    ),
    (
        *("photo_{i}.jpg", "photo_{i}_mask.png"),
        "images: 9 *.jpg in the folder itself; masks: 9 *_mask.png in the folder itself",
        "splits: train 7, val 2, by chance (data.dataset.val_fraction=0.2)",
    ),
    (
        *("a/{split}/img/photo_{i}.jpg", "a/{split}/gt/photo_{i}.png"),
        "images: 9 *.jpg in a/test/img/ and a/train/img/ and a/val/img/; "
        "masks: 9 *.png in a/test/gt/ and a/train/gt/ and a/val/gt/",
        "splits: train 6, val 2, test 1, by the folders",
    ),
]


@pytest.mark.parametrize(("image", "mask", "files", "splits"), SAID)
def test_what_was_taken_for_what_is_said_once_in_three_lines(
    own, caplog, image, mask, files, splits
):
    move(own, image, mask)
    with caplog.at_level(logging.INFO, "seg_torch"):
        for _ in range(2):
            numbers_of(own)
    said = [line for line in caplog.messages if "no labelled test images" not in line]
    classes = f"classes: 3, named in {own}/classes.txt: background, traffic light, car"
    assert said == [files, splits, classes]


def test_e71_test_images_in_a_folder_are_kept_out_of_the_random_split(own):
    move(own, "images/photo_{i}.jpg", "masks/photo_{i}.png")
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        (own / kind / "test").mkdir()
        for i in (7, 8):
            name = f"photo_{i}.{suffix}"
            (own / kind / name).rename(own / kind / "test" / name)
    found = numbers_of(own)
    assert sorted(found["train"] + found["val"]) == [*range(7)]
    assert found["test"] == [7, 8]


def test_e71_images_beside_the_folders_of_the_splits_are_named(own):
    move(own, "images/{split}/photo_{i}.jpg", "masks/{split}/photo_{i}.png")
    make_data.save(make_data.picture(1), own / "images/extra/b.jpg")
    make_data.save(make_data.blocks(1, [0]), own / "masks/extra/b.png")
    with pytest.raises(InputError, match=r"1 images lie in none of the folders(.|\n)*extra/b"):
        datasets.folder(own, "val")


@pytest.mark.parametrize("there", ["val", "test"])
def test_e71_without_training_images_nothing_is_trained_on(own, there):
    for kind in ("images", "masks"):
        (own / kind).rename(own / there)
        (own / kind).mkdir()
        (own / there).rename(own / kind / there)
    with pytest.raises(InputError, match=f"a folder {there}, but none for training"):
        datasets.folder(own, "train")


def test_e48_a_list_that_contradicts_the_folders_is_refused(own):
    move(own, "images/{split}/photo_{i}.jpg", "masks/{split}/photo_{i}.png")
    make_data.write_lines(own / "train.txt", ["train/photo_0", "val/photo_6.jpg"])
    make_data.write_lines(own / "val.txt", ["val/photo_7"])
    with pytest.raises(InputError, match=r"1 images that .*train\.txt(.|\n)*val/photo_6"):
        datasets.folder(own, "train")
    make_data.write_lines(own / "train.txt", ["train/photo_0"])
    assert numbers_of(own) == {"train": [0], "val": [7], "test": [7]}


@pytest.mark.parametrize(
    "line",
    [
        "images/photo_0.jpg masks/photo_0.png",
        "images/photo_0.jpg\tmasks/photo_0.png",
        "{root}/images/photo_0.jpg",
        "{root}/images/photo_0.jpg {root}/masks/photo_0.png",
        "/somewhere/else/images/photo_0.jpg",
        "C:\\data\\images\\photo_0.jpg",
        "./images/photo_0.jpg",
        "images/photo_0",
    ],
)
def test_e85_a_list_may_hold_paths_and_those_of_the_masks(own, line):
    more = line.replace("photo_0", "more/photo_9")
    for name, lines in (("train", [line, more]), ("val", ["photo_1"])):
        lines = [text.format(root=own) for text in lines]
        make_data.write_lines(own / f"{name}.txt", lines)
    assert numbers_of(own) == {"train": [0, 9], "val": [1], "test": [1]}


def test_e85_a_line_with_the_mask_of_another_image_is_refused(own):
    make_data.write_lines(own / "train.txt", ["images/photo_0.jpg masks/photo_1.png"])
    make_data.write_lines(own / "val.txt", ["photo_2"])
    with pytest.raises(InputError, match=r"photo_0\.jpg masks/photo_1\.png"):
        datasets.folder(own, "train")


def test_e18_an_empty_list_is_refused_by_name(own):
    make_data.write_lines(own / "train.txt", ["photo_1"])
    make_data.write_lines(own / "val.txt", [])
    with pytest.raises(InputError, match=r"val\.txt is empty"):
        datasets.folder(own, "val")


@pytest.mark.parametrize("command", ["check", "inspect"])
def test_e21_an_image_of_two_splits_is_refused_by_name(own, command, caplog):
    make_data.write_lines(own / "train.txt", ["photo_0", "photo_1", "photo_2"])
    make_data.write_lines(own / "val.txt", ["photo_2", "photo_3"])
    make_data.write_lines(own / "test.txt", ["photo_3", "photo_4"])
    expected = [
        f"{own}/images/photo_2.jpg: it is in train and in val; take it out of one of them",
        f"{own}/images/photo_3.jpg: it is in val and in test; take it out of one of them",
    ]
    if command == "inspect":
        problems = inspect_dataset(datasets.folder, own)["problems"]
        assert [problem["message"] for problem in problems] == expected
    else:
        with pytest.raises(InputError) as error:
            SegmentationDataModule(datasets.folder, str(own)).check_files()
        assert error.value.problems == expected
        SegmentationDataModule(datasets.folder, str(own), check=False).check_files()
        assert "2 images are in two splits; the first: " in caplog.text


# Links, and folders that nobody may read


@links
def test_e20_linked_folders_are_followed_and_loops_end(own, tmp_path):
    expected = numbers_of(own)
    for kind in ("images", "masks"):
        (own / kind / "more").rename(tmp_path / kind)
        (own / kind / "more").symlink_to(tmp_path / kind)
        (own / kind / "again").symlink_to(own / kind)  # a loop
        (own / kind / "above").symlink_to(own)
        (own / kind).rename(tmp_path / f"real_{kind}")
        (own / kind).symlink_to(tmp_path / f"real_{kind}")
    assert numbers_of(own) == expected
    assert len(find_images(own / "images")) == 10


@links
def test_e20_a_folder_that_is_linked_twice_counts_once(own):
    (own / "images/latest").symlink_to(own / "images/more")
    assert sum(len(v) for v in list(numbers_of(own).values())[:2]) == 10


@links
def test_e20_a_link_to_nothing_is_told(own, caplog):
    (own / "images/camera_2").symlink_to(own / "unmounted")
    numbers_of(own)
    assert f"{own}/images/camera_2 is a link to nothing" in caplog.text
    assert caplog.text.count("camera_2") == 1


@pytest.mark.parametrize("name", ["folder", "labelme", "yolo", "coco", "roboflow"])
def test_e20_a_folder_that_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch, name):
    getattr(make_data, f"make_{name}")(tmp_path)
    locked = tmp_path / "images" / "locked"
    locked.mkdir(parents=True, exist_ok=True)
    if name == "yolo":
        locked = tmp_path / "images/train"
    scandir = os.scandir

    def as_a_user(path):
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(files.os, "scandir", as_a_user)
    with pytest.raises(InputError, match=rf"{locked}: this folder cannot be read \(Permission"):
        getattr(datasets, name)(tmp_path, "train")
    with pytest.raises(InputError, match="cannot be read"):
        find_images(tmp_path)


@pytest.mark.parametrize(
    "name", ["._photo_0.jpg", ".ipynb_checkpoints/photo_0-checkpoint.jpg", "@eaDir/photo_0.jpg"]
)
@pytest.mark.parametrize("folder", ["__MACOSX", "$RECYCLE.BIN", ""])
def test_e36_what_systems_leave_is_no_image(own, folder, name):
    expected = numbers_of(own)
    images = find_images(own / "images")
    path = own / "images" / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0\5\26\7")
    assert numbers_of(own) == expected
    assert find_images(own / "images") == images


# Words for what is likely meant


def test_e82_auto_says_which_format_is_likely_and_what_it_lacks(tmp_path):
    make_data.make_yolo(tmp_path / "yolo")
    (tmp_path / "yolo/data.yaml").unlink()
    make_data.make_cvat(tmp_path / "cvat")
    (tmp_path / "cvat/labelmap.txt").unlink()
    make_data.make_folder(tmp_path / "folder")
    shutil.rmtree(tmp_path / "folder/masks")
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml/a.xml").write_text("<annotation/>")
    for name, text in (
        ("yolo", "It looks like yolo without its data.yaml"),
        ("folder", "It looks like folder without masks/"),
        ("xml", "XML is not read"),
    ):
        with pytest.raises(InputError, match=text):
            datasets.auto(tmp_path / name, "train")


def test_e82_the_size_of_a_turned_photo_says_that_it_is_turned(own):
    exif = Image.Exif()
    exif[0x0112] = 6
    make_data.picture(0, 64, 80).save(own / "images/photo_0.jpg", exif=exif)
    message = r"64 x 48 pixels, its image .*photo_0\.jpg has 64 x 80 as its EXIF data turn it"
    with pytest.raises(InputError, match=message):
        SegmentationDataModule(datasets.folder, str(own)).check_files()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((32, 32, 5), "uint8", r"5 channels of uint8; data\.channels=5 data\.bits=8 read"),
        ((32, 32, 6), "uint16", r"6 channels of uint16; data\.channels=6 data\.bits=16 read"),
        (
            (32, 32, 3),
            "float32",
            r"3 channels of float32; convert it to uint8 or uint16; then data",
        ),
    ],
)
def test_e82_a_tiff_of_other_channels_names_the_settings(tmp_path, shape, dtype, message):
    tifffile = pytest.importorskip("tifffile")
    make_data.make_folder(tmp_path)
    (tmp_path / "images/photo_0.jpg").unlink()
    tifffile.imwrite(tmp_path / "images/photo_0.tif", np.ones(shape, dtype), planarconfig="contig")
    with pytest.raises(InputError, match=rf"photo_0\.tif: .*{message}"):
        SegmentationDataModule(datasets.folder, str(tmp_path)).check_files()


def test_e82_a_mask_of_64_bits_says_what_to_save(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.ones((32, 32), np.int64))
    with pytest.raises(InputError, match=r"a\.tif: .*1 channels of int64; save masks with one"):
        read_index_mask(tmp_path / "a.tif")

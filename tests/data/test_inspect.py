"""The check of a dataset, which train and inspect share, and the report on it."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import make_data
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image, ImageEnhance
from torchvision import tv_tensors

from seg_torch import datasets
from seg_torch.cli import main as cli
from seg_torch.commands.train import train
from seg_torch.data import check
from seg_torch.data.inspection import inspect_dataset
from seg_torch.data.module import SegmentationDataModule
from seg_torch.data.transforms import augment
from seg_torch.datasets.base import as_dataset
from seg_torch.errors import InputError
from seg_torch.labels import Labels, near_equal
from seg_torch.losses import CrossEntropyLoss

ROOT = Path(__file__).parents[2]
TRAIN = [f"photo_{i}" for i in range(6)]

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture
def own(tmp_path):
    """A dataset of six training, three validation and one test image, to be broken by the test."""
    root = tmp_path / "own"
    make_data.make_folder(root)
    make_data.write_lines(root / "train.txt", TRAIN)
    make_data.write_lines(root / "val.txt", ["photo_6", "photo_7", "photo_8"])
    make_data.write_lines(root / "test.txt", ["more/photo_9"])
    return root


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command("inspect", "data.root=...")` runs it here: (exit code, standard output)."""

    def command(name: str, *arguments: str) -> tuple[int | str | None, str]:
        GlobalHydra.instance().clear()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["seg-torch", name, *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr().out

    return command


def break_files(root: Path) -> dict[str, dict[str, int]]:
    """One of each defect that a file can have; the bad files, with the pixels of wrong values."""
    images, masks = root / "images", root / "masks"
    content = (images / "photo_0.jpg").read_bytes()
    (images / "photo_0.jpg").write_bytes(content[: len(content) // 2])
    (masks / "photo_1.png").write_bytes(b"")
    make_data.save(make_data.blocks(2, [0], height=64, width=48), masks / "photo_2.png")
    wrong = make_data.blocks(3, [0, 1, 2])
    wrong[:4, :5], wrong[10, :7] = 7, 200
    make_data.save(wrong, masks / "photo_3.png")
    make_data.save(np.full((48, 64), 300, np.uint16), masks / "photo_6.png")
    make_data.save(np.zeros((48, 64, 4), np.uint8), masks / "photo_7.png")
    return {
        "images/photo_0.jpg": {},
        "masks/photo_1.png": {},
        "masks/photo_2.png": {},
        "masks/photo_3.png": {"7": 20, "200": 7},
        "masks/photo_6.png": {"300": 48 * 64},
        "masks/photo_7.png": {},
    }


# Problems


@pytest.mark.promise(1)
@pytest.mark.promise(21)
def test_every_defect_is_reported_with_file_value_and_count_and_train_refuses_them(
    own, command, compose
):
    expected = break_files(own)
    code, printed = command("inspect", f"data.root={own}", "output_dir=report")
    assert code == 1
    report = json.loads((own.parent / "report/inspect.json").read_text())
    found = {Path(p["file"]).relative_to(own).as_posix(): p for p in report["problems"]}
    assert {name: problem["pixels"] for name, problem in found.items()} == expected
    assert report["refused"]
    assert "training would be refused, 6 problems:" in printed
    assert "(not labelled); 20 pixels of 7; 7 pixels of 200\n" in printed
    for name, reason in (
        ("images/photo_0.jpg", "cannot be read as an image: Truncated"),
        ("masks/photo_1.png", "the file is empty"),
        ("masks/photo_2.png", "48 x 64 pixels, its image"),
        ("masks/photo_3.png", "allowed are 0 to 2"),
        ("masks/photo_6.png", "300 to 300"),
        ("masks/photo_7.png", "colours (RGBA)"),
    ):
        assert reason in found[name]["message"]
    # What can be read is counted all the same.
    assert report["splits"]["train"]["images"] == 6
    assert report["splits"]["train"]["pixels"] == 2 * 48 * 64
    assert report["splits"]["val"]["pixels"] == 48 * 64

    with pytest.raises(InputError) as error:
        train(compose("train", "data=folder", f"data.root={own}", "output_dir=run"))
    assert error.value.problems == [p["message"] for p in report["problems"]]
    assert str(error.value).startswith("6 problems")


def test_both_files_of_a_pair_are_reported(own):
    (own / "images/photo_0.jpg").write_bytes(b"no image")
    (own / "masks/photo_0.png").write_bytes(b"no mask")
    report = inspect_dataset(datasets.folder, own)
    files = [Path(p["file"]).name for p in report["problems"]]
    assert files == ["photo_0.jpg", "photo_0.png"]


@pytest.mark.promise(21)
def test_all_files_without_a_partner_are_reported_and_the_terminal_shows_five(own, command):
    for i in range(4):
        (own / "masks" / f"photo_{i}.png").unlink()
    for i in range(5, 8):
        (own / "images" / f"photo_{i}.jpg").unlink()
    code, printed = command("inspect", f"data.root={own}", "output_dir=report")
    assert code == 1
    report = json.loads((own.parent / "report/inspect.json").read_text())
    expected = [
        f"{own}/images/photo_{i}.jpg: no mask; add {own}/masks/photo_{i}.png, "
        "or move the image away"
        for i in range(4)
    ]
    expected += [
        f"{own}/masks/photo_{i}.png: no image; add it, or move the mask away" for i in range(5, 8)
    ]
    assert [p["message"] for p in report["problems"]] == expected
    assert "and 2 more" in printed
    page = (own.parent / "report/inspect.html").read_text()
    assert all(problem in page for problem in expected)
    with pytest.raises(InputError) as error:
        datasets.folder(own, "train")
    assert error.value.problems == expected
    assert "seg-torch inspect lists all" in str(error.value)


def test_the_splits_that_can_be_read_are_reported_beside_the_one_that_cannot(tmp_path):
    make_data.make_camvid(tmp_path)
    shutil.rmtree(tmp_path / "valannot")
    report = inspect_dataset(datasets.camvid, tmp_path)
    assert list(report["splits"]) == ["train"]
    assert report["splits"]["train"]["images"] == 4
    assert len(report["problems"]) == 1
    assert "missing: valannot" in report["problems"][0]["message"]


def test_a_colour_without_a_class_is_counted(own):
    colours = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)
    for path in (own / "masks").rglob("*.png"):
        mask = np.asarray(Image.open(path))
        make_data.save(colours[np.where(mask == 255, 0, mask)], path)
    lines = ["background 0 0 0", "traffic light 255 0 0", "car 0 0 255"]
    make_data.write_lines(own / "classes.txt", lines)
    assert not inspect_dataset(datasets.folder, own)["refused"]
    mask = np.zeros((48, 64, 3), np.uint8)
    mask[:2, :3], mask[5, 5] = (1, 2, 3), (9, 9, 9)
    make_data.save(mask, own / "masks/photo_8.png")
    [problem] = inspect_dataset(datasets.folder, own)["problems"]
    assert problem["pixels"] == {"(1, 2, 3)": 6, "(9, 9, 9)": 1}


def test_a_value_that_the_files_of_a_dataset_must_not_hold_is_counted(tmp_path):
    make_data.make_camvid(tmp_path)
    mask = np.full((48, 64), 11, np.uint8)  # not labelled
    mask[0, :9] = 12
    make_data.save(mask, tmp_path / "valannot/0001TP_000001.png")
    [problem] = inspect_dataset(datasets.camvid, tmp_path)["problems"]
    assert problem["pixels"] == {"12": 9}


def test_masks_of_0_and_255_only_are_a_problem_with_the_way_out(own):
    for path in (own / "masks").rglob("*.png"):
        make_data.save(np.where(np.asarray(Image.open(path)) == 1, 255, 0).astype("uint8"), path)
    [problem] = inspect_dataset(datasets.folder, own)["problems"]
    assert problem["message"].endswith("background 0 0 0\ntraffic light 255 255 255")
    assert Path(problem["file"]).stem == "photo_0"
    make_data.write_lines(own / "classes.txt", ["background 0 0 0", "light 255 255 255"])
    report = inspect_dataset(datasets.folder, own)
    assert not report["refused"]
    assert report["classes"]["light"]["pixels"]["train"] > 0


class Written:
    """A dataset that somebody wrote, without files: grey images, and a bad mask if asked for."""

    labels = Labels(("ground", "thing"))

    def __init__(self, split, bad=False):
        self.split, self.bad = split, bad

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if self.bad and index == 2:
            raise FileNotFoundError(2, "No such file", "gone.h5")
        rng = np.random.default_rng([index, len(self.split)])
        mask = torch.zeros(20, 30, dtype=torch.uint8)
        mask[0, :4] = 9 if self.bad and index == 1 else 1
        image = torch.from_numpy(rng.integers(0, 256, (1, 20, 30), np.uint8))
        return tv_tensors.Image(image), tv_tensors.Mask(mask)


def test_a_dataset_that_is_not_in_files_is_inspected_by_its_samples(tmp_path):
    report = inspect_dataset(Written, output_dir=tmp_path)
    assert not report["refused"]
    assert report["classes"]["thing"]["pixels"] == dict.fromkeys(("train", "val", "test"), 12)
    grey = np.stack([np.asarray(Written("train")[i][0]) for i in range(3)]) / 255
    np.testing.assert_allclose(report["mean"], [grey.mean()], rtol=1e-12)
    report = inspect_dataset(lambda split: Written(split, bad=split == "val"))
    problems = {p["file"]: p for p in report["problems"]}
    assert problems.keys() == {"Written[1]", "Written[2]"}
    assert problems["Written[1]"]["pixels"] == {"9": 4}
    assert "gone.h5" in problems["Written[2]"]["message"]


def test_e80_a_name_keeps_the_reason_in_terminal_json_and_page(own, command):
    make_data.write_lines(own / "train.txt", [*TRAIN, "foto_1.jpg"])
    code, printed = command("inspect", f"data.root={own}", "output_dir=report")
    assert code == 1
    reason = "foto_1.jpg: train.txt lists it, but it has no image and mask"
    assert reason in printed
    [problem] = json.loads((own.parent / "report/inspect.json").read_text())["problems"]
    assert problem["message"] == reason
    assert reason in (own.parent / "report/inspect.html").read_text()


def test_e80_lists_of_other_formats_keep_the_reason(tmp_path):
    make_data.make_yolo(tmp_path)
    content = (tmp_path / "data.yaml").read_text().replace("images/val", "val.txt")
    (tmp_path / "data.yaml").write_text(content)
    make_data.write_lines(tmp_path / "val.txt", ["images/val/gone.jpg"])
    [problem] = inspect_dataset(datasets.yolo, tmp_path)["problems"]
    assert "images/val/gone.jpg: " in problem["message"]
    assert "val.txt lists this image, but it does not exist" in problem["message"]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_e18_a_split_without_a_labelled_pixel_is_refused_before_training(own, split):
    names = {"train": TRAIN, "val": ["photo_6", "photo_7", "photo_8"], "test": ["more/photo_9"]}
    for name in names[split]:
        make_data.save(np.full((48, 64), 255, np.uint8), own / f"masks/{name}.png")
    report = inspect_dataset(datasets.folder, own)
    [problem] = report["problems"]
    assert f"images of {split} is labelled: all masks" in problem["message"]
    with pytest.raises(InputError, match=f"no pixel of the {len(names[split])} images of {split}"):
        SegmentationDataModule(datasets.folder, str(own)).check_files()


def test_e18_a_single_class_in_train_is_said(own, caplog):
    for name in TRAIN:
        make_data.save(np.zeros((48, 64), np.uint8), own / f"masks/{name}.png")
    with caplog.at_level(logging.INFO, "seg_torch"):
        SegmentationDataModule(datasets.folder, str(own)).check_files()
    assert (
        "Every labelled pixel of train is background, so there is nothing to learn" in caplog.text
    )


@pytest.mark.parametrize("split", ["train", "val", "."])
def test_e18_yolo_with_labels_in_a_folder_of_another_name_is_refused(tmp_path, split):
    make_data.make_yolo(tmp_path)
    labels = (tmp_path / "labels" / split).resolve()
    labels.rename(labels.with_name("annotations"))
    with pytest.raises(InputError, match=r"none of \d images of (train|val) has a text file") as e:
        datasets.yolo(tmp_path, "train")
    assert f"{tmp_path}/labels/{'train' if split == '.' else split}/photo_" in str(e.value)


def test_e18_a_test_set_of_yolo_without_text_files_has_no_labels(tmp_path, caplog):
    make_data.make_yolo(tmp_path)
    make_data.save(make_data.picture(9), tmp_path / "images/test/photo_9.jpg")
    content = (tmp_path / "data.yaml").read_text().replace("test:", "test: images/test")
    (tmp_path / "data.yaml").write_text(content)
    with caplog.at_level(logging.INFO, "seg_torch"):
        test, val = datasets.yolo(tmp_path, "test"), datasets.yolo(tmp_path, "val")
    assert test.pairs == val.pairs
    assert "1 images without annotation (images/test/photo_9.jpg)" in caplog.text


# What inspect notes, train says


def logged_by_train(root: Path, caplog, **options) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, "seg_torch"):
        SegmentationDataModule(datasets.folder, str(root), **options).check_files()
    return caplog.text


def test_e76_train_says_what_inspect_notes(own, caplog):
    make_data.write_lines(own / "classes.txt", ["background", "Car", "car ", "tram"])
    make_data.write_lines(own / "train.txt", [*TRAIN, "photo_1"])
    shutil.copy(own / "images/photo_0.jpg", own / "images/photo_6.jpg")
    notes = inspect_dataset(datasets.folder, own)["notes"]
    said = logged_by_train(own, caplog)
    assert all(note in said for note in notes)
    for text in (
        "255 stands for pixels that are not labelled",
        "Never seen in train, so never learnt: tram.",
        "The classes 'Car', 'car' have nearly the same name",
        f"1 images of train count more than once, such as {own}/images/photo_1.jpg.",
        "1 of 3 images of val are in train, too: 1 exactly, 0 nearly.",
        "photo_0.jpg and ",
    ):
        assert text in said, text
    assert all(note in logged_by_train(own, caplog) for note in notes), "the second start, too"


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["cat", "cat ", "Cat", "dog"], [["cat", "cat ", "Cat"]]),
        (["traffic light", "traffic_light", "Traffic-Light"], 1),
        (["caf\u00e9", "cafe\u0301"], 1),
        (["cat\u200b", "cat"], 1),
        (["C++", "C#", "C"], []),
        (["cat", "cats"], []),
    ],
)
def test_e84_names_that_are_nearly_equal_are_found(names, groups):
    found = near_equal(names)
    assert found == groups if isinstance(groups, list) else found == [names]


def test_e56_crops_that_show_little_of_large_images_are_said(own, caplog):
    large = Image.new("RGB", (1200, 900), (90, 120, 30))
    for name in TRAIN[:4]:
        large.save(own / f"images/{name}.jpg")
        make_data.save(np.zeros((900, 1200), np.uint8), own / f"masks/{name}.png")
    small = {"augment": augment(crop=[96, 128])}
    said = logged_by_train(own, caplog, **small)
    text = "A training crop of 128 x 96 pixels shows 1.1 % of an image of 1200 x 900"
    assert text in said
    height, width = map(int, re.search(r"data\.resize=\[(\d+),(\d+)\]", said).groups())
    assert 0.15 < 96 * 128 / (height * width) < 0.4
    assert abs(width / height - 4 / 3) < 0.2
    assert "A training crop" not in logged_by_train(own, caplog, **small, resize=[height, width])
    assert "A training crop" not in logged_by_train(own, caplog, augment=augment(crop=[320, 480]))
    assert "A training crop" not in logged_by_train(own, caplog)


def test_of_photographs_of_several_shapes_a_longest_side_is_advised(own, caplog):
    for number, name in enumerate(TRAIN[:4]):
        width, height = [(1200, 900), (900, 1200)][number % 2]
        Image.new("RGB", (width, height), (90, 120, 30)).save(own / f"images/{name}.jpg")
        make_data.save(np.zeros((height, width), np.uint8), own / f"masks/{name}.png")
    small = {"augment": augment(crop=[96, 128])}
    said = logged_by_train(own, caplog, **small)
    assert "data.resize" not in said
    side = int(re.search(r"data\.max_side=(\d+) would show more", said).group(1))
    assert 0.15 < 96 * 128 / (side * side * 3 / 4) < 0.4
    assert "A training crop" not in logged_by_train(own, caplog, **small, max_side=side)
    said = logged_by_train(own, caplog, **small, max_side=1000)
    assert f"data.max_side={side} would" in said


def test_e56_inspect_says_it_of_the_crops_in_the_settings(own, command):
    large = Image.new("RGB", (1600, 1200), (90, 120, 30))
    for name in TRAIN:
        large.save(own / f"images/{name}.jpg")
        make_data.save(np.zeros((1200, 1600), np.uint8), own / f"masks/{name}.png")
    settings = [f"data.root={own}", "output_dir=report", "data.augment.crop=[64,96]"]
    assert "A training crop of 96 x 64 pixels shows 0.32 %" in command("inspect", *settings)[1]


# Numbers


def test_a_clean_dataset_is_reported_as_numpy_counts_it(own):
    make_data.save(make_data.blocks(3, [0, 1]), own / "masks/photo_3.png")
    command = [sys.executable, "-m", "seg_torch", "inspect", f"data.root={own}"]
    # Else matplotlib, which torchmetrics imports, would list all fonts in the new cache folder.
    fonts = {"MPLCONFIGDIR": str(Path.home() / ".cache/matplotlib")}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **fonts}
    result = subprocess.run(
        command, cwd=own.parent, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stderr) == (0, "")
    [path] = own.parent.glob("runs/*-inspect/inspect.json")
    report = json.loads(path.read_text())
    assert report["problems"] == report["duplicates"] == []

    splits = {"train": TRAIN, "val": ["photo_6", "photo_7", "photo_8"], "test": ["more/photo_9"]}
    for split, names in splits.items():
        masks = np.stack([np.asarray(Image.open(own / "masks" / f"{n}.png")) for n in names])
        assert report["splits"][split] == {
            "images": len(names),
            "pixels": masks.size,
            "unlabelled_pixels": int((masks == 255).sum()),
        }
        for i, name in enumerate(("background", "traffic light", "car")):
            assert report["classes"][name]["pixels"][split] == (masks == i).sum()
            assert report["classes"][name]["images"][split] == (masks == i).any((1, 2)).sum()
    images = np.stack([np.asarray(Image.open(own / "images" / f"{n}.jpg")) for n in TRAIN]) / 255.0
    np.testing.assert_allclose(report["mean"], images.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(report["std"], images.std((0, 1, 2)), rtol=1e-12)
    for text in ("traffic light", "255 stands for pixels that are not labelled", str(path.name)):
        assert text in result.stdout


@pytest.mark.promise(18)
def test_the_weights_are_those_of_the_loss_and_unseen_classes_are_named(own, caplog):
    lines = ["background", "traffic light", "car", "tram", "bus"]
    make_data.write_lines(own / "classes.txt", lines)
    mask = make_data.blocks(8, [0, 1, 4])
    make_data.save(mask, own / "masks/photo_8.png")
    make_data.save(np.where(mask == 4, 0, mask), own / "masks/more/photo_9.png")
    report = inspect_dataset(datasets.folder, own)
    weights = [row["weight"] for row in report["classes"].values()]
    counts = [row["pixels"]["train"] for row in report["classes"].values()]
    total = sum(counts)
    expected = [total / (3 * count) if count else 0 for count in counts]
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    loss = CrossEntropyLoss("dataset")
    with caplog.at_level(logging.INFO, "seg_torch"):
        loss.set_pixel_counts(SegmentationDataModule(datasets.folder, str(own)).pixel_counts())
    assert f"class weights (inverse): {[round(weight, 4) for weight in weights]}" in caplog.text
    np.testing.assert_allclose(loss.class_weights, weights, rtol=1e-6)
    notes = "\n".join(report["notes"])
    assert "Never seen in train, so never learnt: tram, bus." in notes
    assert "Never seen in test, so without a score there: car." in notes
    assert "Never seen in val" not in notes


def test_statistics_are_of_the_images_as_training_sees_them(own):
    """16-bit grey is scaled and orientation 6 is applied, not an error of size."""
    grey = np.full((48, 64), 32896, np.uint16)  # 128 * 257
    make_data.write_lines(own / "train.txt", ["deep", "turned"])
    make_data.save(grey, own / "images/deep.png")
    make_data.save(np.zeros((48, 64), np.uint8), own / "masks/deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48), (10, 20, 30)).save(own / "images/turned.png", exif=exif)
    make_data.save(np.zeros((64, 48), np.uint8), own / "masks/turned.png")
    report = inspect_dataset(datasets.folder, own)
    assert not report["refused"]
    expected = (np.array([128 + 10, 128 + 20, 128 + 30]) / 2 / 255).tolist()
    np.testing.assert_allclose(report["mean"], expected, rtol=1e-12)


# Duplicates


def test_images_that_are_in_two_splits_are_found_and_others_are_not(own):
    train = own / "images"
    shutil.copy(train / "photo_0.jpg", train / "photo_6.jpg")
    picture = make_data.picture(1, 96, 128)
    picture.save(train / "photo_1.jpg", quality=95)
    make_data.save(make_data.blocks(1, [0, 1, 2], height=96, width=128), own / "masks/photo_1.png")
    picture.save(train / "photo_7.jpg", quality=30)
    shutil.copy(own / "masks/photo_1.png", own / "masks/photo_7.png")
    brighter = ImageEnhance.Brightness(Image.open(train / "photo_2.jpg")).enhance(1.1)
    brighter.resize((32, 24)).save(train / "more/photo_9.jpg")
    make_data.save(np.zeros((24, 32), np.uint8), own / "masks/more/photo_9.png")
    report = inspect_dataset(datasets.folder, own)
    found = [[*d["splits"], *(Path(n).name for n in d["names"])] for d in report["duplicates"]]
    assert found == [
        ["train", "val", "photo_0.jpg", "photo_6.jpg"],
        ["train", "val", "photo_1.jpg", "photo_7.jpg"],
        ["train", "test", "photo_2.jpg", "photo_9.jpg"],
    ]
    assert [d["indices"] for d in report["duplicates"]] == [[0, 0], [1, 1], [2, 0]]
    assert [d["exact"] for d in report["duplicates"]] == [True, False, False]
    assert not report["refused"]
    notes = "\n".join(report["notes"])
    assert "2 of 3 images of val are in train, too: 1 exactly, 1 nearly." in notes
    assert "1 of 1 images of test are in train, too: 0 exactly, 1 nearly." in notes


def test_images_without_contrast_have_no_near_duplicates(own):
    """Such as dark frames, which have nothing in common but the faint shade of the lens."""
    shade = np.zeros((48, 64, 3), np.uint8)
    shade[:, 32:] = 1
    for i, path in enumerate(sorted((own / "images").rglob("*.jpg"))):
        make_data.save(shade + np.uint8(20 * i), path.with_suffix(".png"))
        path.unlink()
    assert inspect_dataset(datasets.folder, own)["duplicates"] == []


def test_val_in_place_of_test_is_said_and_is_no_duplicate(own, monkeypatch):
    (own / "test.txt").unlink()
    read = []
    examine = check._examine
    monkeypatch.setattr(check, "_examine", lambda d, i: read.append(i) or examine(d, i))
    report = inspect_dataset(datasets.folder, own)
    assert len(read) == 6 + 3
    assert report["duplicates"] == []
    assert "There are no test images of their own: val stands in for test." in report["notes"]


@pytest.mark.parametrize("name", [n[5:] for n in dir(make_data) if n.startswith("make_")])
def test_every_dataset_passes(tmp_path, name):
    getattr(make_data, f"make_{name}")(tmp_path)
    report = inspect_dataset(getattr(datasets, name), tmp_path)
    assert report["problems"] == []
    assert {"train", "val"} <= report["splits"].keys()


def test_generated_shapes_have_no_duplicates():
    def small(split):
        return datasets.shapes(split, size=64, train=60, val=30, test=30)

    report = inspect_dataset(small)
    assert not report["refused"]
    assert report["duplicates"] == []
    assert all(row["pixels"]["train"] for row in report["classes"].values())


# The second start, and many files


def test_the_second_start_opens_no_file(own, monkeypatch):
    data = SegmentationDataModule(datasets.folder, str(own))
    data.check_files()
    monkeypatch.setattr(Image, "open", None)
    data.check_files()
    assert data.pixel_counts().sum() > 0
    monkeypatch.undo()


@pytest.mark.parametrize("content", [b"", b"PK cut off"])
def test_a_damaged_memory_is_made_anew(own, new_cache_folder, content):
    train = datasets.folder(own, "train")
    expected = check.check(train).pixels
    [path] = new_cache_folder.rglob("*.npz")
    path.write_bytes(content)
    assert (check.check(train).pixels == expected).all()
    assert (check.check(train).pixels == expected).all()
    assert len(path.read_bytes()) > 100


def test_problems_are_found_again(own):
    original = (own / "masks/photo_1.png").read_bytes()
    (own / "masks/photo_1.png").write_bytes(b"")
    for _ in range(2):
        assert inspect_dataset(datasets.folder, own)["refused"]
    (own / "masks/photo_1.png").write_bytes(original)
    assert not inspect_dataset(datasets.folder, own)["refused"]


def test_many_files_show_progress_and_how_to_skip_the_check(own, monkeypatch, caplog):
    monkeypatch.setattr(check, "MANY", 5)
    data = SegmentationDataModule(datasets.folder, str(own))
    with caplog.at_level(logging.INFO, "seg_torch"):
        data.check_files()
    assert "checking the 6 samples of train; with data.check=false train does not" in caplog.text
    assert "checked 3 of 6" in caplog.text
    assert "of val" not in caplog.text
    (own / "images/photo_0.jpg").write_bytes(b"no image")
    SegmentationDataModule(datasets.folder, str(own), check=False).check_files()


def test_ctrl_c_ends_the_check_at_once(monkeypatch):
    read = []

    class Slow(Written):
        def __len__(self):
            return 300

        def __getitem__(self, index):
            read.append(index)
            time.sleep(0.01)
            return super().__getitem__(0)

    def interrupted(samples, *_, **__):
        yield next(samples)
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "track", interrupted)
    with pytest.raises(KeyboardInterrupt) as stop:  # whose traceback keeps the generators alive
        check.check(as_dataset(Slow("train")))
    done = len(read)
    time.sleep(0.1)
    assert len(read) == done < 300
    assert stop.value.__traceback__


# The page


class Page(HTMLParser):
    """The tags, texts and pictures of a page; every tag that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.pictures, self.tags, self.open = [], [], set(), []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for key, value in attributes:
            assert key not in ("href", "srcset", "onload")
            if key == "src":
                kind, content = value.split(",")
                assert kind == "data:image/jpeg;base64"
                picture = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
                self.pictures.append(np.asarray(picture))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_one_file_with_pictures_of_every_split_and_escaped_names(own, command):
    (own / "images/photo_3.jpg").rename(own / "images/a<b>&.jpg")
    (own / "masks/photo_3.png").rename(own / "masks/a<b>&.png")
    make_data.write_lines(own / "train.txt", [*TRAIN[:3], *TRAIN[4:], "a<b>&"])
    make_data.write_lines(own / "classes.txt", ["background", "<script>", "car"])
    shutil.copy(own / "images/photo_2.jpg", own / "images/photo_7.jpg")
    (own / "masks/photo_1.png").write_bytes(b"")
    (own.parent / "report").mkdir()
    (own.parent / "report/notes.txt").write_text("mine")
    assert command("inspect", f"data.root={own}", "output_dir=report")[0] == 1
    assert {path.name for path in (own.parent / "report").iterdir()} == {
        "inspect.html",
        "inspect.json",
        "notes.txt",
    }
    text = (own.parent / "report/inspect.html").read_text(encoding="utf-8")
    assert "http" not in text
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "b"}
    assert {"<script>", "a<b>&.jpg"} <= set(page.texts)
    # An image and its overlay of each sample, and one pair of duplicates.
    assert len(page.pictures) == 2 * (5 + 3 + 1) + 2
    assert np.array_equal(*page.pictures[:2])
    assert all(picture.shape == (48, 64, 3) for picture in page.pictures)


def test_help_answers_at_once():
    before = os.times()
    page = subprocess.run(
        [sys.executable, "-m", "seg_torch", "inspect", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    assert sum(os.times()[2:4]) - sum(before[2:4]) < 1.5
    assert "seg-torch inspect my_data" in page
    assert "output_dir=" in page


# Real data


@pytest.mark.slow
def test_real_camvid_is_clean_and_its_splits_share_no_frame(tmp_path):
    if "SEG_TORCH_DATA" not in os.environ:
        pytest.skip("SEG_TORCH_DATA does not name a folder with the real datasets")
    root = Path(os.environ["SEG_TORCH_DATA"]) / "camvid"
    report = inspect_dataset(datasets.camvid, root, tmp_path)
    assert (report["problems"], report["duplicates"]) == ([], [])
    published = [10682767, 14750079, 623349, 20076880, 2845085, 6166762, 743859, 714595]
    counts = [row["pixels"]["train"] for row in report["classes"].values()]
    assert counts == [*published, 3719877, 405385, 184967]
    pixels = np.stack([np.asarray(Image.open(p)) for p in sorted((root / "train").glob("*.png"))])
    for channel in range(3):
        values = pixels[..., channel] / 255
        assert report["mean"][channel] == pytest.approx(values.mean(), rel=1e-9)
        assert report["std"][channel] == pytest.approx(values.std(), rel=1e-9)
    assert len(Page((tmp_path / "inspect.html").read_text()).pictures) == 2 * 2 * 6


def test_e54_photos_that_are_not_read_are_counted_by_inspect_and_train(own, caplog):
    for name in ("a.HEIC", "b.heic", "more/c.mov", "notes.txt", "._d.heic"):
        (own / "images" / name).touch()
    module = SegmentationDataModule(datasets.folder, str(own))
    expected = (
        "Left out beside the images of train, since these formats are not read: 2 .heic. "
        "Converted to PNG or JPEG they would count."
    )
    assert expected in inspect_dataset(datasets.folder, own)["notes"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        module.check_files()
    told = [record.getMessage() for record in caplog.records]
    assert told.count(expected) == 1
    assert expected.replace("train", "test").replace("2 .heic", "1 .mov") in told

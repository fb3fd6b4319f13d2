"""The check of all files."""

from __future__ import annotations

import os

import make_data
import numpy as np
import pytest
from PIL import Image

from seg_torch import datasets
from seg_torch.data.check import check
from seg_torch.data.module import SegmentationDataModule
from seg_torch.errors import InputError

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture
def own(tmp_path):
    """A folder dataset to be broken by the test."""
    make_data.make_folder(tmp_path)
    return tmp_path


def check_folder(root):
    SegmentationDataModule(datasets.folder, str(root)).check_files()


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
    lying.resize((64, 40)).save(own / "images" / "photo_0.jpg", exif=exif)
    with pytest.raises(InputError, match=r"photo_0\.png.*64 x 48.*40 x 64"):
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


@pytest.mark.parametrize("workers", [1, 4])
def test_regions_grey_images_and_the_upper_half_are_those_of_the_files(
    tmp_path, monkeypatch, workers
):
    monkeypatch.setattr("seg_torch.datasets.base.available_cpus", lambda: workers)
    rng, expected, grey = np.random.default_rng(0), [], []
    make_data.write_lines(tmp_path / "classes.txt", ["background", "cat"])
    make_data.write_lines(tmp_path / "train.txt", list("0123"))
    make_data.write_lines(tmp_path / "val.txt", ["4"])
    upper = np.zeros(256, int)
    for i, height in enumerate([48, 33, 1, 40, 40]):
        photo = rng.integers(0, 256, (height, 40, 3), np.uint8)
        if i % 2:
            photo[:] = photo[..., :1]
        mask = np.full((height, 40), 255, np.uint8)
        if i < 3:
            mask[:, 10:] = 0
            mask[height // 3, 20:30] = 1
            expected += [(i, 0), (i, 1)] if height > 1 else [(i, 0), (i, 0), (i, 1)]
        make_data.save(photo, tmp_path / "images" / f"{i}.png")
        make_data.save(mask, tmp_path / "masks" / f"{i}.png")
        if i < 4:
            upper += np.bincount(mask[: height // 2].ravel(), minlength=256)
            grey.append(i % 2 == 1)
    dataset = datasets.folder(tmp_path, "train")
    for _ in range(2):  # the second time as it is remembered
        found = check(dataset)
        assert found.regions[:, :2].tolist() == [list(row) for row in expected]
        assert found.regions.dtype == np.int32
        assert found.regions[:2].tolist() == [
            [0, 0, 48 * 30 - 10, 0, 10, 48, 30],
            [0, 1, 10, 16, 20, 1, 10],
        ]
        assert found.grey.tolist() == grey
        assert found.upper.tolist() == upper.tolist()
        assert found.upper.dtype == np.int64
        monkeypatch.setattr("seg_torch.data.check._examine", None)


def test_what_other_code_measured_is_not_remembered(own, monkeypatch):
    train = datasets.folder(own, "train")
    assert len(check(train).regions)
    monkeypatch.setattr("seg_torch.data.check.regions", lambda mask: np.zeros((0, 6), np.int32))
    assert check(train).regions.shape == (0, 7)

"""EXIF orientation: one rule for a photo and its mask, and damaged EXIF data."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from test_images import chunk

from seg_torch.data.module import SegmentationDataModule
from seg_torch.datasets import folder
from seg_torch.errors import InputError
from seg_torch.images.convert import turned
from seg_torch.images.format import ImageFormat
from seg_torch.images.read import image_size, read_image

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture(autouse=True)
def everything_is_logged(caplog):
    caplog.set_level("INFO")


STORED = np.random.default_rng(0).integers(0, 4, (20, 30), np.uint8)


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def seen(orientation: int, pixels: np.ndarray = STORED) -> np.ndarray:
    """What Pillow shows of stored pixels."""
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def write_dataset(root: Path, photo: int, mask: int, suffix: str, as_seen: bool = False) -> Path:
    """Four photos with the masks of what is on them, each with its own EXIF orientation.

    Masks are stored like their photos or, `as_seen`, as these are shown.
    """
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for i in range(4):
        stored = np.roll(STORED, i, 0)
        rgb = Image.fromarray(np.stack([60 * stored] * 3, 2))
        rgb.save(root / f"images/{i}.png", exif=exif(photo))
        pixels = seen(photo, stored) if as_seen else stored
        image = Image.fromarray(pixels)
        if suffix == "colours.png":
            image = Image.fromarray(np.stack([pixels, 0 * pixels, 0 * pixels], 2))
        image.save(root / f"masks/{i}.{suffix.split('.')[-1]}", exif=exif(mask))
    colours = "".join(f"c{i}" + f" {i} 0 0" * (suffix == "colours.png") + "\n" for i in range(4))
    (root / "classes.txt").write_text(colours)
    return root


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "colours.png"])
def test_e12_a_mask_is_turned_like_its_photo(tmp_path, orientation, suffix):
    root = write_dataset(tmp_path, orientation, orientation, suffix)
    samples = folder(root, "train")
    for image, mask in (samples[i] for i in range(len(samples))):
        assert (image[0] == 60 * mask).all()
        assert len(mask.unique()) == 4
    SegmentationDataModule(folder, str(root)).check_files()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_e12_a_mask_that_was_drawn_on_the_stored_pixels_is_found_by_its_size(
    tmp_path, orientation, caplog
):
    root = write_dataset(tmp_path, orientation, 1, "png")
    samples = folder(root, "train")
    for image, mask in (samples[i] for i in range(len(samples))):
        assert (image[0] == 60 * mask).all()
    data = SegmentationDataModule(folder, str(root))
    for _ in ("checked", "remembered"):
        caplog.clear()
        data.check_files()
        assert f"{len(samples)} masks of train have the size of their photo as it is" in caplog.text
    counts = np.bincount(np.concatenate([np.ravel(m) for _, m in samples]), minlength=4)
    assert data.pixel_counts().tolist() == counts.tolist()


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_e12_where_the_size_cannot_tell_the_check_says_so(tmp_path, orientation, caplog):
    root = write_dataset(tmp_path / "seen", orientation, 1, "png", as_seen=True)
    samples = folder(root, "train")
    assert all((image[0] == 60 * mask).all() for image, mask in (samples[i] for i in range(3)))
    SegmentationDataModule(folder, str(root)).check_files()
    assert f"{len(samples)} photos of train are turned by their EXIF" in caplog.text
    caplog.clear()
    root = write_dataset(tmp_path / "both", orientation, orientation, "png")
    SegmentationDataModule(folder, str(root)).check_files()
    assert "turned" not in caplog.text


def test_e12_a_mask_of_another_size_is_none_of_a_turned_photo(tmp_path):
    root = write_dataset(tmp_path, 1, 1, "png")
    turn = Image.fromarray(STORED.T.copy())
    turn.save(root / "masks/0.png")  # neither of the two says that it is turned
    with pytest.raises(InputError, match=r"0\.png: the mask has 20 x 30 pixels"):
        SegmentationDataModule(folder, str(root)).check_files()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_e12_channels_that_are_read_as_they_are_are_upright_as_well(tmp_path, orientation, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, STORED, extratags=[(274, "H", 1, orientation, True)])
    else:
        Image.fromarray(STORED).save(path, exif=exif(orientation))
    assert ImageFormat(1).read(path)[..., 0].tolist() == seen(orientation).tolist()
    assert ImageFormat(1).size(path) == seen(orientation).shape
    assert turned(STORED, orientation).tolist() == seen(orientation).tolist()


# Damaged EXIF data


def damaged(pixels: np.ndarray) -> dict[str, bytes]:
    """PNG files whose EXIF data, or notes, are damaged, in ways that no viewer minds."""
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    size = struct.pack(">II", pixels.shape[1], pixels.shape[0])
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\0\0\0\0")
    end = chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    whole = exif(6).tobytes().removeprefix(b"Exif\0\0")
    wrong = bytearray(chunk(b"eXIf", exif(1).tobytes().removeprefix(b"Exif\0\0")))
    wrong[-1] ^= 1
    text = bytearray(chunk(b"tEXt", b"Comment\0none"))
    text[-1] ^= 1
    blocks = {
        "no TIFF": chunk(b"eXIf", b"no TIFF at all"),
        "cut off": chunk(b"eXIf", whole[:12]),
        "empty": chunk(b"eXIf", b""),
        "beyond the end": chunk(b"eXIf", b"II*\0\xff\xff\xff\x7f"),
        "a wrong checksum": bytes(wrong),
        "a text of a wrong checksum": bytes(text),
    }
    files = {name: start + block + b"".join(end) for name, block in blocks.items()}
    files |= {f"{name}, behind": start + end[0] + b + end[1] for name, b in blocks.items()}
    return files


@pytest.mark.parametrize("name", damaged(STORED))
def test_e37_damaged_exif_data_are_no_matter(tmp_path, name):
    path = tmp_path / "a.png"
    path.write_bytes(damaged(60 * STORED)[name])
    assert read_image(path)[..., 1].tolist() == (60 * STORED).tolist()
    assert image_size(path) == STORED.shape
    assert ImageFormat(1).read(path)[..., 0].tolist() == (60 * STORED).tolist()


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_e37_in_other_files_as_well(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(60 * STORED).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert read_image(path).shape == (*STORED.shape, 3)
    assert image_size(path) == STORED.shape


def test_e37_a_png_whose_pixels_are_damaged_is_refused_all_the_same(tmp_path):
    content = bytearray(damaged(STORED)["a wrong checksum"])
    content[content.index(b"IDAT") + 9] ^= 255
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png: cannot be read"):
        read_image(tmp_path / "a.png")

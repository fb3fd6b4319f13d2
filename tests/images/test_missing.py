"""Pixels without data, as rasterio (GDAL) finds them, and bands that are no transparency."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
import scenes
from PIL import Image
from scenes import VALID, hidden, pixels, with_alpha

from seg_torch.errors import InputError
from seg_torch.images.format import RGB, ImageFormat
from seg_torch.images.missing import missing

NAN = float("nan")
SCENES = {
    "a value": (hidden(pixels(), 0), {"nodata": 0}),
    "a value in some bands": (np.where(pixels() < 100, 7, pixels()), {"nodata": 7}),
    "a value of grey": (hidden(pixels(1), 255), {"nodata": 255}),
    "no value of this type": (pixels(), {"nodata": None}),
    "a palette": (hidden(pixels(1), 9), {"nodata": 9, "photometric": "palette"}),
    "16 bits": (hidden(257 * pixels(1).astype(np.uint16), 0), {"nodata": 0}),
    "colours of 16 bits": (
        hidden(200 * pixels().astype(np.uint16) % 700 + 1, 0),
        {"nodata": 0, "photometric": "RGB"},
    ),
    "32 bits": (hidden(257 * pixels(1).astype(np.int32), -1), {"nodata": -1}),
    "no number": (hidden(pixels(1) / np.float32(255), NAN), {"nodata": NAN}),
    "no number, unsaid": (hidden(pixels(1) / np.float32(255), NAN), {}),
    "the least float": (hidden(pixels(1) / np.float32(255), -3.4e38), {"nodata": -3.4e38}),
    "transparency": (with_alpha(pixels()), {}),
    "transparency of grey": (with_alpha(pixels(1)), {"alpha": "yes"}),
    "band by band": (with_alpha(pixels()), {"interleave": "band"}),
    "a mask": (pixels(), {"mask": "inside"}),
    "a mask beside it": (pixels(), {"mask": "beside"}),
    "a mask in tiles": (
        pixels(),
        {"mask": "inside", "tiled": True, "blockxsize": 16, "blockysize": 16},
    ),
    "a mask of JPEG": (pixels(), {"mask": "inside", "compress": "jpeg"}),
    "a mask of LZW": (pixels(), {"mask": "inside", "compress": "lzw"}),
}


def expected_in(path) -> np.ndarray:
    with rasterio.open(path) as file:
        found = file.dataset_mask() != 0
        if file.dtypes[0] == "float32":
            found &= np.isfinite(file.read(1))
        return found


@pytest.mark.parametrize("name", SCENES)
def test_e59_pixels_without_data_are_those_of_gdal(tmp_path, name):
    values, options = SCENES[name]
    path = scenes.write(tmp_path / "a.tif", values, **options)
    if options.get("nodata") is not None or options.get("mask"):
        with rasterio.open(path, "r+") as file:  # smaller copies follow, those of the mask, too
            file.build_overviews([2])
    expected = expected_in(path)
    assert expected.all() == (name == "no value of this type")
    image = RGB.read(path)
    found = missing(image)
    assert (np.zeros_like(VALID) if found is None else found).tolist() == (~expected).tolist()


@pytest.mark.parametrize("name", ["a value", "a value in some bands", "a mask", "a mask beside it"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_e59_also_where_channels_are_read_as_they_are(tmp_path, name, dtype):
    values, options = SCENES[name]
    values = np.concatenate([values, values[:2]]).astype(dtype)
    path = scenes.write(tmp_path / "a.tif", values, **options)
    image = ImageFormat(5, 8 * np.dtype(dtype).itemsize).read(path)
    assert np.ma.getdata(image).tolist() == np.moveaxis(values, 0, 2).tolist()
    found = missing(image)
    assert (np.zeros_like(VALID) if found is None else found).tolist() == (
        ~expected_in(path)
    ).tolist()


def test_e59_of_several_files_all_have_to_lack_data(tmp_path):
    scenes.write(tmp_path / "a_1.tif", hidden(pixels(1), 0), nodata=0)
    second = pixels(1)
    second[:, :24] = 0
    scenes.write(tmp_path / "a_2.tif", second, nodata=0)
    scenes.write(tmp_path / "b_1.tif", hidden(pixels(1), 0), nodata=0)
    scenes.write(tmp_path / "b_2.tif", pixels(1))
    format = ImageFormat(2, files=("_1.tif", "_2.tif"))
    found = missing(format.read(tmp_path / "a_1.tif"))
    assert found.tolist() == (~VALID & (np.arange(48) < 24)[:, None]).tolist()
    assert missing(format.read(tmp_path / "b_1.tif")) is None


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "tif"])
def test_e59_what_is_wholly_transparent_is_no_data(tmp_path, suffix):
    image = Image.fromarray(np.moveaxis(with_alpha(pixels()), 0, 2))
    image.save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    read = RGB.read(tmp_path / f"a.{suffix}")
    assert missing(read).tolist() == (~VALID).tolist()
    assert (np.ma.getdata(read)[~VALID] == 255).all()  # as it is seen on white


def test_e59_what_is_half_transparent_has_data(tmp_path):
    rgba = np.full((4, 4, 4), 128, np.uint8)
    rgba[0, 0, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = RGB.read(tmp_path / "a.png")
    assert np.argwhere(missing(image)).tolist() == [[0, 0]]
    assert np.ma.getdata(image)[1, 1].tolist() == [191, 191, 191]


def infrared(seed: int = 1) -> np.ndarray:
    return np.concatenate([pixels(), pixels(1, seed)])


def bordered() -> np.ndarray:
    """Most of the scene is a black border, in all bands."""
    values = infrared()
    values[:, :, :80] = 0
    return values


@pytest.mark.parametrize(
    ("values", "options", "reason"),
    [
        (infrared(), {}, "neither 0 nor 255"),
        (bordered(), {}, "neither 0 nor 255"),
        (with_alpha(pixels()), {"names": {4: "NIR"}}, "its name is 'NIR'"),
        (infrared(), {"alpha": "no"}, "the file does not say"),
        (np.concatenate([pixels(), 0 * pixels(1)]), {}, "0 everywhere"),
        (infrared(), {"compress": "lzw", "tiled": True}, "neither 0 nor 255"),
    ],
)
def test_e60_a_fourth_band_that_is_no_transparency_is_left_out_and_told(
    tmp_path, values, options, reason
):
    path = scenes.write(tmp_path / "a.tif", values, **options)
    image = RGB.read(path)
    assert missing(image) is None
    assert np.ma.getdata(image).tolist() == np.moveaxis(values[:3], 0, 2).tolist()
    [remark] = RGB.remarks(path).values()
    assert reason in remark
    assert "data.channels=4" in remark
    assert ImageFormat(4).remarks(path) == {}


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (with_alpha(pixels()), {}),
        (with_alpha(pixels()), {"names": {4: "Alpha mask"}}),
        (np.concatenate([pixels(), np.full_like(pixels(1), 128)]), {}),  # a watermark
    ],
)
def test_e60_what_may_be_transparency_is(tmp_path, values, options):
    path = scenes.write(tmp_path / "a.tif", values, **options)
    assert RGB.remarks(path) == {}
    with Image.open(path) as image:
        white = Image.new("RGBA", image.size, "white")
        expected = Image.alpha_composite(white, image).convert("RGB")
    assert np.ma.getdata(RGB.read(path)).tolist() == np.asarray(expected).tolist()


def test_e60_the_alpha_of_a_png_is_taken_at_its_word(tmp_path):
    """It is what the format says; a soft shadow has as many values as an infrared band."""
    Image.fromarray(np.moveaxis(infrared(), 0, 2)).save(tmp_path / "a.png")
    assert RGB.remarks(tmp_path / "a.png") == {}
    seen = np.ma.getdata(RGB.read(tmp_path / "a.png"))
    assert (seen >= np.moveaxis(pixels(), 0, 2)).all()


def test_e59_pillow_images_and_masked_arrays_are_read_alike(tmp_path):
    rgba = Image.fromarray(np.moveaxis(with_alpha(pixels()), 0, 2))
    assert missing(RGB.checked(rgba)).tolist() == (~VALID).tolist()
    scene = np.moveaxis(pixels(), 0, 2)
    some = np.stack([~VALID, ~VALID, np.ones_like(VALID)], 2)
    checked = RGB.checked(np.ma.MaskedArray(scene, some))
    assert missing(checked).tolist() == (~VALID).tolist()
    assert missing(RGB.checked(scene)) is None


def test_a_page_that_follows_is_no_mask(tmp_path):
    first, second = (Image.fromarray(np.moveaxis(pixels(3, seed), 0, 2)) for seed in (0, 1))
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second, first.convert("L")])
    assert RGB.read(tmp_path / "a.tif").tolist() == np.asarray(first).tolist()


def test_a_damaged_mask_is_no_image_without_one(tmp_path):
    path = scenes.write(tmp_path / "a.tif", pixels(), mask="inside", compress="deflate")
    content = path.read_bytes()
    cut = content[: -(len(content) - content.rindex(b"x\x9c")) + 3]  # the mask is written last
    path.write_bytes(cut)
    with pytest.raises(InputError, match=r"a\.tif"):
        RGB.read(path)

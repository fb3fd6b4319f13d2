import random
import struct
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from seg_torch.datasets.base import read_index_mask
from seg_torch.errors import InputError
from seg_torch.files import write_atomically
from seg_torch.images import read as images
from seg_torch.images.missing import missing
from seg_torch.images.read import image_size, read_image

RED = [200, 30, 40]


def written(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


def test_rgb_is_read_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = written(Image.fromarray(pixels), tmp_path / "a.png")
    image = read_image(path)
    assert image.dtype == np.uint8
    assert (image == pixels).all()


def test_grey_fills_all_three_channels(tmp_path):
    path = written(Image.fromarray(np.array([[0, 77]], np.uint8)), tmp_path / "a.png")
    assert read_image(path).tolist() == [[[0, 0, 0], [77, 77, 77]]]


def test_black_and_white_is_0_and_255(tmp_path):
    path = written(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"), tmp_path / "a.png")
    assert read_image(path).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_a_palette_image_is_read_by_its_colours(tmp_path):
    image = Image.fromarray(np.array([[1, 0]], np.uint8))
    image.putpalette([0, 0, 0, *RED])
    assert read_image(written(image, tmp_path / "a.png")).tolist() == [[RED, [0, 0, 0]]]


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.array([[[*RED, 255], [*RED, 0]]], np.uint8)
    path = written(Image.fromarray(rgba), tmp_path / "a.png")
    assert np.ma.getdata(read_image(path)).tolist() == [[RED, [255, 255, 255]]]


def test_a_transparent_palette_entry_is_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([0, 0, 0, *RED])
    path = written(image, tmp_path / "a.png", transparency=0)
    assert np.ma.getdata(read_image(path)).tolist() == [[[255, 255, 255], RED]]


def test_cmyk_becomes_rgb(tmp_path):
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan, all magenta, all yellow: red
    red, green, blue = read_image(written(cmyk, tmp_path / "a.tif"))[4, 4]
    assert red > 250
    assert green < 5
    assert blue < 5


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)  # 257 times 0, 1, 128, 255
    path = written(Image.fromarray(values), tmp_path / f"a.{suffix}")
    assert read_image(path)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floats_run_from_0_to_1(tmp_path):
    values = np.array([[0, 0.2, 1]], np.float32)
    path = written(Image.fromarray(values), tmp_path / "a.tif")
    assert read_image(path)[0, :, 0].tolist() == [0, 51, 255]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_has_no_value_in_a_float_image_is_black(tmp_path, value):
    values = np.array([[value, 0.2]], np.float32)
    path = written(Image.fromarray(values), tmp_path / "a.tif")
    assert np.ma.getdata(read_image(path))[0, :, 0].tolist() == [0, 51]
    assert missing(read_image(path)).tolist() == [[True, False]]


def test_exif_orientation_6_is_turned_clockwise(tmp_path):
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = RED  # stored at the top left, seen at the top right
    exif = Image.Exif()
    exif[0x0112] = 6
    image = read_image(written(Image.fromarray(pixels), tmp_path / "a.png", exif=exif))
    assert image.shape == (3, 2, 3)
    assert image[0, 1].tolist() == RED
    assert int(image.sum()) == sum(RED)


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 are not defined
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_the_size_from_the_header_is_that_of_the_upright_image(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = written(Image.new("RGB", (30, 20)), tmp_path / f"a.{suffix}", exif=exif)
    assert image_size(path) == read_image(path).shape[:2]


def test_for_the_size_no_pixels_are_decoded(tmp_path):
    path = written(Image.new("RGB", (300, 200)), tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match="cannot be read"):
        read_image(path)
    assert image_size(path) == (200, 300)


def test_a_file_without_a_header_has_no_size(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    assert image_size(tmp_path / "text.jpg") is None
    assert image_size(tmp_path / "gone.jpg") is None


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png: no such file"):
        read_image(tmp_path / "gone.png")


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "the file is empty"), (b"no image at all", "cannot be read")]
)
def test_what_is_no_image_is_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"broken\.jpg.*{reason}"):
        read_image(path)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = written(Image.fromarray(noise), tmp_path / "cut.png")
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(InputError, match=r"cut\.png: cannot be read"):
        read_image(path)


def test_postscript_is_not_run_whatever_its_name(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    path = (tmp_path / "a.eps").rename(tmp_path / "a.png")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("it was run"))
    with pytest.raises(InputError, match=r"a\.png: cannot be read.*none of AVIF, BMP"):
        read_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_no_memory_is_taken_for_pixels_that_cannot_be_in_the_file(tmp_path, monkeypatch):
    path = written(Image.new("RGB", (8, 8)), tmp_path / "a.gif")
    content = bytearray(path.read_bytes())
    content[6:10] = (13_000).to_bytes(2, "little") * 2
    path.write_bytes(content)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(InputError, match=r"a\.gif: a file of \d+ bytes .*169,000,000 pixels"):
        read_image(path)


def test_a_large_image_of_one_colour_is_read(tmp_path):
    path = written(Image.new("1", (8000, 4000)), tmp_path / "a.png")
    assert path.stat().st_size < 10_000
    assert not read_image(path).any()


def test_writing_creates_folders_and_replaces_the_file(tmp_path):
    path = tmp_path / "new" / "a.png"
    for colour in ("red", "blue"):
        write_atomically(path, Image.new("RGB", (2, 2), colour).save)
    assert read_image(path)[0, 0].tolist() == [0, 0, 255]
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_when_writing_fails_the_old_file_stays(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail_half_way(name):
        with open(name, "w") as file:
            file.write("ne")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail_half_way)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


# PNG files, with and without the extra "fast"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(header: bytes, rows: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A file of 3 x 2 pixels with chunks before and after the pixels."""
    ihdr = chunk(b"IHDR", struct.pack(">II", 3, 2) + header)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + ihdr + before + pixels + after + chunk(b"IEND", b"")


def png_files() -> dict[str, bytes]:
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    rgba = Image.fromarray(values)
    rgb, files = rgba.convert("RGB"), {}
    saved = {mode: (rgba.convert(mode), {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")}
    saved["I;16"] = Image.fromarray(values[..., 0].astype(np.uint16) * 257), {}
    saved["transparent"] = rgb, {"transparency": rgb.getpixel((0, 0))}
    saved["animated"] = rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}
    for name, (image, options) in saved.items():
        file = BytesIO()
        image.save(file, "PNG", **options)
        files[name] = file.getvalue()
    for level in (1, 9):
        file = BytesIO()
        rgb.resize((90, 70)).save(file, "PNG", compress_level=level)
        files[f"level {level}"] = file.getvalue()
    rows = b"".join(b"\0" + bytes(range(9 * i, 9 * i + 9)) for i in (1, 2))
    wide = b"".join(b"\0" + bytes(range(18 * i, 18 * i + 18)) for i in (1, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = exif.tobytes().removeprefix(b"Exif\0\0")
    as_text = zlib.compress(f"\nexif\n{len(turned)}\n{turned.hex()}".encode())
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    plain = b"\x08\2\0\0\0"
    files |= {
        "16 bit": png(b"\x10\2\0\0\0", wide),
        "gamma": png(plain, rows, chunk(b"gAMA", struct.pack(">I", 100_000))),
        "text": png(plain, rows, chunk(b"tEXt", b"Software\0none")),
        "turned": png(plain, rows, chunk(b"eXIf", turned)),
        "turned by what follows": png(plain, rows, after=chunk(b"eXIf", turned)),
        "turned by a text": png(
            plain,
            rows,
            chunk(b"zTXt", b"Raw profile type exif\0\0" + as_text),
        ),
        "turned by XMP": png(plain, rows, after=chunk(b"iTXt", xmp)),
    }
    return files


def read_by_pillow(path, monkeypatch) -> np.ndarray | str:
    with monkeypatch.context() as patch:
        patch.setattr("seg_torch.images.read._spng_decode", lambda: None)
        return read_or_refused(path)


def read_or_refused(path) -> np.ndarray | str:
    try:
        return read_image(path)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("name", png_files())
def test_libspng_gives_the_pixels_that_pillow_gives(tmp_path, monkeypatch, name):
    pytest.importorskip("imagecodecs")
    path = tmp_path / "a.png"
    path.write_bytes(png_files()[name])
    expected, found = read_by_pillow(path, monkeypatch), read_image(path)
    assert np.array_equal(found, expected)
    assert found.flags.writeable
    assert ("turned" in name) == (found.shape == (3, 2, 3))


def test_a_plain_png_is_not_decoded_by_pillow_where_libspng_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("imagecodecs")
    path = written(Image.new("RGB", (3, 2), "red"), tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
    assert read_image(path)[1, 2].tolist() == [255, 0, 0]
    path = written(Image.new("L", (3, 2), 7), tmp_path / "mask.png")
    assert read_index_mask(path)[1, 2] == 7


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("before", [b"", chunk(b"tRNS", b"\0\1")])
def test_libspng_gives_the_ids_that_pillow_gives(tmp_path, monkeypatch, bits, before):
    pytest.importorskip("imagecodecs")
    path = tmp_path / "a.png"
    of_a_row = -(-3 * bits // 8)
    values = [0, 96, 0, 5, 0, 7] if bits == 16 else [96, 5, 7]
    rows = 2 * (b"\0" + bytes(values[:of_a_row]))
    path.write_bytes(png(bytes([bits]) + b"\0\0\0\0", rows, before))
    with monkeypatch.context() as patch:
        patch.setattr("seg_torch.images.read._spng_decode", lambda: None)
        expected = read_index_mask(path)
    found = read_index_mask(path)
    assert np.array_equal(found, expected)
    assert found.flags.writeable


def test_what_is_not_decoded_to_8_bits_is_left_to_pillow(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(png_files()["16 bit"])
    wide = np.zeros((2, 3, 3), np.uint16)
    monkeypatch.setattr(images, "_spng_decode", lambda: lambda content: wide)
    assert read_image(path).dtype == np.uint8


def test_without_libspng_png_files_are_read_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    images._spng_decode.cache_clear()
    path = written(Image.new("RGB", (3, 2), "red"), tmp_path / "a.png")
    assert read_image(path)[1, 2].tolist() == [255, 0, 0]
    images._spng_decode.cache_clear()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_libspng_refuses_what_pillow_refuses_with_pillows_reason(tmp_path, monkeypatch):
    pytest.importorskip("imagecodecs")
    rng, path = random.Random(0), tmp_path / "a.png"
    content = png_files()["level 9"]
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(rng.choice([1, 1, 4])):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        expected, found = read_by_pillow(path, monkeypatch), read_or_refused(path)
        assert np.array_equal(found, expected)
        refused += isinstance(found, str)
    assert 100 < refused < 300


def test_a_large_image_is_read_as_pillow_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr("seg_torch.images.read.LARGE", 1000)
    pixels = np.random.default_rng(0).integers(0, 256, (600, 7, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.jpg")
    with Image.open(tmp_path / "large.jpg") as expected:
        assert np.array_equal(read_image(tmp_path / "large.jpg"), np.asarray(expected))
    assert read_image(tmp_path / "large.jpg").flags.writeable

"""Datasets of one's own in two folders."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import make_data
import numpy as np
import pytest
import torch
from PIL import Image

from seg_torch import datasets
from seg_torch.data.module import SegmentationDataModule
from seg_torch.datasets.base import read_classes, read_index_mask
from seg_torch.errors import InputError
from seg_torch.labels import VOC_PALETTE

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture
def own(tmp_path):
    """A folder dataset to be broken by the test."""
    make_data.make_folder(tmp_path)
    return tmp_path


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


# Palettes and formats that say something else than the classes


def quantised(root: Path) -> dict[str, np.ndarray]:
    """Store coloured masks with fewer colours, as pngquant does; the masks as they are meant."""
    colour_the_masks(root)
    meant = {}
    for path in (root / "masks").rglob("*.png"):
        rgb = Image.open(path)
        meant[path.stem] = (np.asarray(rgb)[..., None, :] == COLOURS).all(-1).argmax(-1)
        image = Image.fromarray(np.uint8([2, 0, 1])[meant[path.stem]])
        image.putpalette(COLOURS[[1, 2, 0]].tobytes())
        image.save(path)
        assert (np.asarray(Image.open(path).convert("RGB")) == np.asarray(rgb)).all()
    return meant


def test_e05_a_palette_that_contradicts_classes_txt_is_refused_with_the_way_out(own):
    meant = quantised(own)
    lines = ["background 0 0 0", "traffic light 255 0 0", "car 0 0 255"]
    make_data.write_lines(own / "classes.txt", lines)
    with pytest.raises(InputError) as error:
        check_folder(own)
    assert len(error.value.problems) == 10
    assert "value 0 have the colour (255, 0, 0), which stands for class 1" in str(error.value)
    assert "save the masks as RGB" in str(error.value)
    for path in (own / "masks").rglob("*.png"):
        Image.open(path).convert("RGB").save(path)
    dataset = datasets.folder(own, "train")
    for i, pair in enumerate(dataset.pairs):
        assert (dataset.mask(i) == meant[pair.mask.stem]).all()


def test_e05_a_palette_for_viewing_alone_is_no_contradiction(own):
    """That of VOC, and a grey ramp, with colours of the user's own in classes.txt."""
    expected = datasets.folder(own, "val").mask(0)
    make_data.write_lines(own / "classes.txt", ["a 10 20 30", "b 255 0 0", "c 0 0 255"])
    for palette in (bytes(VOC_PALETTE), bytes(i // 3 for i in range(768))):
        for path in (own / "masks").rglob("*.png"):
            image = Image.open(path)
            image = Image.fromarray(np.asarray(image))
            image.putpalette(palette)
            image.save(path)
        check_folder(own)
        assert (datasets.folder(own, "val").mask(0) == expected).all()


@pytest.mark.parametrize("values", [(0, 255), (0, 1), (1, 0)])
def test_e05_black_and_white_palette_masks_are_read_by_black_and_white(own, values):
    expected = datasets.folder(own, "val").mask(0) == 1
    for path in (own / "masks").rglob("*.png"):
        white = np.asarray(Image.open(path)) == 1
        image = Image.fromarray(np.where(white, values[1], values[0]).astype(np.uint8))
        palette = np.zeros((256, 3), np.uint8)
        palette[values[1]] = 255
        image.putpalette(palette.tobytes())
        image.save(path)
    make_data.write_lines(own / "classes.txt", ["background 0 0 0", "cat 255 255 255"])
    check_folder(own)
    assert (datasets.folder(own, "val").mask(0) == expected).all()


def test_e05_labelme_voc_compares_the_palette_with_that_of_the_script(tmp_path):
    make_data.make_labelme_voc(tmp_path)
    for path in (tmp_path / "SegmentationClass").glob("*.png"):
        mask = np.asarray(Image.open(path))
        image = Image.fromarray(np.where(mask == 255, 0, (mask + 1) % 3).astype(np.uint8))
        image.putpalette(np.roll(VOC_PALETTE[:3], 1, axis=0).tobytes())
        image.save(path)
    with pytest.raises(InputError, match="palette contradicts the classes"):
        SegmentationDataModule(datasets.labelme_voc, str(tmp_path)).check_files()


@pytest.mark.parametrize("kind", ["ids", "colours", "no classes.txt"])
def test_e25_e52_masks_saved_as_jpeg_are_refused_as_lossy(own, kind):
    """Ids that lie close together come back as other ids that are classes, too."""
    if kind == "colours":
        colour_the_masks(own)
        lines = ["background 0 0 0", "traffic light 255 0 0", "car 0 0 255"]
        make_data.write_lines(own / "classes.txt", lines)
    for path in list((own / "masks").rglob("*.png")):
        image = Image.open(path)
        image = image if kind == "colours" else Image.fromarray(np.asarray(image) % 255)
        image.save(path.with_suffix(".jpg"), quality=75)
        path.unlink()
    if kind == "no classes.txt":
        (own / "classes.txt").unlink()
    with pytest.raises(InputError, match=r"photo_\d\.jpg: .*JPEG is lossy.*as PNG") as error:
        check_folder(own)
    assert len(str(error.value)) < 2000


def test_e25_a_tiff_of_masks_that_is_compressed_as_jpeg_is_refused(tmp_path):
    Image.new("L", (32, 32), 1).save(tmp_path / "a.tif", compression="jpeg")
    with pytest.raises(InputError, match="JPEG is lossy"):
        read_index_mask(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("ids", "hint"),
    [
        ([1, 2, 3], "Ids count from 0: if these count from 1, subtract 1"),
        ([0, 2, 3], "if 0 is the background, it is named first"),
        ([0, 100, 200], "classes.txt gives each class its own, such as 200 200 200"),
        ([*range(120)], "resizing or smoothing"),
    ],
)
def test_e52_the_likeliest_mistake_is_named(own, ids, hint):
    mask = np.resize(np.uint8(ids), (48, 64))
    make_data.save(mask, own / "masks/photo_0.png")
    with pytest.raises(InputError, match=hint) as error:
        check_folder(own)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("mode", ["LA", "F", "I"])
def test_e85_masks_of_ids_with_alpha_or_as_numbers_of_32_bits_are_read(own, mode):
    expected = datasets.folder(own, "val").mask(0)
    for path in list((own / "masks").rglob("*.png")):
        ids = np.asarray(Image.open(path))
        if mode == "LA":
            Image.fromarray(np.stack([ids, ids * 0], 2)).save(path)
            continue
        ids = ids.astype(np.float32 if mode == "F" else np.int32)
        if mode == "F":
            ids[ids == 255] = np.nan  # as raster calculators mark pixels without a value
        Image.fromarray(ids).save(path.with_suffix(".tif"))
        path.unlink()
    assert (datasets.folder(own, "val").mask(0) == expected).all()
    check_folder(own)


def test_e85_fractions_are_no_ids(own):
    probabilities = np.full((48, 64), 1, np.float32)
    probabilities[0, :3] = 0.25
    (own / "masks/photo_0.png").unlink()
    Image.fromarray(probabilities).save(own / "masks/photo_0.tif")
    with pytest.raises(InputError, match=r"photo_0\.tif: 3 pixels are no whole numbers"):
        check_folder(own)


@pytest.mark.parametrize(
    ("lines", "names", "colours"),
    [
        (["0 background", "1 car"], ("background", "car"), None),
        (["1: car", "0: background"], ("background", "car"), None),
        (["0 a 1 2 3", "1 b 4 5 6"], ("a", "b"), [[1, 2, 3], [4, 5, 6]]),
        (["1 b 4 5 6", "0 a 1 2 3"], ("a", "b"), [[1, 2, 3], [4, 5, 6]]),
        (["a #0A0B0C", "b #FF0000 # red"], ("a", "b"), [[10, 11, 12], [255, 0, 0]]),
        (["a (1, 2, 3)", "b [4,5,6]"], ("a", "b"), [[1, 2, 3], [4, 5, 6]]),
        (["1 euro", "2 euro"], ("1 euro", "2 euro"), None),
        (["4x4", "car"], ("4x4", "car"), None),
        (["0.5 mm", "1.0 mm"], ("0.5 mm", "1.0 mm"), None),
        (["cup #1", "plate # flat"], ("cup", "plate"), None),
    ],
)
def test_e84_numbers_and_colours_of_classes_txt_are_understood(tmp_path, lines, names, colours):
    make_data.write_lines(tmp_path / "classes.txt", lines)
    labels, has_colours = read_classes(tmp_path / "classes.txt")
    assert labels.names == names
    assert has_colours == (colours is not None)
    if has_colours:
        assert labels.palette.tolist() == colours


def test_e84_lines_that_are_numbered_from_1_are_refused(tmp_path):
    make_data.write_lines(tmp_path / "classes.txt", ["1 cat", "2 dog"])
    with pytest.raises(InputError, match=r"classes\.txt: .*numbered from 1 to 2.*0 background"):
        read_classes(tmp_path / "classes.txt")


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


def test_e58_samples_are_not_written_over_their_own_files(tmp_path):
    samples = datasets.shapes("test", size=32)
    datasets.write_folder([samples[i] for i in range(4)], samples.labels, tmp_path / "a")
    (tmp_path / "link").symlink_to("a", target_is_directory=True)
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.*")}
    for root in ("a", "link"):
        train = datasets.folder(tmp_path / "a", "train")
        with pytest.raises(InputError, match=r"0000\.png is a file of the samples"):
            datasets.write_folder(train, train.labels, tmp_path / root)
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.*")} == before


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

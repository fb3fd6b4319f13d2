"""Classes that nobody named: the values and colours that are in the masks of a folder."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path

import make_data
import numpy as np
import pytest
from conftest import SMALL_TRAINER, SMALL_UNET, run_command
from PIL import Image

from seg_torch import datasets
from seg_torch.data.module import SegmentationDataModule
from seg_torch.datasets import found
from seg_torch.errors import InputError
from seg_torch.labels import VOC_PALETTE

pytestmark = pytest.mark.usefixtures("new_cache_folder")
VOID = (224, 224, 192)


@pytest.fixture
def cache(new_cache_folder):
    """The folder in which classes are remembered."""
    return new_cache_folder / "seg_torch/classes"


def make(root: Path, draw: Callable[[np.ndarray], Image.Image], suffix: str = ".png") -> None:
    """Ten pairs whose masks are drawn from ids 0, 1, 2 and 255."""
    make_data.make_folder(root)
    (root / "classes.txt").unlink()
    for path in list((root / "masks").rglob("*.png")):
        ids = np.array(Image.open(path))
        path.unlink()
        draw(ids).save(path.with_suffix(suffix))


def with_values(*values: int, mode: str = "L") -> Callable[[np.ndarray], Image.Image]:
    """Draw 0, 1, 2 and 255 in these values."""
    table = np.zeros(256, np.uint8)
    table[[0, 1, 2, 255]] = values
    return lambda ids: Image.fromarray(table[ids]).convert(mode)


def with_colours(*colours: tuple, mode: str = "RGB") -> Callable[[np.ndarray], Image.Image]:
    """Draw 0, 1, 2 and 255 in these colours."""
    table = np.zeros((256, 3), np.uint8)
    table[[0, 1, 2, 255]] = colours
    return lambda ids: Image.fromarray(table[ids]).convert(mode)


def with_palette(*values: int) -> Callable[[np.ndarray], Image.Image]:
    """Draw 0, 1, 2 and 255 in these values, with the colours of VOC."""

    def draw(ids: np.ndarray) -> Image.Image:
        image = with_values(*values)(ids)
        image.putpalette(VOC_PALETTE.tobytes())
        return image

    return draw


BLACK, WHITE, RED, BLUE = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 128, 192)
BINARY = ["background", "object"]
# How masks are drawn, the names that are found, and which of them (255: none) 0, 1, 2 and 255 are.
KINDS = {
    "0 and 255": (with_values(0, 255, 0, 0), BINARY, (0, 1, 0, 0)),
    "1 bit": (with_values(0, 255, 0, 0, mode="1"), BINARY, (0, 1, 0, 0)),
    "with alpha": (with_values(0, 255, 0, 0, mode="LA"), BINARY, (0, 1, 0, 0)),
    "32 bits": (with_values(0, 255, 0, 0, mode="I"), BINARY, (0, 1, 0, 0)),
    "black and white": (with_colours(BLACK, WHITE, BLACK, BLACK), BINARY, (0, 1, 0, 0)),
    "greys in palettes": (with_values(0, 255, 0, 0, mode="P"), BINARY, (0, 1, 0, 0)),
    "ids": (with_values(0, 1, 2, 255), ["class 0", "class 1", "class 2"], (0, 1, 2, 255)),
    "0 and 1": (with_values(0, 1, 0, 0), ["class 0", "class 1"], (0, 1, 0, 0)),
    "a gap": (with_values(0, 1, 3, 3), [f"class {i}" for i in range(4)], (0, 1, 3, 3)),
    "from 1": (with_values(1, 2, 3, 3), ["class 1", "class 2", "class 3"], (0, 1, 2, 2)),
    "greys": (with_values(0, 128, 255, 0), ["class 0", "class 128", "class 255"], (0, 1, 2, 0)),
    "a palette": (with_palette(0, 1, 2, 255), ["class 0", "class 1", "class 2"], (0, 1, 2, 255)),
    "one of VOC": (with_palette(0, 15, 0, 255), [f"class {i}" for i in range(16)], (0, 15, 0, 255)),
    "ids, three times": (
        with_colours((0, 0, 0), (1, 1, 1), (5, 5, 5), (0, 0, 0)),
        ["class 0", "class 1", "class 5"],
        (0, 1, 2, 0),
    ),
    "colours": (with_colours(RED, BLUE, BLACK, VOID), ["black", "#0080c0", "red"], (2, 1, 0, 255)),
    "alpha": (
        with_colours(RED, BLUE, BLACK, RED, mode="RGBA"),
        ["black", "#0080c0", "red"],
        (2, 1, 0, 2),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_masks_say_which_classes_there_are(tmp_path, cache, kind):
    """The lines that are remembered for a copy mean the same as classes.txt."""
    draw, names, classes = KINDS[kind]
    make(tmp_path, draw, ".tif" if kind == "32 bits" else ".png")
    table = np.zeros(256, np.uint8)
    table[[0, 1, 2, 255]] = classes

    def check(names: list[str]) -> list[str]:
        for split in ("train", "val", "test"):
            dataset = datasets.folder(tmp_path, split)
            assert [*dataset.labels.names] == names
            for i, pair in enumerate(dataset.pairs):
                number = int("".join(c for c in pair.image.stem if c.isdigit()))
                assert (dataset.mask(i) == table[make_data.blocks(number, [0, 1, 2])]).all()
        SegmentationDataModule(datasets.folder, str(tmp_path)).check_files()
        return [pair.name for pair in dataset.pairs]

    by_chance = check(names)
    (lines,) = cache.iterdir()
    (tmp_path / "classes.txt").write_bytes(lines.read_bytes())
    assert check(names) == by_chance
    renamed = [f"my {name.removeprefix('#')}" for name in names]
    edited = "".join(
        f"{new}{line.removeprefix(old)}\n"
        for new, old, line in zip(renamed, names, lines.read_text().splitlines(), strict=True)
    )
    (tmp_path / "classes.txt").write_text(edited)
    assert check(renamed) == by_chance


def test_a_colour_in_one_pixel_of_one_mask_is_a_class(tmp_path):
    make(tmp_path, with_colours(RED, BLUE, BLACK, BLACK))
    path = tmp_path / "masks/photo_4.png"
    mask = np.array(Image.open(path))
    mask[3, 5] = (1, 2, 3)
    Image.fromarray(mask).save(path)
    for split in ("train", "val"):
        names = datasets.folder(tmp_path, split).labels.names
        assert names == ("black", "#0080c0", "#010203", "red")


def test_a_mask_of_nothing_but_background_may_be_grey(tmp_path):
    make(tmp_path, with_colours(BLACK, BLUE, RED, BLACK))
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(tmp_path / "masks/photo_3.png")
    assert datasets.folder(tmp_path, "train").labels.names == ("black", "#0080c0", "red")
    Image.fromarray(np.ones((48, 64), np.uint8)).save(tmp_path / "masks/photo_3.png")
    with pytest.raises(InputError, match=r"png holds colours, .*photo_3\.png the values 1: save"):
        datasets.folder(tmp_path, "train")


def test_what_was_found_is_remembered_until_a_mask_changes(tmp_path, cache, monkeypatch):
    make(tmp_path, with_values(0, 1, 2, 255))
    expected = datasets.folder(tmp_path, "train").labels
    with monkeypatch.context() as patch:
        patch.setattr(found, "_content", None)
        assert datasets.folder(tmp_path, "val").labels == expected
    (remembered,) = cache.iterdir()
    remembered.write_text("")  # as a power failure may leave it
    assert datasets.folder(tmp_path, "val").labels == expected
    Image.fromarray(np.full((48, 64), 3, np.uint8)).save(tmp_path / "masks/photo_3.png")
    assert datasets.folder(tmp_path, "val").labels.names == (*expected.names, "class 3")


def test_it_is_said_what_to_write_and_where(tmp_path, cache, caplog, monkeypatch):
    make(tmp_path / "a", with_colours(RED, BLUE, BLACK, BLACK))
    caplog.set_level(logging.INFO, "seg_torch")
    datasets.folder(tmp_path / "a", "train")
    (lines,) = cache.iterdir()
    start = "classes: 3, found in the masks since there is no classes.txt: black, #0080c0, red. "
    assert caplog.messages[-1] == (
        f"{start}For other names, change them in a copy of the list:\n"
        f"  cp {lines} {tmp_path}/a/classes.txt"
    )
    assert lines.read_text() == "black 0 0 0\n#0080c0 0 128 192\nred 255 0 0\n"

    def full(path: str, *_: object) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(found, "write_text", full)
    make(tmp_path / "b", with_colours(RED, BLUE, BLACK, BLACK))
    datasets.folder(tmp_path / "b", "train")
    assert caplog.messages[-1] == (
        f"{start}For other names, write this to {tmp_path}/b/classes.txt and change the names:\n"
        "black 0 0 0\n#0080c0 0 128 192\nred 255 0 0"
    )
    assert not (tmp_path / "b/classes.txt").exists()


# What is refused


def smoothed(ids: np.ndarray) -> Image.Image:
    mask = Image.fromarray(np.where(ids == 1, 255, 0).astype(np.uint8))
    small = mask.resize((21, 15), Image.Resampling.BILINEAR)
    return small.resize(mask.size, Image.Resampling.BILINEAR)


def from_jpeg(ids: np.ndarray) -> Image.Image:
    """Edges that do not lie on those of the blocks of JPEG, saved as PNG afterwards."""
    file = io.BytesIO()
    rng = np.random.default_rng(int(ids.sum()))
    colours = with_colours(BLACK, RED, BLUE, BLACK)(np.roll(ids, int(rng.integers(1, 8)), 1))
    colours.save(file, "JPEG", quality=60)
    return Image.open(file).convert("RGB")


def photograph(ids: np.ndarray) -> Image.Image:
    return make_data.picture(int(ids.sum()), *ids.shape)


def instances(ids: np.ndarray) -> Image.Image:
    """Each of 256 rectangles of 3 x 4 pixels in a colour of its own."""
    rows, columns = np.indices(ids.shape) // np.reshape([3, 4], (2, 1, 1))
    return Image.fromarray(np.stack([8 * rows, 8 * columns, 0 * rows], 2).astype(np.uint8))


@pytest.mark.parametrize(
    ("draw", "count", "reason"),
    [
        (smoothed, r"\d+ values", "along edges, as JPEG, smoothing and resizing leave them"),
        (from_jpeg, r"[\d,]+ colours", "along edges"),
        (photograph, r"more than \d,\d+ colours", "photograph; are images and masks exchanged"),
        (instances, "256 colours", "each object has its own"),
    ],
)
def test_what_cannot_be_classes_is_refused_with_the_count_and_the_reason(
    tmp_path, monkeypatch, draw, count, reason
):
    monkeypatch.setattr(found, "TOO_MANY", 3000)
    make(tmp_path, draw)
    with pytest.raises(InputError, match=rf"hold {count}, too many.*frequent: .*%.*{reason}"):
        datasets.folder(tmp_path, "train")
    with pytest.raises(InputError, match="too many"):
        datasets.folder(tmp_path, "val")  # a refusal is not remembered


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/a_{}.png", "masks/a_{}.jpg"),
        ("img/a_{}.jpg", "labels/a_{}.JPG"),
        ("a_{}.jpg", "a_{}_mask.jpg"),
        ("train/images/a_{}.jpg", "train/gt/a_{}.jpeg"),
        ("data/images/train/a_{}.jpg", "data/masks/train/a_{}_mask.jpg"),
    ],
)
@pytest.mark.parametrize("dataset", [datasets.folder, datasets.auto])
def test_masks_saved_as_jpeg_are_refused_wherever_they_lie(tmp_path, dataset, image, mask):
    for i in range(3):
        make_data.save(make_data.picture(i), tmp_path / image.format(i))
        make_data.save(make_data.blocks(i, [0, 1, 2], void=None), tmp_path / mask.format(i))
    with pytest.raises(InputError, match="3 masks cannot be read") as error:
        dataset(tmp_path, "train")
    assert len(error.value.problems) == 3
    assert all("JPEG is lossy" in problem for problem in error.value.problems)


def test_one_mask_that_cannot_be_read_is_named_by_the_check(tmp_path, cache):
    make(tmp_path, with_values(0, 1, 2, 255))
    (tmp_path / "masks/photo_3.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1 problems(.|\n)*photo_3\.png"):
        SegmentationDataModule(datasets.folder, str(tmp_path)).check_files()
    assert not [*cache.glob("*")]


def test_palettes_that_number_colours_anew_are_refused(tmp_path):
    make(tmp_path, with_colours(RED, BLUE, BLACK, BLACK))
    for number, path in enumerate(sorted((tmp_path / "masks").rglob("*.png"))):
        Image.open(path).quantize(4, method=number % 2 * 2).save(path)
    with pytest.raises(InputError, match=r"the value 0 is \w+ .* here and \w+ .* in .*anew"):
        datasets.folder(tmp_path, "train")


@pytest.mark.parametrize("draw", [with_values(0, 0, 0, 0), with_colours(BLACK, VOID, BLACK, VOID)])
def test_masks_of_one_class_are_refused(tmp_path, draw):
    make(tmp_path, draw)
    with pytest.raises(InputError, match=r"hold nothing but .*nothing to learn"):
        datasets.folder(tmp_path, "train")


# The whole way


def test_colours_without_names_are_trained_scored_and_predicted(tmp_path, capsys):
    """The classes are the same everywhere; those of an edited classes.txt are others."""
    own, run = tmp_path / "own", tmp_path / "run"
    make(own, with_colours(RED, BLUE, BLACK, VOID))
    small = (*SMALL_TRAINER, *SMALL_UNET, "trainer.max_epochs=1", "model.weights=null")
    size = ("data.augment.crop=[32,32]", "data.num_workers=0", "data.batch_size=8", "logger=none")
    line = ["train", f"data={own}", f"output_dir={run}", *small, *size]
    assert run_command(line, tmp_path) == 0
    names = ("black", "#0080c0", "red")
    assert capsys.readouterr().out.count("found in the masks") == 1
    trained = json.loads((run / "test_metrics.json").read_text())
    assert [*trained["per_class"]] == [*names]
    line = [*("evaluate", f"checkpoint={run}", f"output_dir={tmp_path}/e"), "split=test"]
    assert run_command(line, tmp_path) == 0
    scored = json.loads((tmp_path / "e/test_metrics.json").read_text())
    assert scored["confusion_matrix"] == trained["confusion_matrix"]
    line = ["predict", f"checkpoint={run}", f"input={own}/images", f"output={tmp_path}/p"]
    assert run_command([*line, "save=[colour]"], tmp_path) == 0
    (colour, *_) = sorted((tmp_path / "p").rglob("photo_0*.png"))
    found = np.unique(np.asarray(Image.open(colour).convert("RGB")).reshape(-1, 3), axis=0)
    assert {*map(tuple, found.tolist())} <= {BLACK, BLUE, RED}
    make_data.write_lines(own / "classes.txt", ["sky 0 0 0", "car 255 0 0", "tree 0 128 192"])
    line = [*("evaluate", f"checkpoint={run}", f"output_dir={tmp_path}/f"), "split=test"]
    assert run_command(line, tmp_path) == 2

"""predict.py: what becomes of a folder of images, whatever is in it and whatever happens."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import output_in_new_process, run_command
from forked import Forked
from lightning.fabric.accelerators import CPUAccelerator
from PIL import Image
from predictions import LABELS, Threshold, bomb, files, random_checkpoint, table
from pycocotools.coco import COCO

from seg_torch import Segmenter
from seg_torch.commands import predict as command
from seg_torch.commands.predict import predict
from seg_torch.distributed import Processes
from seg_torch.errors import InputError
from seg_torch.files import PARTIAL
from seg_torch.folders import locked
from seg_torch.images import format as image_format
from seg_torch.images.read import read_image
from seg_torch.labels import Labels
from seg_torch.models.network import Network
from seg_torch.prediction.folder import JOURNAL, find_images, read_journals

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("weights") / "random.ckpt")


@pytest.fixture
def images(tmp_path) -> Path:
    """Six images of two sizes, some in a sub-folder."""
    generator = np.random.default_rng(0)
    for i, name in enumerate(
        ("a.png", "b.jpg", "trip/a.png", "trip/b.jpg", "trip/x/c.png", "z.png")
    ):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (40, 56) if i % 3 else (64, 48)
        small = Image.fromarray(generator.integers(0, 256, (5, 5, 3), np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(path)
    return tmp_path / "images"


@pytest.fixture
def run(compose, weights, images, tmp_path):
    """`run("save=[mask]", ...)` predicts the images into `out`."""

    def run(*overrides: str) -> int:
        inputs = (f"input={images}", f"output={tmp_path / 'out'}", f"checkpoint={weights}")
        return predict(compose("predict", *inputs, "trainer.accelerator=cpu", *overrides))

    return run


@pytest.fixture
def threshold(monkeypatch) -> None:
    """Makes predict.py use a pointwise model: bright pixels are class 1."""

    def load(cfg, device):
        network = Network(Threshold(), mean=(0, 0, 0), std=(1, 1, 1))
        return {"threshold": Segmenter(network, LABELS, device=device)}

    monkeypatch.setattr(command, "load_segmenters", load)


def mask_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@pytest.mark.promise(23)
def test_a_folder_keeps_its_tree_and_gets_what_was_asked_for(run, tmp_path):
    assert run("save=[mask,colour,overlay,legend,probabilities,coco,polygons,side_by_side]") == 0
    out = tmp_path / "out"
    suffixes = {"mask": "png", "colour": "png", "overlay": "jpg", "probabilities": "npz"}
    suffixes |= {"coco": "json", "polygons": "geojson", "side_by_side": "jpg"}
    names = ("a", "b", "trip/a", "trip/b", "trip/x/c", "z")
    expected = {f"{kind}/{n}.{suffix}" for kind, suffix in suffixes.items() for n in names}
    assert files(out).keys() == expected | {"legend.png", "predictions.csv", "coco.json"}
    dataset = COCO(out / "coco.json")
    assert [image["file_name"] for image in dataset.dataset["images"]] == [
        row["file"] for row in table(out)
    ]
    for image in dataset.dataset["images"]:
        mask = mask_of(out / "mask" / Path(image["file_name"]).with_suffix(".png"))
        annotations = dataset.imgToAnns[image["id"]]
        assert [a["category_id"] for a in annotations] == np.unique(mask).tolist()
        for annotation in annotations:
            assert np.array_equal(dataset.annToMask(annotation), mask == annotation["category_id"])


def test_the_default_is_mask_overlay_and_legend(run, tmp_path):
    assert run() == 0
    assert {path.split("/")[0] for path in files(tmp_path / "out")} == {
        "mask",
        "overlay",
        "legend.png",
        "predictions.csv",
    }


def test_the_table_has_a_row_a_file_that_agrees_with_the_masks(run, images, tmp_path):
    run()
    rows = table(tmp_path / "out")
    assert [row["file"] for row in rows] == [
        "a.png",
        "b.jpg",
        "trip/a.png",
        "trip/b.jpg",
        "trip/x/c.png",
        "z.png",
    ]
    for row in rows:
        mask = mask_of(tmp_path / "out/mask" / Path(row["file"]).with_suffix(".png"))
        assert mask.shape == read_image(images / row["file"]).shape[:2]
        assert (int(row["height"]), int(row["width"])) == mask.shape
        shares = [float(row[f"class {i}"]) for i in range(4)]
        assert shares == pytest.approx([(mask == i).mean() for i in range(4)], abs=1e-6)
        assert 1 / 4 <= float(row["mean_confidence"]) <= 1
        assert float(row["seconds"]) > 0


def test_masks_of_predict_are_those_of_the_library(run, weights, images, tmp_path):
    run()
    segmenter = Segmenter.load(weights, device="cpu")
    for name, path in find_images(images).items():
        mask = segmenter.predict(path).mask
        assert len(np.unique(mask)) > 1, "nothing to compare"
        assert np.array_equal(mask_of(tmp_path / f"out/mask/{name}.png"), mask)


def test_batches_change_masks_by_no_more_than_rounding(run, tmp_path):
    """Convolutions round differently for another number of images."""
    run("save=[mask]")
    alone = {path: mask_of(path) for path in (tmp_path / "out/mask").rglob("*.png")}
    run("save=[mask]", "batch_size=3")
    assert len(alone) == 6
    for path, mask in alone.items():
        assert (mask_of(path) == mask).mean() > 0.99


def test_what_else_is_in_a_batch_changes_nothing(weights):
    """A batch that is filled up with other images gives the same bits."""
    segmenter = Segmenter.load(weights, device="cpu")
    images = list(np.random.default_rng(0).integers(0, 256, (4, 40, 56, 3), np.uint8))
    first = segmenter.predict_batch(images, probabilities=True)[1]
    other = segmenter.predict_batch([images[1]] * 4, probabilities=True)[3]
    assert np.array_equal(first.mask, other.mask)
    assert np.array_equal(first.probabilities(), other.probabilities())


def times(folder: Path) -> dict[str, int]:
    """When each mask was written, by name."""
    masks = folder / "mask"
    return {str(path.relative_to(masks)): path.stat().st_mtime_ns for path in masks.rglob("*.png")}


def test_a_second_run_does_only_what_is_missing_or_has_changed(run, images, tmp_path):
    run()
    out = tmp_path / "out"
    before = times(out)
    assert run() == 0
    assert times(out) == before
    Image.new("RGB", (30, 20), "white").save(images / "z.png")
    (out / "overlay/a.jpg").unlink()
    assert run() == 0
    after = times(out)
    assert {name for name in after if after[name] != before[name]} == {"a.png", "z.png"}
    assert (out / "overlay/a.jpg").exists()
    assert table(out)[-1]["width"] == "30"
    run("resume=false")
    assert all(times(out)[name] > after[name] for name in after)


@pytest.mark.parametrize("change", ["tile=64", "tta=flip", "min_confidence=0.5", "other weights"])
def test_other_settings_do_everything_again(run, images, tmp_path, change):
    run("save=[mask]")
    before = times(tmp_path / "out")
    if change == "other weights":
        other = random_checkpoint(tmp_path / "other.ckpt", seed=1)
        run("save=[mask]", f"checkpoint={other}")
    else:
        run("save=[mask]", change)
    assert all(times(tmp_path / "out")[name] > before[name] for name in before)


def test_outputs_below_the_input_are_no_inputs(compose, weights, images):
    for _ in range(2):
        assert (
            predict(
                compose(
                    "predict",
                    f"input={images}",
                    f"output={images / 'out'}",
                    f"checkpoint={weights}",
                    "trainer.accelerator=cpu",
                )
            )
            == 0
        )
    assert len(table(images / "out")) == 6


GREY = np.full((40, 60), 10, np.uint8)
GREY[:, 30:] = 240
RIGHT = (GREY == 240).astype(np.uint8)  # its mask: the left half dark, the right half bright
RGB = Image.fromarray(GREY).convert("RGB")
EXIF_6 = Image.Exif()
EXIF_6[0x0112] = 6  # to be turned clockwise
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def transparent() -> Image.Image:
    """All black, the right half transparent: no data."""
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (30, 0, 60, 40))
    return image


def with_palette() -> Image.Image:
    """Index 1 is the dark colour, index 0 the bright one."""
    image = Image.fromarray(1 - RIGHT)
    image.putpalette([240] * 3 + [10] * 3)
    return image


def cut_off(path: Path) -> None:
    NOISE.save(path)
    path.write_bytes(path.read_bytes()[:2000])


def damaged(path: Path) -> None:
    NOISE.save(path)
    content = bytearray(path.read_bytes())
    content[60:2000] = bytes(1940)
    path.write_bytes(content)


# File, how it is made, and what becomes of it: its mask, or the reason for which it is refused.
ODD_FILES = [
    ("rgb.jpg", lambda path: RGB.save(path, quality=95), RIGHT),
    ("grey.png", lambda path: Image.fromarray(GREY).save(path), RIGHT),
    ("black and white.png", lambda path: Image.fromarray(RIGHT == 1).save(path), RIGHT),
    ("transparent.png", lambda path: transparent().save(path), RIGHT * np.uint8(255)),
    ("cmyk.jpg", lambda path: RGB.convert("CMYK").save(path, quality=95), RIGHT),
    ("palette.png", lambda path: with_palette().save(path), RIGHT),
    # Clipped at 255, both halves would be white.
    ("16 bit.png", lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path), RIGHT),
    ("16 bit.tif", lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path), RIGHT),
    ("turned.jpg", lambda path: RGB.save(path, exif=EXIF_6, quality=95), np.rot90(RIGHT, -1)),
    (
        "moving.gif",
        lambda path: RGB.save(path, save_all=True, append_images=[RGB.rotate(180)] * 2),
        RIGHT,
    ),
    ("UPPER CASE.JPG", lambda path: RGB.save(path, quality=95), RIGHT),
    ("ünïcode.png", lambda path: RGB.save(path), RIGHT),
    ("one pixel.png", lambda path: Image.new("RGB", (1, 1), "white").save(path), np.ones((1, 1))),
    ("cut off.jpg", cut_off, "truncated"),
    ("cut off.png", cut_off, "truncated|Truncated"),
    ("damaged.png", damaged, "cannot be read as an image"),
    ("empty.jpg", lambda path: path.touch(), "the file is empty"),
    ("text.jpg", lambda path: path.write_text("no image"), "no format that Pillow knows"),
    ("bomb.png", bomb, "400000000 pixels.*max_pixels"),
]


@pytest.mark.promise(19)
def test_odd_files_are_segmented_rightly_or_named_with_the_reason(
    compose, threshold, tmp_path, caplog
):
    (tmp_path / "odd").mkdir()
    for name, make, _ in ODD_FILES:
        make(tmp_path / "odd" / name)
    cfg = compose("predict", f"input={tmp_path / 'odd'}", f"output={tmp_path / 'out'}")
    refused = {name: reason for name, _, reason in ODD_FILES if isinstance(reason, str)}
    assert predict(cfg) == len(refused)
    outputs = {path.name: output for output, path in find_images(tmp_path / "odd").items()}
    for name, _, mask in ODD_FILES:
        if name not in refused:
            assert np.array_equal(mask_of(tmp_path / f"out/mask/{outputs[name]}.png"), mask), name
    assert {row["file"] for row in table(tmp_path / "out")} == {
        name for name, *_ in ODD_FILES if name not in refused
    }
    failures = [r.getMessage() for r in caplog.records if r.getMessage().startswith("failed: ")]
    assert len(failures) == len(refused)
    for name, reason in refused.items():
        assert any(re.search(f"{name}: .*{reason}", failure) for failure in failures), name


def test_the_limit_of_pixels_can_be_lowered_and_is_put_back(compose, threshold, tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    usual = Image.MAX_IMAGE_PIXELS
    for limit, failures in ((4998, 1), (5000, 0)):
        arguments = (f"input={tmp_path / 'a.png'}", f"output={tmp_path / 'out'}")
        assert predict(compose("predict", *arguments, f"max_pixels={limit}")) == failures
        assert usual == Image.MAX_IMAGE_PIXELS


def test_two_models_stand_side_by_side_in_one_image(run, tmp_path):
    run("save=[mask,side_by_side]")
    alone = read_image(tmp_path / "out/side_by_side/a.jpg")
    other = random_checkpoint(tmp_path / "other.ckpt", seed=1)
    run("save=[mask]", f"compare_with={other}")
    both = read_image(tmp_path / "out/side_by_side/a.jpg")
    column = 200 + 4
    assert both.shape[1] == alone.shape[1] + column
    image, first, second = (both[24:174, i * column :][:, :200].astype(int) for i in range(3))
    assert np.abs(image - alone[24:174, :200]).mean() < 2
    assert np.abs(first - alone[24:174, column : column + 200]).mean() < 2
    assert np.abs(second - first).mean() > 5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("save=[masks]", "save is 'masks'; use one of legend, mask"),
        ("tta=[flop]", "expected flip, factors, or both"),
        ("tta=[0]", "expected numbers above 0"),
        ("tile=100", "expected auto, null or a multiple of 32"),
        ("batch_size=0", "expected at least 1"),
        ("trainer.devices=0", "accelerator=cpu devices=0 num_nodes=1: "),
        ("trainer.accelerator=nonsense", "accelerator=nonsense .*Available names are"),
        ("compare_with=nowhere.ckpt", "no such file"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(run, setting, message):
    with pytest.raises(InputError, match=message):
        run(setting)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["gpu", "cuda", "tpu"])
def test_d19_an_accelerator_that_is_not_there_is_refused(run, name):
    with pytest.raises(InputError, match=f"accelerator={name}"):
        run(f"trainer.accelerator={name}")


def test_a_model_without_weights_for_images_is_refused(compose, images, tmp_path):
    cfg = compose("predict", f"input={images}", f"output={tmp_path / 'out'}", "model=unet")
    with pytest.raises(InputError, match="give checkpoint=FILE"):
        predict(cfg)


def test_an_error_while_writing_ends_the_run(run, tmp_path):
    """A full disk must not look like a folder of bad images."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mask").write_text("in the way")
    with pytest.raises(OSError, match="mask"):
        run()


@pytest.fixture
def batches(monkeypatch) -> list[list[tuple[int, ...]]]:
    """The shapes of the images that went through the network together, batch for batch."""
    seen = []
    original = Segmenter.segment

    def segment(self, images, *options):
        seen.append([image.shape[:2] for image in images])
        return original(self, images, *options)

    monkeypatch.setattr(Segmenter, "segment", segment)
    return seen


# The fixture's images, in the order of their names: z.png is the sixth.
TALL, WIDE = (48, 64), (56, 40)
SIZES = {"a": TALL, "b": WIDE, "trip/a": WIDE, "trip/b": TALL, "trip/x/c": WIDE, "z": WIDE}


def test_d30_batches_hold_images_of_one_size_and_no_copies(run, batches):
    run("batch_size=3")
    assert batches == [[TALL] * 2, [WIDE] * 3, [WIDE]]


def test_a_file_whose_header_is_wrong_or_unreadable_does_not_stop_its_batch(
    run, images, batches, tmp_path, monkeypatch
):
    cut_off(images / "c.png")  # 64 x 64 by its header
    NOISE.save(images / "d.png")
    (images / "e.jpg").write_text("no image")
    NOISE.resize((32, 16)).save(images / "f.png")
    size = image_format.image_size
    lie = {"f.png": (64, 64)}
    monkeypatch.setattr(image_format, "image_size", lambda p: lie.get(p.name) or size(p))
    assert run("batch_size=3") == 2
    assert batches == [[TALL] * 2, [WIDE] * 3, [(64, 64)], [(16, 32)], [WIDE]]
    assert len(table(tmp_path / "out")) == 8


def test_an_image_of_which_no_overlay_can_be_written_does_not_stop_the_others(
    run, images, tmp_path, monkeypatch
):
    monkeypatch.setattr("seg_torch.drawing.visualize.JPEG_LIMIT", 100)
    NOISE.resize((101, 40)).save(images / "a_long.png")
    others = len(list(images.rglob("*.*"))) - 1
    assert run() == 1
    assert len(list((tmp_path / "out/overlay").rglob("*.jpg"))) == others
    assert len(table(tmp_path / "out")) == others


def test_d30_a_resumed_run_makes_the_same_batches(run, images, batches, tmp_path):
    run("batch_size=3", "save=[mask,probabilities]")
    out = tmp_path / "out"
    first, before = files(out), times(out)
    assert run("batch_size=3", "save=[mask,probabilities]") == 0
    assert len(batches) == 3
    (out / "mask/trip/a.png").unlink()
    assert run("batch_size=3", "save=[mask,probabilities]") == 0
    assert batches[3:] == [[WIDE] * 3]
    assert files(out) == first
    untouched = {"a.png", "trip/b.png", "z.png"}
    assert {name for name, when in times(out).items() if when == before[name]} == untouched


def test_d30_devices_auto_starts_no_more_processes_than_files(compose, monkeypatch):
    monkeypatch.setattr(CPUAccelerator, "auto_device_count", lambda *_: 8)
    trainer = compose("predict", "trainer.accelerator=cpu").trainer
    assert [Processes(trainer, most=n).count for n in (0, 1, 3, 100)] == [1, 1, 3, 8]
    trainer.devices = 2
    assert Processes(trainer, most=1).count == 2


def test_d27_two_runs_do_not_write_into_one_folder(run, tmp_path):
    with (
        locked(tmp_path / "out"),
        pytest.raises(InputError, match="another run is writing into this folder"),
    ):
        run()
    assert run() == 0


def test_d27_only_leftovers_of_prediction_are_deleted(run, tmp_path):
    ours = f"{PARTIAL}{'0123456789abcdef' * 2}.png"
    kept = [ours, f"checkpoints/{ours}", f"mask/{PARTIAL}notes.png", "mask/x/other.png"]
    deleted = [f"mask/{ours}", f"mask/trip/{ours}"]
    for name in kept + deleted:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).touch()
    run("save=[mask]")
    assert kept == [name for name in kept + deleted if (tmp_path / "out" / name).exists()]


def test_e54_what_is_no_image_that_can_be_read_is_counted_by_suffix(
    compose, threshold, tmp_path, caplog
):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.HEIC", "b.heic", "c.DNG", "d.mov", "e.npy", "notes.txt", ".hidden.heic"):
        (photos / name).touch()
    RGB.save(photos / "f.jpg")
    arguments = (f"input={photos}", f"output={photos / 'out'}")
    told = f"{photos}: left out, since they are no images that can be read: "
    for _ in range(2):  # what the first run has written is not counted by the second one
        caplog.clear()
        assert predict(compose("predict", *arguments, "save=[mask,legend,coco]")) == 0
        (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith(told)]
        assert line == f"{told}2 .heic, 1 .dng, 1 .mov, 1 .npy, 1 .txt"


def test_e55_images_and_their_outputs_may_lie_in_one_folder(compose, threshold, tmp_path):
    RGB.save(tmp_path / "a.png")
    for _ in range(2):
        assert predict(compose("predict", f"input={tmp_path}", f"output={tmp_path}")) == 0
        assert [row["file"] for row in table(tmp_path)] == ["a.png"]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and JOURNAL not in str(p)
    }


@pytest.mark.parametrize("output", ["d", "link", "d/../link"])
@pytest.mark.parametrize("ours", [False, True])
def test_e58_no_output_takes_the_place_of_an_input(compose, threshold, tmp_path, output, ours):
    """Whatever the folder is called, and whether predict has written there before."""
    (tmp_path / "d/mask").mkdir(parents=True)
    RGB.save(tmp_path / "d/mask/a.png")
    (tmp_path / "link").symlink_to("d", target_is_directory=True)
    if ours:
        (tmp_path / "d" / JOURNAL).mkdir()
    before = contents(tmp_path)
    for given in ("mask/a.png", "mask"):
        reason = "a.png is an input; it would be replaced"
        if ours and given == "mask":
            reason = "all 1 images there are outputs of predict"
        cfg = compose("predict", f"input={tmp_path / 'd' / given}", f"output={tmp_path / output}")
        with pytest.raises(InputError, match=reason):
            predict(cfg)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["mask/a.png", "legend.png", "predictions.csv"])
def test_e58_what_no_run_has_written_is_not_replaced(compose, threshold, tmp_path, name):
    """Such as a user's own masks in a folder `mask` beside the images."""
    RGB.save(tmp_path / "a.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"of the user")
    before = contents(tmp_path)
    cfg = compose("predict", f"input={tmp_path / 'a.png'}", f"output={tmp_path}")
    with pytest.raises(InputError, match=f"{name} is there already, and not from predict"):
        predict(cfg)
    assert contents(tmp_path) == before
    assert not (tmp_path / JOURNAL).exists()


def test_e35_a_name_too_long_for_an_output_fails_that_file_alone(
    compose, threshold, tmp_path, caplog
):
    (tmp_path / "in").mkdir()
    long = "n" * 251 + ".png"  # which takes mask/NAME.png, but not polygons/NAME.geojson
    for name in ("a.png", long, "z.png"):
        RGB.save(tmp_path / "in" / name)
    cfg = compose("predict", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}")
    cfg.save = ["mask", "polygons"]
    assert predict(cfg) == 1
    assert predict(cfg) == 1  # and the second run, which goes on
    assert [row["file"] for row in table(tmp_path / "out")] == ["a.png", "z.png"]
    names = {path.name for path in (tmp_path / "out").rglob("*") if JOURNAL not in path.parts}
    assert names == {
        *("mask", "a.png", "z.png", "polygons", "a.geojson", "z.geojson", "predictions.csv")
    }
    (failure, _) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("failed")]
    assert f"{long}: the name of its output is too long: " in failure
    cfg.save = ["mask"]
    assert predict(cfg) == 0


def test_a_link_to_nothing_fails_alone(compose, threshold, tmp_path, caplog):
    (tmp_path / "in").mkdir()
    RGB.save(tmp_path / "in/a.png")
    (tmp_path / "in/b.png").symlink_to("gone.png")
    cfg = compose("predict", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}")
    assert predict(cfg) == 1
    assert [row["file"] for row in table(tmp_path / "out")] == ["a.png"]
    assert f"failed: {tmp_path / 'in/b.png'}: no such file" in caplog.text


def test_e44_packages_of_the_outputs_are_looked_for_first(compose, tmp_path, monkeypatch):
    RGB.save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    cfg = compose("predict", f"input={tmp_path / 'a.png'}", f"output={tmp_path / 'out'}")
    cfg.save, cfg.checkpoint = ["mask", "geotiff"], "there is no such file"
    with pytest.raises(InputError, match=r"save=\[geotiff\] needs tifffile: pip install"):
        predict(cfg)


def test_what_a_damaged_journal_has_lost_is_done_again(compose, threshold, tmp_path):
    for name in "abcd":
        RGB.save(tmp_path / f"{name}.png")
    arguments = (f"input={tmp_path}", f"output={tmp_path / 'out'}", "save=[mask]")
    assert predict(compose("predict", *arguments)) == 0
    (journal,) = (tmp_path / "out" / JOURNAL).glob("0-*.jsonl")
    a, b, c, d = [line for line in journal.read_bytes().splitlines() if line]
    broken = [a[:20] + b"\xb4" + a[21:], b"[1]", b.replace(b"areas", b"ar%as"), c[: len(c) // 2], d]
    journal.write_bytes(b"\n".join(broken))
    before = times(tmp_path / "out")
    assert predict(compose("predict", *arguments)) == 0
    after = times(tmp_path / "out")
    assert {name for name in after if after[name] != before[name]} == {"a.png", "b.png", "c.png"}
    assert [row["file"] for row in table(tmp_path / "out")] == [f"{name}.png" for name in "abcd"]


def test_an_output_that_was_damaged_meanwhile_is_named(compose, threshold, tmp_path):
    RGB.save(tmp_path / "a.png")
    arguments = (f"input={tmp_path / 'a.png'}", f"output={tmp_path / 'out'}", "save=[coco]")
    assert predict(compose("predict", *arguments)) == 0
    (tmp_path / "out/coco/a.json").write_bytes(b"")
    with pytest.raises(InputError, match=r"coco/a\.json is damaged .* delete it"):
        predict(compose("predict", *arguments))
    (tmp_path / "out/coco/a.json").unlink()
    assert predict(compose("predict", *arguments)) == 0


def start(folder: Path, *arguments: str) -> Forked:
    return Forked([ROOT / "predict.py", "trainer.accelerator=cpu", *arguments], folder)


@pytest.fixture
def many(tmp_path) -> Path:
    (tmp_path / "many").mkdir()
    generator = np.random.default_rng(0)
    for i in range(200):
        image = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8))
        image.resize((48, 32), Image.Resampling.BICUBIC).save(tmp_path / f"many/{i:03d}.png")
    return tmp_path / "many"


@pytest.mark.parametrize(("signal_number", "batch_size"), [(signal.SIGKILL, 4), (signal.SIGINT, 1)])
def test_a_run_that_was_stopped_and_goes_on_leaves_what_an_undisturbed_one_does(
    many, weights, compose, tmp_path, signal_number, batch_size
):
    def arguments(output: str) -> list[str]:
        places = [f"input={many}", f"output={tmp_path / output}", f"checkpoint={weights}"]
        return [*places, "save=[mask,overlay,coco,legend]", f"batch_size={batch_size}"]

    process = start(tmp_path, *arguments("stopped"))
    masks = tmp_path / "stopped/mask"
    while process.code is None and len(list(masks.glob("[0-9]*.png"))) < 60:
        time.sleep(0.005)
    os.kill(process.pid, signal_number)
    code, _ = process.finish()
    assert code == (130 if signal_number == signal.SIGINT else -signal.SIGKILL)
    complete = {p.name: p.stat().st_mtime_ns for p in masks.glob("[0-9]*.png")}
    assert 60 <= len(complete) < 200
    noted = [record["name"] for record in read_journals(tmp_path / "stopped")]
    assert len(noted) >= 20

    # What a process leaves that is killed while it writes; whether this one did is chance.
    (masks / f"{PARTIAL}{'0' * 32}.png").write_bytes(b"half an image")
    for output in ("stopped", "whole"):
        assert predict(compose("predict", "trainer.accelerator=cpu", *arguments(output))) == 0
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    again = [n for n in noted if (masks / f"{n}.png").stat().st_mtime_ns != complete[f"{n}.png"]]
    assert len(again) < batch_size, "more than the batch that was not complete"


def test_two_processes_do_each_file_once(many, weights, compose, tmp_path):
    places = [f"input={many}", f"checkpoint={weights}", "save=[mask,coco]"]
    for path in sorted(many.iterdir())[50:]:
        path.unlink()
    (many / "bad.jpg").write_text("no image")
    two = start(tmp_path, *places, f"output={tmp_path / 'two'}", "trainer.devices=2")
    code, output = two.finish()
    assert code == 1, output
    assert output.count("bad.jpg") == 1
    predict(compose("predict", *places, f"output={tmp_path / 'one'}", "trainer.accelerator=cpu"))
    assert files(tmp_path / "two") == files(tmp_path / "one")
    shares = [
        [json.loads(line)["name"] for line in path.read_text().splitlines() if line]
        for path in sorted((tmp_path / "two" / JOURNAL).glob("[01]-*.jsonl"))
    ]
    assert len(shares) == 2
    assert sorted(shares[0] + shares[1]) == sorted([f"{i:03d}" for i in range(50)] + ["bad"])
    assert min(map(len, shares)) >= 25


@pytest.mark.slow
def test_d20_with_two_real_processes_the_reason_is_printed_once(weights, images, tmp_path):
    (tmp_path / "out").write_text("in the way")
    places = [f"input={images}", f"checkpoint={weights}", f"output={tmp_path / 'out'}"]
    code, output = start(tmp_path, *places, "trainer.devices=2").finish()
    assert code == 2
    assert output.count("cannot be written") == 1
    assert "Traceback" not in output


def memory_by_height(folder: Path) -> None:
    """Predicts an image and one ten times as tall; prints the peak of each in kilobytes."""
    random_checkpoint(folder / "random.ckpt", labels=Labels(tuple(map(str, range(21)))))
    peaks = []
    for height in (768, 7680):
        Image.linear_gradient("L").resize((512, height)).save(folder / f"{height}.jpg")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        settings = f"input={height}.jpg output=out tile=256 trainer.accelerator=cpu"
        assert run_command(f"predict checkpoint=random.ckpt {settings}", folder) == 0
        peaks.append(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])
    print("peaks", *peaks)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_taller_image_takes_a_few_bytes_per_pixel(tmp_path):
    """Reading takes 10, all outputs 8; float32 logits of 21 classes would take 84."""
    output = output_in_new_process(memory_by_height, tmp_path)
    short, tall = map(int, output.split("peaks ")[1].split())
    assert 1024 * (tall - short) < 32 * 512 * (7680 - 768)

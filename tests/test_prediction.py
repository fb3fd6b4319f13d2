"""predict.py: what becomes of a folder of photographs, whatever is in it and whatever happens."""

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_segmenter import LABELS, Threshold

from seg_torch import Segmenter, checkpoint, prediction
from seg_torch.datasets.voc import VOC_LABELS
from seg_torch.errors import InputError
from seg_torch.images import read_image
from seg_torch.labels import Labels
from seg_torch.models import unet
from seg_torch.models.network import Network
from seg_torch.prediction import find_images, predict

ROOT = Path(__file__).parents[1]


def random_checkpoint(path: Path, seed: int = 0, classes: int = 4) -> Path:
    """A small U-Net with random weights whose masks have every class."""
    torch.manual_seed(seed)
    config = {
        "_target_": "seg_torch.models.unet",
        "encoder": "resnet10t",
        "weights": None,
        "decoder_channels": [8, 8, 8, 8, 8],
    }
    settings = {key: value for key, value in config.items() if key != "_target_"}
    network = Network(unet(classes, **settings)).eval()
    with torch.no_grad():  # as it is made, one class is ahead everywhere
        logits = network(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))["out"]
        network.model.classifier.bias -= logits.mean((0, 2, 3))
    labels = Labels(tuple(f"class {i}" for i in range(classes)))
    description = checkpoint.describe(network, labels, config, {}, None)
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({checkpoint.KEY: description, "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("weights") / "random.ckpt")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Six photos of two sizes, some in a sub-folder."""
    generator = np.random.default_rng(0)
    for i, name in enumerate(("a.png", "b.jpg", "trip/a.png", "trip/b.jpg", "trip/x/c.png", "z.png")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (40, 56) if i % 3 else (64, 48)
        small = Image.fromarray(generator.integers(0, 256, (5, 5, 3), np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(path)
    return tmp_path / "photos"


@pytest.fixture
def run(compose, weights, photos, tmp_path):
    """``run("save=[mask]", ...)`` predicts the photos into ``out``."""

    def run(*overrides: str) -> int:
        inputs = (f"input={photos}", f"output={tmp_path / 'out'}", f"checkpoint={weights}")
        return predict(compose("predict", *inputs, "trainer.accelerator=cpu", *overrides))

    return run


@pytest.fixture
def threshold(monkeypatch) -> None:
    """Makes predict.py use a pointwise model: bright pixels are class 1."""

    def build(cfg, device):
        network = Network(Threshold(), mean=(0, 0, 0), std=(1, 1, 1))
        return Segmenter(network, LABELS, device=device)

    monkeypatch.setattr(prediction, "_segmenter", build)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but not its notes; predictions.csv without the seconds."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and prediction.JOURNAL not in path.parts
    }
    if "predictions.csv" in found:
        rows = list(csv.reader(found["predictions.csv"].decode().splitlines()))
        seconds = rows[0].index("seconds")
        found["predictions.csv"] = repr([r[:seconds] + r[seconds + 1 :] for r in rows]).encode()
    return found


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def mask_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_a_folder_keeps_its_tree_and_gets_what_was_asked_for(run, tmp_path):
    assert run("save=[mask,colour,overlay,legend,probabilities,polygons,side_by_side]") == 0
    out = tmp_path / "out"
    suffixes = {"mask": "png", "colour": "png", "overlay": "jpg", "probabilities": "npz"}
    suffixes |= {"polygons": "json", "side_by_side": "jpg"}
    names = ("a", "b", "trip/a", "trip/b", "trip/x/c", "z")
    expected = {f"{kind}/{n}.{suffix}" for kind, suffix in suffixes.items() for n in names}
    assert files(out).keys() == expected | {"legend.png", "predictions.csv", "polygons.json"}


def test_the_default_is_mask_overlay_and_legend(run, tmp_path):
    assert run() == 0
    assert {path.split("/")[0] for path in files(tmp_path / "out")} == {
        "mask",
        "overlay",
        "legend.png",
        "predictions.csv",
    }


def test_the_table_has_a_row_a_file_that_agrees_with_the_masks(run, photos, tmp_path):
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
        assert mask.shape == read_image(photos / row["file"]).shape[:2]
        assert (int(row["height"]), int(row["width"])) == mask.shape
        shares = [float(row[f"class {i}"]) for i in range(4)]
        assert shares == pytest.approx([(mask == i).mean() for i in range(4)], abs=1e-6)
        assert 1 / 4 <= float(row["mean_confidence"]) <= 1
        assert float(row["seconds"]) > 0


def test_masks_of_predict_are_those_of_the_library(run, weights, photos, tmp_path):
    run()
    segmenter = Segmenter.load(weights, device="cpu")
    for name, path in find_images(photos).items():
        mask = segmenter.predict(path).mask
        assert len(np.unique(mask)) > 1, "nothing to compare"
        assert np.array_equal(mask_of(tmp_path / f"out/mask/{name}.png"), mask)


def test_batches_change_masks_by_no_more_than_rounding(run, tmp_path):
    """Convolutions round differently for another number of pictures."""
    run("save=[mask]")
    alone = {path: mask_of(path) for path in (tmp_path / "out/mask").rglob("*.png")}
    run("save=[mask]", "batch_size=3")
    assert len(alone) == 6
    for path, mask in alone.items():
        assert (mask_of(path) == mask).mean() > 0.99


def test_what_else_is_in_a_batch_changes_nothing(weights):
    """A batch that is filled up with other pictures gives the same bits."""
    segmenter = Segmenter.load(weights, device="cpu")
    pictures = list(np.random.default_rng(0).integers(0, 256, (4, 40, 56, 3), np.uint8))
    first = segmenter.predict_batch(pictures, probabilities=True)[1]
    other = segmenter.predict_batch([pictures[1]] * 4, probabilities=True)[3]
    assert np.array_equal(first.mask, other.mask)
    assert np.array_equal(first.probabilities(), other.probabilities())


def times(folder: Path) -> dict[str, int]:
    """When each mask was written, by name."""
    masks = folder / "mask"
    return {
        str(path.relative_to(masks)): path.stat().st_mtime_ns for path in masks.rglob("*.png")
    }


def test_a_second_run_does_only_what_is_missing_or_has_changed(run, photos, tmp_path):
    run()
    out = tmp_path / "out"
    before = times(out)
    assert run() == 0
    assert times(out) == before
    Image.new("RGB", (30, 20), "white").save(photos / "z.png")
    (out / "overlay/a.jpg").unlink()
    assert run() == 0
    after = times(out)
    assert {name for name in after if after[name] != before[name]} == {"a.png", "z.png"}
    assert (out / "overlay/a.jpg").exists()
    assert table(out)[-1]["width"] == "30"
    run("resume=false")
    assert all(times(out)[name] > after[name] for name in after)


@pytest.mark.parametrize("change", ["tile=64", "tta=flip", "resize=32", "other weights"])
def test_other_settings_do_everything_again(run, photos, tmp_path, change):
    run("save=[mask]")
    before = times(tmp_path / "out")
    if change == "other weights":
        other = random_checkpoint(tmp_path / "other.ckpt", seed=1)
        run("save=[mask]", f"checkpoint={other}")
    else:
        run("save=[mask]", change)
    assert all(times(tmp_path / "out")[name] > before[name] for name in before)


def test_outputs_below_the_input_are_no_inputs(compose, weights, photos):
    for _ in range(2):
        assert (
            predict(
                compose(
                    "predict",
                    f"input={photos}",
                    f"output={photos / 'out'}",
                    f"checkpoint={weights}",
                    "trainer.accelerator=cpu",
                )
            )
            == 0
        )
    assert len(table(photos / "out")) == 6


def test_files_that_differ_in_their_extension_get_outputs_of_their_own(tmp_path):
    for name in ("x/a.png", "x/a.jpg", "x/a.jpg.png", "b.PNG", "notes.txt", "x/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == {
        "b": tmp_path / "b.PNG",
        "x/a.jpg": tmp_path / "x/a.jpg",
        "x/a.jpg.png": tmp_path / "x/a.jpg.png",
        "x/a.png": tmp_path / "x/a.png",
        "x/c": tmp_path / "x/c.png",
    }


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_pictures_is_refused_by_name(tmp_path, name):
    with pytest.raises(InputError, match=str(tmp_path / name)):
        find_images(tmp_path / name)


DARK, BRIGHT = 10, 240
HALF = np.full((40, 60), DARK, np.uint8)
HALF[:, 30:] = BRIGHT  # the left half dark: class 0, the right half bright: class 1
RIGHT = (HALF == BRIGHT).astype(np.uint8)
EXIF_6 = Image.Exif()
EXIF_6[0x0112] = 6


def transparent() -> Image.Image:
    """All black, the right half transparent: white, on paper."""
    alpha = np.where(HALF == BRIGHT, 0, 255).astype(np.uint8)
    return Image.merge("RGBA", [*Image.new("RGB", (60, 40)).split(), Image.fromarray(alpha)])


def palette_image() -> Image.Image:
    image = Image.fromarray(1 - RIGHT)
    image.putpalette([BRIGHT] * 3 + [DARK] * 3)  # index 1 is the dark one
    return image


def bomb() -> bytes:
    """A PNG of a few bytes that claims to be 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def odd_file(path: Path, content: Image.Image | bytes, **options) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path, **options)


def jpeg_bytes() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = Path(os.devnull)  # only the format matters
    import io

    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()

"""predict.py: what becomes of a folder of photographs, whatever is in it and whatever happens."""

import csv
import json
import re
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
from seg_torch.commands.predict import find_images, predict
from seg_torch.errors import InputError
from seg_torch.files import PARTIAL
from seg_torch.images import read_image
from seg_torch.labels import Labels
from seg_torch.models import unet
from seg_torch.models.network import Network

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
    for i, name in enumerate(
        ("a.png", "b.jpg", "trip/a.png", "trip/b.jpg", "trip/x/c.png", "z.png")
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (40, 56) if i % 3 else (64, 48)
        small = Image.fromarray(generator.integers(0, 256, (5, 5, 3), np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(path)
    return tmp_path / "photos"


@pytest.fixture
def run(compose, weights, photos, tmp_path):
    """`run("save=[mask]", ...)` predicts the photos into `out`."""

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
    return {str(path.relative_to(masks)): path.stat().st_mtime_ns for path in masks.rglob("*.png")}


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


GREY = np.full((40, 60), 10, np.uint8)
GREY[:, 30:] = 240
RIGHT = (GREY == 240).astype(np.uint8)  # its mask: the left half dark, the right half bright
RGB = Image.fromarray(GREY).convert("RGB")
EXIF_6 = Image.Exif()
EXIF_6[0x0112] = 6  # to be turned clockwise
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def transparent() -> Image.Image:
    """All black, the right half transparent: white, on paper."""
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


def bomb(path: Path) -> None:
    """A PNG of a few bytes that claims to have 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")))


# File, how it is made, and what becomes of it: its mask, or the reason for which it is refused.
ODD_FILES = [
    ("rgb.jpg", lambda path: RGB.save(path, quality=95), RIGHT),
    ("grey.png", lambda path: Image.fromarray(GREY).save(path), RIGHT),
    ("black and white.png", lambda path: Image.fromarray(RIGHT == 1).save(path), RIGHT),
    ("transparent.png", lambda path: transparent().save(path), RIGHT),
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
    ("text.jpg", lambda path: path.write_text("no picture"), "no format that Pillow knows"),
    ("bomb.png", bomb, "400000000 pixels.*max_pixels"),
]


def test_odd_files_are_labelled_rightly_or_named_with_the_reason(
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


def test_resize_and_crop_are_those_of_the_published_demo(compose, threshold, tmp_path):
    """Shorter side to 256, the middle 224 x 224: by hand, with Pillow."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    picture = picture.resize((600, 400), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "a.png")
    inputs = (f"input={tmp_path / 'a.png'}", f"output={tmp_path / 'out'}")
    predict(compose("predict", *inputs, "resize=256", "crop=224"))
    shrunk = picture.resize((384, 256), Image.Resampling.BILINEAR).crop((80, 16, 304, 240))
    expected = Segmenter(Network(Threshold(), (0, 0, 0), (1, 1, 1)), LABELS, device="cpu")
    assert np.array_equal(mask_of(tmp_path / "out/mask/a.png"), expected.predict(shrunk).mask)


def test_two_models_stand_side_by_side_in_one_picture(run, tmp_path):
    run("save=[mask,side_by_side]")
    alone = read_image(tmp_path / "out/side_by_side/a.jpg")
    other = random_checkpoint(tmp_path / "other.ckpt", seed=1)
    run("save=[mask]", f"beside={other}")
    both = read_image(tmp_path / "out/side_by_side/a.jpg")
    column = 200 + 4
    assert both.shape[1] == alone.shape[1] + column
    photo, first, second = (both[24:174, i * column :][:, :200].astype(int) for i in range(3))
    assert np.abs(photo - alone[24:174, :200]).mean() < 2
    assert np.abs(first - alone[24:174, column : column + 200]).mean() < 2
    assert np.abs(second - first).mean() > 5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("save=[masks]", "there is no masks; choose of legend, mask"),
        ("tta=[flop]", "expected flip, factors, or both"),
        ("tta=[0]", "expected numbers above 0"),
        ("tile=100", "expected auto, null or a multiple of 32"),
        ("batch_size=0", "expected at least 1"),
        ("trainer.devices=0", "trainer: "),
        ("beside=nowhere.ckpt", "no such file"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(run, setting, message):
    with pytest.raises(InputError, match=message):
        run(setting)


def test_a_model_without_weights_for_pictures_is_refused(compose, photos, tmp_path):
    cfg = compose("predict", f"input={photos}", f"output={tmp_path / 'out'}", "model=unet")
    with pytest.raises(InputError, match="give checkpoint=FILE"):
        predict(cfg)


def test_an_error_while_writing_ends_the_run(run, tmp_path):
    """A full disk must not look like a folder of bad photos."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mask").write_text("in the way")
    with pytest.raises(OSError, match="mask"):
        run()


def test_few_pictures_are_in_memory_at_a_time(tmp_path, monkeypatch):
    """Neither reading nor writing runs away from the network, in either direction."""
    alive, most = set(), 0

    def read(path):
        nonlocal most
        alive.add(path)
        most = max(most, len(alive))
        return np.zeros((8, 8, 3), np.uint8)

    def save(name, result, other):
        time.sleep(0.002)
        alive.discard(Path(name))

    pictures = {str(i): Path(str(i)) for i in range(300)}
    for path in pictures:
        (tmp_path / path).touch()
    monkeypatch.chdir(tmp_path)
    segmenter = Segmenter(Network(Threshold(), (0, 0, 0), (1, 1, 1)), LABELS, device="cpu")
    notes = []
    prediction._label(
        pictures, segmenter, None, read, save, notes.append, 1, probabilities=False, progress=False
    )
    assert len(notes) == 300
    assert not alive
    assert most <= 5 * min(8, prediction.available_cpus()) + 2


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "predict.py"), "trainer.accelerator=cpu", *arguments]


@pytest.fixture
def many(tmp_path) -> Path:
    (tmp_path / "many").mkdir()
    generator = np.random.default_rng(0)
    for i in range(200):
        picture = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8))
        picture.resize((48, 32), Image.Resampling.BICUBIC).save(tmp_path / f"many/{i:03d}.png")
    return tmp_path / "many"


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_and_goes_on_leaves_what_an_undisturbed_one_does(
    many, weights, compose, tmp_path, signal_number
):
    def arguments(output: str) -> list[str]:
        places = [f"input={many}", f"output={tmp_path / output}", f"checkpoint={weights}"]
        return [*places, "save=[mask,overlay,polygons,legend]"]

    process = subprocess.Popen(command(*arguments("stopped")), cwd=tmp_path)
    masks = tmp_path / "stopped/mask"
    while process.poll() is None and len(list(masks.glob("[0-9]*.png"))) < 60:
        time.sleep(0.005)
    process.send_signal(signal_number)
    assert process.wait() == (130 if signal_number == signal.SIGINT else -signal.SIGKILL)
    complete = {p.name: p.stat().st_mtime_ns for p in masks.glob("[0-9]*.png")}
    assert 60 <= len(complete) < 200
    noted = [record["name"] for record in prediction._read_journal(tmp_path / "stopped")]
    assert len(noted) >= 20

    # What a process leaves that is killed while it writes; whether this one did is chance.
    (masks / f"{PARTIAL}abc.png").write_bytes(b"half a picture")
    for output in ("stopped", "whole"):
        assert predict(compose("predict", "trainer.accelerator=cpu", *arguments(output))) == 0
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert all((masks / f"{n}.png").stat().st_mtime_ns == complete[f"{n}.png"] for n in noted)


def test_two_processes_do_each_file_once(many, weights, compose, tmp_path):
    places = [f"input={many}", f"checkpoint={weights}", "save=[mask,polygons]"]
    for path in sorted(many.iterdir())[50:]:
        path.unlink()
    (many / "bad.jpg").write_text("no picture")
    result = subprocess.run(
        command(*places, f"output={tmp_path / 'two'}", "trainer.devices=2"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stderr
    assert result.stdout.count("bad.jpg") == 1
    predict(compose("predict", *places, f"output={tmp_path / 'one'}", "trainer.accelerator=cpu"))
    assert files(tmp_path / "two") == files(tmp_path / "one")
    shares = [
        [json.loads(line)["name"] for line in path.read_text().splitlines() if line]
        for path in sorted((tmp_path / "two" / prediction.JOURNAL).glob("[01].jsonl"))
    ]
    assert len(shares) == 2
    assert sorted(shares[0] + shares[1]) == sorted([f"{i:03d}" for i in range(50)] + ["bad"])
    assert min(map(len, shares)) >= 25

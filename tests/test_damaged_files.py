"""A thousand damaged files: each is read as a valid sample or refused by name, within bounds."""

import csv
import itertools
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import damaged_commands
import numpy as np
import pytest
from conftest import PYTHONPATH
from make_data import blocks, picture
from omegaconf import OmegaConf
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_matrix
from torch import nn

from seg_torch.datasets import base, camvid, pet
from seg_torch.datasets.folder import folder, read_folder_mask
from seg_torch.datasets.published.clothing import CLOTHING_LABELS, read_clothing_mask
from seg_torch.datasets.published.voc import VOC_LABELS, read_voc_or_sbd_mask
from seg_torch.errors import InputError
from seg_torch.images.read import read_image
from seg_torch.labels import Labels, palette_image
from seg_torch.models.network import Network
from seg_torch.prediction.segmenter import Segmenter
from seg_torch.training.run import COLUMNS, read_table, resumed_config

FILES = 1000
SECONDS = 10  # for one file
MEGABYTES = 1000  # of memory, more than before the first file
SIDE = 32
LABELS = Labels(("sky", "road", "car"), np.array([(10, 20, 30), (0, 0, 0), (255, 0, 1)]))
CLASSES = "sky 10 20 30\nroad 0 0 0\ncar 255 0 1\n"


# What is damaged


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def sources() -> dict[str, bytes]:
    """Sound files, by the name they get; its beginning says how they are read."""
    photo = picture(0, SIDE, SIDE)
    mask = blocks(0, [0, 1, 2], height=SIDE, width=SIDE)
    values = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE)).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [picture(i, SIDE, SIDE) for i in range(3)]
    files = {
        "image_rgb.png": encoded(photo, "PNG"),
        "image_transparent.png": encoded(photo.convert("P"), "PNG", transparency=3),
        "image_16.png": encoded(Image.fromarray(values), "PNG"),
        "image.jpg": encoded(photo, "JPEG", exif=exif),
        "image_cmyk.jpg": encoded(photo.convert("CMYK"), "JPEG", progressive=True),
        "image.tif": encoded(photo, "TIFF"),
        "image_lzw.tif": encoded(photo, "TIFF", compression="tiff_lzw"),
        "image_16.tif": encoded(Image.fromarray(values), "TIFF"),
        "image_float.tif": encoded(Image.fromarray((values / 65535).astype(np.float32)), "TIFF"),
        "image.bmp": encoded(photo, "BMP"),
        "image.gif": encoded(photo, "GIF", save_all=True, append_images=frames),
        "image.webp": encoded(photo, "WEBP"),
        "image_frames.webp": encoded(photo, "WEBP", save_all=True, append_images=frames),
        "mask_palette.png": encoded(palette_image(mask, LABELS), "PNG"),
        "mask_16.png": encoded(Image.fromarray(mask.astype(np.uint16)), "PNG"),
        "mask_colour.png": encoded(palette_image(mask, LABELS).convert("RGB"), "PNG"),
        "mask_grey.tif": encoded(Image.fromarray(mask), "TIFF"),
        "classes.txt": CLASSES.encode(),
        "val.txt": b"a.png\nb\nc.png\n",
        "camvid.txt": b"/SegNet/CamVid/val/a.png /SegNet/CamVid/valannot/a.png\n",
        "pet.txt": b"a 1 1 1\nb 1 1 1\n",
    }
    edges = np.empty((2, 1), object)
    edges[:, 0] = [csc_matrix((SIDE, SIDE), dtype=np.uint8) for _ in range(2)]
    fields = {"Boundaries": edges, "Segmentation": mask, "CategoriesPresent": np.array([[1]])}
    for packed in (False, True):
        for name, variables in (("clothing", {"groundtruth": mask}), ("sbd", {"GTcls": fields})):
            file = BytesIO()
            savemat(file, variables, do_compression=packed)
            files[f"{name}_{packed}.mat"] = file.getvalue()
    return files


# How it is damaged


def resized_header(content: bytes, width: int, height: int) -> bytes:
    """The same file, claiming another size."""
    if content.startswith(b"\x89PNG"):
        header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
        return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    if content.startswith(b"\xff\xd8"):
        frame = re.search(rb"\xff[\xc0\xc2]..\x08", content, re.DOTALL)
        size = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
        return content[: frame.end()] + size + content[frame.end() + 4 :]
    if content.startswith(b"BM"):
        return content[:18] + struct.pack("<ii", width, height) + content[26:]
    if content.startswith(b"GIF"):
        return content[:6] + struct.pack("<HH", width & 0xFFFF, height & 0xFFFF) + content[10:]
    if content.startswith(b"II*\0"):
        for tag, value in ((256, width), (257, height)):
            for kind in (3, 4):  # in 16 or in 32 bits
                entry = struct.pack("<HHI", tag, kind, 1)
                place = content.find(entry)
                if place > 0:
                    new = struct.pack("<HHII", tag, 4, 1, value)
                    content = content[:place] + new + content[place + 12 :]
        return content
    if content.startswith(b"RIFF") and b"VP8X" in content:
        place = content.index(b"VP8X") + 12
        size = b"".join(struct.pack("<I", (n - 1) & 0xFFFFFF)[:3] for n in (width, height))
        return content[:place] + size + content[place + 6 :]
    return content[: len(content) // 2]


def damaged(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """The content with damage of one kind."""
    array, place = bytearray(content), rng.randrange(len(content))
    kind = rng.randrange(10)
    if kind == 0:
        return content[:place]
    if kind in (1, 2):
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            array[rng.randrange(len(array))] = rng.randrange(256)
    elif kind == 3:  # in the header
        start = rng.randrange(min(200, len(array)))
        array[start : start + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", rng.randbytes(4)])
    elif kind == 4:
        width, height = rng.choice(
            [
                (4000, 4000),
                (13_000, 13_000),
                (60_000, 60_000),
                (2**31 - 1, 1),
                (1, 170_000_000),
                (0, 5),
                (33, 32),
            ]
        )
        return resized_header(content, width, height)
    elif kind == 5:
        return rng.choice([b"", b"\0", rng.randbytes(1000), b"\0" * 1000, b"%!PS-Adobe-3.0\n"])
    elif kind == 6:  # the content of a file of another kind
        return rng.choice(others)
    elif kind == 7:
        del array[place : place + rng.randrange(1, 40)]
    elif kind == 8:
        array[place:place] = rng.randbytes(rng.randrange(1, 40))
    else:
        return content[:place] + rng.choice(others)[place:]
    return bytes(array)


def all_damaged(count: int) -> Iterator[tuple[str, bytes]]:
    rng, files = random.Random(0), sources()
    for number, name in zip(range(count), itertools.cycle(files), strict=False):
        yield f"{number}_{name}", damaged(files[name], list(files.values()), rng)


# How it is read


def read_sample(reader: Callable, labels: Labels, path: Path) -> None:
    """As an item of a dataset, beside a sound image."""
    dataset = base.SegmentationDataset(
        [base.Pair("a", path.parent / "a.png", path)], labels, reader
    )
    image, mask = dataset[0]
    assert image.shape == (3, SIDE, SIDE)
    assert mask.shape == (SIDE, SIDE)


def read_colours_or_ids(path: Path) -> np.ndarray:
    return read_folder_mask(path, LABELS.palette)


def read_list_of(dataset: Callable, place: str, path: Path) -> None:
    target = path.parent / place
    target.write_bytes(path.read_bytes())
    try:
        samples = dataset(path.parent, "val")
    except InputError as error:  # which names the file in its place
        raise InputError(str(error).replace(str(target), str(path))) from None
    for index in range(len(samples)):
        samples[index]


READERS = {
    "image": lambda path: read_image(path).shape[2] == 3,
    "mask": lambda path: read_sample(read_colours_or_ids, LABELS, path),
    "clothing": lambda path: read_sample(read_clothing_mask, CLOTHING_LABELS, path),
    "sbd": lambda path: read_sample(read_voc_or_sbd_mask, VOC_LABELS, path),
    "classes": base.read_classes,
    "val": lambda path: read_list_of(folder, "val.txt", path),
    "camvid": lambda path: read_list_of(camvid, "val.txt", path),
    "pet": lambda path: read_list_of(pet, "oxford-iiit-pet/annotations/test.txt", path),
}


def prepare(root: Path) -> None:
    """Datasets that only need the damaged file."""
    image, mask = picture(0, SIDE, SIDE), Image.fromarray(np.ones((SIDE, SIDE), np.uint8))
    image.save(root / "a.png")
    places = ("images", "masks", "val", "valannot")
    pets = ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations/trimaps")
    for place in (*places, *pets):
        (root / place).mkdir(parents=True)
        for name in "abc":
            is_mask = place in ("masks", "valannot", pets[1])
            suffix = "jpg" if place == pets[0] else "png"
            (mask if is_mask else image).save(root / place / f"{name}.{suffix}")
    (root / "classes.txt").write_text(CLASSES)
    (root / "train.txt").write_text("c\n")


def read_all(root: Path) -> list[tuple[str, str]]:
    """Reads every damaged file; returns for each its name and "valid", the refusal or the crash."""

    def too_slow(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_slow)
    results = []
    for name, content in all_damaged(FILES):
        path = root / name
        path.write_bytes(content)
        kind = re.split(r"[_.]", name)[1]
        signal.alarm(SECONDS)
        try:
            READERS[kind](path)
            results.append((name, "valid"))
        except InputError as error:
            results.append((name, f"refused: {error}"))
        except Exception as error:
            results.append((name, f"crash: {type(error).__name__}: {error}"))
        signal.alarm(0)
    return results


def peak_memory() -> int:
    """In megabytes. Unlike getrusage, Linux's file does not begin with the memory of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) // 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory")
def test_a_thousand_damaged_files_give_a_thousand_reports(tmp_path):
    """In a process of its own, which would show a crash of the libraries that read the formats."""
    run = subprocess.run(
        [sys.executable, __file__, tmp_path],
        timeout=300,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    results, grown = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == FILES
    for name, result in results:
        # A list that names absent files is told by these: they lie below the same folder.
        named = str(tmp_path) if name.endswith(".txt") else str(tmp_path / name)
        assert result == "valid" or (result.startswith("refused: ") and named in result), name
    kinds = {
        kind: [r for n, r in results if n.split("_", 1)[1].startswith(kind)] for kind in READERS
    }
    for kind, found in kinds.items():
        refused = sum(result != "valid" for result in found)
        assert len(found) / 2 < refused < len(found), kind  # some damage does no harm
    assert grown < MEGABYTES


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata
def test_damaged_images_in_a_folder_are_named_and_the_others_segmented(
    compose, tmp_path, monkeypatch, caplog
):
    from seg_torch.commands import predict as command

    segmenter = Segmenter(Network(nn.Conv2d(3, len(LABELS), 1)), LABELS, device="cpu")
    monkeypatch.setattr(command, "load_segmenters", lambda cfg, device: {"model": segmenter})
    source, sizes = tmp_path / "in", {}
    source.mkdir()
    for name, content in all_damaged(80):
        path = source / name
        if "_image" in name:
            path.write_bytes(content)
            with suppress(InputError):
                height, width, _ = read_image(path).shape
                sizes[name] = [str(width), str(height)]
    names = {path.name for path in source.iterdir()}
    assert len(names) / 10 < len(sizes) < len(names) / 2
    cfg = compose("predict", f"input={source}", f"output={tmp_path / 'out'}", "save=[mask]")
    assert command.predict(cfg) == len(names) - len(sizes)  # so that the command exits with 1
    with open(tmp_path / "out/predictions.csv", newline="") as file:
        assert {row[0]: row[1:3] for row in list(csv.reader(file))[1:]} == sizes
    assert len(list((tmp_path / "out/mask").iterdir())) == len(sizes)
    failures = [r.getMessage() for r in caplog.records if r.getMessage().startswith("failed: ")]
    assert len(failures) == len(names) - len(sizes)
    assert all(any(str(source / name) in f for f in failures) for name in names - sizes.keys())


@pytest.mark.parametrize("content", [b"", b"a: 1\na: 2", b"\xb4", b"[1", b"seed: 1"])
def test_the_damaged_settings_of_a_run_that_is_resumed_are_named(tmp_path, content):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.yaml is damaged: "):
        resumed_config(OmegaConf.create({"resume": str(tmp_path)}), [])


@pytest.mark.parametrize("content", [b"epoch,step\n1,x", b"ep\xb4ch\n1", b"epoch,st\n1,2"])
def test_the_damaged_table_of_a_run_is_named(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"metrics\.csv is damaged: "):
        read_table(tmp_path / "metrics.csv", COLUMNS)


@pytest.mark.filterwarnings("ignore")  # of libraries, of damaged files
def test_damaged_files_through_commands_are_named_and_leave_nothing(tmp_path, monkeypatch, capsys):
    """A sample of what the next test does."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    findings = damaged_commands.run(tmp_path, 5, 5, ["images", "folder"])
    assert findings == 0, capsys.readouterr().out


@pytest.mark.slow
def test_a_thousand_damaged_files_through_all_commands(tmp_path):
    script = damaged_commands.__file__
    run = subprocess.run(
        [sys.executable, script, tmp_path, str(FILES)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stdout
    assert f"{FILES} files, 0 findings" in run.stdout


if __name__ == "__main__":
    home = Path(sys.argv[1])
    prepare(home)
    before = peak_memory()
    found = read_all(home)
    (home / "results.json").write_text(json.dumps([found, peak_memory() - before]))

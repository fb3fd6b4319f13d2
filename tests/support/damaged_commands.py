"""Damaged files of all kinds through whole commands, in this process.

`python tests/support/damaged_commands.py FOLDER COUNT [SEED]` damages one file of what a command
reads, runs the command, and looks at what the user is left with. It prints a line for each finding
and at last the numbers.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import av
import make_data
import numpy as np
import torch
import yaml
from annotation_copies import saved_table
from hydra.core.global_hydra import GlobalHydra
from PIL import Image, ImageOps
from predictions import random_checkpoint
from scipy.io import loadmat

from seg_torch import Segmenter
from seg_torch.cli.main import main
from seg_torch.files import PARTIAL
from seg_torch.folders import LOCK

SECONDS = 120  # for one command
DATA = ("folder", "coco", "coco_panoptic", "labelme", "labelme_voc", "cvat", "yolo", "roboflow")
DATA += ("label_studio", "hf", "camvid", "pet", "voc", "clothing")
TINY = "model=unet model.encoder=mobilenetv3_small_050 model.decoder_channels=[8,8,8,8,8]"
TRAIN = f"train {TINY} model.weights=null data.num_workers=0 data.batch_size=2 trainer.max_epochs=1"
TRAIN += " data.augment=null trainer.limit_train_batches=2 trainer.accelerator=cpu"
# Files beside the data that no command needs.
UNUSED = (
    "captions_",
    "instanceIds",
    "SegmentationObject",
    "Visualization",
    "SegmentationClassPNG",
    "classes.png",
    "README.md",
)
UNUSED += ("photos/0007.jpg",)  # without annotation
UNUSED += (".journal/",)  # what it has lost is done again
UNUSED += (
    "out/mask/",
    "out/predictions.csv",
    "out/coco.json",
)  # what was written is not read again
# What a command reads of a run; of any other source it is all that there is.
READ = {
    "predict": ("best.ckpt",),
    "evaluate": ("best.ckpt",),
    "compare": ("config.yaml", "test_metrics.json", "test_images.npz", "metrics.csv", "times.csv"),
    "train resume": ("config.yaml", "last.ckpt", "metrics.csv", "times.csv"),
    "train": ("best.ckpt",),
}


class Source(NamedTuple):
    """A folder with sound files, and the commands that read them, `{}` being its copy."""

    make: Callable[[Path], object]
    commands: tuple[str, ...]


def quietly(line: str, folder: Path) -> tuple[int, str]:
    """Runs a command line; returns its exit code and all that it prints."""
    name, *arguments = line.split()
    GlobalHydra.instance().clear()
    argv, here, text = sys.argv, os.getcwd(), io.StringIO()
    os.chdir(folder)
    sys.argv = [f"{name}.py", *arguments]
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            main(name)
    except SystemExit as stop:
        return int(stop.code or 0), text.getvalue()
    except BaseException:
        return -1, text.getvalue() + traceback.format_exc()
    finally:
        sys.argv = argv
        os.chdir(here)


def make_run(root: Path) -> None:
    """A run that can be resumed, scored, compared and used."""
    data = "data=shapes data.dataset.size=32 data.dataset.train=4 data.dataset.val=2"
    line = f"{TRAIN} {data} data.dataset.test=2 output_dir={root / 'run'}"
    code, text = quietly(line, root)
    assert code == 0, text


def make_published(root: Path) -> None:
    random_checkpoint(root / "a.ckpt")
    Segmenter.load(root / "a.ckpt", device="cpu").save_pretrained(root / "published")
    (root / "a.ckpt").unlink()


def make_exported(root: Path) -> None:
    random_checkpoint(root / "a.ckpt")
    assert quietly(f"export checkpoint={root / 'a.ckpt'}", root)[0] == 0
    (root / "a.ckpt").unlink()


def make_openvino(root: Path) -> None:
    random_checkpoint(root / "a.ckpt")
    assert quietly(f"export checkpoint={root / 'a.ckpt'} format=openvino", root)[0] == 0
    (root / "a.ckpt").unlink()


def make_images(root: Path) -> None:
    """Of every format, each with what makes it special."""
    from test_damaged_files import sources

    (root / "in").mkdir()
    for name, content in sources().items():
        if name.startswith("image"):
            (root / "in" / name).write_bytes(content)


def make_video(root: Path) -> None:
    for name, codec in (("a.mp4", "libx264"), ("b.mkv", "libx264"), ("c.avi", "mpeg4")):
        with av.open(str(root / name), "w", options={"movflags": "faststart"}) as video:
            stream = video.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for i in range(12):
                pixels = np.asarray(make_data.picture(i))
                video.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            video.mux(stream.encode())


def make_outputs(root: Path) -> None:
    """Images and what predict has made of them."""
    (root / "in").mkdir()
    for i in range(3):
        make_data.picture(i, 32, 32).save(root / "in" / f"{i}.png")
    line = f"predict input={root}/in output={root}/out checkpoint={root.parent}/random.ckpt"
    assert quietly(f"{line} save=[mask,coco] trainer.accelerator=cpu", root)[0] == 0


PREDICT = "predict output={home}/results trainer.accelerator=cpu"
PHOTO = PREDICT + " input={home}/photo.png"


def of_data(name: str) -> Source:
    data = f"data={name} data.root={{}}"
    if name == "hf":
        data = "data=hf data.name={}"
    common = f"{data} data.num_workers=0 output_dir={{home}}/results"
    inspect = f"inspect {common}"
    train = f"{TRAIN} {common}"
    return Source(make_data_of(name), (inspect, inspect, inspect, inspect, train))


def make_data_of(name: str) -> Callable[[Path], object]:
    if name == "hf":
        return lambda root: saved_table(root)
    return getattr(make_data, f"make_{name}")


SOURCES = {name: of_data(name) for name in DATA} | {
    "run": Source(
        make_run,
        (
            PHOTO + " checkpoint={}/run",
            "evaluate checkpoint={}/run output_dir={home}/results trainer.accelerator=cpu",
            "compare runs={}/run output_dir={home}/results",
            "train resume={}/run trainer.max_epochs=2",
            TRAIN + " data=shapes data.dataset.size=32 data.dataset.train=4 data.dataset.val=2"
            " data.dataset.test=2 init_from={}/run output_dir={home}/results",
        ),
    ),
    "published": Source(make_published, (PHOTO + " checkpoint={}/published",)),
    "exported": Source(make_exported, (PHOTO + " checkpoint={}/a.onnx",)),
    "openvino": Source(make_openvino, (PHOTO + " checkpoint={}/a.xml",)),
    "images": Source(
        make_images, (PREDICT + " save=[mask] input={}/in checkpoint={home}/random.ckpt",)
    ),
    "video": Source(
        make_video,
        tuple(
            PREDICT + f" input={{}}/{name} checkpoint={{home}}/random.ckpt"
            for name in ("a.mp4", "b.mkv", "c.avi")
        ),
    ),
    "outputs": Source(
        make_outputs,
        (
            "predict input={}/in output={}/out checkpoint={home}/random.ckpt save=[mask,coco]"
            " trainer.accelerator=cpu",
        ),
    ),
}
WEIGHTS = {"images": 12, "video": 6, "run": 8, "outputs": 3}  # the others 1 and more
SUFFIXES = (".png", ".jpg", ".txt", ".json", ".yaml", ".mp4", ".ckpt", ".tif", ".bak", "")


# Damage


def damage(path: Path, rng: random.Random) -> tuple[str, Path]:
    """Damages a file in place; returns how, and where it is now."""
    kind = rng.choice(("flip", "flip", "cut", "zero", "double", "rename", "empty"))
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content)) if content else 0
    if kind == "rename":
        new = path.with_suffix(rng.choice([s for s in SUFFIXES if s != path.suffix]))
        if new.exists():
            new = path.with_name(path.name + ".bak")
        return kind, path.rename(new)
    if kind == "flip" and content:
        for _ in range(rng.choice((1, 1, 8, 64))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "zero":
        length = min(rng.choice((4, 100, 10_000)), len(content) - place)
        content[place : place + length] = bytes(length)
    elif kind == "double":
        content += bytes(content)
    elif kind == "empty":
        content.clear()
    path.write_bytes(content)
    return kind, path


# What a file is by libraries that are not ours


def is_sound(path: Path) -> bool:
    """Whether the usual library of its format reads a file to the end."""
    kind = path.suffix.lower()
    try:
        if kind in (".png", ".jpg", ".tif", ".bmp", ".gif", ".webp"):
            with Image.open(path) as image:
                ImageOps.exif_transpose(image).load()
        elif kind in (".json", ".jsonl"):
            text = path.read_text(encoding="utf-8")
            [json.loads(line) for line in (text.splitlines() if kind == ".jsonl" else [text])]
        elif kind == ".yaml":
            yaml.safe_load(path.read_text(encoding="utf-8"))
        elif kind in (".ckpt", ".npz"):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        elif kind in (".txt", ".csv"):
            path.read_text(encoding="utf-8")
        elif kind == ".xml":  # its reader takes the first of two documents
            ElementTree.fromstring(path.read_bytes().partition(b"</net>")[0] + b"</net>")
        elif kind == ".mat":
            loadmat(path)
        elif kind in (".mp4", ".mkv", ".avi"):
            with av.open(str(path)) as video:
                return sum(1 for _ in video.decode(video=0)) >= 12
    except Exception:
        return False
    return True


# What the user is left with


def leftovers(home: Path) -> list[str]:
    """Half-written files, locks, and temporary files."""
    found = [str(p.relative_to(home)) for p in home.rglob(f"{PARTIAL}*")]
    # ONNX Runtime has a file of its own there.
    found += [f"tmp/{path.name}" for path in (home / "tmp").iterdir() if path.name != ".ses"]
    found += [str(p.relative_to(home)) for p in home.rglob(LOCK)]
    return found


def listing(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def try_one(home: Path, rng: random.Random, name: str) -> tuple[str, list[str], str]:
    """Damages a file of a source and runs one of its commands.

    Returns:
        What was done and came out, what is wrong with that, and the text of the command.
    """
    for folder in ("data", "results", "tmp", "cache"):
        shutil.rmtree(home / folder, ignore_errors=True)
    (home / "tmp").mkdir()
    shutil.copytree(home / "sound" / name, home / "data")
    command = rng.choice(SOURCES[name].commands).replace("{home}", str(home))
    command = command.replace("{}", str(home / "data"))
    files = sorted(p for p in (home / "data").rglob("*") if p.is_file() and "lock" not in p.name)
    if name == "video":
        files = [path for path in files if path.name in command]
    if name == "run":
        read = READ["train resume" if "resume=" in command else command.split()[0]]
        files = [path for path in files if path.name in read]
    victim = rng.choice(files)
    before = victim.read_bytes()
    kind, path = damage(victim, rng)
    changed = path != victim or path.read_bytes() != before
    there = listing(home / "data")
    signal.alarm(SECONDS)
    try:
        code, text = quietly(command, home)
    finally:
        signal.alarm(0)
    what = f"{name}: {kind} {path.relative_to(home / 'data')}, {command.split()[0]}: {code}"
    faults = []
    if code not in (0, 1, 2) or "Traceback" in text:
        faults.append("traceback")
    if code in (1, 2) and "error:" not in text and "failed:" not in text and "refused" not in text:
        faults.append("no message")
    places = [victim, *victim.relative_to(home / "data").parents[:-1]]
    named = any(place.name in text for place in places)
    named |= any(f"{home / 'data'}{end}" in text for end in (":", "/a.xml:"))
    if code == 2 and not named:
        faults.append("the message names neither the file nor its folder")
    writes = name in ("run", "outputs")
    if not writes and listing(home / "data") != there:
        faults.append("the data were changed")
    faults += [f"left over: {name}" for name in leftovers(home)]
    used = not any(word in str(victim) for word in UNUSED)
    used &= victim.name not in text  # else it is told, such as an image without annotation
    if code == 0 and changed and used and kind != "rename" and not is_sound(path):
        faults.append("accepted")
    return what, faults, text


def prepare(home: Path, names: list[str]) -> None:
    (home / "sound").mkdir(parents=True, exist_ok=True)
    random_checkpoint(home / "random.ckpt")
    random_checkpoint(home / "sound" / "random.ckpt")
    make_data.picture(0, 32, 32).save(home / "photo.png")
    for name in names:
        if not (home / "sound" / name).exists():
            (home / "sound" / name).mkdir()
            SOURCES[name].make(home / "sound" / name)


def too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def run(home: Path, count: int, seed: int, names: list[str]) -> int:
    """Prints the findings; returns their number."""
    signal.signal(signal.SIGALRM, too_slow)
    prepare(home, names)
    drawn = [name for name in names for _ in range(WEIGHTS.get(name, 2))]
    outcomes, findings = Counter[str](), 0
    for number in range(count):
        rng = random.Random(seed * 1_000_000 + number)
        what, faults, text = try_one(home, rng, rng.choice(drawn))
        outcomes[what.rpartition(": ")[2] + " " + what.split()[1]] += 1
        if faults:
            findings += 1
            print(f"{number} {what}: {'; '.join(faults)}\n    {text[-1500:]!r}", flush=True)
        elif number % 50 == 0:
            print(f"{number} {what}", flush=True)
    print(f"{count} files, {findings} findings; exit codes by damage: {dict(outcomes)}", flush=True)
    return findings


if __name__ == "__main__":
    folder, count, *rest = sys.argv[1:]
    home = Path(folder).resolve()
    torch.set_num_threads(1)
    os.environ.update(TMPDIR=str(home / "tmp"), XDG_CACHE_HOME=str(home / "cache"))
    seed = int(rest[0]) if rest else 0
    sys.exit(min(1, run(home, int(count), seed, rest[1:] or list(SOURCES))))

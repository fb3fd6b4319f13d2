"""Does train.py, told the time alone, score like recipes set by hand, and above other tools?

    python benchmarks/planning.py DATA WEIGHTS [--minutes 5] [--ultralytics-python PATH]

DATA holds camvid, membrane, cracks and clothing-co-parsing; WEIGHTS are timm's of
tf_efficientnet_lite0. Five datasets, each copied into a folder for `data=folder`, are trained on in
the same time: by train.py with `budget=`, with three recipes set by hand (RECIPES), by the loop of
SMP's tutorial (smp_tutorial.py, the same weights) and, where a Python with `ultralytics` is given,
by yolo26n-sem (yolo.py, random weights). All scores are the mean IoU over val at the labels' size.

The time of train.py is that of the whole process, with validation and test; a recipe has as many
steps as fit, by a short run before. The peers have the same minutes for training steps alone.
train.py tests the best of its epochs, by the same images; the peers' last weights are scored.

One process works at a time. Results are written to --output after each; what is there already is
not done again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from seg_torch.datasets import camvid, clothing, folder, shapes
from seg_torch.datasets.folder import write_classes
from seg_torch.files import write_json, write_text
from seg_torch.labels import palette_image
from seg_torch.metrics import ConfusionMatrix, scores

HERE = Path(__file__).parent
THREADS = 2
SETS = ("camvid", "membrane", "cracks", "clothing", "shapes")
# What an expert would try, by the size of the images and of what is in them. A recipe has a size of
# the whole image (null: its own), a crop and a scale (null: none), turns, a loss, a rate and a
# batch size. CamVid: 360 x 480. Membrane: 512 x 512, 24 images. Cracks: 320 x 480, lines of a few
# pixels, 88 images. Clothing: about 830 x 550, 59 classes. Shapes: 128 x 128.
RECIPES = {
    "camvid": (
        ("[264,352]", "null", "null", "false", "ce_dice", 2e-3, 8),
        ("[176,240]", "null", "[0.75,1.5]", "false", "ce_dice", 3e-3, 8),
        ("null", "[256,320]", "[0.5,1.5]", "false", "weighted_ce", 1e-3, 8),
    ),
    "membrane": (
        ("null", "[256,256]", "null", "true", "ce", 2e-3, 8),
        ("[256,256]", "null", "null", "false", "ce_dice", 2e-3, 8),
        ("null", "[384,384]", "[0.75,1.5]", "true", "ce_dice", 1e-3, 4),
    ),
    "cracks": (
        ("null", "[256,256]", "[0.75,1.5]", "true", "ce_dice", 2e-3, 8),
        ("null", "null", "null", "false", "ce_dice", 1e-3, 4),
        ("[160,240]", "null", "null", "false", "weighted_ce", 3e-3, 16),
    ),
    "clothing": (
        ("[416,272]", "null", "null", "false", "ce", 2e-3, 8),
        ("[280,184]", "null", "null", "false", "ce_dice", 3e-3, 8),
        ("null", "[352,352]", "[0.5,1.0]", "false", "ce", 1e-3, 8),
    ),
    "shapes": (
        ("null", "null", "null", "true", "ce_dice", 2e-3, 8),
        ("null", "null", "null", "false", "ce", 3e-3, 16),
        ("[192,192]", "null", "null", "false", "ce_dice", 1e-3, 8),
    ),
}
SETTINGS = (
    "data.resize",
    "data.augment.crop",
    "data.augment.scale",
    "data.augment.turn",
    "loss",
    "optimizer.lr",
    "data.batch_size",
)
VALIDATIONS = 3  # of a recipe's run


def open_split(name: str, data: Path, split: str) -> Any:
    if name == "shapes":
        return shapes(split, train=600, val=100)
    if name == "camvid":
        return camvid(data / name, split)
    if name == "clothing":
        return clothing(data / "clothing-co-parsing", split, limit=300)
    return folder(data / name, split)


def prepare(open_split: Callable[[str], Any], root: Path) -> None:
    """Copy a dataset into a folder for `data=folder`: its image files, PNG masks and splits."""
    if (root / "val.txt").exists():
        return
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        samples = open_split(split)
        names = [f"{split}{i:04d}" for i in range(len(samples))]
        for i, name in enumerate(names):
            image, mask = samples[i]
            if samples.pairs is not None:
                source = samples.pairs[i].image
                shutil.copyfile(source, root / "images" / f"{name}{source.suffix}")
            else:
                pixels = image.permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(root / "images" / f"{name}.png")
            palette_image(mask.numpy(), samples.labels).save(root / "masks" / f"{name}.png")
        write_classes(samples.labels, root)
        write_text(root / f"{split}.txt", "".join(f"{name}\n" for name in names))


def run(command: Sequence[object], log: Path, environment: Mapping[str, str] = {}) -> dict:
    """Run a process, with its output in a file, and return its seconds and peak memory in GB."""
    threads = {"OMP_NUM_THREADS": str(THREADS)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **threads, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[1]} failed, see {log}")
    return {"seconds": round(seconds, 1), "memory_gb": round(usage.ru_maxrss * 1024 / 1e9, 2)}


def train(settings: Iterable[str], place: Path) -> dict:
    """Run train.py in a folder `run`, and return seconds, memory and mean IoU."""
    shutil.rmtree(place / "run", ignore_errors=True)
    command = [sys.executable, HERE.parent / "train.py", *settings, "logger=none", "seed=0"]
    found = run([*command, f"output_dir={place}/run"], place / "log.txt")
    metrics = json.loads((place / "run/test_metrics.json").read_text())
    shutil.rmtree(place / "run/checkpoints")  # lest all runs fill the disk
    return {**found, "mean_iou": round(metrics["mean_iou"], 4)}


def ours(root: Path, weights: str, minutes: float, place: Path) -> dict:
    settings = ["data=folder", f"data.root={root}", f"budget={minutes:g}m"]
    return train([*settings, f"model.weights={weights}"], place)


def by_hand(
    recipe: Sequence[object], root: Path, weights: str, minutes: float, place: Path
) -> dict:
    """Train with a recipe, for as many steps as fit."""
    settings = [
        "recipe=null",
        "data=folder",
        f"data.root={root}",
        "data.cache=ram",
        "model.encoder=tf_efficientnet_lite0",
        f"model.weights={weights}",
        *(f"{key}={value}" for key, value in zip(SETTINGS, recipe, strict=True)),
    ]
    images = len((root / "train.txt").read_text().split())
    batches = images // int(str(recipe[-1]))
    trial = min(8, batches)  # steps of an epoch
    short = ["trainer.max_epochs=3", f"trainer.limit_train_batches={trial}"]
    found = train([*settings, *short, "trainer.check_val_every_n_epoch=3"], place / "trial")
    with (place / "trial/run/times.csv").open() as file:
        _, epoch, with_validation = (float(row["seconds"]) for row in csv.DictReader(file))
    around = found["seconds"] - 3 * epoch - (with_validation - epoch)  # start and test
    left = 60 * minutes - around - VALIDATIONS * (with_validation - epoch)
    epochs, steps = schedule(int(left / epoch * trial), batches)
    long = [f"trainer.max_epochs={epochs}", f"trainer.limit_train_batches={steps}"]
    validate = f"trainer.check_val_every_n_epoch={epochs // VALIDATIONS}"
    return {**train([*settings, *long, validate], place), "steps": epochs * steps}


def schedule(steps: int, batches: int) -> tuple[int, int]:
    """Return epochs, a multiple of VALIDATIONS, and steps of each, for most of the steps."""
    rounds = max(1, steps // (VALIDATIONS * batches))
    choices = [VALIDATIONS * r for r in (rounds, rounds + 1)]
    lengths = {epochs: min(batches, max(1, steps // epochs)) for epochs in choices}
    fit = [epochs for epochs in choices if epochs * lengths[epochs] <= steps] or choices[:1]
    best = max(fit, key=lambda epochs: epochs * lengths[epochs])
    return best, lengths[best]


def score(root: Path, masks: Path) -> float:
    """Return the mean IoU of masks, named like the images of val."""
    samples = folder(root, "val")
    confusion = ConfusionMatrix(len(samples.labels))
    for i, pair in enumerate(samples.pairs):
        found = torch.from_numpy(np.array(Image.open(masks / f"{Path(pair.image).stem}.png")))
        confusion.update(found, samples[i][1])
    return round(float(scores(confusion.compute())["mean_iou"]), 4)


def tutorial(root: Path, weights: str, minutes: float, place: Path) -> dict:
    command = [sys.executable, HERE / "smp_tutorial.py", root, weights, minutes, 0, place / "masks"]
    found = run(command, place / "log.txt")
    return {**found, "mean_iou": score(root, place / "masks")}


def yolo(python: str, root: Path, minutes: float, place: Path) -> dict:
    shutil.rmtree(place, ignore_errors=True)
    found = run([python, HERE / "yolo.py", root, minutes, 0, place], place.with_suffix(".txt"))
    (masks,) = (place / "masks").iterdir()
    shutil.rmtree(place / "run")  # a checkpoint of each epoch
    return {**found, "mean_iou": score(root, masks)}


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return Markdown: a row for each dataset, a column for each side."""
    sides = list(dict.fromkeys(side for row in results.values() for side in row))
    lines = ["| dataset | " + " | ".join(sides) + " | ours / best recipe |"]
    lines.append("|---" * (len(sides) + 2) + "|")
    for name, row in results.items():
        cells = [
            f"{row[s]['mean_iou']:.3f} ({row[s]['seconds']:.0f} s, {row[s]['memory_gb']:.1f} GB)"
            if s in row
            else ""
            for s in sides
        ]
        recipes = [found["mean_iou"] for side, found in row.items() if side.startswith("recipe")]
        ratio = f"{row['ours']['mean_iou'] / max(recipes):.3f}" if "ours" in row and recipes else ""
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {ratio} |")
    lines += ["", f"| recipe | {' | '.join(SETTINGS)} |", "|---" * (len(SETTINGS) + 1) + "|"]
    for name, choices in RECIPES.items():
        for number, values in enumerate(choices, 1):
            lines.append(f"| {name} {number} | " + " | ".join(map(str, values)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the datasets")
    parser.add_argument("weights", help="of tf_efficientnet_lite0")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--only", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--sides", nargs="*", help="such as ours 'recipe 1'; all without it")
    parser.add_argument("--ultralytics-python", help="a Python that has ultralytics")
    parser.add_argument("--output", type=Path, default=Path("runs/planning"))
    given = parser.parse_args()
    output, weights, minutes = given.output.resolve(), given.weights, given.minutes
    file = output / "results.json"
    results: dict = json.loads(file.read_text()) if file.exists() else {}
    for name in given.only:
        root = output / "data" / name
        prepare(partial(open_split, name, given.data), root)
        sides: dict[str, Callable[[Path], dict]] = {"ours": partial(ours, root, weights, minutes)}
        for number, recipe in enumerate(RECIPES[name], 1):
            sides[f"recipe {number}"] = partial(by_hand, recipe, root, weights, minutes)
        sides["SMP tutorial"] = partial(tutorial, root, weights, minutes)
        if python := given.ultralytics_python:
            sides["yolo26n-sem"] = partial(yolo, python, root, minutes)
        for side, train_side in sides.items():
            if side in results.get(name, {}) or (given.sides and side not in given.sides):
                continue
            try:
                found = train_side(output / "runs" / name / side.replace(" ", "-"))
            except RuntimeError as error:  # the others go on
                print(f"{name}, {side}: {error}", flush=True)
                continue
            print(f"{name}, {side}: {found}", flush=True)
            results.setdefault(name, {})[side] = found
            write_json(file, results)
            write_text(output / "results.md", table(results))


if __name__ == "__main__":
    main()

"""Time to accuracy on CamVid: minutes of training until val has a mean IoU of 0.40, 0.50, ...

    python benchmarks/camvid.py DATA/camvid WEIGHTS [--seeds 1] [--ultralytics-python PATH]

WEIGHTS are timm's of tf_efficientnet_lite0. With each seed, `train.py experiment=camvid_unet` is
trained, then SMP's U-Net with the same encoder for as many epochs in the plainest loop that is fast
(plain_loop.py), then yolo26n-sem from random weights for as many minutes (yolo.py). All are
validated after each epoch, at the labels' own size.

The clock runs from the first step on, while training steps are made and their data are waited for.
Validation does not count, nor does what comes before and after training. A threshold is reached at
the first epoch whose score is at least as high.

The curves, a table and the numbers are written to --output after each run; what is there already is
not done again.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from planning import HERE, prepare, run, score

from seg_torch.datasets import camvid
from seg_torch.files import write_json, write_text

THRESHOLDS = (0.40, 0.50, 0.60, 0.65)
OURS, SMP, YOLO = "train.py", "SMP, plain loop", "yolo26n-sem, random weights"
Curve = dict[str, list[float]]  # minutes and mean_iou, of each epoch


class Clock(lightning.Callback):
    """Writes the seconds of the training steps so far at the end of each epoch.

    Args:
        file: The JSON file, a list.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.stopped = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        before = self.seconds[-1] if self.seconds else 0.0
        self.seconds.append(before + self.stopped - self.started)
        write_json(self.file, self.seconds)


def ours(root: str, weights: str, seed: int, place: Path) -> Curve:
    shutil.rmtree(place, ignore_errors=True)
    settings = [
        "experiment=camvid_unet",
        f"data.root={root}",
        f"model.weights={weights}",
        f"seed={seed}",
        "trainer.check_val_every_n_epoch=1",
        "logger=none",
        "+callbacks.clock._target_=camvid.Clock",
        f"+callbacks.clock.file={place}/seconds.json",
        f"output_dir={place}/run",
    ]
    command = [sys.executable, HERE.parent / "train.py", *settings]
    run(command, place / "log.txt", {"PYTHONPATH": str(HERE)})
    seconds = json.loads((place / "seconds.json").read_text())
    with (place / "run/metrics.csv").open() as file:
        found = [float(row["val_mean_iou"]) for row in csv.DictReader(file)]
    return curve(seconds, found)


def smp(root: str, weights: str, epochs: int, seed: int, place: Path) -> Curve:
    command = [sys.executable, HERE / "plain_loop.py", root, epochs, seed, weights]
    run(command, place / "log.txt")
    lines = re.findall(r"mean_iou (\S+) .* after (\S+) s", (place / "log.txt").read_text())
    return curve([float(seconds) for _, seconds in lines], [float(found) for found, _ in lines])


def yolo(python: str, data: Path, minutes: float, seed: int, place: Path) -> Curve:
    shutil.rmtree(place, ignore_errors=True)
    command = [python, HERE / "yolo.py", data, minutes, seed, place]
    run(command, place / "log.txt", {"EVERY_EPOCH": "1"})
    seconds = json.loads((place / "seconds.json").read_text())
    return curve(seconds, [score(data, place / "masks" / str(i)) for i in range(len(seconds))])


def curve(seconds: list[float], found: list[float]) -> Curve:
    return {"minutes": [s / 60 for s in seconds], "mean_iou": found}


def minutes_until(threshold: float, curve: Curve) -> float | None:
    """Return when the curve is at the threshold for the first time, or None."""
    pairs = zip(curve["minutes"], curve["mean_iou"], strict=True)
    return next((minutes for minutes, found in pairs if found >= threshold), None)


def table(results: Mapping[str, Mapping[str, Curve]]) -> str:
    """Return Markdown: the minutes of each side until each threshold, one number for each seed."""
    lines = ["| val mean IoU | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for threshold in THRESHOLDS:
        cells = []
        for curves in results.values():
            times = [minutes_until(threshold, curve) for curve in curves.values()]
            cells.append(", ".join("not reached" if t is None else f"{t:.1f}" for t in times))
        lines.append(f"| {threshold:.2f} | " + " | ".join(cells) + " |")
    best = [
        ", ".join(f"{max(curve['mean_iou']):.3f} of {curve['minutes'][-1]:.1f} min" for curve in c)
        for c in (curves.values() for curves in results.values())
    ]
    lines.append("| the best | " + " | ".join(best) + " |")
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Draw val mean IoU over minutes, a line for each side and seed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for threshold in THRESHOLDS:
        axes.axhline(threshold, color="grey", linewidth=0.7, linestyle="--")
    for (side, curves), colour in zip(results.items(), ("C0", "C1", "C2"), strict=False):
        for number, curve in enumerate(curves.values()):
            name = None if number else side
            axes.plot(curve["minutes"], curve["mean_iou"], colour, marker=".", label=name)
    axes.set_xlabel("minutes of training, without validation")
    axes.set_ylabel("val mean IoU")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder of CamVid")
    parser.add_argument("weights", help="of tf_efficientnet_lite0")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ultralytics-python", help="a Python that has ultralytics")
    parser.add_argument("--output", type=Path, default=Path("runs/camvid"))
    given = parser.parse_args()
    root, output = given.root, given.output.resolve()
    file = output / "results.json"
    results: dict[str, dict[str, Curve]] = json.loads(file.read_text()) if file.exists() else {}

    def keep(side: str, seed: int, found: Curve) -> None:
        results.setdefault(side, {})[str(seed)] = found
        write_json(file, results)
        write_text(output / "results.md", table(results))
        draw(results, output / "camvid.png")
        print(f"{side}, seed {seed}: mean IoU {found['mean_iou'][-1]:.3f}", flush=True)

    for seed in range(given.seeds):
        done = {side for side, curves in results.items() if str(seed) in curves}
        if OURS not in done:
            keep(OURS, seed, ours(root, given.weights, seed, output / f"ours-{seed}"))
        minutes = results[OURS][str(seed)]["minutes"]
        if SMP not in done:
            place = output / f"smp-{seed}"
            keep(SMP, seed, smp(root, given.weights, len(minutes), seed, place))
        if given.ultralytics_python and YOLO not in done:
            prepare(partial(camvid, root), output / "data")
            place = output / f"yolo-{seed}"
            python = given.ultralytics_python
            keep(YOLO, seed, yolo(python, output / "data", minutes[-1], seed, place))


if __name__ == "__main__":
    main()

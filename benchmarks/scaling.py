"""How time and memory grow with the work.

    python benchmarks/scaling.py [--only NAME ...] [--output FOLDER]

* image size: `Segmenter.predict` of one image
* classes: upsampling, loss and gradient of 4 x 256 x 256 pixels
* files: from `data.root` to the first training batch
* processes: an epoch of `train.py` on the CPU, the same images shared out

Every point is measured in a process of its own (Linux), in some three minutes. Writes
`scaling.json` and `scaling.png`.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from seg_torch import Labels, Segmenter, hardware
from seg_torch.data.module import SegmentationDataModule
from seg_torch.datasets import folder
from seg_torch.losses import CrossEntropyLoss, upsampled_loss
from seg_torch.models import unet
from seg_torch.models.network import Network

MEGABYTE = 1 << 20
LINKS = 10_000  # of one file: file systems allow some 60,000


class Cost(NamedTuple):
    """Seconds, and the peak of memory in MB above what the process had before."""

    seconds: float
    memory: float


class Growth(NamedTuple):
    """What is measured, and with how much of it."""

    unit: str
    measure: Callable[[int], Cost]
    amounts: tuple[int, ...]


def cost(function: Callable[[], object], rounds: int = 1) -> Cost:
    """Return the median of the seconds, after a first call where there are several rounds."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is used now
    start_memory, seconds = memory("VmRSS"), []
    for _ in range(rounds if rounds == 1 else rounds + 1):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return Cost(statistics.median(seconds[-rounds:]), memory("VmHWM") - start_memory)


def memory(key: str) -> float:
    """`VmRSS` (now) or `VmHWM` (so far at most) of this process, in MB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024 / MEGABYTE


def pixels(side: int) -> Cost:
    labels = Labels(tuple(f"class {i}" for i in range(21)))
    segmenter = Segmenter(Network(unet(21, "resnet18", None)), labels, device="cpu")
    segmenter.predict(np.zeros((64, 64, 3), np.uint8))
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    return cost(lambda: segmenter.predict(image), rounds=1 if side > 2000 else 3)


def classes(number: int) -> Cost:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, number, 64, 64, generator=generator).requires_grad_()
    target = torch.randint(number, (4, 256, 256), generator=generator, dtype=torch.uint8)
    loss = CrossEntropyLoss()
    loss(logits[:1, :, :8, :8], target[:1, :8, :8] * 0).backward()
    return cost(lambda: upsampled_loss(loss, logits, target).backward(), rounds=3)


def files(number: int) -> Cost:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        generator = np.random.default_rng(0)
        for kind, channels in (("images", (3,)), ("masks", ())):
            (root / kind).mkdir()
            content = generator.integers(0, 2, (32, 32, *channels), np.uint8)
            for index in range(number):
                path = root / kind / f"{index:06d}.png"
                if index % LINKS == 0:
                    Image.fromarray(content).save(path)
                    first = path
                else:
                    os.link(first, path)
        (root / "classes.txt").write_text("a\nb\n")
        next(iter(SegmentationDataModule(folder, _ten(root), num_workers=0).train_dataloader()))

        def start() -> None:
            data = SegmentationDataModule(folder, str(root), num_workers=0)
            data.dataset("val")
            next(iter(data.train_dataloader()))

        return cost(start)


def _ten(root: Path) -> str:
    """Return a dataset of ten files, to load what a first batch needs of the libraries."""
    for kind in ("images", "masks"):
        (root / "ten" / kind).mkdir(parents=True)
        for index in range(10):
            source = (root / kind / "000000.png").read_bytes()
            (root / "ten" / kind / f"{index}.png").write_bytes(source)
    (root / "ten/classes.txt").write_text("a\nb\n")
    return str(root / "ten")


def processes(number: int) -> Cost:
    """Return an epoch after the first; the memory is that of the largest process.

    Every process has one thread, so that up to the number of cores they do not share one.
    """
    with tempfile.TemporaryDirectory() as name:
        settings = {
            "data": "shapes",
            "model": "unet_random",
            "data.dataset.size": 64,
            "data.dataset.train": 120,
            "data.dataset.val": 6,
            "data.dataset.test": 6,
            "data.batch_size": 12 // number,
            "data.cache": "none",
            "data.num_workers": 0,
            "trainer.accelerator": "cpu",
            "trainer.devices": number,
            "trainer.max_epochs": 2,
            "output_dir": name,
        }
        subprocess.run(
            [sys.executable, "-m", "seg_torch", "train", "recipe=null"]
            + [f"{key}={value}" for key, value in settings.items()],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        with open(Path(name, "times.csv"), newline="") as file:
            *_, last = csv.DictReader(file)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / MEGABYTE
    return Cost(float(last["seconds"]), peak)


GROWTHS = {
    "image size": Growth("pixels per side", pixels, (256, 512, 1024, 2048)),
    "classes": Growth("classes", classes, (2, 10, 50, 250)),
    "files": Growth("files", files, (10, 100, 1_000, 10_000, 100_000)),
    "processes": Growth("processes", processes, (1, 2, 3)),
}


def draw(results: dict[str, dict[int, Cost]], path: Path) -> None:
    """Seconds above, memory below, with a dotted line that grows as the work does."""
    figure, axes = plt.subplots(
        2, len(results), figsize=(3.2 * len(results), 5.5), layout="constrained", squeeze=False
    )
    for column, (name, costs) in zip(axes.T, results.items(), strict=True):
        amounts = list(costs)
        for axis, field in zip(column, Cost._fields, strict=True):
            values = [max(getattr(c, field), 1 if field == "memory" else 0) for c in costs.values()]
            work = [a**2 if name == "image size" else a for a in amounts]
            if name != "processes":
                linear = [values[-1] * w / work[-1] for w in work]
                axis.plot(amounts, linear, ":", color="grey", label="linear")
                axis.set(xscale="log", yscale="log", ylim=(min(values) / 2, max(values) * 2))
                axis.xaxis.minorticks_off()
            else:
                axis.set(ylim=(0, max(values) * 1.1))
            axis.set_xticks(amounts, [f"{amount:,}" for amount in amounts], fontsize=7)
            axis.plot(amounts, values, "o-", color="#4878a8")
            axis.set_ylabel("seconds" if field == "seconds" else "memory, MB")
        column[0].set_title(name)
        column[1].set_xlabel(GROWTHS[name].unit)
    axes[0, 0].legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=GROWTHS, default=list(GROWTHS))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, Cost]] = {}
    for name in arguments.only:
        growth = GROWTHS[name]
        results[name] = {}
        for amount in growth.amounts:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(growth.measure, (amount,))
            results[name][amount] = found
            text = f"{found.seconds:8.3f} s {found.memory:8.0f} MB"
            print(f"{name:12} {amount:8,} {text}", flush=True)
    content = {
        "cores": hardware.available_cpus(),
        "torch": torch.__version__,
        "costs": {
            name: {amount: found._asdict() for amount, found in costs.items()}
            for name, costs in results.items()
        },
    }
    (arguments.output / "scaling.json").write_text(json.dumps(content, indent=2))
    draw(results, arguments.output / "scaling.png")


if __name__ == "__main__":
    main()

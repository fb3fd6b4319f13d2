"""`python train.py` on CamVid against SMP in a plain loop with the same recipe: equal scores?

    python benchmarks/same_recipe.py DATA/camvid [--epochs 12] [--seeds 3]

Trains both with each seed, benchmarks/plain_loop.py for the peer, and prints the scores of the last
epoch at the training size, the time of both as whole processes, and the mean and range over seeds.
The scores are equal within noise where the ranges overlap.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from seg_torch import Segmenter
from seg_torch.datasets import camvid
from seg_torch.images.resize import resize_image, resize_mask
from seg_torch.metrics import ConfusionMatrix, scores

HERE = Path(__file__).parent
SIZE = (176, 240)
# The recipe of plain_loop.py. Its flip is ours, too.
OVERRIDES = (
    "data=camvid",
    f"data.resize=[{SIZE[0]},{SIZE[1]}]",
    "data.batch_size=8",
    "data.cache=ram",
    "data.augment.crop=null",
    "data.augment.scale=null",
    "data.augment.jitter=null",
    "model.encoder=resnet18",
    "model.weights=null",
    "loss=ce",
    "optimizer=adamw",
    "optimizer.lr=2e-3",
    "scheduler=one_cycle",
)


def ours(root: str, epochs: int, seed: int) -> tuple[float, float]:
    """Return seconds and mean IoU of the last epoch."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            "recipe=null",
            *OVERRIDES,
            f"data.root={root}",
            f"trainer.max_epochs={epochs}",
            f"seed={seed}",
            f"output_dir={folder}/run",
        ]
        seconds, _ = timed([str(HERE.parent / "train.py"), *settings])
        segmenter = Segmenter.load(Path(folder, "run/checkpoints/last.ckpt"), device="cpu")
    confusion = ConfusionMatrix(len(segmenter.labels))
    dataset = camvid(root, "val")
    for image, mask in (dataset[i] for i in range(len(dataset))):
        found = segmenter.predict(resize_image(image, SIZE)).mask
        confusion.update(torch.from_numpy(found), resize_mask(mask, SIZE))
    return seconds, float(scores(confusion.compute())["mean_iou"])


def theirs(root: str, epochs: int, seed: int) -> tuple[float, float]:
    """Return seconds and mean IoU of the last epoch."""
    seconds, output = timed([str(HERE / "plain_loop.py"), root, str(epochs), str(seed)])
    return seconds, float(output.split("mean_iou")[-1].split()[0])


def timed(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    run = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - start, run.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder of CamVid")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    results: dict[str, list[float]] = {"train.py": [], "SMP in a plain loop": []}
    for seed in range(arguments.seeds):
        for side, train in zip(results, (ours, theirs), strict=True):
            seconds, mean_iou = train(arguments.root, arguments.epochs, seed)
            results[side].append(mean_iou)
            print(f"{side}, seed {seed}: mean_iou {mean_iou:.4f}, {seconds:.0f} s", flush=True)
    for side, found in results.items():
        mean = sum(found) / len(found)
        print(f"{side}: mean_iou {mean:.4f}, from {min(found):.4f} to {max(found):.4f}")


if __name__ == "__main__":
    main()

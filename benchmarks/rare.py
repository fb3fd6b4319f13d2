"""What do data.sample=rare and data.augment.paste bring, each and both?

Trains on CamVid (176 x 240, 12 epochs) and Clothing Co-Parsing (a third of the size), with three
seeds each, and compares the runs as `seg-torch compare` does: the difference to the plain runs, its
95 % interval and its p-value by the paired bootstrap over the images, and each class that changes.

    python benchmarks/rare.py WEIGHTS --camvid DATA/camvid --clothing DATA/clothing-co-parsing

WEIGHTS are timm's of tf_efficientnet_lite0. `--output` keeps the runs; those that are there already
are not trained again. `--steps 2` tries it out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parents[1]
SIDES = {
    "plain": (),
    "sample": ("data.sample=rare",),
    "paste": ("data.augment.paste=0.5",),
    "both": ("data.sample=rare", "data.augment.paste=0.5"),
}
RECIPE = (
    "recipe=null",
    "data.cache=ram",
    "data.augment.scale=[0.75,1.5]",
    "data.batch_size=8",
    "model.encoder=tf_efficientnet_lite0",
    "optimizer.lr=2e-3",
    "recipe=null",
    "logger=none",
)
DATASETS = {
    "camvid": ("data.resize=[176,240]", "data.augment.crop=[176,240]", "trainer.max_epochs=12"),
    "clothing": ("data.resize=[276,184]", "data.augment.crop=[224,160]", "trainer.max_epochs=15"),
}


def train(folder: Path, settings: Sequence[str]) -> None:
    """Train and score one run, unless it is there."""
    if not (folder / "test_metrics.json").exists():
        call("train", *RECIPE, *settings, f"output_dir={folder}")


def call(command: str, *settings: str) -> None:
    subprocess.run([sys.executable, "-m", "seg_torch", command, *settings], check=True, cwd=HERE)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="of tf_efficientnet_lite0")
    for dataset in DATASETS:
        parser.add_argument(f"--{dataset}", help="its folder; without, it is left out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each run, to try it out")
    parser.add_argument("--output", default="runs/rare", help="folder of the runs")
    given = parser.parse_args(arguments)
    output, brief = Path(given.output).resolve(), []
    if given.steps:
        brief = ["trainer.max_epochs=1", f"trainer.limit_train_batches={given.steps}"]
        brief += ["trainer.limit_val_batches=1", "data.cache=none"]
    for dataset, settings in DATASETS.items():
        root = getattr(given, dataset)
        if root is None:
            continue
        where: tuple[str, ...] = (f"data={dataset}", f"data.root={Path(root).resolve()}")
        where += (f"model.weights={Path(given.weights).resolve()}",)
        folders = []
        for seed in range(given.seeds):  # the sides in turn, since the speed of a machine drifts
            for side, changed in SIDES.items():
                folders.append(output / dataset / f"{side}-{seed}")
                train(folders[-1], (*where, *settings, *changed, f"seed={seed}", *brief))
        folders.sort(key=lambda folder: list(SIDES).index(folder.name.split("-")[0]))
        runs = ",".join(map(str, folders))
        call("compare", f"runs=[{runs}]", f"output_dir={output / dataset / 'compared'}")


if __name__ == "__main__":
    main()

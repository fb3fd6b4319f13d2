"""What do confident predictions bring as labels?

60 annotated photos of Clothing Co-Parsing alone, with the predictions of others, and with the
labels of these.

    python benchmarks/self_training.py DATA/clothing-co-parsing WEIGHTS [--epochs 15] [--seeds 1]

WEIGHTS are timm's of tf_efficientnet_lite0. The photos are shrunk to a third, a fifth of them is
val, and of the rest all but 60 are taken for not annotated. All sides take as many steps and are
validated as often; the score is that of the best validation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from seg_torch.datasets import clothing
from seg_torch.datasets.folder import write_folder
from seg_torch.images.resize import resize_image, resize_mask

HERE = Path(__file__).parents[1]
ANNOTATED = 60
OVERRIDES = (
    "recipe=null",
    "data=folder",
    "data.batch_size=8",
    "data.cache=ram",
    "data.augment.crop=[256,192]",
    "data.augment.scale=[0.75,1.5]",
    "model.encoder=tf_efficientnet_lite0",
    "optimizer.lr=2e-3",
    "optimizer.encoder_lr=0.1",
)


def prepare(root: str, folder: Path) -> None:
    """Write `own` (60 photos and val), `others` (the rest) and their photos, `unlabelled`."""
    splits = [clothing(root, split) for split in ("train", "val")]
    train, val = ([_shrunk(*split[i]) for i in range(len(split))] for split in splits)
    labels = splits[0].labels
    write_folder([*train[:ANNOTATED], *val], labels, folder / "own")
    write_folder(train[ANNOTATED:], labels, folder / "others")
    names = [f"{i:04d}\n" for i in range(ANNOTATED + len(val))]
    (folder / "own/train.txt").write_text("".join(names[:ANNOTATED]))
    (folder / "own/val.txt").write_text("".join(names[ANNOTATED:]))
    (folder / "unlabelled").mkdir()
    for path in (folder / "others/images").iterdir():
        Image.open(path).save(folder / "unlabelled" / path.name)


def _shrunk(image: Any, mask: Any) -> tuple[Any, Any]:
    size = [side // 3 for side in mask.shape]
    return resize_image(image, size), resize_mask(mask, size)


def train(folder: Path, run: str, extra: str, weights: str, epochs: int, seed: int) -> dict:
    """Trains on `own` and an extra folder, if any, and returns the scores of the best epoch."""
    steps = 4 * (ANNOTATED // 8)  # between two validations
    length = [f"trainer.max_epochs={epochs}", f"trainer.limit_train_batches={steps}"]
    if not extra:
        length = [f"trainer.max_epochs={4 * epochs}", "trainer.check_val_every_n_epoch=4"]
    call("train", *OVERRIDES, *length, f"data.root={folder}/own", f"data.dataset.extra=[{extra}]",
         f"model.weights={weights}", f"seed={seed}", f"output_dir={folder}/{run}")  # fmt: skip
    return json.loads((folder / run / "test_metrics.json").read_text())


def call(command: str, *settings: str) -> None:
    subprocess.run([sys.executable, str(HERE / f"{command}.py"), *settings], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder of Clothing Co-Parsing")
    parser.add_argument("weights", help="of tf_efficientnet_lite0")
    parser.add_argument("--epochs", type=int, default=15, help="validations of each run")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--min-confidence", type=float, default=0.9)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(given.root, folder)
        for seed in range(given.seeds):
            first, predictions = f"alone-{seed}", folder / f"predictions-{seed}"
            sides = {
                "annotated photos alone": (first, ""),
                "with predictions of the others": (f"self-{seed}", f"{predictions}/dataset"),
                "with labels of the others": (f"all-{seed}", f"{folder}/others"),
            }
            for side, (run, extra) in sides.items():
                found = train(folder, run, extra, given.weights, given.epochs, seed)
                scores = ", ".join(f"{k} {found[k]:.4f}" for k in ("mean_iou", "pixel_accuracy"))
                print(f"seed {seed}, {side}: {scores}", flush=True)
                if run == first:
                    call("predict", f"input={folder}/unlabelled", f"output={predictions}",
                         f"checkpoint={folder}/{first}", "save=[dataset]",
                         f"min_confidence={given.min_confidence}")  # fmt: skip


if __name__ == "__main__":
    main()

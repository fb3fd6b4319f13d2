"""A peer in benchmarks/planning.py and camvid.py: yolo26n-sem from random weights, its defaults.

    python benchmarks/yolo.py ROOT MINUTES SEED OUTPUT

Runs with a Python that has `ultralytics` (8.4; AGPL-3.0) and need not have seg_torch. ROOT is laid
out for `data=folder`. Its images are not enlarged: `imgsz` is their longest side, and at most the
default of 640. Nothing is validated during training, so that the time is for training alone.
Masks of val, at the images' size, go to OUTPUT/masks/EPOCH, those of the last epoch alone where the
environment has no EVERY_EPOCH; seconds of training at the end of each epoch go to seconds.json.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image
from ultralytics import YOLO


def main() -> None:
    root, output = Path(sys.argv[1]).resolve(), Path(sys.argv[4]).resolve()
    minutes, seed = float(sys.argv[2]), int(sys.argv[3])
    output.mkdir(parents=True, exist_ok=True)
    files = {file.stem: file for file in (root / "images").iterdir()}
    splits = {name: (root / f"{name}.txt").read_text().split() for name in ("train", "val")}
    for split, names in splits.items():
        (output / f"{split}.txt").write_text("".join(f"{files[name]}\n" for name in names))
    classes = [
        line.rsplit(maxsplit=3)[0]
        for line in (root / "classes.txt").read_text().strip().splitlines()
    ]
    data = {"path": str(output), "train": "train.txt", "val": "val.txt", "masks_dir": "masks"}
    # JSON is YAML, too.
    (output / "data.yaml").write_text(json.dumps({**data, "names": dict(enumerate(classes))}))
    longest = max(max(Image.open(files[name]).size) for name in splits["val"])
    size = min(640, -(-longest // 32) * 32)
    seconds: list[float] = []

    def start_epoch(trainer: Any) -> None:
        trainer.clock = time.perf_counter()

    def end_epoch(trainer: Any) -> None:
        seconds.append((seconds or [0.0])[-1] + time.perf_counter() - trainer.clock)

    model = YOLO("yolo26n-sem.yaml")
    model.add_callback("on_train_epoch_start", start_epoch)
    model.add_callback("on_train_epoch_end", end_epoch)
    model.train(
        data=str(output / "data.yaml"),
        time=minutes / 60,
        imgsz=size,
        pretrained=False,
        device="cpu",
        seed=seed,
        val=False,
        save_period=1,
        plots=False,
        project=str(output),
        name="run",
        exist_ok=True,
    )
    (output / "seconds.json").write_text(json.dumps(seconds))
    epochs = range(len(seconds)) if "EVERY_EPOCH" in os.environ else [len(seconds) - 1]
    for epoch in epochs:
        trained = YOLO(output / f"run/weights/epoch{epoch}.pt")
        folder = output / "masks" / str(epoch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in splits["val"]:
            (found,) = trained.predict(files[name], imgsz=size, device="cpu", verbose=False)
            mask = found.semantic_mask.data.cpu().numpy().squeeze().astype("uint8")
            Image.fromarray(mask).save(folder / f"{name}.png")


if __name__ == "__main__":
    main()

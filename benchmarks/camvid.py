"""`python train.py` on CamVid against benchmarks/plain_loop.py, in one run.

    python benchmarks/camvid.py DATA/camvid

Prints the time of both as whole processes, and the scores of both at the training size; those of
train.py also at the labels' original size.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from seg_torch import Segmenter
from seg_torch.datasets import camvid
from seg_torch.metrics import ConfusionMatrix, scores
from seg_torch.transforms import resize_image, resize_mask

HERE = Path(__file__).parent
SIZE = (176, 240)
OVERRIDES = (
    "data=camvid",
    "data.resize=[176,240]",
    "data.cache=ram",
    "data.augment.crop=null",
    "data.augment.jitter=null",
    "model.encoder=resnet18",
    "model.weights=null",
    "loss=ce_dice",
    "optimizer.lr=2e-3",
    "trainer.max_epochs=12",
)


def timed(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return time.perf_counter() - start, output


def score(checkpoint: Path, root: str, at_training_size: bool) -> dict[str, torch.Tensor]:
    segmenter = Segmenter.load(checkpoint, device="cpu", precision="bf16-mixed")
    confusion = ConfusionMatrix(len(segmenter.labels))
    dataset = camvid(root, "val")
    for image, mask in (dataset[i] for i in range(len(dataset))):
        if at_training_size:
            image, mask = resize_image(image, SIZE), resize_mask(mask, SIZE)
        confusion.update(torch.from_numpy(segmenter.predict(image).mask), mask)
    return scores(confusion.compute())


def main(root: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain_seconds, plain = timed([sys.executable, str(HERE / "plain_loop.py"), root])
        print(f"plain loop: {plain_seconds:.0f} s; {plain.splitlines()[-2]}", flush=True)
        train = str(HERE.parent / "train.py")
        ours_seconds, _ = timed(
            [sys.executable, train, *OVERRIDES, f"data.root={root}", f"output_dir={folder}/run"]
        )
        print(f"train.py:   {ours_seconds:.0f} s, {ours_seconds / plain_seconds:.2f} of that")
        for name in ("last", "best"):
            for at_training_size in (True, False):
                result = score(Path(folder, f"run/checkpoints/{name}.ckpt"), root, at_training_size)
                print(
                    f"{name} epoch, {'176 x 240' if at_training_size else '360 x 480'}: mean_iou "
                    f"{result['mean_iou']:.4f} pixel_accuracy {result['pixel_accuracy']:.4f}"
                )


if __name__ == "__main__":
    main(sys.argv[1])

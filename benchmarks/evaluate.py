"""What evaluation costs.

    python benchmarks/evaluate.py CAMVID    # two minutes on two cores
    python benchmarks/evaluate.py           # ten minutes

On CamVid, U-Net ResNet-18 with random weights: the share of a validation's time, as training does
it, that is not spent in the network.

Else DeepLabv3-ResNet50 with 19 classes and random weights on 20 generated images of 1024 x 2048:

* the peak memory of evaluate.py above that of the process with the loaded model
* whether its confusion matrix is that of the masks that predict.py writes, pixel for pixel
"""

import json
import logging
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import hydra
import numpy as np
import torch
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer
from PIL import Image

from seg_torch import Labels, hardware
from seg_torch.checkpoints import checkpoint
from seg_torch.commands.evaluate import evaluate
from seg_torch.commands.predict import predict
from seg_torch.datasets import write_folder
from seg_torch.distributed import Processes
from seg_torch.files import CONFIG_FOLDER
from seg_torch.losses import CrossEntropyLoss
from seg_torch.models import deeplabv3, unet
from seg_torch.models.network import Network
from seg_torch.prediction.inference import Inference, InferenceSettings
from seg_torch.training.task import SegmentationTask
from seg_torch.training.trainer import build_trainer

ROUNDS = 5
CLASSES = 19
IMAGES = 20
MODEL = {"_target_": "seg_torch.models.deeplabv3", "backbone": "resnet50", "weights": None}
GIGABYTE = 1 << 30


def memory(key: str) -> float:
    """`VmRSS` (now) or `VmHWM` (so far at most) of this process, in GB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024 / GIGABYTE


def run(command: str, *overrides: str) -> float:
    """Run a command in this process, which is a new one; its peak memory above the model's."""
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        cfg = hydra.compose(command, list(overrides))
    checkpoint.build_network(checkpoint.read(cfg.checkpoint))
    loaded = memory("VmRSS")
    {"evaluate": evaluate, "predict": predict}[command](cfg)
    return memory("VmHWM") - loaded


def write_images(root: Path) -> None:
    """Smooth noise with masks of smooth regions."""
    torch.manual_seed(0)
    labels = Labels(tuple(f"class {i}" for i in range(CLASSES)))

    def sample() -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(1, 3, 64, 128), torch.rand(1, CLASSES, 8, 16)
        image, scores = (
            torch.nn.functional.interpolate(n, (1024, 2048), mode="bilinear") for n in noise
        )
        return (image[0] * 255).to(torch.uint8), scores[0].argmax(0).to(torch.uint8)

    write_folder((sample() for _ in range(IMAGES)), labels, root)
    names = "".join(f"{number:04d}\n" for number in range(IMAGES))
    for split in ("train", "val", "test"):
        (root / f"{split}.txt").write_text(names)
    network = Network(deeplabv3(CLASSES, "resnet50", None))
    data = {
        "_target_": "seg_torch.data.SegmentationDataModule",
        "dataset": {"_target_": "seg_torch.datasets.folder", "_partial_": True},
        "root": str(root),
    }
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    description = checkpoint.describe(network, labels, MODEL, data, None)
    torch.save({checkpoint.KEY: description, "state_dict": state}, root / "model.ckpt")


def matrix_of_masks(root: Path, predicted: Path) -> np.ndarray:
    matrix = np.zeros((CLASSES, CLASSES), np.int64)
    for path in sorted((root / "masks").iterdir()):
        label, prediction = np.array(Image.open(path)), np.array(Image.open(predicted / path.name))
        np.add.at(matrix, (label.ravel(), prediction.ravel()), 1)
    return matrix


class Clock(Callback):
    """Takes the time of validations, without starting workers, which training does once."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def validation(root: Path) -> None:
    """Return the share of a validation's time that the network alone does not need."""
    hardware.reuse_memory()  # as train.py does
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        settings = ["data=camvid", f"data.root={root}", "trainer.accelerator=cpu"]
        cfg = hydra.compose("train", settings)
    data, clock, processes = instantiate(cfg.data), Clock(), Processes(cfg.trainer)
    trainer = build_trainer(cfg, processes, Path(tempfile.gettempdir()), [clock])
    network = Network(unet(len(data.labels), "resnet18", None)).eval()
    inference = Inference(
        network, len(data.labels), settings=InferenceSettings(precision=str(trainer.precision))
    )
    task = SegmentationTask(network, data.labels, CrossEntropyLoss(), torch.optim.SGD)
    bare = []
    data.trainer = trainer
    loader = data.val_dataloader()  # one for all, as in training
    images = [image for groups in loader for images, _, _ in groups for image in images.split(1)]
    for _ in range(ROUNDS + 1):  # in turn, since the speed of a machine drifts
        trainer.validate(task, loader, verbose=False)
        start = time.perf_counter()
        with torch.no_grad(), inference.autocast():
            for image in images:
                network(image)
        bare.append(time.perf_counter() - start)
    shares = [1 - b / whole for b, whole in zip(bare, clock.seconds, strict=True)][1:]
    print(
        f"validation of {len(data.dataset('val'))} images: {np.median(clock.seconds):.2f} s, the "
        f"network alone {np.median(bare):.2f} s: {100 * np.median(shares):.1f} % outside the "
        f"network (at most 5), {100 * min(shares):.1f} to {100 * max(shares):.1f} in {ROUNDS} runs"
    )


if __name__ == "__main__":
    logging.getLogger("lightning").setLevel(logging.WARNING)
    if len(sys.argv) == 2 and "=" not in sys.argv[1]:
        validation(Path(sys.argv[1]))
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root)
        common = (f"checkpoint={root / 'model.ckpt'}", "trainer.precision=32-true", *sys.argv[1:])
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as pool:
            output = f"output_dir={root / 'scores'}"
            peak = pool.submit(run, "evaluate", *common, output).result()
        with ProcessPoolExecutor(1, context) as pool:
            options = (f"input={root / 'images'}", f"output={root / 'out'}", "save=[mask]")
            pool.submit(run, "predict", *common, *options).result()
        found = json.loads((root / "scores/test_metrics.json").read_text())["confusion_matrix"]
        same = np.array_equal(found, matrix_of_masks(root, root / "out/mask"))
        print(f"evaluate.py: {peak:.2f} GB above the loaded model (at most 2)")
        print(f"confusion matrix of the masks of predict.py: {'the same' if same else 'DIFFERENT'}")

"""The published systems: each trains, and each has what distinguishes it."""

import colorsys
import csv
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import make_data
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision import tv_tensors

from seg_torch import checkpoint, datasets
from seg_torch.cli import CONFIG_FOLDER
from seg_torch.datamodule import EpochSampler
from seg_torch.datasets.camvid32 import CAMVID32_LABELS
from seg_torch.datasets.eightfold import VARIANTS, EightFold
from seg_torch.labels import Labels
from seg_torch.task import SegmentationTask
from seg_torch.training import evaluate, train

# Of each experiment: its data, and what makes it small.
EXPERIMENTS = {
    "camvid32_hrnet_w48": (
        "camvid32",
        ["model.encoder=hrnet_w18_small", "data.augment.crop=[64,96]"],
    ),
    "clothing_unet_densenet121": ("clothing", ["data.resize=[32,32]", "data.dataset.side=32"]),
    "pet_unet_mobilenetv2": ("pet", ["model.encoder=mobilenetv2_050", "data.resize=[32,32]"]),
    "voc_deeplabv3_resnet50": (
        "voc",
        ["model.backbone=mobilenet_v3_large", "data.resize=[48,48]", "data.augment.crop=[40,40]"],
    ),
    "voc_fcn_resnet101": ("voc", ["model.backbone=resnet50", "data.augment.crop=[32,32]"]),
    "voc_deeplabv3_resnet101": (
        "voc",
        ["model.backbone=mobilenet_v3_large", "data.augment.crop=[32,32]"],
    ),
}
BRIEF = (
    "data.num_workers=0",
    "data.batch_size=2",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
)


@pytest.fixture
def run(compose, tmp_path):
    """run("voc", ...): trains briefly on the tiny copy of a dataset; returns the folder."""
    folder = tmp_path / "run"

    def run(dataset: str, *overrides: str) -> Path:
        if dataset != "shapes":
            getattr(make_data, f"make_{dataset}")(tmp_path / "data")
            overrides = (f"data.root={tmp_path / 'data'}", *overrides)
        train(compose("train", f"output_dir={folder}", *BRIEF, *overrides))
        return folder

    yield run
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # up to half a gigabyte


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_every_experiment_is_tested():
    assert set(EXPERIMENTS) == {path.stem for path in (CONFIG_FOLDER / "experiment").iterdir()}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_trains_and_is_scored(run, name):
    dataset, small = EXPERIMENTS[name]
    folder = run(dataset, f"experiment={name}", "model.weights=null", *small)
    assert math.isfinite(float(rows(folder)[0]["train_loss"]))
    labels = getattr(datasets, dataset)(folder.parent / "data", "val").labels
    report = json.loads((folder / "test_metrics.json").read_text())
    assert tuple(report["per_class"]) == labels.names
    description = checkpoint.read(folder / "checkpoints" / "best.ckpt")[checkpoint.KEY]
    network, _ = checkpoint.build_network({**description_of(description), **weights_of(folder)})
    assert network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))["out"].shape[1] == len(labels)


DATA = sorted(
    path.stem
    for path in (CONFIG_FOLDER / "data").iterdir()
    if path.stem not in ("default", "from_checkpoint")
)


@pytest.mark.parametrize("name", DATA)
def test_every_data_config_fits_a_step(run, name):
    folder = run(name, f"data={name}", "model=unet_random", "data.augment.crop=[32,32]")
    assert rows(folder)[0]["step"] == ("2" if name != "camvid32" else "2")

"""What train.py and evaluate.py do, from a composed configuration to scores on disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from seg_torch import checkpoint, hardware
from seg_torch.callbacks import History, SampleSheet, SaveOnInterrupt, StopOnNan
from seg_torch.datamodule import SegmentationDataModule
from seg_torch.errors import InputError
from seg_torch.files import write_atomically
from seg_torch.labels import Labels
from seg_torch.models.network import Network
from seg_torch.task import SegmentationTask
from seg_torch.visualize import save_confusion_matrix

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> None:
    """Trains, keeps the best, and scores it on the test set."""
    folder = Path(cfg.output_dir)
    resume, start_from = _starting_point(cfg)
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    data = instantiate(cfg.data, _convert_="all")
    labels = data.labels
    model = instantiate(cfg.model, num_classes=len(labels), _convert_="all")
    network = Network(model, cfg.preprocessing.mean, cfg.preprocessing.std)
    if start_from is not None and not resume:
        checkpoint.load_matching(network, checkpoint.network_state(start_from))

    task = SegmentationTask(
        network,
        labels,
        loss=instantiate(cfg.loss, _convert_="all"),
        optimizer=instantiate(cfg.optimizer),
        scheduler=instantiate(cfg.scheduler) or None,
        aux_weight=cfg.aux_weight,
        description=checkpoint.describe(
            network, labels, _plain(cfg.model), _plain(cfg.data), data.resize
        ),
        pixel_counts_cache=folder / "pixel_counts.json",
        seed=cfg.seed,
    )
    best = ModelCheckpoint(
        folder / "checkpoints",
        filename="best",
        monitor="val/mean_iou",
        mode="max",
        enable_version_counter=False,
    )
    last = ModelCheckpoint(
        folder / "checkpoints",
        filename="last",
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    logger = [instantiate(node) for node in (cfg.logger or {}).values()]
    trainer = build_trainer(
        cfg.trainer,
        [best, History(folder), SampleSheet(folder), StopOnNan(), last, SaveOnInterrupt(folder)]
        + [instantiate(node) for node in cfg.callbacks.values()]
        + ([LearningRateMonitor("step")] if logger else []),
        logger,
    )
    if trainer.is_global_zero:
        _claim(folder, resume)
        write_atomically(folder / "config.yaml", lambda path: OmegaConf.save(cfg, path, True))
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6
        log.info(
            "%d training images, %d classes, %.1f M trainable weights, %s, effective batch %d",
            len(data.dataset("train")),
            len(labels),
            trained,
            trainer.precision,
            data.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
        )
        log.info("output_dir=%s", folder)

    trainer.fit(
        task, datamodule=data, ckpt_path=cfg.checkpoint if resume else None, weights_only=True
    )
    if best.best_model_path:
        content = checkpoint.read(trainer.strategy.broadcast(best.best_model_path))
        network.load_state_dict(checkpoint.network_state(content))
    _score(trainer, task, data, folder, "test")


def evaluate(cfg: DictConfig) -> None:
    """Scores a checkpoint on the data that it was trained with, or on other data."""
    if cfg.checkpoint is None:
        raise InputError(
            "evaluate.py needs checkpoint=FILE, such as runs/.../checkpoints/best.ckpt"
        )
    if cfg.split not in ("train", "val", "test"):
        raise InputError(f"split={cfg.split}: expected train, val or test")
    content = checkpoint.read(cfg.checkpoint)
    network, labels = checkpoint.build_network(content, cfg.trust)
    description = content[checkpoint.KEY]
    settings = {key: value for key, value in _plain(cfg.data).items() if value is not None}
    if "_target_" not in settings:  # no data=…: the checkpoint's own, with what was set on top
        settings = {**description["data"], **settings}
    settings["resize"] = description["preprocessing"]["resize"]
    data = checkpoint.instantiate(settings, cfg.trust, _convert_="all")
    data.test_split = cfg.split
    found = data.dataset(cfg.split).labels
    if found != labels:
        raise InputError(
            f"{cfg.checkpoint} knows the {len(labels)} classes {_shortened(labels)}, the data "
            f"has the {len(found)} classes {_shortened(found)}"
        )
    trainer = build_trainer(cfg.trainer, [])
    task = SegmentationTask(network, labels, average_precision=cfg.average_precision)
    _score(trainer, task, data, Path(cfg.output_dir), cfg.split)


def build_trainer(
    settings: DictConfig, callbacks: list[Callback], logger: list[Logger] | bool = False
) -> Trainer:
    """Lightning's Trainer with the settings that suit the hardware.

    `precision: auto` becomes the best there is, and more than one GPU turns on synchronised
    BatchNorm, without which each GPU normalises its few images by their own statistics.
    """
    options = _plain(settings)
    accelerator = options["accelerator"]
    if accelerator == "auto":
        accelerator = hardware.best_device().type
    if options["precision"] == "auto":
        kind = "cuda" if accelerator == "gpu" else accelerator
        options["precision"] = hardware.best_precision(kind)
    # TensorFloat-32 for what stays in float32: as precise as bfloat16 and several times faster.
    torch.set_float32_matmul_precision("high")
    if accelerator == "cpu":
        hardware.reuse_memory()
    console = Console()
    progress: list[Callback] = [RichProgressBar()] if console.is_terminal else []
    options["enable_progress_bar"] = bool(progress)
    options["accelerator"] = accelerator

    try:
        trainer = Trainer(
            **options,
            callbacks=callbacks + progress,
            logger=logger,
            use_distributed_sampler=False,  # the data module shards without padding
            enable_model_summary=False,
            sync_batchnorm=accelerator in ("cuda", "gpu"),
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise InputError(f"trainer: {error}") from error
    if trainer.world_size > 1 and trainer.is_global_zero:
        on_gpus = trainer.strategy.root_device.type == "cuda"
        log.info("%d processes%s", trainer.world_size, ", synchronised BatchNorm" * on_gpus)
    return trainer


def _score(
    trainer: Trainer, task: SegmentationTask, data: SegmentationDataModule, folder: Path, split: str
) -> None:
    """Scores a task, prints the table and writes `<split>_metrics.json`."""
    trainer.test(task, datamodule=data, verbose=False)
    report = task.test_report
    assert report is not None
    if trainer.is_global_zero:
        path = folder / f"{split}_metrics.json"
        text = json.dumps(report, indent=1)
        write_atomically(path, lambda name: Path(name).write_text(text))
        matrix = np.array(report["confusion_matrix"])
        save_confusion_matrix(matrix, task.labels, folder / f"{split}_confusion_matrix.png")
        print_scores(report, f"{split}: {len(data.dataset(split))} images")
        log.info("scores: %s", path)


def print_scores(report: dict[str, Any], title: str) -> None:
    """A table of the scores, a row a class."""
    columns = ["iou", "dice", "accuracy", "precision"]
    if "mean_average_precision" in report:
        columns.append("average_precision")
    means = [f"mean_{column}" for column in columns]
    table = Table(title=title)
    table.add_column("class")
    for name in (*columns, "pixels"):
        table.add_column(name, justify="right")

    def cells(values: list[float | None]) -> list[str]:
        return ["absent" if value is None else f"{value:.4f}" for value in values]

    for name, row in report["per_class"].items():
        table.add_row(name, *cells([row[c] for c in columns]), f"{row['pixels']:,}")
    table.add_section()
    pixels = sum(row["pixels"] for row in report["per_class"].values())
    table.add_row("mean", *cells([report[m] for m in means]), f"{pixels:,}", style="bold")
    console = Console()
    console.print(table)
    console.print(f"pixel accuracy {cells([report['pixel_accuracy']])[0]}")


def _starting_point(cfg: DictConfig) -> tuple[bool, dict[str, Any] | None]:
    """Whether the run resumes, and the checkpoint that it starts from, if any.

    It resumes (weights, optimiser, schedule, epoch) where model and dataset are those of the
    checkpoint; else it takes over the weights that fit and begins anew.
    """
    if cfg.checkpoint is None:
        return False, None
    content = checkpoint.read(cfg.checkpoint)
    stored = content[checkpoint.KEY]
    differing = [
        name
        for name, now, then in (
            ("model", _plain(cfg.model), stored["model"]),
            ("data.dataset", _plain(cfg.data)["dataset"], stored["data"]["dataset"]),
        )
        if now != then
    ]
    if differing:
        log.info("fine-tuning from %s (%s differs)", cfg.checkpoint, " and ".join(differing))
        return False, content
    log.info("resuming %s after epoch %d", cfg.checkpoint, content["epoch"] + 1)
    return True, content


def _claim(folder: Path, resume: bool) -> None:
    """Refuses a folder that holds another run's checkpoints."""
    last = folder / "checkpoints" / "last.ckpt"
    if last.exists() and not resume:
        raise InputError(
            f"output_dir={folder} holds a run already: choose another folder, or resume it with "
            f"checkpoint={last}"
        )


def _plain(node: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]


def _shortened(labels: Labels) -> str:
    names = ", ".join(labels.names[:5])
    return f"({names}, …)" if len(labels) > 5 else f"({names})"

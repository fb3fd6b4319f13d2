"""Lightning's Trainer for this hardware, and scores on disk."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch.torch_version import TorchVersion

from seg_torch import hardware
from seg_torch.data.module import SegmentationDataModule
from seg_torch.datasets.base import sample_name
from seg_torch.drawing.visualize import save_confusion_matrix
from seg_torch.errors import InputError, check_choice
from seg_torch.files import write_atomically
from seg_torch.models.network import COMPILE_MODES
from seg_torch.training.task import SegmentationTask

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Leaves the old checkpoint or the complete new one, whatever happens while it is written."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        write_atomically(path, partial(save, checkpoint))


def save(content: dict[str, Any], path: str) -> None:
    """Save with `torch.save`, but tells a full disk as such.

    Raises:
        OSError: The file cannot be written. PyTorch raises errors about its own positions instead,
            some of them while it handles the OSError of a Python file.
    """
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class ProgressBar(RichProgressBar):
    """Shows a new loss when the bar moves. Lightning's has to wait for a GPU in each step."""

    def __init__(self, refresh_rate: int) -> None:
        super().__init__(refresh_rate)
        self.shown: dict[str, Any] = {}

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        done = trainer.fit_loop.epoch_loop.batch_idx + 1
        if not trainer.training or done % self.refresh_rate == 0:
            self.shown = super().get_metrics(trainer, pl_module)
        return self.shown


class FullySharded(ModelParallelStrategy):
    """`trainer.strategy=fsdp`: PyTorch's FSDP2, whose checkpoints are those of any other run.

    Each process keeps a share of the weights and of the optimizer's state, which
    `SegmentationTask.configure_model` deals out, and holds the whole network during a step.
    (Lightning's strategy of that name is the first FSDP: it cannot clip gradients by their norm,
    runs on no CPU, keeps BatchNorm's statistics in half precision, and waits forever where the
    processes validate different numbers of images.)
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.world_size, 1
        if self.lightning_module is None:  # connected early, see build_trainer
            self._setup_distributed()
        else:
            super().setup_environment()

    # Scored with whole weights: the processes have different numbers of images, and of tiles, so
    # they cannot fetch each other's shares while they do.

    def on_validation_start(self) -> None:
        self._network.unshard()

    def on_validation_end(self) -> None:
        self._network.reshard()

    on_test_start, on_test_end = on_validation_start, on_validation_end

    @property
    def _network(self) -> Any:
        return self.lightning_module.network  # type: ignore[union-attr]


def build_trainer(settings: DictConfig) -> Trainer:
    """Build Lightning's Trainer with the settings that suit the hardware.

    The processes that torchrun or Slurm started are connected, so that they can agree on a folder.

    Raises:
        InputError: A setting that Lightning does not take, a device that is not there, or another
            number of processes than torchrun or Slurm started.
    """
    options: dict[str, Any] = OmegaConf.to_container(settings, resolve=True)  # type: ignore[assignment]
    options.pop("max_steps", None)  # left to the task: Lightning's own skips an epoch on resuming
    # The task sets the one, for training alone, and the train command does the other.
    by_time = {"benchmark": options.pop("benchmark", None), "compile": options.pop("compile", None)}
    check_choice("trainer.benchmark", by_time["benchmark"], (None, False, True))
    check_choice("trainer.compile", by_time["compile"], (None, *COMPILE_MODES))
    for name, value in by_time.items():
        if value and options.get("deterministic") is True:
            raise InputError(
                f"trainer.deterministic=true repeats a run bit for bit, trainer.{name}={value} may "
                "choose other operations each time: use one of the two"
            )
    options["accelerator"] = hardware.accelerator(options["accelerator"])
    options["precision"] = hardware.resolve_precision(options["precision"], options["accelerator"])
    if options.get("strategy") == "fsdp":
        if options["accelerator"] == "cpu" and TorchVersion(torch.__version__) < "2.14":
            raise InputError(
                "trainer.strategy=fsdp on a CPU needs PyTorch 2.14: 2.8 trains wrongly"
            )
        options["strategy"] = FullySharded()
    options = as_launched(options)
    # TensorFloat-32 for what stays in float32: as precise as bfloat16 and several times faster.
    torch.set_float32_matmul_precision("high")
    if options["accelerator"] == "cpu":
        hardware.reuse_memory()
    bar = Console().is_terminal
    try:
        trainer = Trainer(
            **options,
            callbacks=[ProgressBar(refresh_rate=10)] if bar else [],
            enable_progress_bar=bar,
            logger=False,
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,  # the data module shards without padding
            enable_model_summary=False,
            enable_checkpointing=False,  # the train command adds its own
            inference_mode=False,  # under which autocast would cast the weights for every batch
        )
        check_launcher(trainer.num_devices, trainer.num_nodes)
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise InputError(f"trainer: {error}") from error
    if not trainer.is_global_zero:
        logging.getLogger("seg_torch").setLevel(logging.WARNING)  # the first process says it
    if connected_from_outside(trainer):
        trainer.strategy.setup_environment()
    return trainer


def as_launched(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the numbers of devices and machines that torchrun knows."""
    if not TorchElasticEnvironment.detect():
        return settings
    devices = settings["devices"]
    if devices == "auto":
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
    return {**settings, "devices": devices, "num_nodes": int(os.environ["GROUP_WORLD_SIZE"])}


def check_launcher(devices: int, num_nodes: int) -> None:
    """Refuses settings that do not fit the processes that torchrun or Slurm has started.

    Lightning checks them late, and for one device not at all: each process would do all the work.

    Args:
        devices: Processes on each machine, as the settings have it.
        num_nodes: Machines.

    Raises:
        ValueError: They make another number of processes, or no launcher has started them.
    """
    launchers: dict[str, Any] = {"torchrun": TorchElasticEnvironment, "Slurm": SLURMEnvironment}
    for name, environment in launchers.items():
        if environment.detect():
            started = environment().world_size()
            if started != devices * num_nodes:
                raise InputError(
                    f"{name} has started {started} processes, but the settings ask for {devices} "
                    f"on each of {num_nodes} machines; set trainer.devices to the processes on a "
                    "machine and trainer.num_nodes to the number of machines"
                )
            environment().validate_settings(devices, num_nodes)
            return
    if num_nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"several machines (trainer.num_nodes={num_nodes}) need torchrun or Slurm, which start "
            "the processes on each; see docs/scaling.md"
        )


def connected_from_outside(trainer: Trainer) -> bool:
    """Whether torchrun, Slurm or the like has started the processes, not Lightning."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return trainer.world_size > 1 and not isinstance(environment, LightningEnvironment)


def run_folder(trainer: Trainer, cfg: DictConfig) -> Path:
    """Return the first process's `output_dir`: a time in its name differs between processes."""
    output_dir = str(cfg.output_dir)
    if connected_from_outside(trainer):
        output_dir = trainer.strategy.broadcast(output_dir)
    # In a job of Slurm, Lightning goes on with an `hpc_ckpt` that it finds there.
    trainer._default_root_dir = output_dir  # type: ignore[attr-defined]
    cfg.output_dir = output_dir  # also for the loggers
    return Path(output_dir)


def on_first_process(trainer: Trainer, function: Callable[[], object]) -> None:
    """Call a function in the first process while the others wait.

    Those that Lightning starts do not exist yet, or find it done.

    Raises:
        InputError: In every process, where `function` raises it. After any other error, which the
            first process raises as it is, in the others.
    """
    _on_some_processes(trainer, function, [0])


def on_other_machines(trainer: Trainer, function: Callable[[], object]) -> None:
    """Call a function in one process of every machine but the first, while the others wait.

    For what has to be on each machine's own disk, after the first process has seen to it: on a disk
    that the machines share there is nothing left to do.

    Raises:
        InputError: As `on_first_process` does.
    """
    ranks = range(trainer.num_devices, trainer.world_size, trainer.num_devices)
    _on_some_processes(trainer, function, ranks)


def _on_some_processes(
    trainer: Trainer, function: Callable[[], object], ranks: Sequence[int]
) -> None:
    failure = None
    if trainer.global_rank in ranks:
        try:
            function()
        except Exception as error:
            failure = error
    message = None if failure is None else str(failure) or type(failure).__name__
    if connected_from_outside(trainer):
        messages = [trainer.strategy.broadcast(message, rank) for rank in ranks]
        message = next((text for text in messages if text is not None), None)
    if failure is not None:
        raise failure
    if message is not None:
        raise InputError(message)


def score(
    trainer: Trainer, task: SegmentationTask, data: SegmentationDataModule, folder: Path, split: str
) -> None:
    """Scores a task, prints the table and writes `<split>_metrics.json` and `<split>_images`."""
    if task.inference.precision == "32-true":  # not TensorFloat-32, which is 10 bits
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    trainer.test(task, datamodule=data, verbose=False)
    report = task.test_report
    assert report is not None
    if trainer.is_global_zero:
        path = folder / f"{split}_metrics.json"
        text = json.dumps(report, indent=1)
        write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))
        matrix = np.array(report["confusion_matrix"])
        save_image_scores(task.test_images, data.dataset(split), folder / f"{split}_images")
        save_confusion_matrix(matrix, task.labels, folder / f"{split}_confusion_matrix.png")
        print_scores(report, f"{split}: {len(data.dataset(split))} images")
        log.info("scores (%s): %s", report["precision"], path)


def save_image_scores(images: dict[str, np.ndarray], dataset: Any, path: Path) -> None:
    """Write what each image was scored: as counts to `path.npz`, as scores to `path.csv`.

    Args:
        images: Of all images of the dataset, see `seg_torch.metrics.ImageScores`. The `.npz` holds
            these arrays, and `names`.
        dataset: Gives the names of images and classes.
        path: Without the suffix.
    """
    names = [sample_name(dataset, index, "name") for index in range(len(dataset))]
    arrays: dict[str, Any] = {"names": np.array(names), **images}
    write_atomically(path.with_suffix(".npz"), lambda name: np.savez_compressed(name, **arrays))
    correct, labelled = images["intersection"], images["label_pixels"]
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan: what has no score
        iou = correct / (labelled + images["predicted_pixels"] - correct)
        accuracy = correct.sum(1) / labelled.sum(1)

    def write(name: str) -> None:
        with open(name, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            classes = [f"iou {label}" for label in dataset.labels.names]
            writer.writerow(["name", "pixel_accuracy", "confidence", *classes])
            scores = np.column_stack([accuracy, images["confidence"], iou])
            for image, row in zip(names, scores, strict=True):
                writer.writerow([image, *("" if np.isnan(v) else f"{v:.6f}" for v in row)])

    write_atomically(path.with_suffix(".csv"), write)


def print_scores(report: dict[str, Any], title: str) -> None:
    """Print the scores as a table with a row per class, and one of boundaries if there are any."""

    def cells(values: list[float | None]) -> list[str]:
        return ["absent" if value is None else f"{value:.4f}" for value in values]

    console = Console()
    pixels = sum(row["pixels"] for row in report["per_class"].values())
    # Two tables: together they would be too wide for a terminal.
    for names in (
        ("iou", "dice", "accuracy", "precision", "average_precision"),
        ("boundary_iou", "boundary_f"),
    ):
        columns = [name for name in names if f"mean_{name}" in report]
        if not columns:
            continue
        table = Table(title=title)
        table.add_column("class")
        for name in (*columns, "pixels"):
            table.add_column(name, justify="right")
        for name, row in report["per_class"].items():
            table.add_row(name, *cells([row[c] for c in columns]), f"{row['pixels']:,}")
        table.add_section()
        means = [report[f"mean_{column}"] for column in columns]
        table.add_row("mean", *cells(means), f"{pixels:,}", style="bold")
        console.print(table)
    accuracy, error = cells([report["pixel_accuracy"], report["expected_calibration_error"]])
    console.print(f"pixel accuracy {accuracy}, expected calibration error {error}")

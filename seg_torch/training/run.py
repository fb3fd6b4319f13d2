"""A run's folder: who may write to it, and how its configuration comes back on resuming."""

import csv
import errno
import logging
import math
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seg_torch.checkpoints.moved import with_current_names
from seg_torch.configuration import escaped, plain
from seg_torch.errors import InputError, reason
from seg_torch.files import PARTIAL, write_atomically, write_text

log = logging.getLogger(__name__)

# Of metrics.csv and times.csv.
SCORES = ("loss", "mean_iou", "pixel_accuracy", "mean_accuracy", "mean_dice")
COLUMNS = {"epoch": int, "step": int, "learning_rate": float, "train_loss": float}
COLUMNS |= {f"val_{name}": float for name in SCORES}
TIMES = {"epoch": int, "seconds": float, "memory_gb": float}
# What a resumed run may set anew: where it runs, where the data lie and how they come from there,
# how long it goes on, and what is told of it.
RESUMABLE = (
    "resume",
    "data.root",
    "data.download",
    "data.check",
    "data.cache",
    "data.num_workers",
    "data.eval_batch_size",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.num_sanity_val_steps",
    "trainer.log_every_n_steps",
    "trainer.detect_anomaly",
    "trainer.profiler",
)


def last_checkpoint(folder: str | Path) -> Path:
    """Return the checkpoint from which a run is resumed.

    Raises:
        InputError: The folder holds no run, or one that was stopped before its first checkpoint.
    """
    folder = Path(folder)
    if folder.is_file():
        raise InputError(
            f"resume={folder}: expected a run's folder, such as runs/2026-11-24_20-15-00; to start "
            f"a new run with the weights of a checkpoint, use init_from={folder}"
        )
    if not (folder / "config.yaml").is_file():
        raise InputError(f"resume={folder}: no run there (it would hold config.yaml)")
    last = folder / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise InputError(
            f"resume={folder}: the run was stopped before its first checkpoint; delete the folder "
            "and start it again"
        )
    return last


def how_to_continue(folder: Path) -> str:
    """Return what to do after a run has ended early."""
    if (folder / "checkpoints" / "last.ckpt").exists():
        return f"go on with resume={folder}"
    return "start it again: nothing is saved yet"


def check_resumable(folder: str, overrides: Sequence[str]) -> None:
    """Refuses settings that would change the result of a resumed run.

    Args:
        folder: The run's folder.
        overrides: The settings of the command line, each as `key=value`.

    Raises:
        InputError: A setting that may not be set anew.
    """
    keys = [key_of(override) for override in overrides]
    refused = [key for key in keys if key not in RESUMABLE and not key.startswith("hydra.")]
    if refused:
        raise InputError(
            f"resume={folder} goes on with that run's own settings; {', '.join(refused)} would "
            f"change its result (allowed are {', '.join(RESUMABLE[1:])}). For a new run that "
            f"starts from its weights, use init_from={folder}"
        )


def resumed_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of the run that `cfg.resume` names.

    Args:
        cfg: The configuration that the command line asks for.
        overrides: Its settings, each as `key=value`.

    Returns:
        The run's own configuration, with `resume` and the settings that may change.

    Raises:
        InputError: There is no such run, or a setting that could change its result.
    """
    last_checkpoint(cfg.resume)
    check_resumable(cfg.resume, overrides)
    run = OmegaConf.create(with_current_names(_stored_config(Path(cfg.resume))))
    for key in (key for key in map(key_of, overrides) if key in RESUMABLE[1:]):
        section, _, name = key.rpartition(".")
        if name not in (OmegaConf.select(run, section) or {}):
            raise InputError(f"resume={cfg.resume}: that run has no setting {key}")
        OmegaConf.update(run, key, escaped(OmegaConf.select(cfg, key)))
    folder = escaped(cfg.resume)
    return OmegaConf.merge(run, {"resume": folder, "output_dir": folder})  # type: ignore[return-value]


def _stored_config(folder: Path) -> Any:
    """Return the settings of a run, as plain data.

    Raises:
        InputError: The file is damaged.
    """
    path = folder / "config.yaml"
    try:
        stored: Any = OmegaConf.to_container(OmegaConf.load(path))
        if not {"data", "model", "trainer", "seed"} <= stored.keys():
            raise ValueError("settings are missing")
    except Exception as error:  # there is no end to what broken YAML raises
        raise InputError(f"{path} is damaged: {reason(error)}") from None
    return stored


def requeued_config(cfg: DictConfig) -> DictConfig:
    """Return the configuration with which a job that Slurm runs again goes on with its run.

    The command is the same each time. It begins the run if there is nothing to go on from.
    """
    if cfg.resume or int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0:
        return cfg
    if not Path(cfg.output_dir, "checkpoints", "last.ckpt").exists():
        log.warning(
            "Slurm runs this job again, but %s holds no checkpoint: training begins anew. To go "
            "on, the job has to set output_dir to the same folder each time",
            cfg.output_dir,
        )
        return cfg
    log.info("Slurm runs this job again: it goes on with %s", cfg.output_dir)
    return resumed_config(OmegaConf.merge(cfg, {"resume": escaped(cfg.output_dir)}), [])  # type: ignore[arg-type]


def key_of(override: str) -> str:
    """Return the key of `key=value`, `+key=value` or `~key`."""
    return override.lstrip("+~").split("=")[0]


def what_ended(state: dict[str, Any] | None, trainer: DictConfig) -> str:
    """Return the setting that has ended the training of a run, or nothing.

    Args:
        state: Of the checkpoint that it goes on from, if any.
        trainer: Settings of the trainer.
    """
    if state is None:
        return ""
    epochs = state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if trainer.max_epochs is not None and epochs >= trainer.max_epochs >= 0:
        return f"trainer.max_epochs={trainer.max_epochs}"
    if state["global_step"] >= trainer.max_steps > 0:
        return f"trainer.max_steps={trainer.max_steps}"
    callbacks = {k: c for k, c in state["callbacks"].items() if isinstance(c, dict)}
    time = callbacks.get("Timer", {}).get("time_elapsed", {}).get("train", 0)
    if time >= _seconds(trainer.get("max_time")):
        return f"trainer.max_time={trainer.max_time}"
    stopped = any(callback.get("stopping_reason") for callback in callbacks.values())
    if stopped and epochs >= (trainer.get("min_epochs") or 0):
        return f"early stopping after epoch {epochs}"
    return ""


def _seconds(max_time: Any) -> float:
    if isinstance(max_time, str):  # DD:HH:MM:SS
        units = zip(("days", "hours", "minutes", "seconds"), max_time.split(":"), strict=False)
        max_time = {unit: int(number) for unit, number in units if number.strip().isdigit()}
    return timedelta(**max_time).total_seconds() if max_time else math.inf


def claim(
    folder: Path,
    trainer: DictConfig,
    state: dict[str, Any] | None,
    init_from: str | None = None,
) -> None:
    """Refuse a folder that holds another run, and a run that is complete.

    Also removes what a killed process has left half-written there.

    Args:
        folder: Where the run is to write.
        trainer: Settings of the trainer, which say how long the run is.
        state: The content of the checkpoint that it goes on from, if any.
        init_from: Where a new run has its weights from, if anywhere.

    Raises:
        InputError: There is a run already, or nothing left to do.
    """
    best = folder / "checkpoints" / "best.ckpt"
    for leftover in (folder / "checkpoints").glob(f"{PARTIAL}*"):
        leftover.unlink()
    if state is None:
        if (folder / "checkpoints" / "last.ckpt").exists():
            raise InputError(
                f"output_dir={folder} holds a run already: choose another folder, or go on with it "
                f"by resume={folder}"
            )
        source = Path(init_from or folder.parent)
        if best.exists() and source.exists() and any(map(source.samefile, (folder, best))):
            raise InputError(f"output_dir={folder} holds init_from={init_from}: choose another one")
        if best.exists() and (folder / "test_metrics.json").exists():
            raise InputError(f"output_dir={folder} holds a finished run: choose another folder")
        best.unlink(missing_ok=True)  # of a run that was killed before it could be resumed
        return
    end = what_ended(state, trainer)
    if end and (folder / "test_metrics.json").exists():
        further = "" if end.startswith("early") else f"to train further give a larger {end}, "
        raise InputError(
            f"resume={folder}: this run is complete, by {end} ({state['global_step']} steps); "
            f"{further}to score it use evaluate"
        )


def begin(cfg: DictConfig, folder: Path, trainer: Any, network: Any, data: Any) -> None:
    """Write the `config.yaml` with which the run is resumed, and log what is trained.

    The first process does it. Its arguments are what `train` has built.
    """
    if not trainer.is_global_zero:
        return
    settings = {key: value for key, value in plain(cfg).items() if key != "given"}
    config = OmegaConf.create({**settings, "resume": None})
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config), durable=True)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6
    log.info(
        "%d training images, %d classes, %.1f M trainable weights, %s, effective batch %d",
        len(data.dataset("train")),
        len(data.labels),
        trained,
        trainer.precision,
        data.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
    )
    if trainer.world_size > 1:
        on_gpus = trainer.strategy.root_device.type == "cuda"
        log.info("%d processes%s", trainer.world_size, ", synchronised BatchNorm" * on_gpus)
    log.info("output_dir=%s", folder)


def tell_next_steps(folder: Path, best: float | None, epoch: int | None) -> None:
    """Log which checkpoint a run has led to, and the commands that use it.

    Args:
        folder: Of the run.
        best: The score of its best epoch, if there was a validation.
        epoch: The number of that epoch, counted from 1.
    """
    checkpoint = folder / "checkpoints" / ("last.ckpt" if epoch is None else "best.ckpt")
    if not checkpoint.exists():  # nothing was to be trained
        return
    if best is not None:
        log.info("best epoch: %d, with a val mIoU of %.4f", epoch, best)
    log.info("checkpoint: %s", checkpoint)
    program = "seg-torch" if shutil.which("seg-torch") else "python -m seg_torch"
    path = checkpoint if epoch is None else folder  # which stands for its best one
    log.info("look at its scores and mistakes:\n  %s report %s", program, shlex.quote(str(path)))
    setting = shlex.quote(f"checkpoint={path}")
    log.info("segment your images:\n  %s predict %s input=IMAGES", program, setting)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Enter a context in which an error of the disk says how the run goes on.

    Raises:
        InputError: Instead of an OSError about a file, or of a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        raise InputError(
            f"{error.filename or folder}: {error.strerror}. What was saved before is complete; "
            f"when this is mended, {how_to_continue(folder)}"
        ) from error


def read_table(path: Path, columns: dict[str, type]) -> list[dict[str, Any]]:
    """Read the rows of `metrics.csv` or `times.csv`; cells without a value are left out.

    Raises:
        InputError: The file is damaged.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{k: columns[k](v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        epochs = [row["epoch"] for row in rows]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"{path} is damaged: {reason(error)}") from None
    if epochs[:1] == [0]:  # of a run that counted epochs from 0
        rows = [row | {"epoch": row["epoch"] + 1} for row in rows]
    return rows


def write_table(path: Path, columns: dict[str, type], rows: list[dict[str, Any]]) -> None:
    """Write such a table."""

    def write(name: str) -> None:
        with open(name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write, durable=True)

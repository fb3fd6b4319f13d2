"""A run's folder: who may write to it, and how its configuration comes back on resuming."""

import csv
import errno
import logging
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seg_torch.checkpoints.moved import with_current_names
from seg_torch.errors import InputError
from seg_torch.files import PARTIAL, write_atomically

log = logging.getLogger(__name__)

# Of metrics.csv and times.csv.
SCORES = ("loss", "mean_iou", "pixel_accuracy", "mean_accuracy", "mean_dice")
COLUMNS = {"epoch": int, "step": int, "learning_rate": float, "train_loss": float}
COLUMNS |= {f"val_{name}": float for name in SCORES}
TIMES = {"epoch": int, "seconds": float, "memory_gb": float}
# What a resumed run may set anew: where it runs and where the data lie, and how long it goes on.
RESUMABLE = (
    "resume",
    "data.root",
    "data.num_workers",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.max_epochs",
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
    stored = OmegaConf.load(Path(cfg.resume) / "config.yaml")
    run = OmegaConf.create(with_current_names(OmegaConf.to_container(stored)))
    for key in (key for key in map(key_of, overrides) if key in RESUMABLE[1:]):
        section, _, name = key.rpartition(".")
        if name not in (OmegaConf.select(run, section) or {}):
            raise InputError(f"resume={cfg.resume}: that run has no setting {key}")
        OmegaConf.update(run, key, OmegaConf.select(cfg, key))
    return OmegaConf.merge(run, {"resume": cfg.resume, "output_dir": cfg.resume})  # type: ignore[return-value]


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
    return resumed_config(OmegaConf.merge(cfg, {"resume": cfg.output_dir}), [])  # type: ignore[arg-type]


def key_of(override: str) -> str:
    """Return the key of `key=value`, `+key=value` or `~key`."""
    return override.lstrip("+~").split("=")[0]


def is_complete(state: dict[str, Any] | None, trainer: DictConfig) -> bool:
    """Return whether a run has all the epochs or steps of `trainer.max_epochs` and `max_steps`.

    Args:
        state: The content of the checkpoint that it goes on from, if any.
        trainer: Settings of the trainer.
    """
    if state is None:
        return False
    epochs = state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return epochs >= trainer.max_epochs >= 0 or state["global_step"] >= trainer.max_steps > 0


def claim(folder: Path, trainer: DictConfig, state: dict[str, Any] | None) -> None:
    """Refuse a folder that holds another run, and a run that is complete.

    Also removes what a killed process has left half-written there.

    Args:
        folder: Where the run is to write.
        trainer: Settings of the trainer, which say how long the run is.
        state: The content of the checkpoint that it goes on from, if any.

    Raises:
        InputError: There is a run already, or nothing left to do.
    """
    for leftover in (folder / "checkpoints").glob(f"{PARTIAL}*"):
        leftover.unlink()
    if state is None:
        if (folder / "checkpoints" / "last.ckpt").exists():
            raise InputError(
                f"output_dir={folder} holds a run already: choose another folder, or go on with it "
                f"by resume={folder}"
            )
        # Of a run that was killed before it could be resumed.
        (folder / "checkpoints" / "best.ckpt").unlink(missing_ok=True)
        return
    if is_complete(state, trainer) and (folder / "test_metrics.json").exists():
        raise InputError(
            f"resume={folder}: this run is complete ({state['global_step']} steps); to train "
            "further set trainer.max_epochs, to score it use evaluate"
        )


def begin(cfg: DictConfig, folder: Path, trainer: Any, network: Any, data: Any) -> None:
    """Write the `config.yaml` with which the run is resumed, and log what is trained.

    The first process does it. Its arguments are what `train` has built.
    """
    if not trainer.is_global_zero:
        return
    config = OmegaConf.merge(cfg, {"resume": None})
    write_atomically(folder / "config.yaml", lambda path: OmegaConf.save(config, path, True))
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
    name = "last.ckpt" if epoch is None else "best.ckpt"
    if best is not None:
        log.info("best epoch: %d, with a val mIoU of %.4f", epoch, best)
    log.info("checkpoint: %s", folder / "checkpoints" / name)
    program = "seg-torch" if shutil.which("seg-torch") else "python -m seg_torch"
    run = shlex.quote(str(folder))
    log.info("look at its scores and mistakes:\n  %s report %s", program, run)
    checkpoint = shlex.quote(f"checkpoint={folder}")
    log.info("segment your images:\n  %s predict %s input=IMAGES", program, checkpoint)


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
    """Read the rows of `metrics.csv` or `times.csv`; cells without a value are left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{k: columns[k](v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    if rows and rows[0]["epoch"] == 0:  # of a run that counted epochs from 0
        rows = [row | {"epoch": row["epoch"] + 1} for row in rows]
    return rows


def write_table(path: Path, columns: dict[str, type], rows: list[dict[str, Any]]) -> None:
    """Write such a table."""

    def write(name: str) -> None:
        with open(name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)

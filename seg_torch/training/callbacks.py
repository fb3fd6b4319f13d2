"""What happens beside the training steps: scores by epoch, curves, samples, stopping."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from torch.optim.swa_utils import get_ema_multi_avg_fn

from seg_torch.drawing.visualize import sample_sheet, save_curves
from seg_torch.errors import StoppedError
from seg_torch.files import write_atomically
from seg_torch.prediction.segmenter import Segmenter
from seg_torch.training.run import COLUMNS, SCORES, TIMES, next_step, read_table, write_table

log = logging.getLogger(__name__)

# Batches between two agreements of several processes on whether to stop.
AGREE_EVERY = 10


@contextmanager
def only_a_figure() -> Iterator[None]:
    """Lets the run go on, with a warning, where a figure of it cannot be written."""
    try:
        yield
    except OSError as error:
        log.warning("%s; the run goes on without this figure", error)


class History(Callback):
    """Writes `metrics.csv`, a row per epoch, and draws `curves.png` from it.

    Lightning's CSVLogger deletes the earlier epochs when a run is resumed; here they stay. There
    are no times in it, so that a resumed run leaves the same file as an undisturbed one; they are
    in `times.csv`: the seconds of each epoch with its validation and checkpoints (of an epoch that
    was interrupted, those after the resumption), and the most memory that the first process's
    tensors have taken on its GPU since the start. The line about an epoch is printed when its
    checkpoint is complete.
    """

    def __init__(self, folder: Path) -> None:
        self.table = folder / "metrics.csv"
        self.times_table = folder / "times.csv"
        self.figure = folder / "curves.png"
        self.rows: list[dict[str, Any]] = []
        self.times: list[dict[str, Any]] = []
        self.line = ""  # about the epoch that has just ended
        self.waited = self.worked = self.ready = 0.0  # seconds of an epoch; since when

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = time.perf_counter()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self.rows = read_table(self.table, COLUMNS)[: trainer.current_epoch]
        self.times = read_table(self.times_table, TIMES)[: trainer.current_epoch]

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._tell(pl_module)
        self.started = self.ready = time.perf_counter()
        self.waited = self.worked = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.waited += self._since_ready()

    def on_train_batch_end(self, *_: Any) -> None:
        self.worked += self._since_ready()

    def on_validation_end(self, *_: Any) -> None:
        self._since_ready()  # within an epoch: neither

    def _since_ready(self) -> float:
        before, self.ready = self.ready, time.perf_counter()
        return self.ready - before

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._tell(pl_module)

    def _tell(self, pl_module: Any) -> None:
        if self.line:
            seconds = time.perf_counter() - self.started
            log.info("%s (%.1f s)", self.line, seconds)
            row = {"epoch": self.rows[-1]["epoch"], "seconds": round(seconds, 2)}
            if pl_module.device.type == "cuda":
                row["memory_gb"] = round(torch.cuda.max_memory_allocated(pl_module.device) / 1e9, 3)
            self.times.append(row)
            write_table(self.times_table, TIMES, self.times)
        self.line = ""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        train_loss = pl_module.training_loss()  # of all processes
        if not trainer.is_global_zero:
            return
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train_loss": train_loss,
        }
        for name in SCORES:
            # Lightning keeps the values of earlier epochs.
            value = trainer.callback_metrics.get(f"val/{name}") if pl_module.validated else None
            row[f"val_{name}"] = None if value is None else value.item()
        self.rows.append(row)
        write_table(self.table, COLUMNS, self.rows)
        with only_a_figure():
            save_curves(self.rows, self.figure)
        shown = {"loss": "train_loss", "val loss": "val_loss", "val mIoU": "val_mean_iou"}
        values = [f"{k} {row[v]:.4f}" for k, v in shown.items() if row[v] is not None]
        epoch = trainer.current_epoch + 1
        share = self.waited / max(self.waited + self.worked, 1e-9)
        values.append(f"{share:.0%} of the time waiting for data")
        self.line = f"epoch {epoch} of {trainer.max_epochs}: {', '.join(values)}"
        if share > 0.1 and self.waited > 1:  # else it is the start of the workers
            self.line += f"; {_how_to_wait_less(trainer.datamodule)}"


def _how_to_wait_less(data: Any) -> str:
    if data.cache == "none":
        return "data.cache=ram or disk keeps decoded images"
    return "data.num_workers=N lets N processes prepare them"


class SampleSheet(Callback):
    """Draws image | label | prediction of a few validation images after each epoch."""

    def __init__(self, folder: Path, count: int = 4) -> None:
        self.folder = folder / "samples"
        self.count = count

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        # It moves the network to its device, at which FSDP gives up the weights of the other
        # processes; they are fetched after this, see `seg_torch.training.trainer.FullySharded`.
        self.segmenter = Segmenter(
            pl_module.network,
            pl_module.labels,
            trainer.datamodule.resize,
            pl_module.device,
            precision=pl_module.inference.precision,
            format=trainer.datamodule.format,
        )

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        data = trainer.datamodule
        samples = data.dataset("val")
        step = max(1, len(samples) // self.count)
        chosen = [samples[i] for i in range(0, len(samples), step)][: self.count]
        results = [self.segmenter.predict(image) for image, _ in chosen]
        images, predictions = [r.image for r in results], [r.mask for r in results]
        labels = pl_module.labels
        sheet = sample_sheet(images, [mask.numpy() for _, mask in chosen], predictions, labels)
        with only_a_figure():
            write_atomically(self.folder / f"epoch_{trainer.current_epoch:03d}.png", sheet.save)


class WeightAverage(WeightAveraging):
    """Keeps an exponential moving average of the weights: validated, saved and scored.

    A checkpoint holds the average where every other one has its weights, and the trained weights
    under `current_model_state`, from which a run is resumed. BatchNorm's statistics are averaged
    like the weights that they belong to.

    Lightning's callback takes the averaged weights out before `SampleSheet` draws, and mixes the
    two up in a checkpoint that is saved while it validates. Here they stay in for all of the
    validation.

    Args:
        decay: Of the average in each optimizer step. Source: Polyak & Juditsky (1992); 0.999 in
            most recipes, where a run has many thousand steps.
        device: Of the model.
    """

    def __init__(self, decay: float, device: torch.device) -> None:
        # Not Lightning's EMAWeightAveraging: its arithmetic changes numbers that stay the same,
        # such as frozen weights, and takes several times as long.
        super().__init__(device, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.is_validating = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You're using the WeightAveraging callback with")
            super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._average_model is not None:
            # Its class weights are set later, and are not averaged.
            self._average_model.module.loss = pl_module.loss

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        self.is_validating = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        self.is_validating = False

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pass

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pass

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, state: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, state)
        if self.is_validating:
            current = state["state_dict"]
            state["state_dict"] = state["current_model_state"]
            state["current_model_state"] = current


class Checkpoints(ModelCheckpoint):
    """Lightning's checkpoint of an epoch under one name, in a run's folder that may be moved."""

    def __init__(self, folder: Path, name: str, monitor: str | None = None) -> None:
        super().__init__(
            folder / "checkpoints",
            filename=name,
            monitor=monitor,
            mode="max",
            enable_version_counter=False,
            # The last one is saved after all else of the epoch.
            save_on_train_epoch_end=None if monitor else True,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score, which Lightning would forget in a folder of another name."""
        path = f"{self.dirpath}/{self.filename}.ckpt"
        best = dict.fromkeys([path][: len(state_dict["best_k_models"])], state_dict["kth_value"])
        moved = dict.fromkeys(("best_model_path", "kth_best_model_path"), path if best else "")
        super().load_state_dict(
            {**state_dict, **moved, "dirpath": self.dirpath, "best_k_models": best}
        )


class StopOnSignal(Callback):
    """Ends the run on Ctrl-C, on SIGTERM and, in a job of Slurm, on SIGUSR1.

    Used as a context around all of the run. While the run trains, it finishes the step under way
    and saves it in `last.ckpt`; a second Ctrl-C ends it at once. Several processes agree on the
    step, every ten batches of training and validation and after each epoch. At any other time
    there is nothing to save, and the run ends at once.

    Slurm sends SIGUSR1 before the time limit, if asked to (`sbatch --signal=USR1@300`). The job
    then goes back to the queue. Lightning's own handler would save in the middle of a step.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.training = False
        self.signum = 0
        self.process = os.getpid()
        self.signals = [signal.SIGINT, signal.SIGTERM]
        if "SLURM_JOB_ID" in os.environ:
            self.signals.append(signal.SIGUSR1)

    def __enter__(self) -> StopOnSignal:
        self.before = [signal.signal(signum, self._note) for signum in self.signals]
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in zip(self.signals, self.before, strict=True):
            signal.signal(signum, handler or signal.SIG_DFL)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.training = True
        signal.signal(signal.SIGTERM, self._note)  # Lightning has put its own handler around it

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch > 0 and (signum := self._agreed(trainer)):
            # last.ckpt is that of the epoch before.
            raise self._stopped(signum, f" after epoch {trainer.current_epoch}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        done = trainer.fit_loop.epoch_loop.batch_idx + 1
        if done == trainer.num_training_batches or done % trainer.accumulate_grad_batches:
            return  # the epoch's end follows, or the optimizer has not stepped
        self._stop_between(trainer, pl_module, done)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        # Some processes may have one batch more, before which they cannot ask the others.
        batches = torch.tensor(trainer.num_val_batches[0], device=trainer.strategy.root_device)
        self.shared_batches = int(trainer.strategy.reduce(batches, reduce_op="min"))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_index: int, *_: Any
    ) -> None:
        if self.training and batch_index < self.shared_batches:
            self._stop_between(trainer, pl_module, batch_index)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.training = False
        if signum := self._agreed(trainer):
            raise self._stopped(signum, " after the last epoch")

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a worker process that was forked from this one
        if not self.training:
            raise self._stopped(signum)
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        log.info("stopping after this step; once more to stop at once")

    def _agreed(self, trainer: Trainer) -> int:
        """Return the signal that any process was sent, or 0; all of them have to ask at once."""
        if trainer.world_size == 1:
            return self.signum
        signum = torch.tensor(self.signum, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(signum, reduce_op="max"))

    def _stop_between(self, trainer: Trainer, pl_module: Any, batch: int) -> None:
        """Save and ends the run before this batch, if a signal came."""
        if trainer.world_size > 1 and batch % AGREE_EVERY:
            return
        if signum := self._agreed(trainer):
            pl_module.check_training()
            trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt")
            raise self._stopped(signum, f" in epoch {trainer.current_epoch + 1}")

    def _stopped(self, signum: int, place: str = "") -> StoppedError:
        """Return what ends the run; for SIGUSR1 Slurm is told first."""
        step = next_step(self.folder)
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        if first and signum not in (signal.SIGINT, signal.SIGTERM):
            step = requeue() or step
        return StoppedError(f"stopped{place}; {step}", signum)


def requeue() -> str:
    """Put this job of Slurm back into the queue; returns what becomes of the run, if it can."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("job %s could not be put back into the queue: %s", job, error)
        return ""
    return f"job {job} waits in the queue of Slurm to go on"

"""Stopping a run by a signal, so that it can go on where it was."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only

from seg_torch.errors import StoppedError
from seg_torch.training.run import how_to_continue

log = logging.getLogger(__name__)

# Batches between two agreements of several processes on whether to stop.
AGREE_EVERY = 10


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
            trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt")
            raise self._stopped(signum, f" in epoch {trainer.current_epoch + 1}")

    def _stopped(self, signum: int, when: str = "") -> StoppedError:
        """Return what ends the run; for SIGUSR1 Slurm is told first."""
        advice = how_to_continue(self.folder)
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        if first and signum not in (signal.SIGINT, signal.SIGTERM):
            advice = requeue() or advice
        return StoppedError(f"stopped{when}; {advice}", signum)


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

"""What happens beside the training steps: scores by epoch, curves, samples, stopping."""

from __future__ import annotations

import csv
import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from seg_torch.errors import StoppedError
from seg_torch.files import write_atomically
from seg_torch.segmenter import Segmenter
from seg_torch.visualize import sample_sheet, save_curves

log = logging.getLogger(__name__)

SCORES = ("loss", "mean_iou", "pixel_accuracy", "mean_accuracy", "mean_dice")
COLUMNS = {"epoch": int, "step": int, "learning_rate": float, "train_loss": float}
COLUMNS |= {f"val_{name}": float for name in SCORES}


class History(Callback):
    """Writes `metrics.csv`, a row per epoch, and draws `curves.png` from it.

    Lightning's CSVLogger deletes the earlier epochs when a run is resumed; here they stay. There
    are no times in it, so that a resumed run leaves the same file as an undisturbed one.
    """

    def __init__(self, folder: Path) -> None:
        self.table = folder / "metrics.csv"
        self.figure = folder / "curves.png"
        self.rows: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = time.perf_counter()
        if trainer.current_epoch > 0 and self.table.exists():
            with self.table.open(newline="", encoding="utf-8") as file:
                for row in list(csv.DictReader(file))[: trainer.current_epoch]:
                    self.rows.append({k: COLUMNS[k](value) for k, value in row.items() if value})

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = time.perf_counter()

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
        write_atomically(self.table, self._write)
        save_curves(self.rows, self.figure)
        shown = {"loss": "train_loss", "val loss": "val_loss", "val mIoU": "val_mean_iou"}
        log.info(
            "epoch %d of %s: %s (%.1f s)",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            ", ".join(f"{k} {row[v]:.4f}" for k, v in shown.items() if row[v] is not None),
            time.perf_counter() - self.started,
        )

    def _write(self, path: str) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)


class SampleSheet(Callback):
    """Draws image | label | prediction of a few validation images after each epoch."""

    def __init__(self, folder: Path, count: int = 4) -> None:
        self.folder = folder / "samples"
        self.count = count

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        # It moves the network to its device, at which FSDP gives up the weights of the other
        # processes; they are fetched after this, see `seg_torch.trainer.FullySharded`.
        self.segmenter = Segmenter(
            pl_module.network,
            pl_module.labels,
            trainer.datamodule.resize,
            pl_module.device,
            precision=pl_module.inference.precision,
        )

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        data = trainer.datamodule
        samples = data.dataset("val")
        step = max(1, len(samples) // self.count)
        chosen = [samples[i] for i in range(0, len(samples), step)][: self.count]
        images = [image.permute(1, 2, 0).numpy() for image, _ in chosen]
        predictions = [self.segmenter.predict(image).mask for image in images]
        labels = pl_module.labels
        sheet = sample_sheet(images, [mask.numpy() for _, mask in chosen], predictions, labels)
        write_atomically(self.folder / f"epoch_{trainer.current_epoch:03d}.png", sheet.save)


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
        """Takes over the best score, which Lightning would forget in a folder of another name."""
        path = f"{self.dirpath}/{self.filename}.ckpt"
        best = dict.fromkeys([path][: len(state_dict["best_k_models"])], state_dict["kth_value"])
        moved = dict.fromkeys(("best_model_path", "kth_best_model_path"), path if best else "")
        super().load_state_dict(
            {**state_dict, **moved, "dirpath": self.dirpath, "best_k_models": best}
        )


class StopOnSignal(Callback):
    """Ends the run on Ctrl-C or SIGTERM after the step that is under way, saved in `last.ckpt`.

    A second Ctrl-C ends it at once. Several processes agree on the step every ten batches.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.signum = 0
        self.process = os.getpid()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # After Lightning has set its own handlers; it restores those from before when it ends.
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._note)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        done = trainer.fit_loop.epoch_loop.batch_idx + 1
        if done == trainer.num_training_batches or done % trainer.accumulate_grad_batches:
            return  # the epoch's end follows, or the optimizer has not stepped
        stop = bool(self.signum)
        if trainer.world_size > 1:
            agree = trainer.strategy.reduce_boolean_decision
            stop = done % 10 == 0 and agree(stop, all=False)
        if stop:
            self._stop(trainer, pl_module)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.signum and trainer.world_size == 1 and not trainer.sanity_checking:
            self._stop(trainer, pl_module)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a worker process that was forked from this one
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        log.info("stopping after this step; once more to stop at once")

    def _stop(self, trainer: Any, pl_module: Any) -> None:
        pl_module.check_losses()
        trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt")
        raise StoppedError(
            f"stopped in epoch {trainer.current_epoch + 1}; go on with resume={self.folder}",
            self.signum or signal.SIGTERM,
        )

"""What happens beside the training steps: scores by epoch, curves, samples, checkpoints."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from seg_torch.drawing.curves import save_curves
from seg_torch.drawing.visualize import sample_sheet
from seg_torch.files import write_atomically
from seg_torch.prediction.segmentation import segment
from seg_torch.training.run import COLUMNS, SCORES, TIMES, read_table, write_table

log = logging.getLogger(__name__)

DRAW_EVERY = 5.0  # seconds; curves.png takes a quarter of a second, as long as a short epoch


@contextmanager
def warn_on_oserror() -> Iterator[None]:
    """Let the run go on, with a warning, where a figure of it cannot be written."""
    try:
        yield
    except OSError as error:
        log.warning("%s; the run goes on without this figure", error)


class Stopwatch:
    """The seconds of an epoch, and how they were spent.

    Attributes:
        worked: On batches.
        started: When the epoch began.
    """

    def __init__(self) -> None:
        self.worked = 0.0
        self.started = self.last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last call."""
        before, self.last = self.last, time.perf_counter()
        return self.last - before


class History(Callback):
    """Writes `metrics.csv`, a row per epoch, and draws `curves.png` from it every few seconds.

    Lightning's CSVLogger deletes the earlier epochs when a run is resumed; here they stay. There
    are no times in it, so that a resumed run leaves the same file as an undisturbed one.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.table = folder / "metrics.csv"
        self.figure = folder / "curves.png"
        self.rows: list[dict[str, Any]] = []
        self.drawn = -math.inf  # when the figure was
        self.is_new = False  # whether there are rows that are not drawn

    def on_train_start(self, trainer: Any, task: Any) -> None:
        self.rows = read_table(self.table, COLUMNS)[: trainer.current_epoch]

    def on_train_batch_end(self, *_: Any) -> None:
        self.draw(DRAW_EVERY)

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        train_loss = task.training_loss()  # of all processes
        if not trainer.is_global_zero:
            return
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train_loss": train_loss,
        }
        for name in SCORES:
            # Lightning keeps the values of earlier epochs.
            value = trainer.callback_metrics.get(f"val/{name}") if task.validated else None
            row[f"val_{name}"] = None if value is None else value.item()
        self.rows.append(row)
        write_table(self.table, COLUMNS, self.rows)
        self.is_new = True
        self.draw(DRAW_EVERY)

    def on_train_end(self, *_: Any) -> None:
        self.draw()

    def on_exception(self, *_: Any) -> None:
        self.draw()

    def draw(self, seconds: float = 0.0) -> None:
        """Draw the figure, if there is something new and the last one is older than that."""
        if self.is_new and time.perf_counter() >= self.drawn + seconds:
            with warn_on_oserror():
                save_curves(self.rows, self.figure)
            self.drawn, self.is_new = time.perf_counter(), False


class EpochLine(Callback):
    """Prints a line about an epoch when its checkpoint is complete, and writes `times.csv`.

    The table has the seconds of each epoch with its validation and checkpoints (of an epoch that
    was interrupted, those after the resumption), and the most memory that the first process's
    tensors have taken on its GPU since the start.

    Args:
        history: Has the scores of the epochs, and comes before this callback.
        folder: Of the run.
    """

    def __init__(self, history: History, folder: Path) -> None:
        self.history = history
        self.table = folder / "times.csv"
        self.rows: list[dict[str, Any]] = []
        self.line = self.note = ""  # about the epoch that has just ended
        self.watch = Stopwatch()

    def on_train_start(self, trainer: Any, task: Any) -> None:
        if task.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(task.device)
        self.rows = read_table(self.table, TIMES)[: trainer.current_epoch]
        self.started, self.first_epoch = time.perf_counter(), trainer.current_epoch
        self.start_epoch(trainer)  # an epoch that is resumed within has no start

    def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
        self.log_epoch(trainer, task.device)
        self.start_epoch(trainer)

    def start_epoch(self, trainer: Any) -> None:
        """Start the clocks, that of the training loader, too."""
        self.watch = Stopwatch()
        trainer.train_dataloader.waited = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.watch.lap()

    def on_train_batch_end(self, *_: Any) -> None:
        self.watch.worked += self.watch.lap()

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        if not trainer.is_global_zero:
            return
        shown = {"loss": "train_loss", "val loss": "val_loss", "val mIoU": "val_mean_iou"}
        row = self.history.rows[-1]
        values = [f"{name} {row[key]:.4f}" for name, key in shown.items() if row[key] is not None]
        scores = [r["val_mean_iou"] for r in self.history.rows if r.get("val_mean_iou") is not None]
        if row["val_mean_iou"] is not None and row["val_mean_iou"] > max(scores[:-1], default=-1):
            values[-1] += " (best so far)"
        waited, worked = trainer.train_dataloader.waited, self.watch.worked
        share = waited / max(waited + worked, 1e-9)
        of = f" of {trainer.max_epochs}" * (trainer.max_epochs > 0)
        self.line = f"epoch {row['epoch']}{of}: {', '.join(values)}"
        self.note = f"; {share:.0%} of the time waiting for data" * (share > 0.1)
        if share > 0.1 and waited > 1:  # else it is the start of the workers
            self.note += f": {how_to_wait_less(trainer.datamodule)}"

    def on_train_end(self, trainer: Any, task: Any) -> None:
        self.log_epoch(trainer, task.device)

    def time_left(self, trainer: Any) -> str:
        """Return how long the run still takes at its speed so far, as the end of a line."""
        epoch, step = self.history.rows[-1]["epoch"], trainer.global_step
        left = trainer.max_epochs - epoch if trainer.max_epochs > 0 else math.inf
        if trainer.lightning_module.max_steps > 0:
            left = min(left, (trainer.lightning_module.max_steps - step) * epoch / step)
        if not 0 < left < math.inf:
            return ""
        seconds = (time.perf_counter() - self.started) / (epoch - self.first_epoch)
        return f", {timedelta(seconds=round(seconds * left))} left"

    def log_epoch(self, trainer: Any, device: torch.device) -> None:
        """Print the line of the epoch that has ended, if there is one, and write its row."""
        if not self.line:
            return
        seconds = time.perf_counter() - self.watch.started
        log.info("%s, %.1f s%s%s", self.line, seconds, self.time_left(trainer), self.note)
        row = {"epoch": self.history.rows[-1]["epoch"], "seconds": round(seconds, 2)}
        if device.type == "cuda":
            row["memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
        self.rows.append(row)
        write_table(self.table, TIMES, self.rows)
        self.line = ""


def how_to_wait_less(data: Any) -> str:
    """Return the setting with which training waits less for the data."""
    if data.cache in (None, "none"):
        return "data.cache=ram or disk keeps decoded images"
    return "data.num_workers=N lets N processes prepare them"


class SampleSheet(Callback):
    """Draws image | label | prediction of a few validation images after each epoch."""

    def __init__(self, folder: Path, count: int = 4) -> None:
        self.folder = folder / "samples"
        self.count = count

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        data = trainer.datamodule
        samples = data.dataset("val")
        step = max(1, len(samples) // self.count)
        chosen = [samples[i] for i in range(0, len(samples), step)][: self.count]
        labels, format = pl_module.labels, data.format
        arrays = [format.checked(image) for image, _ in chosen]
        results = [segment(pl_module.inference, labels, [array], format)[0] for array in arrays]
        images, predictions = [r.image for r in results], [r.mask for r in results]
        sheet = sample_sheet(images, [mask.numpy() for _, mask in chosen], predictions, labels)
        with warn_on_oserror():
            write_atomically(self.folder / f"epoch_{trainer.current_epoch + 1:03d}.png", sheet.save)


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
        self.current_score = state_dict["current_score"]  # which Lightning does not take over

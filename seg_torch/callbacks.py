"""What a run leaves behind besides weights: scores by epoch, curves, samples."""

from __future__ import annotations

import csv
import logging
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from seg_torch.files import write_atomically
from seg_torch.segmenter import Segmenter
from seg_torch.task import SegmentationTask
from seg_torch.visualize import sample_sheet, save_curves

log = logging.getLogger(__name__)

COLUMNS = {
    "epoch": int,
    "step": int,
    "learning_rate": float,
    "train_loss": float,
    "val_loss": float,
    "val_mean_iou": float,
    "val_pixel_accuracy": float,
    "val_mean_accuracy": float,
    "val_mean_dice": float,
    "seconds": float,
}


class History(Callback):
    """Writes `metrics.csv`, a row an epoch, and draws `curves.png` from it.

    Lightning's CSVLogger deletes the earlier epochs when a run is resumed; here they stay.
    """

    def __init__(self, folder: Path) -> None:
        self.table = folder / "metrics.csv"
        self.picture = folder / "curves.png"
        self.rows: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch > 0 and self.table.exists():
            with self.table.open(newline="") as file:
                rows = [
                    {key: COLUMNS[key](value) for key, value in row.items() if value}
                    for row in csv.DictReader(file)
                ]
            self.rows = [row for row in rows if row["epoch"] < trainer.current_epoch]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train_loss": logged.get("train/loss_epoch"),
            "seconds": round(time.perf_counter() - self.started, 2),
        }
        for name in ("loss", "mean_iou", "pixel_accuracy", "mean_accuracy", "mean_dice"):
            row[f"val_{name}"] = logged.get(f"val/{name}")
        self.rows.append(row)
        write_atomically(self.table, self._write)
        save_curves(self.rows, self.picture)
        shown = {"loss": "train_loss", "val loss": "val_loss", "val mIoU": "val_mean_iou"}
        log.info(
            "epoch %d of %s: %s (%.1f s)",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            ", ".join(f"{k} {row[v]:.4f}" for k, v in shown.items() if row.get(v) is not None),
            row["seconds"],
        )

    def _write(self, path: str) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)


class SampleSheet(Callback):
    """Draws image | label | prediction of a few validation images after each epoch."""

    def __init__(self, folder: Path, count: int = 4) -> None:
        self.folder = folder / "samples"
        self.count = count

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, SegmentationTask)
        data = trainer.datamodule  # type: ignore[attr-defined]
        samples = data.dataset("val")
        step = max(1, len(samples) // self.count)
        chosen = [samples[i] for i in range(0, len(samples), step)][: self.count]
        images = [image.permute(1, 2, 0).numpy() for image, _ in chosen]
        segmenter = Segmenter(pl_module.network, pl_module.labels, data.resize, pl_module.device)
        sheet = sample_sheet(
            images,
            [mask.numpy() for _, mask in chosen],
            [segmenter.predict(image).mask for image in images],
            pl_module.labels,
        )
        path = self.folder / f"epoch_{trainer.current_epoch:03d}.png"
        write_atomically(path, lambda name: sheet.save(name))


class SaveOnInterrupt(Callback):
    """Leaves a `last.ckpt` when Ctrl-C comes before the first epoch's own one.

    After an epoch there is one already, and it is the better one to resume from.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoints" / "last.ckpt"

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, KeyboardInterrupt):
            return
        # With several processes all of them save together, and the others may be gone by now.
        if not self.path.exists() and trainer.world_size == 1 and trainer.global_step > 0:
            trainer.save_checkpoint(self.path)
        if self.path.exists() and trainer.is_global_zero:
            log.info("interrupted; go on with checkpoint=%s", self.path)


class StopOnNan(Callback):
    """Ends a training whose loss is no longer a number; what was best before stays the best."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("train/loss_epoch")
        if loss is not None and not torch.isfinite(loss):
            log.warning(
                "the training loss is %s: stopping. Try a lower optimizer.lr or "
                "trainer.gradient_clip_val=1",
                loss.item(),
            )
            trainer.should_stop = True

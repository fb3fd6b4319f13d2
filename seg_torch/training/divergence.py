"""A run whose loss or weights are no longer numbers: it ends, and leaves the batch behind."""

import logging
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lightning import Callback, Trainer
from torch import nn
from torch.distributed.tensor import DTensor

from seg_torch.data.module import SegmentationDataModule
from seg_torch.errors import InputError
from seg_torch.files import write_atomically, write_json
from seg_torch.training.run import how_to_continue
from seg_torch.training.task import SegmentationTask

log = logging.getLogger(__name__)

# Batches between two looks at the training losses, each of which makes the CPU wait for a GPU.
LOOK_EVERY = 50


class StopOnDivergence(Callback):
    """Ends a run where a loss or a weight is no longer a number, before that is saved.

    The run's folder then holds the batch and what is in it.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finite_batches = torch.tensor(0)  # of the validation, before the first that is not

    def on_train_batch_end(
        self, trainer: Trainer, task: Any, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        done = batch_index + 1
        stops = 0 < task.max_steps <= trainer.global_step  # before the last validation
        if stops or done == trainer.num_training_batches or done % LOOK_EVERY == 0:
            self.check_training(trainer, task)

    def on_save_checkpoint(self, trainer: Trainer, task: Any, state: dict[str, Any]) -> None:
        self.check_training(trainer, task)

    def on_validation_start(self, trainer: Trainer, task: Any) -> None:
        self.finite_batches = torch.tensor(0, device=task.device)

    def on_validation_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
        self.finite_batches += task.validation_loss.total.isfinite()

    def on_validation_end(self, trainer: Trainer, task: Any) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.sanity_checking or loss is None or loss.isfinite():
            return
        batch = int(self.finite_batches)
        own = batch if batch < trainer.num_val_batches[0] else -1
        by_rank: Any = task.all_gather(torch.tensor([own]))
        batch, rank = (int(value) for value in by_rank.view(-1).max(0))
        self._end(trainer, task, "val", batch, rank, f"the validation loss is {loss:g}")

    def check_training(self, trainer: Trainer, task: SegmentationTask) -> None:
        """Look at the losses of the epoch and at the weights; all processes do it together.

        Raises:
            InputError: In all processes, if a loss of this epoch in any of them is not finite, or
                a weight.
        """
        losses = task.losses_by_rank()
        batches = (~losses.isfinite()).T.nonzero()
        if len(batches):
            batch, rank = batches[0].tolist()
            problem = f"the training loss is {losses[rank, batch]:g}"
            self._end(trainer, task, "train", batch, rank, problem)
        norm = nn.utils.get_total_norm(task.parameters())
        if isinstance(norm, DTensor):  # FSDP
            norm = norm.full_tensor()
        norms: Any = task.all_gather(norm)
        if not norms.isfinite().all():  # a gradient was not: the next loss would not be, either
            problem = "the weights are no longer numbers"
            self._end(trainer, task, "train", losses.shape[1] - 1, 0, problem)

    def _end(
        self, trainer: Any, task: Any, split: str, batch: int, rank: int, problem: str
    ) -> NoReturn:
        """End the run in all processes, with the batch and what is in it in the run's folder."""
        problem += f" at batch {batch + 1} of epoch {trainer.current_epoch + 1}"
        if trainer.world_size > 1:
            problem += f" in process {rank}"
        losses = task.losses_by_rank()[rank].tolist()
        if split == "train":
            losses = losses[: batch + 1]
        saved = ""
        if trainer.is_global_zero and isinstance(trainer.datamodule, SegmentationDataModule):
            saved = self._save(trainer, split, batch, rank, problem, losses)
        trainer.strategy.barrier()
        raise InputError(
            f"{problem}: the training has diverged. {saved}{self.folder / 'checkpoints'} holds "
            "what was before. Start a new run with a lower optimizer.lr or "
            "trainer.gradient_clip_val=1; or, if a file is at fault, mend it and "
            f"{how_to_continue(self.folder)}"
        )

    def _save(
        self, trainer: Any, split: str, batch: int, rank: int, problem: str, losses: list[float]
    ) -> str:
        """Write `batch.pt` (uint8 `images` and `masks`) and `report.json`.

        Nothing of a batch is kept while training. What it was follows from seed, epoch and place.

        Args:
            trainer: Knows the data and the epoch.
            split: `train` or `val`.
            batch: The batch of the epoch, counted from 0.
            rank: The process that was given it.
            problem: What is wrong.
            losses: The process's training losses of the epoch so far.

        Returns:
            A sentence on where that is, for the user; empty if it could not be written.
        """
        folder, data = self.folder / "diverged", trainer.datamodule
        try:
            indices, samples = data.rebuild_batch(split, trainer.current_epoch, batch, rank)
            dataset = data.dataset(split)
            report = {
                "found": problem,
                "split": split,
                "epoch": trainer.current_epoch + 1,
                "batch": batch + 1,
                "process": rank,
                "learning_rate_now": trainer.optimizers[0].param_groups[0]["lr"],
                "precision": str(trainer.precision),
                "last_losses": [f"{loss:g}" for loss in losses[-100:]],
                "images": [
                    {"index": index}
                    | {kind: dataset.name(index, kind) for kind in ("image", "mask")}
                    | _statistics(*sample)
                    for index, sample in zip(indices, samples, strict=True)
                ],
            }
            images, masks = zip(*samples, strict=True)
            content = {"images": [*map(_whole, images)], "masks": [*map(_whole, masks)]}
            write_atomically(folder / "batch.pt", partial(torch.save, content))
            write_json(folder / "report.json", report)
        except Exception as error:  # such as a full disk, which is not what has to be told
            log.warning("the batch could not be written to %s: %s", folder, error)
            return ""
        return f"{folder} holds that batch and names its files. "


def _whole(part: torch.Tensor) -> torch.Tensor:
    return part.as_subclass(torch.Tensor).clone()  # without the rest of what was cropped


def _statistics(image: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    values, counts = np.unique(mask.numpy(), return_counts=True)
    return {
        "size": list(mask.shape),
        "minimum": int(image.min()),
        "mean": float(image.double().mean()),
        "maximum": int(image.max()),
        "mask_pixels": {str(value): int(n) for value, n in zip(values, counts, strict=True)},
    }

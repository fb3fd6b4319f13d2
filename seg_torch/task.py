"""SegmentationTask: network + loss + scores + optimiser, for Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric

from seg_torch import checkpoint
from seg_torch.datamodule import Sample
from seg_torch.labels import Labels
from seg_torch.losses import CrossEntropyLoss
from seg_torch.metrics import AveragePrecision, ConfusionMatrix, report, scores
from seg_torch.models.network import Network, enlarge_rows


class SegmentationTask(LightningModule):
    """Trains and scores a network.

    Args:
        network: what is trained.
        labels: its classes.
        loss: (logits float [N, C, H, W], target uint8 [N, H, W]) -> scalar. Not needed to score.
        optimizer: `optimizer(parameters)`, as a partial.
        scheduler: `scheduler(optimizer, total_steps)` stepped after each batch, or a partial of
            `ReduceLROnPlateau`, stepped after each epoch on the validation loss.
        aux_weight: weight of the loss of the auxiliary head, where there is one.
        description: what `seg_torch.checkpoint` needs to build the network again.
        pixel_counts_cache: file for the class counts of losses that are weighted by them.
        seed: of what is random inside the network, such as dropout.
        average_precision: score it in tests, too.
    """

    def __init__(
        self,
        network: Network,
        labels: Labels,
        loss: nn.Module | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        aux_weight: float = 0.5,
        description: dict[str, Any] | None = None,
        pixel_counts_cache: Path | None = None,
        seed: int = 0,
        average_precision: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.labels = labels
        self.loss = loss
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.aux_weight = aux_weight
        self.description = description
        self.pixel_counts_cache = pixel_counts_cache
        self.seed = seed
        self.confusion = ConfusionMatrix(len(labels), labels.ignore_index)
        self.average_precision = (
            AveragePrecision(len(labels), labels.ignore_index) if average_precision else None
        )
        self.validation_loss = MeanMetric(nan_strategy="disable")
        self.test_report: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.loss is not None:
            for loss in self.loss.modules():
                if isinstance(loss, CrossEntropyLoss) and loss.needs_pixel_counts:
                    data = self.trainer.datamodule  # type: ignore[attr-defined]
                    loss.set_pixel_counts(data.pixel_counts(self.pixel_counts_cache))

    def on_train_epoch_start(self) -> None:
        # By epoch, so that a resumed run goes on with the numbers of an uninterrupted one.
        entropy = np.random.SeedSequence([self.seed, self.current_epoch, self.global_rank])
        torch.manual_seed(int(entropy.generate_state(1)[0]))

    def training_step(self, batch: Sample, batch_index: int) -> Tensor:
        assert self.loss is not None
        images, masks = batch
        outputs = self.network(images)
        loss = self.loss(outputs["out"], masks)
        if "aux" in outputs:
            loss = loss + self.aux_weight * self.loss(outputs["aux"], masks)
        self.log(
            "train/loss",
            loss,
            prog_bar=True,
            on_step=True,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(images),
        )
        return loss

    def validation_step(self, groups: Sequence[Sample], batch_index: int) -> None:
        for logits, mask in self._logits_at_label_size(groups):
            self.confusion.update(logits.argmax(1), mask)
            if self.loss is not None:
                self.validation_loss.update(self.loss(logits, mask))

    def on_validation_epoch_end(self) -> None:
        results = scores(self.confusion.compute())
        self.confusion.reset()
        # Every process holds the same numbers here: the confusion matrix has been added up.
        self.log("val/mean_iou", results["mean_iou"].float(), prog_bar=True)
        for name in ("pixel_accuracy", "mean_accuracy", "mean_dice"):
            self.log(f"val/{name}", results[name].float())
        if self.validation_loss.update_called or self.trainer.world_size > 1:
            self.log("val/loss", self.validation_loss.compute(), prog_bar=True)
        self.validation_loss.reset()

    def test_step(self, groups: Sequence[Sample], batch_index: int) -> None:
        for logits, mask in self._logits_at_label_size(groups):
            self.confusion.update(logits.argmax(1), mask)
            if self.average_precision is not None:
                self.average_precision.update(logits.softmax(1), mask)

    def on_test_epoch_end(self) -> None:
        average_precision = None
        if self.average_precision is not None:
            average_precision = self.average_precision.compute()
            self.average_precision.reset()
        self.test_report = report(self.confusion.compute(), self.labels.names, average_precision)
        self.confusion.reset()

    def _logits_at_label_size(self, groups: Sequence[Sample]) -> Iterator[Sample]:
        """Logits float32 [1, C, h, w] and mask uint8 [1, h, w] of each image.

        One by one: at label size the logits of a whole batch may not fit into memory, and on a
        processor those of one image fit into its cache.
        """
        for images, masks in groups:
            for output, mask in zip(self.network(images)["out"], masks, strict=True):
                yield enlarge_rows(output[None], mask.shape, 0, mask.shape[0]).float(), mask[None]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        assert self.make_optimizer is not None
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self.make_scheduler is None:
            return optimizer
        if getattr(self.make_scheduler, "func", None) is ReduceLROnPlateau:
            settings = {"scheduler": self.make_scheduler(optimizer), "monitor": "val/loss"}
        else:
            steps = int(self.trainer.estimated_stepping_batches)
            settings = {"scheduler": self.make_scheduler(optimizer, steps), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": settings}  # type: ignore[return-value]

    def on_save_checkpoint(self, state: dict[str, Any]) -> None:
        if self.description is not None:
            state[checkpoint.KEY] = self.description

    def on_load_checkpoint(self, state: dict[str, Any]) -> None:
        # The schedule is as long as this run, which may go on for more epochs than the first.
        for scheduler in state["lr_schedulers"]:
            for key in ("total_steps", "total_iters", "_schedule_phases"):
                scheduler.pop(key, None)

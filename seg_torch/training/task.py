"""SegmentationTask: network + loss + scores + optimiser, for Lightning's Trainer."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric

from seg_torch.checkpoints import checkpoint
from seg_torch.data.module import EvaluationGroup, Sample
from seg_torch.errors import InputError
from seg_torch.labels import Labels
from seg_torch.losses import CrossEntropyLoss, ModelLoss, upsampled_loss
from seg_torch.metrics import (
    AveragePrecision,
    BoundaryScores,
    Calibration,
    ConfusionMatrix,
    ImageScores,
    LabelQuality,
    confidence_steps,
    report,
    scores,
)
from seg_torch.models.network import Network
from seg_torch.prediction.inference import Inference, decide
from seg_torch.training.divergence import save_batch
from seg_torch.training.optimizers import PARTS, parameter_groups
from seg_torch.training.run import next_step
from seg_torch.training.schedulers import scheduler_config

# Batches between two looks at the training losses, each of which makes the CPU wait for a GPU.
LOOK_EVERY = 50


class SegmentationTask(LightningModule):
    """Trains and scores a network.

    Args:
        network: What is trained.
        labels: Its classes.
        inference: How validation and test go from images to class ids; by default as the data
            module resizes and in the trainer's precision.
        loss: (logits float [N, C, H, W], target uint8 [N, H, W]) -> scalar. Not needed to score.
        optimizer: `optimizer(parameters)`, as a partial.
        scheduler: A partial, see `seg_torch.training.schedulers.scheduler_config`.
        aux_weight: Weight of the loss of the auxiliary head, where there is one.
        description: What `seg_torch.checkpoints.checkpoint` needs to build the network again.
        warmup_steps: First optimizer steps, with (step + 1) / warmup_steps of the scheduled rate.
        max_steps: Optimizer steps after which training stops; -1: as many as its epochs have.
        seed: Of what is random inside the network, such as dropout.
        average_precision: Score it in tests, too.
        boundary: Score boundaries in tests, too; a width in pixels, or true for 2 % of the
            diagonal.
        label_quality: Score the labels of each image in tests, too.
        benchmark: Let cuDNN try its algorithms for the training images, and remember the fastest.
    """

    def __init__(
        self,
        network: Network,
        labels: Labels,
        inference: Inference | None = None,
        loss: nn.Module | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        aux_weight: float = 0.5,
        description: dict[str, Any] | None = None,
        warmup_steps: int = 0,
        max_steps: int = -1,
        seed: int = 0,
        average_precision: bool = False,
        boundary: bool | int = False,
        label_quality: bool = False,
        benchmark: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.labels = labels
        self.inference: Any = inference
        self.loss = loss
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.aux_weight = aux_weight
        self.description = description
        self.warmup_steps = warmup_steps
        self.max_steps = max_steps
        self.seed = seed
        self.benchmark = benchmark
        self.confusion = ConfusionMatrix(len(labels))
        self.average_precision = AveragePrecision(len(labels)) if average_precision else None
        width = None if boundary is True else boundary
        self.boundary = BoundaryScores(len(labels), width) if boundary else None
        self.calibration = Calibration()
        self.label_quality: LabelQuality | None = None
        self.scores_labels = label_quality
        self.validation_loss = MeanMetric(nan_strategy="disable")
        self.finite_batches = torch.tensor(0)  # of the validation, before the first that is not
        self.step_losses = torch.empty(0)  # of the epoch's batches so far
        self.validated = False  # in this epoch
        self.test_report: dict[str, Any] | None = None
        self.test_images: dict[str, np.ndarray] = {}  # see ImageScores

    def setup(self, stage: str) -> None:
        if self.inference is None:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            precision = str(self.trainer.precision)
            self.inference = Inference(
                self.network, len(self.labels), data.resize, precision=precision
            )
        if stage != "fit" or self.loss is None:
            return
        if isinstance(self.loss, ModelLoss) and not hasattr(self.network.model, "has_own_loss"):
            raise InputError(
                "loss=model: this model brings no loss of its own, as model=mask2former does; use "
                "another loss"
            )
        for loss in self.loss.modules():
            if isinstance(loss, CrossEntropyLoss) and loss.needs_pixel_counts:
                data = self.trainer.datamodule  # type: ignore[attr-defined]
                counts = data.pixel_counts() if self.trainer.is_global_zero else torch.empty(0)
                loss.set_pixel_counts(self.trainer.strategy.broadcast(counts))

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.network, FSDPModule):
            self.network.to(memory_format=torch.contiguous_format)  # which FSDP insists on
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def on_train_epoch_start(self) -> None:
        self.validated = False

    def on_train_batch_start(self, batch: Sample, batch_index: int) -> None:
        torch.backends.cudnn.benchmark = self.benchmark
        # By epoch and batch, so that a resumed run goes on with the numbers of an undisturbed one.
        place = [self.seed, self.current_epoch, batch_index, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def training_step(self, batch: Sample, batch_index: int) -> Tensor:
        assert self.loss is not None
        images, masks = batch
        own = isinstance(self.loss, ModelLoss)
        outputs = self.network(images, masks) if own else self.network(images)
        loss = outputs["loss"] if own else upsampled_loss(self.loss, outputs["out"], masks)
        if "aux" in outputs:
            loss = loss + self.aux_weight * upsampled_loss(self.loss, outputs["aux"], masks)
        self.step_losses = torch.cat(
            [self.step_losses[:batch_index].to(loss.device), loss.detach()[None]]
        )
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Sample, batch_index: int) -> None:
        last = batch_index + 1 == self.trainer.num_training_batches
        if 0 < self.max_steps <= self.global_step:
            self.trainer.should_stop = last = True  # after a last validation
        if last or (batch_index + 1) % LOOK_EVERY == 0:
            self.check_training()

    def check_training(self) -> None:
        """End the run where a loss or weight is no longer a number, before it is saved.

        Raises:
            InputError: In all processes, if a loss of this epoch in any of them is not finite, or
                a weight.
        """
        losses = self._losses_by_rank()
        wrong = (~losses.isfinite()).T.nonzero()
        if len(wrong):
            batch, rank = wrong[0].tolist()
            self._refuse("train", batch, rank, f"the training loss is {losses[rank, batch]:g}")
        norm = nn.utils.get_total_norm(self.parameters())
        if isinstance(norm, DTensor):  # FSDP
            norm = norm.full_tensor()
        norms: Any = self.all_gather(norm)
        if not norms.isfinite().all():  # a gradient was not: the next loss would not be, either
            self._refuse("train", losses.shape[1] - 1, 0, "the weights are no longer numbers")

    def training_loss(self) -> float:
        """Return the mean over the epoch's batches so far, of all processes."""
        return self._losses_by_rank().cpu().double().mean().item()

    def _losses_by_rank(self) -> Tensor:
        gathered: Any = self.all_gather(self.step_losses)
        return gathered.view(self.trainer.world_size, -1)

    def on_train_epoch_end(self) -> None:
        self.log("train/loss_epoch", self.training_loss())
        plateau = self.lr_schedulers()
        if isinstance(plateau, torch.optim.lr_scheduler.ReduceLROnPlateau) and self.validated:
            plateau.step(self.trainer.callback_metrics["val/loss"])

    def on_validation_start(self) -> None:
        torch.backends.cudnn.benchmark = False  # the images have several sizes
        if self.trainer.world_size > 1:
            # Where BatchNorm is not synchronised, each process has running statistics of its own.
            # A checkpoint holds those of the first, and they are what is scored.
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, groups: Sequence[EvaluationGroup], batch_index: int) -> None:
        for images, masks, _ in groups:
            for index, rows, columns, logits in self.inference.blocks(images, masks.shape[-2:]):
                mask = masks[index, rows, columns]
                self.confusion.update(decide(logits)[0], mask)
                if self.loss is not None:
                    loss = self.loss(logits[None], mask[None])
                    share = torch.full_like(loss, mask.numel() / masks[index].numel())
                    self.validation_loss.update(loss, share)  # of a float, it waits for the GPU
        total = self.validation_loss.mean_value
        self.finite_batches = self.finite_batches.to(total.device) + total.isfinite()

    def on_validation_epoch_end(self) -> None:
        counts = self.confusion.compute()
        if not counts.any() and not self.trainer.sanity_checking:
            raise InputError("no pixel of the validation images is labelled: nothing can be scored")
        results = scores(counts)
        self.confusion.reset()
        # Every process holds the same numbers here: the confusion matrix has been added up.
        self.log("val/mean_iou", results["mean_iou"].float(), prog_bar=True)
        for name in ("pixel_accuracy", "mean_accuracy", "mean_dice"):
            self.log(f"val/{name}", results[name].float())
        if self.validation_loss.update_called or self.trainer.world_size > 1:
            loss = self.validation_loss.compute()
            self.log("val/loss", loss, prog_bar=True)
            if not self.trainer.sanity_checking and not loss.isfinite():
                self._refuse_validation(f"the validation loss is {loss:g}")
        self.validation_loss.reset()
        self.finite_batches.zero_()
        self.validated = True

    def on_test_start(self) -> None:
        torch.backends.cudnn.benchmark = False
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        num_images = len(data.dataset(data.test_split))
        self.image_scores = ImageScores(len(self.labels), num_images).to(self.device)
        if self.scores_labels:
            self.label_quality = LabelQuality(num_images).to(self.device)

    def test_step(self, groups: Sequence[EvaluationGroup], batch_index: int) -> None:
        for images, masks, numbers in groups:
            predictions = torch.empty_like(masks)
            for index, rows, columns, logits in self.inference.blocks(images, masks.shape[-2:]):
                mask = masks[index, rows, columns]
                prediction = predictions[index, rows, columns] = decide(logits)[0]
                self.confusion.update(prediction, mask)
                confidence = confidence_steps(logits)
                self.image_scores.update(numbers[index], prediction, mask, confidence)
                self.calibration.update(prediction, mask, confidence)
                if self.label_quality is not None:
                    self.label_quality.update(numbers[index], logits, mask)
                if self.average_precision is not None:
                    self.average_precision.update(logits[None].float().softmax(1), mask[None])
            if self.boundary is not None:
                for prediction, mask in zip(predictions, masks, strict=True):
                    self.boundary.update(prediction, mask)

    def on_test_epoch_end(self) -> None:
        others = {}
        if self.average_precision is not None:
            others["average_precision"] = self.average_precision.compute()
            self.average_precision.reset()
        if self.boundary is not None:
            others |= self.boundary.compute()
            self.boundary.reset()
        self.test_report = report(self.confusion.compute(), self.labels.names, others)
        self.test_report |= self.calibration.compute()
        self.calibration.reset()
        self.test_report["precision"] = self.inference.precision
        self.test_images = self.image_scores.compute()
        if self.label_quality is not None:
            self.test_images["label_quality"] = self.label_quality.compute()
        self.confusion.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        assert self.make_optimizer is not None
        options = dict(getattr(self.make_optimizer, "keywords", {}))
        parts = {key: options.pop(key) for key in PARTS if key in options}
        lr: Any = options.get("lr")
        groups = parameter_groups(self.network.model, lr, **parts)
        learnt = [] if self.loss is None else [p for p in self.loss.parameters() if p.requires_grad]
        if not groups:
            raise InputError("all of the model's weights are frozen: there is nothing to train")
        groups[0]["params"] += learnt
        # One pass over all parameters, several times as fast. It cannot be combined with clipping,
        # nor PyTorch's for SGD with shared-out weights (FSDP).
        function = getattr(self.make_optimizer, "func", self.make_optimizer)
        can_fuse = "fused" in inspect.signature(function).parameters
        whole = self.device_mesh is None and not self.trainer.gradient_clip_val
        if can_fuse and whole:
            options.setdefault("fused", True)
        optimizer = function(groups, **options)
        if self.make_scheduler is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        steps = min(steps, self.max_steps) if self.max_steps > 0 else steps
        if steps == math.inf:
            raise InputError("a schedule has a length: set trainer.max_epochs or trainer.max_steps")
        config = scheduler_config(self.make_scheduler, optimizer, int(steps))
        if config["reduce_on_plateau"]:
            # Stepped in on_train_epoch_end: Lightning would do it after the epoch's checkpoint is
            # saved, and not at all in the first epoch of a resumed run.
            config["frequency"] = sys.maxsize
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value]

    def optimizer_step(
        self, epoch: int, batch_index: int, optimizer: Any, closure: Callable[[], Any] | None = None
    ) -> None:
        scheduled = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= min(1, (self.global_step + 1) / max(self.warmup_steps, 1))
        super().optimizer_step(epoch, batch_index, optimizer, closure)
        for group, lr in zip(optimizer.param_groups, scheduled, strict=True):
            group["lr"] = lr

    def on_save_checkpoint(self, state: dict[str, Any]) -> None:
        if self.description is not None:
            state[checkpoint.KEY] = self.description
        state["step_losses"] = self._losses_by_rank()
        if self.trainer.validating:
            # What validation has counted so far is not saved, so it begins again on resuming.
            # Lightning tells by these numbers that the epoch's training is complete.
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress = state["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            progress.update(total=begun.copy(), current=begun.copy(), is_last_batch=False)

    def on_load_checkpoint(self, state: dict[str, Any]) -> None:
        by_rank = state["step_losses"]
        self.step_losses = by_rank[min(self.global_rank, len(by_rank) - 1)]
        # The schedule is as long as this run, which may go on for more epochs than the first.
        for scheduler in state["lr_schedulers"]:
            for key in ("total_steps", "_schedule_phases"):
                scheduler.pop(key, None)

    def _refuse_validation(self, found: str) -> None:
        batch = int(self.finite_batches)
        own = batch if batch < self.trainer.num_val_batches[0] else -1
        by_rank: Any = self.all_gather(torch.tensor([own]))
        batch, rank = (int(value) for value in by_rank.view(-1).max(0))
        self._refuse("val", batch, rank, found)

    def _refuse(self, split: str, batch: int, rank: int, found: str) -> NoReturn:
        """End the run in all processes, with the batch and what is in it in the run's folder."""
        folder = Path(self.trainer.default_root_dir)
        found += f" at batch {batch + 1} of epoch {self.current_epoch + 1}"
        if self.trainer.world_size > 1:
            found += f" in process {rank}"
        losses = self._losses_by_rank()[rank].tolist()
        if split == "train":
            losses = losses[: batch + 1]
        saved = ""
        if self.trainer.is_global_zero:
            saved = save_batch(folder / "diverged", self.trainer, split, batch, rank, found, losses)
        self.trainer.strategy.barrier()
        raise InputError(
            f"{found}: the training has diverged. {saved}{folder / 'checkpoints'} holds what was "
            "before. Start a new run with a lower optimizer.lr or trainer.gradient_clip_val=1; or, "
            f"if a file is at fault, mend it and {next_step(folder)}"
        )

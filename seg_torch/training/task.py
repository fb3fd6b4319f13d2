"""SegmentationTask: loss, optimizer and validation scores of a network, for Lightning's Trainer."""

import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from seg_torch.checkpoints import checkpoint
from seg_torch.data.sampling import EvaluationGroup, Sample
from seg_torch.errors import InputError
from seg_torch.labels import Labels
from seg_torch.losses import CrossEntropyLoss, ModelLoss, upsampled_loss
from seg_torch.losses.images import ImageLoss, MeanImageLoss
from seg_torch.metrics import ConfusionMatrix, scores
from seg_torch.models.base import EncoderModel
from seg_torch.models.network import Network, check_outputs
from seg_torch.prediction.inference import Inference, InferenceSettings, decide
from seg_torch.training.optimizers import (
    PARTS,
    arguments,
    build_optimizer,
    parameter_groups,
)
from seg_torch.training.schedulers import scheduler_config
from seg_torch.training.trainer import shard

log = logging.getLogger(__name__)


class SegmentationTask(LightningModule):
    """Trains a network, and scores it in validation.

    Args:
        network: What is trained.
        labels: Its classes.
        loss: (logits float [N, C, H, W], target uint8 [N, H, W]) -> scalar.
        optimizer: `optimizer(parameters)`, as a partial.
        scheduler: A partial, see `seg_torch.training.schedulers.scheduler_config`.
        aux_weight: Weight of the loss of the auxiliary head, where there is one.
        description: What `seg_torch.checkpoints.checkpoint` needs to build the network again.
        warmup_steps: First optimizer steps, with (step + 1) / warmup_steps of the scheduled rate.
        max_steps: Optimizer steps after which training stops; -1: as many as its epochs have.
        seed: Of what is random inside the network, such as dropout.
        benchmark: Let cuDNN try its algorithms for the training images, and remember the fastest.

    Attributes:
        step_losses: Of the epoch's batches so far, float [batches].
        validated: Whether the epoch has been validated.
    """

    def __init__(
        self,
        network: Network,
        labels: Labels,
        loss: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., Any] | None = None,
        aux_weight: float = 0.5,
        description: dict[str, Any] | None = None,
        warmup_steps: int = 0,
        max_steps: int = -1,
        seed: int = 0,
        benchmark: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.labels = labels
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
        self.validation_loss = MeanImageLoss()
        self.step_losses = torch.empty(0)
        self.validated = False

    def setup(self, stage: str) -> None:
        """Prepare validation, and the loss, whose class weights may follow from their pixels.

        Raises:
            InputError: The model does not give what it should, or the loss does not fit it, or
                needs files that cannot be used.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        settings = InferenceSettings(precision=str(self.trainer.precision))
        resize = getattr(data, "resize", None)
        self.inference = Inference(self.network, len(self.labels), resize, settings)
        check_outputs(self.network, len(self.labels))
        if stage != "fit":
            return
        if isinstance(self.loss, ModelLoss) and not hasattr(self.network.model, "has_own_loss"):
            raise InputError(
                "loss=model: this model brings no loss of its own, as model=mask2former does; use "
                "another loss"
            )
        for loss in self.loss.modules():
            if isinstance(loss, CrossEntropyLoss) and loss.needs_pixel_counts:
                if not hasattr(data, "pixel_counts"):
                    raise InputError(
                        "loss: weights from the data set need fit(task, datamodule=...), or "
                        "loss.set_pixel_counts(counts) before"
                    )
                counts = data.pixel_counts() if self.trainer.is_global_zero else torch.empty(0)
                loss.set_pixel_counts(self.trainer.strategy.broadcast(counts))

    def configure_model(self) -> None:
        shard(self)

    def on_train_start(self) -> None:
        self._warm_up()
        self._follow_epoch()  # of an epoch that is resumed within, which has no start

    def on_train_epoch_start(self) -> None:
        self.validated = False
        self._follow_epoch()

    def _follow_epoch(self) -> None:
        if isinstance(self.network.model, EncoderModel):
            self.network.model.follow_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: Sample, batch_index: int) -> None:
        torch.backends.cudnn.benchmark = self.benchmark
        # By epoch and batch, so that a resumed run goes on with the numbers of an undisturbed one.
        place = [self.seed, self.current_epoch, batch_index, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def training_step(self, batch: Sample, batch_index: int) -> Tensor:
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

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Make the last batches of an epoch count in full where they are fewer than the others.

        Lightning has divided the loss by `accumulate_grad_batches`, also where these are not as
        many as are left.
        """
        window, batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        rest = batches % window if batches < math.inf else 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        if rest and progress.processed >= batches - rest:
            loss = loss * (window / rest)
        super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(self.network.model, EncoderModel):
            self.network.model.drop_gradients()

    def on_train_batch_end(self, outputs: Any, batch: Sample, batch_index: int) -> None:
        self._warm_up()  # the next step, so that whoever logs the rate logs the one that is used
        if 0 < self.max_steps <= self.global_step:
            self.trainer.should_stop = True  # after a last validation

    def training_loss(self) -> float:
        """Return the mean over the epoch's batches so far, of all processes."""
        return self.losses_by_rank().cpu().double().mean().item()

    def losses_by_rank(self) -> Tensor:
        """Return the losses of the epoch's batches so far, float [processes, batches]."""
        gathered: Any = self.all_gather(self.step_losses)
        return gathered.view(self.trainer.world_size, -1)

    def on_train_epoch_end(self) -> None:
        self.log("train/loss_epoch", self.training_loss())
        plateau = self.lr_schedulers()
        if isinstance(plateau, torch.optim.lr_scheduler.ReduceLROnPlateau) and self.validated:
            loss = self.trainer.callback_metrics.get("val/loss")
            if loss is None:
                raise InputError(
                    "scheduler=plateau: there is no validation loss; use another scheduler or loss"
                )
            with self._scheduled_rates():
                plateau.step(loss)

    def on_validation_start(self) -> None:
        torch.backends.cudnn.benchmark = False  # the images have several sizes
        # Also after a validation that was interrupted.
        self.confusion.reset()
        self.validation_loss.reset()
        if self.trainer.world_size > 1:
            # Where BatchNorm is not synchronised, each process has running statistics of its own.
            # A checkpoint holds those of the first, and they are what is scored.
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, groups: Sequence[EvaluationGroup], batch_index: int) -> None:
        for images, masks, _ in groups:
            blocks = self.inference.blocks(images, masks.shape[-2:])
            for index, of_image in groupby(blocks, lambda block: block.image):
                loss = ImageLoss(self.loss, masks[index])
                for _, rows, columns, logits in of_image:
                    self.confusion.update(decide(logits)[0], masks[index, rows, columns])
                    loss.add(rows, columns, logits)
                self.validation_loss.update(loss)

    def on_validation_epoch_end(self) -> None:
        counts = self.confusion.compute()
        if not counts.any() and not self.trainer.sanity_checking:
            raise InputError("no pixel of the validation images is labelled: nothing can be scored")
        results = scores(counts)
        self.confusion.reset()
        # Every process holds the same numbers here: the confusion matrix has been added up.
        for name in ("mean_iou", "pixel_accuracy", "mean_accuracy", "mean_dice"):
            self.log(f"val/{name}", results[name].float(), prog_bar=name == "mean_iou")
        if self.validation_loss.update_called or self.trainer.world_size > 1:
            loss = self.validation_loss.compute()
            if loss is not None:
                self.log("val/loss", loss, prog_bar=True)
        self.validation_loss.reset()
        self.validated = True

    def configure_optimizers(self) -> OptimizerLRScheduler:
        options = dict(getattr(self.make_optimizer, "keywords", {}))
        parts = {key: options.pop(key) for key in PARTS if key in options}
        lr: Any = options.get("lr")
        groups = parameter_groups(self.network.model, lr, **parts)
        if not groups:
            raise InputError("all of the model's weights are frozen: there is nothing to train")
        groups[0]["params"] += [p for p in self.loss.parameters() if p.requires_grad]
        # One pass over all parameters, several times as fast. It cannot be combined with clipping,
        # nor PyTorch's for SGD with shared-out weights (FSDP).
        function: Any = getattr(self.make_optimizer, "func", self.make_optimizer)
        whole = self.device_mesh is None and not self.trainer.gradient_clip_val
        whole = whole and not options.get("foreach")  # another way, which the user asks for
        if whole and "fused" in arguments(function):
            options.setdefault("fused", True)
        optimizer = build_optimizer(function, groups, options)
        steps = self.trainer.estimated_stepping_batches
        if steps < self.max_steps:
            log.info(
                "trainer.max_epochs=%d ends the training after %d steps, before trainer.max_steps; "
                "with trainer.max_epochs=-1 it has all %d",
                *(self.trainer.max_epochs, steps, self.max_steps),
            )
        if self.make_scheduler is None:
            return optimizer
        steps = min(steps, self.max_steps) if self.max_steps > 0 else steps
        if math.isinf(steps):
            raise InputError("a schedule has a length: set trainer.max_epochs or trainer.max_steps")
        config = scheduler_config(self.make_scheduler, optimizer, int(steps))
        if config["reduce_on_plateau"]:
            # Stepped in on_train_epoch_end: Lightning would do it after the epoch's checkpoint is
            # saved, and not at all in the first epoch of a resumed run.
            config["frequency"] = sys.maxsize
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value]

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        with self._scheduled_rates():
            super().lr_scheduler_step(scheduler, metric)

    @contextmanager
    def _scheduled_rates(self) -> Iterator[None]:
        """Enter a context in which the optimizer's rates are those of the schedule alone."""
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group.pop("scheduled_lr", group["lr"])
        yield
        self._warm_up()

    def _warm_up(self) -> None:
        """Scale the rates for the next step. Schedules go on from what they set themselves."""
        share = min(1, (self.global_step + 1) / max(self.warmup_steps, 1))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group.pop("scheduled_lr", group["lr"])
            if share < 1:
                group["scheduled_lr"] = group["lr"]
                group["lr"] *= share

    def on_save_checkpoint(self, state: dict[str, Any]) -> None:
        if self.description is not None:
            state[checkpoint.KEY] = self.description
        state["step_losses"] = self.losses_by_rank()
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

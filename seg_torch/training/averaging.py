"""The moving average of the weights."""

import warnings
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class WeightAverage(WeightAveraging):
    """Keeps an exponential moving average of the weights: validated, saved and scored.

    A checkpoint holds the average where every other one has its weights, and the trained weights
    under `current_model_state`, from which a run is resumed. BatchNorm's statistics are averaged
    like the weights that they belong to; what is no floating-point number, such as a table of
    indices, is that of the trained network.

    Lightning's callback puts the averaged weights in after the task has given BatchNorm's
    statistics of the first process to the others, takes them out before `SampleSheet` draws, and
    mixes the two up in a checkpoint that is saved while it validates. Here they stay in for all of
    the validation.

    Args:
        decay: Of the average in each optimizer step. Source: Polyak & Juditsky (1992); 0.999 in
            most recipes, where a run has many thousand steps.
        device: Of the model.
    """

    def __init__(self, decay: float, device: torch.device) -> None:
        # Not Lightning's EMAWeightAveraging: its arithmetic changes numbers that stay the same,
        # such as frozen weights, and takes several times as long. PyTorch's own function averages
        # integers, too, and cuts off what is behind the point.
        super().__init__(device, multi_avg_fn=partial(average, decay=decay))
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


@torch.no_grad()
def average(averages: list[Tensor], current: list[Tensor], _: Tensor, decay: float) -> None:
    """Move averages towards the current values; both are tensors of one type.

    Args:
        averages: Changed in place.
        current: Of the network that is trained.
        decay: Of the average; what is no floating-point number takes over the current value.
    """
    if averages[0].is_floating_point() or averages[0].is_complex():
        torch._foreach_lerp_(averages, current, 1 - decay)
    else:
        torch._foreach_copy_(averages, current)

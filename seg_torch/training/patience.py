"""Early stopping: a run ends where its score no longer improves."""

import logging
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping

from seg_torch.checkpoints.checkpoint import SCORE
from seg_torch.errors import InputError

log = logging.getLogger(__name__)


class StopWithoutImprovement(EarlyStopping):
    """Ends the training after so many validations in a row without a better score.

    Args:
        patience: Number of validations.
        monitor: The score, that of the best checkpoint.
        mode: Whether the better one is the larger ("max") or the smaller ("min").

    Raises:
        InputError: `patience` is not 1 or more.
    """

    def __init__(self, patience: int, monitor: str = SCORE, mode: str = "max") -> None:
        if not isinstance(patience, int) or patience < 1:
            raise InputError(
                f"patience={patience}: expected a number of validations, 1 or more, or null"
            )
        super().__init__(monitor, patience=patience, mode=mode, check_on_train_epoch_end=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.wait_count >= self.patience and trainer.is_global_zero:
            name = self.monitor.replace("/", " ").replace("mean_iou", "mIoU")
            log.info(
                "patience=%d ends the training: no validation has been better since %s %.4f",
                *(self.patience, name, self.best_score),
            )

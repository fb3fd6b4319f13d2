"""The progress bar of training and scoring on a terminal."""

import logging
import sys
import time
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import callbacks
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

INTERVAL = 0.5  # seconds; reading the loss waits for the GPU
FORMAT = "{desc}: {percentage:3.0f}% |{bar}| {n}/{total}, {remaining} left{postfix}"


class ProgressBar(callbacks.ProgressBar):
    """Shows what is done at the moment on the last line of the terminal, and leaves nothing there.

    Log messages and warnings stay above it. (Lightning's bars show training and validation on two
    lines, count epochs from 0, and are written into by what is logged meanwhile.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.bar = tqdm(disable=True)
        self.shown = 0.0  # when the loss was
        self.redirected = ExitStack()

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.enabled:
            self.redirected.close()
            self.redirected.enter_context(logging_redirect_tqdm())
            logging.captureWarnings(True)
            self.redirected.callback(logging.captureWarnings, False)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.bar.close()
        self.redirected.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    def print(self, *values: Any, **_: Any) -> None:
        self.bar.write(" ".join(map(str, values)))

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready  # of a resumed epoch
        self._start(self._epoch(), self.total_train_batches, done)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        now = time.monotonic()
        if self.enabled and now > self.shown + INTERVAL:
            loss = trainer.progress_bar_metrics.get("train/loss")
            self.bar.set_postfix_str("" if loss is None else f"loss {loss:.3f}", refresh=False)
            self.shown = now
        self.bar.update(index + 1 - self.bar.n)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking:
            self._start("trying validation", sum(trainer.num_sanity_val_batches))
        elif trainer.state.fn == "fit":
            self._start(f"{self._epoch()}, validation", sum(trainer.num_val_batches))
        else:
            self._start("validation", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, *_: Any) -> None:
        self.bar.update()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.bar.close()
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._start(self._epoch(), self.total_train_batches, done)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._start("scoring", sum(trainer.num_test_batches))

    def on_test_batch_end(self, *_: Any) -> None:
        self.bar.update()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.bar.close()

    def on_test_end(self, *_: Any) -> None:
        self.bar.close()

    def _epoch(self) -> str:
        epochs = self.trainer.max_epochs or -1
        return f"epoch {self.trainer.current_epoch + 1}" + f" of {epochs}" * (epochs > 0)

    def _start(self, text: str, total: float, done: int = 0) -> None:
        self.bar.close()
        self.bar = tqdm(
            desc=text,
            total=int(total) if total < float("inf") else None,
            initial=done,
            leave=False,
            dynamic_ncols=True,
            disable=not self.enabled,
            file=sys.stdout,
            bar_format=FORMAT,
        )

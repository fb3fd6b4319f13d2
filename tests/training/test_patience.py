"""`patience`: a run stops early, says so, and is resumed as if undisturbed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback
from omegaconf import OmegaConf
from test_training import assert_same_run, history, resume

from seg_torch.commands.train import train
from seg_torch.errors import InputError
from seg_torch.evaluation.scorer import Scorer
from seg_torch.training.patience import StopWithoutImprovement
from seg_torch.training.run import what_ended

# With these the second epoch is better than the first, and the next two are worse.
NOISY = ("optimizer.lr=1e-2", "scheduler=none", "patience=2", "trainer.max_epochs=8")


class Kill(Callback):
    """Ends the run in its fourth epoch, after one validation that was no better."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 3:
            raise RuntimeError("killed")


def stopped_after(callback: StopWithoutImprovement, values: list[float]) -> int:
    """How many validations with these values there are until the training ends."""
    for number, value in enumerate(values, 1):
        trainer: Any = SimpleNamespace(
            callback_metrics={callback.monitor: torch.tensor(value)},
            current_epoch=number,
            fast_dev_run=False,
            sanity_checking=False,
            should_stop=False,
            state=SimpleNamespace(fn="fit"),
            strategy=SimpleNamespace(reduce_boolean_decision=lambda stop, all: stop),
        )
        callback.on_validation_end(trainer, None)
        if trainer.should_stop:
            return number
    return 0


def test_it_counts_validations_in_a_row_without_a_better_score():
    scores = [0.1, 0.3, 0.2, 0.4, 0.4, 0.39, 0.3, 0.9]
    assert stopped_after(StopWithoutImprovement(1), scores) == 3
    assert stopped_after(StopWithoutImprovement(2), scores) == 6
    assert stopped_after(StopWithoutImprovement(3), scores) == 7
    assert stopped_after(StopWithoutImprovement(4), scores) == 0
    losses = [1 - score for score in scores]
    assert stopped_after(StopWithoutImprovement(2, "val/loss", "min"), losses) == 6


@pytest.mark.promise(22)
def test_a_run_stops_early_and_says_so_also_one_that_was_killed(
    small, tmp_path, monkeypatch, caplog
):
    """Killed in its last epoch and in its test, it ends as the undisturbed one."""
    caplog.set_level("INFO", "seg_torch")
    whole = tmp_path / "whole"
    train(small("train", f"output_dir={whole}", *NOISY))
    scores = [float(row["val_mean_iou"]) for row in history(whole)]
    assert 3 <= len(scores) == scores.index(max(scores)) + 1 + 2 < 8
    text = f"no validation has been better since val mIoU {max(scores):.4f}"
    assert [text in message for message in caplog.messages].count(True) == 1
    with pytest.raises(InputError, match="complete"):
        resume(whole)
    folder = tmp_path / "killed"
    kill = f"+callbacks.kill._target_={Kill.__module__}.{Kill.__name__}"
    with pytest.raises(RuntimeError, match="killed"):
        train(small("train", f"output_dir={folder}", *NOISY, kill))
    assert len(history(folder)) == 3
    config = OmegaConf.load(folder / "config.yaml")
    config.callbacks = {}
    OmegaConf.save(config, folder / "config.yaml")

    def killed(*_: Any) -> None:
        raise RuntimeError("killed in the test")

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "test_step", killed)
        with pytest.raises(RuntimeError, match="killed in the test"):
            resume(folder)
    assert len(history(folder)) == 4
    resume(folder)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("patience", ["0", "-1", "1.5"])
def test_an_impossible_patience_is_refused_before_anything_is_written(small, tmp_path, patience):
    with pytest.raises(InputError, match=f"patience={patience}: expected a number of validations"):
        train(small("train", f"patience={patience}"))
    assert not Path(tmp_path, "run", "config.yaml").exists()


@pytest.mark.parametrize("max_epochs", [None, -1])
def test_without_a_number_of_epochs_the_steps_end_a_run(max_epochs):
    trainer = OmegaConf.create({"max_epochs": max_epochs, "max_steps": 10})
    progress = {"epoch_progress": {"current": {"processed": 3}}}
    state = {"loops": {"fit_loop": progress}, "callbacks": {}}
    assert what_ended({**state, "global_step": 9}, trainer) == ""
    assert what_ended({**state, "global_step": 10}, trainer) == "trainer.max_steps=10"

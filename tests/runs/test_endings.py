"""What ends a run, what is left to do then, and what would end it is said before it begins."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_DATA, SMALL_UNET, run_command
from lightning import Callback
from omegaconf import OmegaConf

from seg_torch import Segmenter
from seg_torch.checkpoints import checkpoint
from seg_torch.cli.overrides import complete_overrides
from seg_torch.commands.evaluate import evaluate
from seg_torch.commands.train import train
from seg_torch.data import SegmentationDataModule
from seg_torch.datasets import shapes
from seg_torch.errors import InputError
from seg_torch.evaluation.scorer import Scorer
from seg_torch.training.run import COLUMNS, claim, read_table, resumed_config

ONE_STEP = (
    *SMALL_DATA,
    "data.dataset.train=4",
    "data.dataset.val=1",
    "data.dataset.test=1",
)
ONE_EPOCH = ("logger=none", "trainer.max_epochs=1")


def steps(folder: Path) -> list[int]:
    """After each epoch of a run."""
    return [row["step"] for row in read_table(folder / "metrics.csv", COLUMNS)]


def resume(folder: Path, *overrides: str) -> float | None:
    """Goes on with a run as the command line does; settings of the trainer may be set anew."""
    values = dict(override.removeprefix("trainer.").split("=") for override in overrides)
    values = {key: int(value) if value.isdigit() else value for key, value in values.items()}
    cfg = OmegaConf.create({"resume": str(folder), "trainer": values})
    return train(resumed_config(cfg, overrides))


def confusion(weights: Path) -> list[list[int]]:
    """Of the test images, from the masks that a checkpoint predicts."""
    segmenter, matrix = Segmenter.load(weights, precision="32-true"), np.zeros((6, 6), int)
    for index in range(3):
        image, mask = shapes("test", 32)[index]
        predicted = segmenter.predict(image).mask
        np.add.at(matrix, (mask.numpy()[mask != 255], predicted[mask.numpy() != 255]), 1)
    return matrix.tolist()


def scored(folder: Path) -> list[list[int]]:
    return OmegaConf.load(folder / "test_metrics.json").confusion_matrix


class Killed(Exception):  # noqa: N818
    pass


def die(*_: object) -> None:
    raise Killed


# Without a best epoch; and with one


@pytest.mark.parametrize("validation", ["trainer.limit_val_batches=0", "trainer.precision=32"])
def test_e02_a_run_that_was_killed_in_its_test_is_scored_as_it_was_trained(
    small, tmp_path, monkeypatch, caplog, validation
):
    caplog.set_level("INFO")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "test_step", die)
        with pytest.raises(Killed):
            train(small("train", *ONE_EPOCH, validation))
    best = resume(folder)
    name = "last" if "limit" in validation else "best"
    assert (folder / "checkpoints/best.ckpt").exists() == (name == "best")
    assert scored(folder) == confusion(folder / f"checkpoints/{name}.ckpt")
    (row,) = read_table(folder / "metrics.csv", COLUMNS)
    assert best == row.get("val_mean_iou"), "which Optuna searches by"
    told = folder if name == "best" else folder / "checkpoints/last.ckpt"
    assert f"predict checkpoint={told} input=IMAGES" in caplog.text
    assert checkpoint.locate(told).is_file()


# Time and steps


class Slow(Callback):
    """Takes half a second for each step."""

    def on_train_batch_start(self, *_: object) -> None:
        time.sleep(0.5)


def test_e11_a_run_that_its_time_ended_says_so_and_goes_on_with_more(small, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "run"
    settings = ("trainer.max_time=00:00:00:01", "+callbacks.slow._target_=test_endings.Slow")
    train(small("train", *settings, "logger=none", "trainer.check_val_every_n_epoch=2"))
    (done,) = steps(folder)
    assert done < 3, "a step takes half a second"
    assert "trainer.max_time has ended the training in epoch 1" in caplog.text
    with pytest.raises(InputError, match=r"complete, by trainer.max_time=00:00:00:01 "):
        resume(folder)
    (folder / "test_metrics.json").unlink()
    resume(folder)  # as if killed in the test
    assert (steps(folder), (folder / "test_metrics.json").exists()) == ([done], True)
    resume(folder, "trainer.max_time=00:01:00:00")
    assert steps(folder) == [done, done + 3]


@pytest.mark.parametrize(
    "setting",
    ["trainer.max_time=null", "trainer.max_steps=9", "data.cache=none", "data.eval_batch_size=1"],
)
def test_e11_what_changes_no_result_may_be_set_anew(tmp_path, setting):
    complete = complete_overrides("train", [f"resume={tmp_path}", setting])
    assert f"++{setting}" in complete


def test_a_run_that_stopped_early_is_not_trained_on_when_it_was_killed_in_its_test(small, tmp_path):
    folder = tmp_path / "run"
    stop = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, patience: 1, "
    stop += "monitor: val/loss, min_delta: 100}"
    train(small("train", stop, "logger=none", "trainer.max_epochs=4"))
    assert steps(folder) == [3, 6]
    with pytest.raises(InputError, match="complete, by early stopping after epoch 2"):
        resume(folder)
    (folder / "test_metrics.json").unlink()
    resume(folder)
    assert steps(folder) == [3, 6]
    assert scored(folder) == confusion(folder)


def test_e24_the_steps_that_are_asked_for_are_more_than_the_epochs_by_default(tmp_path, capsys):
    """The demo has twelve epochs; what is set on purpose holds, and is told."""
    line = ["train", *ONE_STEP, *SMALL_UNET, "trainer.accelerator=cpu", "trainer.precision=32"]
    line += ["trainer.check_val_every_n_epoch=50", "logger=none", "trainer.max_steps=13"]
    assert run_command(" ".join([*line, "output_dir=a"]), tmp_path) == 0
    assert steps(tmp_path / "a")[-1] == 13
    assert "before trainer.max_steps" not in capsys.readouterr().out
    assert run_command(" ".join([*line, "output_dir=b", "trainer.max_epochs=2"]), tmp_path) == 0
    assert steps(tmp_path / "b") == [1, 2]
    assert "trainer.max_epochs=2 ends the training after 2 steps" in capsys.readouterr().out


# The process after a job


def test_e26_a_job_leaves_the_process_as_it_was(small, compose, tmp_path, monkeypatch):
    """The next one of a sweep computes in the same ways as if it had come first."""

    def flags() -> list[object]:
        cudnn = torch.backends.cudnn
        return [
            *(torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark),
            *(torch.are_deterministic_algorithms_enabled(), cudnn.deterministic),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ]

    seen, before = [], flags()
    plain = Scorer.test_step
    monkeypatch.setattr(
        Scorer, "test_step", lambda *arguments: seen.append(flags()) or plain(*arguments)
    )
    train(small("train", *ONE_EPOCH, "trainer.deterministic=warn"))
    assert seen[0] != before, "nothing was changed"
    assert flags() == before
    options = (f"checkpoint={tmp_path / 'run'}", f"output_dir={tmp_path / 'e'}")
    evaluate(compose("evaluate", *options, "trainer.deterministic=warn"))
    assert flags() == before


# Settings that cannot be, before the data are read


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("trainer.strategy=ddp_spawn", "trainer.strategy=ddp_spawn: .* use trainer.strategy=ddp"),
        ("trainer.strategy=ddp_fork", "trainer.strategy=ddp_fork: .* use trainer.strategy=ddp"),
        ("trainer.strategy=ddp_notebook", "ddp_notebook: .* in a notebook start the command"),
        ("+optimizer.differentiable=true", "optimizer.differentiable=true .* leave it out"),
        ("trainer.val_check_interval=4", "val_check_interval=4: an epoch has only 3 batches; "),
        ("seed=-1", "seed=-1: expected a whole number from 0 to 4294967295"),
        ("data.seed=-1", "data.seed=-1: expected a whole number"),
    ],
)
def test_e34_settings_that_cannot_be_are_refused_before_the_data_are_read(
    small, tmp_path, monkeypatch, setting, message
):
    def read(self):
        raise AssertionError("read the data")

    monkeypatch.setattr(SegmentationDataModule, "check_files", read)
    with pytest.raises(InputError, match=message):
        train(small("train", setting))
    assert not (tmp_path / "run").exists()


def test_e34_an_optimizer_takes_another_way_than_the_fused_one_where_it_is_told(small, tmp_path):
    train(small("train", *ONE_STEP, *ONE_EPOCH, "+optimizer.foreach=true"))
    (state,) = checkpoint.read(tmp_path / "run/checkpoints/last.ckpt")["optimizer_states"]
    assert state["param_groups"][0]["foreach"]
    assert not state["param_groups"][0]["fused"]


def test_e58_a_run_does_not_delete_the_checkpoint_that_it_begins_with(tmp_path):
    """Nor that of a finished run whose last.ckpt was deleted to save space."""
    best = tmp_path / "run/checkpoints/best.ckpt"
    best.parent.mkdir(parents=True)
    best.write_bytes(b"weights")
    (tmp_path / "link").symlink_to("run", target_is_directory=True)
    for source in ("run", "run/checkpoints/best.ckpt", "link"):
        with pytest.raises(InputError, match=r"holds init_from=.*: choose another"):
            claim(tmp_path / "run", OmegaConf.create(), None, str(tmp_path / source))
    (tmp_path / "run/test_metrics.json").write_text("{}")
    with pytest.raises(InputError, match="holds a finished run"):
        claim(tmp_path / "run", OmegaConf.create(), None, None)
    assert best.read_bytes() == b"weights"
    (tmp_path / "run/test_metrics.json").unlink()
    claim(tmp_path / "run", OmegaConf.create(), None, str(tmp_path))  # as a killed run left it
    assert not best.exists()

"""The main job end to end: train, stop, resume, fine-tune, evaluate, predict."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback
from make_data import make_camvid
from omegaconf import OmegaConf
from PIL import Image

from seg_torch import checkpoint
from seg_torch.cli import CONFIG_FOLDER, complete_overrides
from seg_torch.commands.evaluate import evaluate
from seg_torch.commands.predict import predict
from seg_torch.commands.train import train
from seg_torch.datasets import shapes, write_folder
from seg_torch.errors import InputError, StoppedError
from seg_torch.run import resumed_config


def history(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return checkpoint.network_state(checkpoint.read(folder / "checkpoints" / f"{name}.ckpt"))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a, second[k]) for k, a in first.items())


def test_a_run_leaves_what_the_design_promises(small, tmp_path):
    train(small("train"))
    run = tmp_path / "run"
    for name in (
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "metrics.csv",
        "test_metrics.json",
        "curves.png",
        "samples/epoch_000.png",
        "samples/epoch_001.png",
    ):
        assert (run / name).stat().st_size > 0, name
    assert len(history(run)) == 2
    assert OmegaConf.load(run / "config.yaml").trainer.max_epochs == 2
    report = json.loads((run / "test_metrics.json").read_text())
    matrix = np.array(report["confusion_matrix"])
    assert report["pixel_accuracy"] == pytest.approx(np.trace(matrix) / matrix.sum())
    labelled = sum(int((np.asarray(shapes("test", 32)[i][1]) != 255).sum()) for i in range(3))
    assert matrix.sum() == labelled


def test_a_seed_gives_the_same_run_twice_and_another_seed_another(small, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(small("train", f"output_dir={tmp_path / name}", f"seed={seed}"))
    assert history(tmp_path / "a") == history(tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_a_run_is_not_overwritten_by_another(small, tmp_path):
    train(small("train"))
    before = (tmp_path / "run/metrics.csv").read_bytes()
    with pytest.raises(InputError, match="holds a run already"):
        train(small("train", "seed=5"))
    assert (tmp_path / "run/metrics.csv").read_bytes() == before


@pytest.mark.promise(18)
@pytest.mark.parametrize("weights_from", ["dataset", "image", "[1,2,1,1,1,1]"])
def test_class_weights_of_every_origin_train(small, tmp_path, weights_from):
    train(
        small("train", "loss=weighted_ce", f"loss.weights={weights_from}", "trainer.max_epochs=1")
    )
    assert len(history(tmp_path / "run")) == 1


OPTIMIZERS = sorted(p.stem for p in (CONFIG_FOLDER / "optimizer").iterdir())
SCHEDULERS = sorted(p.stem for p in (CONFIG_FOLDER / "scheduler").iterdir())


@pytest.mark.parametrize(
    "choice", [*(f"optimizer={o}" for o in OPTIMIZERS), *(f"scheduler={s}" for s in SCHEDULERS)]
)
def test_every_optimizer_and_every_schedule_trains(small, tmp_path, choice):
    train(small("train", choice, "trainer.max_epochs=1", "trainer.limit_train_batches=2"))
    assert history(tmp_path / "run")[0]["step"] == "2"


# Stopping and going on, with the defaults of the hardware: its precision, and worker processes,
# which read ahead.

ROOT = Path(__file__).parents[1]
DEFAULTS = (
    "data.dataset.size=64",
    "data.dataset.train=40",
    "data.dataset.val=8",
    "data.dataset.test=4",
    "data.batch_size=4",
    "data.cache=false",  # as for datasets in files; the demo's needs no workers
    "trainer.max_epochs=3",
)


def start(*overrides: str) -> subprocess.Popen:
    """Starts train.py as a user does."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_second_epoch(*overrides: str) -> subprocess.Popen:
    """Starts train.py and returns at a random moment after its first epoch."""
    process = start(*overrides)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1"):
            break
    time.sleep(random.uniform(0, 1))
    return process


def resume(folder: Path, max_epochs: int | None = None) -> None:
    """Goes on with a run in this process."""
    cfg = OmegaConf.create({"resume": str(folder), "trainer": {"max_epochs": max_epochs}})
    train(resumed_config(cfg, [f"trainer.max_epochs={max_epochs}"] if max_epochs else []))


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def plain_content(folder: Path) -> dict[str, object]:
    """All of last.ckpt by the path of each value, but for the names of files."""
    flat: dict[str, object] = {}

    def walk(prefix: str, node: object) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(f"{prefix}/{key}", value)
        elif isinstance(node, list | tuple):
            for i, value in enumerate(node):
                walk(f"{prefix}/{i}", value)
        elif "path" not in prefix and "best_k_models" not in prefix:
            flat[prefix] = node

    walk("", checkpoint.read(folder / "checkpoints/last.ckpt"))
    return flat


def assert_same_run(folder: Path, other: Path) -> None:
    """Weights, optimizer, schedule and progress of two runs, and what they wrote, are equal."""
    first, second = plain_content(folder), plain_content(other)
    assert first.keys() == second.keys()
    different = [
        key
        for key, value in first.items()
        if not (
            torch.equal(value, second[key])
            if isinstance(value, torch.Tensor)
            else value == second[key]
        )
    ]
    assert not different
    assert same(weights(folder, "best"), weights(other, "best"))
    for name in ("metrics.csv", "test_metrics.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(f"output_dir={folder}", *DEFAULTS))
    assert len(history(folder)) == 3
    return folder


def test_d02_killed_at_any_moment_and_resumed_equals_undisturbed(undisturbed, tmp_path):
    """Killed by kill -9 at a random moment of the second epoch."""
    folder = tmp_path / "killed"
    process = start_second_epoch(f"output_dir={folder}", *DEFAULTS)
    process.kill()
    process.communicate()
    # "epoch 1" is printed a moment before the epoch's checkpoint is complete.
    resumable = (folder / "checkpoints/last.ckpt").exists()
    finish(start(f"resume={folder}") if resumable else start(f"output_dir={folder}", *DEFAULTS))
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_d02_ten_random_kills(tmp_path):
    """Wherever kill -9 comes in five epochs, as often as it comes before the end."""
    options = (*DEFAULTS, "trainer.max_epochs=5")
    begun = time.monotonic()
    finish(start(f"output_dir={tmp_path / 'whole'}", *options))
    duration = time.monotonic() - begun
    for number in range(10):
        folder = tmp_path / f"killed_{number}"
        process = start(f"output_dir={folder}", *options)
        time.sleep(random.uniform(0.3, 1) * duration)
        process.kill()
        process.communicate()
        if not (folder / "checkpoints/last.ckpt").exists():
            finish(start(f"output_dir={folder}", *options))  # nothing to go on from
        elif not (folder / "test_metrics.json").exists():
            finish(start(f"resume={folder}"))
        assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_d16_a_signal_saves_the_very_step_from_which_the_run_goes_on(undisturbed, tmp_path, signum):
    """In the second epoch; during validation: see the next test."""
    folder = tmp_path / "stopped"
    process = start_second_epoch(f"output_dir={folder}", *DEFAULTS)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + signum, output
    assert f"go on with resume={folder}" in output
    assert "Traceback" not in output
    finish(start(f"resume={folder}"))
    assert_same_run(folder, undisturbed)


def test_d16_a_signal_during_validation_loses_no_step(small, tmp_path, monkeypatch):
    from seg_torch.task import SegmentationTask

    plain = SegmentationTask.validation_step

    def validate(task, groups, index):
        if task.current_epoch == 1 and not task.trainer.sanity_checking and index == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        plain(task, groups, index)

    options = ("trainer.max_epochs=3", "scheduler=plateau", "scheduler.patience=0")
    train(small("train", f"output_dir={tmp_path / 'whole'}", *options))
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "validation_step", validate)
        with pytest.raises(StoppedError, match="epoch 2"):
            train(small("train", f"output_dir={folder}", *options))
    steps = checkpoint.read(folder / "checkpoints/last.ckpt")["global_step"]
    assert steps == 6  # both epochs of three
    resume(folder)
    assert_same_run(folder, tmp_path / "whole")


def test_d06_d07_resuming_goes_on_in_the_same_folder_until_there_is_nothing_left(small, tmp_path):
    train(small("train"))
    folder = tmp_path / "run"
    before = history(folder)
    with pytest.raises(InputError, match="complete"):
        resume(folder)
    resume(folder, max_epochs=3)
    assert history(folder)[:2] == before
    assert len(history(folder)) == 3
    best = max(float(row["val_mean_iou"]) for row in history(folder))
    saved = checkpoint.read(folder / "checkpoints/last.ckpt")["callbacks"]
    (score,) = [s["best_model_score"] for s in saved.values() if s.get("monitor")]
    assert score.item() == pytest.approx(best)


@pytest.mark.promise(22)
@pytest.mark.parametrize("setting", ["optimizer.lr=1", "optimizer=sgd", "seed=3", "model=fcn"])
def test_d07_d18_what_would_change_a_resumed_run_is_refused_by_name(tmp_path, setting):
    with pytest.raises(InputError, match=f"own settings; {setting.split('=')[0]} would"):
        complete_overrides("train", [f"resume={tmp_path}", setting, "trainer.devices=1"])


def test_d25_resuming_fetches_no_weights(small, tmp_path, monkeypatch):
    """The run's own weights are in its checkpoint."""
    train(small("train"))
    folder = tmp_path / "run"
    config = OmegaConf.load(folder / "config.yaml")
    config.model.weights = "imagenet"  # as if it had been trained from there
    OmegaConf.save(config, folder / "config.yaml")

    def fetch(*arguments):
        raise AssertionError("asked for weights")

    monkeypatch.setattr("seg_torch.models.weights.download_from_hugging_face", fetch)
    resume(folder, max_epochs=3)
    assert len(history(folder)) == 3


@pytest.mark.promise(28)
def test_d03_a_loss_that_is_no_number_ends_the_run_and_is_never_best(small, tmp_path):
    folder = tmp_path / "run"
    options = ("scheduler=none", "optimizer=sgd", "trainer.max_epochs=3")
    train(small("train", *options))
    good = weights(folder, "best")
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    state["optimizer_states"][0]["param_groups"][0]["lr"] = 1e30
    torch.save(state, folder / "checkpoints/last.ckpt")
    (folder / "test_metrics.json").unlink()
    with pytest.raises(InputError, match="epoch 4: the training has diverged"):
        resume(folder, max_epochs=6)
    assert len(history(folder)) == 3
    assert same(weights(folder, "best"), good)
    for name in ("best", "last"):
        assert all(value.isfinite().all() for value in weights(folder, name).values())
    assert not (folder / "test_metrics.json").exists()


def test_d08_epochs_without_validation_have_no_scores(small, tmp_path):
    """The schedule that looks at the validation loss (D22) works, too."""
    options = ("trainer.max_epochs=4", "trainer.check_val_every_n_epoch=2", "scheduler=plateau")
    train(small("train", *options))
    assert [bool(row["val_loss"]) for row in history(tmp_path / "run")] == [False, True] * 2


# Fine-tuning


def test_d04_fine_tuning_on_another_folder_trains_all_its_epochs(small, compose, tmp_path, caplog):
    for name, seed in (("first", 0), ("second", 1)):
        write_folder(
            shapes("train", 32, train=8, seed=seed), shapes("train").labels, tmp_path / name
        )
    options = ("data=folder", "model=unet_random", "data.augment.crop=[32,32]", "data.batch_size=2",
               "data.num_workers=0", "trainer.max_epochs=1")  # fmt: skip
    train(
        compose(
            "train", *options, f"data.root={tmp_path / 'first'}", f"output_dir={tmp_path / 'a'}"
        )
    )
    caplog.clear()
    with caplog.at_level("INFO"):
        train(
            compose(
                "train",
                *options,
                f"data.root={tmp_path / 'second'}",
                f"output_dir={tmp_path / 'b'}",
                f"init_from={tmp_path / 'a'}",
            )
        )
    assert history(tmp_path / "b")[0]["step"] == "3"
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert "tensors from" in caplog.text


@pytest.mark.promise(26)
def test_d17_fine_tuning_to_other_classes_takes_over_what_fits(small, compose, tmp_path, caplog):
    """The preprocessing is the new model's (D5)."""
    train(small("train", "preprocessing.mean=[0,0,0]", "preprocessing.std=[1,1,1]"))
    make_camvid(tmp_path / "camvid")
    with caplog.at_level("INFO"):
        train(
            compose(
                "train",
                f"output_dir={tmp_path / 'tuned'}",
                "data=camvid",
                f"data.root={tmp_path / 'camvid'}",
                "data.augment.crop=[32,32]",
                "data.num_workers=0",
                "data.batch_size=2",
                "model=unet_random",
                "optimizer.lr=0",
                "optimizer.weight_decay=0",
                "trainer.max_epochs=1",
                f"init_from={tmp_path / 'run'}",
            )
        )
    before, after = weights(tmp_path / "run", "best"), weights(tmp_path / "tuned")
    skipped = {k for k in before if before[k].shape != after[k].shape}
    assert skipped == {"model.classifier.weight", "model.classifier.bias"}
    assert all(key.removeprefix("model.") in caplog.text for key in skipped)
    assert after["mean"].flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])  # d05
    same_layers = [
        k
        for k in before
        if k not in {*skipped, "mean", "std"} and "running" not in k and "num_" not in k
    ]
    assert all(torch.equal(before[k], after[k]) for k in same_layers)


# Scoring


def test_d15_a_checkpoint_is_not_evaluated_at_another_size(small, compose, tmp_path):
    train(small("train", "trainer.max_epochs=1"))
    with pytest.raises(InputError, match=r"data\.resize"):
        evaluate(compose("evaluate", f"checkpoint={tmp_path / 'run'}", "+data.resize=[64,64]"))


@pytest.mark.promise(22)
def test_evaluate_repeats_the_scores_at_the_end_of_training(small, compose, tmp_path):
    """In float32 unless told otherwise (D9), whatever training used; the report says which."""
    train(small("train", "trainer.precision=bf16-mixed"))
    evaluate(compose("evaluate", f"checkpoint={tmp_path / 'run'}", f"output_dir={tmp_path / 'e'}"))
    first, second = (
        json.loads((tmp_path / name / "test_metrics.json").read_text()) for name in ("run", "e")
    )
    assert first == second
    assert first["precision"] == "32-true"


@pytest.mark.promise(2, 13)
@pytest.mark.parametrize("settings", [(), ("tile=64", "tta=[flip,1.0,1.25]")])
def test_evaluation_scores_the_masks_that_prediction_writes(small, compose, tmp_path, settings):
    """At one precision, pixel by pixel; for every batch size, and with tiles and augmentation."""
    train(small("train", "data.dataset.size=96", "trainer.max_epochs=1"))
    settings = (*settings, f"checkpoint={tmp_path / 'run'}")
    found = []
    for size in (1, 4):
        folder = tmp_path / f"evaluation{size}"
        options = ("split=val", f"+data.eval_batch_size={size}", f"output_dir={folder}")
        evaluate(compose("evaluate", *settings, *options))
        found.append(json.loads((folder / "val_metrics.json").read_text())["confusion_matrix"])
    samples = [shapes("val", size=96)[i] for i in range(5)]
    (tmp_path / "images").mkdir()
    for i, (image, _) in enumerate(samples):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"images/{i}.png")
    options = (f"input={tmp_path / 'images'}", f"output={tmp_path / 'out'}")
    predict(compose("predict", *settings, *options, "trainer.precision=32-true"))
    matrix = np.zeros((6, 6), np.int64)
    for i, (_, mask) in enumerate(samples):
        with Image.open(tmp_path / f"out/mask/{i}.png") as file:
            predicted = np.array(file)
        labelled = mask.numpy() != 255
        np.add.at(matrix, (mask.numpy()[labelled], predicted[labelled]), 1)
    assert found == [matrix.tolist()] * 2


def test_d30_optimizers_take_one_pass_over_all_parameters_unless_gradients_are_clipped(
    small, tmp_path
):
    for name, clip in (("fused", "null"), ("clipped", "1.0")):
        options = ("trainer.max_epochs=1", f"trainer.gradient_clip_val={clip}")
        train(small("train", f"output_dir={tmp_path / name}", *options))
        state = checkpoint.read(tmp_path / name / "checkpoints/last.ckpt")["optimizer_states"]
        assert bool(state[0]["param_groups"][0]["fused"]) == (clip == "null")


def test_weights_of_another_architecture_are_no_start(small, tmp_path):
    train(small("train", "trainer.max_epochs=1"))
    other = ("model=lraspp", "model.weights=null", f"output_dir={tmp_path / 'other'}")
    with pytest.raises(InputError, match="no weights that fit"):
        train(small("train", f"init_from={tmp_path / 'run'}", *other))


def test_a_run_with_max_steps_is_resumed_without_loss(small, tmp_path):
    """Lightning's own max_steps would skip an epoch; the last steps are validated, too."""
    options = ("trainer.max_steps=7", "trainer.max_epochs=-1")
    train(small("train", f"output_dir={tmp_path / 'whole'}", *options))
    rows = history(tmp_path / "whole")
    assert [row["step"] for row in rows] == ["3", "6", "7"]
    assert all(row["val_loss"] for row in rows)
    folder = tmp_path / "killed"
    with pytest.raises(RuntimeError, match="killed"):
        train(
            small(
                "train",
                f"output_dir={folder}",
                *options,
                "+callbacks.kill._target_=test_training.Kill",
            )
        )
    assert len(history(folder)) == 1
    config = OmegaConf.load(folder / "config.yaml")
    config.callbacks = {}
    OmegaConf.save(config, folder / "config.yaml")
    resume(folder)
    assert_same_run(folder, tmp_path / "whole")
    with pytest.raises(InputError, match="complete"):
        resume(folder)


class Kill(Callback):
    """Ends the run in its second epoch."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.current_epoch == 1:
            raise RuntimeError("killed")

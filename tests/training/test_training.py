"""The main job end to end: train, stop, resume, fine-tune, evaluate, predict."""

import csv
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL_MASK2FORMER, SMALL_UNET
from forked import Forked
from lightning import Callback
from make_data import make_camvid
from omegaconf import OmegaConf
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import nn
from torch.nn import functional

from seg_torch import hardware
from seg_torch.checkpoints import checkpoint
from seg_torch.cli.overrides import complete_overrides
from seg_torch.commands.evaluate import evaluate
from seg_torch.commands.predict import predict
from seg_torch.commands.train import train
from seg_torch.datasets import shapes, write_folder
from seg_torch.errors import InputError, StoppedError
from seg_torch.evaluation.scorer import Scorer
from seg_torch.prediction.inference import upsample
from seg_torch.prediction.segmenter import Segmenter
from seg_torch.training.callbacks import EpochLine, History
from seg_torch.training.run import resumed_config
from seg_torch.training.task import SegmentationTask


def history(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return checkpoint.network_state(checkpoint.read(folder / "checkpoints" / f"{name}.ckpt"))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a, second[k]) for k, a in first.items())


def test_a_run_leaves_what_the_design_promises(small, tmp_path):
    best = train(small("train"))
    run = tmp_path / "run"
    for name in (
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "metrics.csv",
        "times.csv",
        "test_metrics.json",
        "test_images.npz",
        "test_images.csv",
        "curves.png",
        "samples/epoch_001.png",
        "samples/epoch_002.png",
    ):
        assert (run / name).stat().st_size > 0, name
    assert len(history(run)) == 2
    assert best == max(float(row["val_mean_iou"]) for row in history(run))
    with (run / "times.csv").open() as file:
        times = [(row["epoch"], float(row["seconds"]) > 0) for row in csv.DictReader(file)]
    assert times == [("1", True), ("2", True)]
    assert OmegaConf.load(run / "config.yaml").trainer.max_epochs == 2
    report = json.loads((run / "test_metrics.json").read_text())
    matrix = np.array(report["confusion_matrix"])
    assert report["pixel_accuracy"] == pytest.approx(np.trace(matrix) / matrix.sum())
    labelled = sum(int((np.asarray(shapes("test", 32)[i][1]) != 255).sum()) for i in range(3))
    assert matrix.sum() == labelled


@pytest.mark.promise(2)
def test_scores_of_each_image_are_written_and_add_up_to_those_of_all(small, compose, tmp_path):
    """Four images at a time, of two sizes, in tiles: each row is that of the image it names."""
    samples = [shapes("val", size=size)[i] for i, size in enumerate((96, 64, 96, 64, 96))]
    samples[3][1][:] = 255
    write_folder(samples, shapes("val").labels, tmp_path / "data")
    for split, names in (("train", "0003"), ("val", "0003"), ("test", "0004 0001 0003 0000 0002")):
        (tmp_path / f"data/{split}.txt").write_text(names.replace(" ", "\n"))
    train(small("train", "trainer.max_epochs=1"))
    options = (f"checkpoint={tmp_path / 'run'}", "data=folder", f"data.root={tmp_path / 'data'}")
    options = (*options, "data.eval_batch_size=4", "tile=64", f"output_dir={tmp_path / 'scores'}")
    evaluate(compose("evaluate", *options))
    found = np.load(tmp_path / "scores/test_images.npz")
    with (tmp_path / "scores/test_images.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == found["names"].tolist()
    assert sorted(rows) == ["0000", "0001", "0002", "0003", "0004"]
    segmenter = Segmenter.load(tmp_path / "run", tile=64, precision="32-true")
    for place, name in enumerate(found["names"]):
        image, mask = samples[int(name)]
        result = segmenter.predict(image, probabilities=True)
        valid = mask.numpy() != 255
        label, predicted = mask.numpy()[valid], result.mask[valid]
        counts = [
            np.bincount(ids, minlength=6) for ids in (label[label == predicted], label, predicted)
        ]
        for array, expected in zip(
            ("intersection", "label_pixels", "predicted_pixels"), counts, strict=True
        ):
            assert found[array].dtype == np.int64
            np.testing.assert_array_equal(found[array][place], expected)
        row = rows[name]
        if name == "0003":
            assert np.isnan(found["confidence"][place])
            assert set(row.values()) == {name, ""}, "nothing is labelled"
            continue
        confidence = result.probabilities().max(0)[valid].mean(dtype=float)
        assert found["confidence"][place] == pytest.approx(confidence, abs=1e-3)
        assert float(row["confidence"]) == pytest.approx(found["confidence"][place], abs=1e-6)
        assert float(row["pixel_accuracy"]) == pytest.approx((label == predicted).mean(), abs=1e-6)
        iou = jaccard_score(label, predicted, average=None, labels=range(6), zero_division=0)
        written = [row[f"iou {label}"] for label in shapes("val").labels.names]
        np.testing.assert_allclose([float(v or 0) for v in written], iou, atol=1e-6)
        present = [c in label or c in predicted for c in range(6)]
        assert [v != "" for v in written] == present


def test_a_run_is_not_overwritten_by_another(small, tmp_path):
    train(small("train"))
    before = (tmp_path / "run/metrics.csv").read_bytes()
    with pytest.raises(InputError, match="holds a run already"):
        train(small("train", "seed=5"))
    assert (tmp_path / "run/metrics.csv").read_bytes() == before


@pytest.mark.promise(18)
def test_class_weights_of_a_list_train(small, tmp_path):
    """Those of other origins are in the runs of tests/test_experiments.py."""
    weights = "loss.weights=[1,2,1,1,1,1]"
    train(small("train", "loss=weighted_ce", weights, "trainer.max_epochs=1"))
    assert len(history(tmp_path / "run")) == 1


# Stopping and going on, with the defaults of the hardware: its precision, and worker processes,
# which read ahead.

ROOT = Path(__file__).parents[2]
DEFAULTS = (
    "data.dataset.size=64",
    "data.dataset.train=40",
    "data.dataset.val=8",
    "data.dataset.test=4",
    "data.batch_size=4",
    "data.cache=none",  # as for datasets in files; the demo's needs no workers
    *SMALL_UNET,
    "trainer.max_epochs=3",
)


def start(*overrides: str, **environment: str) -> Forked:
    """Starts train.py as a user does."""
    return Forked([ROOT / "train.py", *overrides], **environment)


def start_second_epoch(*overrides: str, **environment: str) -> Forked:
    """Starts train.py and returns at a random moment after its first epoch."""
    process = start(*overrides, **environment)
    process.wait_for("\nepoch 1")
    time.sleep(random.uniform(0, 1))
    return process


def resume(folder: Path, max_epochs: int | None = None) -> None:
    """Goes on with a run in this process."""
    cfg = OmegaConf.create({"resume": str(folder), "trainer": {"max_epochs": max_epochs}})
    train(resumed_config(cfg, [f"trainer.max_epochs={max_epochs}"] if max_epochs else []))


def finish(process: Forked, code: int = 0) -> str:
    """Waits for the end of a process and returns what it printed that was not read yet."""
    found, output = process.finish()
    assert found == code, output
    assert "Traceback" not in output
    assert "not resumable" not in output  # as Lightning says of any loader that it does not know
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


@pytest.mark.promise(7)
@pytest.mark.promise(22)
def test_d02_killed_at_any_moment_and_resumed_equals_undisturbed(undisturbed, tmp_path):
    """Stopped before there is anything to save, started again, and then killed by kill -9."""
    folder = tmp_path / "killed"
    process = start(f"output_dir={folder}", *DEFAULTS)
    process.wait_for("\noutput_dir=")
    os.kill(process.pid, signal.SIGTERM)
    output = finish(process, 128 + signal.SIGTERM)
    assert output.splitlines()[-1] == "stopped; start it again: nothing is saved yet"
    process = start_second_epoch(f"output_dir={folder}", *DEFAULTS)
    os.kill(process.pid, signal.SIGKILL)
    process.finish()
    partial = folder / "checkpoints" / f".partial-{'0' * 32}.ckpt"
    partial.write_bytes(b"of a checkpoint that was being written")
    finish(start(f"resume={folder}"))
    assert_same_run(folder, undisturbed)
    assert not partial.exists()


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
        with suppress(ProcessLookupError):  # it has ended: not all take as long as the first one
            os.kill(process.pid, signal.SIGKILL)
        process.finish()
        if not (folder / "checkpoints/last.ckpt").exists():
            finish(start(f"output_dir={folder}", *options))  # nothing to go on from
        elif not (folder / "test_metrics.json").exists():
            finish(start(f"resume={folder}"))
        assert_same_run(folder, tmp_path / "whole")


@pytest.mark.promise(22)
def test_d16_after_ctrl_c_a_run_goes_on_as_if_undisturbed(undisturbed, tmp_path):
    """The terminal sends it to the workers, too. At other moments: see the test after the next."""
    folder = tmp_path / "stopped"
    process = start_second_epoch(f"output_dir={folder}", *DEFAULTS)
    os.killpg(process.pid, signal.SIGINT)
    assert f"go on with resume={folder}" in finish(process, 128 + signal.SIGINT)
    finish(start(f"resume={folder}"))
    assert_same_run(folder, undisturbed)


def test_a_job_that_slurm_stops_goes_on_by_the_same_command(undisturbed, tmp_path):
    """Before the time limit Slurm sends SIGUSR1, and the run asks to be queued again.

    Lightning would do so, too, but save an `hpc_ckpt` in the middle of a step.
    """
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" >> "$0.log"\n')
    scontrol.chmod(0o755)
    names = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    job = {f"SLURM_{name}": value for name, value in names.items()}
    job |= {"SLURM_JOB_ID": "123", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    folder = tmp_path / "run"
    command = (f"output_dir={folder}", *DEFAULTS)

    process = start_second_epoch(*command, **job)
    os.killpg(process.pid, signal.SIGUSR1)
    output = finish(process, 128 + signal.SIGUSR1)
    assert "job 123 waits in the queue of Slurm to go on" in output
    assert Path(f"{scontrol}.log").read_text() == "requeue 123\n"

    finish(start(*command, **job, SLURM_RESTART_COUNT="1"))
    assert_same_run(folder, undisturbed)
    assert not list(folder.rglob("hpc_ckpt*"))


# Two runs: where signals come, from which epoch on (counted from 0), and the steps saved by then.
MOMENTS = (
    (
        (SegmentationTask, "validation_step", 1, 6),
        (SegmentationTask, "on_train_epoch_end", 2, 9),
        (Scorer, "test_step", 0, 9),
    ),
    ((SegmentationTask, "on_train_epoch_end", 1, 6),),
)


@pytest.mark.promise(22)
def test_d16_a_signal_at_any_other_moment_loses_no_step(small, tmp_path, monkeypatch):
    options = ("trainer.max_epochs=3", "scheduler=plateau", "scheduler.patience=0")
    train(small("train", f"output_dir={tmp_path / 'whole'}", *options))
    for number, moments in enumerate(MOMENTS):
        folder = tmp_path / f"stopped_{number}"
        go = partial(train, small("train", f"output_dir={folder}", *options))
        for module, moment, epoch, steps in moments:
            plain = getattr(module, moment)

            def signalled(task, *arguments, plain=plain, epoch=epoch):
                if task.current_epoch >= epoch and not task.trainer.sanity_checking:
                    os.kill(os.getpid(), signal.SIGTERM)
                return plain(task, *arguments)

            with monkeypatch.context() as patch:
                patch.setattr(module, moment, signalled)
                with pytest.raises(StoppedError, match=f"go on with resume={folder}"):
                    go()
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            assert checkpoint.read(folder / "checkpoints/last.ckpt")["global_step"] == steps
            assert not (folder / "test_metrics.json").exists()
            go = partial(resume, folder)
        go()
        assert_same_run(folder, tmp_path / "whole")


# The moving average of the weights


def numpy_state(task: SegmentationTask) -> dict[str, np.ndarray]:
    return {k: v.numpy().copy() for k, v in task.network.state_dict().items()}


def test_with_ema_the_averaged_weights_are_validated_drawn_saved_and_scored(
    small, tmp_path, monkeypatch
):
    trained: list[dict[str, np.ndarray]] = []  # after each step
    used: dict[str, list] = {"validated": [], "drawn": [], "scored": []}
    step, validate = SegmentationTask.optimizer_step, SegmentationTask.validation_step
    test = Scorer.test_step

    def stepped(task, *arguments):
        step(task, *arguments)
        trained.append(numpy_state(task))

    def validated(task, *arguments):
        if not task.trainer.sanity_checking:
            used["validated"].append(numpy_state(task))
        validate(task, *arguments)

    def drawn(self, trainer, task):
        if not trainer.sanity_checking:
            used["drawn"].append(numpy_state(task))

    def scored(task, *arguments):
        used["scored"].append(numpy_state(task))
        test(task, *arguments)

    monkeypatch.setattr(SegmentationTask, "optimizer_step", stepped)
    monkeypatch.setattr(SegmentationTask, "validation_step", validated)
    monkeypatch.setattr(Scorer, "test_step", scored)
    monkeypatch.setattr("seg_torch.training.callbacks.SampleSheet.on_validation_end", drawn)
    train(small("train", "ema=0.75", "loss=weighted_ce"))

    assert len(trained) == 6
    averages = [trained[0]]  # the average of one
    for state in trained[1:]:
        last = averages[-1]
        averages.append({k: 0.75 * last[k] + 0.25 * v for k, v in state.items()})
    epochs = [averages[2], averages[5]]
    run = tmp_path / "run"
    best = int(np.argmax([float(row["val_mean_iou"]) for row in history(run)]))
    loaded = {k: v.numpy() for k, v in Segmenter.load(run, "cpu").network.state_dict().items()}
    pairs = [
        *zip(used["validated"][:: len(used["validated"]) // 2], epochs, strict=True),
        *zip(used["drawn"], epochs, strict=True),
        (used["scored"][0], epochs[best]),
        (loaded, epochs[best]),
        ({k: v.numpy() for k, v in weights(run).items()}, epochs[1]),
    ]
    for found, expected in pairs:
        for name in expected:  # with the running statistics of BatchNorm
            if "num_batches" not in name:
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
        assert (found["mean"] == trained[0]["mean"]).all()  # to the last bit
    content = checkpoint.read(run / "checkpoints/last.ckpt")["current_model_state"]
    assert all((content[f"network.{k}"].numpy() == v).all() for k, v in trained[5].items())


def test_a_run_with_ema_is_stopped_anywhere_and_goes_on_as_if_undisturbed(
    small, tmp_path, monkeypatch
):
    options = ("ema=0.75", "trainer.max_epochs=3")
    train(small("train", f"output_dir={tmp_path / 'whole'}", *options))
    for moment in ("validation_step", "training_step"):
        plain = getattr(SegmentationTask, moment)

        def signalled(task, *arguments, plain=plain):
            if task.current_epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(task, *arguments)

        folder = tmp_path / moment
        with monkeypatch.context() as patch:
            patch.setattr(SegmentationTask, moment, signalled)
            with pytest.raises(StoppedError, match=f"go on with resume={folder}"):
                train(small("train", f"output_dir={folder}", *options))
        resume(folder)
        assert_same_run(folder, tmp_path / "whole")


def test_a_run_with_ema_that_diverges_keeps_the_average_before(small, tmp_path, monkeypatch):
    plain = SegmentationTask.training_step

    def diverging(task, batch, index):
        return plain(task, batch, index) * (float("nan") if task.current_epoch == 1 else 1)

    monkeypatch.setattr(SegmentationTask, "training_step", diverging)
    with pytest.raises(InputError, match="diverged"):
        train(small("train", "ema=0.75"))
    for name in ("best", "last"):
        assert all(v.isfinite().all() for v in weights(tmp_path / "run", name).values())


def test_an_impossible_ema_is_refused(small):
    with pytest.raises(InputError, match=r"ema is 1; it is a decay between 0 and 1"):
        train(small("train", "ema=1"))
    with pytest.raises(InputError, match=r"ema needs weights in float32.*use bf16-mixed"):
        train(small("train", "ema=0.9", "trainer.precision=bf16-true"))


def test_a_full_disk_ends_the_run_but_loses_no_checkpoint(undisturbed, tmp_path):
    """On a small disk of its own where the user may mount one, else with a limit for its files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        folder = disk / "run"
        process = start(f"output_dir={folder}", *DEFAULTS)
        process.wait_for("\nepoch 1")
        before = {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
        room = 100 << 10
        if mounted:
            other = disk / "other"
            subprocess.run(["dd", "if=/dev/zero", f"of={other}", "bs=64k"], capture_output=True)
            os.truncate(other, other.stat().st_size - room)
        else:
            limits = (room, resource.RLIM_INFINITY)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
        output = finish(process, 2)
        assert re.search(r"(best|last).ckpt: (No space left on device|File too large)", output)
        assert "epoch_002.png'; the run goes on without this figure" in output
        assert f"go on with resume={folder}" in output
        assert {p: p.read_bytes() for p in (folder / "checkpoints").iterdir()} == before
        (disk / "other").unlink(missing_ok=True)
        finish(start(f"resume={folder}"))
        assert_same_run(folder, undisturbed)
    finally:
        if mounted:
            # Lazily, since worker processes may be ending still.
            subprocess.run(["umount", "-l", str(disk)], check=True)


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


def test_a_run_with_the_loss_of_its_model_resumes_without_loss(small, tmp_path):
    pytest.importorskip("transformers")
    options = [*SMALL_MASK2FORMER, "loss=model", "scheduler=none", "data.dataset.train=8"]
    options += ["data.dataset.val=1", "data.dataset.test=1"]
    train(small("train", *options, f"output_dir={tmp_path / 'whole'}"))
    folder = tmp_path / "run"
    train(small("train", *options, "trainer.max_epochs=1"))
    resume(folder, max_epochs=2)
    assert history(folder) == history(tmp_path / "whole")
    assert same(weights(folder), weights(tmp_path / "whole"))
    segmenter = Segmenter.load(folder)
    assert segmenter.predict(np.zeros((40, 50, 3), np.uint8)).mask.shape == (40, 50)


def test_a_loss_of_its_own_is_asked_of_a_model_that_has_one(small):
    with pytest.raises(InputError, match="loss=model: this model brings no loss"):
        train(small("train", "loss=model"))


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


# Numbers that go wrong


class NotANumber(nn.Module):
    """Cross-entropy, but no number at one training step."""

    def __init__(self, step: int, **_: object) -> None:
        super().__init__()
        self.step, self.steps = step, 0

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = functional.cross_entropy(logits.float(), target.long(), ignore_index=255)
        if not self.training:
            return loss
        self.steps += 1
        self.true = loss.detach()
        return loss * float("nan") if self.steps == self.step else loss


class Spy(Callback):
    """Keeps what the network is given, and the loss without what spoils it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_index):
        name = f"{trainer.current_epoch}-{batch_index}.pt"
        torch.save([*batch, pl_module.loss.true], Path(self.folder, name))


def write_numbered(root: Path) -> None:
    """Twelve images for training, in each of which every pixel's label is the image's number."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(15):
        noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(root / f"images/{i:02}.png")
        Image.fromarray(np.full((40, 40), i % 12, np.uint8)).save(root / f"masks/{i:02}.png")
    names = [f"{i:02}\n" for i in range(15)]
    (root / "train.txt").write_text("".join(names[:12]))
    (root / "val.txt").write_text("".join(names[12:]))
    (root / "classes.txt").write_text("".join(f"class_{i}\n" for i in range(12)))


@pytest.mark.promise(28)
def test_a_loss_that_is_no_number_leaves_its_batch_and_the_last_good_checkpoint(tmp_path):
    """The images that it names, and what a replay needs; with workers, in the default precision."""
    root, run = tmp_path / "data", tmp_path / "run"
    write_numbered(root)
    process = start(
        f"output_dir={run}",
        "data=folder",
        f"data.root={root}",
        "data.augment.crop=[32,32]",
        "data.batch_size=4",
        "model=unet_random",
        "model.encoder=mobilenetv3_small_050",
        "trainer.max_epochs=2",
        "loss._target_=test_training.NotANumber",
        "+loss.step=4",
        "+callbacks.spy._target_=test_training.Spy",
        f"+callbacks.spy.folder={tmp_path}",
    )
    output = finish(process, 2)
    assert "the training loss is nan at batch 1 of epoch 2" in output
    assert f"go on with resume={run}" in output

    images, masks, true_loss = torch.load(tmp_path / "1-0.pt", weights_only=True)
    batch = torch.load(run / "diverged/batch.pt", weights_only=True)
    assert torch.equal(torch.stack(batch["images"]), images)
    assert torch.equal(torch.stack(batch["masks"]), masks)
    report = json.loads((run / "diverged/report.json").read_text())
    assert (report["epoch"], report["batch"]) == (2, 1)
    for entry, image, mask in zip(report["images"], images, masks, strict=True):
        number = int(mask[mask != 255][0])
        assert entry["image"] == str(root / f"images/{number:02}.png")
        assert entry["mask"] == str(root / f"masks/{number:02}.png")
        assert (entry["minimum"], entry["maximum"]) == (image.min(), image.max())
        assert entry["mean"] == pytest.approx(image.numpy().mean())
        assert entry["mask_pixels"][str(number)] == (mask == number).sum()

    for name in ("best", "last"):
        assert checkpoint.read(run / f"checkpoints/{name}.ckpt")["global_step"] == 3
        assert all(value.isfinite().all() for value in weights(run, name).values())
    assert len(history(run)) == 1
    assert not (run / "test_metrics.json").exists()

    network = Segmenter.load(run / "checkpoints/last.ckpt", device="cpu").network.train()
    logits = upsample(network(torch.stack(batch["images"]))["out"], masks.shape[-2:])
    loss = NotANumber(step=0)(logits, torch.stack(batch["masks"]))
    assert loss.item() == pytest.approx(true_loss.item(), rel=0.02)  # without bfloat16

    resume(run)  # in which the loss is a number
    assert (run / "test_metrics.json").exists()
    assert len(history(run)) == 2


def weights_without_numbers(task, epoch, index, *arguments):
    """After the last step of epoch 4."""
    OPTIMIZER_STEP(task, epoch, index, *arguments)
    if (epoch, index) == (3, 2):
        next(task.network.parameters()).data.fill_(float("nan"))


def logits_without_numbers(task, groups, index):
    """Of the third image, with weights in which there is nothing wrong."""
    if (task.current_epoch, index) != (3, 2):
        return VALIDATION_STEP(task, groups, index)
    spoil = task.network.register_forward_hook(lambda m, i, out: {"out": out["out"] * torch.nan})
    VALIDATION_STEP(task, groups, index)
    spoil.remove()


def nothing_labelled(task, groups, index):
    for _, masks, _ in groups:
        masks.fill_(255)
    VALIDATION_STEP(task, groups, index)


OPTIMIZER_STEP = SegmentationTask.optimizer_step
VALIDATION_STEP = SegmentationTask.validation_step


@pytest.mark.promise(28)
def test_d03_an_epoch_without_numbers_ends_the_run_and_is_never_best(small, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    settings = ("scheduler=none", "optimizer=sgd", "trainer.max_epochs=3")
    train(small("train", *settings, "data.eval_batch_size=1"))
    (folder / "test_metrics.json").unlink()
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    state["optimizer_states"][0]["param_groups"][0]["lr"] = 1e30
    cases = (
        ("", None, r"the training loss is (nan|inf) at batch [23] of epoch 4"),
        ("optimizer_step", weights_without_numbers, "no longer numbers at batch 3 of epoch 4"),
        ("validation_step", logits_without_numbers, "validation loss is nan at batch 3 of epoch 4"),
        ("validation_step", nothing_labelled, "no pixel of the validation images is labelled"),
    )
    for hook, spoil, message in cases:
        copy = tmp_path / (spoil.__name__ if spoil else "diverged")
        shutil.copytree(folder, copy)
        with monkeypatch.context() as patch:
            if spoil:
                patch.setattr(SegmentationTask, hook, spoil)
            else:
                torch.save(state, copy / "checkpoints/last.ckpt")
            with pytest.raises(InputError, match=message):
                resume(copy, max_epochs=6)
        assert len(history(copy)) == 3
        for name in ("best", "last"):
            assert same(weights(copy, name), weights(folder, name))
            assert all(value.isfinite().all() for value in weights(copy, name).values())
        assert not (copy / "test_metrics.json").exists()
    report = json.loads((tmp_path / "logits_without_numbers/diverged/report.json").read_text())
    assert [entry["index"] for entry in report["images"]] == [2]


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
                *SMALL_UNET,
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


@pytest.mark.promise(22)
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_e14_weights_of_another_type_are_scored_in_float32(small, compose, tmp_path, precision):
    """Which the report says; evaluate and predict come to the same pixels."""
    settings = (f"trainer.precision={precision}", "trainer.max_epochs=1", "logger=none")
    train(small("train", *settings))
    run = tmp_path / "run"
    assert weights(run)["model.classifier.weight"].dtype == hardware.TRUE_PRECISIONS[precision]
    evaluate(compose("evaluate", f"checkpoint={run}", f"output_dir={tmp_path / 'e'}"))
    first, second = (
        json.loads((folder / "test_metrics.json").read_text()) for folder in (run, tmp_path / "e")
    )
    assert first == second
    assert first["precision"] == "32-true"
    segmenter = Segmenter.load(run, "cpu", precision="32-true")
    matrix = np.zeros((6, 6), np.int64)
    for i in range(3):
        image, mask = shapes("test", 32)[i]
        label, valid = mask.numpy(), mask.numpy() != 255
        np.add.at(matrix, (label[valid], segmenter.predict(image).mask[valid]), 1)
    assert first["confusion_matrix"] == matrix.tolist()


def test_e68_loggers_get_the_settings_and_the_scores_of_the_test(small, tmp_path):
    options = ("logger=[csv,tensorboard]", "optimizer.lr=0.002", "trainer.max_epochs=1")
    train(small("train", *options))
    run = tmp_path / "run"
    report = json.loads((run / "test_metrics.json").read_text())
    for folder in ("csv", "tensorboard"):
        logged = OmegaConf.load(run / folder / "hparams.yaml")
        text = OmegaConf.to_yaml(logged)
        assert "0.002" in text, folder
        assert "mobilenetv3_small_050" in text, folder
    with (run / "csv/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("mean_iou", "pixel_accuracy", "mean_accuracy", "mean_dice"):
        (value,) = (float(row[f"test/{name}"]) for row in rows if row[f"test/{name}"])
        assert value == pytest.approx(report[name], abs=1e-6)


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


def test_curves_are_drawn_every_five_seconds_and_whatever_ends_the_run(tmp_path, monkeypatch):
    clock, drawn = [0.0], []
    module = "seg_torch.training.callbacks"
    monkeypatch.setattr(f"{module}.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(
        f"{module}.save_curves", lambda rows, _: drawn.append((clock[0], len(rows)))
    )
    group = SimpleNamespace(param_groups=[{"lr": 0.1}])
    trainer = SimpleNamespace(
        is_global_zero=True, current_epoch=0, global_step=1, optimizers=[group]
    )
    task = SimpleNamespace(training_loss=lambda: 0.5, validated=False)
    history = History(tmp_path)
    for seconds in (1, 2, 3):
        clock[0] = seconds
        history.on_train_epoch_end(trainer, task)
    assert drawn == [(1, 1)]
    for seconds in (5, 6.5, 7, 20):
        clock[0] = seconds
        history.on_train_batch_end(trainer, task)
    assert drawn == [(1, 1), (6.5, 3)]
    history.on_train_end(trainer, task)
    assert len(drawn) == 2
    history.on_train_epoch_end(trainer, task)
    history.on_train_epoch_end(trainer, task)
    history.on_exception(trainer, task, KeyboardInterrupt())
    assert drawn[2:] == [(20, 4), (20, 5)]


@pytest.mark.parametrize(
    ("wait", "cache", "shown", "hint"),
    [
        (0.1, "none", "", ""),
        (0.2, "none", "; 17% of the time waiting for data", ": data.cache=ram or disk keeps"),
        (1.0, "none", "; 50% of the time waiting for data", ": data.cache=ram or disk keeps"),
        (1.0, "disk", "; 50% of the time waiting for data", ": data.num_workers=N lets N"),
    ],
)
def test_the_line_of_an_epoch_says_how_long_its_steps_waited_for_data(
    tmp_path, monkeypatch, wait, cache, shown, hint
):
    """Ten steps of one second. What comes between them is not waiting: validation, checkpoints."""
    clock = [0.0]
    monkeypatch.setattr(
        "seg_torch.training.callbacks.time", SimpleNamespace(perf_counter=lambda: clock[0])
    )
    monkeypatch.setattr("seg_torch.training.callbacks.save_curves", lambda *_: None)
    trainer = SimpleNamespace(
        is_global_zero=True,
        current_epoch=0,
        max_epochs=3,
        global_step=10,
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])],
        datamodule=SimpleNamespace(cache=cache),
        train_dataloader=SimpleNamespace(waited=5.0),  # in the epoch before
    )
    task = SimpleNamespace(training_loss=lambda: 0.5, validated=False, device=torch.device("cpu"))
    history = History(tmp_path)
    line = EpochLine(history, tmp_path)
    line.on_train_epoch_start(trainer, task)
    for step in range(10):
        clock[0] += wait
        trainer.train_dataloader.waited += wait
        line.on_train_batch_start(trainer, task)
        clock[0] += 1
        line.on_train_batch_end(trainer, task)
        if step in (3, 9):
            clock[0] += 20
    history.on_train_epoch_end(trainer, task)
    line.on_train_epoch_end(trainer, task)
    assert line.line == "epoch 1 of 3: loss 0.5000"
    assert line.note.startswith(shown + hint)
    assert hint or line.note == shown

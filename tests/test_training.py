"""The main job end to end, in this process: train, evaluate, predict."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from make_data import make_camvid
from omegaconf import OmegaConf
from PIL import Image

from seg_torch import Segmenter, checkpoint
from seg_torch.cli import CONFIG_FOLDER
from seg_torch.commands.predict import predict
from seg_torch.datasets import shapes
from seg_torch.errors import InputError
from seg_torch.trainer import evaluate, train


def history(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the time they took."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


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


def test_evaluation_and_prediction_agree_whatever_the_batch_size(small, compose, tmp_path):
    """Scores from evaluate.py equal NumPy's over the PNGs that predict.py wrote."""
    train(small("train"))
    best = tmp_path / "run/checkpoints/best.ckpt"
    reports = []
    for size in (1, 4):
        folder = tmp_path / f"evaluation{size}"
        evaluate(
            compose(
                "evaluate",
                f"checkpoint={best}",
                "split=val",
                f"data.batch_size={size}",
                "data.num_workers=0",
                f"output_dir={folder}",
                "trainer.precision=32",
            )
        )
        reports.append(json.loads((folder / "val_metrics.json").read_text()))
    assert reports[0]["confusion_matrix"] == reports[1]["confusion_matrix"]

    photos = tmp_path / "photos"
    photos.mkdir()
    samples = [shapes("val", size=32)[i] for i in range(5)]
    for i, (image, _) in enumerate(samples):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(photos / f"{i}.png")
    output = tmp_path / "out"
    assert (
        predict(compose("predict", f"checkpoint={best}", f"input={photos}", f"output={output}"))
        == 0
    )
    matrix = np.zeros((6, 6), np.int64)
    for i, (_, mask) in enumerate(samples):
        with Image.open(output / "mask" / f"{i}.png") as file:
            predicted = np.array(file)
        labelled = mask.numpy() != 255
        np.add.at(matrix, (mask.numpy()[labelled], predicted[labelled]), 1)
    with np.errstate(invalid="ignore"):
        iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    # Prediction uses the best precision of the hardware, so a few pixels may differ.
    assert np.nanmean(iou) == pytest.approx(reports[0]["mean_iou"], abs=0.01)


def test_a_seed_gives_the_same_run_twice_and_another_seed_another(small, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(small("train", f"output_dir={tmp_path / name}", f"seed={seed}"))
    assert history(tmp_path / "a") == history(tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


class PowerCutError(Exception):
    pass


def test_interrupted_and_resumed_equals_uninterrupted(small, tmp_path, monkeypatch):
    options = ("trainer.max_epochs=3", "data.augment.jitter=0.3")
    train(small("train", f"output_dir={tmp_path / 'whole'}", *options))

    def cut(self, *arguments):
        if self.current_epoch == 2:
            raise PowerCutError

    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr("seg_torch.task.SegmentationTask.on_validation_epoch_start", cut)
        with pytest.raises(PowerCutError):
            train(small("train", f"output_dir={folder}", *options))
    assert len(history(folder)) == 2
    last = f"checkpoint={folder / 'checkpoints/last.ckpt'}"
    train(small("train", f"output_dir={folder}", last, *options))
    assert history(folder) == history(tmp_path / "whole")
    assert same(weights(folder), weights(tmp_path / "whole"))


def test_ctrl_c_in_the_first_epoch_leaves_a_checkpoint_that_predicts(small, tmp_path, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("seg_torch.task.SegmentationTask.on_validation_epoch_end", interrupt)
    with pytest.raises(SystemExit):
        train(small("train", "trainer.num_sanity_val_steps=0"))
    segmenter = Segmenter.load(tmp_path / "run/checkpoints/last.ckpt")
    assert segmenter.predict(np.zeros((33, 47, 3), np.uint8)).mask.shape == (33, 47)


def test_a_run_is_not_overwritten_by_another(small, tmp_path):
    train(small("train"))
    before = (tmp_path / "run/metrics.csv").read_bytes()
    with pytest.raises(InputError, match="holds a run already"):
        train(small("train", "seed=5"))
    assert (tmp_path / "run/metrics.csv").read_bytes() == before


def test_fine_tuning_to_other_classes_takes_over_what_fits(small, compose, tmp_path, caplog):
    train(small("train"))
    make_camvid(tmp_path / "camvid")
    best = tmp_path / "run/checkpoints/best.ckpt"
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
                f"checkpoint={best}",
            )
        )
    assert "fine-tuning" in caplog.text
    before, after = weights(tmp_path / "run", "best"), weights(tmp_path / "tuned")
    skipped = {k for k in before if before[k].shape != after[k].shape}
    assert skipped
    assert all(key in caplog.text for key in skipped)
    trained = [k for k in before if k not in skipped and "running" not in k and "num_" not in k]
    assert all(torch.equal(before[k], after[k]) for k in trained)


def test_a_loss_that_is_no_number_ends_the_run_and_is_never_best(small, tmp_path, caplog):
    train(small("train", "optimizer.lr=1e30", "scheduler=none", "trainer.max_epochs=5"))
    assert len(history(tmp_path / "run")) < 5
    assert "Try a lower optimizer.lr" in caplog.text


@pytest.mark.parametrize("weights_from", ["dataset", "batch", "[1,2,1,1,1,1]"])
def test_class_weights_of_every_origin_train(small, tmp_path, weights_from):
    train(
        small("train", "loss=weighted_ce", f"loss.weights={weights_from}", "trainer.max_epochs=1")
    )
    assert (tmp_path / "run/pixel_counts.json").exists() == (weights_from == "dataset")


@pytest.mark.parametrize(
    "scheduler", sorted(p.stem for p in (CONFIG_FOLDER / "scheduler").iterdir())
)
@pytest.mark.parametrize(
    "optimizer", sorted(p.stem for p in (CONFIG_FOLDER / "optimizer").iterdir())
)
def test_every_optimizer_trains_with_every_schedule(small, tmp_path, optimizer, scheduler):
    options = (f"optimizer={optimizer}", f"scheduler={scheduler}", "trainer.max_epochs=1")
    train(small("train", *options, "trainer.limit_train_batches=2"))
    assert history(tmp_path / "run")[0]["step"] == "2"


@pytest.mark.parametrize("loss", sorted(p.stem for p in (CONFIG_FOLDER / "loss").iterdir()))
def test_every_loss_config_goes_down_on_four_images(small, tmp_path, loss):
    options = ("data.dataset.train=4", "data.augment.flip=0", "trainer.check_val_every_n_epoch=20")
    train(small("train", f"loss={loss}", "optimizer.lr=3e-3", "trainer.max_epochs=12", *options))
    rows = history(tmp_path / "run")
    assert float(rows[-1]["train_loss"]) < 0.9 * float(rows[0]["train_loss"])


def test_the_schedules_reach_their_peak_and_their_end():
    def rates(name: str) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        config = OmegaConf.load(CONFIG_FOLDER / "scheduler" / f"{name}.yaml")
        schedule = instantiate(config)(optimizer, 100)
        values = []
        for _ in range(100):
            values.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step() if len(values) < 100 else None
        return values

    one_cycle, poly = rates("one_cycle"), rates("poly")
    assert one_cycle[0] == pytest.approx(1 / 25)
    assert max(one_cycle) == pytest.approx(1.0)
    assert one_cycle.index(max(one_cycle)) == 29  # step 30 of 100
    assert one_cycle[-1] == pytest.approx(1 / 25 / 1e4)
    assert poly[0] == 1.0
    assert poly[40] == pytest.approx(0.6**0.9)

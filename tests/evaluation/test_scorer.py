"""Scoring: what it leaves as it was, and what it returns."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import run_command
from hydra.utils import instantiate

from seg_torch.commands.train import train
from seg_torch.distributed import Processes
from seg_torch.evaluation.scorer import Scorer, score
from seg_torch.metrics.counts import COUNTS
from seg_torch.models import unet
from seg_torch.models.network import Network
from seg_torch.prediction.inference import Inference, InferenceSettings
from seg_torch.training.trainer import build_trainer


@pytest.fixture
def scored(small, tmp_path):
    """`scored("32-true")`: the results of a network of random weights, and float32's settings."""

    def scored(precision: str):
        cfg = small("train")
        data = instantiate(cfg.data, _convert_="all")
        network = Network(unet(6, "mobilenetv3_small_050", None, decoder_channels=[8] * 5))
        trainer = build_trainer(cfg, Processes(cfg.trainer), tmp_path)
        seen = []
        network.register_forward_pre_hook(
            lambda *_: seen.append(
                (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
            )
        )
        scorer = Scorer(
            Inference(network, 6, settings=InferenceSettings(precision=precision)), data.labels
        )
        results = score(trainer, scorer, data, tmp_path, "test")
        return results, set(seen)

    return scored


@pytest.fixture
def tensorfloat(monkeypatch):
    """The settings of float32 in a training, which are put back after the test."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("tensorfloat")
def test_scores_in_float32_do_not_take_tensorfloat_from_the_next_job(scored):
    """In a sweep the next job trains in this process."""
    _, seen = scored("32-true")
    assert seen == {("highest", False)}
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.usefixtures("tensorfloat")
def test_other_precisions_are_scored_as_they_train(scored):
    _, seen = scored("bf16-mixed")
    assert seen == {("high", True)}


def test_what_is_returned_is_what_is_written(scored, tmp_path):
    results, _ = scored("32-true")
    assert results.scores == json.loads((tmp_path / "test_metrics.json").read_text())
    arrays = np.load(tmp_path / "test_images.npz")
    assert arrays["names"].tolist() == results.names
    for name, values in results.images.items():
        assert np.array_equal(arrays[name], values, equal_nan=True)


def test_e65_a_score_that_an_image_does_not_have_is_blank_in_the_table(scored, tmp_path):
    results, _ = scored("32-true")
    for name in COUNTS:
        results.images[name][1, 2] = 0  # the third class is not in the second image
    results.write(tmp_path / "again", "test")
    with (tmp_path / "again/test_images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = results.labels.names
    blank = [(i, name) for i, row in enumerate(rows) for name in names if row[f"iou {name}"] == ""]
    pixels = results.images["label_pixels"] + results.images["predicted_pixels"]
    assert blank == [(i, names[c]) for i, c in np.argwhere(pixels == 0)]
    assert (1, names[2]) in blank


def test_e22_a_run_without_test_batches_ends_without_a_test(small, tmp_path):
    """After its training; a command that only scores says that there is nothing to do."""
    settings = ("trainer.limit_test_batches=0", "trainer.max_epochs=1")
    train(small("train", *settings, "trainer.limit_train_batches=1"))
    assert (tmp_path / "run/checkpoints/best.ckpt").is_file()
    assert not list((tmp_path / "run").glob("test_*"))
    line = "evaluate run trainer.accelerator=cpu trainer.limit_test_batches=0 output_dir=scores"
    assert run_command(line, tmp_path) == 2
    assert not list((tmp_path / "scores").glob("test_*"))

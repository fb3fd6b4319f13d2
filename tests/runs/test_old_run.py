"""A run of an earlier version, see support/old_run/README.md, goes on with the code of today."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_command
from forked import Forked
from omegaconf import OmegaConf
from PIL import Image

pytest.importorskip("transformers")

STORED = Path(__file__).parents[1] / "support/old_run"
# Processors differ in the last bits, and 13 steps let that grow.
LOSS, SCORE = 1e-3, 0.02


@pytest.fixture
def old_run(tmp_path) -> Path:
    """A copy of the run, in another folder than that it was begun in."""
    return Path(shutil.copytree(STORED / "run", tmp_path / "old_run"))


def resume(folder: Path, *settings: str) -> None:
    """As a user does it: in a new process, of which no other test has changed anything."""
    command = [ROOT / "train.py", "resume=old_run", *settings]
    code, output = Forked(command, folder, OMP_NUM_THREADS="1").finish()
    assert code == 0, output


def rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_the_stored_run_has_old_names_and_stopped_within_an_epoch(old_run):
    """Else the other tests would show nothing."""
    text = (old_run / "config.yaml").read_text()
    for name in ("datamodule.SegmentationDataModule", "transforms.augment", "schedulers.poly"):
        assert f"_target_: seg_torch.{name}\n" in text
    assert len(rows(old_run / "metrics.csv")) == 1
    assert (old_run / "checkpoints/best.ckpt").is_file()


def test_a_run_of_an_earlier_version_goes_on_and_ends_as_it_would_have_then(old_run, tmp_path):
    resume(tmp_path)
    found, expected = rows(old_run / "metrics.csv"), rows(STORED / "undisturbed/metrics.csv")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert [row["epoch"] for row in found] == [row["epoch"] + 1 for row in expected], "from 1 now"
    for key in expected[0].keys() - {"epoch", "learning_rate"}:  # none of the result
        tolerance = {"rtol": LOSS} if key.endswith("loss") else {"atol": SCORE}
        np.testing.assert_allclose(
            [row[key] for row in found], [row[key] for row in expected], **tolerance, err_msg=key
        )
    score = json.loads((old_run / "test_metrics.json").read_text())
    score_then = json.loads((STORED / "undisturbed/test_metrics.json").read_text())
    for key in ("mean_iou", "pixel_accuracy", "mean_accuracy", "mean_dice"):
        assert score[key] == pytest.approx(score_then[key], abs=SCORE)
    assert np.sum(score["confusion_matrix"]) == np.sum(score_then["confusion_matrix"])

    # What it writes has the names of today, with which it resumes, too.
    config = OmegaConf.load(old_run / "config.yaml")
    assert config.data._target_ == "seg_torch.data.SegmentationDataModule"
    assert config.scheduler._target_ == "seg_torch.training.schedulers.poly"
    resume(tmp_path, "trainer.max_epochs=7")


def test_a_checkpoint_of_an_earlier_version_is_scored_and_predicts(old_run, tmp_path):
    line = "evaluate checkpoint=old_run split=val trainer.accelerator=cpu output_dir=scores"
    assert run_command(line, tmp_path) == 0
    score = json.loads((tmp_path / "scores/val_metrics.json").read_text())
    [then] = rows(old_run / "metrics.csv")
    assert score["mean_iou"] == pytest.approx(then["val_mean_iou"], abs=SCORE)
    assert score["pixel_accuracy"] == pytest.approx(then["val_pixel_accuracy"], abs=SCORE)

    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    line = "predict checkpoint=old_run input=photo.png output=out save=[mask]"
    assert run_command(f"{line} trainer.accelerator=cpu", tmp_path) == 0
    mask = np.array(Image.open(next((tmp_path / "out").rglob("*.png"))))
    assert mask.shape == (30, 40)
    assert mask.max() < 6

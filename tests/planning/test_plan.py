"""Plans of whole commands: what they decide, record, and leave to the user."""

import json
import math

import numpy as np
import pytest
from conftest import run_command
from omegaconf import OmegaConf
from PIL import Image

from seg_torch.planning import plan as module
from seg_torch.planning.trial import Trial

SMALL = "model.encoder=mobilenetv3_small_050 model.weights=null model.decoder_channels=[8,8,8,8,8]"
SMALL += " data.num_workers=0 trainer.accelerator=cpu"


@pytest.fixture
def photos(tmp_path):
    """A folder of twelve pairs of 64 x 64 pixels with a small bright square."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
    for i in range(12):
        mask = np.zeros((64, 64), np.uint8)
        mask[i : i + 10, 20:30] = 1
        image = (rng.integers(0, 80, (64, 64, 3)) + 150 * mask[..., None]).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"photos/images/{i}.png")
        Image.fromarray(mask).save(tmp_path / f"photos/masks/{i}.png")
    (tmp_path / "photos/classes.txt").write_text("ground\nsquare\n")
    return tmp_path / "photos"


@pytest.fixture
def measured(monkeypatch):
    """Trials find half a second for a step, whatever the machine."""
    found = Trial(1.0, 0.5, 0.1, 0.2, 0.3, 10**9)
    monkeypatch.setattr(module, "trial", lambda *_: found)
    return found


def test_plan_prints_settings_with_reasons(command, photos, measured, capsys):
    assert command(f"plan photos {SMALL} budget=60s") == (0, "")


def test_plan_prints_json_alone(photos, measured, capsys, tmp_path):
    assert run_command(f"plan photos {SMALL} budget=60s --json", tmp_path) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["data"]["images"] == {"train": 10, "val": 2}
    assert made["data"]["classes"]["square"]["share"] == pytest.approx(100 / 64**2)
    settings = {row["setting"]: row for row in made["settings"]}
    assert settings["loss"]["value"] == "ce_dice"
    assert "square has 2.4 %" in settings["loss"]["because"]
    epochs, batches = (
        settings[f"trainer.{key}"]["value"] for key in ("max_epochs", "limit_train_batches")
    )
    assert made["steps"] == epochs * batches
    assert 30 < made["seconds"] < 66
    assert made["steps"] > 0
    assert made["peak_bytes"] == 1e9
    assert not list(photos.parent.glob("runs/*")), "a plan writes nothing"


def test_a_run_records_its_plan(command, photos, tmp_path):
    line = f"{SMALL} output_dir=planned data.batch_size=4 trainer.max_epochs=2"
    assert command(f"train photos {line}") == (0, "")
    config = OmegaConf.load(tmp_path / "planned/config.yaml")
    assert {"optimizer.lr", "data.cache", "loss"} <= config.plan.keys()
    assert not {"data.batch_size", "trainer.max_epochs"} & config.plan.keys(), "the user's"
    assert config.data.batch_size == 4
    assert config.optimizer.lr == pytest.approx(2e-3 / math.sqrt(2), rel=0.02)
    assert config.data.cache == "ram"
    assert [each._target_.rpartition(".")[2] for each in config.loss.losses] == [
        "CrossEntropyLoss",
        "DiceLoss",
    ]
    assert command("train resume=planned trainer.max_epochs=3") == (0, "")
    again = OmegaConf.load(tmp_path / "planned/config.yaml")
    assert (again.plan, again.optimizer.lr) == (config.plan, config.optimizer.lr)


def test_settings_of_the_user_stay(command, photos, measured, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.Trainer.fit", lambda *_, **__: None)
    line = f"train photos {SMALL} output_dir=run budget=10m data.augment.crop=[32,32] loss=focal"
    line += " optimizer.lr=0.5 trainer.max_epochs=3 data.cache=none trainer.limit_test_batches=0"
    assert command(line) == (0, "")
    config = OmegaConf.load(tmp_path / "run/config.yaml")
    assert config.loss._target_.endswith("FocalLoss")
    assert (config.optimizer.lr, config.trainer.max_epochs) == (0.5, 3)
    assert (config.data.augment.crop, config.data.cache) == ([32, 32], "none")
    given = {"loss", "optimizer.lr", "trainer.max_epochs", "data.augment.crop", "data.cache"}
    assert not given & config.plan.keys()
    # 0.96 x 600 s, less start, test and three validations, at half a second.
    assert config.trainer.limit_train_batches == pytest.approx((576 - 5) / 3 / 0.5, rel=0.05)


def test_an_experiment_with_a_budget_changes_its_length_alone(
    command, photos, measured, tmp_path, monkeypatch
):
    monkeypatch.setattr("lightning.Trainer.fit", lambda *_, **__: None)
    line = "train experiment=shapes output_dir=run budget=10m trainer.accelerator=cpu"
    line += " trainer.limit_test_batches=0"
    assert command(line) == (0, "")
    config = OmegaConf.load(tmp_path / "run/config.yaml")
    assert {key.split(".")[0] for key in config.plan} == {"trainer", "data"}
    assert config.data.augment.crop is None
    assert config.data.batch_size == 8

"""What the words of a command line stand for."""

import importlib.util

from conftest import ROOT
from omegaconf import OmegaConf

from seg_torch.cli import overrides
from seg_torch.commands import COMMANDS
from seg_torch.files import CONFIG_FOLDER


def test_d26_null_and_absent_choices_mean_none(command, stub):
    seen = []
    stub(seen.append)
    for line in ("logger=null", "~logger", "logger=none", "logger=[]", "~logger.tensorboard"):
        assert command(f"train {line}") == (0, "")
        assert not seen[-1].get("logger"), line
    for line in ("scheduler=null", "~scheduler", "scheduler=none"):
        assert command(f"train {line}") == (0, "")
        assert not seen[-1].get("scheduler"), line
    for line in ("callbacks=null", "~callbacks"):
        assert command(f"train {line}") == (0, "")
        assert seen[-1].callbacks == {}, line


def test_without_data_train_is_the_demo(command, stub):
    seen = []
    stub(seen.append)
    command("train")
    assert seen[-1].data.dataset._target_ == "seg_torch.datasets.shapes"
    assert (seen[-1].model.encoder, seen[-1].model.weights) == ("resnet18", None)
    command("train model=deeplabv3")
    assert seen[-1].data.dataset._target_ == "seg_torch.datasets.shapes"
    assert seen[-1].model._target_ == "seg_torch.models.deeplabv3"
    command("train data=folder data.root=.")
    assert (seen[-1].model.encoder, seen[-1].model.weights) == ("resnet34", "imagenet")


def test_train_knows_which_settings_are_the_users(command, stub, tmp_path):
    seen = []
    stub(seen.append)
    (tmp_path / "mine/data").mkdir(parents=True)
    (tmp_path / "mine/data/own.yaml").write_text(
        "defaults: [default, _self_]\nroot: .\nbatch_size: 3\n"
        "dataset: {_target_: seg_torch.datasets.folder, _partial_: true}\n"
    )
    command("train data=own --config-dir mine optimizer.lr=1 +trainer.min_epochs=2 budget=10m")
    assert seen[-1].recipe == "auto"
    assert seen[-1].budget == "10m"
    assert {"optimizer.lr", "trainer.min_epochs", "data.batch_size"} <= {*seen[-1].given}
    assert not {"data.resize", "model.encoder", "optimizer.weight_decay"} & {*seen[-1].given}
    # Experiments keep what they say; without data, train is one.
    for line in ("train experiment=camvid_unet data.root=.", "train", "train . recipe=null"):
        command(line)
        assert seen[-1].recipe is None, line


def test_a_wrong_budget_or_recipe_is_refused_before_anything_is_read(command):
    code, message = command("train . budget=10")
    assert (code, "expected a time, such as 90s, 10m, 2h" in message) == (2, True)
    code, message = command("train . recipe=best")
    assert (code, "recipe=best: expected auto or null" in message) == (2, True)


def test_resuming_takes_the_configuration_of_the_run(command, stub, tmp_path):
    seen = []
    stub(seen.append)
    (tmp_path / "data").mkdir()
    command("train data=folder data.root=data optimizer=sgd optimizer.lr=0.3 seed=5")
    seen[-1].output_dir = "run"
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last.ckpt").touch()
    OmegaConf.save(seen[-1], tmp_path / "run/config.yaml")
    (tmp_path / "data").rename(tmp_path / "moved")

    line = "train resume=run data.root=moved trainer.max_epochs=40 data.num_workers=3"
    assert command(line) == (0, "")
    resumed = seen[-1]
    assert (resumed.resume, resumed.output_dir) == ("run", "run")
    assert (resumed.data.root, resumed.data.num_workers) == ("moved", 3)
    assert (resumed.trainer.max_epochs, resumed.trainer.log_every_n_steps) == (40, 10)
    assert (resumed.optimizer.lr, resumed.optimizer.momentum, resumed.seed) == (0.3, 0.9, 5)

    for line, expected in (
        ("train resume=run", "data.root=data: no such file or folder"),
        ("train resume=run trainer.max_epochs=x", "trainer.max_epochs=x: expected a whole number"),
        ("train resume=run data=voc", "data would change its result"),
        ("train resume=run ~callbacks", "callbacks would change its result"),
        ("train resume=run/checkpoints/last.ckpt", "init_from=run/checkpoints/last.ckpt"),
    ):
        code, message = command(line)
        assert code == 2
        assert expected in message


def test_optuna_without_its_package_says_what_to_install(command, stub, monkeypatch):
    stub(lambda cfg: None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "optuna" else find_spec(name)
    )
    code, message = command("train -m hydra/sweeper=optuna")
    assert code == 2
    assert f"pip install -e '{ROOT}[sweep]'" in message


def test_old_names_of_settings_and_choices_are_taken_and_the_new_ones_are_said(
    command, stub, monkeypatch
):
    seen = []
    stub(seen.append)
    assert command("train loss=own") == (0, "loss=own is now loss=model\n")
    assert seen.pop().loss._target_ == "seg_torch.losses.ModelLoss"
    monkeypatch.setattr(overrides, "RENAMED", {"rate": "optimizer.lr", "loss=own": "ce"})
    assert command("train rate=0.5") == (0, "rate=0.5 is now optimizer.lr=0.5\n")
    assert seen[-1].optimizer.lr == 0.5
    code, message = command("train -m loss=dice,own ++rate=0.25,0.5 output_dir=sweep")
    assert code == 0
    assert message.splitlines() == [
        "loss=dice,own is now loss=dice,ce",
        "++rate=0.25,0.5 is now ++optimizer.lr=0.25,0.5",
    ]
    assert [cfg.optimizer.lr for cfg in seen[1:]] == [0.25, 0.5, 0.25, 0.5]
    assert seen[-1].loss._target_ == "seg_torch.losses.CrossEntropyLoss"
    code, message = command("train rate=1 optimizer.lr=2")
    assert code == 2
    assert "rate is the old name of optimizer.lr; give one of them" in message
    assert command("train run/rate=1")[0] == 2, "a longer name is another one"


def test_the_new_names_exist_and_the_old_ones_do_not():
    pages = [OmegaConf.load(CONFIG_FOLDER / f"{command}.yaml") for command in COMMANDS]
    for old, new in overrides.RENAMED.items():
        group, _, choice = old.partition("=")
        if choice:
            assert (CONFIG_FOLDER / group / f"{new}.yaml").is_file()
            assert not (CONFIG_FOLDER / group / f"{choice}.yaml").exists()
        else:
            assert any(new in page for page in pages)
            assert not any(old in page for page in pages)


def test_only_the_first_process_says_that_a_name_is_old(monkeypatch, capsys):
    monkeypatch.setattr(overrides, "RENAMED", {"rate": "optimizer.lr"})
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert overrides.complete_overrides("evaluate", ["rate=1"]) == ["optimizer.lr=1"]
    assert capsys.readouterr().err == ""


def test_bare_paths_are_the_runs_of_compare_and_the_checkpoint_of_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    complete = overrides.complete_overrides
    assert complete("compare", ["a", "lr=0.1", "split=val"]) == ["runs=['a','lr=0.1']", "split=val"]
    assert complete("report", ["it's.ckpt"]) == [r"checkpoint='it\'s.ckpt'"]

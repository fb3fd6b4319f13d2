"""What a mistake is answered with, and that nothing heavy is loaded for it."""

import importlib.util
import inspect
import sys

import pytest
from conftest import ROOT

LIGHT = [
    ("train data.batchsize=4", "no setting data.batchsize; did you mean data.batch_size"),
    ("train modle=unet", "no setting modle; did you mean model"),
    ("train model=unett", "no model=unett; did you mean unet"),
    (
        "train data=from_chekpoint",
        "There are: ade20k, auto, camvid, camvid32, cityscapes, clothing, co",
    ),
    ("train optimizer.lr=fast", "optimizer.lr=fast: expected a number, such as 0.001"),
    ("train trainer.deterministic=ye", "trainer.deterministic=ye: expected true or false"),
    ("train data.batch_size=big", "data.batch_size=big: expected a whole number"),
    ("train data.batch_size=[", "data.batch_size=["),
    (
        "train data.augment.crop=[a,b]",
        "data.augment.crop=[a,b]: expected two numbers, such as",
    ),
    ("train data.augment.scale=[0.5,x]", "data.augment.scale=[0.5,x]: expected two numbers"),
    ("train data.dataset.train=many", "data.dataset.train=many: expected a whole number"),
    ("train trainer.max_epochs=x", "trainer.max_epochs=x: expected a whole number"),
    ("train trainer.max_epochs=2.5", "trainer.max_epochs=2.5: expected a whole number"),
    ("train data.augment=5", "data.augment=5: expected data.augment.KEY=VALUE"),
    ("train optimizer=adam optimizer.amsgrad=true", "+optimizer.amsgrad=VALUE adds it"),
    ("train seed=null", "seed must not be null"),
    ("train ~seed", "seed must not be null"),
    ("train trainer.max_steps=null", "trainer.max_steps must not be null"),
    ("train data.dataset=null", "data.dataset must not be null"),
    ("train model=null", "model must not be null; there are: deeplabv3"),
    ("train data=folder", "data.root must be given"),
    ("train data=folder data.root=nowhere", "data.root=nowhere: no such file or folder"),
    ("train data=voc data.root=nowhere", "data.download=true"),
    ("train model.weights=weights.pth", "model.weights=weights.pth: no such file"),
    ("train checkpoint=nothing.ckpt", "init_from=CHECKPOINT starts a new run with its weights"),
    ("train init_from=nothing.ckpt", "init_from=nothing.ckpt: no such file"),
    ("train resume=nothing", "resume=nothing: no run there"),
    ("train resume=nothing optimizer.lr=1", "optimizer.lr would change its result"),
    ("train resume=nothing model=unet", "model would change its result"),
    ("train --epochs 3", "--epochs; settings are given as trainer.max_epochs=value"),
    ("evaluate", "checkpoint must be given: a checkpoint, a run's folder"),
    ("evaluate checkpoint=nothing.ckpt", "checkpoint=nothing.ckpt: no such file"),
    ("predict input=nothing output=out model.weights=null", "input=nothing: no such file"),
    ("predict", "input must be given: an image, a video or a folder"),
    ("compare", "runs must be given: folders of runs or of sweeps"),
    ("report a.ckpt b.ckpt", "report is about one run, but 2 are given; see compare"),
    ("report nothing.ckpt", "checkpoint=nothing.ckpt: no such file"),
]


@pytest.mark.promise(29)
@pytest.mark.parametrize(("line", "expected"), LIGHT)
def test_d29_d35_a_mistake_is_answered_before_the_command_is_imported(
    command, line, expected, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, f"seg_torch.commands.{line.split()[0]}", None)
    code, message = command(line)
    assert code == 2
    assert expected in message
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 4
    assert not list(tmp_path.glob("*")), "a run that never started leaves nothing behind"


@pytest.mark.parametrize(
    ("dataset", "source"),
    [("folder", "put images in images/"), ("cityscapes", "gtFine_trainvaltest.zip")],
)
def test_e52_where_the_folder_is_missing_the_dataset_says_how_to_get_it(command, dataset, source):
    code, message = command(f"train data={dataset} data.root=nowhere")
    assert code == 2
    assert "data.root=nowhere: no such file or folder" in message
    assert "To get it: " in message
    assert source in message


@pytest.mark.promise(29)
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train trainer.precision=bf17", "trainer.precision=bf17: use one of"),
        ("train data.batch_size=0", "data.batch_size=0: expected at least 1"),
        ("train model.encoder=resnet3", "did you mean resnet"),
        ("train loss=weighted_ce loss.weights=datset", "loss.weights"),
    ],
)
def test_a_mistake_that_only_the_command_can_find_is_answered_too(command, line, expected):
    code, message = command(line)
    assert code == 2
    assert expected in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    "arguments",
    [
        "data.augment.jitter=[0.1,0.2,0]",  # the function takes one number or three
        "data.augment.scale=[1,2]",
        "optimizer.lr=1",
        "trainer.deterministic=warn",
        "trainer.devices=2",
        "trainer.precision=32",
        "trainer.limit_train_batches=0.5",
        "loss=ce_dice loss.weights=[1,2]",
        "data.augment=null",
        "model=unet model.freeze_encoder=5",
        "model=vit model.freeze_encoder=true",
        "trainer.max_steps=10 trainer.max_epochs=null",
        "+trainer.reload_dataloaders_every_n_epochs=1",
        "~data.augment",
    ],
)
def test_what_the_functions_take_is_not_refused(command, stub, arguments):
    seen = []
    stub(seen.append)
    assert command(f"train {arguments}") == (0, "")
    assert len(seen) == 1


def test_several_loggers_and_a_missing_package(command, stub, monkeypatch):
    seen = []
    stub(seen.append)
    assert command("train logger=[tensorboard,csv]") == (0, "")
    assert set(seen[-1].logger) == {"tensorboard", "csv"}
    assert command("train logger=csv") == (0, "")
    assert set(seen[-1].logger) == {"csv"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for package in ("wandb", "mlflow"):
        code, message = command(f"train logger=[csv,{package}]")
        assert code == 2
        assert f"pip install -e '{ROOT}[{package}]'" in message


@pytest.mark.parametrize(
    ("line", "package", "extra"),
    [
        ("train model=smp", "segmentation_models_pytorch", "smp"),
        ("train model=segformer", "transformers", "transformers"),
        ("predict input=. output=out model=mask2former", "transformers", "transformers"),
        ("serve", "python_multipart", "serve"),
        ("app", "uvicorn", "app"),
    ],
)
def test_e44_packages_are_looked_for_before_anything_else(
    command, monkeypatch, line, package, extra
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"seg_torch.commands.{line.split()[0]}", None)
    code, message = command(line)
    assert code == 2
    assert f"needs {package}: pip install" in message
    assert f"[{extra}]" in message


@pytest.mark.parametrize("name", ["tensorboard", "csv", "wandb", "mlflow"])
def test_loggers_write_inside_the_run_and_their_settings_exist(compose, name):
    settings = compose("train", f"logger={name}", "output_dir=here").logger[name]
    module, _, cls = settings._target_.rpartition(".")
    accepted = inspect.signature(getattr(importlib.import_module(module), cls)).parameters
    assert set(settings) - {"_target_"} <= set(accepted)
    assert "here" in (settings.get("save_dir") or settings.tracking_uri)

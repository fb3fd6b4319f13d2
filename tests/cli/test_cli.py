"""The command line: what a mistake is answered with, and what the other processes are told."""

import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run_command
from make_data import make_camvid
from omegaconf import OmegaConf
from PIL import Image

from seg_torch.cli import main as cli
from seg_torch.errors import StoppedError

ROOT = Path(__file__).parents[2]
TINY = (
    "data.dataset.size=32 data.dataset.train=8 data.dataset.val=5 data.dataset.test=5 "
    "data.batch_size=2 data.num_workers=0 trainer.max_epochs=1 trainer.accelerator=cpu "
    "trainer.precision=32"
)


@pytest.fixture
def command(tmp_path, capsys):
    """`command("train data=voc ...")` runs it here and returns (exit code, standard error)."""

    def command(line: str) -> tuple[int | str | None, str]:
        return run_command(line, tmp_path), capsys.readouterr().err

    return command


@pytest.fixture
def run_as(tmp_path):
    """`run_as("train.py ...")` starts a process in an empty folder; any entry point will do."""

    def run_as(line: str, **environment: str) -> subprocess.CompletedProcess:
        entry, *arguments = line.split()
        start = [entry] if entry == "-m" else [str(ROOT / entry)]
        return subprocess.run(
            [sys.executable, *start, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run_as


@pytest.fixture
def stub(monkeypatch):
    """`stub(function)` makes `function` the command train."""

    def stub(function):
        import seg_torch.commands.train as module

        monkeypatch.setattr(module, "train", function)

    return stub


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder dataset of eight pairs."""
    folder = tmp_path / "photos"
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (40, 40), (30 * i, 0, 0)).save(folder / f"images/{i}.png")
        Image.fromarray(np.full((40, 40), i % 2, np.uint8)).save(folder / f"masks/{i}.png")
    (folder / "classes.txt").write_text("background\nobject\n")
    return folder


# Mistakes

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
    ("train data.augment.crop=[a,b]", "data.augment.crop=[a,b]: expected numbers, such as [352,4"),
    ("train data.augment.scale=[0.5,x]", "data.augment.scale=[0.5,x]: expected numbers"),
    ("train data.dataset.train=many", "data.dataset.train=many: expected a whole number"),
    ("train trainer.max_epochs=x", "trainer.max_epochs=x: expected a whole number"),
    ("train trainer.max_epochs=2.5", "trainer.max_epochs=2.5: expected a whole number"),
    ("train data.augment=5", "data.augment=5: expected data.augment.KEY=VALUE"),
    ("train optimizer=adam optimizer.amsgrad=true", "+optimizer.amsgrad=VALUE adds it"),
    ("train seed=null", "seed must not be null"),
    ("train ~seed", "seed must not be null"),
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
    ("train --epochs 3", "--epochs; settings are given as key=value"),
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


def test_d29_help_and_mistakes_answer_at_once_and_load_nothing_heavy(run_as, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "heavy = {'torch', 'numpy', 'lightning', 'matplotlib', 'timm', 'PIL'}\n"
        "atexit.register(lambda: print('HEAVY', *sorted(heavy & set(sys.modules))))\n"
    )
    for line in (
        "train.py --help",
        "train.py optimizer.lr=fast",
        "train.py data.batchsize=4",
        "evaluate.py checkpoint=nothing",
        "-m seg_torch",
    ):
        before = os.times()
        result = run_as(line, PYTHONPATH=f"{ROOT}:{tmp_path}")
        # Processor time, which other work on the machine does not change.
        spent = sum(os.times()[2:4]) - sum(before[2:4])
        assert result.stdout.splitlines()[-1] == "HEAVY", line
        assert spent < 1.5, f"{line}: {spent} s of processor time"


def test_d29_the_package_loads_torch_only_when_something_needs_it():
    script = (
        "import sys, seg_torch\n"
        "from seg_torch import __version__\n"
        "assert not {'torch', 'numpy', 'hydra'} & set(sys.modules)\n"
        "assert 'Segmenter' in dir(seg_torch)\n"
        "from seg_torch import Labels, Segmenter, decode_segmap\n"
        "assert 'torch' in sys.modules\n"
        "try: seg_torch.Segmentor\n"
        "except AttributeError as error: assert 'Segmentor' in str(error)\n"
        "else: raise SystemExit('no AttributeError')\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


# Help


@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_d34_help_shows_examples_choices_and_every_setting_with_its_comment(name, compose, run_as):
    page = run_as(f"{name}.py -h").stdout
    assert "Hydra" not in page
    assert f"Usage: python {name}.py [key=value ...]" in page
    assert page.count(f"\n  python {name}.py") >= 3
    assert not re.search(r"[ =](default|from_checkpoint)( |$)", page, re.MULTILINE)

    def check(node, prefix=""):
        for key, value in node.items():
            if isinstance(value, dict) and value:
                check(value, f"{prefix}{key}.")
            elif key == "_target_":
                assert f"  {prefix.rstrip('.')}: {value}" in page
            elif key != "_partial_":
                assert f"\n  {prefix}{key}=" in page

    check(OmegaConf.to_container(compose(name)))
    for comment in re.findall(
        r"^\w+: .*#\s*(.{10,40})", (cli.CONFIG_FOLDER / f"{name}.yaml").read_text(), re.M
    ):
        assert " ".join(comment.split()) in " ".join(page.split())


def test_d34_help_follows_the_choices_of_the_command_line(run_as, tmp_path):
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/own.yaml").write_text("_target_: my.net\nwidth: 3   # of each layer\n")
    page = run_as("train.py model=smp data=folder -h").stdout
    assert re.search(r"model.architecture=Unet +or FPN", page)
    assert "data.root=???" in page
    assert "data.dataset.train" not in page
    page = run_as("-m seg_torch train --config-dir=mine model=own -h").stdout
    assert re.search(r"model.width=3 +of each layer", page)
    assert re.search(r"model= .* own ", page)


def test_commands_are_listed_with_a_line_each(run_as):
    for line in ("-m seg_torch", "-m seg_torch --help", "-m seg_torch -h"):
        result = run_as(line)
        assert result.returncode == 0
        assert re.search(r"\n  train +Train a segmentation model", result.stdout)
        assert re.search(r"\n  predict +Segment images", result.stdout)
    result = run_as("-m seg_torch evalate")
    assert result.returncode == 2
    assert "no command evalate; did you mean evaluate?" in result.stderr
    assert run_as("-m seg_torch --version").stdout == run_as("train.py --version").stdout


# Null and absent


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
        assert f"pip install {package}" in message


@pytest.mark.parametrize("name", ["tensorboard", "csv", "wandb", "mlflow"])
def test_loggers_write_inside_the_run_and_their_settings_exist(compose, name):
    settings = compose("train", f"logger={name}", "output_dir=here").logger[name]
    module, _, cls = settings._target_.rpartition(".")
    accepted = inspect.signature(getattr(importlib.import_module(module), cls)).parameters
    assert set(settings) - {"_target_"} <= set(accepted)
    assert "here" in (settings.get("save_dir") or settings.tracking_uri)


# Which run


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


# Exit codes


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def test_exit_codes_and_d19_out_of_memory(command, stub):
    def raising(error):
        def train(cfg):
            raise error

        return train

    stub(lambda cfg: 0.5)  # its score
    assert command("train") == (0, "")
    stub(raising(KeyboardInterrupt()))
    assert command("train") == (130, "")
    stub(raising(StoppedError("stopped; go on with resume=run", signal.SIGTERM)))
    assert command("train -m seed=1,2 output_dir=sweep")[0] == 143
    stub(raising(OutOfMemoryError("CUDA out of memory. Tried to allocate")))
    code, message = command("train")
    assert code == 2
    for setting in ("data.batch_size", "data.augment.crop", "tile", "trainer.precision"):
        assert setting in message
    stub(raising(ZeroDivisionError("a bug")))
    code, message = command("train")
    assert code == 1
    assert "Traceback" in message
    assert "a bug" in message


def test_lightnings_exit_after_ctrl_c_is_an_interrupt(command, stub):
    def train(cfg):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    stub(train)
    assert command("train") == (130, "")


def test_one_failed_job_does_not_end_the_sweep(command, stub):
    seen = []

    def train(cfg):
        seen.append(cfg.seed)
        if cfg.seed == 2:
            raise ZeroDivisionError("a bug")

    stub(train)
    code, message = command("train -m seed=null,1,2,3 output_dir=sweep")
    assert seen == [1, 2, 3]
    assert code == 2
    assert "error: seed must not be null" in message
    assert message.splitlines()[-1] == "error: 2 of 4 jobs failed: 0, 2"


def test_optuna_searches_for_the_highest_mean_iou(command, tmp_path):
    """Of the runs that it starts, the learning rate of the best one by its own table."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    tiny = f"{TINY} model.encoder=mobilenetv3_small_050 model.decoder_channels=[8,8,8,8,8]"
    line = f"train -m hydra/sweeper=optuna hydra.sweeper.n_trials=2 output_dir=sweep {tiny}"
    assert command(line)[0] == 0
    scores = {}
    for job in ("0", "1"):
        config = OmegaConf.load(tmp_path / "sweep" / job / "config.yaml")
        _, row = (tmp_path / f"sweep/{job}/metrics.csv").read_text().splitlines()
        scores[config.optimizer.lr] = float(row.split(",")[5])
    found = OmegaConf.load(tmp_path / "sweep/optimization_results.yaml")
    assert len(scores) == 2, "learning rates that differ"
    assert found.best_value == max(scores.values())
    assert scores[found.best_params["optimizer.lr"]] == found.best_value


def test_optuna_searches_what_it_is_told_and_goes_on_after_a_run_that_failed(
    command, stub, tmp_path
):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    seen = []

    def train(cfg):
        seen.append(cfg.optimizer.weight_decay)
        if len(seen) == 2:
            raise ZeroDivisionError("a bug")
        return -abs(cfg.optimizer.weight_decay - 0.5)

    stub(train)
    code, message = command(
        "train -m hydra/sweeper=optuna hydra.sweeper.n_trials=12 output_dir=sweep "
        "optimizer.lr=0.1 optimizer.weight_decay=interval(0.0,1.0)"
    )
    assert code == 1
    assert message.splitlines()[-1] == "error: 1 of 12 jobs failed: 1"
    assert len(seen) == 12
    found = OmegaConf.load(tmp_path / "sweep/optimization_results.yaml")
    assert list(found.best_params) == ["optimizer.weight_decay"]
    best = found.best_params["optimizer.weight_decay"]
    assert abs(best - 0.5) == min(abs(value - 0.5) for i, value in enumerate(seen) if i != 1)


def test_optuna_without_its_package_says_what_to_install(command, stub, monkeypatch):
    stub(lambda cfg: None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "optuna" else find_spec(name)
    )
    code, message = command("train -m hydra/sweeper=optuna")
    assert code == 2
    assert "pip install hydra-optuna-sweeper" in message


# Other processes


def test_only_the_first_process_of_torchrun_reports_a_mistake(run_as):
    for rank, lines in (("0", 1), ("1", 0)):
        result = run_as("train.py seed=null", LOCAL_RANK=rank, WORLD_SIZE="2")
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == lines


def test_d20_other_processes_get_the_command_line_of_their_job(command, stub, tmp_path):
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/own.yaml").write_text("_target_: my.net\n")
    seen = []
    stub(lambda cfg: seen.append(sys.argv[1:]))
    code, _ = command("train -m --config-dir mine model=own seed=1,2 output_dir=sweep")
    assert code == 0
    folder = [f"output_dir='{tmp_path}/sweep/{job}'" for job in (0, 1)]
    given = ["--config-dir=mine", "experiment=shapes", "model=own"]
    assert seen == [[*given, "seed=1", folder[0]], [*given, "seed=2", folder[1]]]


def test_d20_other_processes_are_started_with_the_command_and_the_flags(
    stub, tmp_path, monkeypatch
):
    """As `seg-torch train ...`, which is a script of pip's, and as `python -m seg_torch train`."""
    seen = []
    stub(lambda cfg: seen.append(sys.argv[:]))
    monkeypatch.chdir(tmp_path)
    line = ["/bin/seg-torch", "train", "--config-dir", str(cli.CONFIG_FOLDER), "output_dir=run"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit):
        cli.main()
    flag = f"--config-dir={cli.CONFIG_FOLDER}"
    assert seen == [["/bin/seg-torch", "train", flag, "experiment=shapes", "output_dir='run'"]]
    assert sys.argv == line


@pytest.mark.promise(6)
def test_d20_two_jobs_on_two_processes_make_one_sweep_with_one_folder_each(
    command, run_as, tmp_path
):
    """Each process would start the sweep again if it were told the sweep's command line.

    Nor would it know the model of one's own without the flag.
    """
    (tmp_path / "mine/model").mkdir(parents=True)
    text = (cli.CONFIG_FOLDER / "model/unet_random.yaml").read_text()
    text = text.replace("resnet18", "mobilenetv3_small_050")
    (tmp_path / "mine/model/own.yaml").write_text(text)
    line = "train.py -m --config-dir mine model=own loss=ce,dice trainer.devices=2"
    result = run_as(f"{line} output_dir=sweep {TINY}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 processes") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "sweep"]
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir() if p.is_dir()) == ["0", "1"]
    for job, loss in (("0", "CrossEntropyLoss"), ("1", "DiceLoss")):
        config = OmegaConf.load(tmp_path / "sweep" / job / "config.yaml")
        assert config.loss._target_ == f"seg_torch.losses.{loss}"

    # Five images on two processes give the same counts as on one.
    for job in ("0", "1"):
        folder = tmp_path / "sweep" / job
        best = folder / "checkpoints/best.ckpt"
        code, _ = command(
            f"evaluate checkpoint={best} output_dir=alone{job} data.num_workers=0 "
            "trainer.accelerator=cpu trainer.devices=1 trainer.precision=32"
        )
        assert code == 0
        alone = json.loads((tmp_path / f"alone{job}/test_metrics.json").read_text())
        together = json.loads((folder / "test_metrics.json").read_text())
        assert alone == together


# Files with mistakes in them


def test_a_text_file_is_no_checkpoint(command, tmp_path):
    (tmp_path / "notes.ckpt").write_text("to do")
    code, message = command("evaluate checkpoint=notes.ckpt")
    assert code == 2
    assert "notes.ckpt: not a checkpoint" in message


def test_a_checkpoint_of_another_program_is_named_as_such(command, tmp_path):
    import torch

    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    code, message = command("evaluate checkpoint=other.ckpt")
    assert code == 2
    assert "other.ckpt: not a checkpoint of seg_torch" in message


WRONG_MASKS = {  # how the mask i of 0 and 1 is stored, and what the message has to say
    "off by one": (lambda mask: mask + 1, r"masks/\d\.png: mask values \[2\]; allowed are 0 to 1"),
    "one of eight": (
        lambda mask, i: np.full_like(mask, 7) if i == 3 else mask,
        r"masks/3\.png: mask values \[7\]; allowed are 0 to 1",
    ),
    "0 and 255": (lambda mask: 255 * mask, "only 0 and 255.*background 0 0 0\nobject 255 255 255"),
    "colours": (
        lambda mask: np.stack([200 * mask, mask, mask], 2),
        r"masks/\d\.png.*a mask of colours.*name R G B",
    ),
    "colours that no class has": (
        lambda mask: np.stack([200 * mask, mask, mask], 2),
        r"masks/\d\.png: colour \(200, 1, 1\)",
    ),
}


@pytest.mark.promise(1)
@pytest.mark.parametrize("kind", WRONG_MASKS)
def test_masks_that_are_no_class_ids_are_refused_before_training(command, photos, tmp_path, kind):
    store, message = WRONG_MASKS[kind]
    for i in range(8):
        mask = np.full((40, 40), i % 2, np.uint8)
        wrong = store(mask, i) if kind == "one of eight" else store(mask)
        Image.fromarray(wrong).save(photos / f"masks/{i}.png")
    if kind == "colours that no class has":
        (photos / "classes.txt").write_text("background 0 0 0\nobject 200 0 0\n")
    line = f"train data=folder data.root={photos} model=unet_random output_dir=run"
    code, printed = command(line)
    assert code == 2
    assert re.search(message, printed, re.DOTALL), printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists(), "training has begun"


@pytest.mark.promise(8)
def test_an_image_too_many_for_the_last_batch_trains_and_batches_of_one_are_refused(
    command, photos, tmp_path
):
    """DeepLabv3 normalises pooled features, which one image alone does not have."""
    (photos / "train.txt").write_text("0\n1\n2\n3\n4\n")
    (photos / "val.txt").write_text("5\n6\n7\n")
    line = (
        f"train data=folder data.root={photos} model=deeplabv3 model.weights=null "
        "model.backbone=mobilenet_v3_large data.augment.crop=[32,32] data.num_workers=0 "
        "trainer.max_epochs=1 trainer.accelerator=cpu"
    )
    assert command(f"{line} output_dir=four data.batch_size=4") == (0, "")
    assert (tmp_path / "four/metrics.csv").read_text().splitlines()[1].startswith("0,1,")
    code, message = command(f"{line} output_dir=one data.batch_size=1")
    assert code == 2
    assert "data.batch_size=2" in message
    assert not (tmp_path / "one/metrics.csv").exists()


@pytest.mark.promise(17)
def test_two_classes_train_and_predict_by_default_and_one_channel_is_refused(
    command, photos, tmp_path
):
    line = (
        f"train data=folder data.root={photos} model=unet_random data.augment.crop=[32,32] "
        "data.num_workers=0 trainer.max_epochs=1 trainer.accelerator=cpu"
    )
    assert command(f"{line} output_dir=two")[0] == 0
    assert command("predict checkpoint=two input=photos/images output=out save=[mask]")[0] == 0
    masks = [np.array(Image.open(path)) for path in (tmp_path / "out/mask").iterdir()]
    assert len(masks) == 8
    assert np.unique(masks).max() <= 1
    report = json.loads((tmp_path / "two/test_metrics.json").read_text())
    assert list(report["per_class"]) == ["background", "object"]

    for path in (photos / "masks").iterdir():
        Image.new("L", (40, 40)).save(path)
    (photos / "classes.txt").write_text("object\n")
    code, message = command(f"{line} output_dir=one")
    assert code == 2
    assert "num_classes=2" in message
    assert not (tmp_path / "one/metrics.csv").exists()


@pytest.mark.promise(21)
def test_a_mask_of_another_size_than_its_image_is_refused(command, photos):
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(photos / "masks/3.png")
    code, message = command(f"train data=folder data.root={photos} model.weights=null")
    assert code == 2
    assert "3.png" in message
    assert "40 x 30" in message


def test_an_empty_folder_is_refused(command, tmp_path):
    (tmp_path / "bare").mkdir()
    for line, reason in (
        ("train data=folder data.root=bare", "bare.*is empty"),
        ("predict input=bare output=out", "input=bare: no images below this folder"),
    ):
        code, message = command(line)
        assert code == 2
        assert re.search(reason, message), message


def test_an_error_in_a_worker_process_keeps_its_short_message(command, tmp_path):
    make_camvid(tmp_path / "camvid")
    mask = sorted((tmp_path / "camvid/valannot").iterdir())[0]
    Image.fromarray(np.full((48, 64), 77, np.uint8)).save(mask)
    code, message = command(
        "train data=camvid data.root=camvid data.num_workers=1 data.check=false "
        "model=unet_random data.augment.crop=[32,32] trainer.accelerator=cpu"
    )
    assert code == 2
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    assert mask.name in message
    assert "Traceback" not in message


def test_an_output_folder_that_cannot_be_written_is_refused(command, tmp_path):
    (tmp_path / "file").touch()
    small = "data.dataset.size=32 data.num_workers=0 trainer.accelerator=cpu"
    code, message = command(f"train output_dir=file/run {small}")
    assert code == 2
    assert "file/run" in message

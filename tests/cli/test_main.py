"""Exit codes, sweeps, and what the other processes of a command are told."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_command
from omegaconf import OmegaConf

from seg_torch.cli import main as cli
from seg_torch.cli.main import attempt
from seg_torch.commands import COMMANDS
from seg_torch.errors import StoppedError
from seg_torch.files import CONFIG_FOLDER
from seg_torch.folders import locked

TINY = (
    "data.dataset.size=32 data.dataset.train=8 data.dataset.val=5 data.dataset.test=5 "
    "data.batch_size=2 data.num_workers=0 trainer.max_epochs=1 trainer.accelerator=cpu "
    "trainer.precision=32"
)


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


# Sweeps


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


def write_scored_run(cfg) -> float:
    """What compare reads of a run, in which the seed decides."""
    folder = Path(cfg.output_dir)
    folder.mkdir(exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    scores = {"mean_iou": cfg.optimizer.lr, "pixel_accuracy": 0.5, "per_class": {"a": {}}}
    (folder / "test_metrics.json").write_text(json.dumps(scores))
    return cfg.optimizer.lr


def test_e57_a_sweep_ends_with_its_table_and_the_command_that_makes_it(
    stub, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    stub(write_scored_run)
    assert run_command("train -m optimizer.lr=0.125,0.375 output_dir=a/sweep", tmp_path) == 0
    output = capsys.readouterr().out
    for score in ("0.125", "0.375"):
        assert re.search(rf"optimizer\.lr={score} .* {score}0 ", output)
    program, _, arguments = output.splitlines()[-1].strip().partition(" compare ")
    assert (program in ("seg-torch", "python -m seg_torch"), arguments) == (True, "a/sweep")
    assert run_command(f"compare {arguments} output_dir=again", tmp_path) == 0
    again, first = (tmp_path / name / "compare.csv" for name in ("again", "a/sweep"))
    assert again.read_bytes() == first.read_bytes()
    assert sorted(p.name for p in (tmp_path / "a/sweep").iterdir() if p.is_dir()) == ["0", "1"]


def test_e01_a_second_sweep_in_the_folder_of_one_that_runs_is_refused_as_a_whole(
    command, stub, tmp_path
):
    stub(write_scored_run)
    with locked(tmp_path / "sweep"):
        code, message = command("train -m optimizer.lr=0.125,0.375 output_dir=sweep")
        assert code == 2
        assert "error: output_dir=sweep: another run is writing" in message
        assert not list(tmp_path.rglob("config.yaml")), "a job has run"


def test_e01_a_folder_of_the_time_is_a_new_one_and_stays_only_with_something_in_it(
    command, stub, tmp_path
):
    seen = []

    def train(cfg):
        seen.append(cfg.output_dir)
        if len(seen) < 3:
            Path(cfg.output_dir, "file").touch()

    stub(train)
    (tmp_path / "mine/experiment").mkdir(parents=True)
    text = "# @package _global_\noutput_dir: runs/${now:%Y}-run\n"
    (tmp_path / "mine/experiment/timed.yaml").write_text(text)
    for _ in range(3):  # as if in one second
        assert command("train --config-dir mine experiment=timed")[0] == 0
    year = seen[0]
    assert seen == [year, f"{year}-2", f"{year}-3"]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        Path(name).name for name in seen[:2]
    ]


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


# Other processes


def test_d20_other_processes_get_the_command_line_of_their_job(command, stub, tmp_path):
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/own.yaml").write_text("_target_: my.net\n")
    seen = []
    stub(lambda cfg: seen.append(sys.argv[1:]))
    code, _ = command("train -m --config-dir mine model=own seed=1,2 output_dir=sweep")
    assert code == 0
    folder = [f"output_dir={tmp_path}/sweep/{job}" for job in (0, 1)]
    given = ["--config-dir", "mine", "experiment=shapes", "model=own"]
    assert seen == [[*given, "seed=1", folder[0]], [*given, "seed=2", folder[1]]]


def test_d20_other_processes_are_started_with_the_command_and_the_flags(
    stub, tmp_path, monkeypatch
):
    """As `seg-torch train ...`, which is a script of pip's, and as `python -m seg_torch train`."""
    seen = []
    stub(lambda cfg: seen.append(sys.argv[:]))
    monkeypatch.chdir(tmp_path)
    line = ["/bin/seg-torch", "train", "--config-dir", str(CONFIG_FOLDER), "output_dir=run"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit):
        cli.main()
    given = ["--config-dir", str(CONFIG_FOLDER), "experiment=shapes"]
    assert seen == [["/bin/seg-torch", "train", *given, "output_dir=run"]]
    assert sys.argv == line


@pytest.mark.promise(6)
def test_d20_two_jobs_on_two_processes_make_one_sweep_with_one_folder_each(
    command, run_as, tmp_path
):
    """Each process would start the sweep again if it were told the sweep's command line.

    Nor would it know the model of one's own without the flag.
    """
    (tmp_path / "mine/model").mkdir(parents=True)
    text = (CONFIG_FOLDER / "model/unet_random.yaml").read_text()
    text = text.replace("resnet18", "mobilenetv3_small_050")
    (tmp_path / "mine/model/own.yaml").write_text(text)
    sweep = "Läufe,(a)='1'"  # which has to reach the other processes, too: e45
    line = "train.py -m --config-dir mine model=own loss=ce,dice trainer.devices=2"
    result = run_as(f"{line} output_dir={sweep} {TINY}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 processes") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [sweep, "mine"]
    assert sorted(p.name for p in (tmp_path / sweep).iterdir() if p.is_dir()) == ["0", "1"]
    for job, loss in (("0", "CrossEntropyLoss"), ("1", "DiceLoss")):
        config = OmegaConf.load(tmp_path / sweep / job / "config.yaml")
        assert config.loss._target_ == f"seg_torch.losses.{loss}"

    # Five images on two processes give the same counts as on one.
    for job in ("0", "1"):
        folder = tmp_path / sweep / job
        best = folder / "checkpoints/best.ckpt"
        code, _ = command(
            f"evaluate checkpoint={best} output_dir=alone{job} data.num_workers=0 "
            "trainer.accelerator=cpu trainer.devices=1 trainer.precision=32"
        )
        assert code == 0
        alone = json.loads((tmp_path / f"alone{job}/test_metrics.json").read_text())
        together = json.loads((folder / "test_metrics.json").read_text())
        assert alone == together


def test_how_to_go_on_is_printed_once_per_machine(monkeypatch, capsys):
    def stop():
        raise StoppedError("go on with resume=run", signal.SIGTERM)

    for rank, printed in (("0", "go on with resume=run\n"), ("1", "")):
        monkeypatch.setenv("SLURM_LOCALID", rank)
        with pytest.raises(SystemExit) as end:
            attempt(stop)
        assert end.value.code == 128 + signal.SIGTERM
        assert capsys.readouterr().err == printed


# The table of commands


def test_every_command_has_its_configuration_its_module_and_its_line_in_the_table():
    pages = {path.stem for path in CONFIG_FOLDER.glob("*.yaml")}
    assert set(COMMANDS) == pages - {"hydra_defaults"}
    folder = ROOT / "seg_torch/commands"
    assert set(COMMANDS) == {path.stem for path in folder.glob("*.py")} - {"__init__"}


def test_the_table_of_commands_is_read_without_importing_one():
    script = "import sys, seg_torch.commands; assert not {'torch', 'hydra'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


# What is logged


def test_e39_importing_models_leaves_the_loggers_of_the_libraries_as_they_were():
    script = (
        "import logging, seg_torch.models\n"
        "for name in ('timm', 'httpx', 'httpx2'):\n"
        "    assert logging.getLogger(name).level == logging.NOTSET, name\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_a_command_prints_little_of_what_the_libraries_log(stub, tmp_path, capsys):
    def train(cfg):
        logging.getLogger("seg_torch").info("ours")
        logging.getLogger("httpx").info("HTTP Request: HEAD https://...")
        logging.getLogger("timm").warning("keys of the weights that do not fit")
        logging.getLogger("lightning.pytorch").info("Using bfloat16")

    stub(train)
    assert run_command("train", tmp_path) == 0
    assert capsys.readouterr().out == "ours\n"

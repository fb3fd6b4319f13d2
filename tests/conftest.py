"""What several test files need: command lines and their configurations, and promises."""

import ast
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Before torch is loaded: each of them, and what it starts, would take all cores.
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from seg_torch.cli.main import QUIET, main
from seg_torch.cli.overrides import complete_overrides
from seg_torch.files import CONFIG_FOLDER

# Small enough for two processor cores, and still every part of the real thing.
SMALL_DATA = (
    "data.dataset.size=32",
    "data.dataset.train=12",
    "data.dataset.val=5",
    "data.dataset.test=3",
    "data.batch_size=4",
    "data.num_workers=0",
)
SMALL_TRAINER = ("trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.precision=32")
SMALL_UNET = ("model.encoder=mobilenetv3_small_050", "model.decoder_channels=[8,8,8,8,8]")
SMALL_MASK2FORMER = (
    "model=mask2former",
    "model.weights=null",
    "model.config.backbone_config.embed_dim=12",
    "model.config.backbone_config.depths=[1,1,1,1]",
    "+model.config.decoder_layers=2",
    "+model.config.encoder_layers=1",
    "+model.config.train_num_points=64",
    *(f"+model.config.{name}=64" for name in ("feature_size", "mask_feature_size", "hidden_dim")),
    *(f"+model.config.{name}=64" for name in ("encoder_feedforward_dim", "dim_feedforward")),
)
ROOT = Path(__file__).parents[1]
# Where other processes find the package, and what the tests import.
PYTHONPATH = os.pathsep.join(map(str, [ROOT, *(p for p in ROOT.glob("tests/**") if p.is_dir())]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--promises",
        action="store_true",
        help="list the tests of each promise of docs/reliability.md, and run none",
    )


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    if not config.option.promises:
        return None
    for number, tests in promises().items():
        print(f"{number:2}", "\n   ".join(tests) or "no test")
    return 0


def promises() -> dict[int, list[str]]:
    """Returns the tests marked with each number of docs/reliability.md, but for slow ones."""
    found: dict[int, list[str]] = {number: [] for number in range(1, 30)}
    for file in sorted(Path(__file__).parent.rglob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", [])]
            if any("mark.slow" in mark for mark in marks):
                continue
            for mark in marks:
                if mark.startswith("pytest.mark.promise("):
                    for number in ast.literal_eval(mark[len("pytest.mark.promise(") : -1] + ","):
                        found[number].append(f"{file.name}::{node.name}")
    return found


def run_command(line: str | list[str], folder: Path) -> int | str | None:
    """Runs a command such as "train data=voc ..." in this process, in a folder.

    Args:
        line: The command line, or its words.
        folder: Where it is run.

    Returns:
        Its exit code.
    """
    name, *arguments = line.split() if isinstance(line, str) else line
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(ROOT / f"{name}.py"), *arguments])
        with pytest.raises(SystemExit) as stop:
            main(name)
    return stop.value.code


def output_in_new_process(function: Callable[[Path], None], folder: Path) -> str:
    """Calls a function of a test file where nothing but imports has taken memory before it.

    Returns:
        What it printed.
    """
    from forked import Forked

    script = folder / "call.py"
    script.write_text(
        f"import pathlib, {function.__module__} as test\n"
        f"test.{function.__name__}(pathlib.Path.cwd())\n"
    )
    code, output = Forked([script], folder, OMP_NUM_THREADS="1").finish(300)
    assert code == 0, output
    return output


@pytest.fixture(autouse=True, scope="session")
def quiet_libraries() -> None:
    """Their loggers are as a command leaves them, whichever test comes first."""
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Results of checks are remembered here, not in the user's home."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def anew() -> BaseContext:
    """What starts processes to which all is pickled, as on Windows: there spawn.

    Elsewhere the server of `Forked`, whose processes do not take seconds to import everything.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    from forked import SERVER

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        forkserver.ensure_running()
    return SERVER


@pytest.fixture
def new_cache_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Where the results of checks are remembered, a new folder for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def compose() -> Callable[..., DictConfig]:
    """`compose("train", "model=fcn", ...)`: the configuration of that command line.

    As there, `train` without data or experiment is the demo, `experiment=shapes`.
    """

    def compose(name: str, *overrides: str) -> DictConfig:
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            return hydra.compose(name, complete_overrides(name, overrides))

    return compose


@pytest.fixture
def small(compose: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., DictConfig]:
    """`small("train", ...)`: the same, on small images, small networks and two epochs."""

    def small(name: str, *overrides: str) -> DictConfig:
        other_model = any(o.startswith(("model", "experiment=")) for o in overrides)
        return compose(
            name,
            f"output_dir={tmp_path / 'run'}",
            *SMALL_DATA,
            *SMALL_TRAINER,
            *(() if other_model or name != "train" else SMALL_UNET),
            *overrides,
        )

    return small


@pytest.fixture
def command(tmp_path, capsys):
    """`command("train data=voc ...")` runs it here and returns (exit code, standard error)."""

    def command(line: str | list[str]) -> tuple[int | str | None, str]:
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

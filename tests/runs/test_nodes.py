"""Several machines, as two nodes on loopback: what is written, and what a node that dies leaves."""

import json
import os
import signal
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_DATA
from forked import Forked
from lightning import Fabric
from omegaconf import OmegaConf
from PIL import Image
from ports import free_port
from predictions import files, random_checkpoint, table

from seg_torch.cli.messages import LOST
from seg_torch.commands.evaluate import evaluate
from seg_torch.commands.predict import predict
from seg_torch.datasets.shapes import SHAPES_LABELS
from seg_torch.distributed import Processes
from seg_torch.errors import InputError
from seg_torch.prediction.folder import OutputFolder, read_journals

IMAGES = 200

# As the commands of the repository, but its process can be found and killed.
PROGRAM = """
import os
from pathlib import Path
from lightning import Fabric
from seg_torch.distributed import Processes
from seg_torch.cli.main import main
rank = os.environ.get("RANK") or os.environ["SLURM_PROCID"]
Path(os.environ["PIDS"], rank).write_text(f"{os.getpid()} {os.getppid()}")
main()
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    return random_checkpoint(folder / "random.ckpt", labels=SHAPES_LABELS)


@pytest.fixture
def many(tmp_path) -> Path:
    (tmp_path / "many").mkdir()
    generator = np.random.default_rng(0)
    for i in range(IMAGES):
        image = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8))
        image.resize((48, 32), Image.Resampling.BICUBIC).save(tmp_path / f"many/{i:03d}.png")
    return tmp_path / "many"


class Node:
    """A process of a launcher and those below it, all of which are killed in the end."""

    def __init__(self, folder: Path, line: list[str], cwd: Path, **environment: str) -> None:
        self.pids = folder / "pids"
        self.pids.mkdir(exist_ok=True)
        (folder / "program.py").write_text(PROGRAM)
        environment |= {"OMP_NUM_THREADS": "1", "PIDS": str(self.pids)}
        self.process = Forked(line, cwd, **environment)

    @property
    def runs(self) -> bool:
        return self.process.code is None

    def end(self) -> tuple[int | None, str]:
        """Waits for it; returns its exit code and what it and those below it printed."""
        return self.process.finish(150)

    def kill(self) -> None:
        """As if the machine had lost its power."""
        noted = [map(int, path.read_text().split()) for path in self.pids.iterdir()]
        children = [pid for pid, parent in noted if parent == self.process.pid]
        for pid in (self.process.pid, *children):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def nodes(tmp_path):
    """`nodes("torchrun", "predict", ...)` starts a command on two nodes, or on as many as asked."""
    started = []

    def nodes(launcher, command, *overrides, count=2, processes=1, folders=(tmp_path,) * 2):
        port = free_port()
        program = str(tmp_path / "program.py")
        line = [program, command, "trainer.accelerator=cpu", *overrides]
        for i, folder in zip(range(count), folders, strict=False):
            if launcher == "torchrun":
                # Both would take loopback for the machine of the endpoint.
                options = [f"--nnodes={count}", f"--nproc-per-node={processes}", "--rdzv-id=job"]
                options += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
                options += [f"--rdzv-conf=is_host={int(i == 0)}"]
                start, environment = ["-m", "torch.distributed.run", *options], {}
            else:
                variables = {"JOB_ID": 4242, "JOB_NAME": "test", "NODELIST": "127.0.0.1"}
                variables |= {"NTASKS": count, "NTASKS_PER_NODE": 1, "NNODES": count}
                variables |= {"PROCID": i, "NODEID": i, "LOCALID": 0}
                start = []
                environment = {f"SLURM_{key}": str(value) for key, value in variables.items()}
                environment["MASTER_PORT"] = str(port)
            started.append(Node(tmp_path, [*start, *line], folder, **environment))
        return started[-count:]

    yield nodes
    for node in started:
        node.kill()
        node.end()


def done(output: Path, remainder: int) -> list[Path]:
    """The masks of a process of two, each of which gets every second image."""
    return [p for p in (output / "mask").glob("[0-9]*.png") if int(p.stem) % 2 == remainder]


def test_a_node_that_died_is_made_good_by_giving_the_command_again(
    nodes, many, weights, compose, tmp_path
):
    line = [f"input={many}", f"checkpoint={weights}", "save=[mask,coco]", "trainer.num_nodes=2"]
    first, second = nodes("torchrun", "predict", *line, f"output={tmp_path / 'out'}")
    while first.runs and second.runs:
        if len(done(tmp_path / "out", 1)) >= 20:
            break
        time.sleep(0.005)
    assert (second.pids / "1").read_text().split()[1] == str(second.process.pid)
    second.kill()
    code, output = first.end()
    assert code != 0
    assert output.count("error: ") == output.count("another process of this run has ended") == 1
    assert "Traceback" not in output.partition("error: ")[0]
    assert not (tmp_path / "out/predictions.csv").exists()
    assert len(done(tmp_path / "out", 0)) == IMAGES // 2, "the survivor has not done its share"
    assert 20 <= len(done(tmp_path / "out", 1)) < IMAGES // 2, "nothing was left to do"
    noted = [record["name"] for record in read_journals(tmp_path / "out")]
    before = {n: (tmp_path / f"out/mask/{n}.png").stat().st_mtime_ns for n in noted}
    assert len(before) >= IMAGES // 2 + 10

    # On a cluster of another kind.
    (code, output), (other_code, other_output) = (
        node.end() for node in nodes("Slurm", "predict", *line, f"output={tmp_path / 'out'}")
    )
    assert (code, other_code) == (0, 0), output + other_output
    assert f"{len(before)} of {IMAGES} images are complete already" in output
    lines = other_output.splitlines()
    assert not [line for line in lines if line and not line.startswith("[Gloo]")]  # PyTorch's own
    assert before == {n: (tmp_path / f"out/mask/{n}.png").stat().st_mtime_ns for n in before}
    noted = [record["name"] for record in read_journals(tmp_path / "out")]
    assert sorted(noted) == [f"{i:03d}" for i in range(IMAGES)], "a file twice or never"

    one = compose("predict", *line[:-1], f"output={tmp_path / 'one'}", "trainer.accelerator=cpu")
    predict(one)
    assert [row["file"] for row in table(tmp_path / "out")] == [f"{i:03d}.png" for i in range(200)]
    assert files(tmp_path / "out") == files(tmp_path / "one")


@pytest.mark.promise(5)
def test_two_nodes_score_as_one_process_and_write_one_folder(nodes, weights, compose, tmp_path):
    line = [f"checkpoint={weights}", "data=shapes", *SMALL_DATA, "data.dataset.test=5"]
    (code, output), (other_code, other_output) = (
        node.end() for node in nodes("torchrun", "evaluate", *line)
    )
    assert (code, other_code) == (0, 0), output + other_output
    for line_of_the_first in ("5 images of test", "pixel accuracy", "test_metrics.json"):
        assert output.count(line_of_the_first) == 1
        assert line_of_the_first not in other_output
    (folder,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "test_metrics.json",
        "test_images.npz",
        "test_images.csv",
        "test_confusion_matrix.png",
    }
    one = tmp_path / "one"
    evaluate(compose("evaluate", *line, f"output_dir={one}", "trainer.accelerator=cpu"))
    two, alone = (json.loads((f / "test_metrics.json").read_text()) for f in (folder, one))
    assert np.sum(two["confusion_matrix"]) > 0
    assert two == alone


def test_a_mistake_that_all_processes_find_is_printed_once(nodes, weights, many, tmp_path):
    line = [f"input={many}", f"output={tmp_path / 'out'}", f"checkpoint={weights}"]
    (node,) = nodes("torchrun", "predict", *line, "trainer.devices=1", count=1, processes=2)
    code, output = node.end()
    assert code != 0
    assert output.count("error: ") == 1
    assert "torchrun has started 2 processes, but the settings ask for 1" in output
    assert not (tmp_path / "out").exists()


TORCHRUN = {"TORCHELASTIC_RUN_ID": "job", "WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}
TORCHRUN |= {"LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"}
SLURM |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    ("environment", "devices", "num_nodes", "message"),
    [
        (TORCHRUN, 2, 2, None),
        (TORCHRUN, "auto", 1, None),
        (TORCHRUN, 1, 2, "torchrun has started 4 processes, but the settings ask for 1 on each of"),
        (SLURM, 2, 2, None),
        (SLURM, 1, 1, "Slurm has started 4 processes, but the settings ask for 1 on each of 1"),
        (SLURM, 1, 4, "the number of tasks per node .* does not match"),
        ({"SLURM_NTASKS": "4"}, 1, 4, "Use `--ntasks-per-node=4`"),
        ({}, 1, 2, "need torchrun or Slurm"),
    ],
)
def test_settings_that_differ_from_what_the_launcher_started_are_refused(
    compose, monkeypatch, environment, devices, num_nodes, message
):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    asked_for = {"accelerator": "cpu", "devices": devices, "num_nodes": num_nodes}
    monkeypatch.setattr(Fabric, "launch", lambda self: None)
    if message is None:
        assert Processes(OmegaConf.create(asked_for)).count == 4
        return
    with pytest.raises(InputError, match=message):
        Processes(OmegaConf.create(asked_for))


def test_the_search_for_other_processes_has_an_end(compose, monkeypatch):
    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    trainer = compose("predict", "trainer.accelerator=cpu", "trainer.devices=2").trainer
    trainer.num_nodes = 2
    monkeypatch.setattr(Fabric, "launch", lambda self: None)
    assert Processes(trainer)._fabric.strategy._timeout <= timedelta(minutes=30)


def test_a_folder_that_the_machines_do_not_share_is_refused_before_the_first_image(
    compose, monkeypatch, many, weights, tmp_path
):
    line = [f"input={many}", f"output={tmp_path / 'out'}", f"checkpoint={weights}"]
    cfg = compose("predict", *line, "trainer.accelerator=cpu")
    with monkeypatch.context() as patch:  # the first process made it on another disk
        patch.setattr(OutputFolder, "left", lambda self, batches, resume: batches)
        with pytest.raises(
            InputError, match=f"output: .*0-.*.jsonl .* {socket.gethostname()}; .* share"
        ):
            predict(cfg)
    with monkeypatch.context() as patch:
        patch.setattr("seg_torch.commands.predict.plan_batches", lambda *_: [["000"], ["other"]])
        with pytest.raises(InputError, match=f"input: other .* {socket.gethostname()}; .* share"):
            predict(cfg)
    assert not (tmp_path / "out/mask").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "Slurm"])
def test_the_first_node_may_die_and_the_rest_be_done_by_other_processes(
    nodes, many, weights, compose, tmp_path, launcher
):
    processes = 2 if launcher == "torchrun" else 1
    line = [f"input={many}", f"checkpoint={weights}", "save=[mask]"]
    both = ["trainer.num_nodes=2", f"trainer.devices={processes}", f"output={tmp_path / 'out'}"]
    first, second = nodes(launcher, "predict", *line, *both, processes=processes)
    while first.runs and second.runs:
        if len(done(tmp_path / "out", 0)) >= 20:
            break
        time.sleep(0.005)
    first.kill()
    code, output = second.end()
    assert code != 0
    # Under torchrun the agent of the second node ends it when the first one no longer answers.
    assert output.count("error: ") == (1 if launcher == "Slurm" else 0), output
    assert not (tmp_path / "out/predictions.csv").exists()
    assert len(list((tmp_path / "out/mask").glob("[0-9]*.png"))) < IMAGES
    for output in ("out", "one"):
        cfg = compose("predict", *line, f"output={tmp_path / output}", "trainer.accelerator=cpu")
        assert predict(cfg) == 0
    assert files(tmp_path / "out") == files(tmp_path / "one")


@pytest.mark.slow
def test_a_machine_with_a_disk_of_its_own_ends_the_run_at_once(nodes, weights, many, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/many").symlink_to(many)
    first, second = nodes(
        "Slurm",
        "predict",
        *("input=many", "output=out", f"checkpoint={weights}", "trainer.num_nodes=2"),
        folders=(tmp_path, tmp_path / "other"),
    )
    code, output = second.end()
    assert code == 2
    assert output.startswith("error: output: ")
    assert "must lie on a disk that all machines share" in output
    code, output = first.end()
    assert code == 2
    assert output == f"error: {LOST}\n"
    assert not (tmp_path / "out/mask").exists()
    assert not (tmp_path / "other/out").exists()

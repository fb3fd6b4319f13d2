"""One folder, one writer: processes that start at once or are killed, disks without locks."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PYTHONPATH, ROOT, SMALL_DATA
from omegaconf import OmegaConf
from predictions import random_checkpoint

from seg_torch.commands.evaluate import evaluate
from seg_torch.commands.inspect import inspect
from seg_torch.commands.report import report
from seg_torch.commands.train import train
from seg_torch.datasets.shapes import SHAPES_LABELS
from seg_torch.errors import InputError
from seg_torch.folders import LOCK, claimed, locked, new_folder

PAIRS = 20


def start(*arguments: str | Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment)


def test_e01_of_two_processes_at_once_one_is_refused_or_each_has_a_folder_20_times(tmp_path):
    script = ROOT / "tests/support/pairs.py"
    both = [start(script, tmp_path, *names, str(PAIRS)) for names in ("ab", "ba")]
    assert [process.wait(120) for process in both] == [0, 0], "two were in one folder"
    of_a, of_b = (json.loads((tmp_path / f"outcomes-{name}").read_text()) for name in "ab")
    pairs = list(zip(of_a, of_b, strict=True))
    assert len({outcome["new"] for outcome in of_a + of_b}) == 2 * PAIRS
    refusals = [a["refused"] + b["refused"] for a, b in pairs if a["refused"] or b["refused"]]
    assert not [pair for pair in pairs if all(outcome["refused"] for outcome in pair)]
    assert len(refusals) > PAIRS / 2, "they hardly met"
    assert all("another run is writing into this folder" in text for text in refusals)
    assert not list(tmp_path.glob("claimed-*/*")), "a lock is left"


HOLDER = """
import os, sys, time
from pathlib import Path
from seg_torch.folders import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:  # as a worker process
        Path(sys.argv[2]).write_text(str(os.getpid()))
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_e01_a_lock_ends_with_a_killed_process_though_its_worker_lives(tmp_path):
    folder, worker = tmp_path / "run", tmp_path / "worker"
    holder = start("-c", HOLDER, folder, worker)
    while not (worker.exists() and worker.read_text()):
        assert holder.poll() is None
        time.sleep(0.01)
    message = f"output_dir={folder}: another run is writing .*process {holder.pid} on .*, since 20"
    try:
        with pytest.raises(InputError, match=message), claimed(folder):
            pass
        holder.kill()
        holder.wait()
        with claimed(folder):
            assert os.getpid() != holder.pid
    finally:
        os.kill(int(worker.read_text()), signal.SIGKILL)
    assert list(folder.iterdir()) == []  # it was there before the claim


def test_a_folder_is_free_again_and_an_empty_one_that_was_made_for_the_lock_is_gone(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new"):
        with claimed(tmp_path / name):
            assert os.listdir(tmp_path / name) == [LOCK]
            with pytest.raises(InputError, match="another run"), claimed(tmp_path / name):
                pass
    assert os.listdir(tmp_path) == ["mine"]
    with locked(tmp_path / "kept"):
        (tmp_path / "kept/file").touch()
    assert os.listdir(tmp_path / "kept") == ["file"]


def test_a_lock_that_is_waited_for_comes_when_its_holder_has_ended(tmp_path):
    holder = start("-c", HOLDER.replace("os.fork()", "0"), tmp_path, tmp_path / "begun")
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    holder.kill()
    with locked(tmp_path, wait=True):
        pass
    holder.wait()


def test_a_disk_without_locks_is_told_and_a_folder_that_cannot_be_made_is_refused(
    tmp_path, monkeypatch, caplog
):
    def no_locks(file):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"output=.*cannot be written"),
        claimed(tmp_path / "file/below", "output"),
    ):
        pass
    monkeypatch.setattr("seg_torch.folders._lock", no_locks)
    with claimed(tmp_path / "run"):
        (tmp_path / "run/file").touch()
    assert f"{tmp_path / 'run'}: this disk has no locks (No locks available)" in caplog.text


def test_a_new_folder_gets_a_number_where_the_name_is_taken(tmp_path):
    path = str(tmp_path / "runs/2026")
    assert [new_folder(path) for _ in range(3)] == [path, f"{path}-2", f"{path}-3"]


# Commands; of compare in tests/evaluation/test_compare.py, of predict in tests/prediction, and
# whole trainings in tests/runs/test_pairs.py


@pytest.mark.parametrize("command", ["train", "resume", "evaluate", "report", "inspect"])
def test_e01_no_command_writes_where_another_one_does(small, compose, tmp_path, command):
    folder = tmp_path / "run"
    weights = random_checkpoint(tmp_path / "a.ckpt", labels=SHAPES_LABELS)
    folder.mkdir()
    (folder / "metrics.csv").write_text("of the other one")
    where, data = f"output_dir={folder}", ("data=shapes", *SMALL_DATA)
    scored = (f"checkpoint={weights}", "trainer.accelerator=cpu")
    calls = {
        "train": lambda: train(small("train")),
        "resume": lambda: train(OmegaConf.merge(small("train"), {"resume": str(folder)})),
        "evaluate": lambda: evaluate(compose("evaluate", *scored, *data, where)),
        "report": lambda: report(compose("report", *scored, *data, where)),
        "inspect": lambda: inspect(compose("inspect", *data, where)),
    }
    with locked(folder), pytest.raises(InputError, match=f"^output_dir={folder}: another run"):
        calls[command]()
    assert os.listdir(folder) == ["metrics.csv"]

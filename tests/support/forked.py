"""Processes that begin with everything imported, which takes most of the time of a short run.

They are forked from a server that has imported what `train` needs and done nothing else. From
there on they are what a user starts: processes with their own arguments, environment and output.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from unittest import mock

import torch
import torch.distributed.run
from torch.distributed.launcher.api import elastic_launch

import seg_torch.commands.train  # noqa: F401

ROOT = Path(__file__).parents[2]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])


class Forked:
    """A process that runs `python ARGUMENTS`; `-m torch.distributed.run ...` is understood, too."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        folder: Path | None = None,
        terminal: str | None = None,
        **environment: str,
    ) -> None:
        folders = [ROOT, *(p for p in ROOT.glob("tests/**") if p.is_dir())]
        paths = os.pathsep.join(map(str, folders))
        environment = {**os.environ, "PYTHONPATH": paths, **environment}
        self.file = NamedTemporaryFile("r")  # noqa: SIM115
        run = ([*map(str, arguments)], str(folder or Path.cwd()), environment)
        run = (*run, terminal or self.file.name)
        self.process: Any = SERVER.Process(target=_run, args=run)
        with mock.patch.dict(os.environ, PYTHONPATH=paths):  # the server has to find this file
            self.process.start()
        self.pid: int = self.process.pid

    def wait_for(self, beginning: str, timeout: float = 120) -> None:
        """Reads what the process prints up to a line with this beginning."""
        end, read = time.monotonic() + timeout, ""
        while beginning not in ("\n" + read):
            running = self.code is None and time.monotonic() < end
            read += self.file.read()
            assert running or beginning in ("\n" + read), read
            time.sleep(0.02)

    @property
    def code(self) -> int | None:
        """The exit code, minus the signal where it was killed, or `None` while it runs."""
        return self.process.exitcode

    def finish(self, timeout: float = 240) -> tuple[int | None, str]:
        """Returns the exit code, or `None` if it had to be killed, and what was not read yet."""
        self.process.join(timeout)
        code = self.code
        if code is None:
            os.killpg(self.pid, 9)
        return code, self.file.read()


def _run(arguments: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    multiprocessing.set_start_method(None, force=True)  # that of the system, for its workers
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's `&`
    os.setsid()  # a group of its own, to which signals can be sent
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):  # else those of the server, and of pytest
        torch.set_num_threads(int(threads))
    _execute(*arguments)


def _execute(*arguments: str) -> None:
    if arguments[:2] == ("-m", "torch.distributed.run"):
        torchrun = torch.distributed.run.parse_args(arguments[2:])
        if torchrun.standalone:
            torchrun.rdzv_backend, torchrun.rdzv_endpoint = "c10d", "localhost:0"
            torchrun.rdzv_id = str(uuid.uuid4())
        config = torch.distributed.run.config_from_args(torchrun)[0]
        config.start_method = "fork"
        elastic_launch(config, _execute)(torchrun.training_script, *torchrun.training_script_args)
        return
    sys.argv = [*arguments]
    runpy.run_path(arguments[0], run_name="__main__")

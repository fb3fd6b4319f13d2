"""The processes of a command, one for each device, and what they do together."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning import Fabric
from lightning.fabric.plugins import environments
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from seg_torch import hardware
from seg_torch.errors import InputError
from seg_torch.folders import claimed

T = TypeVar("T")


class Processes:
    """The processes of a command.

    Those that torchrun or Slurm have started are connected, so that they can agree. Those that
    Lightning starts exist only once it has, which `start` does, and a Trainer when it fits:
    until then each of them works as if it were alone, and what the first one has to do is left out
    by those that come later.

    Args:
        trainer: Settings of the trainer: `accelerator`, `devices` and `num_nodes`.
        most: Processes at most, where `devices` is auto and Lightning starts them.

    Attributes:
        rank: The number of this process.
        count: How many there are.
        on_machine: How many there are on each machine.
        device: Of this process.
        settings: `accelerator`, `devices` and `num_nodes` as Lightning takes them. The first is
            `cuda`, `mps` or `cpu`, or another of its names, the second the devices of a machine or
            their number.

    Raises:
        InputError: A setting that Lightning does not take, a device that is not there, or another
            number of processes than torchrun or Slurm started.
    """

    def __init__(self, trainer: DictConfig, most: int | None = None) -> None:
        settings = lightning_settings(trainer)
        named = " ".join(f"{key}={value}" for key, value in settings.items())
        with refused_by_lightning(f"trainer: {named}"):
            fabric = Fabric(**settings)
            environment = getattr(fabric.strategy, "cluster_environment", None)
            self.from_outside = not isinstance(
                environment, environments.LightningEnvironment | None
            )
            if most is not None and settings["devices"] == "auto" and not self.from_outside:
                settings["devices"] = max(1, min(fabric.world_size, most))
                fabric = Fabric(**settings)
            self.on_machine = getattr(fabric.strategy, "num_processes", 1)
            check_launcher(self.on_machine, settings["num_nodes"])
        self.settings, self._fabric = settings, fabric
        self.rank, self.count, self.device = fabric.global_rank, fabric.world_size, fabric.device
        if self.from_outside:
            self.start()
        if not self.is_first:
            logging.getLogger("seg_torch").setLevel(logging.WARNING)  # the first process says it

    @property
    def connected(self) -> bool:
        """Whether the processes can agree: there are several, and they have found each other."""
        return self.count > 1 and torch.distributed.is_initialized()

    @property
    def is_first(self) -> bool:
        """Whether this is the first process of all."""
        return self.rank == 0

    def start(self) -> None:
        """Start the processes that Lightning has to start, and connect them all."""
        if self.count > 1 and not self.connected:
            self._fabric.launch()
            self.rank, self.device = self._fabric.global_rank, self._fabric.device

    def same(self, value: T) -> T:
        """Return the first process's value in all of them: plain data, such as a name."""
        return self._of_rank(0, value)

    def first(self, function: Callable[[], T]) -> T | None:
        """Call a function in the first process while the others wait.

        Returns:
            Its result, plain data, in all processes that are connected, else in the first one.

        Raises:
            InputError: In every process, where `function` raises it. After any other error, which
                the first process raises as it is, in the others.
            SystemExit: In processes that the first one started, instead of the same message again.
        """
        return self._on_ranks(function, [0])

    def first_of_each_machine(self, function: Callable[[], object]) -> None:
        """Call a function in one process of every machine but the first, while the others wait.

        For what has to be on each machine's own disk, after `first` has seen to it: on a disk
        that the machines share there is nothing left to do.

        Raises:
            InputError: As `first` does.
        """
        self._on_ranks(function, range(self.on_machine, self.count, self.on_machine))

    @contextmanager
    def claimed(self, folder: Path) -> Iterator[None]:
        """Enter a context in which no other run writes into a folder, `output_dir`.

        Raises:
            InputError: Another one does, or it cannot be written.
        """
        with ExitStack() as claim:
            self.first(lambda: claim.enter_context(claimed(folder)))
            yield

    def wait(self) -> None:
        """Wait until all processes have come so far."""
        if self.connected:
            torch.distributed.barrier(self._group)

    def _on_ranks(self, function: Callable[[], T], ranks: Iterable[int]) -> T | None:
        ranks, result, failure = list(ranks), None, None
        if self.rank in ranks:
            try:
                result = function()
            except Exception as error:
                failure = error
        message = None if failure is None else str(failure) or type(failure).__name__
        outcomes = [self._of_rank(rank, (message, result)) for rank in ranks]
        if failure is not None:
            raise failure
        for text, _ in outcomes:
            if text is not None:
                raise InputError(text) if self.from_outside else SystemExit(2)
        return outcomes[0][1] if outcomes else None

    def _of_rank(self, rank: int, value: T) -> T:
        if not self.connected:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, rank, self._group)
        return values[0]

    @cached_property
    def _group(self) -> Any:
        """The processes, with time to wait for each other: the first one may download for hours.

        Lightning's limit of half an hour is for finding each other. Its backend is Gloo also on
        GPUs: unlike NCCL, it notices at once that a process has died.
        """
        return torch.distributed.new_group(timeout=timedelta(days=30), backend="gloo")


@contextmanager
def refused_by_lightning(settings: str) -> Iterator[None]:
    """Enter a context in which an error of Lightning names the settings that it refuses.

    Raises:
        InputError: Instead of that error.
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError, MisconfigurationException) as error:
        raise InputError(f"{settings}: {error}") from error


def lightning_settings(trainer: DictConfig) -> dict[str, Any]:
    """Return `accelerator`, `devices` and `num_nodes`, the last two as torchrun knows them."""
    settings: Any = OmegaConf.to_container(trainer, resolve=True)
    settings = {name: settings[name] for name in ("accelerator", "devices", "num_nodes")}
    settings["accelerator"] = hardware.accelerator(settings["accelerator"])
    if environments.TorchElasticEnvironment.detect():
        if settings["devices"] == "auto":
            settings["devices"] = int(os.environ["LOCAL_WORLD_SIZE"])
        settings["num_nodes"] = int(os.environ["GROUP_WORLD_SIZE"])
    return settings


def check_launcher(devices: int, num_nodes: int) -> None:
    """Refuse settings that do not fit the processes that torchrun or Slurm has started.

    Lightning checks them late, and for one device not at all: each process would do all the work.

    Args:
        devices: Processes on each machine, as the settings have it.
        num_nodes: Machines.

    Raises:
        ValueError: They make another number of processes, or no launcher has started them.
    """
    launchers: Any = [environments.TorchElasticEnvironment, environments.SLURMEnvironment]
    for name, environment in zip(("torchrun", "Slurm"), launchers, strict=True):
        if environment.detect():
            started = environment().world_size()
            if started != devices * num_nodes:
                raise InputError(
                    f"{name} has started {started} processes, but the settings ask for {devices} "
                    f"on each of {num_nodes} machines; set trainer.devices to the processes on a "
                    "machine and trainer.num_nodes to the number of machines"
                )
            environment().validate_settings(devices, num_nodes)
            return
    if num_nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"several machines (trainer.num_nodes={num_nodes}) need torchrun or Slurm, which start "
            "the processes on each; see docs/scaling.md"
        )

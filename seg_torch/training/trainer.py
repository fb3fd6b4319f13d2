"""Lightning's Trainer for this hardware."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.torch_version import TorchVersion

from seg_torch import hardware
from seg_torch.configuration import instantiate
from seg_torch.distributed import Processes, refused_by_lightning
from seg_torch.errors import InputError, check_choice
from seg_torch.files import write_atomically
from seg_torch.models import weights
from seg_torch.models.network import COMPILE_MODES
from seg_torch.training.progress import ProgressBar

PROFILERS: dict[str, Any] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Leaves the old checkpoint or the complete new one, whatever happens while it is written.

    That includes a power cut. What could not be read again does not take its place, either.
    Lightning's own writes into the system's folder of temporary files and moves the result, which
    between two disks is a copy, and holds the file in memory twice.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        def write(name: str) -> None:
            save(checkpoint, name)
            try:
                weights.check_names(name)
            except ValueError as error:
                found = next(foreign(checkpoint), str(error))
                raise InputError(
                    f"{path} could not be read again: {found}. What a callback's state_dict() "
                    "returns may hold plain numbers, such as float(value), texts, lists, dicts and "
                    "tensors"
                ) from None

        write_atomically(path, write, durable=True)


def foreign(content: Any, where: str = "") -> Iterator[str]:
    """Yield what a checkpoint must not hold, as "PLACE is a TYPE"."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from foreign(value, f"{where}.{key}".lstrip("."))
    elif isinstance(content, list | tuple | set) and not isinstance(content, torch.Size):
        for value in content:
            yield from foreign(value, where)
    kind = type(content)
    if kind.__module__.partition(".")[0] not in ("builtins", "collections", "torch"):
        yield f"{where} is a {kind.__module__}.{kind.__qualname__}"


def save(content: dict[str, Any], path: str) -> None:
    """Save with `torch.save`, but tells a full disk as such.

    Raises:
        OSError: The file cannot be written. PyTorch raises errors about its own positions instead,
            some of them while it handles the OSError of a Python file.
    """
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class FullySharded(ModelParallelStrategy):
    """`trainer.strategy=fsdp`: PyTorch's FSDP2, whose checkpoints are those of any other run.

    Each process keeps a share of the weights and of the optimizer's state, which `shard` deals
    out, and holds the whole network during a step.
    (Lightning's strategy of that name is the first FSDP: it cannot clip gradients by their norm,
    runs on no CPU, keeps BatchNorm's statistics in half precision, and waits forever where the
    processes validate different numbers of images.)
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.world_size, 1
        super().setup_environment()

    # Scored with whole weights: the processes have different numbers of images, and of tiles, so
    # they cannot fetch each other's shares while they do.

    def on_validation_start(self) -> None:
        self._network.unshard()

    def on_validation_end(self) -> None:
        self._network.reshard()

    on_test_start, on_test_end = on_validation_start, on_validation_end

    @property
    def _network(self) -> Any:
        return self.lightning_module.network  # type: ignore[union-attr]


def shard(module: LightningModule) -> None:
    """Deal out the weights of `module.network` to the processes of `FullySharded`, if it trains.

    For the `configure_model` of a module: the network stays whole with any other strategy, and is
    dealt out once.
    """
    network: Any = module.network
    if module.device_mesh is not None and not isinstance(network, FSDPModule):
        network.to(memory_format=torch.contiguous_format)  # which FSDP insists on
        fully_shard(network, mesh=module.device_mesh["data_parallel"])


def build_trainer(
    cfg: DictConfig, processes: Processes, folder: Path, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """Build Lightning's Trainer with the settings that suit the hardware.

    Args:
        cfg: `trainer`, the settings of `conf/trainer`, and for training `logger`, those of
            `conf/logger`.
        processes: Those of these settings.
        folder: Of the run. In a job of Slurm, Lightning goes on with an `hpc_ckpt` that it finds
            there.
        callbacks: All that the run has.

    Raises:
        InputError: A setting that Lightning does not take, or two that contradict each other.
    """
    options: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[assignment]
    options.pop("max_steps", None)  # left to the task: Lightning's own skips an epoch on resuming
    check_options(options)
    # The task sets the one, for training alone, and the network does the other.
    options.pop("benchmark", None), options.pop("compile", None)
    options |= processes.settings
    on_cpu = options["accelerator"] == "cpu"
    options["precision"] = hardware.resolve_precision(options["precision"], options["accelerator"])
    if options.get("strategy") == "fsdp":
        if on_cpu and TorchVersion(torch.__version__) < "2.14":
            raise InputError(
                "trainer.strategy=fsdp on a CPU needs PyTorch 2.14: 2.8 trains wrongly"
            )
        if options["precision"] in hardware.TRUE_PRECISIONS:
            raise InputError(
                f"trainer.strategy=fsdp shares out weights in float32, not trainer.precision="
                f"{options['precision']}: use 32-true or bf16-mixed"
            )
        options["strategy"] = FullySharded()
    # TensorFloat-32 for what stays in float32: as precise as bfloat16 and several times faster.
    torch.set_float32_matmul_precision("high")
    if on_cpu:
        hardware.reuse_memory()
    if options.get("profiler") in PROFILERS:
        # Lightning would log what they find, where the commands do not show it.
        options["profiler"] = PROFILERS[options["profiler"]](dirpath=folder, filename="profile")
    bar = Console().is_terminal
    with refused_by_lightning("trainer"):
        return Trainer(
            **options,
            default_root_dir=folder,
            callbacks=[*callbacks, *([ProgressBar()] if bar else [])],
            logger=[instantiate(node) for node in (cfg.get("logger") or {}).values()],
            enable_progress_bar=bar,
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,  # the data module shards without padding
            enable_model_summary=False,
            enable_checkpointing=bool(callbacks),
            inference_mode=False,  # under which autocast would cast the weights for every batch
        )


def check_options(options: dict[str, Any]) -> None:
    """Refuse settings that Lightning knows and a run cannot have.

    These are strategies that do not start processes by the command line, and what may choose other
    operations each time beside `trainer.deterministic=true`.

    Raises:
        InputError: There is one, or an unknown value.
    """
    if any(way in str(options.get("strategy")) for way in ("spawn", "fork", "notebook")):
        raise InputError(
            f"trainer.strategy={options['strategy']}: the processes of a run are started by its "
            "command line; use trainer.strategy=ddp, and in a notebook start the command by !"
        )
    check_choice("trainer.benchmark", options.get("benchmark"), (None, False, True))
    check_choice("trainer.compile", options.get("compile"), (None, *COMPILE_MODES))
    for name in ("benchmark", "compile"):
        if options.get(name) and options.get("deterministic") is True:
            raise InputError(
                f"trainer.deterministic=true repeats a run bit for bit, trainer.{name}="
                f"{options[name]} may choose other operations each time: use one of the two"
            )

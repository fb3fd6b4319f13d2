"""From a configuration to the parts of a training: network, task, callbacks."""

import logging
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig, OmegaConf
from timm.layers import convert_sync_batchnorm
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from seg_torch.checkpoints import checkpoint
from seg_torch.data import SegmentationDataModule
from seg_torch.distributed import Processes
from seg_torch.errors import InputError
from seg_torch.images.format import RGB
from seg_torch.models.network import Network, check_channels, freeze_unused_parameters
from seg_torch.models.weights import adapt_first_conv, load_matching_weights
from seg_torch.training.averaging import WeightAverage
from seg_torch.training.callbacks import Checkpoints, EpochLine, History, SampleSheet
from seg_torch.training.divergence import StopOnDivergence
from seg_torch.training.task import SegmentationTask

log = logging.getLogger(__name__)


def build_callbacks(cfg: DictConfig, folder: Path, processes: Processes) -> list[Callback]:
    """Build the callbacks of a run, in the order in which each hook calls them.

    Raises:
        InputError: `ema` is no decay, or needs whole weights.
    """
    history = History(folder)
    return [
        StopOnDivergence(folder),  # before anything is written about an epoch that has diverged
        history,
        EpochLine(history, folder),
        *([LearningRateMonitor("step")] if cfg.get("logger") else []),
        SampleSheet(folder),  # draws with the averaged weights, before they are taken out again
        *([] if cfg.get("ema") is None else [_weight_average(cfg, processes)]),
        *(instantiate(node) for node in cfg.callbacks.values()),
        # Lightning calls these after all others. The last one has to contain what the best one is.
        Checkpoints(folder, "best", monitor="val/mean_iou"),
        Checkpoints(folder, "last"),
    ]


def _weight_average(cfg: DictConfig, processes: Processes) -> WeightAverage:
    if not 0 < cfg.ema < 1:
        raise InputError(f"ema is {cfg.ema}; it is a decay between 0 and 1, such as 0.999, or null")
    if cfg.trainer.strategy == "fsdp":
        raise InputError("ema needs whole weights: use trainer.strategy=ddp, or ema=null")
    return WeightAverage(cfg.ema, processes.device)


def build_network(
    cfg: DictConfig,
    data: SegmentationDataModule,
    state: dict[str, Any] | None,
    processes: Processes,
) -> Network:
    """Build the network that is trained.

    Args:
        cfg: Settings of the run.
        data: Whose classes and channels it is for.
        state: The content of the checkpoint that the run goes on from, if any.
        processes: Those that train it.

    Raises:
        InputError: The model, its weights or its channels do not fit.
    """
    preprocessing, model_config = dict(cfg.preprocessing), plain(cfg.model)
    if state is not None:
        preprocessing = state[checkpoint.KEY]["preprocessing"]
        if "weights" in model_config:
            model_config["weights"] = None  # they are in the checkpoint
    model = instantiate(model_config, num_classes=len(data.labels), _convert_="all")
    if data.format != RGB:
        adapt_first_conv(model, data.format.channels)
        if data.format.channels != 3 and None in (preprocessing["mean"], preprocessing["std"]):
            preprocessing["mean"], preprocessing["std"] = data.mean_and_std()
    if cfg.init_from is not None and state is None:
        initial = checkpoint.network_state(checkpoint.read(cfg.init_from))
        of_model = {k.removeprefix("model."): v for k, v in initial.items() if k[:6] == "model."}
        load_matching_weights(model, of_model, str(cfg.init_from))
    network = Network(model, preprocessing["mean"], preprocessing["std"])
    if data.format != RGB:
        check_channels(network, data.format.channels)
    freeze_unused_parameters(network)
    if processes.count > 1 and processes.device.type == "cuda":
        # Without it each GPU normalises its few images by their own statistics. The conversion of
        # PyTorch, which Lightning calls, would lose the activations of timm's BatchNorm.
        network = convert_sync_batchnorm(network)
    if mode := cfg.trainer.get("compile"):
        network.compile_for_training(mode)
    return network


def build_task(cfg: DictConfig, data: SegmentationDataModule, network: Network) -> SegmentationTask:
    """Build what trains a network."""
    return SegmentationTask(
        network,
        data.labels,
        loss=instantiate(cfg.loss, _convert_="all"),
        optimizer=instantiate(cfg.optimizer, _convert_="all"),
        scheduler=instantiate(cfg.get("scheduler"), _convert_="all") or None,
        aux_weight=cfg.aux_weight,
        warmup_steps=cfg.get("warmup_steps", 0),
        max_steps=cfg.trainer.max_steps,
        description=checkpoint.describe(
            network, data.labels, plain(cfg.model), plain(cfg.data), data.resize, data.format
        ),
        seed=cfg.seed,
        benchmark=bool(cfg.trainer.get("benchmark")),
    )


def load_best(
    network: Network, trainer: Trainer, folder: Path, processes: Processes
) -> tuple[float | None, int | None]:
    """Load the weights of the run's best epoch in all processes, if there is one.

    Other machines may not see the folder: the first process gives them the weights, tensor by
    tensor, of which FSDP takes each process's share.

    Returns:
        The score of that epoch's validation, `None` if there was no validation; and for the first
        process the number of the epoch, counted from 1.
    """
    epoch = None
    if processes.same((folder / "checkpoints" / "best.ckpt").exists()):
        reads = processes.is_first or not processes.connected
        content = checkpoint.read(folder) if reads else {}
        epoch = content["epoch"] + 1 if reads else None
        state: Any = checkpoint.network_state(content) if reads else {}
        network.to(processes.device)  # where the processes can exchange tensors
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=processes.connected)
        set_model_state_dict(network, state, options=options)
    best: Any = next(c for c in trainer.checkpoint_callbacks if c.monitor is not None)  # type: ignore[attr-defined]
    return None if best.best_model_score is None else best.best_model_score.item(), epoch


def plain(node: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain data."""
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]

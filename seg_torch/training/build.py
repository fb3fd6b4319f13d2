"""From a configuration to the parts of a training: network, task, callbacks."""

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    LearningRateMonitor,
    Timer,
)
from omegaconf import DictConfig, OmegaConf
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from seg_torch import hardware
from seg_torch.checkpoints import checkpoint
from seg_torch.configuration import instantiate, plain
from seg_torch.data import SegmentationDataModule
from seg_torch.data.sampling import EpochSampler
from seg_torch.distributed import Processes
from seg_torch.errors import InputError
from seg_torch.images.format import RGB
from seg_torch.models.network import Network, check_channels, freeze_unused_parameters
from seg_torch.models.weights import adapt_first_conv, load_matching_weights
from seg_torch.training import run
from seg_torch.training.averaging import WeightAverage
from seg_torch.training.callbacks import Checkpoints, EpochLine, History, SampleSheet
from seg_torch.training.divergence import StopOnDivergence
from seg_torch.training.optimizers import PARTS, build_optimizer
from seg_torch.training.patience import StopWithoutImprovement
from seg_torch.training.schedulers import check_scheduler
from seg_torch.training.task import SegmentationTask
from seg_torch.training.trainer import build_trainer, check_options

log = logging.getLogger(__name__)

# Callbacks of Lightning that change the optimizer, the schedule or the data behind their backs.
REPLACED = {
    BaseFinetuning: "model.freeze_encoder=5 trains the encoder from the sixth epoch on",
    BatchSizeFinder: "set data.batch_size",
    LearningRateFinder: "set optimizer.lr, or compare some: -m optimizer.lr=1e-4,1e-3",
}


def check_settings(cfg: DictConfig) -> None:
    """Refuse settings of a run that would be found wrong only after its data are read.

    Raises:
        InputError: One of them.
    """
    for key in ("seed", "data.seed"):
        seed = OmegaConf.select(cfg, key)
        if seed is not None and not 0 <= seed < 1 << 32:
            raise InputError(f"{key}={seed}: expected a whole number from 0 to {(1 << 32) - 1}")
    if cfg.optimizer.get("differentiable"):
        raise InputError(
            "optimizer.differentiable=true is for gradients of the optimizer's own steps, which "
            "are not taken here; leave it out"
        )
    if cfg.trainer.get("limit_train_batches") == 0:
        raise InputError("trainer.limit_train_batches=0: nothing would be trained; use 1 or more")
    check_options(plain(cfg.trainer))
    make_optimizer, make_scheduler = _optimizer_and_scheduler(cfg)
    options = {k: v for k, v in make_optimizer.keywords.items() if k not in PARTS}
    groups = [{"params": [nn.Parameter(torch.zeros(1))]}]
    optimizer = build_optimizer(make_optimizer.func, groups, options)
    if make_scheduler is not None:
        check_scheduler(make_scheduler, optimizer)


def _optimizer_and_scheduler(cfg: DictConfig) -> tuple[Any, Any]:
    """Return the optimizer and, if there is one, the schedule, as partials."""
    optimizer = instantiate(cfg.optimizer)
    return optimizer, instantiate(cfg.get("scheduler") or {}) or None


def check_interval(cfg: DictConfig, data: SegmentationDataModule, processes: Processes) -> None:
    """Refuse `trainer.val_check_interval` of more batches than an epoch has.

    Raises:
        InputError: It has fewer.
    """
    trainer, interval = cfg.trainer, cfg.trainer.get("val_check_interval")
    if not isinstance(interval, int) or trainer.check_val_every_n_epoch is None:
        return
    images = len(data.dataset("train")) * data.repeat
    batches = len(
        EpochSampler(images, data.batch_size, 0, world=processes.count, repeat=data.repeat)
    )
    limit = trainer.get("limit_train_batches")
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if interval > batches and trainer.get("limit_val_batches") != 0:
        raise InputError(
            f"trainer.val_check_interval={interval}: an epoch has only {batches} batches; "
            "trainer.check_val_every_n_epoch=N validates after every N epochs instead"
        )


def log_time_limit(trainer: Trainer, folder: Path) -> None:
    """Say that `trainer.max_time` has ended the training, which nobody else does."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    if any((timer.time_remaining() or 1) < 0 for timer in timers):
        log.info(
            "trainer.max_time has ended the training in epoch %d; with a longer one it goes on, by "
            "resume=%s trainer.max_time=DD:HH:MM:SS",
            trainer.current_epoch,
            folder,
        )


def build_callbacks(cfg: DictConfig, folder: Path, processes: Processes) -> list[Callback]:
    """Build the callbacks of a run, in the order in which each hook calls them.

    Raises:
        InputError: `ema` is no decay, or needs whole weights; `patience` is no number of
            validations; or a callback is one that does not work here.
    """
    history = History(folder)
    return [
        StopOnDivergence(folder),  # before anything is written about an epoch that has diverged
        history,
        EpochLine(history, folder),
        *([] if cfg.get("patience") is None else [StopWithoutImprovement(cfg.patience)]),
        *([LearningRateMonitor("step")] if cfg.get("logger") else []),
        SampleSheet(folder),  # draws with the averaged weights, before they are taken out again
        *([] if cfg.get("ema") is None else [_weight_average(cfg, processes)]),
        *(_callback(name, node) for name, node in cfg.callbacks.items()),
        # Lightning calls these after all others. The last one has to contain what the best one is.
        Checkpoints(folder, "best", monitor=checkpoint.SCORE),
        Checkpoints(folder, "last"),
    ]


def _callback(name: str, node: DictConfig) -> Callback:
    callback = instantiate(node)
    for kind, advice in REPLACED.items():
        if isinstance(callback, kind):
            raise InputError(
                f"callbacks.{name}: {type(callback).__name__} (Lightning's {kind.__name__}) does "
                f"not work with the schedules and exact resuming of train; {advice}"
            )
    return callback


def _weight_average(cfg: DictConfig, processes: Processes) -> WeightAverage:
    if not 0 < cfg.ema < 1:
        raise InputError(f"ema is {cfg.ema}; it is a decay between 0 and 1, such as 0.999, or null")
    if cfg.trainer.strategy == "fsdp":
        raise InputError("ema needs whole weights: use trainer.strategy=ddp, or ema=null")
    if str(cfg.trainer.precision) in hardware.TRUE_PRECISIONS:
        raise InputError(
            f"ema needs weights in float32, not trainer.precision={cfg.trainer.precision}: use "
            "bf16-mixed, or ema=null"
        )
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
    model = instantiate(model_config, num_classes=len(data.labels))
    if data.format != RGB:
        adapt_first_conv(model, data.format.channels)
        if data.format.channels != 3 and None in (preprocessing["mean"], preprocessing["std"]):
            preprocessing["mean"], preprocessing["std"] = data.mean_and_std()
    network = Network(model, preprocessing["mean"], preprocessing["std"])
    if cfg.init_from is not None and state is None:
        initial = checkpoint.network_state(checkpoint.read(cfg.init_from))
        of_model = {k.removeprefix("model."): v for k, v in initial.items() if k[:6] == "model."}
        load_matching_weights(network.model, of_model, str(cfg.init_from))
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
    optimizer, scheduler = _optimizer_and_scheduler(cfg)
    return SegmentationTask(
        network,
        data.labels,
        loss=instantiate(cfg.loss),
        optimizer=optimizer,
        scheduler=scheduler,
        aux_weight=cfg.aux_weight,
        warmup_steps=cfg.get("warmup_steps", 0),
        max_steps=cfg.trainer.max_steps,
        description=checkpoint.describe(
            network, data.labels, plain(cfg.model), plain(cfg.data), data.resize, data.format
        ),
        seed=cfg.seed,
        benchmark=bool(cfg.trainer.get("benchmark")),
    )


def log_settings(cfg: DictConfig, trainer: Trainer) -> None:
    """Give the settings of a run to its loggers, which compare runs by them."""
    for logger in trainer.loggers:
        logger.log_hyperparams({**plain(cfg), "resume": None})


def scoring_trainer(
    cfg: DictConfig, trainer: Trainer, processes: Processes, folder: Path
) -> Trainer:
    """Return the Trainer that scores the best epoch: in float32, as evaluate.py does.

    One that trains in `bf16-true` or the like would give the network's weights that type again.
    """
    if trainer.precision not in hardware.TRUE_PRECISIONS:
        return trainer
    others = {"trainer": {"precision": "32-true"}, "logger": None}
    scoring = build_trainer(OmegaConf.merge(cfg, others), processes, folder)  # type: ignore[arg-type]
    scoring.loggers = trainer.loggers
    return scoring


def read_state(folder: Path) -> dict[str, Any]:
    """Read what a run that goes on has to know of its last checkpoint before it is loaded.

    The file is closed again: Windows could not replace it by the next one.

    Raises:
        InputError: It cannot be read.
    """
    content = checkpoint.read(run.last_checkpoint(folder))
    return copy.deepcopy(
        {key: content[key] for key in (checkpoint.KEY, "loops", "global_step", "callbacks")}
    )


def load_best(
    network: Network, folder: Path, processes: Processes
) -> tuple[float | None, int | None]:
    """Load the weights of the run's best epoch in all processes; without validation, of its last.

    Other machines may not see the folder: the first process gives them the weights, tensor by
    tensor, of which FSDP takes each process's share. The network is in float32 afterwards.

    Returns:
        The score of the best epoch's validation, and the number of the epoch, counted from 1;
        `None` if there was no validation.
    """
    network.float()  # the weights of a training in bf16-true are others
    files = [folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
    file = processes.same(next((file for file in files if file.exists()), None))
    if file is None:
        return None, None  # nothing was to be trained
    reads = processes.is_first or not processes.connected
    content = checkpoint.read(file) if reads else {}
    score = checkpoint.best_score(content) if file.stem == "best" else None
    epoch = content["epoch"] + 1 if score is not None else None
    state: Any = checkpoint.network_state(content) if reads else {}
    network.to(processes.device)  # where the processes can exchange tensors
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=processes.connected)
    set_model_state_dict(network, state, options=options)
    return processes.same((score, epoch))

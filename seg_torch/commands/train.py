"""train.py: trains a model, keeps its best epoch, and scores that on the test set."""

from __future__ import annotations

import errno
import logging
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig, OmegaConf
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from seg_torch import hardware
from seg_torch.checkpoints import checkpoint
from seg_torch.data.module import SegmentationDataModule
from seg_torch.errors import InputError
from seg_torch.files import write_atomically
from seg_torch.images.format import RGB
from seg_torch.models.network import (
    Network,
    check_channels,
    freeze_unused_parameters,
    named_compile_errors,
    synchronise_batchnorm,
)
from seg_torch.models.weights import load_matching_weights, take_channels
from seg_torch.prediction.inference import Inference
from seg_torch.training.callbacks import (
    Checkpoints,
    History,
    SampleSheet,
    StopOnSignal,
    WeightAverage,
)
from seg_torch.training.run import claim, is_complete, last_checkpoint, next_step, requeued_config
from seg_torch.training.task import SegmentationTask
from seg_torch.training.trainer import (
    FullySharded,
    build_trainer,
    on_first_process,
    on_other_machines,
    run_folder,
    score,
)

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> float | None:
    """Trains, keeps the best epoch, and scores it on the test set.

    Returns:
        The mean IoU of the best epoch's validation; `None` if there was no validation.

    Raises:
        InputError: Something is wrong with the settings, the data, the disk or the numbers.
        StoppedError: A signal came, see `seg_torch.training.callbacks.StopOnSignal`.
    """
    cfg = requeued_config(cfg)
    trainer = build_trainer(cfg.trainer)
    folder = run_folder(trainer, cfg)
    try:
        with StopOnSignal(folder) as stop:
            return _train(cfg, trainer, folder, stop)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        raise InputError(
            f"{error.filename or folder}: {error.strerror}. What was saved before is complete; "
            f"when this is mended, {next_step(folder)}"
        ) from error


def _train(cfg: DictConfig, trainer: Trainer, folder: Path, stop: StopOnSignal) -> float | None:
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    resumed = checkpoint.read(last_checkpoint(cfg.resume)) if cfg.resume else None
    on_first_process(trainer, partial(claim, folder, cfg.trainer, resumed))
    data: SegmentationDataModule = instantiate(cfg.data, _convert_="all")
    on_first_process(trainer, data.check_files)  # and downloads them
    on_other_machines(trainer, data.fetch)
    task = _task(cfg, data, trainer, folder, resumed)

    trainer.loggers = [instantiate(node) for node in (cfg.get("logger") or {}).values()]
    best = Checkpoints(folder, "best", monitor="val/mean_iou")
    trainer.callbacks += [  # type: ignore[attr-defined]
        *([LearningRateMonitor("step")] if trainer.loggers else []),
        History(folder),
        SampleSheet(folder),
        *([_weight_average(cfg.ema, trainer)] if cfg.get("ema") is not None else []),
        *(instantiate(node) for node in cfg.callbacks.values()),
        best,
        Checkpoints(folder, "last"),  # after all that it has to contain
        stop,
    ]
    if trainer.is_global_zero:
        _announce(cfg, trainer, task, data, folder)

    if resumed is None or not is_complete(resumed, cfg.trainer):  # else it was killed in the test
        last = None if resumed is None else last_checkpoint(folder)
        with hardware.named_nondeterminism(), named_compile_errors():
            trainer.fit(task, datamodule=data, ckpt_path=last, weights_only=True)
    state: Any = None
    if (folder / "checkpoints" / "best.ckpt").exists():
        state = checkpoint.network_state(checkpoint.read(folder))
    state = trainer.strategy.broadcast(state)  # other machines may not see the folder
    if state is not None:
        whole = StateDictOptions(full_state_dict=True)  # of which FSDP takes each process's share
        set_model_state_dict(task.network, state, options=whole)
    # As evaluate.py will score it: in float32.
    task.inference = Inference(task.network, len(task.labels), data.resize, precision="32-true")
    score(trainer, task, data, folder, "test")
    return None if best.best_model_score is None else best.best_model_score.item()


def _task(
    cfg: DictConfig,
    data: SegmentationDataModule,
    trainer: Trainer,
    folder: Path,
    resumed: dict[str, Any] | None,
) -> SegmentationTask:
    """Build the network and what trains it."""
    labels = data.labels
    preprocessing = dict(cfg.preprocessing)
    model_config = _plain(cfg.model)
    if resumed is not None:
        preprocessing = resumed[checkpoint.KEY]["preprocessing"]
        if "weights" in model_config:
            model_config["weights"] = None  # they are in the checkpoint
    model = instantiate(model_config, num_classes=len(labels), _convert_="all")
    if data.format != RGB:
        take_channels(model, data.format.channels)
        if data.format.channels != 3 and None in (preprocessing["mean"], preprocessing["std"]):
            preprocessing["mean"], preprocessing["std"] = data.mean_and_std()
    network = Network(model, preprocessing["mean"], preprocessing["std"])
    if data.format != RGB:
        check_channels(network, data.format.channels)
    if cfg.init_from is not None and resumed is None:
        state = checkpoint.network_state(checkpoint.read(cfg.init_from))
        model_state = {k.removeprefix("model."): v for k, v in state.items() if k[:6] == "model."}
        load_matching_weights(model, model_state, str(cfg.init_from))
    freeze_unused_parameters(network)
    if trainer.world_size > 1 and trainer.strategy.root_device.type == "cuda":
        # Without it each GPU normalises its few images by their own statistics.
        synchronise_batchnorm(network)
    if mode := cfg.trainer.get("compile"):
        network.compile_for_training(mode)
    return SegmentationTask(
        network,
        labels,
        loss=instantiate(cfg.loss, _convert_="all"),
        optimizer=instantiate(cfg.optimizer, _convert_="all"),
        scheduler=instantiate(cfg.get("scheduler"), _convert_="all") or None,
        aux_weight=cfg.aux_weight,
        warmup_steps=cfg.get("warmup_steps", 0),
        max_steps=cfg.trainer.max_steps,
        description=checkpoint.describe(
            network, labels, _plain(cfg.model), _plain(cfg.data), data.resize, data.format
        ),
        seed=cfg.seed,
        benchmark=bool(cfg.trainer.get("benchmark")),
    )


def _weight_average(decay: float, trainer: Trainer) -> WeightAverage:
    if not 0 < decay < 1:
        raise InputError(f"ema is {decay}; it is a decay between 0 and 1, such as 0.999, or null")
    if isinstance(trainer.strategy, FullySharded):
        raise InputError("ema needs whole weights: use trainer.strategy=ddp, or ema=null")
    return WeightAverage(decay, trainer.strategy.root_device)


def _announce(
    cfg: DictConfig,
    trainer: Trainer,
    task: SegmentationTask,
    data: SegmentationDataModule,
    folder: Path,
) -> None:
    config = OmegaConf.merge(cfg, {"resume": None})
    write_atomically(folder / "config.yaml", lambda path: OmegaConf.save(config, path, True))
    trained = sum(p.numel() for p in task.network.parameters() if p.requires_grad) / 1e6
    log.info(
        "%d training images, %d classes, %.1f M trainable weights, %s, effective batch %d",
        len(data.dataset("train")),
        len(data.labels),
        trained,
        trainer.precision,
        data.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
    )
    if trainer.world_size > 1:
        on_gpus = trainer.strategy.root_device.type == "cuda"
        log.info("%d processes%s", trainer.world_size, ", synchronised BatchNorm" * on_gpus)
    log.info("output_dir=%s", folder)


def _plain(node: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]

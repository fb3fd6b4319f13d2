"""From data, machine and time to the settings of a run."""

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from seg_torch.configuration import escaped, instantiate
from seg_torch.data import SegmentationDataModule
from seg_torch.data.sampling import EpochSampler
from seg_torch.distributed import Processes
from seg_torch.files import CONFIG_FOLDER
from seg_torch.hardware import total_memory
from seg_torch.images.resize import in_words
from seg_torch.planning import rules
from seg_torch.planning.budget import as_time, seconds_of
from seg_torch.planning.fingerprint import Fingerprint, fingerprint
from seg_torch.planning.rules import Decision, Rule, Situation, is_given
from seg_torch.planning.trial import batch_size_that_fits, trial

log = logging.getLogger(__name__)

# What makes a run end; where the user sets some of it and no budget, the length is the user's.
LENGTH = (
    *("max_epochs", "max_steps", "max_time", "limit_train_batches", "overfit_batches"),
    *("val_check_interval", "check_val_every_n_epoch"),
)
SIDE = 256  # of the images with which the speed of the network is measured
END = 2.5  # seconds in which a run loads its best epoch, writes its results, and ends
SAFE = 0.96  # share of the budget that is planned with


@dataclass
class Plan:
    """What is decided for a run.

    Attributes:
        data: What is in the dataset.
        decisions: Settings, in the order in which they were decided.
        steps: Optimizer steps; infinite where nothing ends the run.
        seconds: Of the whole run, its start included; `None` where nothing was measured.
        peak_bytes: Most memory that it takes; `None` in the same case.
    """

    data: Fingerprint
    decisions: list[Decision]
    steps: float
    seconds: float | None
    peak_bytes: int | None


class Times(NamedTuple):
    """Seconds of a step, of a validation with what else an epoch takes, and of start and end."""

    step: float
    validation: float
    rest: float


def is_wanted(cfg: DictConfig) -> bool:
    """Return whether there is something to decide: on the command line, with recipe or budget."""
    return cfg.get("given") is not None and bool(cfg.get("recipe") or cfg.get("budget"))


def follow(
    cfg: DictConfig, data: SegmentationDataModule, processes: Processes, started: float
) -> SegmentationDataModule:
    """Make the plan of a run, log its essence, and return the data with its settings."""
    plan, data = make_plan(cfg, data, processes, started)
    if processes.is_first:
        for line in describe(plan, cfg):
            log.info("%s", line)
    return data


def make_plan(
    cfg: DictConfig,
    data: SegmentationDataModule,
    processes: Processes,
    started: float,
    trial_seconds: float | None = None,
) -> tuple[Plan, SegmentationDataModule]:
    """Decide what the user has not, and put it into the configuration.

    Args:
        cfg: Of train; `given` are the names of the user's settings, which stay.
        data: Its data.
        processes: Those that train.
        started: `time.monotonic()` at the start of the command.
        trial_seconds: Of the trial that finds out how long a run takes. By default it is as long
            as the budget allows, and there is none where the length of the run is the user's.

    Returns:
        The plan, and the data with its settings.

    Raises:
        InputError: The data cannot be used, or the budget is no time or too short.
    """
    processes.start()
    budget = None if cfg.budget is None else SAFE * seconds_of(cfg.budget)
    memory = total_memory(torch.device("cpu")) / 8
    now = Situation(fingerprint(data), processes.device.type, processes.count, budget, 0.0, memory)
    decisions: list[Decision] = []
    decide = partial(_decide, cfg, processes, decisions)
    if cfg.recipe:
        decide(rules.FOR_THE_SPEED, now)
        if budget is not None:
            now = replace(now, pixel_rate=_pixel_rate(cfg, data, processes))
        decide(rules.BY_THE_SPEED, now)
        data = _with_settings(cfg, data)
        if now.device != "cpu":
            sizes = [n for n in (1, 2, 4, 8, 16, 32) if n <= cfg.data.batch_size]
            fitting = batch_size_that_fits(cfg, data, processes, sizes)
            decide([partial(rules.fitting_batch, fitting=fitting), rules.learning_rate], now)
            data = _with_settings(cfg, data)
    open_end = budget is not None or (cfg.recipe and not _ends(cfg))
    seconds = peak_bytes = None
    if open_end or trial_seconds is not None:
        times, peak_bytes = _measured(cfg, data, processes, now, started, trial_seconds)
        if open_end:
            decide([partial(rules.length, times=times)], now)
    steps, validations = _length(cfg, now.data.images["train"], processes.count)
    if peak_bytes is not None:
        seconds = times.rest + steps * times.step + validations * times.validation
    OmegaConf.update(cfg, "plan", escaped({s: why for s, _, why in decisions}), force_add=True)
    return Plan(now.data, decisions, steps, seconds, peak_bytes), _with_settings(cfg, data)


def _measured(
    cfg: DictConfig,
    data: SegmentationDataModule,
    processes: Processes,
    now: Situation,
    started: float,
    trial_seconds: float | None,
) -> tuple[Times, int]:
    """Return what the parts of a run take, and the bytes of its memory."""
    if trial_seconds is None:  # a few per cent of the budget
        trial_seconds = min(30.0, max(4.0, 0.03 * (now.seconds or 0)))
    found = trial(cfg, data, processes, trial_seconds)
    images = now.data.images
    rest = processes.same(time.monotonic() - started) + found.start_seconds + END
    rest += images.get("test", images["val"]) * found.test_seconds
    validation = images["val"] * found.val_seconds + found.epoch_seconds
    return Times(found.step_seconds, validation, rest), found.peak_bytes


def _decide(
    cfg: DictConfig,
    processes: Processes,
    decisions: list[Decision],
    some_rules: Iterable[Rule],
    now: Situation,
) -> None:
    """Decide by rules, one after the other, what the user has not set: all processes the same."""
    for rule in some_rules:
        for decision in processes.first(partial(_decided, rule, cfg, now)) or ():
            setting, value, _ = decision
            if is_given(setting, cfg.given):
                continue
            if setting == "loss":
                value = OmegaConf.load(CONFIG_FOLDER / "loss" / f"{value}.yaml")
                OmegaConf.update(cfg, "loss", value, merge=False, force_add=True)
            else:
                OmegaConf.update(cfg, setting, escaped(value), merge=False, force_add=True)
            decisions[:] = [d for d in decisions if d.setting != setting] + [decision]


def _decided(rule: Rule, cfg: DictConfig, now: Situation) -> list[Decision]:
    return list(rule(cfg, now))


def _ends(cfg: DictConfig) -> bool:
    """Whether the user has said when the run ends."""
    keys = [f"trainer.{key}" for key in LENGTH]
    return any(is_given(key, cfg.given) for key in [*keys, "data.repeat"])


def _with_settings(cfg: DictConfig, data: SegmentationDataModule) -> SegmentationDataModule:
    """Return the data with the settings that they have now; nothing is read again."""
    new: SegmentationDataModule = instantiate(cfg.data)
    new.take_over(data)
    return new


def _pixel_rate(cfg: DictConfig, data: SegmentationDataModule, processes: Processes) -> float:
    """Return how many pixels of training images a process takes in a second."""
    sides = {"resize": [SIDE, SIDE], "max_side": None, "batch_size": 4, "cache": "ram"}
    unscored = {"limit_val_batches": 0, "limit_test_batches": 0}
    small = OmegaConf.merge(cfg, {"data": {**sides, "num_workers": 0}, "trainer": unscored})
    if small.data.get("augment") is not None:
        small.data.augment.crop = None
    measured = trial(small, _with_settings(small, data), processes, 2.0)  # type: ignore[arg-type]
    batches = cfg.trainer.accumulate_grad_batches
    return processes.same(4 * batches * SIDE**2 / measured.step_seconds)


def _length(cfg: DictConfig, images: int, processes: int) -> tuple[float, float]:
    """Return the optimizer steps and the validations of a run."""
    trainer, batch_size = cfg.trainer, cfg.data.batch_size
    sampler = EpochSampler(images, batch_size, 0, world=processes, repeat=cfg.data.get("repeat", 1))
    batches, limit = len(sampler), trainer.get("limit_train_batches")
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    each = math.ceil(batches / trainer.accumulate_grad_batches)
    epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
    most = trainer.max_steps if trainer.max_steps > 0 else math.inf
    epochs = min(epochs, most / each)
    return min(epochs * each, most), math.ceil(epochs / (trainer.check_val_every_n_epoch or 1))


def describe(plan: Plan, cfg: DictConfig) -> list[str]:
    """Return the essence of a plan, in lines."""
    data = cfg.data
    crop = (data.get("augment") or {}).get("crop")
    window = f"crops of {crop[0]} x {crop[1]}" if crop else "whole images"
    network = cfg.model.get("encoder") or cfg.model.get("backbone") or cfg.model._target_
    seen = in_words(data.get("max_side") or data.get("resize"))
    length = f"{plan.steps:.0f} steps in {cfg.trainer.max_epochs} epochs"
    if plan.seconds is not None and plan.peak_bytes is not None:
        length += f", about {as_time(plan.seconds)}, {plan.peak_bytes / 1e9:.1f} GB of memory"
    return [
        f"plan: {network}, {window} {seen}, batches of {data.batch_size}, rate {cfg.optimizer.lr}",
        f"plan: {length}",
        "plan: config.yaml has the reasons; recipe=null leaves the settings as they are",
    ]

"""What a training step and a validation really take here: a short run that is thrown away."""

import copy
import gc
import logging
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

import torch
from lightning import Callback
from lightning.pytorch.utilities.memory import is_oom_error
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, open_dict

from seg_torch import hardware
from seg_torch.data import SegmentationDataModule
from seg_torch.distributed import Processes
from seg_torch.errors import InputError
from seg_torch.evaluation.scorer import Scorer
from seg_torch.models.network import named_compile_errors
from seg_torch.planning.part import PartOfData
from seg_torch.prediction.inference import Inference, InferenceSettings
from seg_torch.training import build
from seg_torch.training.averaging import WeightAverage
from seg_torch.training.divergence import StopOnDivergence
from seg_torch.training.trainer import build_trainer

TRAINING, SCORING = 0.6, 0.2  # shares of the seconds of a trial; the latter twice
# Settings of the length of a run, and what would look into it.
LENGTHS = (
    *("max_time", "min_steps", "min_epochs", "overfit_batches", "val_check_interval", "profiler"),
    *("limit_train_batches", "limit_test_batches", "fast_dev_run"),
    "reload_dataloaders_every_n_epochs",
)


class Trial(NamedTuple):
    """What the parts of a run take.

    Where the device has too little memory for a step, the seconds are infinite and `peak_bytes` is
    all of its memory.

    Attributes:
        start_seconds: Of building network, loaders and workers, of decoding what is kept, and of
            what first steps take longer than later ones; once.
        step_seconds: Of an optimizer step, its data included.
        val_seconds: Of a validation image, in all processes together: seconds by images.
        test_seconds: Of a test image, in the same way.
        epoch_seconds: Of an epoch beside its steps and its validation: checkpoints, tables,
            figures, and waiting for the first batch.
        peak_bytes: Memory at most: on CUDA, of the tensors on the device; elsewhere of this process
            and its workers, with the samples that are kept in memory.
    """

    start_seconds: float
    step_seconds: float
    val_seconds: float
    test_seconds: float
    epoch_seconds: float
    peak_bytes: int


def trial(
    cfg: DictConfig, data: SegmentationDataModule, processes: Processes, seconds: float
) -> Trial:
    """Train for about so many seconds with the settings of a run and throw the result away.

    All processes have to call it. Nothing is written but in a temporary folder, and random numbers,
    flags and memory are afterwards as before.

    Args:
        cfg: The settings of `train`. How long the run is, its own callbacks and its loggers make no
            difference.
        data: Of these settings; its files have been checked.
        processes: Those that will train.
        seconds: Of steps and scoring, besides the start. Two steps, and two validation images, are
            taken in any case.

    Raises:
        InputError: As the run would: the model, the loss or the data do not fit.
    """
    processes.start()
    return processes.same(_measure(cfg, data, processes, seconds))


def batch_size_that_fits(
    cfg: DictConfig, data: SegmentationDataModule, processes: Processes, sizes: Sequence[int]
) -> int:
    """Return the largest batch size whose step fits into memory.

    On a GPU steps are tried, from small to large, and a tenth of the free memory is left alone. On
    a CPU, where too large a step would end the process or more, half of the memory is shared out by
    what steps with one and two images take. Of several processes the first one finds out.

    Args:
        cfg: The settings of `train`.
        data: Of these settings.
        processes: Those that will train.
        sizes: Images per process and step to choose from.

    Raises:
        InputError: None of them fits.
    """
    processes.start()
    alone = copy.copy(processes)
    alone.count = 1
    alone.settings = {**processes.settings, "devices": 1, "num_nodes": 1}
    if processes.device.type == "cuda":
        alone.settings["devices"] = [processes.device.index or 0]
    try_out = _largest_on_gpu if processes.device.type == "cuda" else _largest_on_cpu
    found = processes.first(lambda: try_out(cfg, data, alone, sorted(sizes)))
    assert found is not None  # the processes are connected
    return found


def _largest_on_gpu(
    cfg: DictConfig, data: SegmentationDataModule, processes: Processes, sizes: Sequence[int]
) -> int:
    device = processes.device
    largest, limit = 0, 0.9 * torch.cuda.mem_get_info(device)[0]
    for size in sizes:
        try:
            found = _measure_steps(cfg, data, processes, size)
        except InputError:  # some networks cannot train on one image
            if size > 1 or len(sizes) == 1:
                raise
            continue
        if math.isinf(found.step_seconds) or found.peak_bytes > limit:
            break
        largest = size
    if largest == 0:
        raise _too_large(sizes[0], limit)
    return largest


def _largest_on_cpu(
    cfg: DictConfig, data: SegmentationDataModule, processes: Processes, sizes: Sequence[int]
) -> int:
    limit = hardware.total_memory(processes.device) / 2
    images = 1
    try:
        first = _measure_steps(cfg, data, processes, images).peak_bytes
    except InputError:  # some networks cannot train on one image
        if sizes[-1] == 1:
            raise
        images = 2
        first = _measure_steps(cfg, data, processes, images).peak_bytes
    each = max(0, _measure_steps(cfg, data, processes, images + 1).peak_bytes - first)
    fitting = [n for n in sizes if n >= images and first + (n - images) * each <= limit]
    if not fitting:
        raise _too_large(sizes[0], limit)
    return fitting[-1]


def _too_large(size: int, limit: float) -> InputError:
    return InputError(
        f"a training step with {size} images takes more memory than there is ({limit / 1e9:.1f} "
        "GB): set data.batch_size=1, a smaller data.augment.crop or data.resize, a smaller model, "
        "or trainer.precision=bf16-mixed"
    )


def _measure_steps(
    cfg: DictConfig, data: SegmentationDataModule, processes: Processes, batch_size: int
) -> Trial:
    other = copy.copy(data)
    other.batch_size = batch_size
    return _measure(cfg, other, processes, seconds=0, steps_only=True)


def _measure(
    cfg: DictConfig,
    data: SegmentationDataModule,
    processes: Processes,
    seconds: float,
    steps_only: bool = False,
) -> Trial:
    with _no_trace(processes.device), tempfile.TemporaryDirectory(prefix="seg_torch-") as folder:
        try:
            return _run(cfg, data, processes, seconds, Path(folder), steps_only)
        except Exception as error:
            on_gpu = processes.device.type == "cuda"
            if not on_gpu or not (isinstance(error, torch.OutOfMemoryError) or is_oom_error(error)):
                raise
    everything = hardware.total_memory(processes.device)
    return Trial(0.0, math.inf, math.inf, math.inf, math.inf, everything)


@contextmanager
def _no_trace(device: torch.device) -> Iterator[None]:
    """Enter a context after which random numbers, flags, logs and memory are as before."""
    log = logging.getLogger("seg_torch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with isolate_rng(device.type == "cuda"), hardware.restored_flags(), catch_warnings():
            simplefilter("ignore")  # the run itself warns
            yield
    finally:
        log.setLevel(level)
        gc.collect()  # which ends the workers, too
        hardware.return_memory()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _run(
    cfg: DictConfig,
    data: SegmentationDataModule,
    processes: Processes,
    seconds: float,
    folder: Path,
    steps_only: bool,
) -> Trial:
    """Train, validate, save and test, each for a while."""
    given, accumulated = cfg.trainer, cfg.trainer.get("accumulate_grad_batches") or 1
    validates = not steps_only and given.get("limit_val_batches") != 0
    cfg = _short(cfg, validates)
    part = PartOfData(data, SCORING * seconds, processes.device.type == "cpu")
    clock = Clock(part, TRAINING * seconds, processes.device)
    network = build.build_network(cfg, part, None, processes)
    task = build.build_task(cfg, part, network)
    callbacks = [c for c in build.build_callbacks(cfg, folder, processes) if _stays(c, steps_only)]
    trainer = build_trainer(cfg, processes, folder, [*callbacks, clock])
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.disable()
    with hardware.named_nondeterminism(), named_compile_errors():
        trainer.fit(task, datamodule=part)
    step = clock.step_seconds()
    val, epoch = clock.image_seconds() if validates else 0.0, clock.epoch_seconds
    start = clock.start_seconds() + sum(samples.seconds_of_rest() for samples in part.kept)
    start += _sanity_images(given, data) * val
    test = 0.0
    if not steps_only and given.get("limit_test_batches") != 0:
        settings = InferenceSettings(precision="32-true")  # as train has it
        inference = Inference(network, len(part.labels), data.resize, settings)
        trainer = build.scoring_trainer(cfg, trainer, processes, folder)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if clock not in callbacks:
            callbacks.append(clock)
        with hardware.full_float32():
            trainer.test(Scorer(inference, part.labels), datamodule=part, verbose=False)
        test = clock.image_seconds()
    val, test = val / processes.count, test / processes.count
    step *= accumulated / cfg.trainer.accumulate_grad_batches
    return Trial(start, step, val, test, epoch, clock.peak_bytes())


def _short(cfg: DictConfig, validates: bool) -> DictConfig:
    """Return the settings of one epoch, which the clock ends."""
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        cfg.callbacks, cfg.logger, cfg.patience, cfg.resume = {}, None, None, None
        for name in LENGTHS:
            cfg.trainer.pop(name, None)
        cfg.trainer.max_epochs, cfg.trainer.max_steps = 1, -1
        cfg.trainer.check_val_every_n_epoch, cfg.trainer.num_sanity_val_steps = 1, 0
        cfg.trainer.limit_val_batches = None if validates else 0
        # The gradients of several batches take the memory of those of two.
        batches = cfg.trainer.get("accumulate_grad_batches") or 1
        cfg.trainer.accumulate_grad_batches = min(2, batches)
    return cfg


def _stays(callback: Callback, steps_only: bool) -> bool:
    """Whether a callback of the run is part of the trial, which may diverge."""
    if steps_only:
        return isinstance(callback, WeightAverage)
    return not isinstance(callback, StopOnDivergence)


def _sanity_images(trainer: DictConfig, data: SegmentationDataModule) -> int:
    """Return how many images a run validates before it trains."""
    images, batches = len(data.dataset("val")), trainer.get("num_sanity_val_steps", 2)
    return images if batches == -1 else min(images, batches * data.eval_batch_size)


class Clock(Callback):
    """Ends the training after some seconds and two steps, and takes the times.

    Steps count from the second one on, and where there is time for it, from when the workers have
    prepared as many batches as they do ahead: until then a CPU shares its cores with more of them
    than later.

    Args:
        part: The data, with their clock.
        seconds: Of the steps, after the first one.
        device: Of the network.

    Attributes:
        epoch_seconds: Of the epoch beside its steps and its validation.
    """

    def __init__(self, part: PartOfData, seconds: float, device: torch.device) -> None:
        self.part, self.seconds, self.device = part, seconds, device
        self.created = part.time()
        self.steps, self.begun, self.settled = 0, (0, 0.0), False
        self.ended = self.first = self.last = (0, 0.0)  # a number of steps or images, and when
        self.epoch_seconds = 0.0
        self.memory = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def now(self) -> float:
        """Return the time at which the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.part.time()

    def on_train_start(self, trainer: Any, task: Any) -> None:
        self.batches = trainer.accumulate_grad_batches

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.steps:
            return  # of several batches for a step this is not the last
        self.steps = steps = trainer.global_step
        now = self.part.time() if self.settled else self.now()
        if steps == 1:
            self.warm = now
        elapsed = now - self.warm
        if trainer.strategy.broadcast(steps > 1 and elapsed >= self.seconds):
            self.ended = steps, self.now()
            self.look_at_memory()
            trainer.should_stop = True
            self.last = 0, self.part.time()  # without a validation
        elif not self.settled:
            self.begun = steps, now
            self.full = steps >= self.part.train.ahead + 2
            self.settled = self.full or elapsed >= self.seconds / 2

    def on_validation_start(self, trainer: Any, task: Any) -> None:
        self.first = self.last = 0, 0.0

    def on_validation_batch_end(
        self, trainer: Any, task: Any, outputs: Any, groups: Any, *_: Any
    ) -> None:
        images = self.last[0] + sum(len(numbers) for *_, numbers in groups)
        if self.first[0] == 0:
            self.first = images, self.now()
        self.last = images, 0.0

    def on_validation_epoch_end(self, trainer: Any, task: Any) -> None:
        self.last = self.last[0], self.now()
        # A run is refused where no pixel is labelled; a few of its images may well have none.
        pixel = torch.zeros(1, 1, dtype=torch.uint8, device=task.device)
        task.confusion.update(pixel, pixel)

    def on_train_end(self, trainer: Any, task: Any) -> None:
        self.epoch_seconds = self.now() - self.last[1]
        self.epoch_seconds += self.part.train.seconds  # the first batch is waited for
        self.look_at_memory()

    def on_test_start(self, trainer: Any, task: Any) -> None:
        self.on_validation_start(trainer, task)

    def on_test_batch_end(self, trainer: Any, task: Any, *results: Any) -> None:
        self.on_validation_batch_end(trainer, task, *results)

    def on_test_epoch_end(self, trainer: Any, task: Any) -> None:
        self.last = self.last[0], self.now()

    def on_test_end(self, trainer: Any, task: Any) -> None:
        self.look_at_memory()

    def look_at_memory(self) -> None:
        """Note the memory in use on a CPU, where training keeps what it has freed."""
        if self.device.type != "cuda":
            self.memory = max(self.memory, resident_memory())

    def step_seconds(self) -> float:
        """Return the seconds of an optimizer step."""
        (steps, begun), (all_steps, ended) = self.begun, self.ended
        measured = (ended - begun) / (all_steps - steps)
        # The first batches were ready: they may have come faster than they can be prepared.
        return measured if self.full else max(measured, self.batches * self.part.train.fastest)

    def start_seconds(self) -> float:
        """Return the seconds of what precedes the steps, with what the first ones took longer."""
        steps, begun = self.begun
        return max(0.0, begun - self.created - steps * self.step_seconds())

    def image_seconds(self) -> float:
        """Return the seconds of an image of the split that was scored last, in this process."""
        (images, first), (all_images, last) = self.first, self.last
        if all_images > images:
            images, seconds = all_images - images, last - first
        else:
            seconds = last - self.part.images.started
        return max(seconds / max(1, images), self.part.scored.fastest / self.part.eval_batch_size)

    def peak_bytes(self) -> int:
        """Return the most memory of a run."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self.memory + sum(samples.bytes_of_rest() for samples in self.part.kept)


def resident_memory() -> int:
    """Return the bytes of memory that this process and its workers take.

    Elsewhere than on Linux it is the most that this process has taken so far, 0 where the system
    does not say.
    """
    if sys.platform == "linux":
        return memory_of(os.getpid(), [child.pid for child in multiprocessing.active_children()])
    if sys.platform == "win32":
        return 0
    import resource  # which Windows does not have

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


def memory_of(process: int, workers: Iterable[int | None]) -> int:
    """Return the bytes of memory of a process, and of its workers what is theirs alone (Linux)."""
    total = _kilobytes(process)["Rss"]
    for worker in workers:
        own = _kilobytes(worker)
        total += own["Private_Clean"] + own["Private_Dirty"] + own["Pss_Shmem"]
    return 1024 * total


def _kilobytes(process: int | None) -> dict[str, int]:
    text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
    return {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}

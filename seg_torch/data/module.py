"""Datasets to batches.

Three rules make runs repeatable and scores exact:

* The order of the training images depends on (seed, epoch) alone and the augmentation of an image
  on (seed, epoch, index) alone: not on the number of workers, nor on where a run was interrupted.
* Every process scores its own share of the evaluation images, none twice.
* Evaluation never resizes labels; images of one size go through the model together.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors

from seg_torch.data.cache import (
    CachedSamples,
    map_samples,
    samples_in_memory,
    samples_on_disk,
    write_samples,
)
from seg_torch.data.check import Check, Problem, cache_folder, check, fingerprint
from seg_torch.datasets import base
from seg_torch.errors import InputError, check_choice
from seg_torch.hardware import available_cpus, reuse_memory, total_memory
from seg_torch.images.format import RGB, ImageFormat
from seg_torch.images.resize import resize_image, resize_mask
from seg_torch.labels import Labels
from seg_torch.version import __version__

log = logging.getLogger(__name__)

Sample = tuple[torch.Tensor, torch.Tensor]
# Images [n, C, H, W] of one size, masks [n, h, w], and their numbers in the dataset.
EvaluationGroup = tuple[torch.Tensor, torch.Tensor, list[int]]


class SegmentationDataModule(LightningDataModule):
    """Loaders over one dataset.

    Args:
        dataset: `dataset(split=...)` or, with `root`, `dataset(root=..., split=...)` gives
            the samples of `train`, `val` and `test`; see `seg_torch.datasets`.
        root: The dataset's folder.
        batch_size: Training images per device and step.
        eval_batch_size: Images per device that are evaluated together, by default 4; on a CPU they
            still go through the network one by one, which is as fast.
        num_workers: Processes that prepare batches; by default as many as there are CPUs for each
            device, at most 8, but none for images that are kept where the network runs on the CPU.
        resize: (height, width) at which the network sees every image; `None` for its own size.
        augment: Transform of the training samples, see `seg_torch.data.transforms.augment`.
        cache: Where the decoded and resized samples are kept, once per machine: "none", "ram", or
            "disk" for a file in `~/.cache/seg_torch/samples` (or below `XDG_CACHE_HOME`), which
            later runs use, too, for as long as the names, sizes and times of all files stay the
            same. `False` and `True` mean "none" and "ram". Where one process trains on the CPU,
            "none" keeps the validation images, unless they take a 16th of the memory.
        check: Whether `check_files` does anything.
        seed: Seed of order and augmentation.
        download: Ask the dataset to fetch itself, for those that can.
        name: What the dataset is called, for those that are looked up by name.
        channels: Of images that are not read as RGB, see `ImageFormat`, like the three
            that follow. The dataset is given them as `format`.
        bits: Of each of their values.
        band_files: Endings of the files that are one image.
        rgb: Channels that are shown.

    Raises:
        InputError: A batch size is below 1, there is no such `cache`, or `ImageFormat` raises it.
    """

    def __init__(
        self,
        dataset: Callable[..., Any],
        root: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        resize: Sequence[int] | None = None,
        augment: Callable[..., Any] | None = None,
        cache: str | bool = "none",
        check: bool = True,
        seed: int = 0,
        download: bool = False,
        name: str | None = None,
        channels: int | None = None,
        bits: int = 8,
        band_files: Sequence[str] = (),
        rgb: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        for setting, size in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size or 1),
        ):
            if not isinstance(size, int) or size < 1:
                raise InputError(f"data.{setting}={size}: expected at least 1")
        self.make_dataset = dataset
        self.root = root
        self.download = download
        self.dataset_name = name
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or 4
        self.num_workers = num_workers
        self.resize = resize
        self.augment = augment
        self.cache = {False: "none", True: "ram"}.get(cache, cache)  # type: ignore[arg-type]
        check_choice("data.cache", self.cache, ("none", "ram", "disk"))
        self.check = check
        self.seed = seed
        self.format = RGB
        if channels is not None:
            self.format = ImageFormat(channels, bits, tuple(band_files), tuple(rgb or ()))
        self.test_split = "test"
        self._datasets: dict[str, Any] = {}
        self._position = (0, 0)  # the epoch and the batch that training begins with

    def dataset(self, split: str) -> Any:
        """Return the samples of `train`, `val` or `test` at their original size.

        Raises:
            InputError: The split has no samples, or the dataset cannot be read.
        """
        if split not in self._datasets:
            place: dict[str, Any] = {} if self.root is None else {"root": self.root}
            if self.download:
                place["download"] = True
            if self.dataset_name is not None:
                place["name"] = self.dataset_name
            if self.format != RGB:
                if "format" not in inspect.signature(self.make_dataset).parameters:
                    raise InputError("data.channels: this dataset is RGB; use data=folder")
                place["format"] = self.format
            dataset = self.make_dataset(split=split, **place)
            if len(dataset) == 0:
                raise InputError(f"{self.root or 'the dataset'}: no samples for split={split}")
            self._datasets[split] = dataset
        return self._datasets[split]

    @cached_property
    def labels(self) -> Labels:
        """The classes, from whichever split was read first."""
        return self.dataset(next(iter(self._datasets), "train")).labels

    def fetch(self) -> None:
        """Download what is missing of a dataset that can be downloaded.

        Raises:
            InputError: It cannot be read.
        """
        if self.download:
            for split in base.SPLITS:
                self.dataset(split)

    def originals(self, split: str) -> Any:
        """Return the samples of a split, or those that they were made from (`EightFold`)."""
        dataset = self.dataset(split)
        inner = getattr(dataset, "dataset", None)
        # A wrapper with fewer samples is a selection, such as one of its splits.
        whole = isinstance(inner, base.SegmentationDataset) and len(inner) <= len(dataset)
        return inner if whole else dataset

    @property
    def test_is_val(self) -> bool:
        """Whether val stands in for test: both are the same files."""
        val, test = self.originals("val"), self.originals("test")
        return getattr(test, "pairs", None) == getattr(val, "pairs", ())

    def checked(self, split: str) -> Check:
        """Return what a pass over all samples of a split finds.

        For train, masks of nothing but 0 and 255 are a problem, too.
        """
        dataset = self.originals(split)
        found = check(dataset, split)
        values = np.flatnonzero(found.pixels).tolist()
        if split == "train" and values == [0, 255] and len(dataset.labels) > 1:
            background, *objects = dataset.labels.names
            file = base.sample_name(dataset, 0)
            text = (
                f"{file} and the other masks hold only 0 and 255, and 255 means not labelled: "
                f"no class but the first would be learnt. If white stands for {objects[0]}, say "
                f"so in classes.txt:\n{background} 0 0 0\n{objects[0]} 255 255 255"
            )
            found.problems.append(Problem(file, text, {"255": int(found.pixels[255])}))
        return found

    def check_files(self) -> None:
        """Check every file of all splits unless `check` is off; generated samples are skipped.

        Raises:
            InputError: Files cannot be used, or the training masks hold nothing but 0 and 255.
        """
        problems: list[Problem] = []
        for split in base.SPLITS:
            dataset = self.originals(split)  # which fetches it, if it can
            in_files = isinstance(dataset, base.SegmentationDataset)
            if self.check and in_files and not (split == "test" and self.test_is_val):
                problems += self.checked(split).problems
        base.raise_problems([p.message for p in problems], "problems in the files of the dataset")

    def pixel_counts(self) -> torch.Tensor:
        """Return the pixels of each class over the training masks, int64 [C].

        Ignored pixels do not count.

        Raises:
            InputError: Files of the dataset cannot be used.
        """
        dataset = self.dataset("train")
        if isinstance(dataset, base.SegmentationDataset):
            found = self.checked("train")
            base.raise_problems(
                [p.message for p in found.problems], "problems in the training files"
            )
            counts = found.pixels
        else:
            masks = base.in_threads(dataset.mask, range(len(dataset)))
            counts = np.sum([np.bincount(np.ravel(m), minlength=256) for m in masks], axis=0)
        return torch.from_numpy(counts[: len(self.labels)])

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of each channel over the training images.

        Raises:
            InputError: Files cannot be used, or a channel has the same value everywhere.
        """
        found = self.checked("train")
        base.raise_problems([p.message for p in found.problems], "problems in the training files")
        mean, std = found.mean_and_std()
        if 0 in std:
            raise InputError(
                f"channel {std.index(0)}, counted from 0, has the same value in all training images"
            )
        return mean, std

    def state_dict(self) -> dict[str, int]:
        """Return how far training is: what the weights of a checkpoint contain.

        A checkpoint is saved between epochs (as many were started as processed; the batches that
        Lightning counts are those of the epoch before) or within one, after a batch or during
        validation.
        """
        loop: Any = self.trainer.fit_loop  # type: ignore[union-attr]
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
        within = epochs.started > epochs.processed
        return {"epoch": epochs.processed, "batch": batches.processed if within else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the training loader begin where `state` says.

        Lightning makes the loader, and its workers draw their first batches, before it restores
        its own progress and calls `set_epoch`.
        """
        self._position = state["epoch"], state["batch"]

    def train_dataloader(self) -> DataLoader:
        """Return a loader of (images uint8 [N, C, H, W], masks uint8 [N, H, W])."""
        samples = self._samples("train", resize_labels=True)
        sampler = EpochSampler(
            len(samples), self.batch_size, self.seed, *self._rank_and_world(), *self._position
        )
        return self._loader(
            self._augmented(samples), samples, batch_sampler=sampler, collate_fn=stack
        )

    def val_dataloader(self) -> DataLoader:
        """Return a loader of lists of (images, masks, their numbers), one triple per size."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader:
        """Return a loader of lists of (images, masks, their numbers), one triple per size."""
        return self._evaluation_loader(self.test_split)

    def rebuild_batch(
        self, split: str, epoch: int, batch: int, rank: int
    ) -> tuple[list[int], list[Sample]]:
        """Return the samples of a batch once more, bit for bit as a process was given them.

        Args:
            split: `train` or `val`.
            epoch: Counted from 0, like the two that follow.
            batch: Its place in the epoch.
            rank: The process.

        Returns:
            The numbers of the samples in the dataset, and the samples.
        """
        world = self._rank_and_world()[1]
        samples = _Samples(self.dataset(split), self.resize, resize_labels=split == "train")
        if split != "train":
            indices = evaluation_batches(len(samples), self.eval_batch_size, rank, world)[batch]
            return indices, [samples[index] for index in indices]
        dataset = self._augmented(samples)
        sampler = EpochSampler(len(samples), self.batch_size, self.seed, rank, world, epoch)
        keys = list(sampler)[batch]
        return [index for _, index in keys], [dataset[key] for key in keys]

    def _augmented(self, samples: _Samples | CachedSamples) -> _TrainingSamples:
        return _TrainingSamples(samples, self.augment, self.seed)

    def _evaluation_loader(self, split: str) -> DataLoader:
        samples = self._samples(split, resize_labels=False)
        batches = evaluation_batches(len(samples), self.eval_batch_size, *self._rank_and_world())
        return self._loader(
            _NumberedSamples(samples), samples, batch_sampler=batches, collate_fn=group_by_size
        )

    def _samples(self, split: str, resize_labels: bool) -> _Samples | CachedSamples:
        samples = _Samples(self.dataset(split), self.resize, resize_labels)
        if self.cache == "none":
            keep = split == "val" and self._has_room_for(samples)
            return samples_in_memory(samples) if keep else samples
        if self.cache == "disk":
            return self._samples_on_disk(samples)
        if self.trainer is None or self.trainer.num_devices == 1:
            return samples_in_memory(samples)
        # One process of each machine reads the images, and all of them map its file.
        strategy = self.trainer.strategy
        # Machines may share the folder of temporary files, too.
        name = f"seg_torch-{strategy.broadcast(uuid.uuid4().hex)}-{self.trainer.node_rank}"
        path = Path(tempfile.gettempdir(), name)
        if self.trainer.local_rank == 0:
            write_samples(samples, path)
        strategy.barrier()
        cached = map_samples(path)
        strategy.barrier()
        if self.trainer.local_rank == 0:
            path.unlink()  # the memory stays mapped, and whatever ends the run frees it
        return cached

    def _has_room_for(self, samples: _Samples) -> bool:
        """Whether validation images are kept: each is decoded by cores that the network needs."""
        if self.trainer is None or self.trainer.world_size > 1 or self._device != "cpu":
            return False
        taken = sum(part.nbytes for part in samples[0]) * len(samples)
        return taken < total_memory(torch.device("cpu")) / 16

    def _samples_on_disk(self, samples: _Samples) -> CachedSamples:
        """Return the samples from a folder named after the files that they were decoded from."""
        files = fingerprint(samples.dataset)
        if files is None:
            raise InputError("data.cache=disk: this dataset is not read from files; use ram")
        sizes = samples.size, samples.size is not None and samples.resize_labels
        key = repr((files, sizes, __version__))
        folder = cache_folder() / "samples" / hashlib.sha256(key.encode()).hexdigest()
        if not folder.exists():
            log.info("data.cache=disk: decoding %d images into %s", len(samples), folder)
        return samples_on_disk(samples, folder)

    def _loader(
        self, dataset: Dataset, samples: _Samples | CachedSamples, **arguments: Any
    ) -> DataLoader:
        workers = self.num_workers
        if workers is None and isinstance(samples, CachedSamples) and self._device == "cpu":
            workers = 0  # there is nothing to wait for, and the network needs the CPUs
        elif workers is None:
            on_this_node = self.trainer.num_devices if self.trainer is not None else 1
            workers = min(8, max(1, available_cpus() // on_this_node))
        return _ResumableLoader(
            dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self._device == "cuda",
            generator=torch.Generator(),  # else each epoch would draw from the global one
            worker_init_fn=_start_worker,
            **arguments,
        )

    @property
    def _device(self) -> str:
        return "cpu" if self.trainer is None else self.trainer.strategy.root_device.type

    def _rank_and_world(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def _start_worker(worker: int) -> None:
    """Lets a worker process keep its memory, and work on after Ctrl-C.

    For a sample it allocates some megabytes, which the system would clear again and again. The
    terminal sends Ctrl-C to it, too, and so does Slurm with SIGUSR1 and SIGTERM. The run finishes
    its step before it stops. When it ends, its own SIGTERM ends a worker; dying of it would be
    reported as an error.
    """
    reuse_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass  # it came from elsewhere
    os._exit(0)


class _ResumableLoader(DataLoader):
    """A loader that Lightning takes to be resumable: it begins where `EpochSampler` does."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class _Samples(Dataset):
    """Checked samples at the size that the network is to see."""

    def __init__(self, dataset: Any, size: Sequence[int] | None, resize_labels: bool) -> None:
        self.dataset, self.size, self.resize_labels = dataset, size, resize_labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        image, mask = base.checked_sample(self.dataset, index)
        if self.size is not None:
            image = tv_tensors.Image(resize_image(image, self.size))
            if self.resize_labels:
                mask = tv_tensors.Mask(resize_mask(mask, self.size))
        return image, mask


class _NumberedSamples(Dataset):
    """Samples (image, mask, number in the dataset): scores are also those of each image."""

    def __init__(self, samples: _Samples | CachedSamples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return *self.samples[index], index


class _TrainingSamples(Dataset):
    """Augmented samples, by the (epoch, index) that `EpochSampler` yields."""

    def __init__(self, dataset: Any, augment: Callable[..., Any] | None, seed: int) -> None:
        self.dataset, self.augment, self.seed = dataset, augment, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        sample = self.dataset[index]
        if self.augment is None:
            return sample
        entropy = np.random.SeedSequence([self.seed, epoch, index])
        generator = torch.default_generator  # torch.manual_seed takes longer, for the GPUs' sake
        state = generator.get_state()
        try:
            generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)
            return self.augment(*sample)
        finally:
            generator.set_state(state)


@dataclass(eq=False)
class EpochSampler(Sampler):
    """Training batches of (epoch, index), in an order that depends on (seed, epoch) alone.

    All processes get the same number of batches and all batches have the same size; the images that
    are left over differ from epoch to epoch. A dataset smaller than one step is repeated.

    Args:
        length: Number of images.
        batch_size: Images per process and step.
        seed: Seed of the order.
        rank: Number of this process.
        world: Number of processes.
        epoch: The first epoch.
        start: Batches of the first epoch to leave out, since a resumed run has seen them.
    """

    length: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    epoch: int = 0
    start: int = 0

    @property
    def sampler(self) -> EpochSampler:
        """Return itself: Lightning calls `set_epoch` on the `sampler` of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless it is the present one."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return max(1, self.length // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(self.length)
        # A dataset smaller than one step of all processes: each takes what there is, the last
        # ones beginning anew, so that no process is without a batch.
        size = min(self.batch_size, -(-self.length // self.world))
        order = np.resize(order, len(self) * size * self.world)
        for batch in order[self.rank :: self.world].reshape(len(self), size)[self.start :]:
            yield [(self.epoch, int(index)) for index in batch]


def evaluation_batches(length: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """Return the batches of one process: each index is in exactly one batch of one process.

    A process without images gets one empty batch. Without any it would skip the loop, and the
    others would wait for it forever where they add up the confusion matrix.

    Args:
        length: Number of images.
        batch_size: Images per batch, at most.
        rank: Number of this process.
        world: Number of processes.

    Returns:
        Lists of indices.
    """
    mine = list(range(rank, length, world))
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)] or [[]]


def stack(samples: Sequence[Sample]) -> Sample:
    """Return training samples as (images uint8 [N, C, H, W], masks uint8 [N, H, W]).

    Raises:
        InputError: The images have several sizes.
    """
    sizes = sorted({tuple(image.shape[-2:]) for image, _ in samples})
    if len(sizes) > 1:
        raise InputError(
            f"images of several sizes in one batch ({sizes[0]} and {sizes[-1]}): set "
            "data.augment.crop=[height,width], data.resize=[height,width] or data.batch_size=1"
        )
    images, masks = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(masks)


def group_by_size(
    samples: Sequence[tuple[torch.Tensor, torch.Tensor, int]],
) -> list[EvaluationGroup]:
    """Return evaluation samples (image, mask, number) as batches of one size each."""
    groups: dict[tuple, list[tuple[torch.Tensor, torch.Tensor, int]]] = {}
    for sample in samples:
        groups.setdefault((sample[0].shape, sample[1].shape), []).append(sample)
    return [
        (*stack([(image, mask) for image, mask, _ in group]), [number for *_, number in group])
        for group in groups.values()
    ]

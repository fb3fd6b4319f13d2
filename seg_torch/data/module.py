"""Datasets to batches."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from seg_torch.data import doubts, notes, rare, sampling
from seg_torch.data.cache import CachedSamples, fits_memory, in_memory, on_disk
from seg_torch.data.check import DatasetStatistics, Problem, check
from seg_torch.data.paste import Donors, PasteRegions
from seg_torch.data.transforms import RandomScaleCrop, steps
from seg_torch.data.workers import (
    TimedLoader,
    largest_sample,
    number_of_workers,
    prepared_ahead,
    start_worker,
)
from seg_torch.datasets import base
from seg_torch.datasets.class_map import RESTS, Groups, MappedDataset
from seg_torch.drawing.table import print_table
from seg_torch.errors import InputError, check_choice
from seg_torch.images.format import RGB, ImageFormat, any_image
from seg_torch.images.resize import Resize
from seg_torch.labels import IGNORE_INDEX, Labels

log = logging.getLogger(__name__)


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
        max_side: Images are reduced, never enlarged, so that no side is longer, and keep their
            shape, see `seg_torch.images.resize.seen_size`; not together with `resize`.
        augment: Transform of the training samples, see `seg_torch.data.transforms.augment`.
        cache: Where the decoded and resized samples are kept, once per machine: "none", "ram", or
            "disk" for a file in `~/.cache/seg_torch/samples` (or below `XDG_CACHE_HOME`), which
            later runs use, too, for as long as the names, sizes and times of all files stay the
            same. `False` and `True` mean "none" and "ram". By default the validation images are
            kept in memory where one process trains on the CPU, unless they take a 16th of it.
        check: Whether `check_files` does anything.
        repeat: How many times an epoch takes each training image, each time in another order and
            augmented in another way.
        sample: "rare": half of the draws of an epoch aim at rare classes, see
            `seg_torch.data.rare`. `None`: all take every image equally often.
        seed: Seed of order and augmentation.
        download: Ask the dataset to fetch itself, for those that can.
        name: What the dataset is called, for those that are looked up by name.
        channels: Of images that are not read as RGB, see `ImageFormat`, like the three
            that follow. The dataset is given them as `format`.
        bits: Of each of their values.
        band_files: Endings of the files that are one image.
        rgb: Channels that are shown.
        white: Value of white in images of more than 8 bits, see there; of RGB, too.
        classes: Groups of the dataset's classes that are the classes here, by their new names; see
            `seg_torch.datasets.class_map.map_classes`. By default they are as they are.
        rest: What becomes of classes in no group: "keep", "background" or "ignore".

    Attributes:
        resize: The size at which the network sees images; a number is their longest side.
        test_split: The split that `test_dataloader` loads, `test` until it is set.
        start: Epoch and batch, both counted from 0, with which `train_dataloader` begins.

    Raises:
        InputError: A batch size or `repeat` is below 1, there is no such `cache` or `rest`, both
            `resize` and `max_side` are given, or `ImageFormat` raises it.
    """

    def __init__(
        self,
        dataset: Callable[..., Any],
        root: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        resize: Sequence[int] | None = None,
        max_side: int | None = None,
        augment: Callable[..., Any] | None = None,
        cache: str | bool | None = None,
        check: bool = True,
        seed: int = 0,
        download: bool = False,
        name: str | None = None,
        channels: int | None = None,
        bits: int = 8,
        band_files: Sequence[str] = (),
        rgb: Sequence[int] | None = None,
        white: float | None = None,
        repeat: int = 1,
        sample: str | None = None,
        classes: Groups | None = None,
        rest: str = "keep",
    ) -> None:
        super().__init__()
        _check_counts(batch_size=batch_size, eval_batch_size=eval_batch_size or 1, repeat=repeat)
        self.make_dataset = dataset
        self.root = root
        self.download = download
        self.dataset_name = name
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or 4
        self.num_workers = num_workers
        self.resize = _one_resize(resize, max_side)
        self.augment = augment
        self.cache = {False: "none", True: "ram"}.get(cache, cache)  # type: ignore[arg-type]
        check_choice("data.cache", self.cache or "none", ("none", "ram", "disk"))
        self.group_classes(classes, rest)
        self.check = check
        self.seed = seed
        self.repeat, self.sample = repeat, sample
        check_choice("data.sample", sample or "rare", ("rare",))
        self.format = any_image(white)
        if channels is not None:
            self.format = ImageFormat(channels, bits, tuple(band_files), tuple(rgb or ()), white)
        self.test_split = "test"
        self._datasets: dict[str, base.BaseDataset] = {}
        self._statistics: DatasetStatistics | None = None  # of train
        self.start = 0, 0

    def group_classes(self, classes: Groups | None = None, rest: str = "keep") -> None:
        """Set the classes, before the first look at the dataset; the arguments are those above.

        Raises:
            InputError: There is no such `rest`, or a rest of nothing.
        """
        check_choice("data.rest", rest, RESTS)
        if classes is None and rest != "keep":
            raise InputError(f"data.rest={rest} needs data.classes: without it there is no rest")
        self.classes, self.rest = classes, rest

    def dataset(self, split: str) -> base.BaseDataset:
        """Return the samples of `train`, `val` or `test` at their original size.

        Raises:
            InputError: The split has no samples, or the dataset cannot be read.
        """
        if split not in self._datasets:
            optional = {"root": self.root, "name": self.dataset_name}
            kwargs: dict[str, Any] = {k: v for k, v in optional.items() if v is not None}
            if self.download:
                kwargs["download"] = True
            takes_format = "format" in inspect.signature(self.make_dataset).parameters
            if self.format != RGB and takes_format:
                kwargs["format"] = self.format
            elif not self.format.is_rgb:
                raise InputError("data.channels: this dataset is RGB; use data=folder")
            samples = self.make_dataset(split=split, **kwargs)
            if len(samples) == 0:
                raise InputError(f"{self.root or 'the dataset'}: no samples for split={split}")
            dataset = base.as_dataset(samples)
            dataset.base_dataset.read_as(self.format)
            if self.classes is not None:
                dataset = MappedDataset(dataset, self.classes, self.rest)
            self._datasets[split] = dataset
        return self._datasets[split]

    def take_over(self, other: SegmentationDataModule) -> None:
        """Use the datasets that another module of the same data has read, and what is in them."""
        self._datasets, self._statistics = other._datasets, other._statistics

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

    @property
    def test_is_val(self) -> bool:
        """Whether val stands in for test: both are the same samples."""
        val, test = (self.dataset(split).base_dataset for split in ("val", "test"))
        return val.has_same_samples(test)

    def checked(self, split: str) -> DatasetStatistics:
        """Return what a pass over all samples of a split finds.

        Masks in which no pixel is labelled are a problem, too; for train, also those of nothing but
        0 and 255, if white may be a class.
        """
        dataset = self.dataset(split).base_dataset
        statistics = check(dataset, split)
        values = np.flatnonzero(statistics.pixels).tolist()
        advice = dataset.white_is_a_class
        file, text = dataset.name(0), ""
        if split == "train" and values == [0, 255] and len(dataset.labels) > 1 and advice:
            text = (
                f"{file} and the other masks hold only 0 and 255, and 255 means not labelled: "
                f"no class but the first would be learnt. If white stands for "
                f"{dataset.labels.names[1]}, {advice.format(*dataset.labels.names)}"
            )
        if text:
            pixels = {"255": int(statistics.pixels[255])}
            statistics.problems.append(Problem(file, text, pixels))
        if split == "train":
            statistics.problems += doubts.too_dark(statistics, dataset)
        if values == [IGNORE_INDEX] and not statistics.problems:
            use = "learnt" if split == "train" else "scored"
            text = (
                f"no pixel of the {len(dataset)} images of {split} is labelled: all masks, such as "
                f"{dataset.name(0)}, hold nothing but 255, so nothing can be {use}"
            )
            statistics.problems.append(Problem(dataset.name(0), text, {}))
        return statistics

    def overlaps(self, splits: Sequence[str] = base.SPLITS) -> list[Problem]:
        """Return the images whose file is in two of the splits, unless val stands in for test."""
        problems = []
        for first, second in combinations(splits, 2):
            if second == "test" and self.test_is_val:
                continue
            datasets = (self.dataset(split).base_dataset for split in (first, second))
            files = [{*base.image_files(dataset)} for dataset in datasets]
            for file in sorted(files[0] & files[1]):
                text = f"{file}: it is in {first} and in {second}; take it out of one of them"
                problems.append(Problem(file, text, {}))
        return problems

    def describe(
        self, statistics: notes.Statistics, duplicates: Sequence[notes.Duplicate]
    ) -> list[str]:
        """Return what else to know before training, in sentences."""
        if not statistics:
            return []
        found = notes.describe(statistics, self.labels, duplicates)
        mapped = self.dataset(next(iter(statistics)))
        if isinstance(mapped, MappedDataset) and mapped.dropped:
            found.append(f"Not labelled by data.rest=ignore: {', '.join(mapped.dropped)}.")
        for split, measured in statistics.items():
            dataset = self.dataset(split).base_dataset
            found += notes.listed_twice(split, dataset) + doubts.describe(split, measured, dataset)
        if "train" in statistics:
            crops = (s.size for s in steps(self.augment) if isinstance(s, RandomScaleCrop))
            crop = next(crops, None)
            found += notes.small_crop(statistics["train"].sizes, self.resize, crop)
        return found

    def check_files(self) -> None:
        """Check every file of all splits unless `check` is off; generated samples are skipped.

        What is no reason to refuse them is logged, as is an overlap of the splits without `check`.

        Raises:
            InputError: Files cannot be used, the masks of a split have nothing to learn or to
                score, or an image is in two splits.
        """
        problems: list[str] = []
        statistics: notes.Statistics = {}
        for split in base.SPLITS:
            dataset = self.dataset(split).base_dataset  # which fetches it, if it can
            if self.check and dataset.pairs and not (split == "test" and self.test_is_val):
                statistics[split] = self.checked(split)
                problems += [problem.message for problem in statistics[split].problems]
        overlaps = [problem.message for problem in self.overlaps()]
        if overlaps and not self.check:
            log.warning("%d images are in two splits; the first: %s", len(overlaps), overlaps[0])
            return
        base.raise_problems(problems + overlaps, "problems in the files of the dataset")
        originals = {split: self.dataset(split).base_dataset for split in statistics}
        for note in self.describe(statistics, notes.find_duplicates(statistics, originals)):
            log.warning("%s", note)

    def statistics(self) -> DatasetStatistics:
        """Return what a pass over the training samples finds.

        Raises:
            InputError: Files cannot be used.
        """
        if self._statistics is None:
            statistics = self.checked("train")
            problems = [problem.message for problem in statistics.problems]
            base.raise_problems(problems, "problems in the training files")
            self._statistics = statistics
        return self._statistics

    def pixel_counts(self) -> torch.Tensor:
        """Return the pixels of each class over the training masks, int64 [C].

        Ignored pixels do not count.

        Raises:
            InputError: Files of the dataset cannot be used.
        """
        dataset = self.dataset("train")
        if dataset.pairs is not None:
            counts = self.statistics().pixels
        else:
            masks = base.in_threads(dataset.mask, range(len(dataset)))
            counts = np.sum([np.bincount(np.ravel(m), minlength=256) for m in masks], axis=0)
        return torch.from_numpy(counts[: len(self.labels)])

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of each channel over the training images.

        Raises:
            InputError: Files cannot be used, or a channel has the same value everywhere.
        """
        mean, std = self.statistics().mean_and_std()
        if 0 in std:
            raise InputError(
                f"channel {std.index(0)}, counted from 0, has the same value in all training images"
            )
        return mean, std

    @cached_property
    def regions(self) -> rare.Regions | None:
        """What draws aim at, and what is pasted; `None` where neither is wanted.

        These are the regions of the samples, which may be more than those that files hold.
        """
        if self.sample is None and not self._pastes:
            return None
        return rare.regions_of(check(self.dataset("train"), "train"))

    @property
    def _pastes(self) -> bool:
        return any(isinstance(step, PasteRegions) for step in steps(self.augment))

    def tell_sampling(self) -> None:
        """Print how often `sample` shows each class, and log which ones are pasted, if any are."""
        if self.regions is None:
            return
        names, shares = self.labels.names, self.regions.shares
        if self.sample is not None:
            draws = len(self.dataset("train")) * self.repeat
            seen = rare.exposures(self.regions, draws, draws // 2)
            print_table(
                f"Of {draws:,} draws, those with each class",
                ("class", "% of pixels", "equally often", "with rare", "aimed at"),
                [
                    [name, f"{100 * shares[k]:.2f}", *(f"{counts[k]:,.1f}" for counts in seen)]
                    for k, name in enumerate(names)
                ],
            )
        if self._pastes:
            kinds = np.unique(rare.to_paste(self.regions).table[:, 1])
            pasted = ", ".join(names[k] for k in kinds) or "nothing, since no class is rare"
            log.info("data.augment.paste pastes %s", pasted)

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
        """Let the training loader begin where `state` says.

        Lightning makes the loader, and its workers draw their first batches, before it restores
        its own progress and calls `set_epoch`.
        """
        self.start = state["epoch"], state["batch"]

    def train_dataloader(self) -> DataLoader:
        """Return a loader of (images uint8 [N, C, H, W], masks uint8 [N, H, W])."""
        samples = self._samples("train", resize_labels=True)
        rank, world = self._rank_and_world()
        sampler = self._epoch_sampler(len(samples), rank, world, *self.start)
        return self._loader(self._augmented(samples), sampler, sampling.stack, self.batch_size)

    def val_dataloader(self) -> DataLoader:
        """Return a loader of lists of (images, masks, their numbers), one triple per size."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader:
        """Return a loader of lists of (images, masks, their numbers), one triple per size."""
        return self._evaluation_loader(self.test_split)

    def rebuild_batch(
        self, split: str, epoch: int, batch: int, rank: int
    ) -> tuple[list[int], list[sampling.Sample]]:
        """Return the samples of a batch once more, bit for bit as a process was given them.

        Args:
            split: `train` or `val`.
            epoch: Counted from 0, like the two that follow.
            batch: Its place in the epoch.
            rank: The process.

        Returns:
            The numbers of the samples in the dataset, and the samples.
        """
        world, training = self._rank_and_world()[1], split == "train"
        samples = sampling.ResizedSamples(self.dataset(split), self.resize, resize_labels=training)
        if not training:
            batches = sampling.evaluation_batches(len(samples), self.eval_batch_size, rank, world)
            return batches[batch], [samples[index] for index in batches[batch]]
        augmented = self._augmented(samples)
        draws = list(self._epoch_sampler(len(samples), rank, world, epoch))[batch]
        return [draw.image for draw in draws], [augmented[draw] for draw in draws]

    def _augmented(self, samples: Any) -> sampling.AugmentedSamples:
        donors = None
        if self.regions is not None and self._pastes:
            donors = Donors(samples, rare.to_paste(self.regions))
        return sampling.AugmentedSamples(samples, self.augment, self.seed, self.regions, donors)

    def _epoch_sampler(
        self, length: int, rank: int, world: int, epoch: int, start: int = 0
    ) -> sampling.EpochSampler:
        # Lightning repeats the batches of a loader that has a `sampler`, not those of a batch
        # sampler.
        trainer: Any = self.trainer
        overfit = trainer is not None and trainer.overfit_batches > 0
        return sampling.EpochSampler(
            *(length, self.batch_size, self.seed, rank, world, epoch, start, overfit, self.repeat),
            None if self.sample is None else self.regions,
        )

    def _evaluation_loader(self, split: str) -> DataLoader:
        samples = self._samples(split, resize_labels=False)
        rank, world = self._rank_and_world()
        batches = sampling.evaluation_batches(len(samples), self.eval_batch_size, rank, world)
        numbered = sampling.NumberedSamples(samples)
        return self._loader(numbered, batches, sampling.group_by_size, self.eval_batch_size)

    def _samples(self, split: str, resize_labels: bool) -> sampling.ResizedSamples | CachedSamples:
        samples = sampling.ResizedSamples(self.dataset(split), self.resize, resize_labels)
        keep = self.cache in ("ram", "disk")
        if self.cache is None and split == "val" and self._device == "cpu":
            # In each epoch they would be decoded by the cores that the network needs.
            alone = self.trainer is not None and self.trainer.world_size == 1
            keep = alone and fits_memory(samples)
        return self._kept(samples) if keep else samples

    def _kept(self, samples: sampling.ResizedSamples) -> CachedSamples:
        return on_disk(samples) if self.cache == "disk" else in_memory(samples, self.trainer)

    def _loader(self, dataset: Any, batches: Any, collate: Callable, batch_size: int) -> DataLoader:
        workers, ahead = self.num_workers, None
        processes = 1 if self.trainer is None else self.trainer.num_devices
        if workers is None:
            cached = isinstance(dataset.samples, CachedSamples)
            workers = number_of_workers(cached, self._device, processes)
        if workers > 0:
            size = processes * batch_size * largest_sample(dataset, batch_size)
            workers, ahead = prepared_ahead(workers, size, fixed=self.num_workers is not None)
        return TimedLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            prefetch_factor=ahead,
            persistent_workers=workers > 0,
            pin_memory=self._device == "cuda",
            generator=torch.Generator(),  # else each epoch would draw from the global one
            worker_init_fn=start_worker,
        )

    @property
    def _device(self) -> str:
        return "cpu" if self.trainer is None else self.trainer.strategy.root_device.type

    def _rank_and_world(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def _check_counts(**counts: Any) -> None:
    for setting, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise InputError(f"data.{setting}={count}: expected at least 1")


def _one_resize(resize: Sequence[int] | None, max_side: int | None) -> Resize:
    if resize is not None and max_side is not None:
        raise InputError(
            f"data.max_side={max_side} together with data.resize={list(resize)}: images are "
            "reduced and keep their shape, or all get the same; set one of them to null"
        )
    return resize if max_side is None else max_side

"""Datasets to batches.

Three rules make runs repeatable and scores exact:

* The order of the training images depends on (seed, epoch) alone and the augmentation of an image
  on (seed, epoch, index) alone: not on the number of workers, nor on where a run was interrupted.
* Every process scores its own share of the evaluation images, none twice.
* Evaluation never resizes labels; images of one size go through the model together.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors

from seg_torch.errors import InputError
from seg_torch.files import write_atomically
from seg_torch.hardware import available_cpus
from seg_torch.labels import Labels
from seg_torch.transforms import resize_image, resize_mask

log = logging.getLogger(__name__)

Sample = tuple[torch.Tensor, torch.Tensor]


class SegmentationDataModule(LightningDataModule):
    """Loaders over one dataset.

    Args:
        dataset: `dataset(split=...)` or, with `root`, `dataset(root=..., split=...)` gives
            the samples of `train`, `val` and `test`; see `seg_torch.datasets`.
        root: the dataset's folder.
        batch_size: images per device and step.
        num_workers: processes that prepare batches; by default as many as there are processors for
            each device, at most 8, but none for training on a processor with `cache`.
        resize: (height, width) at which the network sees every image; `None` for its own size.
        augment: transform of the training samples, see `seg_torch.transforms.augment`.
        cache: keep the decoded and resized samples in memory.
        seed: of order and augmentation.
        download: ask the dataset to fetch itself, for those that can.
    """

    def __init__(
        self,
        dataset: Callable[..., Any],
        root: str | None = None,
        batch_size: int = 8,
        num_workers: int | None = None,
        resize: Sequence[int] | None = None,
        augment: Callable[..., Any] | None = None,
        cache: bool = False,
        seed: int = 0,
        download: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"data.batch_size={batch_size}: expected at least 1")
        self.make_dataset = dataset
        self.root = root
        self.download = download
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.resize = resize
        self.augment = augment
        self.cache = cache
        self.seed = seed
        self.test_split = "test"
        self._datasets: dict[str, Any] = {}

    def dataset(self, split: str) -> Any:
        """The samples of `train`, `val` or `test` at their original size."""
        if split not in self._datasets:
            place: dict[str, Any] = {} if self.root is None else {"root": self.root}
            if self.download:
                place["download"] = True
            dataset = self.make_dataset(split=split, **place)
            if len(dataset) == 0:
                raise InputError(f"{self.root or 'the dataset'}: no samples for split={split}")
            self._datasets[split] = dataset
        return self._datasets[split]

    @cached_property
    def labels(self) -> Labels:
        """The classes, from whichever split is at hand."""
        return self.dataset(next(iter(self._datasets), "train")).labels

    def pixel_counts(self, cache: Path | None = None) -> torch.Tensor:
        """Pixels of each class over the training masks, int64 [C]; ignored pixels do not count.

        Args:
            cache: JSON file to take the counts from, or to write them to.
        """
        dataset = self.dataset("train")
        names = list(dataset.labels.names)
        if cache is not None and cache.exists():
            stored = json.loads(cache.read_text())
            if stored["classes"] == names and stored["samples"] == len(dataset):
                return torch.tensor(stored["pixels"])

        def count(index: int) -> np.ndarray:
            return np.bincount(np.asarray(dataset.mask(index)).ravel(), minlength=256)

        counts = sum(in_threads(count, range(len(dataset))), np.zeros(256, np.int64))[: len(names)]
        if cache is not None:
            text = json.dumps(
                {"classes": names, "samples": len(dataset), "pixels": counts.tolist()}
            )
            write_atomically(cache, lambda path: Path(path).write_text(text))
        return torch.from_numpy(counts)

    def train_dataloader(self) -> DataLoader:
        dataset = _TrainingSamples(
            self._resized("train", resize_labels=True), self.augment, self.seed
        )
        sampler = EpochSampler(len(dataset), self.batch_size, self.seed, *self._rank_and_world())
        if self.trainer is not None:
            # On resuming, Lightning draws the first batches before it calls set_epoch.
            sampler.set_epoch(self.trainer.current_epoch)
        return self._loader(dataset, batch_sampler=sampler, collate_fn=stack)

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.test_split)

    def _evaluation_loader(self, split: str) -> DataLoader:
        dataset = self._resized(split, resize_labels=False)
        batches = evaluation_batches(len(dataset), self.batch_size, *self._rank_and_world())
        return self._loader(dataset, batch_sampler=batches, collate_fn=group_by_size)

    def _resized(self, split: str, resize_labels: bool) -> _Resized | _Cached:
        samples = _Resized(self.dataset(split), self.resize, resize_labels)
        return _Cached(samples) if self.cache else samples

    def _loader(self, dataset: Dataset, **arguments: Any) -> DataLoader:
        workers = self.num_workers
        device = "cpu" if self.trainer is None else self.trainer.strategy.root_device.type
        if workers is None and self.cache and device == "cpu":
            workers = 0  # there is nothing to wait for, and the network needs the processors
        elif workers is None:
            on_this_node = self.trainer.num_devices if self.trainer is not None else 1
            workers = min(8, max(1, available_cpus() // on_this_node))
        return DataLoader(
            dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device == "cuda",
            generator=torch.Generator(),  # else each epoch would draw from the global one
            **arguments,
        )

    def _rank_and_world(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def in_threads(function: Callable[[int], Any], items: Sequence[int]) -> Iterator[Any]:
    """`map` over threads, in order; decoding of pictures releases Python's lock."""
    with ThreadPoolExecutor(available_cpus()) as pool:
        yield from pool.map(function, items)


class _Resized(Dataset):
    """Samples at the size that the network is to see."""

    def __init__(self, dataset: Any, size: Sequence[int] | None, resize_labels: bool) -> None:
        self.dataset, self.size, self.resize_labels = dataset, size, resize_labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        image, mask = self.dataset[index]
        if self.size is not None:
            image = tv_tensors.Image(resize_image(image, self.size))
            if self.resize_labels:
                mask = tv_tensors.Mask(resize_mask(mask, self.size))
        return image, mask


class _Cached(Dataset):
    """Samples read once, before the workers start, whose memory they then share."""

    def __init__(self, dataset: Any) -> None:
        self.samples = list(in_threads(dataset.__getitem__, range(len(dataset))))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


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
        with torch.random.fork_rng(devices=[]):
            entropy = np.random.SeedSequence([self.seed, epoch, index])
            torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
            return self.augment(*sample)


class EpochSampler(Sampler):
    """Training batches of (epoch, index), in an order that depends on (seed, epoch) alone.

    All processes get the same number of batches and all batches the same size: what does not fill
    the last ones waits for another epoch. A dataset smaller than that is repeated.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int, world: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world = rank, world
        self.epoch = 0

    @property
    def sampler(self) -> EpochSampler:
        """Lightning calls `set_epoch` on the `sampler` of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, self.length // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(self.length)
        # A dataset smaller than one step of all processes: each takes what there is, the last
        # ones beginning anew, so that no process is without a batch.
        size = min(self.batch_size, -(-self.length // self.world))
        order = np.resize(order, len(self) * size * self.world)
        for batch in order[self.rank :: self.world].reshape(len(self), size):
            yield [(self.epoch, int(index)) for index in batch]


def evaluation_batches(length: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """The batches of one process: each index in exactly one batch of one process.

    A process without images gets one empty batch. With none at all it would skip the loop, and the
    others would wait for it for ever where they add up the confusion matrix.
    """
    mine = list(range(rank, length, world))
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)] or [[]]


def stack(samples: Sequence[Sample]) -> Sample:
    """Training samples as (images uint8 [N, 3, H, W], masks uint8 [N, H, W]).

    Raises:
        InputError: the images have several sizes.
    """
    sizes = sorted({tuple(image.shape[-2:]) for image, _ in samples})
    if len(sizes) > 1:
        raise InputError(
            f"images of several sizes in one batch ({sizes[0]} and {sizes[-1]}): set "
            "data.augment.crop=[height,width], data.resize=[height,width] or data.batch_size=1"
        )
    images, masks = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(masks)


def group_by_size(samples: Sequence[Sample]) -> list[Sample]:
    """Evaluation samples as (images [n, 3, H, W], masks [n, h, w]), a pair for each size."""
    groups: dict[tuple, list[Sample]] = {}
    for image, mask in samples:
        groups.setdefault((image.shape, mask.shape), []).append((image, mask))
    return [stack(group) for group in groups.values()]

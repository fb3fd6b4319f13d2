"""Samples, the order in which they come, and the batches that they make.

Three rules make runs repeatable and scores exact:

* The order of the training images depends on (seed, epoch) alone and the augmentation of an image
  on (seed, epoch, index, copy) alone: not on the number of workers, nor on where a run was
  interrupted.
* Every process scores its own share of the evaluation images, none twice.
* Evaluation never resizes labels; images of one size go through the model together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors

from seg_torch.data.paste import Donors
from seg_torch.data.rare import Regions
from seg_torch.data.transforms import for_sample, leaves_its_input
from seg_torch.datasets import base
from seg_torch.errors import InputError
from seg_torch.images.resize import Resize, resize_image, resize_mask, seen_size

Sample = tuple[torch.Tensor, torch.Tensor]
NumberedSample = tuple[torch.Tensor, torch.Tensor, int]
# Images [n, C, H, W] of one size, masks [n, h, w], and their numbers in the dataset.
EvaluationGroup = tuple[torch.Tensor, torch.Tensor, list[int]]


class Draw(NamedTuple):
    """A training sample.

    Attributes:
        epoch: Counted from 0.
        image: Its number in the dataset.
        copy: How often the epoch has drawn it before.
        region: What the crop is placed over, a row of `Regions`; -1: it may be anywhere.
    """

    epoch: int
    image: int
    copy: int = 0
    region: int = -1


class ResizedSamples(Dataset):
    """Checked samples at the size that the network is to see, see `seen_size`."""

    def __init__(self, dataset: base.BaseDataset, resize: Resize, resize_labels: bool) -> None:
        self.dataset, self.resize, self.resize_labels = dataset, resize, resize_labels

    def __len__(self) -> int:
        return len(self.dataset)

    def nbytes(self, index: int) -> int | None:
        """Return what a sample takes, by the header of its image; `None` where there is none."""
        stored = self.dataset.image_size(index)
        if stored is None:
            return None
        seen = seen_size(self.resize, *stored)
        label = seen if self.resize_labels else stored
        channels = self.dataset.format.channels * (4 if self.dataset.format.bits > 8 else 1)
        return channels * math.prod(seen) + math.prod(label)

    def __getitem__(self, index: int) -> Sample:
        image, mask = base.checked_sample(self.dataset, index)
        if self.resize is not None:
            size = seen_size(self.resize, *image.shape[-2:])
            image = tv_tensors.Image(resize_image(image, size))
            if self.resize_labels:
                mask = tv_tensors.Mask(resize_mask(mask, size))
        return image, mask


class NumberedSamples(Dataset):
    """Samples (image, mask, number in the dataset): scores are also those of each image."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> NumberedSample:
        return *self.samples[index], index


class AugmentedSamples(Dataset):
    """Augmented samples, by the `Draw` that `EpochSampler` yields.

    An augmentation of somebody else's may work in place: it is given a copy, since what it is made
    from may be kept for the next epochs.

    Args:
        samples: (image, mask) of each number.
        augment: Transform of a sample.
        seed: Seed of the augmentation.
        regions: Those that draws aim at.
        donors: Give what is pasted.
    """

    def __init__(
        self,
        samples: Any,
        augment: Callable[..., Any] | None,
        seed: int,
        regions: Regions | None = None,
        donors: Donors | None = None,
    ) -> None:
        self.samples, self.augment, self.seed = samples, augment, seed
        self.regions, self.donors = regions, donors
        self.copy = augment is not None and not leaves_its_input(augment)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        epoch, index, copy, region = Draw(*key)
        sample = self.samples[index]
        if self.augment is None:
            return sample
        if self.copy:
            sample = sample[0].clone(), sample[1].clone()
        box, augment = None, self.augment
        if self.regions is not None and region >= 0:
            box = self.regions.box(region, sample[1].shape)
        if box is not None or self.donors is not None:
            augment = for_sample(augment, index, box, self.donors)
        entropy = np.random.SeedSequence([self.seed, epoch, index, copy])
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed takes longer, for the GPUs' sake.
            torch.default_generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)
            return augment(*sample)


@dataclass(eq=False)
class EpochSampler(Sampler):
    """Training batches of `Draw`s, in an order that depends on (seed, epoch) alone.

    All processes get the same number of batches and all batches have the same size; the images that
    are left over differ from epoch to epoch. A dataset smaller than one step is gone through again.

    Args:
        length: Number of images.
        batch_size: Images per process and step.
        seed: Seed of the order.
        rank: Number of this process.
        world: Number of processes.
        epoch: The first epoch.
        start: Batches of the first epoch to leave out, since a resumed run has seen them.
        overfit: Make every epoch the first one, with the same augmentation.
        repeat: How many times an epoch takes each image, each time in another order.
        regions: What half of the draws aim at: they take the image of a region, drawn by chance, in
            place of the one whose turn it is.
    """

    length: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    epoch: int = 0
    start: int = 0
    overfit: bool = False
    repeat: int = 1
    regions: Regions | None = None

    @property
    def sampler(self) -> EpochSampler:
        """Return itself: Lightning calls `set_epoch` on the `sampler` of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless it is the present one."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return max(1, self.length * self.repeat // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = 0 if self.overfit else self.epoch
        draws = self._draws(epoch)
        # A dataset smaller than one step of all processes: each takes what there is, the last
        # ones beginning anew, so that no process is without a batch.
        size = min(self.batch_size, -(-len(draws) // self.world))
        order = np.resize(np.arange(len(draws)), len(self) * size * self.world)
        for batch in order[self.rank :: self.world].reshape(len(self), size)[self.start :]:
            yield [Draw(epoch, *draws[i].tolist()) for i in batch]

    def _draws(self, epoch: int) -> np.ndarray:
        """Return image, copy and region of all draws of an epoch, int64 [n, 3]; see `Draw`."""
        generator = np.random.default_rng([self.seed, epoch])
        order = np.concatenate([generator.permutation(self.length) for _ in range(self.repeat)])
        region = np.full(len(order), -1)
        if self.regions is not None:
            aimed = generator.permutation(len(order))[: len(order) // 2]
            chances = self.regions.chances
            region[aimed] = generator.choice(len(chances), len(aimed), p=chances)
            order[aimed] = self.regions.table[region[aimed], 0]
        return np.stack([order, times_before(order), region], axis=1)


def times_before(values: np.ndarray) -> np.ndarray:
    """Return how often each of the values has come before, int64 [n]."""
    places = np.argsort(values, kind="stable")
    ordered = values[places]
    before = np.empty(len(values), np.int64)
    before[places] = np.arange(len(values)) - np.searchsorted(ordered, ordered)
    return before


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


def group_by_size(samples: Sequence[NumberedSample]) -> list[EvaluationGroup]:
    """Return evaluation samples (image, mask, number) as batches of one size each."""
    groups: dict[tuple, list[NumberedSample]] = {}
    for sample in samples:
        groups.setdefault((sample[0].shape, sample[1].shape), []).append(sample)
    return [
        (*stack([(image, mask) for image, mask, _ in group]), [number for *_, number in group])
        for group in groups.values()
    ]

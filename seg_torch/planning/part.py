"""What a trial is shown of the data: as much as there is time for."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from seg_torch import hardware
from seg_torch.data import SegmentationDataModule
from seg_torch.data.cache import CachedSamples, file_on_disk
from seg_torch.data.sampling import EpochSampler, ResizedSamples, Sample
from seg_torch.datasets.base import in_threads

ENDLESS = 1 << 20  # batches of the only epoch, which is ended by the clock
MOST = 1000  # samples that are decoded in advance


class EndlessSampler(Sampler):
    """The training batches of one epoch after the other, as one epoch."""

    def __init__(self, sampler: Any) -> None:
        self.epochs = sampler

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[list[Any]]:
        for epoch in itertools.count():
            self.epochs.set_epoch(epoch)
            yield from self.epochs


class SomeBatches(Sampler):
    """Evaluation batches from all of the split, for some seconds: at least two if there are any.

    Attributes:
        started: When the first of them was asked for.
    """

    started = 0.0

    def __init__(
        self, batches: list[list[int]], seconds: float, clock: Callable[[], float]
    ) -> None:
        order = np.random.default_rng(0).permutation(len(batches))
        self.batches = [batches[index] for index in order]
        self.seconds, self.clock = seconds, clock

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        self.started = self.clock()
        for number, batch in enumerate(self.batches):
            if number >= 2 and self.clock() > self.started + self.seconds:
                return
            yield batch


class KeptSamples(CachedSamples):
    """Samples that are kept when they are first needed: a run decodes all of them before it starts.

    Args:
        samples: Those that are kept.
        seconds: To decode some of them in advance, as a run does.

    Attributes:
        late: Seconds of decoding after that, in this process.
        rate: Seconds of a sample in advance.
    """

    def __init__(self, samples: ResizedSamples, seconds: float) -> None:
        self.samples, self.kept, self.late = samples, dict[int, Sample](), 0.0
        order = np.random.default_rng(0).permutation(len(samples))[:MOST].tolist()
        started = time.perf_counter()
        for index, sample in zip(order, in_threads(samples.__getitem__, order), strict=True):
            self.kept[index] = sample
            self.rate = (time.perf_counter() - started) / len(self.kept)
            if time.perf_counter() > started + seconds:
                break
        self.early = len(self.kept)

    def __reduce__(self) -> Any:  # of CachedSamples: a worker that is not forked decodes anew
        return type(self), (self.samples, 0.0)

    def __len__(self) -> int:
        return len(self.samples)

    def nbytes(self, index: int) -> int:
        """Return what a sample takes."""
        return sum(part.nbytes for part in self[index])

    def __getitem__(self, index: int) -> Any:
        if index not in self.kept:
            started = time.perf_counter()
            self.kept[index] = self.samples[index]
            self.late += time.perf_counter() - started
        return self.kept[index]

    def seconds_of_rest(self) -> float:
        """Return what a run needs to decode those that were not decoded in advance."""
        return self.rate * (len(self) - self.early)

    def bytes_of_rest(self) -> int:
        """Return what those take that are not kept yet."""
        each = sum(part.nbytes for sample in self.kept.values() for part in sample)
        return each * (len(self) - len(self.kept)) // len(self.kept)


class Loading(NamedTuple):
    """How a loader works.

    Attributes:
        seconds: In which one worker prepares a batch; 0 without workers.
        workers: Their number.
        ahead: Batches that they prepare ahead.
    """

    seconds: float
    workers: int
    ahead: int

    @property
    def fastest(self) -> float:
        """Seconds of a batch, with all workers and nothing else to do."""
        return self.seconds / max(1, min(self.workers, hardware.available_cpus()))


class PartOfData(SegmentationDataModule):
    """The data of a run: its training batches without end, and some images of val and test.

    Args:
        data: Of the run, which stay as they are.
        seconds: To decode what is kept, and to score.
        one_by_one: Score batches of one image, as a CPU does in any case: two are soon done.

    Attributes:
        kept: The samples that a run keeps.
        train: How training batches are loaded.
        scored: How those of the last split were that was scored.
        images: The batches of that split.
    """

    train: Loading
    scored: Loading
    images: SomeBatches

    def __init__(self, data: SegmentationDataModule, seconds: float, one_by_one: bool) -> None:
        vars(self).update(vars(data))
        self.trainer, self.start, self.seconds = None, (0, 0), seconds
        self.test_split = "test"
        self.kept: list[KeptSamples] = []
        self.paused = 0.0
        if one_by_one:
            self.eval_batch_size = 1

    def time(self) -> float:
        """Return the seconds of a clock that stands still where a run would do nothing."""
        return time.perf_counter() - self.paused - sum(samples.late for samples in self.kept)

    def _kept(self, samples: ResizedSamples) -> CachedSamples:
        if self.cache == "disk" and file_on_disk(samples).exists():
            return super()._kept(samples)
        self.kept.append(KeptSamples(samples, self.seconds))
        return self.kept[-1]

    def _loader(self, dataset: Any, batches: Any, collate: Callable, batch_size: int) -> DataLoader:
        training, first = isinstance(batches, EpochSampler), next(iter(batches))
        if training:
            batches = EndlessSampler(batches)
        else:
            batches = self.images = SomeBatches(batches, self.seconds, self.time)
        loader = super()._loader(dataset, batches, collate, batch_size)
        started, workers = time.perf_counter(), loader.num_workers
        seconds = len(first) * seconds_of_sample(dataset, first) if workers and first else 0.0
        self.paused += time.perf_counter() - started
        found = Loading(seconds, workers, workers * (loader.prefetch_factor or 0))
        if training:
            self.train = found
        else:
            self.scored = found
        return loader


def seconds_of_sample(dataset: Any, keys: Sequence[Any]) -> float:
    """Return the mean seconds of a few samples in a worker, which has one thread."""
    threads, keys = torch.get_num_threads(), keys[:3]
    torch.set_num_threads(1)
    for key in keys:
        dataset[key]  # from here on the file is in the system's memory, and kept if it is to be
    started = time.perf_counter()
    for key in keys:
        dataset[key]
    torch.set_num_threads(threads)
    return (time.perf_counter() - started) / len(keys)

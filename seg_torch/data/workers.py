"""The processes that prepare batches: how many, how long they are waited for, how they end."""

import os
import signal
import time
from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
from torch.utils.data import DataLoader

from seg_torch.data.sampling import AugmentedSamples
from seg_torch.errors import InputError
from seg_torch.hardware import available_cpus, reuse_memory, total_memory


class TimedLoader(DataLoader):
    """A loader that knows for how many seconds its batches were waited for.

    Attributes:
        waited: Seconds since the loader was made, or since it was set to 0.
    """

    waited = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches."""
        started = time.perf_counter()
        for batch in super().__iter__():
            self.waited += time.perf_counter() - started
            yield batch
            started = time.perf_counter()


def number_of_workers(cached: bool, device: str, processes: int) -> int:
    """Return how many worker processes suit this machine.

    Args:
        cached: Whether the samples are kept decoded.
        device: Kind of the device that the network runs on, such as "cpu".
        processes: Those of this machine that have workers of their own.
    """
    if cached and device == "cpu":
        return 0  # there is nothing to wait for, and the network needs the CPUs
    return min(8, max(1, available_cpus() // processes))


def largest_sample(dataset: Any, batch_size: int) -> int:
    """Return the bytes of the largest sample, as far as that is known without reading all.

    Args:
        dataset: `AugmentedSamples` or `NumberedSamples`.
        batch_size: Of several images in a batch of training all are like the first one.
    """
    if isinstance(dataset, AugmentedSamples) and batch_size > 1:
        try:
            return sum(part.nbytes for part in dataset[0, 0])
        except InputError:
            return 0  # the worker that comes to it names the file
    samples = dataset.samples
    return max(samples.nbytes(index) or 0 for index in range(len(samples)))


def prepared_ahead(workers: int, batch: int, fixed: bool) -> tuple[int, int]:
    """Return how many workers there are, and how many batches each of them prepares ahead.

    What they have prepared takes at most an eighth of the memory, unless it is one batch each.

    Args:
        workers: As many as suit the machine.
        batch: Bytes of the largest batch.
        fixed: Whether the number of workers is the user's.
    """
    batches = int(total_memory(torch.device("cpu")) / 8 / max(1, batch))
    workers = workers if fixed else min(workers, max(1, batches))
    return workers, min(2, max(1, batches // max(1, workers)))


def start_worker(worker: int) -> None:
    """Let a worker process keep its memory, and work on after Ctrl-C.

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

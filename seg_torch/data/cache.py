"""Samples that are decoded once and kept, in memory or in a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from multiprocessing import reduction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from rich.progress import track
from torch.utils.data import Dataset
from torchvision import tv_tensors

from seg_torch.datasets.base import in_threads
from seg_torch.files import PARTIAL, write_atomically


class CachedSamples(Dataset):
    """Samples that lie one after the other in one array, which all processes share.

    Args:
        content: uint8 [bytes], of each sample the image [H, W, C] and the mask [H, W].
        places: int64 [N, 7], of each sample the offset, the bytes of a value of its image (1, or 4
            for float32), H, W, C of its image, H, W of its mask.
        file: The open file that `content` is mapped from; `None` for memory.
    """

    def __init__(self, content: torch.Tensor, places: np.ndarray, file: BinaryIO | None) -> None:
        self.content, self.places, self.file = content, places, file

    def __reduce__(self) -> Any:
        if self.file is None:  # PyTorch moves the tensor to memory that all workers share
            return CachedSamples, (self.content, self.places, None)
        # A worker that is not forked gets the open file, which may have no name any more.
        return _map_descriptor, (reduction.DupFd(self.file.fileno()),)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        offset, itemsize, *sizes = self.places[index].tolist()
        shapes = sizes[:3], sizes[3:]
        lengths = [itemsize * int(np.prod(shapes[0])), int(np.prod(shapes[1]))]
        image, mask = self.content[offset : offset + sum(lengths)].split(lengths)
        image = image.view(torch.uint8 if itemsize == 1 else torch.float32)
        pixels = image.view(shapes[0]).permute(2, 0, 1)
        return tv_tensors.Image(pixels), tv_tensors.Mask(mask.view(shapes[1]))


def samples_in_memory(samples: Dataset) -> CachedSamples:
    """Read all samples into memory."""
    # One array, since each tensor that is sent to a spawned worker takes up a file descriptor.
    content = bytearray()
    places = _append(samples, content.extend)
    return CachedSamples(torch.frombuffer(content, dtype=torch.uint8), places, None)


def samples_on_disk(samples: Dataset, folder: Path) -> CachedSamples:
    """Write all samples to a file in a folder of their own, unless it is there, and maps it.

    Of several processes that need them at once, one writes and the others wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "samples.bin"
    with FileLock(folder / "lock"):
        if not path.exists():
            for partial in folder.glob(f"{PARTIAL}*"):  # of a run that was killed
                partial.unlink()
            write_samples(samples, path)
    return map_samples(path)


def write_samples(samples: Dataset, path: Path) -> None:
    """Write all samples to a file, in which their places and the number of them come last."""

    def write(name: str) -> None:
        with open(name, "wb") as file:
            places = _append(samples, file.write)
            file.write(places.tobytes() + np.int64(len(places)).tobytes())

    write_atomically(path, write)


def map_samples(path: str | Path) -> CachedSamples:
    """Map a file of samples into memory: what is read of it is shared by all processes."""
    return _map_file(open(path, "rb"))


def _map_descriptor(descriptor: Any) -> CachedSamples:
    return _map_file(os.fdopen(descriptor.detach(), "rb"))


def _map_file(file: BinaryIO) -> CachedSamples:
    content = np.memmap(file, np.uint8, "c")  # copy on write, for a transform that works in place
    (count,) = content[-8:].view(np.int64)
    places = content[-8 - 56 * count : -8].view(np.int64).reshape(count, 7)
    return CachedSamples(torch.from_numpy(content), places, file)


def _append(samples: Any, write: Callable[[bytes], object]) -> np.ndarray:
    """Write the samples one after the other, and returns where each is."""
    places, offset = [], 0
    for image, mask in track(
        in_threads(samples.__getitem__, range(len(samples))),
        "Decoding",
        len(samples),
        transient=True,
        disable=not sys.stdout.isatty(),
    ):
        # The channels of a pixel side by side, as they come from a file.
        parts = image.permute(1, 2, 0).numpy(), mask.numpy()
        gap = bytes(-offset % 4)  # float32 begin at multiples of 4
        write(gap)
        offset += len(gap)
        places.append((offset, parts[0].itemsize, *parts[0].shape, *parts[1].shape))
        for part in parts:
            write(part.tobytes())
            offset += part.nbytes
    return np.array(places, np.int64)

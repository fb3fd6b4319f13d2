"""Samples that are decoded once and kept: in memory, for all processes of a machine, or on disk."""

import hashlib
import inspect
import logging
import math
import os
import sys
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import reduction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from lightning import Trainer
from rich.progress import track
from torch.utils.data import Dataset
from torchvision import tv_tensors

from seg_torch.data.sampling import ResizedSamples
from seg_torch.datasets.base import in_threads
from seg_torch.errors import InputError
from seg_torch.files import PARTIAL, cache_folder, write_atomically
from seg_torch.folders import locked
from seg_torch.hardware import total_memory
from seg_torch.version import __version__

log = logging.getLogger(__name__)


class CachedSamples(Dataset):
    """Samples that lie one after the other in one array, which all processes share.

    Args:
        content: uint8 [bytes], of each sample the image [H, W, C] and the mask [H, W].
        layout: int64 [N, 7], of each sample the offset, the bytes of a value of its image (1, or 4
            for float32), H, W, C of its image, H, W of its mask.
        file: The open file that `content` is mapped from; `None` for memory.
    """

    def __init__(self, content: torch.Tensor, layout: np.ndarray, file: BinaryIO | None) -> None:
        self.content, self.layout, self.file = content, layout, file

    def __reduce__(self) -> Any:
        if self.file is None:  # PyTorch moves the tensor to memory that all workers share
            return CachedSamples, (self.content, self.layout, None)
        if not hasattr(reduction, "DupFd"):  # Windows, where files that are open keep their names
            return _map_named, (self.file.name,)
        # A worker that is not forked gets the open file, which may have no name any more.
        return _map_descriptor, (reduction.DupFd(self.file.fileno()),)

    def __len__(self) -> int:
        return len(self.layout)

    def nbytes(self, index: int) -> int:
        """Return what a sample takes."""
        _, itemsize, *sizes = self.layout[index].tolist()
        return itemsize * math.prod(sizes[:3]) + math.prod(sizes[3:])

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        offset, itemsize, *sizes = self.layout[index].tolist()
        shapes = sizes[:3], sizes[3:]
        lengths = [itemsize * int(np.prod(shapes[0])), int(np.prod(shapes[1]))]
        image, mask = self.content[offset : offset + sum(lengths)].split(lengths)
        image = image.view(torch.uint8 if itemsize == 1 else torch.float32)
        pixels = image.view(shapes[0]).permute(2, 0, 1)
        return tv_tensors.Image(pixels), tv_tensors.Mask(mask.view(shapes[1]))


def fits_memory(samples: ResizedSamples) -> bool:
    """Whether all samples take less than a 16th of the memory.

    What they take is in the headers of their files; those without are read, one after the other.
    """
    rest = total_memory(torch.device("cpu")) / 16
    for index in range(len(samples)):
        size = samples.nbytes(index)
        rest -= sum(part.nbytes for part in samples[index]) if size is None else size
        if rest <= 0:
            return False
    return True


def in_memory(samples: ResizedSamples, trainer: Trainer | None) -> CachedSamples:
    """Read all samples into memory that all processes of a machine share.

    One process of each machine reads the images, and all of them map its file.
    """
    if trainer is None or trainer.num_devices == 1:
        # One array, since each tensor that is sent to a spawned worker takes up a file descriptor.
        content = bytearray()
        layout = _append(samples, content.extend)
        return CachedSamples(torch.frombuffer(content, dtype=torch.uint8), layout, None)
    # Machines may share the folder of temporary files, too.
    name = f"seg_torch-{trainer.strategy.broadcast(uuid.uuid4().hex)}-{trainer.node_rank}"
    path = Path(tempfile.gettempdir(), name)
    if trainer.local_rank == 0:
        write_samples(samples, path)
    trainer.strategy.barrier()
    cached = _map_file(path.open("rb"))
    trainer.strategy.barrier()
    if trainer.local_rank == 0:
        with suppress(PermissionError):  # of Windows, where the file stays until it is deleted
            path.unlink()  # the memory stays mapped, and whatever ends the run frees it
    return cached


def file_on_disk(samples: ResizedSamples) -> Path:
    """Return the file in which `on_disk` keeps samples, whether it is there or not.

    Raises:
        InputError: The samples are not decoded from files.
    """
    files = samples.dataset.fingerprint()
    if files is None:
        raise InputError("data.cache=disk: this dataset is not read from files; use ram")
    sizes = samples.resize, samples.resize is not None and samples.resize_labels
    key = repr((files, sizes, inspect.getsource(ResizedSamples), __version__))
    folder = cache_folder() / "samples" / hashlib.sha256(key.encode()).hexdigest()
    return folder / "samples.bin"


def on_disk(samples: ResizedSamples) -> CachedSamples:
    """Write all samples to a file, unless an earlier run did, and map it into memory.

    The file lies in a folder that is named after the files that the samples are decoded from. Of
    several processes that need them at once, one writes and the others wait.

    Raises:
        InputError: The samples are not decoded from files.
    """
    path = file_on_disk(samples)
    folder = path.parent
    if not folder.exists():
        log.info("data.cache=disk: decoding %d images into %s", len(samples), folder)
    with locked(folder, wait=True):
        if not path.exists():
            for partial in folder.glob(f"{PARTIAL}*"):  # of a run that was killed
                partial.unlink()
            write_samples(samples, path)
    return _map_file(path.open("rb"))


def write_samples(samples: ResizedSamples, path: Path) -> None:
    """Write all samples to a file, in which their layout and the number of them come last."""

    def write(name: str) -> None:
        with open(name, "wb") as file:
            layout = _append(samples, file.write)
            file.write(layout.tobytes() + np.int64(len(layout)).tobytes())

    write_atomically(path, write)


def _map_named(path: str) -> CachedSamples:
    return _map_file(Path(path).open("rb"))


def _map_descriptor(descriptor: Any) -> CachedSamples:
    return _map_file(os.fdopen(descriptor.detach(), "rb"))


def _map_file(file: BinaryIO) -> CachedSamples:
    """Map a file of samples into memory: what is read of it is shared by all processes."""
    content = np.memmap(file, np.uint8, "c")  # copy on write: PyTorch warns of what is read-only
    (count,) = content[-8:].view(np.int64)
    layout = content[-8 - 56 * count : -8].view(np.int64).reshape(count, 7)
    return CachedSamples(torch.from_numpy(content), layout, file)


def _append(samples: ResizedSamples, write: Callable[[bytes], object]) -> np.ndarray:
    """Write the samples one after the other, and return their layout."""
    layout, offset = [], 0
    count, quiet = len(samples), not sys.stdout.isatty()
    decoded = in_threads(samples.__getitem__, range(count))
    for image, mask in track(decoded, "Decoding", count, transient=True, disable=quiet):
        # The channels of a pixel side by side, as they come from a file.
        parts = image.permute(1, 2, 0).numpy(), mask.numpy()
        gap = bytes(-offset % 4)  # float32 begin at multiples of 4
        write(gap)
        offset += len(gap)
        layout.append((offset, parts[0].itemsize, *parts[0].shape, *parts[1].shape))
        for part in parts:
            write(part.tobytes())
            offset += part.nbytes
    return np.array(layout, np.int64)

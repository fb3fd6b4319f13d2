"""Samples that are decoded once and kept, in memory or in a file."""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch.utils.data import Dataset
from torchvision import tv_tensors

from seg_torch.datasets.base import in_threads


class CachedSamples(Dataset):
    """Samples that lie one after the other in one array, which all processes share.

    Args:
        content: uint8 [bytes], images and masks in turn.
        places: int64 [N, 6], of each sample the offset, C, H, W of its image, H, W of its mask.
        folder: Where both are, from which a worker process maps them anew; `None` for memory.
    """

    def __init__(self, content: torch.Tensor, places: np.ndarray, folder: Path | None) -> None:
        self.content, self.places, self.folder = content, places, folder

    def __reduce__(self) -> Any:
        arguments = (self.content, self.places, None)
        return (CachedSamples, arguments) if self.folder is None else (map_samples, (self.folder,))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        offset, *sizes = self.places[index].tolist()
        shapes = sizes[:3], sizes[3:]
        lengths = [int(np.prod(shape)) for shape in shapes]
        image, mask = self.content[offset : offset + sum(lengths)].split(lengths)
        return tv_tensors.Image(image.view(shapes[0])), tv_tensors.Mask(mask.view(shapes[1]))


def samples_in_memory(samples: Dataset) -> CachedSamples:
    """Reads all samples into memory."""
    # One array, since each tensor that is sent to a spawned worker takes up a file descriptor.
    content = bytearray()
    places = _append(samples, content.extend)
    return CachedSamples(torch.frombuffer(content, dtype=torch.uint8), places, None)


def samples_in_folder(samples: Dataset, folder: Path) -> CachedSamples:
    """Writes all samples to a folder, unless they are there, and maps them into memory."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
        partial.mkdir(parents=True)
        try:
            with (partial / "samples.bin").open("wb") as file:
                places = _append(samples, file.write)
            np.save(partial / "places.npy", places)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return map_samples(folder)


def map_samples(folder: Path) -> CachedSamples:
    """Maps the samples of a folder into memory: what is read is shared by all processes."""
    # Copy on write, for a transform that works in place.
    content = np.memmap(folder / "samples.bin", np.uint8, "c")
    return CachedSamples(torch.from_numpy(content), np.load(folder / "places.npy"), folder)


def _append(samples: Any, write: Callable[[bytes], object]) -> np.ndarray:
    """Writes the samples one after the other, and returns where each is."""
    places, offset = [], 0
    for image, mask in track(
        in_threads(samples.__getitem__, range(len(samples))),
        "Decoding",
        len(samples),
        transient=True,
        disable=not sys.stdout.isatty(),
    ):
        places.append((offset, *image.shape, *mask.shape))
        for part in (image, mask):
            write(part.numpy().tobytes())
            offset += part.numel()
    return np.array(places, np.int64)

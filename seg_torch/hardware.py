"""What this machine is good at: the defaults of the user who sets nothing."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch


def available_cpus() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a device, whether in use or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return 8 << 30
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        return min(total, int(text))
    return total


def reuse_memory() -> None:
    """Keeps memory that was freed for the next tensor, instead of giving it back (glibc only).

    A training step on a processor allocates the same large tensors again and again. glibc returns
    each to the system, which clears its pages when they are next used: a tenth of the step's time.
    The settings are those of mallopt(3).
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            m_trim_threshold, m_mmap_max = -1, -4
            mallopt(m_trim_threshold, -1)
            mallopt(m_mmap_max, 0)


def best_device() -> torch.device:
    """A CUDA GPU, else Apple's, else the processor."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def best_precision(device_type: str) -> str:
    """Lightning's name of the fastest precision that trains well on this kind of device.

    bfloat16 where there are instructions for it (without them it is emulated, and slower than
    float32), float16 on older GPUs, else float32.
    """
    if device_type == "cuda":
        return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"
    if device_type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return "bf16-mixed"
    return "32-true"


def autocast(device: torch.device) -> AbstractContextManager:
    """The context in which a network runs at `best_precision`."""
    precision = best_precision(device.type)
    if precision == "32-true":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if "bf16" in precision else torch.float16)

"""What this machine is good at: the defaults of the user who sets nothing."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from seg_torch.errors import InputError

# Lightning's names for precisions in which the weights themselves are kept.
TRUE_PRECISIONS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}

CACHE_VALUES = 1 << 19  # float32 values that stay in the cache of a CPU core


def available_cpus() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def row_chunks(rows: int, values: int, most: int = CACHE_VALUES) -> Iterator[slice]:
    """Yield the rows of an image or a map, some at a time.

    On a CPU, what stays in its cache takes a fraction of the time.

    Args:
        rows: Their number.
        values: In each row, such as the logits of all classes.
        most: Values in a chunk, which has at least one row.
    """
    length = max(1, most // max(1, values))
    for top in range(0, rows, length):
        yield slice(top, min(top + length, rows))


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory of a device, whether in use or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return 8 << 30
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
        return min(total, int(text))
    return total


def reuse_memory() -> None:
    """Keep memory that was freed for the next tensor, instead of giving it back (glibc only).

    A training step on a CPU allocates the same large tensors again and again. glibc returns
    each to the system, which clears its pages when they are next used: a tenth of the step's time.
    The settings are those of mallopt(3).
    """
    if mallopt := _function_of_glibc("mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_trim_threshold, -1)
        mallopt(m_mmap_max, 0)


def forget_shapes() -> None:
    """Let oneDNN keep the code for few shapes, in a process that segments images of many sizes.

    It compiles each layer for each size of its input and keeps the last 1,024 of these, which are
    gigabytes of large networks. 256 are more than one pass takes. It reads the setting when it
    compiles for the first time; one of the user's own stays.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


def return_memory() -> None:
    """Give what `reuse_memory` has kept back to the system (glibc only), before other sizes."""
    if malloc_trim := _function_of_glibc("malloc_trim"):
        malloc_trim(0)


def _function_of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def best_device() -> torch.device:
    """Return a CUDA GPU, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def accelerator(name: str) -> str:
    """Turn `trainer.accelerator` into `cuda`, `mps` or `cpu`; other names stay as they are.

    Raises:
        InputError: The machine has no such device.
    """
    best = best_device().type
    if name == "auto" or (name == "gpu" and best != "cpu"):
        return best
    gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "gpu" or not gpus.get(name, True):
        raise InputError(
            f"trainer.accelerator={name}: PyTorch finds no such device here; use "
            "trainer.accelerator=auto, or install a build of PyTorch for the GPU"
        )
    return name


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device.

    The CPU goes on while a GPU copies only where that is safe: to CUDA, from memory that is pinned,
    which PyTorch keeps until the copy is done. Elsewhere, as on Apple's GPUs, a copy of a tensor
    that nobody keeps would read memory that is already used for something else.
    """
    safe = device.type == "cuda" and tensor.is_pinned()
    return tensor.to(device, non_blocking=safe)


def resolve_precision(precision: str | int, device_type: str) -> str:
    """Turn a precision as the user writes it into Lightning's name.

    `auto` is the fastest that trains well on this kind of device: bfloat16 where there are
    instructions for it (without them it is emulated, and slower than float32), float16 on older
    GPUs, else float32.

    Args:
        precision: `auto` or one of Lightning's names, such as 32, "32-true" or "bf16-mixed".
        device_type: Such as "cpu".

    Raises:
        InputError: An unknown name.
    """
    name = str(precision)
    if name == "auto":
        if device_type == "cuda":
            return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16-mixed" if device_type == "cpu" and fast else "32-true"
    short = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}
    name = short.get(name, name)
    known = ("32-true", "bf16-mixed", "16-mixed", *TRUE_PRECISIONS)
    if name not in known:
        raise InputError(f"trainer.precision={precision}: use one of auto, {', '.join(known)}")
    return name


def autocast(precision: str, device_type: str) -> torch.autocast:
    """Return the context of a precision; that of float32 holds inside another autocast, too."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return torch.autocast(device_type, dtype, enabled=dtype is not None)


@contextmanager
def full_float32() -> Iterator[None]:
    """Enter a context in which float32 on a GPU is not TensorFloat-32, which has 10 bits."""
    precision = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def restored_flags() -> Iterator[None]:
    """Enter a context at whose end PyTorch computes as before, in the same ways and precisions.

    A Trainer sets that for the whole process.
    """
    cudnn: Any = torch.backends.cudnn
    precision = torch.get_float32_matmul_precision()
    convolutions, benchmark = cudnn.allow_tf32, cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32, cudnn.benchmark = convolutions, benchmark
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def named_nondeterminism() -> Iterator[None]:
    """Return the context of training with `trainer.deterministic=true`.

    PyTorch refuses an operation that has no deterministic implementation on the device when it is
    first called, which is in the first step, before any weight has changed.

    Raises:
        InputError: Names that operation.
    """
    try:
        yield
    except RuntimeError as error:
        operation, refused, _ = str(error).partition(" does not have a deterministic impl")
        if not refused:
            raise
        raise InputError(
            f"trainer.deterministic=true: {operation}, which the model or the loss calls, has no "
            "deterministic implementation on this device. Use another model or loss, or "
            "trainer.deterministic=warn, with which repetitions may differ"
        ) from error

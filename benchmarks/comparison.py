"""Ways of doing the same work, each timed in processes of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from seg_torch import hardware

TIMEOUT = 1800  # seconds, of one process


@dataclass
class Case:
    """The same work, done in several ways.

    A way that returns a float has warmed up and timed itself.

    Attributes:
        name: What is done.
        ours: Our way.
        peers: Name -> their way.
        also: Name -> another way of ours to compare with.
        note: For the table.
    """

    name: str
    ours: Callable[[], object]
    peers: Mapping[str, Callable[[], object]]
    also: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    note: str = ""

    def measure(self, way: str, device: str) -> dict[str, float]:
        """Return the seconds of a way, and the GB of its first call above what was in use."""
        if way not in self.peers and device == "cpu":
            hardware.reuse_memory()  # as train.py and predict.py do for their users
        function = {"ours": self.ours, **self.peers, **self.also}[way]
        memory, result = _peak_memory(function, device)
        seconds = result if isinstance(result, float) else seconds_of(function)
        return {"seconds": seconds, "memory": memory}


@dataclass
class Comparison:
    """Seconds of both sides in each round, and peak memory in GB."""

    name: str
    peer: str
    ours: list[float]
    theirs: list[float]
    memory: tuple[float, float]
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]


def compare(case: Case, command: Sequence[str], rounds: int) -> Iterator[Comparison]:
    """Run all ways of a case in turn, since the speed of a machine drifts.

    Args:
        command: With the name of a way behind it, prints what `Case.measure` returns.
    """
    found: dict[str, list[dict[str, float]]] = {"ours": []}
    found |= {way: [] for way in (*case.peers, *case.also)}
    for _ in range(rounds):
        for way, measured in found.items():
            run = subprocess.run(
                [sys.executable, *command, way], capture_output=True, text=True, timeout=TIMEOUT
            )
            if run.returncode:
                raise RuntimeError(f"{case.name}, {way}:\n{run.stderr}")
            measured.append(json.loads(run.stdout.splitlines()[-1]))
    seconds = {way: [m["seconds"] for m in measured] for way, measured in found.items()}
    memory = {way: max(m["memory"] for m in measured) for way, measured in found.items()}
    for way in (*case.peers, *case.also):
        yield Comparison(
            *(case.name, way, seconds["ours"], seconds[way]),
            *((memory["ours"], memory[way]), case.note),
        )


def seconds_of(function: Callable[[], object], calls: int = 3) -> float:
    """Return the median of a few calls; at least half a second of them."""
    times: list[float] = []
    while len(times) < calls or sum(times) < 0.5:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _peak_memory(function: Callable[[], object], device: str) -> tuple[float, object]:
    """Return what a call takes above what is in use before it, in GB, and its result."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        return (torch.cuda.max_memory_allocated() - before) / 1e9, result

    def kib(key: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])

    if not Path("/proc/self/clear_refs").exists():
        return float("nan"), function()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is in use now
    before = kib("VmRSS")
    result = function()
    return (kib("VmHWM") - before) * 1024 / 1e9, result

"""Two ways of doing the same work, timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch


@dataclass
class Comparison:
    """Seconds of both sides in each round, for the same work."""

    name: str
    peer: str
    ours: list[float]
    theirs: list[float]
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]


def in_turn(
    name: str,
    ours: Callable[[], object],
    peers: Mapping[str, Callable[[], object]],
    rounds: int,
    note: str = "",
) -> Iterator[Comparison]:
    """Times both sides in turn. A function that returns a float has timed itself."""

    def seconds(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        result = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result if isinstance(result, float) else time.perf_counter() - start

    functions = {"ours": ours, **peers}
    for function in functions.values():
        function()  # warms up
    times = [{key: seconds(function) for key, function in functions.items()} for _ in range(rounds)]
    for peer in peers:
        yield Comparison(name, peer, [t["ours"] for t in times], [t[peer] for t in times], note)

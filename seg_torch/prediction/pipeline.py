"""How predict.py works through a folder: three parties at once read, segment and write.

Images that go through the network together have one size. On a GPU such batches are planned from
the headers of all files, before the first one is read, so that a run that was stopped and goes on
makes the same batches.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from rich.progress import track

from seg_torch import hardware
from seg_torch.errors import InputError
from seg_torch.prediction.folder import Batch, Files, OutputFolder, Record, stamp
from seg_torch.prediction.segmentation import Segmentation
from seg_torch.prediction.segmenter import Segmenter

THREADS = min(8, hardware.available_cpus())  # that read; as many write


def plan_batches(
    files: Files, segmenters: Mapping[str, Segmenter], batch_size: int | None
) -> list[Batch]:
    """Group files of one size, in the order in which the groups begin.

    Convolutions round differently for another number of images, but not for other images: a mask
    depends on the length of its batch, which is the same whenever the same files are planned.

    Args:
        files: Images by name.
        segmenters: By name; all take images of one format.
        batch_size: Images in a batch; `None`: by memory on a GPU, else 1.
    """
    first = next(iter(segmenters.values()))
    if batch_size == 1 or (batch_size is None and first.device.type == "cpu"):
        return [[name] for name in files]
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = list(pool.map(first.format.size, files.values()))
    batches: list[Batch] = []
    unfilled: dict[tuple[int, int], Batch] = {}
    for name, size in zip(files, sizes, strict=True):
        if size is None:  # it will fail, and nothing else with it
            batches.append([name])
            continue
        if size not in unfilled:
            batches.append(unfilled.setdefault(size, []))
        unfilled[size].append(name)
        limit = batch_size or min(segmenter.batch_size(*size) for segmenter in segmenters.values())
        if len(unfilled[size]) >= limit:
            del unfilled[size]
    return batches


class _Image(NamedTuple):
    name: str
    pixels: np.ndarray  # [H, W, C], as the model's format says
    seconds: float  # that reading it took


class Pipeline:
    """Segments images while the next ones are read and the last ones are written.

    Few images are in memory at a time, however many there are: each of the two queues holds a batch
    and two images for each of its threads.

    Args:
        segmenters: The model by its name, and the second one, which `side_by_side` shows, too.
        out: Has the files, and takes the outputs.
    """

    def __init__(self, segmenters: Mapping[str, Segmenter], out: OutputFolder) -> None:
        self.segmenters, self.out = segmenters, out
        self.reader = next(iter(segmenters.values()))

    def run(self, batches: list[Batch], progress: bool) -> None:
        """Work through batches.

        Args:
            batches: The names of images that go through the network together.
            progress: Show a bar.
        """
        names = list(chain.from_iterable(batches))
        length = 2 * THREADS + max(map(len, batches), default=0)
        writing: deque[Future[Record]] = deque()
        with ThreadPoolExecutor(THREADS) as readers, ThreadPoolExecutor(THREADS) as writers:
            images = self._read_ahead(readers, names, length)
            # Drawn ten times a second, as rich does by default, the bar takes 1 % of the time.
            shown = track(
                images, "predicting", len(names), disable=not progress, refresh_per_second=2
            )
            for batch in batches:
                same_size: dict[tuple[int, ...], list[_Image]] = {}  # one, if headers are right
                for image in islice(shown, len(batch)):
                    if isinstance(image, _Image):
                        same_size.setdefault(image.pixels.shape, []).append(image)
                    else:
                        self.out.note(image)
                for group in same_size.values():
                    start = time.perf_counter()
                    results = self._segment(group)
                    seconds = (time.perf_counter() - start) / len(group)
                    for image, result in zip(group, results, strict=True):
                        writing.append(writers.submit(self._write, image, result, seconds))
                while len(writing) > length or (writing and writing[0].done()):
                    self.out.note(writing.popleft().result())
            list(shown)  # nothing is left, but the bar ends with its iterator
            while writing:
                self.out.note(writing.popleft().result())

    def _read_ahead(
        self, readers: ThreadPoolExecutor, names: list[str], count: int
    ) -> Iterator[_Image | Record]:
        """Read in threads, in order, at most `count` images ahead of whoever takes them."""
        rest = iter(names)
        pending = deque(readers.submit(self._read, name) for name in islice(rest, count))
        while pending:
            yield pending.popleft().result()
            pending.extend(readers.submit(self._read, name) for name in islice(rest, 1))

    def _read(self, name: str) -> _Image | Record:
        start = time.perf_counter()
        try:
            pixels = self.reader.read(self.out.files[name])
            return _Image(name, pixels, time.perf_counter() - start)
        except InputError as error:
            return {"name": name, "error": str(error)}

    def _segment(self, images: list[_Image]) -> list[Segmentation]:
        """Segment images of one size; only the first model is asked for probabilities."""
        first, *others = self.segmenters.values()
        pixels = [image.pixels for image in images]
        wanted = ("probabilities" in self.out.outputs, "confidence" in self.out.outputs)
        results = [first.predict_batch(pixels, *wanted), *(o.predict_batch(pixels) for o in others)]
        segmentations = []
        for image, *found in zip(images, *results, strict=True):
            compared = dict(zip(self.segmenters, found, strict=True)) if others else {}
            source = self.out.files[image.name]
            segmentations.append(replace(found[0], source=source, compared=compared))
        return segmentations

    def _write(self, image: _Image, result: Segmentation, seconds: float) -> Record:
        """Write the outputs of an image and return its record."""
        start = time.perf_counter()
        try:
            result.save(self.out.folder, image.name, self.out.outputs)
        except InputError as error:
            return {"name": image.name, "error": str(error)}
        return {
            "name": image.name,
            "file": stamp(self.out.files[image.name]),
            "width": result.mask.shape[1],
            "height": result.mask.shape[0],
            "confidence": result.confidence,
            "areas": list(result.areas().values()),
            "seconds": image.seconds + seconds + time.perf_counter() - start,
        }

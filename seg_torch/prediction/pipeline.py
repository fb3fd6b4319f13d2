"""How predict.py works through a folder: three parties at once read, segment and write.

Images that go through the network together have one size. On a GPU such batches are planned from
the headers of all files, before the first one is read, so that a run that was stopped and goes on
makes the same batches.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
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
# The images that wait for the network, and the results that wait to be written, take at most so
# much each, unless it is a single one.
QUEUE_BYTES = 1 << 29


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


_Queue = deque[tuple[Future, int]]  # what is being read or written, and its bytes


class _Image(NamedTuple):
    name: str
    pixels: np.ndarray  # [H, W, C], as the model's format says
    seconds: float  # that reading it took


class Pipeline:
    """Segments images while the next ones are read and the last ones are written.

    Few images are in memory at a time, however many and however large they are: each of the two
    queues holds a batch and two images for each of its threads, and `QUEUE_BYTES` at most.

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
        with ThreadPoolExecutor(THREADS) as readers, ThreadPoolExecutor(THREADS) as writers:
            images, writing = self._read_ahead(readers, names, length), _Queue()
            # Drawn ten times a second, as rich does by default, the bar takes 1 % of the time.
            shown = track(
                images, "predicting", len(names), disable=not progress, refresh_per_second=2
            )
            for batch in batches:
                for image, result, seconds in self._segmented(islice(shown, len(batch))):
                    size = _bytes(result) + image.pixels.nbytes
                    while not _fits(writing, size, length):
                        self.out.note(writing.popleft()[0].result())
                    writing.append((writers.submit(self._write, image, result, seconds), size))
                    del image, result  # not to be kept beside the next batch
                while writing and writing[0][0].done():
                    self.out.note(writing.popleft()[0].result())
            list(shown)  # nothing is left, but the bar ends with its iterator
            while writing:
                self.out.note(writing.popleft()[0].result())

    def _read_ahead(
        self, readers: ThreadPoolExecutor, names: list[str], count: int
    ) -> Iterator[_Image | Record]:
        """Read in threads, in order, ahead of whoever takes them, as far as the queue allows."""
        rest, pending = deque(names), _Queue()
        while rest or pending:
            while rest and _fits(pending, size := self._size(rest[0]), count):
                pending.append((readers.submit(self._read, rest.popleft()), size))
            yield pending.popleft()[0].result()

    def _size(self, name: str) -> int:
        """Return the bytes of an image by its header, with what Pillow takes to decode it."""
        format = self.reader.format
        height, width = format.size(self.out.files[name]) or (0, 0)  # it will fail
        return height * width * (4 + format.channels * format.bits // 8)

    def _read(self, name: str) -> _Image | Record:
        start = time.perf_counter()
        try:
            pixels = self.reader.read(self.out.files[name])
            return _Image(name, pixels, time.perf_counter() - start)
        except InputError as error:
            return {"name": name, "error": str(error)}

    def _segmented(
        self, images: Iterable[_Image | Record]
    ) -> Iterator[tuple[_Image, Segmentation, float]]:
        """Yield the images of a batch with their results, and the seconds that each took."""
        same_size: dict[tuple[int, ...], list[_Image]] = {}  # one, if headers are right
        for image in images:
            if isinstance(image, _Image):
                same_size.setdefault(image.pixels.shape, []).append(image)
            else:
                self.out.note(image)
        for group in same_size.values():
            start = time.perf_counter()
            results = self._segment(group)
            seconds = (time.perf_counter() - start) / len(group)
            while group:
                yield group.pop(0), results.pop(0), seconds

    def _segment(self, images: list[_Image]) -> list[Segmentation]:
        """Segment images of one size; only the first model is asked for probabilities."""
        first, *others = self.segmenters.values()
        pixels = [image.pixels for image in images]
        wanted = ("probabilities" in self.out.outputs, "confidence" in self.out.outputs)
        results = [first.segment(pixels, *wanted), *(o.segment(pixels) for o in others)]
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


def _fits(queue: _Queue, size: int, count: int) -> bool:
    """Whether a queue of `count` images at most may take another one of so many bytes."""
    total = size + sum(bytes for _, bytes in queue)
    return not queue or (len(queue) < count and total <= QUEUE_BYTES)


def _bytes(result: Segmentation) -> int:
    """Return what a result takes, without its image."""
    of_others = sum(_bytes(other) for other in result.compared.values())
    arrays = (result.mask, result.scores, result.confidence_map)
    return of_others + sum(array.nbytes for array in arrays if array is not None)

"""One queue of requests, and the processes with the model that take batches from it."""

import asyncio
import logging
import multiprocessing
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from fastapi import Response
from omegaconf import DictConfig

from seg_torch.serving import model
from seg_torch.serving.model import Upload, refusal

log = logging.getLogger(__name__)

CHECKED = 1.0  # seconds after which an idle process is looked at, whether it still lives


class Waiting(NamedTuple):
    """A request in the queue."""

    upload: Upload
    answer: asyncio.Future[Response]
    timer: asyncio.TimerHandle  # refuses it when it has waited too long


class Worker:
    """A process with the model on a device."""

    def __init__(self, cfg: DictConfig, device: str) -> None:
        self.cfg, self.device = cfg, device
        self.start()

    def start(self) -> None:
        """Start the process, which loads the model before it does anything else."""
        # Not forked: CUDA and threads do not survive that.
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.loaded: Future[dict[str, Any]] = self.process.submit(model.load, self.cfg, self.device)

    def is_ready(self) -> bool:
        """Whether the model is loaded."""
        return self.loaded.done() and not self.loaded.exception()

    def check(self) -> None:
        """Start a new process if this one has ended since it had loaded the model."""
        if self.is_ready():
            try:
                self.process.submit(int)
            except BrokenProcessPool:
                log.error("a process with the model has ended; another one is started")
                self.start()

    def submit(self, uploads: list[Upload]) -> Future[list[Response]]:
        """Have requests answered, by a new process if the old one has ended meanwhile."""
        try:
            return self.process.submit(model.answer, uploads)
        except BrokenProcessPool:
            self.start()
            return self.process.submit(model.answer, uploads)


class Batcher:
    """Requests wait here, in the order in which they came, for one of the processes.

    Args:
        cfg: Settings of `serve` or `app`.
        devices: One for each process.
        batch_size: Requests that are worked on together.
    """

    def __init__(self, cfg: DictConfig, devices: Sequence[str], batch_size: int) -> None:
        self.batch_size, self.batch_timeout = batch_size, cfg.batch_timeout
        self.timeout = cfg.timeout
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue()
        self.workers = [Worker(cfg, device) for device in devices]

    def load(self) -> dict[str, Any]:
        """Wait until all models are loaded, and return what is to be known about them.

        Raises:
            InputError: They cannot be loaded.
        """
        loaded = [worker.loaded.result() for worker in self.workers]
        return loaded[0]

    def is_ready(self) -> bool:
        """Whether all models are loaded."""
        return all(worker.is_ready() for worker in self.workers)

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in multiprocessing.active_children():
            process.kill()
        for worker in self.workers:
            worker.process.shutdown()

    @asynccontextmanager
    async def running(self, *_: Any) -> AsyncIterator[None]:
        """Answer requests, as the lifespan of a server."""
        tasks = [asyncio.create_task(self._work(worker)) for worker in self.workers]
        yield
        for task in tasks:
            task.cancel()

    def submit(self, upload: Upload) -> asyncio.Future[Response]:
        """Put a request into the queue; if its answer is cancelled before its turn it is left out.

        Returns:
            The answer, if need be a refusal; it is never an exception.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Response] = loop.create_future()
        late = refusal(504, f"the request has waited for {self.timeout} seconds (timeout)")
        timer = loop.call_later(self.timeout, _finish, answer, late)
        self.queue.put_nowait(Waiting(upload, answer, timer))
        return answer

    async def _work(self, worker: Worker) -> None:
        """Have one batch after the other answered by a process."""
        while True:
            batch = await self._batch(worker)
            try:
                uploads = [waiting.upload for waiting in batch]
                answers = await asyncio.wrap_future(worker.submit(uploads))
            except BrokenProcessPool:
                log.error("a process with the model has ended; another one is started")
                worker.start()
                answers = [refusal(503, "the process with the model has ended")] * len(batch)
            except Exception:
                if worker.is_ready():
                    log.exception("%d requests cannot be answered", len(batch))
                    answers = [refusal(500, "Internal Server Error")] * len(batch)
                else:  # of a process that took the place of another one
                    log.error("the model cannot be loaded again: %s", worker.loaded.exception())
                    worker.process.shutdown(wait=False)
                    worker.start()
                    answers = [refusal(503, "the model cannot be loaded")] * len(batch)
            for waiting, answer in zip(batch, answers, strict=True):
                _finish(waiting.answer, answer)

    async def _batch(self, worker: Worker) -> list[Waiting]:
        """Wait for a request, and then a little for others that go with it."""
        batch: list[Waiting] = []
        end = None
        while len(batch) < self.batch_size:
            rest = CHECKED if end is None else max(0, end - asyncio.get_running_loop().time())
            try:
                waiting = await asyncio.wait_for(self.queue.get(), rest)
            except asyncio.TimeoutError:
                if batch:
                    break
                worker.check()
                continue
            if waiting.answer.done():  # the client has hung up, or it has waited too long
                continue
            waiting.timer.cancel()
            batch.append(waiting)
            end = end or asyncio.get_running_loop().time() + self.batch_timeout
        return batch


def _finish(future: asyncio.Future[Response], answer: Response) -> None:
    if not future.done():
        future.set_result(answer)

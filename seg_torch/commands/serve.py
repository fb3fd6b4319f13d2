"""seg-torch serve: answer images that are sent over HTTP with their segmentation.

LitServe runs the processes: one for each device holds the model, others speak HTTP. Those read
requests and refuse the large ones; everything about images happens beside the model, where requests
that arrived together are read and written in threads and go through the network in batches of one
size.
"""

# No `from __future__ import annotations`: FastAPI needs the annotation of `decode_request` itself.
import json
import logging
import multiprocessing
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import BytesIO
from queue import Empty
from typing import Annotated, Any, NamedTuple

import litserve
import numpy as np
import torch
from fastapi import Depends, HTTPException, Request, Response
from litserve.loops.simple_loops import BatchedLoop
from omegaconf import DictConfig
from PIL import Image
from starlette.datastructures import UploadFile

from seg_torch import hardware
from seg_torch.errors import InputError, check_choice
from seg_torch.images.format import RGB
from seg_torch.images.read import decode_image, image_size
from seg_torch.prediction.load import load_segmenter, model_name
from seg_torch.prediction.pipeline import THREADS
from seg_torch.prediction.segmentation import Segmentation
from seg_torch.prediction.segmenter import Segmenter
from seg_torch.version import __version__

log = logging.getLogger(__name__)

HOSTS = ("127.0.0.1", "0.0.0.0", "::")  # LitServe takes no others
MAX_OUTLINE = 3_000_000  # pixels; the JSON of noise would be a hundred times its image


class Upload(NamedTuple):
    """An image file that was sent, and whether JSON is wanted."""

    name: str
    content: bytes
    as_json: bool


def serve(cfg: DictConfig) -> None:
    """Serve `cfg.checkpoint` until it is interrupted.

    Raises:
        InputError: A setting or the model cannot be used, or the port is taken.
    """
    accelerator = _check_settings(cfg)
    segmenter = load_segmenter(cfg, torch.device("cpu"))  # the worker's mistakes are tracebacks
    if segmenter.format != RGB:
        raise InputError("serve: this model takes images that are not RGB; use seg-torch predict")
    about = {
        "model": model_name(cfg),
        **segmenter.labels.to_dict(),
        "versions": {"seg_torch": __version__, "torch": torch.__version__},
        "limits": {"max_megabytes": cfg.max_megabytes, "max_pixels": cfg.max_pixels},
    }
    del segmenter
    batch_size = cfg.max_batch_size or (1 if accelerator == "cpu" else 8)
    server = litserve.LitServer(
        _API(cfg, batch_size),
        accelerator=accelerator,
        devices=cfg.trainer.devices,
        workers_per_device=cfg.workers,
        timeout=cfg.timeout,
        max_payload_size=cfg.max_megabytes * 1_000_000,
        disable_openapi_url=True,  # its page would load scripts from elsewhere
        model_metadata=about,
    )
    first = os.getpid()

    def stop(*_: Any) -> None:  # `kill` as Ctrl-C, which LitServe knows: its processes would stay
        if os.getpid() == first:
            raise KeyboardInterrupt
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    log.info("http://%s:%d/predict answers soon; Ctrl-C ends it", cfg.host, cfg.port)
    if cfg.host != HOSTS[0]:
        log.warning("host=%s: others can send images, without a password", cfg.host)
    try:
        server.run(cfg.host, cfg.port, log_level="warning", generate_client_file=False)
    finally:
        for process in multiprocessing.active_children():
            process.kill()


def _check_settings(cfg: DictConfig) -> str:
    """Return the kind of the device, after a look at the settings."""
    check_choice("host", cfg.host, HOSTS)
    for name in ("max_megabytes", "max_pixels", "timeout", "workers"):
        if cfg[name] < 1:
            raise InputError(f"{name}={cfg[name]}: expected at least 1")
    size = cfg.max_batch_size
    if size is not None and (not isinstance(size, int) or size < 1):
        raise InputError(f"max_batch_size={size}: expected at least 1")
    if not 0 <= cfg.batch_timeout < cfg.timeout:
        raise InputError(f"batch_timeout={cfg.batch_timeout}: expected 0 to timeout={cfg.timeout}")
    if not 1024 <= cfg.port <= 65535:
        raise InputError(f"port={cfg.port}: expected 1024 to 65535")
    family = socket.AF_INET6 if cfg.host == "::" else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((cfg.host, cfg.port))
        except OSError as error:
            raise InputError(f"port={cfg.port}: {error.strerror}; use another one") from None
    return hardware.accelerator(cfg.trainer.accelerator)


# ---- In the processes that speak HTTP


async def _upload(request: Request, format: str | None = None) -> Upload:
    """Take the image from a form or, with an image's content type, from the whole body."""
    if format is None:
        format = "json" if "application/json" in request.headers.get("accept", "") else "png"
    if format not in ("png", "json"):
        raise HTTPException(400, f"format={format}: use png or json")
    as_json = format == "json"
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=1) as form:
            files = [value for value in form.values() if isinstance(value, UploadFile)]
            if not files:
                raise HTTPException(400, "the form has no file")
            return Upload(files[0].filename or "image", await files[0].read(), as_json)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return Upload("image", await request.body(), as_json)
    raise HTTPException(
        415,
        f"the content type is {kind or 'missing'}: send a form (multipart/form-data) with the "
        "image as a file, or the image itself as image/* or application/octet-stream",
    )


# ---- In the process of a device


class _Loop(BatchedLoop):
    """LitServe's own asks the queue a thousand times a second, also where there is nothing to do.

    A batch begins with its first request.
    """

    def get_batch_requests(self, lit_api: Any, request_queue: Any, transport: Any) -> Any:
        try:
            requests = [request_queue.get(timeout=1)]
        except Empty:
            return [], []
        end = time.monotonic() + lit_api.batch_timeout
        while len(requests) < lit_api.max_batch_size:
            try:
                requests.append(request_queue.get(timeout=max(0, end - time.monotonic())))
            except Empty:
                break
        oldest = time.monotonic() - lit_api.request_timeout
        batch = [(queue, uid, upload) for queue, uid, sent, upload in requests if sent >= oldest]
        return batch, [(queue, uid) for queue, uid, sent, _ in requests if sent < oldest]


class _API(litserve.LitAPI):
    def __init__(self, cfg: DictConfig, batch_size: int) -> None:
        super().__init__(batch_size, cfg.batch_timeout, loop=_Loop())
        self.cfg = cfg

    def setup(self, device: str) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
        if device == "cpu":
            hardware.reuse_memory()
        Image.MAX_IMAGE_PIXELS = None  # `_read` has a limit of its own
        self.segmenter: Segmenter = load_segmenter(self.cfg, torch.device(device))
        self.pool = ThreadPoolExecutor(THREADS)
        # Around all images, so that the weights are cast to another precision only once.
        self.context = ExitStack()
        self.context.enter_context(self.segmenter.inference.autocast())

    def decode_request(self, request: Annotated[Upload, Depends(_upload)]) -> Upload:
        return request

    def predict(self, uploads: list[Upload]) -> list[Response]:
        """Answers requests; what is wrong with one of them is no matter of the others."""
        read = list(self.pool.map(self._read, uploads))
        images = {i: image for i, image in enumerate(read) if isinstance(image, np.ndarray)}
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, image in images.items():
            groups.setdefault(image.shape, []).append(i)
        results: dict[int, Segmentation] = {}
        for shape, indices in groups.items():
            step = self.cfg.max_batch_size or self.segmenter.batch_size(*shape[:2])
            for start in range(0, len(indices), step):
                chosen = indices[start : start + step]
                results |= zip(
                    chosen, self.segmenter.predict_batch([images[i] for i in chosen]), strict=True
                )
        answers = {
            i: self.pool.submit(_answer, result, uploads[i].as_json)
            for i, result in results.items()
        }
        return [
            _refusal(image) if isinstance(image, HTTPException) else answers[i].result()
            for i, image in enumerate(read)
        ]

    def _read(self, upload: Upload) -> np.ndarray | HTTPException:
        height, width = image_size(BytesIO(upload.content)) or (0, 0)
        if height * width > self.cfg.max_pixels:
            limit = f"the limit is {self.cfg.max_pixels:,}"
            return HTTPException(413, f"the image has {height * width:,} pixels; {limit}")
        try:
            return decode_image(upload.content, upload.name)
        except InputError as error:
            return HTTPException(400, str(error))


def _refusal(error: HTTPException) -> Response:
    content = json.dumps({"detail": error.detail})
    return Response(content, error.status_code, media_type="application/json")


def _answer(result: Segmentation, as_json: bool) -> Response:
    if not as_json:
        file = BytesIO()
        result.save_mask(file)
        return Response(file.getvalue(), media_type="image/png")
    mask = result.mask
    outline = np.count_nonzero(mask[1:] != mask[:-1]) + np.count_nonzero(
        mask[:, 1:] != mask[:, :-1]
    )
    if outline > MAX_OUTLINE:
        detail = f"the outlines of the mask are {outline:,} pixels long, too many for polygons"
        return _refusal(HTTPException(422, f"{detail}: ask for format=png"))
    height, width = mask.shape
    content = {
        "width": width,
        "height": height,
        "confidence": result.confidence,
        "areas": result.areas(),
        "polygons": result.polygons(),
    }
    return Response(json.dumps(content, separators=(",", ":")), media_type="application/json")

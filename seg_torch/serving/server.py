"""The process that speaks HTTP: it reads requests, refuses large ones, and gives the page."""

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.staticfiles import StaticFiles
from omegaconf import DictConfig

from seg_torch import hardware
from seg_torch.errors import InputError
from seg_torch.prediction.segmenter import model_name
from seg_torch.serving.batching import Batcher
from seg_torch.serving.model import Upload

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
PAGE_HEADERS = {
    # The page loads nothing from elsewhere; blob: are the images that it has got from the server.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "Cache-Control": "no-cache",
}


class Page(StaticFiles):
    """The files of the page."""

    async def get_response(self, path: str, scope: Any) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        InputError: The address or the port cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, TypeError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise InputError(f"host={host} port={port}: {reason}; use another one") from None


def run(cfg: DictConfig, listening: socket.socket, ready: Callable[[str], Any] = log.info) -> None:
    """Load the model and answer requests until the process is interrupted.

    Args:
        cfg: Settings of `serve` or `app`.
        listening: Where clients come in; until the model is loaded they wait.
        ready: Is called with the address of the page when the model is loaded.

    Raises:
        InputError: A setting or the model cannot be used.
    """
    kind = hardware.accelerator(cfg.trainer.accelerator)
    devices = _devices(kind, cfg.trainer.devices) * cfg.workers
    signal.signal(signal.SIGTERM, _stop)
    batcher = Batcher(cfg, devices, cfg.max_batch_size or (1 if kind == "cpu" else 8))
    try:
        limits = {"max_megabytes": cfg.max_megabytes, "max_pixels": cfg.max_pixels}
        about = {"model": public_name(cfg), **batcher.load(), "limits": limits}
        host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
        ready(f"http://{host}:{listening.getsockname()[1]}")
        if cfg.host not in LOOPBACK:
            log.warning("host=%s: others can use it, without a password", cfg.host)
        api = create_app(batcher, about, cfg.max_megabytes * 1_000_000)
        settings = uvicorn.Config(
            api, log_config=None, log_level="warning", timeout_graceful_shutdown=cfg.timeout
        )
        uvicorn.Server(settings).run(sockets=[listening])
    finally:
        batcher.close()


def create_app(batcher: Batcher, about: dict[str, Any], max_bytes: int) -> FastAPI:
    """Return the application: the API, and the page.

    Args:
        batcher: Answers the requests.
        about: What `/info` tells.
        max_bytes: Of the largest request.
    """
    key = os.environ.get("SEG_TORCH_API_KEY") or os.environ.get("LIT_SERVER_API_KEY")

    def check_key(x_api_key: Annotated[str, Header()] = "") -> None:
        if key and not secrets.compare_digest(x_api_key.encode(), key.encode()):
            raise HTTPException(401, "the header X-API-Key is missing or wrong")

    locked = [Depends(check_key)]
    # Without the pages that FastAPI makes of the API: they would load scripts from elsewhere.
    api = FastAPI(openapi_url=None, lifespan=batcher.running, dependencies=locked)

    @api.get("/health")
    async def health() -> Response:
        return Response("ok") if batcher.is_ready() else Response("not ready", 503)

    @api.get("/info")
    async def info() -> dict[str, Any]:
        return {"model": about}

    @api.post("/predict")
    async def predict(request: Request, format: str | None = None) -> Response:
        if format is None:
            format = "json" if "application/json" in request.headers.get("accept", "") else "png"
        if format not in ("png", "json"):
            raise HTTPException(400, f"format={format}: use png or json")
        return await answer(request, "json" if format == "json" else "png")

    @api.post("/view")
    async def view(request: Request) -> Response:
        return await answer(request, "view")

    async def answer(request: Request, wanted: Literal["png", "json", "view"]) -> Response:
        limited = _limited(request, max_bytes, batcher.timeout)
        answer = batcher.submit(Upload(*await _image(limited), wanted))
        gone = asyncio.create_task(_hung_up(request))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            # Nobody sees 499.
            return answer.result() if answer.done() else Response(status_code=499)
        finally:
            gone.cancel()
            answer.cancel()

    api.mount("/", Page(directory=Path(__file__).parent / "page", html=True))
    return api


def _limited(request: Request, max_bytes: int, timeout: float) -> Request:
    """Return the request with a body that ends: it raises an HTTPException where it does not."""
    left, close = max_bytes, {"Connection": "close"}  # else what is still sent would be read
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise HTTPException(413, "Payload too large")

    async def receive() -> Any:
        nonlocal left
        try:
            message = await asyncio.wait_for(request.receive(), timeout)
        except asyncio.TimeoutError:
            reason = f"nothing has come for {timeout} seconds (timeout)"
            raise HTTPException(408, reason, close) from None
        if message["type"] == "http.disconnect":
            raise HTTPException(400, "the client has hung up")
        left -= len(message.get("body", b""))
        if left < 0:
            raise HTTPException(413, "Payload too large", close)
        return message

    return Request(request.scope, receive)


async def _image(request: Request) -> tuple[str, bytes]:
    """Take the name and the content of an image from a form or, by its type, from the body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=1) as form:
            files = [value for value in form.values() if not isinstance(value, str)]
            if not files:
                raise HTTPException(400, "the form has no file")
            return files[0].filename or "image", await files[0].read()
    if kind.startswith("image/") or kind == "application/octet-stream":
        return "image", await request.body()
    raise HTTPException(
        415,
        f"the content type is {kind or 'missing'}: send a form (multipart/form-data) with the "
        "image as a file, or the image itself as image/* or application/octet-stream",
    )


async def _hung_up(request: Request) -> None:
    """Wait until the client hangs up; its body has come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def public_name(cfg: DictConfig) -> str:
    """Return what the model is called, without folders of this machine."""
    name = model_name(cfg)
    path = Path(name).expanduser()
    if not path.exists():  # of the Hugging Face Hub, or of a model with published weights
        return name
    path = path.resolve()
    return path.parents[1].name if path.parent.name == "checkpoints" else path.name


def check_settings(cfg: DictConfig) -> None:
    """Refuse settings of `serve` or `app` that are out of their range.

    Raises:
        InputError: Names one of them.
    """
    for name in ("max_megabytes", "max_pixels", "timeout", "workers"):
        if cfg[name] < 1:
            raise InputError(f"{name}={cfg[name]}: expected at least 1")
    size = cfg.max_batch_size
    if size is not None and (not isinstance(size, int) or size < 1):
        raise InputError(f"max_batch_size={size}: expected at least 1")
    if not 0 <= cfg.batch_timeout < cfg.timeout:
        raise InputError(f"batch_timeout={cfg.batch_timeout}: expected 0 to timeout={cfg.timeout}")


def _devices(kind: str, chosen: Any) -> list[str]:
    """Return the devices that `trainer.devices` chooses: all, so many, or those of the numbers."""
    if kind == "cpu":
        return ["cpu"]
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if chosen in ("auto", -1):
        chosen = count
    numbers = list(range(chosen) if isinstance(chosen, int) else chosen)
    if not numbers or not all(number in range(count) for number in numbers):
        raise InputError(f"trainer.devices={chosen}: expected auto, or of {count} devices")
    return [f"{kind}:{number}" for number in numbers]


def _stop(*_: Any) -> None:
    """End on `kill`, without an error; uvicorn calls it when it has answered what was under way."""
    sys.exit(0)

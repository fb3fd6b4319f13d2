"""In a process with the model: uploaded images to answers."""

import base64
import gzip
import math
import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from io import BytesIO
from multiprocessing import parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from fastapi import Response
from fastapi.responses import JSONResponse
from omegaconf import DictConfig
from PIL import Image

from seg_torch import hardware
from seg_torch.drawing.visualize import JPEG_LIMIT
from seg_torch.errors import InputError
from seg_torch.images.read import FORMATS, IMAGE_SUFFIXES
from seg_torch.prediction.pipeline import THREADS
from seg_torch.prediction.segmentation import JPEG_QUALITY, Segmentation, output_path
from seg_torch.prediction.segmenter import load_segmenter
from seg_torch.version import __version__

MAX_OUTLINE = 3_000_000  # pixels; the polygons of noise would be a hundred times its image
# What the page shows of an image has at most so many pixels, and its longer side so many, which
# every browser can draw.
VIEW_PIXELS, VIEW_SIDE = 2_000_000, 8192


class Upload(NamedTuple):
    """An image file that was sent, and what is wanted of it."""

    name: str
    content: bytes
    wanted: Literal["png", "json", "view"]


def refusal(status: int, reason: str) -> Response:
    """Return the answer that tells what is wrong."""
    return JSONResponse({"detail": reason}, status)


class Model:
    """A model that answers requests.

    Args:
        cfg: Settings of `serve` or `app`.
        device: Where to run.

    Raises:
        InputError: The model cannot be loaded, or it takes images that are several files.
    """

    def __init__(self, cfg: DictConfig, device: str) -> None:
        self.max_pixels, self.max_batch_size = cfg.max_pixels, cfg.max_batch_size
        self.segmenter = load_segmenter(cfg, torch.device(device))
        if self.segmenter.format.files:
            raise InputError("this model takes several files an image; use seg-torch predict")
        self.pool = ThreadPoolExecutor(THREADS)

    def answer(self, uploads: list[Upload]) -> list[Response]:
        """Answer requests; what is wrong with one of them is no matter of the others."""
        images: list[Any] = list(self.pool.map(self._read, uploads))
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            if isinstance(image, np.ndarray):
                groups.setdefault(image.shape, []).append(i)
        answers: dict[int, Future[Response]] = {}
        for shape, indices in groups.items():
            step = self.max_batch_size or self.segmenter.batch_size(*shape[:2])
            for batch in (indices[i : i + step] for i in range(0, len(indices), step)):
                confidences = any(uploads[i].wanted == "view" for i in batch)
                results = self.segmenter.segment(
                    [images[i] for i in batch], confidence_map=confidences
                )
                for i, result in zip(batch, results, strict=True):
                    answers[i] = self.pool.submit(WRITERS[uploads[i].wanted], result)
        return [answers[i].result() if i in answers else image for i, image in enumerate(images)]

    def _read(self, upload: Upload) -> np.ndarray | Response:
        suffix = Path(upload.name).suffix.lower()
        with TemporaryDirectory() as folder:
            path = Path(folder, "image" + (suffix if suffix in IMAGE_SUFFIXES else ".tif"))
            path.write_bytes(upload.content)
            height, width = self.segmenter.format.size(path) or (0, 0)
            if height * width > self.max_pixels:
                limit = f"the limit is {self.max_pixels:,} (max_pixels)"
                return refusal(413, f"the image has {height * width:,} pixels; {limit}")
            try:
                return self.segmenter.read(path)
            except InputError as error:
                return refusal(400, str(error).replace(str(path), upload.name))


_model: Model  # of this process


def load(cfg: DictConfig, device: str) -> dict[str, Any]:
    """Load the model, and return what is to be known about it; the process is its alone."""
    global _model
    if device == "cpu":
        hardware.reuse_memory()
        hardware.forget_shapes()
    Image.MAX_IMAGE_PIXELS = None  # the model has a limit of its own
    # Ctrl-C and `systemctl stop` reach all processes; the first one ends this one when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _model = Model(cfg, device)
    # Around all images, so that the weights are cast to another precision only once.
    ExitStack().enter_context(_model.segmenter.inference.autocast())
    return {
        **_model.segmenter.labels.drawn.to_dict(),
        "versions": {"seg_torch": __version__, "torch": torch.__version__},
        "formats": list(FORMATS) if _model.segmenter.format.is_rgb else ["TIFF"],
    }


def answer(uploads: list[Upload]) -> list[Response]:
    """Answer requests with the model that `load` has loaded."""
    return _model.answer(uploads)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# The answers, of one image each


def _png(result: Segmentation) -> Response:
    file = BytesIO()
    result.save_mask(file)
    return Response(file.getvalue(), media_type="image/png")


def _json(result: Segmentation) -> Response:
    if (length := _outline(result.mask)) > MAX_OUTLINE:
        reason = f"the outlines of the mask are {length:,} pixels long, too many for polygons"
        return refusal(422, f"{reason}: ask for format=png")
    height, width = result.mask.shape
    content = {"width": width, "height": height, "confidence": result.confidence}
    return JSONResponse(content | {"areas": result.areas(), "polygons": result.polygons()})


def _view(result: Segmentation) -> Response:
    """Return what the page shows of an image, and what it gives for download."""
    assert result.confidence_map is not None  # `Model.answer` has asked for it
    height, width = result.mask.shape
    factor = min(1, math.sqrt(VIEW_PIXELS / (height * width)), VIEW_SIDE / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    mask, confidences = Image.fromarray(result.mask), Image.fromarray(result.confidence_map)
    pixels = [m.resize(size, Image.Resampling.NEAREST).tobytes() for m in (mask, confidences)]
    image = BytesIO()
    shown = Image.fromarray(result.image).resize(size, Image.Resampling.LANCZOS)
    shown.save(image, "JPEG", quality=JPEG_QUALITY)
    counts = mask.histogram()  # pixels by class id, 255 for the unknown
    counts[255] -= 0 if result.missing is None else int(result.missing.sum())
    files = {"image": image.getvalue(), "pixels": gzip.compress(b"".join(pixels), 1)}
    outputs = ["mask"]
    if max(height, width) <= JPEG_LIMIT:
        outputs.append("overlay")
    if _outline(result.mask) <= MAX_OUTLINE:
        outputs.append("polygons")
    with TemporaryDirectory() as folder:
        result.save(folder, "image", outputs)
        for name in outputs:
            files[name] = output_path(folder, name, "image").read_bytes()
    content = {
        "size": [width, height],
        "view": size,
        "confidence": result.confidence,
        "counts": counts,
        "files": {name: base64.b64encode(file).decode() for name, file in files.items()},
    }
    return JSONResponse(content)


def _outline(mask: np.ndarray) -> int:
    """Return the length of the outlines of all regions, in pixels."""
    columns = np.count_nonzero(mask[:, 1:] != mask[:, :-1])
    return int(np.count_nonzero(mask[1:] != mask[:-1]) + columns)


WRITERS = {"png": _png, "json": _json, "view": _view}

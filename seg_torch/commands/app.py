"""seg-torch app: a web page on which images are dropped and looked at with their segmentation.

The server does what needs the network and writes files into a temporary folder. What the page does
with them is in app.html, app.css and app.js. The server keeps no results: a page has its own list
of them, so that several users at once see their own.
"""

from __future__ import annotations

import gzip
import html
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image

from seg_torch import hardware
from seg_torch.errors import InputError
from seg_torch.images.read import pixel_limit
from seg_torch.labels import IGNORE_INDEX, decode_segmap
from seg_torch.prediction.load import load_segmenter, model_name
from seg_torch.prediction.outputs import JPEG_QUALITY, output_path
from seg_torch.prediction.segmentation import Segmentation
from seg_torch.prediction.segmenter import Segmenter

log = logging.getLogger(__name__)

VIEW = 1600  # longest side of what is sent to the page; downloads have the size of the image
DOWNLOADS = ("mask", "overlay", "polygons")

Entry = dict[str, Any]  # what the page shows of one image


def app(cfg: DictConfig) -> None:
    """Serve the page until it is interrupted.

    Raises:
        InputError: The model cannot be loaded, it takes images that are several files, or the
            address or the port cannot be used.
    """
    try:
        socket.create_server((cfg.host, cfg.port or 0)).close()
    except (OSError, OverflowError, TypeError) as error:
        raise InputError(f"host={cfg.host} port={cfg.port}: {error}; use another one") from error
    segmenter = load_segmenter(cfg, torch.device(hardware.accelerator(cfg.trainer.accelerator)))
    if segmenter.format.files:
        raise InputError("app: this model takes several files an image; use seg-torch predict")
    # `kill` as Ctrl-C: the users' images are not left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with TemporaryDirectory(prefix="seg-torch-app-") as folder, pixel_limit(cfg.max_pixels):
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads, too
        page = _page(segmenter, model_name(cfg))
        try:
            _launch(page, cfg)
            log.info("%s (Ctrl-C ends it)", page.local_url)
            if cfg.host not in ("127.0.0.1", "localhost"):
                log.warning("host=%s: others can open the page, without a password", cfg.host)
            while True:
                time.sleep(1)  # Windows interrupts this, and no wait without an end
        finally:
            page.close(verbose=False)


def _launch(page: Any, cfg: DictConfig) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for name in ("no_proxy", "NO_PROXY"):  # Gradio calls its own server, which no proxy reaches
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,localhost")))
    page.launch(
        server_name=cfg.host,
        server_port=cfg.port,
        max_file_size=cfg.max_megabytes * 1_000_000,
        share=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )


def _page(segmenter: Segmenter, name: str) -> Any:
    import gradio as gr

    lock = threading.Lock()  # the network is called by one thread at a time

    def show(paths: list[str] | None, done: dict[str, Entry]) -> Iterator[tuple[Any, Any]]:
        """Yield the entries of the files, and again whenever there is another."""
        done = {path: done[path] for path in paths or [] if path in done}
        yield [*done.values()], done
        for path in paths or []:
            if path in done:
                continue
            try:
                with lock:
                    result = segmenter.predict(path, confidence_map=True)
            except InputError as error:
                message = html.escape(str(error).replace(path, Path(path).name))
                gr.Warning(message, duration=None)
                continue
            done[path] = _entry(result, Path(path).name)
            yield [*done.values()], done

    here = Path(__file__)
    parts = [here.with_suffix(s).read_text("utf-8") for s in (".html", ".css", ".js")]
    with gr.Blocks(title=f"seg-torch: {name}", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            f"<h2>Semantic segmentation</h2>{html.escape(name)}, {len(segmenter.labels)} classes"
        )
        files = gr.File(file_count="multiple", label="Images", height=140)
        done = gr.State({})
        viewer = gr.HTML([], html_template=parts[0], css_template=parts[1], js_on_load=parts[2])
        files.change(
            show,
            [files, done],
            [viewer, done],
            concurrency_limit=None,  # users wait for an image of another one, not for all of them
            show_progress_on=files,
            api_visibility="private",
        )
    return page


def _entry(result: Segmentation, name: str) -> Entry:
    """Write the files of one image into a new folder; returns what the page shows of it."""
    folder = Path(mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"]))
    stem = Path(name).stem
    result.save(folder, stem, DOWNLOADS)
    height, width = result.mask.shape
    factor = min(1, VIEW / max(height, width))
    view = max(1, round(width * factor)), max(1, round(height * factor))
    image = Image.fromarray(result.image).resize(view, Image.Resampling.LANCZOS)
    image.save(folder / "image.jpg", quality=JPEG_QUALITY)
    assert result.confidence_map is not None
    maps = (Image.fromarray(m) for m in (result.mask, result.confidence_map))
    content = b"".join(m.resize(view, Image.Resampling.NEAREST).tobytes() for m in maps)
    (folder / "pixels.gz").write_bytes(gzip.compress(content, 1))
    return {
        "name": name,
        "size": [width, height],
        "view": view,
        "confidence": result.confidence,
        "classes": _classes(result),
        "image": _url(folder / "image.jpg"),
        "pixels": _url(folder / "pixels.gz"),
        "downloads": {kind: _url(output_path(folder, kind, stem)) for kind in DOWNLOADS},
    }


def _classes(result: Segmentation) -> list[Entry]:
    """Return the classes that occur, the largest first, and the unknown pixels as one of them."""
    names = {**dict(enumerate(result.labels.names)), IGNORE_INDEX: "unknown"}
    counts = Image.fromarray(result.mask).histogram()
    classes = [
        {
            "id": i,
            "name": name,
            "colour": decode_segmap(np.full((1, 1), i), result.labels)[0, 0].tolist(),
            "share": counts[i] / result.mask.size,
        }
        for i, name in names.items()
        if counts[i]
    ]
    return sorted(classes, key=lambda c: -c["share"])


def _url(path: Path) -> str:
    return f"gradio_api/file={quote(path.as_posix())}"

"""Load test of `seg-torch serve` on this machine, against the Segmenter without a server.

    python benchmarks/serve.py checkpoint.ckpt photo.jpg [--clients 1 4 16] [--seconds 20]

Every client sends the image again as soon as it has its answer, a PNG of class ids. One table row
for each length of batches and number of clients: images per second, and the median, 95th and 99th
percentile of the time that a client waits.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np

from seg_torch import Segmenter, hardware
from seg_torch.images.read import read_image


def in_process(checkpoint: str, content: bytes, seconds: float) -> list[float]:
    """Decode, segment and encode as the server does, one image after the other."""
    hardware.reuse_memory()
    segmenter = Segmenter.load(checkpoint)
    waits: list[float] = []

    def once() -> float:
        start = time.perf_counter()
        segmenter.predict(read_image("image", content)).save_mask(BytesIO())
        return time.perf_counter() - start

    with segmenter.inference.autocast():
        once()
        while sum(waits) < seconds:
            waits.append(once())
    return waits


def client(url: str, content: bytes, seconds: float) -> list[float]:
    """Return how long each answer took."""
    waits: list[float] = []
    headers = {"Content-Type": "application/octet-stream"}
    with httpx.Client(timeout=300, trust_env=False) as session:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            session.post(f"{url}/predict", content=content, headers=headers).raise_for_status()
            waits.append(time.perf_counter() - start)
    return waits


def row(name: str, clients: int, waits: list[float], seconds: float) -> None:
    percentiles = " | ".join(f"{p * 1000:.0f}" for p in np.percentile(waits, (50, 95, 99)))
    print(f"| {name} | {clients} | {len(waits) / seconds:.1f} | {percentiles} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("image", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    content, seconds = arguments.image.read_bytes(), arguments.seconds

    print("| | clients | images/s | median, ms | 95 % | 99 % |\n|---|---|---|---|---|---|")
    waits = in_process(arguments.checkpoint, content, seconds)
    row("no server", 1, waits, sum(waits))
    for batch in arguments.batches:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = [f"checkpoint={arguments.checkpoint}", f"port={port}", "max_megabytes=1000"]
        command = [sys.executable, "-m", "seg_torch", "serve", f"max_batch_size={batch}"]
        process = subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(process, url)
            client(url, content, 1)  # the first ones are slower
            for clients in arguments.clients:
                start = time.perf_counter()
                with ThreadPoolExecutor(clients) as pool:
                    answers = pool.map(partial(client, url, content), [seconds] * clients)
                    waits = [wait for times in answers for wait in times]
                row(f"batches of up to {batch}", clients, waits, time.perf_counter() - start)
        finally:
            process.terminate()
            process.wait()


def wait_for(process: subprocess.Popen, url: str) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health", trust_env=False).text == "ok":
                return
        except httpx.TransportError:
            time.sleep(0.2)
    sys.exit("the server has ended")


if __name__ == "__main__":
    main()

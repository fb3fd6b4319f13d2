"""How images become batches, and how few of them are in memory."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from predictions import LABELS, Threshold

from seg_torch import Segmenter
from seg_torch.images.format import RGB
from seg_torch.models.network import Network
from seg_torch.prediction.pipeline import THREADS, Pipeline, plan_batches
from seg_torch.prediction.segmentation import Segmentation

TALL, WIDE = (48, 64), (56, 40)
SIZES = {"a": TALL, "b": WIDE, "trip/a": WIDE, "trip/b": TALL, "trip/x/c": WIDE, "z": WIDE}


def test_few_images_are_in_memory_at_a_time(tmp_path, monkeypatch):
    """Neither reading nor writing runs away from the network, in either direction."""
    alive, most = set(), 0

    def read(path):
        nonlocal most
        alive.add(path.name)
        most = max(most, len(alive))
        return np.zeros((8, 8, 3), np.uint8)

    def save(result, folder, name, outputs):
        time.sleep(0.002)
        alive.discard(name)

    out, notes = SimpleNamespace(folder=tmp_path, outputs=["mask"]), []
    out.note, out.files = notes.append, {str(i): tmp_path / str(i) for i in range(300)}
    for path in out.files.values():
        path.touch()
    monkeypatch.setattr(Segmentation, "save", save)
    segmenter = Segmenter(Network(Threshold(), (0, 0, 0), (1, 1, 1)), LABELS, device="cpu")
    monkeypatch.setattr(segmenter, "read", read)
    Pipeline({"model": segmenter}, out).run([[name] for name in out.files], progress=False)
    assert len(notes) == 300
    assert not alive
    assert most <= 5 * THREADS + 2


@pytest.mark.parametrize("outputs", [["mask"], ["probabilities"]])
def test_e63_few_bytes_are_in_memory_at_a_time(tmp_path, monkeypatch, outputs):
    """Of large images fewer than of small ones; one that is too large for the queue comes alone."""
    monkeypatch.setattr("seg_torch.prediction.pipeline.THREADS", 8)
    monkeypatch.setattr("seg_torch.prediction.pipeline.QUEUE_BYTES", 150_000)
    pixels, lock = {"small": 8 * 8, "large": 100 * 100, "huge": 300 * 300}, threading.Lock()
    alive, most = {}, dict.fromkeys(pixels, 0)

    def read(path):
        kind = path.name.split()[0]
        with lock:
            alive[path.name] = kind
            most[kind] = max(most[kind], [*alive.values()].count(kind))
        side = int(pixels[kind] ** 0.5)
        return np.zeros((side, side, 3), np.uint8)

    def save(result, folder, name, outputs):
        time.sleep(0.02)
        with lock:
            del alive[name]

    out, notes = SimpleNamespace(folder=tmp_path, outputs=outputs), []
    out.note = notes.append
    out.files = {f"{kind} {i}": tmp_path / f"{kind} {i}" for kind in pixels for i in range(40)}
    for path in out.files.values():
        side = int(pixels[path.name.split()[0]] ** 0.5)
        Image.new("L", (side, side)).save(path, "PNG")
    monkeypatch.setattr(Segmentation, "save", save)
    segmenter = Segmenter(Network(Threshold(), (0, 0, 0), (1, 1, 1)), LABELS, device="cpu")
    monkeypatch.setattr(segmenter, "read", read)
    Pipeline({"model": segmenter}, out).run([[name] for name in out.files], progress=False)
    assert len(notes) == len(out.files)
    assert not alive
    assert most["small"] > 16
    # Read: 70,000 bytes each, with what Pillow takes. Written: 40,000, or 80,000.
    assert most["large"] <= 2 + 3 + 2
    assert most["huge"] <= 1 + 1 + 2


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [
        (None, [["a", "trip/b"], ["b", "trip/a"], ["trip/x/c", "z"]]),
        (4, [["a", "trip/b"], ["b", "trip/a", "trip/x/c", "z"]]),
        (1, [[name] for name in SIZES]),
    ],
)
def test_d30_batches_are_planned_by_the_sizes_of_the_images(tmp_path, batch_size, expected):
    class OnAGpu:
        device = torch.device("cuda")
        format = RGB

        def batch_size(self, height, width):
            asked.add((height, width))
            return 2

    asked, files = set(), {}
    for i, (name, (height, width)) in enumerate(SIZES.items()):
        files[name] = tmp_path / f"{i}.png"
        Image.new("RGB", (width, height)).save(files[name])
    assert plan_batches(files, {"model": OnAGpu()}, batch_size) == expected
    assert asked == (set() if batch_size else {TALL, WIDE})

"""Models for tests of prediction, and what is read of its outputs."""

import csv
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from seg_torch.checkpoints import checkpoint
from seg_torch.labels import Labels
from seg_torch.models import unet
from seg_torch.models.network import Network
from seg_torch.prediction.folder import JOURNAL

LABELS = Labels(("dark", "bright"), np.array([[10, 20, 30], [200, 100, 50]]))
FOUR = Labels(tuple(f"class {i}" for i in range(4)))


class Threshold(nn.Module):
    """Bright pixels are class 1: a pointwise model whose masks are known."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        brightness = x.mean(1, keepdim=True) - 0.5
        return torch.cat([-brightness, brightness], 1)


def random_checkpoint(path: Path, seed: int = 0, labels: Labels = FOUR) -> Path:
    """A small U-Net with random weights whose masks have every class."""
    torch.manual_seed(seed)
    config = {
        "_target_": "seg_torch.models.unet",
        "encoder": "resnet10t",
        "weights": None,
        "decoder_channels": [8, 8, 8, 8, 8],
    }
    settings = {key: value for key, value in config.items() if key != "_target_"}
    network = Network(unet(len(labels), **settings)).eval()
    with torch.no_grad():  # as it is made, one class is ahead everywhere
        logits = network(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))["out"]
        network.model.classifier.bias -= logits.mean((0, 2, 3))
    description = checkpoint.describe(network, labels, config, {}, None)
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({checkpoint.KEY: description, "state_dict": state}, path)
    return path


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but not its notes; predictions.csv without the seconds."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and JOURNAL not in path.parts
    }
    if "predictions.csv" in found:
        rows = list(csv.reader(found["predictions.csv"].decode().splitlines()))
        seconds = rows[0].index("seconds")
        found["predictions.csv"] = repr([r[:seconds] + r[seconds + 1 :] for r in rows]).encode()
    return found


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def bomb(path: Path) -> None:
    """A PNG of a few bytes that claims to have 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")))

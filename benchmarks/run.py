"""Every comparison with a peer, in one run: a table of ratios, a JSON file and a chart.

    python benchmarks/run.py DATA/camvid [--only NAME ...] [--device cpu|cuda] [--rounds 5]

Each comparison first checks that both sides compute the same thing. Then each side works in a fresh
process of its own, with the settings that its user has, and they take turns; a ratio is the time of
theirs by the time of ours, so above 1 ours is faster. The peers come with
`pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch
import training
from comparison import Case, Comparison, compare
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from seg_torch import Labels, Segmenter, decode_segmap, hardware
from seg_torch.data.module import SegmentationDataModule
from seg_torch.data.transforms import augment
from seg_torch.datasets import camvid
from seg_torch.labels import VOC_PALETTE
from seg_torch.losses import (
    CrossEntropyLoss,
    DiceLoss,
    WeightedSum,
    upsampled,
    upsampled_loss,
)
from seg_torch.metrics import ConfusionMatrix
from seg_torch.models.network import Network
from seg_torch.upsample import upsample

PEERS = (
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "segmentation_models_pytorch",
    "monai",
)

TILED = (2000, 3000)  # height and width of the image that goes through in tiles


def palette(_: Path, device: str) -> Case:
    """decode_segmap against the usual tutorial's pass over the image for each class and channel."""
    colours = VOC_PALETTE[:21]
    mask = np.random.default_rng(0).integers(0, 21, (1024, 2048)).astype(np.uint8)

    def loop() -> np.ndarray:
        channels = [np.zeros_like(mask) for _ in range(3)]
        for i, colour in enumerate(colours):
            for channel, value in zip(channels, colour, strict=True):
                channel[mask == i] = value
        return np.stack(channels, axis=-1)

    assert np.array_equal(loop(), decode_segmap(mask, colours))
    return Case(
        "decode_segmap, 1024 x 2048, 21 classes",
        lambda: decode_segmap(mask, colours),
        {"loop over classes": loop},
    )


def scores(_: Path, device: str) -> Case:
    """Return the confusion matrix against torchmetrics' scores of the same kind."""
    from torchmetrics.classification import MulticlassJaccardIndex

    generator = torch.Generator().manual_seed(0)
    shape = (8, 520, 520)
    prediction = torch.randint(21, shape, generator=generator).to(device)
    target = torch.randint(21, shape, generator=generator, dtype=torch.uint8).to(device)
    ours = ConfusionMatrix(21).to(device)
    theirs = MulticlassJaccardIndex(21, ignore_index=255).to(device)
    long_target = target.long()
    ours.update(prediction, target)
    theirs.update(prediction, long_target)
    assert torch.equal(ours.compute(), theirs.confmat)
    return Case(
        "scores, 8 x 520 x 520, 21 classes",
        lambda: ours.update(prediction, target),
        {"torchmetrics MulticlassJaccardIndex": lambda: theirs.update(prediction, long_target)},
    )


def dice(_: Path, device: str) -> Case:
    """Return the Dice loss with its gradient against MONAI's."""
    from monai.losses import DiceLoss as MonaiDice

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 21, 352, 480, generator=generator).to(device).requires_grad_()
    target = torch.randint(21, (4, 352, 480), generator=generator, dtype=torch.uint8).to(device)
    ours = DiceLoss()
    monai = MonaiDice(softmax=True, to_onehot_y=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)
    assert torch.allclose(ours(logits, target), monai(logits, target[:, None]), atol=1e-5)
    return Case(
        "Dice loss, 4 x 352 x 480, 21 classes",
        lambda: ours(logits, target).backward(),
        {"MONAI DiceLoss": lambda: monai(logits, target[:, None]).backward()},
    )


def many_classes(dice: bool, _: Path, device: str) -> Case:
    """Losses of 150 classes, band by band, against all logits at label size at once."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 150, 128, 128, generator=generator).to(device).requires_grad_()
    target = torch.randint(150, (8, 512, 512), generator=generator, dtype=torch.uint8).to(device)
    size = target.shape[-2:]
    cross_entropy = CrossEntropyLoss()
    loss = WeightedSum([cross_entropy, DiceLoss()], [1, 1]) if dice else cross_entropy

    def plain() -> Tensor:
        at_size = upsample(logits, size)
        value = F.cross_entropy(at_size, target.long(), ignore_index=255)
        return value + DiceLoss()(at_size, target) if dice else value

    upsampled.LOSS_BYTES = 1 << 60  # chunks, however much memory there is
    in_chunks = partial(upsampled_loss, loss, logits, target)
    torch.testing.assert_close(in_chunks(), plain(), rtol=1e-5, atol=1e-5)
    return Case(
        f"cross-entropy{' + Dice' if dice else ''}, 8 x 512 x 512, 150 classes",
        gradient(in_chunks),
        {"F.interpolate + F.cross_entropy": gradient(plain)},
    )


def gradient(loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Return the loss with its gradient."""
    return lambda: loss().backward()


def loading(root: Path, device: str) -> Case:
    """Training samples a second and core, against torchvision's reference preset with jitter."""
    crop = (352, 480)
    data = SegmentationDataModule(camvid, str(root), augment=augment(crop))
    ours = data.train_dataloader().dataset
    cached = SegmentationDataModule(camvid, str(root), augment=augment(crop), cache=True)
    in_memory = cached.train_dataloader().dataset
    theirs = training.PresetSamples(root, crop, jitter=True)
    image, mask = camvid(root, "train")[0]
    pixels, labels = theirs.read(0)
    assert torch.equal(image, v2.functional.pil_to_tensor(pixels))
    assert torch.equal(mask[mask != 255], v2.functional.pil_to_tensor(labels)[0][mask != 255])
    indices = range(40)
    torch.set_num_threads(1)  # as in a worker process
    return Case(
        "loading, CamVid, scale + crop + flip + jitter",
        lambda: [ours[0, i] for i in indices],
        {"torchvision's preset + ColorJitter": lambda: [theirs[i] for i in indices]},
        {"ours, in memory": lambda: [in_memory[0, i] for i in indices]},
    )


def tiles(_: Path, device: str) -> Case:
    """Return a large image in tiles against MONAI's sliding window with the same tiles."""
    from monai.inferers import SlidingWindowInferer

    network = nn.Conv2d(3, 21, 9, padding=4).to(device)
    image = torch.randint(0, 256, (3, *TILED), dtype=torch.uint8)
    labels = Labels(tuple(f"class {i}" for i in range(21)))
    segmenter = Segmenter(
        Network(network), labels, tile=512, device=torch.device(device), precision="32-true"
    )
    # The same overlap: 64 of 512 pixels.
    window = SlidingWindowInferer((512, 512), sw_batch_size=1, overlap=1 / 8, mode="gaussian")
    network_of_images = Network(network).to(device)

    @torch.inference_mode()
    def theirs() -> Tensor:
        pixels = image[None].to(device).float()
        logits: Any = window(pixels, lambda x: network_of_images(x)["out"])
        return logits.argmax(1)[0].to(torch.uint8).cpu()

    def ours() -> Tensor:
        return torch.from_numpy(segmenter.predict(tv_tensors.Image(image)).mask)

    # Nothing but the edges of tiles, at which the network sees zeros, may differ.
    same = (ours() == theirs()).double().mean().item()
    assert same > 0.98, same
    return Case(
        f"{TILED[0]:,} x {TILED[1]:,} pixels in tiles, 21 classes",
        ours,
        {"MONAI SlidingWindowInferer": theirs},
        note=f"{100 * same:.1f} % of pixels the same",
    )


COMPARISONS: dict[str, Callable[[Path, str], Case]] = {
    "palette": palette,
    "scores": scores,
    "dice": dice,
    "many_classes": partial(many_classes, False),
    "many_classes_dice": partial(many_classes, True),
    "loading": loading,
    "tiles": tiles,
    "training": training.unet,
    **{name: partial(training.unet_step, name) for name in training.ENCODERS},
    "deeplabv3": partial(training.torchvision_step, "deeplabv3"),
    "fcn": partial(training.torchvision_step, "fcn"),
}


def save(results: list[Comparison], device: str, output: Path) -> None:
    """Write the JSON file and the chart."""
    import matplotlib.pyplot as plt

    name = torch.cuda.get_device_name() if device == "cuda" else hardware_name()
    about = {
        "date": date.today().isoformat(),
        "hardware": name,
        "python": platform.python_version(),
        "versions": {p.name: p.version for p in distributions() if p.name in PEERS},
    }
    output.mkdir(parents=True, exist_ok=True)
    content = {**about, "comparisons": [asdict(r) | {"ratios": r.ratios} for r in results]}
    (output / "benchmarks.json").write_text(json.dumps(content, indent=2))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.45 * len(results)), layout="constrained")
    labels = [f"{r.name}\nagainst {r.peer}" for r in results]
    axes.barh(labels, [statistics.median(r.ratios) for r in results], color="#4878a8")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel(f"time of theirs / time of ours ({name})")
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(output / "benchmarks.png", dpi=150)


def hardware_name() -> str:
    """Of the CPU, with the number of cores that may be used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {hardware.available_cpus()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder of CamVid")
    parser.add_argument("--only", nargs="*", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    # One process: the comparison, and the way to measure.
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    root, device = arguments.root, arguments.device
    if arguments.measure:
        name, way = arguments.measure
        print(json.dumps(COMPARISONS[name](root, device).measure(way, device)))
        return
    results: list[Comparison] = []
    for name in arguments.only:
        start = time.perf_counter()
        command = [__file__, str(root), "--device", device, "--measure", name]
        found = list(compare(COMPARISONS[name](root, device), command, arguments.rounds))
        print(f"{name}: took {time.perf_counter() - start:.0f} s")
        Console(width=180).print(table(found))
        results += found
        save(results, device, arguments.output)  # lest an interrupted run leave nothing


def table(results: list[Comparison]) -> Table:
    """Return a row for each comparison."""
    rows = Table("comparison", "peer", "ours, s", "theirs, s", "ratio", "from - to", "GB", "note")
    for result in results:
        ratios = sorted(result.ratios)
        rows.add_row(
            result.name,
            result.peer,
            *(f"{statistics.median(s):.3g}" for s in (result.ours, result.theirs)),
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f} - {ratios[-1]:.2f}",
            " / ".join(f"{gb:.2f}" for gb in result.memory),
            result.note,
        )
    return rows


if __name__ == "__main__":
    main()

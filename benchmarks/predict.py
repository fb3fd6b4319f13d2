"""What prediction costs, as ratios; each part takes two to six minutes on two cores.

    python benchmarks/predict.py DATA/clothing-co-parsing [folder] [sizes] [deeplabv3] [large]

* folder: a folder of images through predict.py against the bare network on tensors in memory
* sizes: a folder of images that all have different sizes against one of equal sizes
* deeplabv3: DeepLabv3-ResNet101 on 520 x 520 against the plain torchvision loop in float32
* large: the memory that an image of 12,000 x 9,000 pixels takes
"""

import logging
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hydra
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_resnet101

from seg_torch import Labels, Segmenter, hardware
from seg_torch.checkpoints import checkpoint
from seg_torch.commands.predict import predict
from seg_torch.datasets import clothing
from seg_torch.datasets.published.voc import VOC_LABELS
from seg_torch.files import CONFIG_FOLDER
from seg_torch.images.read import pixel_limit, read_image
from seg_torch.images.resize import resize_image, resize_mask
from seg_torch.models import deeplabv3 as our_deeplabv3
from seg_torch.models import unet
from seg_torch.models.network import IMAGENET_MEAN, IMAGENET_STD, Network
from seg_torch.prediction.inference import upsample

PHOTOS = 200
ROUNDS = 3
STEPS = 60
UNET = {"_target_": "seg_torch.models.unet", "encoder": "resnet18", "weights": None}
GIGABYTE = 1 << 30


def normalised(photo: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> float [3, H, W]."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((torch.from_numpy(photo) / 255 - mean) / std).permute(2, 0, 1).contiguous()


def photos_and_masks(root: Path) -> tuple[list[np.ndarray], Tensor]:
    """Six photos uint8 [520, 520, 3]; their masks int64 [6, 520, 520] of 21 classes.

    The classes are the 20 most frequent ones, and the others together.
    """
    dataset = clothing(root, "val")
    samples = [dataset[i] for i in range(6)]
    photos = [resize_image(image, (520, 520)).permute(1, 2, 0).numpy() for image, _ in samples]
    masks = torch.stack([resize_mask(mask, (520, 520)) for _, mask in samples]).long()
    rank = masks.flatten().bincount(minlength=256).argsort(descending=True).argsort()
    return photos, rank[masks].clamp(max=20)


def train_a_little(model: nn.Module, photos: list[np.ndarray], masks: Tensor) -> None:
    """Trains on a few photos, so that the masks are like those of a network that is used."""
    images = torch.stack([normalised(photo) for photo in photos])
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4)
    for _ in range(STEPS):
        top, left = torch.randint(0, 260, (2,)).tolist()
        crop = (..., slice(top, top + 260), slice(left, left + 260))
        x = images[crop].contiguous(memory_format=torch.channels_last)
        with autocast():
            logits = upsample(model(x)["out"], masks[crop].shape[-2:])
        loss = nn.functional.cross_entropy(logits.float(), masks[crop])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().to(memory_format=torch.contiguous_format)


def autocast() -> torch.autocast:
    """Return the precision that predict.py chooses here."""
    return hardware.autocast(hardware.resolve_precision("auto", "cpu"), "cpu")


def fastest(function: Callable[[], object], times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def bare_network(paths: list[Path], weights: Path) -> list[float]:
    """When the network and argmax alone began, and were done with each of the photos in memory."""
    hardware.reuse_memory()  # as predict.py does
    network = Segmenter.load(weights, device="cpu").network
    tensors = [torch.from_numpy(read_image(path)).permute(2, 0, 1)[None] for path in paths]
    times = [time.time()]
    with torch.inference_mode(), autocast():
        for tensor in tensors:
            # In float32, which argmax takes a third of the time of bfloat16 for.
            upsample(network(tensor)["out"], tensor.shape[-2:]).float().argmax(1)
            times.append(time.time())
    return times


def predict_folder(photos: Path, weights: Path, output: Path) -> list[float]:
    """When predict.py began, and was done with each of the photos."""
    overrides = {
        "input": photos,
        "output": output,
        "checkpoint": weights,
        "resume": "false",
        "trainer.accelerator": "cpu",
    }
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        cfg = hydra.compose("predict", [f"{k}={v}" for k, v in overrides.items()])
    start = time.time()
    predict(cfg)
    overlays = (output / "overlay").glob("*.jpg")  # what is written last of each photo
    return [start, *sorted(path.stat().st_mtime for path in overlays)]


def median_rate(times: list[list[float]], block: int = 20) -> float:
    """Photos a second in the median block of so many photos: bursts of other work do not count."""
    return block / np.median([np.diff(t[1::block]) for t in times])


def save_unet(path: Path, num_classes: int, data: Path | None = None) -> None:
    """Write the checkpoint of a U-Net, trained a little where there is data."""
    torch.manual_seed(0)
    labels = Labels(tuple(f"class {i}" for i in range(num_classes)))
    model = unet(num_classes, "resnet18", None)
    if data is not None:
        train_a_little(model, *photos_and_masks(data))
    network = Network(model)
    description = checkpoint.describe(network, labels, UNET, {}, None)
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({checkpoint.KEY: description, "state_dict": state}, path)


def folder_of_photos(root: Path, scratch: Path) -> None:
    """Photos a second of predict.py, and of the network and argmax alone."""
    paths = sorted((root / "photos").glob("*.jpg"))[:PHOTOS]
    photos, weights = scratch / "photos", scratch / "unet.ckpt"
    photos.mkdir()
    for path in paths:
        (photos / path.name).symlink_to(path.resolve())
    save_unet(weights, 59, root)

    # In processes of their own, and in turn, since the speed of a machine drifts.
    context = multiprocessing.get_context("spawn")
    bare, whole = [], []
    with context.Pool(1) as bare_process, context.Pool(1) as whole_process:
        for _ in range(ROUNDS):
            bare.append(bare_process.apply(bare_network, (paths, weights)))
            whole.append(whole_process.apply(predict_folder, (photos, weights, scratch / "out")))
    ratio = sum(t[-1] - t[0] for t in bare) / sum(t[-1] - t[0] for t in whole)
    medians = median_rate(whole), median_rate(bare)
    print(
        f"folder: {ROUNDS} x {len(paths)} photos; predict.py {medians[0]:.2f} photos a second, the "
        f"bare network and argmax {medians[1]:.2f} (medians of blocks of 20): ratio "
        f"{medians[0] / medians[1]:.2f} (at least 0.9); ratio of all seconds, starting included: "
        f"{ratio:.2f}",
        flush=True,
    )


def folder_of_sizes(root: Path, scratch: Path) -> None:
    """Photos a second where all have different sizes, and where they have one, of equal area."""
    paths = sorted((root / "photos").glob("*.jpg"))[: PHOTOS // 2]
    weights = scratch / "sizes.ckpt"
    save_unet(weights, 59)
    for index, path in enumerate(paths):
        photo = Image.open(path).convert("RGB")
        for name, width in (("equal", 672), ("mixed", 504 + 4 * index)):
            (scratch / name).mkdir(exist_ok=True)
            photo.resize((width, round(672**2 / width))).save(scratch / name / path.name)
    context = multiprocessing.get_context("spawn")
    times: dict[str, list[list[float]]] = {"equal": [], "mixed": []}
    with context.Pool(1) as one, context.Pool(1) as another:
        for _ in range(ROUNDS):
            for (name, found), process in zip(times.items(), (one, another), strict=True):
                output = scratch / f"{name}_out"
                found.append(process.apply(predict_folder, (scratch / name, weights, output)))
    equal, mixed = map(median_rate, times.values())
    # In the first round each size is new to the network's library.
    first = np.ptp(times["equal"][0][1:]) / np.ptp(times["mixed"][0][1:])
    print(
        f"sizes: {ROUNDS} x {len(paths)} photos; all different {mixed:.2f} photos a second, all "
        f"equal {equal:.2f}: ratio {mixed / equal:.2f} (at least 0.9); in the first round "
        f"{first:.2f}",
        flush=True,
    )


def deeplabv3(root: Path, scratch: Path) -> None:
    """Seconds per image of Segmenter and of the loop in torchvision's documentation."""
    photos, masks = photos_and_masks(root)
    published = Path(torch.hub.get_dir(), "checkpoints/deeplabv3_resnet101_coco-586e9e4e.pth")
    torch.manual_seed(0)
    model = deeplabv3_resnet101(
        weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    ).eval()

    def plain(photo: np.ndarray) -> Tensor:
        with torch.inference_mode():
            return model(normalised(photo)[None])["out"].argmax(1)[0]

    if published.exists():
        model.load_state_dict(torch.load(published, weights_only=True))
    else:
        train_a_little(model, photos, masks)

    plain_masks = [plain(photo).numpy() for photo in photos]
    plain_seconds = fastest(lambda: plain(photos[0]))
    ours = our_deeplabv3(len(VOC_LABELS), "resnet101", None)
    ours.load_state_dict(model.state_dict())
    segmenter = Segmenter(Network(ours), VOC_LABELS, device="cpu")
    predicted = [segmenter.predict(photo).mask for photo in photos]
    seconds = fastest(lambda: segmenter.predict(photos[0]))
    same = np.mean([(a == b).mean() for a, b in zip(predicted, plain_masks, strict=True)])
    weights = (
        "published weights"
        if published.exists()
        else f"weights after {STEPS} steps on these photos"
    )
    print(
        f"DeepLabv3-ResNet101: {seconds:.2f} s per image, {plain_seconds:.2f} s in the plain "
        f"float32 loop: ratio {plain_seconds / seconds:.2f} (at least 1.8); {weights}: "
        f"{100 * same:.2f} % of the pixels the same (at least 99.5)",
        flush=True,
    )


def memory(key: str) -> float:
    """`VmRSS` (now) or `VmHWM` (so far at most) of this process, in GB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024 / GIGABYTE


def load_large(path: Path, weights: Path) -> float:
    """Return the memory of a process that holds the model and the image, and nothing else."""
    segmenter, pixels = Segmenter.load(weights, device="cpu"), read_image(path)
    hardware.return_memory()
    used = memory("VmRSS")
    del segmenter, pixels
    return used


def predict_large(path: Path, weights: Path, output: Path) -> float:
    """Return the peak memory of predict.py with one image."""
    predict_folder(path, weights, output)
    return memory("VmHWM")


class Pointwise(nn.Module):
    """Logits of each pixel from its colour alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(21, 3, 1, 1, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight)


def complete(path: Path) -> bool:
    """Whether the mask of a pointwise model is, strip by strip, that of the strips alone."""
    with pixel_limit(None):
        photo = read_image(path)
    mask = Segmenter(Network(Pointwise()), VOC_LABELS, device="cpu").predict(photo).mask
    alone = Segmenter(Network(Pointwise()), VOC_LABELS, device="cpu", tile=None)
    strips = range(0, len(photo), 100)
    return all(
        np.array_equal(alone.predict(photo[top : top + 100]).mask, mask[top : top + 100])
        for top in strips
    )


def large_image(root: Path, scratch: Path) -> None:
    """Peak memory of predicting and saving 12,000 x 9,000 pixels, each in a process of its own."""
    path, weights = scratch / "large.jpg", scratch / "large.ckpt"
    save_unet(weights, 21)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).resize((12000, 9000), Image.Resampling.BICUBIC).save(path)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        loaded = pool.apply(load_large, (path, weights))
        start = time.perf_counter()
        peak = pool.apply(predict_large, (path, weights, scratch / "large"))
        seconds = time.perf_counter() - start
        whole = pool.apply(complete, (path,))
    print(
        f"12,000 x 9,000 pixels, 21 classes: predict.py takes at most {peak:.2f} GB; model and "
        f"image alone are {loaded:.2f} GB: {peak - loaded:.2f} GB above (at most 0.5), "
        f"{seconds:.0f} s; mask {'complete' if whole else 'NOT COMPLETE'}",
        flush=True,
    )


PARTS = {
    "large": large_image,
    "deeplabv3": deeplabv3,
    "folder": folder_of_photos,
    "sizes": folder_of_sizes,
}

if __name__ == "__main__":
    logging.getLogger("lightning").setLevel(logging.WARNING)
    for part in sys.argv[2:] or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](Path(sys.argv[1]), Path(folder))

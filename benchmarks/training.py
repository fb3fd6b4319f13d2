"""Training, loader included, against the peers' usual ways; part of benchmarks/run.py."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from comparison import Comparison, in_turn
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models import segmentation
from torchvision.transforms import v2

import seg_torch.models
from seg_torch import hardware
from seg_torch.cli import CONFIG_FOLDER
from seg_torch.commands.train import train
from seg_torch.datasets import camvid
from seg_torch.losses import CrossEntropyLoss
from seg_torch.models.network import IMAGENET_MEAN, IMAGENET_STD, Network
from seg_torch.upsample import upsampled_loss

CROP, BATCH, CLASSES = (352, 480), 4, 11
STEPS, WARM_UP = 10, 4


class PresetSamples(Dataset):
    """CamVid's training samples as torchvision's reference script prepares them."""

    def __init__(self, root: Path, crop: tuple[int, int], jitter: bool) -> None:
        self.pairs = camvid(root, "train").pairs
        self.transform = v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomResize(min_size=crop[0] // 2, max_size=crop[0] * 2),
                v2.RandomHorizontalFlip(0.5),
                v2.RandomCrop(crop, pad_if_needed=True, fill={tv_tensors.Mask: 255, "others": 0}),
                *([v2.ColorJitter(0.25, 0.25, 0.25, 0.05)] if jitter else []),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        pair = self.pairs[index]
        return Image.open(pair.image).convert("RGB"), Image.open(pair.mask)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.read(index)
        ids = tv_tensors.Mask(v2.functional.pil_to_tensor(mask))
        pixels, ids = self.transform(tv_tensors.Image(v2.functional.pil_to_tensor(image)), ids)
        return pixels, ids[0].long().masked_fill_(ids[0] >= CLASSES, 255)


class StepTimes(lightning.Callback):
    """When each training step ended."""

    latest: StepTimes

    def __init__(self) -> None:
        self.times: list[float] = []
        StepTimes.latest = self

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def per_image(self) -> float:
        """Seconds; the median of the steps, without the first ones."""
        steps = torch.tensor(self.times).double().diff().tolist()[WARM_UP:]
        return statistics.median(steps) / BATCH


class Peer(lightning.LightningModule):
    """The usual module around segmentation_models_pytorch."""

    def __init__(self, encoder: str) -> None:
        super().__init__()
        import segmentation_models_pytorch as smp

        self.model = smp.Unet(encoder, encoder_weights=None, classes=CLASSES)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, masks = batch
        loss = nn.functional.cross_entropy(self.model(images), masks, ignore_index=255)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def unet(root: Path, device: str, rounds: int) -> Iterator[Comparison]:
    """`train.py model=unet` on CamVid against SMP and Lightning, and against the bare step."""
    for ours, theirs in (
        ("resnet18", "resnet18"),
        ("mobilenetv2_100", "mobilenet_v2"),
        ("tf_efficientnet_lite0", "timm-tf_efficientnet_lite0"),
    ):
        if ours == "resnet18":
            same_network()
        step = bare_step(ours, device)
        yield from in_turn(
            f"training, U-Net {ours}, {BATCH} x {CROP[0]} x {CROP[1]}, a photo",
            partial(ours_per_image, root, ours, device),
            {
                "SMP + Lightning, defaults": partial(peer, root, theirs, device, "32-true"),
                "SMP + Lightning, bf16-mixed": partial(peer, root, theirs, device, "bf16-mixed"),
                "our step without loader": lambda step=step: per_image(step),
            },
            rounds,
        )


def same_network() -> None:
    """With equal weights both U-Nets give equal logits."""
    import segmentation_models_pytorch as smp

    ours = seg_torch.models.unet(CLASSES, "resnet18", weights=None).eval()
    theirs = smp.Unet("resnet18", encoder_weights=None, classes=CLASSES).eval()
    tensors = zip(ours.state_dict(), theirs.state_dict().values(), strict=True)
    ours.load_state_dict(dict(tensors))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)["out"], theirs(x), atol=1e-5, rtol=1e-5)


def ours_per_image(root: Path, encoder: str, device: str) -> float:
    """Seconds of `train.py`, by the callback that it is given."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = {
            "data": "camvid",
            "data.root": root,
            "data.batch_size": BATCH,
            "data.augment.crop": f"[{CROP[0]},{CROP[1]}]",
            "model.encoder": encoder,
            "model.weights": "null",
            "trainer.accelerator": device,
            "trainer.max_steps": STEPS,
            "trainer.limit_val_batches": 1,
            "trainer.limit_test_batches": 1,
            "trainer.num_sanity_val_steps": 0,
            "output_dir": f"{folder}/run",
            "+callbacks.times._target_": f"{__name__}.StepTimes",
        }
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            train(hydra.compose("train", [f"{key}={value}" for key, value in overrides.items()]))
    return StepTimes.latest.per_image()


def peer(root: Path, encoder: str, device: str, precision: str) -> float:
    """Seconds of SMP and Lightning."""
    times = StepTimes()
    loader = DataLoader(
        PresetSamples(root, CROP, jitter=True),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=hardware.available_cpus(),
        pin_memory=device == "cuda",
    )
    trainer = lightning.Trainer(
        accelerator=device,
        precision=precision,  # type: ignore[arg-type]
        max_steps=STEPS,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Peer(encoder), loader)
    return times.per_image()


def per_image(step: Callable[[], object], size: int = BATCH) -> float:
    """Seconds of a step without a loader."""
    times = []
    for _ in range(STEPS - WARM_UP):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / size


def bare_step(encoder: str, device: str) -> Callable[[], object]:
    """A step of our network in our precision on a batch that is in memory."""
    network = Network(seg_torch.models.unet(CLASSES, encoder, weights=None)).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=True)
    images = torch.randint(0, 256, (BATCH, 3, *CROP), dtype=torch.uint8, device=device)
    target = torch.randint(CLASSES, (BATCH, *CROP), dtype=torch.uint8, device=device)
    precision = hardware.resolve_precision("auto", device)
    loss = CrossEntropyLoss()

    def step() -> None:
        with hardware.autocast(precision, device):
            value = upsampled_loss(loss, network(images)["out"], target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def torchvision_models(root: Path, device: str, rounds: int) -> Iterator[Comparison]:
    """FCN and DeepLabv3 with ResNet-50 on tensors against the loop of torchvision's script."""
    size, classes = ((4, 360, 480) if device == "cpu" else (16, 480, 480)), 21
    for name in ("deeplabv3", "fcn"):
        theirs = getattr(segmentation, f"{name}_resnet50")(
            weights=None, weights_backbone=None, num_classes=classes, aux_loss=True
        )
        ours = getattr(seg_torch.models, name)(classes, "resnet50", None)
        ours.load_state_dict(theirs.state_dict())
        images = torch.randint(0, 256, (size[0], 3, *size[1:]), dtype=torch.uint8)
        network = Network(ours).eval()
        normalised = ((images / 255).sub(network.mean) / network.std).to(device)
        target = torch.randint(classes, size).to(device)
        with torch.no_grad():
            expected = theirs.eval()(normalised[:1].cpu())["out"]
            found = nn.functional.interpolate(
                network(images[:1])["out"], size[1:], mode="bilinear", align_corners=False
            )
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        step = _step(network.train().to(device), images.to(device), target, device)
        yield from in_turn(
            f"training step, {name}-ResNet50, {size[0]} x {size[1]} x {size[2]}, a photo",
            lambda step=step: per_image(step, size[0]),
            {
                f"torchvision's loop, {kind}": partial(
                    per_image, _reference_step(theirs, normalised, target, device, dtype), size[0]
                )
                for kind, dtype in (("float32", None), ("bf16", torch.bfloat16))
            },
            rounds,
        )


def _step(network: Network, images: Tensor, target: Tensor, device: str) -> Callable[[], object]:
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, fused=True)
    precision = hardware.resolve_precision("auto", device)
    loss, labels = CrossEntropyLoss(), target.to(torch.uint8)

    def step() -> None:
        with hardware.autocast(precision, device):
            outputs = network(images)
            value = upsampled_loss(loss, outputs["out"], labels)
            value = value + 0.5 * upsampled_loss(loss, outputs["aux"], labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def _reference_step(
    model: nn.Module, images: Tensor, target: Tensor, device: str, dtype: torch.dtype | None
) -> Callable[[], object]:
    model = model.train().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype is not None):
            losses = {
                key: nn.functional.cross_entropy(logits, target, ignore_index=255)
                for key, logits in model(images).items()
            }
            value = losses["out"] + 0.5 * losses["aux"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step

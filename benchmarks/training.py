"""Training against the peers' usual ways; part of benchmarks/run.py."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from comparison import Case, seconds_of
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models import segmentation
from torchvision.transforms import v2

import seg_torch.models
from seg_torch import hardware
from seg_torch.commands.train import train
from seg_torch.datasets import camvid
from seg_torch.files import CONFIG_FOLDER
from seg_torch.losses import CrossEntropyLoss, upsampled_loss
from seg_torch.models.network import IMAGENET_MEAN, IMAGENET_STD, Network
from seg_torch.upsample import upsample

CROP, CLASSES = (352, 480), 11
# Of training with the loader: the encoder, images in a batch, and steps; the last ones are timed.
TRAINING = {"cpu": ("resnet18", 4, 10), "cuda": ("resnet34", 16, 120)}
UNET_SIZE = {"cpu": (8, 176, 240), "cuda": (16, 352, 480)}  # of a batch on tensors: N, H, W
TORCHVISION_SIZE = {"cpu": (4, 360, 480), "cuda": (16, 480, 480)}
STEPS, WARM_UP = 10, 4  # on tensors
DTYPES = {"float32": None, "bf16": torch.bfloat16}

# Our names and SMP's, with which both build the same network.
ENCODERS = {
    "resnet18": "resnet18",
    "mobilenetv2_100": "tu-mobilenetv2_100",
    "tf_efficientnet_lite0": "tu-tf_efficientnet_lite0",
}


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
    """When each training step ended. A GPU is waited for where the time is taken, and not between.

    Args:
        steps: How many there are; the first two fifths are to warm up.
    """

    latest: StepTimes

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.times: list[float] = []
        StepTimes.latest = self

    def on_train_batch_end(self, *_: Any) -> None:
        if len(self.times) + 1 in (self.warm_up, self.steps) and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    @property
    def warm_up(self) -> int:
        return self.steps * 2 // 5

    def per_image(self, batch_size: int) -> float:
        """Seconds, with all that happens between the steps, such as the end of an epoch."""
        seconds = self.times[self.steps - 1] - self.times[self.warm_up - 1]
        return seconds / (self.steps - self.warm_up) / batch_size


def smp_unet(encoder: str) -> nn.Module:
    """SMP is imported here, since other rows run without it."""
    import segmentation_models_pytorch as smp

    return smp.Unet(encoder, encoder_weights=None, classes=CLASSES)


class Peer(lightning.LightningModule):
    """The usual module around segmentation_models_pytorch."""

    def __init__(self, encoder: str) -> None:
        super().__init__()
        self.model = smp_unet(encoder)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, masks = batch
        loss = nn.functional.cross_entropy(self.model(images), masks, ignore_index=255)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def unet(root: Path, device: str) -> Case:
    """`train.py model=unet` on CamVid, loader included, against SMP and Lightning."""
    encoder, batch_size, _ = TRAINING[device]
    same_unet(encoder, encoder)
    size = (batch_size, *CROP)
    return Case(
        f"training, loader included, U-Net {encoder}, {_text(size)}, an image",
        partial(ours_per_image, root, device),
        {
            "SMP + Lightning, defaults": partial(peer, root, device, "32-true"),
            "SMP + Lightning, bf16-mixed": partial(peer, root, device, "bf16-mixed"),
        },
        {"our step without loader": partial(our_unet_step, encoder, size, device)},
    )


def unet_step(encoder: str, _: Path, device: str) -> Case:
    """Return a training step of a U-Net on tensors against SMP's in a plain loop."""
    size, theirs = UNET_SIZE[device], ENCODERS[encoder]
    same_unet(encoder, theirs)
    return Case(
        f"training step, U-Net {encoder}, {_text(size)}, an image",
        partial(our_unet_step, encoder, size, device),
        {
            f"SMP, {kind}": partial(smp_step, theirs, size, device, dtype)
            for kind, dtype in DTYPES.items()
        },
    )


def torchvision_step(name: str, _: Path, device: str) -> Case:
    """FCN or DeepLabv3 with ResNet-50 on tensors against the loop of torchvision's script."""
    size = TORCHVISION_SIZE[device]
    ours = getattr(seg_torch.models, name)(21, "resnet50", None)
    theirs = getattr(segmentation, f"{name}_resnet50")(
        weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    )
    ours.load_state_dict(theirs.state_dict())
    same_logits(ours, theirs)
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    return Case(
        f"training step, {name}-ResNet50, {_text(size)}, an image",
        partial(our_step, ours, sgd, size, 21, device),
        {
            f"torchvision's loop, {kind}": partial(plain_step, theirs, sgd, size, 21, device, dtype)
            for kind, dtype in DTYPES.items()
        },
    )


def _text(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def same_unet(ours: str, theirs: str) -> None:
    """With equal weights both U-Nets give equal logits."""
    network = seg_torch.models.unet(CLASSES, ours, weights=None)
    peer = smp_unet(theirs)
    network.load_state_dict(
        dict(zip(network.state_dict(), peer.state_dict().values(), strict=True))
    )
    same_logits(network, peer)


def same_logits(ours: nn.Module, theirs: nn.Module) -> None:
    images, _ = batch((1, 64, 96), 2)
    with torch.no_grad():
        expected = theirs.eval()(normalised(images))
        network = Network(ours, IMAGENET_MEAN, IMAGENET_STD).eval()
        found = upsample(network(images)["out"], images.shape[-2:])
    expected = expected if isinstance(expected, Tensor) else expected["out"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def ours_per_image(root: Path, device: str) -> float:
    """Seconds of `train.py`, by the callback that it is given."""
    encoder, batch_size, steps = TRAINING[device]
    with tempfile.TemporaryDirectory() as folder:
        overrides = {
            "data": "camvid",
            "data.root": root,
            "data.batch_size": batch_size,
            "data.augment.crop": f"[{CROP[0]},{CROP[1]}]",
            "model.encoder": encoder,
            "model.weights": "null",
            "trainer.accelerator": device,
            "trainer.devices": 1,
            "trainer.max_steps": steps,
            "trainer.limit_val_batches": 1,
            "trainer.limit_test_batches": 1,
            "trainer.num_sanity_val_steps": 0,
            "output_dir": f"{folder}/run",
            "+callbacks.times._target_": f"{__name__}.StepTimes",
            "+callbacks.times.steps": steps,
        }
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            train(hydra.compose("train", [f"{key}={value}" for key, value in overrides.items()]))
    return StepTimes.latest.per_image(batch_size)


def peer(root: Path, device: str, precision: str) -> float:
    """Seconds of SMP and Lightning."""
    encoder, batch_size, steps = TRAINING[device]
    times = StepTimes(steps)
    loader = DataLoader(
        PresetSamples(root, CROP, jitter=True),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=hardware.available_cpus(),
        pin_memory=device == "cuda",
    )
    trainer = lightning.Trainer(
        accelerator=device,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=steps,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Peer(encoder), loader)
    return times.per_image(batch_size)


def our_unet_step(encoder: str, size: Sequence[int], device: str) -> float:
    model = seg_torch.models.unet(CLASSES, encoder, weights=None)
    return our_step(model, partial(torch.optim.AdamW, lr=1e-3), size, CLASSES, device)


def our_step(
    model: nn.Module,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    size: Sequence[int],
    classes: int,
    device: str,
) -> float:
    """Seconds an image of a step as `train.py` does it, on a batch that is in memory."""
    network = Network(model).train().to(device)
    optimizer = make_optimizer(network.parameters(), fused=True)
    images, target = (tensor.to(device) for tensor in batch(size, classes))
    precision = hardware.resolve_precision("auto", device)
    loss = CrossEntropyLoss()

    def step() -> None:
        with hardware.autocast(precision, device):
            outputs = network(images)
            losses = {key: upsampled_loss(loss, out, target) for key, out in outputs.items()}
        update(optimizer, losses)

    return per_image(step, size)


def smp_step(encoder: str, size: Sequence[int], device: str, dtype: torch.dtype | None) -> float:
    model = smp_unet(encoder)
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    return plain_step(model, optimizer, size, CLASSES, device, dtype)


def plain_step(
    model: nn.Module,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    size: Sequence[int],
    classes: int,
    device: str,
    dtype: torch.dtype | None,
) -> float:
    """Seconds an image of a step as in torchvision's reference script (train.py)."""
    torch.backends.cudnn.benchmark = True
    model = model.train().to(device)
    optimizer = make_optimizer(model.parameters())
    images, target = batch(size, classes)
    x, labels = normalised(images).to(device), target.long().to(device)

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype is not None):
            outputs = model(x)
            outputs = {"out": outputs} if isinstance(outputs, Tensor) else outputs
            losses = {
                key: nn.functional.cross_entropy(logits, labels, ignore_index=255)
                for key, logits in outputs.items()
            }
        update(optimizer, losses)

    return per_image(step, size)


def update(optimizer: torch.optim.Optimizer, losses: Mapping[str, Tensor]) -> None:
    loss = losses["out"] + 0.5 * losses["aux"] if "aux" in losses else losses["out"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def per_image(step: Callable[[], object], size: Sequence[int]) -> float:
    """Seconds of a step by the number of its images, after some to warm up."""
    for _ in range(WARM_UP):
        step()
    return seconds_of(step, STEPS - WARM_UP) / size[0]


def batch(size: Sequence[int], classes: int) -> tuple[Tensor, Tensor]:
    """Return random uint8 images [N, 3, H, W] and labels [N, H, W] for a size (N, H, W)."""
    generator = torch.Generator().manual_seed(0)
    images = (size[0], 3, *size[1:])
    return (
        torch.randint(256, images, dtype=torch.uint8, generator=generator),
        torch.randint(classes, tuple(size), dtype=torch.uint8, generator=generator),
    )


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255 - mean) / std

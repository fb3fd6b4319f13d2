"""What each finding about data, machine and time calls for: settings, values and reasons.

A rule is a function of the configuration so far, which has the user's own settings and what the
rules before have decided, and of the `Situation`. The numbers in them are from runs on two CPU
cores, docs/planning.md says which.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf

from seg_torch.errors import InputError
from seg_torch.images.resize import seen_size
from seg_torch.models.weights import encoder_of_file, is_at_hand
from seg_torch.planning.budget import as_time
from seg_torch.planning.fingerprint import Fingerprint


class Decision(NamedTuple):
    """A setting, its value, and why."""

    setting: str
    value: Any
    because: str


@dataclass(frozen=True)
class Situation:
    """What rules go by.

    Attributes:
        data: What is in the dataset.
        device: `cuda`, `mps` or `cpu`.
        processes: Those that train.
        seconds: That are left for training; `None`: no budget.
        pixel_rate: Pixels of training images per second and process.
        memory: Bytes that kept images may take.
    """

    data: Fingerprint
    device: str
    processes: int
    seconds: float | None
    pixel_rate: float
    memory: float


Rule = Callable[[DictConfig, Situation], Iterator[Decision]]

UNET = "seg_torch.models.unet"
# Mean width of the classes as the network sees them, in pixels: what they need, what is enough.
LEAST_WIDTH, GOOD_WIDTH = 4, 12
# Training images, each time augmented anew, from which on more help less than more pixels of each.
ENOUGH = 4500
# Training images from which on a random scale is worth it.
MANY = 10_000
DESERVED = 1000  # training images for each root of the number of different ones
# Pixels of a training image at most: on a CPU a step takes long, and a GPU holds several.
LARGEST = {"cpu": 512 * 512, "cuda": 768 * 768, "mps": 512 * 512}
SMALLEST_CROP = 128
STEP = 32  # to multiples of which sizes are rounded: the stride of most encoders
# Encoders by the device, the best one first.
ENCODERS = {
    "cpu": ("tf_efficientnet_lite0", "tf_efficientnet_lite2"),
    "gpu": ("resnet50", "resnet34"),
}
# AdamW's rate for a batch of 8, by the model.
RATES = {
    "seg_torch.models.unet": 2e-3,
    "seg_torch.models.unet_transposed": 2e-3,
    "seg_torch.models.smp": 1e-3,
    "seg_torch.models.hrnet": 1e-3,
    "seg_torch.models.deeplabv3": 5e-4,
    "seg_torch.models.fcn": 5e-4,
    "seg_torch.models.lraspp": 1e-3,
    "seg_torch.models.vit": 2e-4,
    "seg_torch.models.transformers": 1e-4,
}


def is_given(setting: str, given: Sequence[str]) -> bool:
    """Return whether the user has set a setting, something in it, or the section that it is in."""
    inside = any(key.startswith(f"{setting}.") for key in given)
    return (
        setting in given or inside or any("." in k and setting.startswith(f"{k}.") for k in given)
    )


def encoder(cfg: DictConfig, now: Situation) -> Iterator[Decision]:
    """Choose an encoder by the device, whose weights can be had."""
    model = cfg.model
    if model.get("_target_") != UNET or model.weights is None:
        return
    weights = model.weights
    wanted = ENCODERS["cpu" if now.device == "cpu" else "gpu"]
    if weights != "imagenet":
        name = encoder_of_file(weights, [*ENCODERS["cpu"], *ENCODERS["gpu"]])
        if name is not None:
            yield Decision("model.encoder", name, f"{Path(weights).name} holds its weights")
        return
    why = "small enough for a CPU" if now.device == "cpu" else "a GPU has time for it"
    name = next((name for name in wanted if is_at_hand(name)), wanted[0])
    at_hand = "are here already" if is_at_hand(name) else "will be downloaded"
    yield Decision("model.encoder", name, f"{why}; its weights {at_hand}")


def size(cfg: DictConfig, now: Situation) -> Iterator[Decision]:
    """Choose at which size the network sees images."""
    data, height, width = now.data, *now.data.size
    own = any(is_given(f"data.{key}", cfg.given) for key in ("resize", "max_side"))
    cropped = is_given("data.augment.crop", cfg.given) and _crop(cfg)
    scale, detail = _scale(now)
    if scale >= 0.9 or own or cropped:  # a crop of the user's is at the scale of the images
        return
    why = f"classes are {detail:.0f} pixels wide on average, {detail * scale:.0f} then"
    if data.one_shape:
        sides = [_rounded(side * scale) for side in (height, width)]
        yield Decision("data.resize", sides, f"of {height} x {width}: {why}")
    else:
        longest = _rounded(max(height, width) * scale)
        yield Decision("data.max_side", longest, f"the images have several shapes; {why}")


def crop(cfg: DictConfig, now: Situation) -> Iterator[Decision]:
    """Choose whether training sees images whole."""
    if cfg.data.get("augment") is None:
        return
    data, (height, width), pixels = now.data, _seen(cfg, now), _pixels(now)
    if height * width > 1.2 * pixels:
        factor = math.sqrt(pixels / (height * width))
        window = [_rounded(side * factor) for side in (height, width)]
        why = "the budget has time for" if now.seconds else "is enough"
        why = f"of {height} x {width}: what {why}"
    elif data.one_size or cfg.data.get("resize"):
        yield Decision("data.augment.crop", None, "whole images: they are small enough")
        return
    else:
        longer = max(height, width)
        sides = (height, width) if data.one_shape else (longer, longer)
        window = [_rounded(side) for side in sides]
        why = "images of several sizes: what sticks out is cut, what is missing padded"
    yield Decision("data.augment.crop", window, why)
    images = _images(now, window[0] * window[1])
    if images < MANY:
        yield Decision("data.augment.scale", None, f"in {images:.0f} images it teaches little")
    else:
        yield Decision("data.augment.scale", [0.75, 1.5], f"{images:.0f} images are many")


def _seen(cfg: DictConfig, now: Situation) -> tuple[int, int]:
    """Return height and width at which the network sees the median image."""
    resize = cfg.data.get("resize") or cfg.data.get("max_side")
    return seen_size(resize, *now.data.size)


def _crop(cfg: DictConfig) -> Any:
    return OmegaConf.select(cfg, "data.augment.crop")


def _images(now: Situation, pixels: int) -> float:
    """Return how many training images of so many pixels there will be, each time augmented."""
    if now.seconds is None:
        return DESERVED * math.sqrt(now.data.images["train"])
    return 0.8 * now.seconds * now.pixel_rate * now.processes / pixels


def _pixels(now: Situation) -> float:
    """Return how many pixels a training image may have."""
    pixels = float(LARGEST.get(now.device, LARGEST["cpu"]))
    if now.seconds is None:
        return pixels
    affordable = 0.8 * now.seconds * now.pixel_rate * now.processes / ENOUGH
    return min(pixels, max(affordable, SMALLEST_CROP**2))


def _scale(now: Situation) -> tuple[float, float]:
    """Return by which factor images are reduced, and how wide classes are on average."""
    data, area = now.data, float(np.prod(now.data.size))
    found = data.thickness[(data.pixels > 0) & np.isfinite(data.thickness)]
    detail = float(1 / np.mean(1 / found)) if len(found) else math.inf
    least, good = (min(1.0, wide / detail) for wide in (LEAST_WIDTH, GOOD_WIDTH))
    whole = math.sqrt(_pixels(now) / area)
    scale = min(max(whole, least), good) if data.upright else good
    if now.seconds is not None:  # validation and test see whole images, three times as fast
        images = sum(count for split, count in data.images.items() if split != "train")
        pixels = 0.15 * now.seconds * 3 * now.pixel_rate * now.processes / max(1, images)
        scale = min(scale, max(least / 2, math.sqrt(pixels / area)))
    return scale, detail


def _rounded(side: float) -> int:
    return max(STEP, STEP * round(side / STEP))


def batch_size(cfg: DictConfig, now: Situation) -> Iterator[Decision]:
    """Choose the images of a step."""
    per_step = 8 if now.device == "cpu" else 16
    each = max(1, per_step // now.processes)
    more = f", on {now.processes} processes" if now.processes > 1 else ""
    yield Decision("data.batch_size", each, f"{each * now.processes} images a step{more}")


def learning_rate(cfg: DictConfig, now: Situation) -> Iterator[Decision]:
    """Choose the rate by model and batch: with the square root of the batch, as for Adam."""
    optimizer = str(cfg.optimizer.get("_target_"))
    batch = cfg.data.batch_size * now.processes * cfg.trainer.accumulate_grad_batches
    if not optimizer.startswith("torch.optim.Adam"):
        return
    rate = RATES.get(str(cfg.model.get("_target_")), 5e-4) * math.sqrt(batch / 8)
    yield Decision("optimizer.lr", float(f"{rate:.2g}"), f"for {batch} images a step")


def loss(cfg: DictConfig, now: Situation) -> Iterator[Decision]:
    """Choose the loss by the rarest class."""
    name, share = now.data.rarest
    if share < 0.1:
        yield Decision("loss", "ce_dice", f"{name} has {100 * share:.2g} % of the pixels")
    else:
        yield Decision("loss", "ce", f"no class is rare: {name} has {100 * share:.0f} %")


def augmentation(cfg: DictConfig, now: Situation) -> Iterator[Decision]:
    """Choose how training images are changed."""
    if cfg.data.get("augment") is None:
        return
    if not now.data.upright:
        yield Decision("data.augment.turn", True, "upper and lower halves are alike")
    if now.data.grey:
        yield Decision("data.augment.hue", 0.0, "the images are grey")


def sampling(cfg: DictConfig, now: Situation) -> Iterator[Decision]:
    """Choose how images and crops are drawn: crops that seldom show a class aim at it."""
    (name, share), window = now.data.rarest, _crop(cfg)
    if window and share < 0.01 and 2 * np.prod(window) < np.prod(_seen(cfg, now)):
        why = f"{name} has {100 * share:.2g} % of the pixels, and crops show less than half of them"
        yield Decision("data.sample", "rare", why)


def cache(cfg: DictConfig, now: Situation) -> Iterator[Decision]:
    """Choose whether decoded images are kept."""
    resize, longest = cfg.data.get("resize"), cfg.data.get("max_side")
    sizes = np.tile(resize, (len(now.data.sizes), 1)) if resize else now.data.sizes
    areas = sizes.prod(axis=1).astype(float)
    if longest:
        areas *= np.minimum(1, longest / sizes.max(axis=1)) ** 2
    images = now.data.images
    needed = areas.mean() * (now.data.channels + 1) * (images["train"] + images["val"])
    if needed < now.memory:
        yield Decision("data.cache", "ram", f"the images take {_as_size(needed)} decoded")


def _as_size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size > 1e9 else f"{max(1, size / 1e6):.0f} MB"


def fitting_batch(cfg: DictConfig, now: Situation, fitting: int) -> Iterator[Decision]:
    """Choose the largest batch that fits, and as many of them for a step as make 8 images."""
    if fitting < cfg.data.batch_size:
        yield Decision("data.batch_size", fitting, "more do not fit into the device's memory")
        several = max(1, 8 // (fitting * now.processes))
        why = f"for {several * fitting * now.processes} images a step"
        yield Decision("trainer.accumulate_grad_batches", several, why)


FOR_THE_SPEED: Sequence[Rule] = (encoder, loss)
BY_THE_SPEED: Sequence[Rule] = (
    size,
    crop,
    batch_size,
    learning_rate,
    augmentation,
    sampling,
    cache,
)

VALIDATIONS = 20  # at most
EMA_STEPS = 5000


def length(
    cfg: DictConfig, now: Situation, times: tuple[float, float, float]
) -> Iterator[Decision]:
    """Choose how many optimizer steps there are, and how often their result is validated.

    Args:
        cfg: All other settings.
        now: The situation.
        times: Seconds of an optimizer step, of a validation with what else an epoch takes once,
            and of the start and the test at the end together.

    Raises:
        InputError: Not one step fits into the budget.
    """
    step, validation, rest = times
    images, accumulate = now.data.images["train"], cfg.trainer.accumulate_grad_batches
    batch = cfg.data.batch_size * now.processes * accumulate
    if now.seconds is None:
        steps = math.ceil(DESERVED * math.sqrt(images) / batch)
        why = f"{images} images are worth some {DESERVED * math.sqrt(images):.0f} augmented ones"
        total = steps * step
    else:
        total = now.seconds - rest
        why = f"of {step:.2g} s, which the budget leaves time for"
        steps = int((total - validation) / step)
        if steps < 1:
            raise InputError(
                f"budget={cfg.budget}: start, validation and test take {as_time(rest + validation)}"
                f" and a training step {step:.2g} s; give at least "
                f"{as_time(rest + validation + 50 * step)}"
            )
    wanted = int(0.1 * total / max(validation, 1e-9))
    epochs = max(1, min(VALIDATIONS, wanted, steps // 5))
    if is_given("trainer.max_epochs", cfg.given) and cfg.trainer.max_epochs > 0:
        epochs = cfg.trainer.max_epochs
    if now.seconds is not None:
        steps = max(epochs, int((total - epochs * validation) / step))
    each = max(1, steps // epochs)
    yield Decision("trainer.max_epochs", epochs, f"{epochs * each} steps {why}")
    share = epochs * validation / max(total + epochs * validation, 1e-9)
    often = f"batches between validations, which take {100 * share:.0f} % of the time"
    yield Decision("trainer.limit_train_batches", each * accumulate, often)
    for setting, plain in (("check_val_every_n_epoch", 1), ("val_check_interval", None)):
        if cfg.trainer.get(setting) != plain:
            yield Decision(f"trainer.{setting}", plain, "an epoch is what lies between two")
    if cfg.trainer.max_steps > 0:
        yield Decision("trainer.max_steps", -1, "the epochs end the run")
    repeat = math.ceil(each * batch / images)
    if repeat != cfg.data.repeat:
        yield Decision("data.repeat", repeat, f"an epoch takes {each * batch} of {images} images")
    if cfg.recipe and epochs * each >= EMA_STEPS:
        yield Decision("ema", 0.999, f"{epochs * each} steps are enough for an average")

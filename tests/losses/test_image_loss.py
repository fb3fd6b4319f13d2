"""The validation loss: that of each image as a whole, however its logits come."""

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from losses_for_tests import COUNTS, LOSSES, NUM_CLASSES
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from seg_torch import upsample
from seg_torch.labels import Labels
from seg_torch.losses import images as image_losses
from seg_torch.models.network import Network
from seg_torch.prediction.inference import Inference, InferenceSettings
from seg_torch.training.task import SegmentationTask

# Each loss of one image in NumPy and float64, from its formula: p [C, H, W], t [H, W] with 255.
Formula = Callable[[np.ndarray, np.ndarray], float]


def of_label(p: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability and class of the labelled pixels, each [n]."""
    return np.take_along_axis(p, np.where(t == 255, 0, t)[None], 0)[0][t != 255], t[t != 255]


def cross_entropy(
    weights: np.ndarray | None = None, gamma: float = 0, smoothing: float = 0
) -> Formula:
    def loss(p: np.ndarray, t: np.ndarray) -> float:
        own, classes = of_label(p, t)
        spread = -np.log(p[:, t != 255]).mean(0)
        each = (1 - own) ** gamma * -np.log(own) * (1 - smoothing) + smoothing * spread
        factor = np.ones(NUM_CLASSES) if weights is None else weights
        return float((each * factor[classes]).sum() / factor[classes].sum())

    return loss


def of_rarity(t: np.ndarray) -> np.ndarray:
    counts = np.bincount(t[t != 255], minlength=NUM_CLASSES)
    return (counts.sum() - counts) / counts.sum()


def by_rarity(gamma: float = 0) -> Formula:
    def loss(p: np.ndarray, t: np.ndarray) -> float:
        own, classes = of_label(p, t)
        return float((of_rarity(t)[classes] * (1 - own) ** gamma * -np.log(own)).mean())

    return loss


def tversky(alpha: float, beta: float, smooth: float, gamma: float = 1) -> Formula:
    def loss(p: np.ndarray, t: np.ndarray) -> float:
        values = []
        for class_id in np.unique(t[t != 255]):
            own, truth = p[class_id][t != 255], t[t != 255] == class_id
            right, false, missed = own[truth].sum(), own[~truth].sum(), (1 - own[truth]).sum()
            index = (right + smooth) / (right + alpha * false + beta * missed + smooth)
            values.append((1 - index) ** (1 / gamma))
        return float(np.mean(values))

    return loss


def weighted_dice(p: np.ndarray, t: np.ndarray) -> float:
    own, classes = of_label(p, t)
    weights = of_rarity(t)[classes]
    return float(1 - (2 * (weights * own).sum() + 1) / (2 * weights.sum() + 1))


def lovasz(p: np.ndarray, t: np.ndarray) -> float:
    """Errors in falling order, each times what the Jaccard loss gains by its pixel."""
    values = []
    for class_id in np.unique(t[t != 255]):
        truth = t[t != 255] == class_id
        errors = np.abs(truth - p[class_id][t != 255])
        order = np.argsort(-errors, kind="stable")
        missed, false = np.cumsum(truth[order]), np.cumsum(~truth[order])
        jaccard = 1 - (truth.sum() - missed) / (truth.sum() + false)
        values.append((errors[order] * np.diff(jaccard, prepend=0)).sum())
    return float(np.mean(values))


def hardest(p: np.ndarray, t: np.ndarray) -> float:
    """Threshold 0.001, and at least half of the pixels."""
    own = np.sort(of_label(p, t)[0])
    kept = max((own < 1e-3).sum(), int(np.ceil(len(own) / 2)))
    return float(-np.log(own[:kept]).mean())


def boundary(p: np.ndarray, t: np.ndarray) -> float:
    total, present = 0.0, np.unique(t[t != 255])
    for class_id in present if len(present) > 1 else ():
        inside = t == class_id
        outside = (t != class_id) & (t != 255)
        to_class, to_other = distance_transform_edt(~inside), distance_transform_edt(~outside)
        phi = np.where(inside, 1 - to_other, to_class)
        total += (p[class_id] * phi)[t != 255].sum()
    return total / ((t != 255).sum() * NUM_CLASSES)


def weighted(*terms: tuple[float, Formula]) -> Formula:
    return lambda p, t: sum(weight * formula(p, t) for weight, formula in terms)


BY_DATASET = np.array([625 / 3 / count if count else 0 for count in COUNTS.tolist()])
FORMULAS: dict[str, Formula] = {
    "ce": cross_entropy(),
    "ce_list": cross_entropy(np.array([0.5, 2.0, 1.0, 3.0])),
    "ce_dataset": cross_entropy(BY_DATASET),
    "ce_image": by_rarity(),
    "dice": tversky(0.5, 0.5, 0.5),
    "dice_image": weighted_dice,
    "ce_dice": weighted((1.0, cross_entropy()), (0.5, tversky(0.5, 0.5, 0.5))),
    "ce_smoothed": cross_entropy(smoothing=0.1),
    "focal": cross_entropy(gamma=2),
    "focal_half": cross_entropy(gamma=0.5),
    "focal_image": by_rarity(gamma=2),
    "tversky": tversky(0.3, 0.7, 1),
    "focal_tversky": tversky(0.3, 0.7, 1, 4 / 3),
    "lovasz": lovasz,
    "ohem": hardest,
    "boundary": boundary,
    "ohem_lovasz_dice": weighted((1.0, hardest), (2.0, lovasz), (0.1, tversky(0.5, 0.5, 0.5))),
}


class Strided(nn.Module):
    """Each pixel by itself; with a stride the logits are smaller than the labels."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, NUM_CLASSES, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def validation_loss(name: str, tile: int | None, stride: int, groups: list) -> Tensor | None:
    """What is logged as val/loss after a validation on these groups of images."""
    network = Network(Strided(stride)).eval()
    labels = Labels(tuple("abcd"))
    task = SegmentationTask(network, labels, LOSSES[name](), torch.optim.SGD).eval()
    settings = InferenceSettings(tile=tile, precision="32-true")
    task.inference = Inference(network, len(labels), settings=settings)
    with torch.no_grad():
        for index, group in enumerate(groups):
            task.validation_step([group], index)
        return task.validation_loss.compute()


@pytest.fixture
def groups() -> list:
    """Two images of one size, one of another, and one without a labelled pixel."""
    generator = torch.Generator().manual_seed(0)

    def group(number: int, height: int, width: int) -> tuple[Tensor, Tensor, list[int]]:
        shape = (number, 3, height, width)
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        coarse = torch.randint(NUM_CLASSES, (number, 1, 9, 7), generator=generator).float()
        masks = nn.functional.interpolate(coarse, (height, width))[:, 0].byte()
        masks[:, :11] = 255
        return images, masks, list(range(number))

    alike, other, unlabelled = group(2, 100, 72), group(1, 64, 150), group(1, 80, 80)
    other[1][:, :, 64:] = 2  # one class alone in some of the tiles
    unlabelled[1].fill_(255)
    return [alike, other, unlabelled]


def expected(name: str, stride: int, groups: list) -> float:
    """The mean over the images with labels, computed image by image from the whole."""
    model, values = Network(Strided(stride)).eval(), []
    for images, masks, _ in groups[:-1]:
        with torch.no_grad():
            small = model(images)["out"].double()
        logits = nn.functional.interpolate(small, masks.shape[-2:], mode="bilinear")
        for p, t in zip(logits.softmax(1).numpy(), masks.long().numpy(), strict=True):
            values.append(FORMULAS[name](p, t))
    return float(np.mean(values))


@pytest.mark.parametrize("name", LOSSES)
def test_e03_e04_the_validation_loss_is_that_of_whole_images(name, groups, monkeypatch):
    """Whole, in tiles, in chunks of rows: the formula in NumPy, without unlabelled images."""
    for tile, stride, chunks in ((None, 1, False), (64, 1, False), (None, 4, True)):
        monkeypatch.setattr(upsample, "WHOLE_IMAGE", 1000 if chunks else 1 << 26)
        monkeypatch.setattr(upsample, "CPU_CHUNK", 20 * 72 * NUM_CLASSES)
        found = validation_loss(name, tile, stride, groups)
        reference = expected(name, stride, groups)
        assert found.item() == pytest.approx(reference, rel=2e-5), (tile, stride)


def test_e04_images_without_labels_alone_have_no_validation_loss(groups):
    assert validation_loss("ce", None, 1, groups[-1:]) is None


def test_e04_a_loss_that_needs_the_whole_of_an_image_that_does_not_fit_says_so(
    groups, monkeypatch, caplog
):
    """The other images count; a loss that adds up over the tiles needs no more memory."""
    caplog.set_level(logging.WARNING)
    image_losses._warn.cache_clear()
    needed = NUM_CLASSES * 100 * 72 * image_losses.LOSS_BYTES
    monkeypatch.setattr(image_losses, "total_memory", lambda device: 2 * needed)
    found = validation_loss("lovasz", 64, 1, groups)
    assert found.item() == pytest.approx(expected("lovasz", 1, [groups[0], groups[-1]]), rel=2e-5)
    [record] = caplog.records
    assert record.getMessage().startswith("val/loss leaves out images of 64 x 150 pixels: this ")
    found = validation_loss("dice", 64, 1, groups)
    assert found.item() == pytest.approx(expected("dice", 1, groups), rel=2e-5)

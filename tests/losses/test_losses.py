import inspect
import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import scipy.ndimage
import torch
from sklearn.metrics import jaccard_score
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from seg_torch import labels, losses
from seg_torch.errors import InputError
from seg_torch.losses import (
    BoundaryLoss,
    CrossEntropyLoss,
    DiceLoss,
    FocalLoss,
    LovaszSoftmaxLoss,
    OhemCrossEntropyLoss,
    TverskyLoss,
    WeightedSum,
)

NUM_CLASSES = 4
COUNTS = torch.tensor([500, 0, 100, 25])  # class 1 does not occur


def dataset_weighted() -> CrossEntropyLoss:
    loss = CrossEntropyLoss(weights="dataset")
    loss.set_pixel_counts(COUNTS)
    return loss


LOSSES = {
    "ce": CrossEntropyLoss,
    "ce_list": lambda: CrossEntropyLoss(weights=[0.5, 2.0, 1.0, 3.0]),
    "ce_dataset": dataset_weighted,
    "ce_image": lambda: CrossEntropyLoss(weights="image"),
    "dice": DiceLoss,
    "dice_image": lambda: DiceLoss(weights="image"),
    "ce_dice": lambda: WeightedSum([CrossEntropyLoss(), DiceLoss()], [1.0, 0.5]),
    "ce_smoothed": lambda: CrossEntropyLoss(label_smoothing=0.1),
    "focal": FocalLoss,
    "focal_half": lambda: FocalLoss(gamma=0.5),  # whose power has an infinite slope at 0
    "focal_image": lambda: FocalLoss(weights="image"),
    "tversky": TverskyLoss,
    "focal_tversky": lambda: TverskyLoss(gamma=4 / 3),
    "lovasz": LovaszSoftmaxLoss,
    "ohem": lambda: OhemCrossEntropyLoss(threshold=1e-3, min_kept=0.5),
    "boundary": BoundaryLoss,
    "ohem_lovasz_dice": lambda: WeightedSum(
        [LOSSES["ohem"](), LovaszSoftmaxLoss(), DiceLoss()], [1.0, 2.0, 0.1]
    ),
}


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> nn.Module:
    return LOSSES[request.param]()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, NUM_CLASSES, 9, 7, generator=generator)
    target = torch.randint(NUM_CLASSES, (2, 9, 7), generator=generator, dtype=torch.uint8)
    target[0, :3] = 255
    target[1, 4, 2:] = 255
    return logits, target


def value_and_gradient(loss: nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits, target)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


@pytest.mark.promise(3)
def test_ignored_logits_change_no_loss_and_no_gradient(loss, batch):
    logits, target = batch
    ignored = (target == 255).unsqueeze(1).expand_as(logits)
    changed = torch.where(ignored, 1e4 * torch.randn_like(logits), logits)
    value, gradient = value_and_gradient(loss, logits, target)
    changed_value, changed_gradient = value_and_gradient(loss, changed, target)
    assert value == changed_value
    assert torch.equal(gradient, changed_gradient)
    assert torch.all(gradient[ignored] == 0)
    assert torch.any(gradient[~ignored] != 0)


@pytest.mark.promise(3)
def test_an_overflow_at_an_ignored_pixel_leaves_no_trace(loss, batch):
    logits, target = batch
    logits = logits.half()
    value, gradient = value_and_gradient(loss, logits, target)
    logits[0, 1, 0, 0] = math.inf
    overflown, its_gradient = value_and_gradient(loss, logits, target)
    assert overflown == value
    assert torch.equal(its_gradient, gradient)


@pytest.mark.promise(9)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_ignored_is_a_finite_zero_with_zero_gradient(loss, dtype):
    logits = (1e4 * torch.randn(2, NUM_CLASSES, 8, 8)).to(dtype)
    target = torch.full((2, 8, 8), 255, dtype=torch.uint8)
    value, gradient = value_and_gradient(loss, logits, target)
    assert value == 0
    assert torch.all(gradient == 0)


@pytest.mark.promise(9)
def test_one_fully_ignored_image_leaves_the_other_finite(loss, batch):
    logits, target = batch
    target[0] = 255
    value, gradient = value_and_gradient(loss, logits, target)
    assert value.isfinite()
    assert value != 0
    assert gradient.isfinite().all()


@pytest.mark.promise(10)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_the_float32_loss_at_512x512(loss, dtype):
    logits = (20 * torch.randn(1, NUM_CLASSES, 512, 512)).to(dtype)
    target = torch.randint(NUM_CLASSES, (1, 512, 512), dtype=torch.uint8)
    half, gradient = value_and_gradient(loss, logits, target)
    assert half.dtype == torch.float32
    assert torch.equal(half, loss(logits.float(), target))
    assert gradient.isfinite().all()


def test_autocast_does_not_change_the_loss(loss, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = loss(*batch)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, loss(*batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_format_changes_no_loss_and_no_gradient(loss, batch, dtype):
    logits, target = batch
    logits = logits.to(dtype)
    side_by_side = logits.contiguous(memory_format=torch.channels_last)
    value, gradient = value_and_gradient(loss, logits, target)
    assert gradient.any()
    torch.testing.assert_close(value_and_gradient(loss, side_by_side, target), (value, gradient))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_labels_may_lie_in_memory_in_any_way(loss, batch, dtype):
    """A part of a larger label, or one whose columns come first."""
    logits, target = batch
    target = target.to(dtype)
    part = torch.nn.functional.pad(target, (2, 3))[..., 2:-3]
    turned = target.mT.contiguous().mT
    for other in (part, turned):
        assert not other.is_contiguous()
        assert loss(logits, other) == loss(logits, target)


def test_uint8_and_int64_targets_agree(loss, batch):
    logits, target = batch
    assert torch.equal(loss(logits, target), loss(logits, target.long()))


@pytest.mark.promise(17)
def test_one_output_channel_is_refused_with_the_fix(loss):
    with pytest.raises(InputError, match="num_classes=2"):
        loss(torch.randn(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8))


def test_shapes_that_do_not_fit_are_refused(loss):
    with pytest.raises(InputError, match=r"\(1, 4, 4, 4\).*\(1, 5, 4\)"):
        loss(torch.randn(1, 4, 4, 4), torch.zeros(1, 5, 4, dtype=torch.uint8))


@pytest.fixture
def two_processes(monkeypatch):
    """`two_processes(function, a, b)`: function(a) and function(b), as in two that train."""
    shares: dict[int, Tensor] = {}
    barrier = threading.Barrier(2, timeout=20)

    def all_reduce(total: Tensor) -> None:
        shares[threading.get_ident()] = total.clone()
        barrier.wait()
        total.copy_(torch.stack(list(shares.values())).sum(0))
        barrier.wait()

    def run(function, *arguments):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(function, arguments))

    return run


# The others take the pixels of one process together: its hardest, and the order of its errors.
ADDITIVE = [name for name in LOSSES if "lovasz" not in name and "ohem" not in name]


@pytest.mark.promise(16)
@pytest.mark.parametrize("loss", ADDITIVE, indirect=True)
def test_two_processes_together_have_the_loss_and_gradient_of_one(loss, batch, two_processes):
    logits, target = batch
    target[1, :, 3:] = 255  # fewer pixels than in the other, and not all classes
    target[1][target[1] == 2] = 255
    value, gradient = value_and_gradient(loss, logits, target)
    results = two_processes(
        lambda i: value_and_gradient(loss, logits[i : i + 1], target[i : i + 1]), 0, 1
    )
    values, gradients = zip(*results, strict=True)
    torch.testing.assert_close(torch.stack(values).mean(), value)
    # DistributedDataParallel averages the gradients.
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient)


def test_a_loss_that_is_no_number_is_so_in_its_own_process_alone(loss, batch, two_processes):
    logits, target = batch
    logits[0, :, 5, 5] = math.nan
    first, second = two_processes(lambda i: loss(logits[i : i + 1], target[i : i + 1]), 0, 1)
    assert first.isnan()
    assert second.isfinite()


def test_gradient_matches_finite_differences(loss, batch):
    logits, target = batch
    _, gradient = value_and_gradient(loss, logits, target)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    step = 1e-2
    ahead, behind = (loss(logits + sign * step * direction, target) for sign in (1, -1))
    slope = (ahead - behind) / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-2, abs=1e-4)


def test_d13_no_loss_has_an_ignored_label_of_its_own():
    modules = [v for v in vars(losses).values() if inspect.isclass(v) and issubclass(v, nn.Module)]
    assert len(modules) >= 3
    for module in modules:
        assert "ignore_index" not in inspect.signature(module).parameters
        assert not hasattr(module, "ignore_index")
    assert losses.IGNORE_INDEX is labels.IGNORE_INDEX


def test_d30_no_loss_waits_for_the_device(loss, batch, monkeypatch):
    # Tensors on "meta" have no values, so asking for one fails, as it would synchronise on CUDA.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    value = loss.to("meta")(*(tensor.to("meta") for tensor in batch))
    assert value.device.type == "meta"
    assert value.shape == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("deterministic", [False, True])
def test_d30_cuda_gives_the_cpus_loss_and_never_waits(loss, batch, deterministic):
    expected = value_and_gradient(loss, *batch)
    on_gpu, inputs = loss.cuda(), [tensor.cuda() for tensor in batch]
    torch.use_deterministic_algorithms(deterministic)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = value_and_gradient(on_gpu, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value.cpu(), reference, rtol=1e-4, atol=1e-6)


@pytest.mark.promise(18)
def test_inverse_weights_are_scikit_learns_balanced_weights():
    labels = np.repeat(np.arange(4), COUNTS.numpy())
    expected = compute_class_weight("balanced", classes=np.array([0, 2, 3]), y=labels)
    weights = dataset_weighted().class_weights
    np.testing.assert_allclose(weights[[0, 2, 3]].numpy(), expected, rtol=1e-6)
    assert weights[1] == 0  # absent


def test_median_frequency_weights_are_median_over_frequency():
    loss = CrossEntropyLoss(weights="dataset", balance="median_frequency")
    loss.set_pixel_counts(COUNTS)
    # Frequencies 500, 100 and 25 of 625; their median is 100: 100/500, 100/100, 100/25.
    torch.testing.assert_close(loss.class_weights, torch.tensor([0.2, 0.0, 1.0, 4.0]))


def test_dataset_weights_enter_like_listed_weights(batch):
    loss = dataset_weighted()
    listed = CrossEntropyLoss(weights=loss.class_weights.tolist())
    torch.testing.assert_close(loss(*batch), listed(*batch))


@pytest.mark.promise(18)
def test_dataset_weights_are_logged_and_stay_out_of_the_checkpoint(caplog):
    with caplog.at_level(logging.INFO):
        loss = dataset_weighted()
    assert "class weights (inverse): [0.4167, 0.0, 2.0833, 8.3333]" in caplog.text
    assert loss.state_dict() == {}


def test_pixel_counts_are_asked_for_until_they_are_given(batch):
    nested = WeightedSum([CrossEntropyLoss(weights="dataset"), DiceLoss()], [1, 1])
    asking = [m for m in nested.modules() if getattr(m, "needs_pixel_counts", False)]
    assert asking == [nested.losses[0]]
    with pytest.raises(RuntimeError, match="set_pixel_counts"):
        nested(*batch)
    asking[0].set_pixel_counts(COUNTS)
    assert not asking[0].needs_pixel_counts
    assert nested(*batch).isfinite()


def test_only_absent_classes_in_the_labels_is_a_finite_zero(batch):
    logits, target = batch
    value, gradient = value_and_gradient(dataset_weighted(), logits, torch.ones_like(target))
    assert value == 0
    assert torch.all(gradient == 0)


@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_certain_and_undecided_logits_give_finite_gradients(loss, batch, scale):
    """Also where a probability is exactly 0 or 1: right, wrong, and all classes alike."""
    logits, target = batch
    for values in (logits, one_hot(target, NUM_CLASSES), -one_hot(target, NUM_CLASSES)):
        value, gradient = value_and_gradient(loss, scale * values.float(), target)
        assert value.isfinite()
        assert gradient.isfinite().all()


# Formulas of the papers in float64, over p and t: probabilities and one-hot labels [C, pixels].


def one_hot(target: Tensor, num_classes: int) -> Tensor:
    return (target[:, None] == torch.arange(num_classes).view(1, -1, 1, 1)).long()


def smoothed(p: np.ndarray, t: np.ndarray) -> float:
    return -((0.9 * t + 0.1 / len(t)) * np.log(p)).sum(0).mean()


def focal(p: np.ndarray, t: np.ndarray) -> float:
    p_t = (p * t).sum(0)
    return ((1 - p_t) ** 2 * -np.log(p_t)).mean()


def focal_balanced(p: np.ndarray, t: np.ndarray) -> float:
    alpha = np.arange(1, len(t) + 1)[:, None]
    p_t = (p * t).sum(0)
    return ((1 - p_t) ** 0.5 * -np.log(p_t) * (alpha * t).sum(0)).sum() / (alpha * t).sum()


def tversky(p: np.ndarray, t: np.ndarray, gamma: float = 1) -> float:
    present = t.any(1)
    true, false = (p * t).sum(1)[present], (p * (1 - t)).sum(1)[present]
    missed = ((1 - p) * t).sum(1)[present]
    index = (true + 1) / (true + 0.3 * false + 0.7 * missed + 1)
    return ((1 - index) ** (1 / gamma)).mean()


def lovasz(p: np.ndarray, t: np.ndarray) -> float:
    """The extension by its definition: the Jaccard loss of growing sets of wrong pixels."""
    values = []
    for pixels, errors in zip(t[t.any(1)] == 1, np.abs(t - p)[t.any(1)], strict=True):
        wrong, before, total = np.zeros_like(pixels), 0.0, 0.0
        for pixel in np.argsort(-errors):
            wrong[pixel] = True
            jaccard_loss = wrong.sum() / (pixels | wrong).sum()
            total += errors[pixel] * (jaccard_loss - before)
            before = jaccard_loss
        values.append(total)
    return np.mean(values)


def ohem(p: np.ndarray, t: np.ndarray, threshold: float, min_kept: float) -> float:
    p_t = np.sort((p * t).sum(0))
    kept = max(math.ceil(min_kept * len(p_t)), (p_t < threshold).sum())
    return -np.log(p_t[:kept]).mean()


REFERENCES = {
    "smoothing": (lambda c: CrossEntropyLoss(label_smoothing=0.1), smoothed),
    "focal": (lambda c: FocalLoss(), focal),
    "focal, balanced": (
        lambda c: FocalLoss(0.5, weights=[*map(float, range(1, c + 1))]),
        focal_balanced,
    ),
    "tversky": (lambda c: TverskyLoss(), tversky),
    "focal tversky": (lambda c: TverskyLoss(gamma=4 / 3), lambda p, t: tversky(p, t, 4 / 3)),
    "lovasz": (lambda c: LovaszSoftmaxLoss(), lovasz),
    "ohem by threshold": (lambda c: OhemCrossEntropyLoss(), lambda p, t: ohem(p, t, 0.7, 1 / 16)),
    "ohem of all": (
        lambda c: OhemCrossEntropyLoss(threshold=1.0),
        lambda p, t: ohem(p, t, 1.0, 1 / 16),
    ),
    "ohem by number": (
        lambda c: OhemCrossEntropyLoss(0.001, 0.3125),
        lambda p, t: ohem(p, t, 0.001, 0.3125),
    ),
}


@pytest.mark.promise(10)
@pytest.mark.parametrize("num_classes", [2, NUM_CLASSES, 150])
@pytest.mark.parametrize("name", REFERENCES)
def test_losses_are_their_papers_formulas_in_float64(name, num_classes):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, num_classes, 13, 19, generator=generator)
    target = torch.randint(num_classes - 1, (2, 13, 19), generator=generator)  # the last is absent
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    right = torch.rand(target.shape, generator=generator) < 0.5
    logits += 8 * one_hot(target, num_classes) * right[:, None]
    make, formula = REFERENCES[name]
    valid = (target != 255).flatten().numpy()
    p, t = (
        values.double().movedim(1, 0).flatten(1).numpy()[:, valid]
        for values in (logits.double().softmax(1), one_hot(target, num_classes))
    )
    value = make(num_classes)(logits, target.byte())
    assert value.item() == pytest.approx(formula(p, t), rel=2e-6)


def test_the_boundary_loss_is_that_of_scipys_distances():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, NUM_CLASSES, 21, 34, generator=generator)
    noise = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(4, 3, 21, 34)), 3)
    target = torch.from_numpy(noise.argmax(1)).byte()
    target[0, 5:9, 10:20] = 255
    target[1, :, :] = 2  # a class alone
    target[2, :, 1:] = 255
    target[2, :, 0] = torch.arange(21) // 20  # one pixel of class 1
    p = logits.double().softmax(1).numpy()
    total = 0.0
    for image, ids in enumerate(target.numpy()):
        for c in range(NUM_CLASSES):
            positive, negative = ids == c, (ids != c) & (ids != 255)
            if positive.any() and negative.any():
                # As in the authors' one_hot2dist.
                outside = scipy.ndimage.distance_transform_edt(~positive) * negative
                inside = (scipy.ndimage.distance_transform_edt(~negative) - 1) * positive
                total += (p[image, c] * (outside - inside)).sum()
    expected = total / (NUM_CLASSES * (target != 255).sum().item())
    assert abs(expected) > 0.01
    assert BoundaryLoss()(logits, target).item() == pytest.approx(expected, rel=1e-5)


def test_distances_are_scipys_for_masks_of_every_kind():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (1, 40), (40, 1), (33, 20), (20, 33)):
        for share in (0.01, 0.5, 1.0):
            mask = rng.random(shape) < share
            mask[0, -1] = True
            expected = scipy.ndimage.distance_transform_edt(~mask)
            found = losses._distances(torch.from_numpy(mask))
            np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert losses._distances(torch.zeros(4, 5, dtype=torch.bool)).min() >= 9


def test_lovasz_of_decided_pixels_is_one_minus_the_iou(batch):
    """At the corners of its domain the extension is the function itself."""
    prediction = torch.randint(NUM_CLASSES, (2, 9, 7), generator=torch.Generator().manual_seed(3))
    target = batch[1]
    valid = target != 255
    iou = jaccard_score(target[valid], prediction[valid], average="macro")
    value = LovaszSoftmaxLoss()(1e4 * one_hot(prediction, NUM_CLASSES).float(), target)
    assert value.item() == pytest.approx(1 - iou, rel=1e-6)


def test_tversky_of_equal_prices_is_dice(batch):
    tversky = TverskyLoss(alpha=0.5, beta=0.5, smooth=1.0)
    torch.testing.assert_close(tversky(*batch), DiceLoss(smooth=2.0)(*batch))


def test_a_focal_loss_without_focus_is_cross_entropy(batch):
    torch.testing.assert_close(FocalLoss(gamma=0)(*batch), CrossEntropyLoss()(*batch))
    weights = [0.5, 2.0, 1.0, 3.0]
    weighted = FocalLoss(gamma=0, weights=weights)(*batch)
    torch.testing.assert_close(weighted, CrossEntropyLoss(weights=weights)(*batch))


# Two images of 2 x 2 pixels. With logits (ln 3, 0) the probabilities are 3/4 and 1/4.
TWO_IMAGES = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1).expand(2, 2, 2, 2)
# First image: three pixels of class 0, one of class 1. Second: one of class 1, the rest ignored.
TWO_LABELS = torch.tensor([[[0, 0], [0, 1]], [[1, 255], [255, 255]]], dtype=torch.uint8)


def test_image_weights_by_hand():
    # First image: weights (4 - 3)/4 = 1/4 and (4 - 1)/4 = 3/4; second: class 1 has (1 - 1)/1 = 0.
    # Five valid pixels: 3 * 1/4 * -ln(3/4), 1 * 3/4 * -ln(1/4) and 0.
    expected = (3 * 0.25 * -math.log(0.75) + 0.75 * -math.log(0.25) + 0) / 5
    value = CrossEntropyLoss(weights="image")(TWO_IMAGES, TWO_LABELS)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_dice_by_hand():
    # Five valid pixels with probabilities 3/4 and 1/4; three of class 0 and two of class 1.
    # Class 0: (2 * 3 * 3/4 + 1) / (5 * 3/4 + 3 + 1) = 5.5 / 7.75
    # Class 1: (2 * 2 * 1/4 + 1) / (5 * 1/4 + 2 + 1) = 2 / 4.25
    expected = 1 - (5.5 / 7.75 + 2 / 4.25) / 2
    value = DiceLoss(smooth=1.0)(TWO_IMAGES, TWO_LABELS)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_image_weighted_dice_by_hand():
    # Weights as above: 1/4 for three pixels, 3/4 for the fourth, and 0 for the second image's.
    # Intersection: 3 * 1/4 * 3/4 + 3/4 * 1/4 = 3/4; labels and predictions: 3/2 each.
    expected = 1 - (2 * 3 / 4 + 1) / (3 / 2 + 3 / 2 + 1)
    value = DiceLoss(smooth=1.0, weights="image")(TWO_IMAGES, TWO_LABELS)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_image_weighted_dice_of_one_class_only_is_a_finite_zero(batch):
    logits, target = batch  # one class has weight (n - n) / n = 0
    for smooth in (0.0, 1.0):
        loss = DiceLoss(smooth=smooth, weights="image")
        value, gradient = value_and_gradient(loss, logits, torch.ones_like(target))
        assert value == 0
        assert torch.all(gradient == 0)


def test_dice_leaves_absent_classes_out():
    # One class, certain and right: its Dice is 1, and the absent ones do not drag the mean down.
    logits = torch.zeros(1, 3, 8, 8)
    logits[:, 2] = 100
    target = torch.full((1, 8, 8), 2, dtype=torch.uint8)
    assert DiceLoss()(logits, target).item() == pytest.approx(0, abs=1e-6)


def test_weighted_sum_adds_up(batch):
    expected = 2 * CrossEntropyLoss()(*batch) + 0.5 * DiceLoss()(*batch)
    total = WeightedSum([CrossEntropyLoss(), DiceLoss()], [2, 0.5])(*batch)
    torch.testing.assert_close(total, expected)


def test_weighted_sum_refuses_lists_of_different_length():
    with pytest.raises(InputError, match="2 losses and 1 weights"):
        WeightedSum([CrossEntropyLoss(), DiceLoss()], [1.0])


def test_wrong_number_of_weights_is_refused(batch):
    with pytest.raises(InputError, match="2 class weights for 4 classes"):
        CrossEntropyLoss(weights=[1.0, 2.0])(*batch)


def test_impossible_settings_are_refused():
    with pytest.raises(InputError, match="'datset'; use null, dataset, image"):
        CrossEntropyLoss(weights="datset")
    with pytest.raises(InputError, match="'median'; use inverse or median_frequency"):
        CrossEntropyLoss(weights="dataset", balance="median")
    with pytest.raises(InputError, match="finite"):
        CrossEntropyLoss(weights=[1.0, float("nan")])
    with pytest.raises(InputError, match="'dataset'; the Dice loss takes null or image"):
        DiceLoss(weights="dataset")
    for make, message in (
        (lambda: CrossEntropyLoss(label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: FocalLoss(gamma=-1), "gamma is -1"),
        (lambda: TverskyLoss(alpha=-0.1), "are -0.1, 0.7 and 1.0"),
        (lambda: TverskyLoss(gamma=0), "are 0.3, 0.7 and 0"),
        (lambda: OhemCrossEntropyLoss(threshold=0), "threshold is 0"),
        (lambda: OhemCrossEntropyLoss(min_kept=100000), "min_kept is 100000"),
    ):
        with pytest.raises(InputError, match=message):
            make()


@pytest.mark.promise(1)
@pytest.mark.parametrize("value", [4, 7, 254])
def test_a_label_that_is_no_class_is_named(loss, batch, value):
    logits, target = batch
    target[0, 5, 5] = value
    with pytest.raises(InputError, match=rf"{value}, 255\]; allowed are 0\.\.3 and 255"):
        loss(logits, target)
    with pytest.raises(InputError, match=r"\[-1, .* allowed are"):
        loss(logits, torch.where(target == value, -1, target.long()))

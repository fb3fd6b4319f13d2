import inspect
import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from seg_torch import labels, losses
from seg_torch.errors import InputError
from seg_torch.losses import CrossEntropyLoss, DiceLoss, WeightedSum

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
    assert 0 < value < math.inf
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


@pytest.mark.promise(16)
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


@pytest.mark.promise(1)
@pytest.mark.parametrize("value", [4, 7, 254])
def test_a_label_that_is_no_class_is_named(loss, batch, value):
    logits, target = batch
    target[0, 5, 5] = value
    with pytest.raises(InputError, match=rf"{value}, 255\]; allowed are 0\.\.3 and 255"):
        loss(logits, target)
    with pytest.raises(InputError, match=r"\[-1, .* allowed are"):
        loss(logits, torch.where(target == value, -1, target.long()))

"""What holds of every loss: ignored pixels, precision, memory format, several processes."""

import inspect
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from losses_for_tests import LOSSES, NUM_CLASSES, one_hot, small_batch, value_and_gradient
from torch import Tensor, nn

from seg_torch import labels, losses
from seg_torch.errors import InputError
from seg_torch.losses import base, cross_entropy


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> nn.Module:
    return LOSSES[request.param]()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return small_batch()


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
    for module in (base, cross_entropy):
        assert module.IGNORE_INDEX is labels.IGNORE_INDEX


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


@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_certain_and_undecided_logits_give_finite_gradients(loss, batch, scale):
    """Also where a probability is exactly 0 or 1: right, wrong, and all classes alike."""
    logits, target = batch
    for values in (logits, one_hot(target, NUM_CLASSES), -one_hot(target, NUM_CLASSES)):
        value, gradient = value_and_gradient(loss, scale * values.float(), target)
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.promise(1)
@pytest.mark.parametrize("value", [4, 7, 254])
def test_a_label_that_is_no_class_is_named(loss, batch, value):
    logits, target = batch
    target[0, 5, 5] = value
    with pytest.raises(InputError, match=rf"{value}, 255\]; allowed are 0\.\.3 and 255"):
        loss(logits, target)
    with pytest.raises(InputError, match=r"\[-1, .* allowed are"):
        loss(logits, torch.where(target == value, -1, target.long()))


def test_weighted_sum_adds_up(batch):
    expected = 2 * losses.CrossEntropyLoss()(*batch) + 0.5 * losses.DiceLoss()(*batch)
    total = losses.WeightedSum([losses.CrossEntropyLoss(), losses.DiceLoss()], [2, 0.5])(*batch)
    torch.testing.assert_close(total, expected)


def test_weighted_sum_refuses_lists_of_different_length():
    with pytest.raises(InputError, match="2 losses and 1 weights"):
        losses.WeightedSum([losses.CrossEntropyLoss(), losses.DiceLoss()], [1.0])

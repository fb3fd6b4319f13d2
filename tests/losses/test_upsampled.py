"""Losses at label size, some rows at a time: as of all at once, in a fraction of the memory."""

import subprocess
import sys
import textwrap

import pytest
import torch
from losses_for_tests import LOSSES, SIZES, sized_batch, value_and_gradient
from torch import Tensor, nn

from seg_torch import upsample as upsampling
from seg_torch.losses import (
    CrossEntropyLoss,
    DiceLoss,
    SegmentationLoss,
    WeightedSum,
    upsampled,
    upsampled_loss,
)
from seg_torch.upsample import split_rows, upsample


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows at a time, of all logits."""
    monkeypatch.setattr(upsampled, "LOSS_BYTES", 1 << 60)
    monkeypatch.setattr(upsampling, "CPU_CHUNK", 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_chunks_change_neither_value_nor_gradient(name, sizes, dtype, in_chunks):
    loss = LOSSES[name]()
    logits, target = sized_batch(*sizes)
    logits = logits.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):  # as in a training step
        value, gradient = value_and_gradient(
            lambda *pair: upsampled_loss(loss, *pair), logits, target
        )
    expected, its_gradient = value_and_gradient(
        lambda logits, target: loss(upsample(logits.double(), sizes[1]), target),
        logits,
        target,
    )
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    rounding = 1e-5 if dtype == torch.float32 else 2**-7
    assert (gradient - its_gradient).abs().max() <= rounding * its_gradient.abs().max()
    assert (gradient[1] == 0).all()  # of an image without labels


@pytest.mark.parametrize("name", LOSSES)
def test_labels_that_are_all_ignored_give_zero(name, in_chunks):
    logits, target = sized_batch(*SIZES[0])
    value, gradient = value_and_gradient(
        lambda *pair: upsampled_loss(LOSSES[name](), *pair), logits, target.fill_(255)
    )
    assert value == 0
    assert (gradient == 0).all()


class Squares(nn.Module):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        assert logits.shape[-2:] == target.shape[-2:]
        return logits.square().mean()


def test_a_loss_of_ones_own_gets_all_logits_at_once(in_chunks):
    logits, target = sized_batch(*SIZES[0])
    at_size = upsample(logits, SIZES[0][1])
    assert upsampled_loss(Squares(), logits, target) == at_size.square().mean()
    both = WeightedSum([CrossEntropyLoss(), Squares()], [1.0, 2.0])
    assert upsampled_loss(both, logits, target) == both(at_size, target)


def test_chunks_are_for_losses_that_take_a_quarter_of_the_memory(monkeypatch):
    logits, target = sized_batch(*SIZES[0])  # 3 x 4 x 24 x 20 at label size
    chunks = []
    monkeypatch.setattr(
        upsampled, "split_rows", lambda *given: chunks.append(None) or split_rows(*given)
    )
    for memory, expected in ((4 * 5760 * 20, 0), (4 * 5760 * 20 - 4, 1)):
        monkeypatch.setattr(upsampled, "total_memory", lambda device, memory=memory: memory)
        upsampled_loss(CrossEntropyLoss(), logits, target)
        assert len(chunks) == expected


@pytest.mark.parametrize(("loss", "passes"), [(CrossEntropyLoss, 1), (DiceLoss, 2)])
def test_the_chunks_of_a_loss_with_one_sum_are_computed_once(loss, passes, in_chunks, monkeypatch):
    """Of 3 images of 24 rows, 3 rows of 20 x 4 logits at a time."""
    calls = []
    sums = loss.sums
    monkeypatch.setattr(loss, "sums", lambda *given: calls.append(None) or sums(*given))
    logits, target = sized_batch(*SIZES[0])
    value_and_gradient(lambda *pair: upsampled_loss(loss(), *pair), logits, target)
    assert len(calls) == passes * 3 * 24 / 3
    calls.clear()
    upsampled_loss(loss(), logits, target)  # without a gradient
    assert len(calls) == 3 * 24 / 3


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_with_one_sum_says_so(name):
    loss = LOSSES[name]()
    if not isinstance(loss, SegmentationLoss):
        assert not hasattr(loss, "has_one_sum")
        return
    logits, target = sized_batch(*SIZES[3])
    sums = loss.sums(logits.requires_grad_(), target)
    assert len(sums) == loss.num_sums
    first, *others = sums
    only_the_first = first.requires_grad and not any(each.requires_grad for each in others)
    assert loss.has_one_sum == (only_the_first and first.ndim == 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_many_classes_take_less_than_half_of_the_memory():
    script = """
        import torch
        from pathlib import Path
        from seg_torch.losses import CrossEntropyLoss, DiceLoss, WeightedSum, upsampled
        from seg_torch.losses import upsampled_loss
        from seg_torch import upsample as upsampling
        from seg_torch.upsample import upsample

        upsampled.LOSS_BYTES = 1 << 60  # chunks of all logits
        upsampling.CPU_CHUNK >>= 3  # the share of these that a chunk is of 8 x 150 x 512 x 512

        def peak_of(step):
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is used now
            start = memory()
            step()
            return memory() - start

        def memory():
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

        logits = torch.randn(8, 100, 32, 32, requires_grad=True)
        target = torch.randint(100, (8, 192, 192), dtype=torch.uint8)
        for loss in CrossEntropyLoss(), WeightedSum([CrossEntropyLoss(), DiceLoss()], [1, 1]):
            loss(logits[:1], target[:1, :32, :32]).backward()  # what torch loads for it
            in_chunks = peak_of(lambda: upsampled_loss(loss, logits, target).backward())
            plain = peak_of(lambda: loss(upsample(logits, (192, 192)), target).backward())
            print(in_chunks, plain)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    for line in result.stdout.splitlines():
        in_chunks, plain = map(int, line.split())
        assert in_chunks < plain / 2, result.stdout  # a tenth to a fifth at 512 x 512
        assert plain > 200_000  # KiB: several copies of the logits at label size

"""Losses at label size, band by band: what they are without bands, in a fraction of the memory."""

import subprocess
import sys
import textwrap

import pytest
import torch
from test_losses import LOSSES
from torch import Tensor, nn

from seg_torch import upsample as module
from seg_torch.losses import CrossEntropyLoss, WeightedSum
from seg_torch.upsample import upsample, upsampled_loss

# Height and width of the logits and of the labels: strides 4 and 8, no whole ratio, equal, smaller.
SIZES = [
    ((6, 5), (24, 20)),
    ((4, 3), (32, 24)),
    ((7, 9), (33, 41)),
    ((9, 7),) * 2,
    ((12, 9), (8, 7)),
]


@pytest.fixture
def banded(monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageFormat for all logits, of few rows."""
    monkeypatch.setattr(module, "LOSS_BYTES", 1 << 60)
    monkeypatch.setattr(module, "CPU_BAND", 300)


def batch(small: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 4, *small, generator=generator)
    target = torch.randint(4, (3, *size), generator=generator, dtype=torch.uint8)
    target[0, : size[0] // 2] = 255
    target[1] = 255
    return logits, target


def value_and_gradient(
    function: nn.Module, logits: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = function(logits, target)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_bands_change_neither_value_nor_gradient(name, sizes, dtype, banded):
    loss = LOSSES[name]()
    logits, target = batch(*sizes)
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
def test_labels_that_are_all_ignored_give_zero(name, banded):
    logits, target = batch(*SIZES[0])
    value, gradient = value_and_gradient(
        lambda *pair: upsampled_loss(LOSSES[name](), *pair), logits, target.fill_(255)
    )
    assert value == 0
    assert (gradient == 0).all()


class Squares(nn.Module):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        assert logits.shape[-2:] == target.shape[-2:]
        return logits.square().mean()


def test_a_loss_of_ones_own_gets_all_logits_at_once(banded):
    logits, target = batch(*SIZES[0])
    at_size = upsample(logits, SIZES[0][1])
    assert upsampled_loss(Squares(), logits, target) == at_size.square().mean()
    both = WeightedSum([CrossEntropyLoss(), Squares()], [1.0, 2.0])
    assert upsampled_loss(both, logits, target) == both(at_size, target)


def test_bands_are_for_losses_that_take_a_quarter_of_the_memory(monkeypatch):
    logits, target = batch(*SIZES[0])  # 3 x 4 x 24 x 20 at label size
    banded = []
    apply = module._BandedSums.apply
    monkeypatch.setattr(
        module._BandedSums, "apply", lambda *a: banded.append(None) or apply(*a), raising=False
    )
    for memory, expected in ((4 * 5760 * 20, 0), (4 * 5760 * 20 - 4, 1)):
        monkeypatch.setattr(module, "total_memory", lambda device, memory=memory: memory)
        upsampled_loss(CrossEntropyLoss(), logits, target)
        assert len(banded) == expected


def test_the_bands_of_cross_entropy_are_computed_once(banded, monkeypatch):
    """Of 3 images of 24 rows, 3 rows of 20 x 4 logits at a time."""
    calls = []
    sums = CrossEntropyLoss.sums
    monkeypatch.setattr(CrossEntropyLoss, "sums", lambda *given: calls.append(None) or sums(*given))
    logits, target = batch(*SIZES[0])
    value_and_gradient(lambda *pair: upsampled_loss(CrossEntropyLoss(), *pair), logits, target)
    assert len(calls) == 3 * 24 / 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_many_classes_take_less_than_half_of_the_memory():
    script = """
        import torch
        from pathlib import Path
        from seg_torch.losses import CrossEntropyLoss, DiceLoss, WeightedSum
        from seg_torch import upsample as module
        from seg_torch.upsample import upsample, upsampled_loss

        module.LOSS_BYTES = 1 << 60  # bands for all logits
        module.CPU_BAND >>= 3  # the share of these logits that a band is of 8 x 150 x 512 x 512

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
            banded = peak_of(lambda: upsampled_loss(loss, logits, target).backward())
            plain = peak_of(lambda: loss(upsample(logits, (192, 192)), target).backward())
            print(banded, plain)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    for line in result.stdout.splitlines():
        banded, plain = map(int, line.split())
        assert banded < plain / 2, result.stdout  # a tenth to a fifth at 512 x 512
        assert plain > 200_000  # KiB: several copies of the logits at label size


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_images_are_upsampled_in_bands_whose_length_does_not_matter(
    sizes, dtype, monkeypatch
):
    (logits, _), (height, width) = batch(*sizes), sizes[1]
    logits = logits.to(dtype)

    def assembled() -> tuple[Tensor, int]:
        whole = torch.full((*logits.shape[:2], height, width), torch.nan)
        bands = list(module.upsampled_bands(logits, sizes[1]))
        for index, rows, values in bands:
            assert whole[index, :, rows].isnan().all()
            whole[index, :, rows] = values.float()
        return whole, max(values.numel() for _, _, values in bands)

    expected, largest = assembled()
    assert torch.equal(expected, upsample(logits, sizes[1]).float())
    assert largest == 4 * height * width  # an image at once
    monkeypatch.setattr(module, "WHOLE_IMAGE", 4 * height * width - 1)
    found = {}
    for limit in (4 * width, 3 * 4 * width, 1 << 30):
        monkeypatch.setattr(module, "CPU_BAND", limit)
        found[limit], largest = assembled()
        assert largest <= limit or sizes[0] == sizes[1]  # no copy is made
        assert torch.equal(found[limit], found[4 * width])
    torch.testing.assert_close(found[4 * width], expected, rtol=1e-5, atol=1e-5)

"""Depthwise convolutions on a CPU: their own way to the gradients is exact."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from seg_torch.models import cpu as depthwise
from seg_torch.models import unet
from seg_torch.models.cpu import FastDepthwiseGradients
from seg_torch.models.network import Network


def gradients(conv: nn.Conv2d, x: Tensor, fast: bool) -> list[Tensor]:
    """Of the output's product with fixed numbers: output, then gradients of input and weights."""
    x = x.clone(memory_format=torch.channels_last).requires_grad_()
    conv.zero_grad()
    with FastDepthwiseGradients() if fast else nullcontext():
        out = conv(x)
    torch.manual_seed(1)
    out.backward(torch.randn_like(out))
    return [out.detach(), x.grad, *(p.grad.clone() for p in conv.parameters())]


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the weights whose gradients went the own way."""
    found = []
    plain = depthwise._DepthwiseConv2d.apply
    monkeypatch.setattr(
        depthwise._DepthwiseConv2d, "apply", lambda *a: (found.append(a[1].shape), plain(*a))[1]
    )
    return found


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [
        (5, 1, 2, (12, 17)),
        (5, 2, 0, (16, 20)),  # the last row and column belong to no window
        (5, (1, 2), (2, 1), (11, 14)),
        (7, 1, 3, (9, 8)),
        ((3, 4), (2, 1), (1, 0), (8, 9)),
    ],
)
def test_gradients_are_those_of_pytorch_in_float64(calls, kernel, stride, padding, size):
    conv = nn.Conv2d(6, 6, kernel, stride, padding, groups=6, dtype=torch.float64)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    found, expected = (gradients(conv, x, fast) for fast in (True, False))
    assert calls == [conv.weight.shape]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 1), (5, 2)])
def test_in_bfloat16_they_are_as_exact_as_bfloat16(calls, kernel, stride):
    conv = nn.Conv2d(32, 32, kernel, stride, kernel // 2, groups=32, bias=False)
    x = torch.randn(4, 32, 24, 30).bfloat16().float()
    conv.weight.data = conv.weight.data.bfloat16().float()
    expected = gradients(conv, x, fast=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(conv, x, fast=True)
    assert calls
    assert found[0].dtype == torch.bfloat16
    for a, b in zip(found, expected, strict=True):
        # Numbers have 8 bits; those that are added up here are of the size of the largest sum.
        assert (a.float() - b).abs().max() < 2**-7 * b.abs().max()


def test_frozen_weights_and_inputs_get_no_gradient(calls):
    conv = nn.Conv2d(4, 4, 5, padding=2, groups=4)
    x = torch.randn(1, 4, 8, 8)
    with FastDepthwiseGradients():
        conv(x).sum().backward()
        assert x.grad is None
        assert conv.weight.grad is not None
        conv.zero_grad()
        conv.weight.requires_grad_(False)
        x.requires_grad_()
        conv(x).sum().backward()
    assert x.grad is not None
    assert conv.weight.grad is None
    assert len(calls) == 2


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 5),
        nn.Conv2d(4, 8, 5, groups=4),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 5, groups=4, dilation=2),
        nn.Conv2d(4, 4, 5, groups=4, padding="same"),
        nn.Conv2d(1, 1, 5),
    ],
    ids=str,
)
def test_other_convolutions_stay_pytorchs(calls, conv):
    x = torch.randn(1, conv.in_channels, 12, 12)
    found, expected = (gradients(conv, x, fast) for fast in (True, False))
    assert not calls
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_network_in_training_takes_them_and_no_other(calls):
    """EfficientNet-Lite0 has nine depthwise convolutions 5 wide, one of timm's own class."""
    network = Network(unet(3, "tf_efficientnet_lite0", weights=None))
    images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    network.eval()(images)["out"].sum().backward()
    assert [shape[-1] for shape in calls] == [5] * 9
    with torch.no_grad():
        network(images)
    assert len(calls) == 9

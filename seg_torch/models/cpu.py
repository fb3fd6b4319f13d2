"""What a CPU computes in another way than the papers, for speed: the same but for rounding."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight
from torch.overrides import TorchFunctionMode

# Of a batch, with which adding up the weights takes less time than it saves (AVX512-BF16).
MANY_PIXELS = 384


def can_convolve_doubled(module: nn.Module, x: Tensor, size: Sequence[int]) -> bool:
    """Whether `convolve_doubled` is faster: in training on a CPU, and for exactly twice the size.

    Without gradients there is less to gain, and an exported model is to have the plain way.
    """
    on_cpu = module.training and x.device.type == "cpu"
    doubled = (2 * x.shape[2], 2 * x.shape[3])
    return on_cpu and tuple(size) == doubled and x[:, 0].numel() >= MANY_PIXELS


def convolve_doubled(layers: nn.Sequential, x: Tensor, skip: Tensor | None) -> Tensor:
    """Apply layers, the first a 3x3 convolution, to `x` doubled by nearest upsampling, and a skip.

    Of the three rows under the kernel, two are the same row of `x`, and so it is with columns. With
    their weights added up beforehand, this is a transposed convolution of stride 2 that multiplies
    4 times a pixel instead of 9. A training step of U-Net takes a seventh less time.

    Args:
        layers: Without a bias in the first.
        x: Float [N, C, h, w].
        skip: Float [N, S, 2h, 2w], the channels behind those of `x`.
    """
    convolution, *others = layers
    weight = cast(Tensor, convolution.weight)
    # From weights (a, b, c) along one axis to (c, b + c, a + b, a): transposed, they are mirrored.
    sums = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=weight.dtype)
    transposed = torch.einsum("ar,bs,oirs->ioab", sums, sums, weight[:, : x.shape[1]])
    out = F.conv_transpose2d(x, transposed, stride=2, padding=1)
    if skip is not None:
        out = out + F.conv2d(skip, weight[:, x.shape[1] :], padding=1)
    for layer in others:
        out = layer(out)
    return out


def fast_gradients(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which a model is run: on a CPU where gradients are wanted, a fast one.

    See `FastDepthwiseGradients`.
    """
    wanted = device.type == "cpu" and torch.is_grad_enabled()
    return FastDepthwiseGradients() if wanted else nullcontext()


class FastDepthwiseGradients(TorchFunctionMode):
    """The context in which depthwise convolutions on a CPU get their gradients from here.

    oneDNN (3.12 and before) has fast depthwise kernels for all of them but two, for which it takes
    those of dense convolutions, ten to thirty times slower: gradients of weights wider than 3, and
    in bfloat16 those of the input where the stride is above 1. Both can be put in terms of the fast
    ones. The values are the same but for rounding.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_conv2d if func is torch.conv2d else func)(*args, **(kwargs or {}))


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    depthwise = 1 < groups == len(weight) == x.shape[1]
    slow = weight.shape[-1] > 3 or (stride != (1, 1) and dtype == torch.bfloat16)
    if not (depthwise and slow and dilation == (1, 1)) or isinstance(padding, str):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if bias is not None:
        bias = bias.to(dtype)
    return _DepthwiseConv2d.apply(x.to(dtype), weight.to(dtype), bias, stride, padding)


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            dtype = gradient.dtype
            # With a stride, float32 is the fast one.
            wide = torch.promote_types(dtype, torch.float32) if max(ctx.stride) > 1 else dtype
            unread = torch.empty_like(x, dtype=wide)  # whose values do not matter
            of_x, _, _ = torch.ops.aten.convolution_backward(
                *(gradient.to(wide), unread, weight.to(wide), None, ctx.stride, ctx.padding),
                *((1, 1), False, (0, 0), len(weight), (True, False, False)),
            )
            of_x = of_x.to(dtype)
        if ctx.needs_input_grad[1]:
            of_weight = _weight_gradient(gradient, x, weight, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None, None


def _weight_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Return the gradient of the weights, [C, 1, rows, columns], three columns at a time.

    A column of the kernel meets the columns of the image from its own place on, so the gradient of
    some of the columns is that of a narrower kernel which starts there.
    """
    columns, groups = weight.shape[-1], len(weight)
    if columns <= 3:
        return conv2d_weight(x, weight.shape, gradient, stride, padding, groups=groups)
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    parts = []
    for first in range(0, columns, 3):
        part = weight[..., first : first + 3]
        last = first + stride[1] * (gradient.shape[-1] - 1) + part.shape[-1]
        seen = x[..., first:last].contiguous(memory_format=torch.channels_last)
        parts.append(conv2d_weight(seen, part.shape, gradient, stride, groups=groups))
    return torch.cat(parts, dim=-1)

"""Sizes and padding for models that take only some image sizes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ceil_div(length: int, divisor: int) -> int:
    """Return the quotient, rounded up.

    Not by -(-length // divisor): ONNX rounds negative quotients towards zero.
    """
    return (length + divisor - 1) // divisor


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until height and width are multiples of a number.

    What the model makes of the padding is cut off by `logits[..., :height, :width]`. Repeated
    pixels continue the image; zeros would draw an edge along it.

    Args:
        x: Float [N, C, H, W].
        multiple: Such as the stride of the model's deepest feature map.

    Returns:
        Float [N, C, H', W'], H' >= H and W' >= W; `x` itself where nothing is to be done.
    """
    height, width = x.shape[-2:]
    # An exported graph is for images of other sizes, too.
    wanted = torch.compiler.is_exporting() or height % multiple or width % multiple
    bottom = ceil_div(height, multiple) * multiple - height
    right = ceil_div(width, multiple) * multiple - width
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if wanted else x

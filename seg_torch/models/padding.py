"""Padding for models that take only some image sizes."""

import torch.nn.functional as F
from torch import Tensor


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
    bottom, right = -height % multiple, -width % multiple
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x

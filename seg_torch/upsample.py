"""Logits from the resolution at which a head works to that of the labels, whole or by rows."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seg_torch.hardware import row_chunks

# Numbers of logits in a chunk: of a few rows, which stay in a CPU's cache; many keep a GPU busy.
CPU_CHUNK = 1 << 20
GPU_CHUNK = 1 << 26

# Logits of one image at label size that are made at once to be decided: a quarter of a gigabyte.
WHOLE_IMAGE = 1 << 26


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Bring logits to the size of the labels, bilinearly and in float32.

    This comes before anything is decided (argmax): deciding first and enlarging class ids loses
    accuracy at every boundary.

    Args:
        logits: [N, C, h, w] of any floating type.
        size: (height, width) of the result.

    Returns:
        float32 [N, C, *size]; `logits` themselves where they have this size.
    """
    if logits.shape[-2:] == tuple(size):
        return logits
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


def upsampled_chunks(logits: Tensor, size: Sequence[int]) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield logits at the size of the labels, image by image; of a large image some rows at a time.

    With 150 classes those of a large image at once would take gigabytes. Whether there are several
    chunks depends on the sizes alone, and the values do not depend on where they begin. They are
    those of `upsample` but for rounding, which between PyTorch's own implementations differs, too.

    Args:
        logits: [N, C, h, w] of any floating type.
        size: (height, width) of the labels.

    Yields:
        The number of the image, the rows, and their logits [C, rows, width].
    """
    height, width = size
    large = logits.shape[1] * height * width > WHOLE_IMAGE
    if large and logits.shape[-2:] != (height, width):
        for chunk in split_rows(logits, size):
            yield chunk.image.start, chunk.rows, chunk.upsampled(logits[chunk.sources])[0]
        return
    for index in range(len(logits)):
        yield index, slice(0, height), upsample(logits[index : index + 1], size)[0]


class RowChunk(NamedTuple):
    """Rows of one image, and what they are interpolated from.

    Attributes:
        image: The image, as a slice of the batch.
        rows: Those of the label.
        width: Of the label.
        sources: Index into the logits [N, C, h, w]: the rows on which they depend.
        above: int64 [rows], for each the row of the sources above it.
        below: int64 [rows], that below it.
        share: float32 [rows, 1], of the row below.
    """

    image: slice
    rows: slice
    width: int
    sources: tuple[slice, ...]
    above: Tensor
    below: Tensor
    share: Tensor

    def upsampled(self, logits: Tensor) -> Tensor:
        """Return the logits at label size, float32 [1, C, rows, width], from those of `sources`.

        To the width of the label first, while there are fewer rows: on a CPU the backward of
        interpolation takes longer than the cross-entropy, that of lerp a fraction of it.
        """
        wide = upsample(logits.float(), (logits.shape[2], self.width))
        above, below = wide.index_select(2, self.above), wide.index_select(2, self.below)
        return torch.lerp(above, below, self.share)


def split_rows(
    logits: Tensor, size: Sequence[int], whole_images: bool = False
) -> Iterator[RowChunk]:
    """Split a batch at the size of the labels into chunks of rows.

    Args:
        logits: [N, C, h, w].
        size: (height, width) of the labels.
        whole_images: Make each image one chunk.
    """
    height, width = size
    most = CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK
    values = logits.shape[1] * width
    # As F.interpolate does it with align_corners=False.
    position = ((torch.arange(height) + 0.5) * (logits.shape[2] / height) - 0.5).clamp(min=0)
    above = position.long()
    below = (above + 1).clamp(max=logits.shape[2] - 1)
    share = (position - above)[:, None]
    on_device = [each.to(logits.device) for each in (above, below, share)]
    for index in range(len(logits)):
        image = slice(index, index + 1)
        for rows in row_chunks(height, values, height * values if whole_images else most):
            first, last = int(above[rows.start]), int(below[rows.stop - 1])
            sources = image, slice(None), slice(first, last + 1)
            of_above, of_below, of_share = (each[rows] for each in on_device)
            weights = of_above - first, of_below - first, of_share
            yield RowChunk(image, rows, width, sources, *weights)

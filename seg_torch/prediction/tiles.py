"""Overlapping tiles of a large image, and how the logits of one fade into those of the next."""

from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """A tile along one side of an image.

    Attributes:
        read: Where the network's view begins.
        start: Where the tile begins: what was read before it is only seen.
        end: Where the tile and the view end.
        final: Where the next tile begins to fade in; the end of the last tile.
    """

    read: int
    start: int
    end: int
    final: int


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Return the tiles along one side, in order.

    Neighbours share `overlap` pixels. The last tile reads back further than it is used, so that
    the network sees as much around it as around the others; all begin at multiples of 32, where
    the strides of the network begin, too.
    """
    found = []
    for start in range(0, max(1, length - overlap), tile - overlap):
        end = min(start + tile, length)
        read = min(start, max(0, (end - tile) // 32 * 32))
        found.append(Span(read, start, end, end if end == length else end - overlap))
    return found


class CrossFade:
    """Fades the logits of each tile over its first rows and columns into those before it.

    Only what is still to be faded into the next tiles is kept: the right edge of the last tile, and
    the lower edge of the last row of tiles. So memory does not depend on the height of the image.

    Args:
        num_classes: Number of classes C.
        width: Of the image.
        tile: Side of the tiles.
        overlap: Pixels that neighbours share.
        dtype: The largest that logits may have. Smaller ones leave a part of the memory untouched,
            which on a CPU takes none.
        device: Where the logits are.
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        tile: int,
        overlap: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        ramp = (torch.arange(overlap, device=device) + 0.5) / overlap
        self.fade_in = 0.5 - 0.5 * torch.cos(torch.pi * ramp)
        self.num_classes, self.width, self.overlap = num_classes, width, overlap
        self.memory = torch.empty(num_classes * overlap * (width + tile), dtype=dtype).to(device)

    def blend(self, rows: Span, columns: Span, logits: Tensor) -> Tensor:
        """Return the final logits of a tile.

        Args:
            rows: Of the tile. Tiles come from the top to the bottom, and in each row from the left
                to the right.
            columns: Of the tile.
            logits: [C, h, w], of all that the network saw; changed in place.

        Returns:
            [C, rows.start to rows.final, columns.start to columns.final], a view of `logits`.
        """
        lower_edge, right_edge = self._edges(rows.end - rows.start, logits.dtype)
        logits = logits[:, rows.start - rows.read :, columns.start - columns.read :]
        if columns.start > 0:
            _fade(right_edge, logits[..., : self.overlap], self.fade_in)
        if columns.final < columns.end:
            right_edge.copy_(logits[..., -self.overlap :])
        logits = logits[..., : columns.final - columns.start]
        if rows.start > 0:
            before = lower_edge[..., columns.start : columns.final]
            _fade(before, logits[:, : self.overlap], self.fade_in[:, None])
        if rows.final < rows.end:
            lower_edge[..., columns.start : columns.final] = logits[:, -self.overlap :]
        return logits[:, : rows.final - rows.start]

    def _edges(self, height: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        memory, size = self.memory.view(dtype), self.num_classes * self.overlap * self.width
        lower = memory[:size].view(self.num_classes, self.overlap, self.width)
        right = memory[size:][: self.num_classes * height * self.overlap]
        return lower, right.view(self.num_classes, height, self.overlap)


def _fade(before: Tensor, after: Tensor, share: Tensor) -> None:
    """Fade from the logits of one tile to those of the next, in which the result is written."""
    after.copy_(torch.lerp(before.float(), after.float(), share))

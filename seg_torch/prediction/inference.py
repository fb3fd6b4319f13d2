"""The one way from images to class ids at the size of the labels.

Validation, test, evaluate.py, predict.py, Segmenter and the sample sheets all use `Inference`, so
at one precision and batch size they decide every pixel alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seg_torch import hardware
from seg_torch.errors import InputError
from seg_torch.images.resize import Resize, in_words, resize_image
from seg_torch.labels import IGNORE_INDEX
from seg_torch.models.network import Network
from seg_torch.prediction.tiles import CrossFade, spans
from seg_torch.upsample import upsample, upsampled_chunks

DEFAULT_TILE = 768


class Block(NamedTuple):
    """The logits of a rectangle of one image.

    Attributes:
        image: Its index in the batch.
        rows: Of the label that the block covers.
        columns: Of the label that the block covers.
        logits: [C, rows, columns]; float32 unless the network gave them at this size.
    """

    image: int
    rows: slice
    columns: slice
    logits: Tensor


@dataclass(frozen=True)
class InferenceSettings:
    """How images go through a network.

    Attributes:
        tile: Side of the tiles in pixels, a multiple of 32; `None` for whole images whatever their
            size; `"auto"` for tiles of 768 where the whole might take more than a quarter of the
            device's memory.
        scales: The network sees each image at these multiples of its size, and the probabilities
            are averaged.
        flip: The network sees each image mirrored, too, and the probabilities are averaged.
        precision: `"32-true"`, `"bf16-mixed"`, `"16-mixed"`, or `"auto"` for the fastest that the
            network's device is good at.

    Raises:
        InputError: An impossible tile or scale.
    """

    tile: int | Literal["auto"] | None = "auto"
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    precision: str = "auto"

    def __post_init__(self) -> None:
        tile, scales = self.tile, self.scales
        if tile not in ("auto", None) and (not isinstance(tile, int) or tile < 64 or tile % 32):
            raise InputError(f"tile={tile}: expected auto, null or a multiple of 32, 64 or more")
        if not scales or not all(0 < scale < math.inf for scale in scales):  # nan is neither
            raise InputError(f"tta scales {list(scales)}: expected numbers above 0")

    @classmethod
    def parse(cls, tile: Any, tta: Any, precision: str | int) -> InferenceSettings:
        """Return the settings as the user writes them.

        Args:
            tile: As above.
            tta: Test-time augmentation: `flip`, factors, or both, such as `[flip, 0.75, 1.0]` or
                "flip,0.75,1.0"; or `None`.
            precision: As above; or a number, such as 32.

        Raises:
            InputError: Something else.
        """
        if isinstance(tta, str | float | int):
            tta = str(tta).replace(" ", "").split(",")
        words = list(tta or [])
        try:
            scales = [float(word) for word in words if word != "flip"] or [1.0]
        except ValueError:
            raise InputError(
                f"tta={tta}: expected flip, factors, or both, such as tta=[flip,0.75,1.0,1.25]"
            ) from None
        return cls(tile, scales, "flip" in words, str(precision))


class Inference:
    """Turns images into logits at the size of their labels.

    An image goes through the network whole where it fits into memory, else in overlapping tiles
    whose logits are cross-faded; then memory depends on the tile, the width of the image and the
    number of classes, but not on its height.

    Args:
        network: Images to logits. Where it is, and in which mode, stays as it is.
        num_classes: Number of classes C.
        resize: At which size the network is given images, see
            `seg_torch.images.resize.seen_size`; unless it is their own they are never tiled.
        settings: How images go through the network.

    Raises:
        InputError: An unknown precision, or a tile where there is nothing to tile.
    """

    def __init__(
        self,
        network: Network,
        num_classes: int,
        resize: Resize = None,
        settings: InferenceSettings = InferenceSettings(),
    ) -> None:
        if isinstance(settings.tile, int) and resize is not None:
            raise InputError(
                f"tile={settings.tile}: this network sees every image {in_words(resize)}, as in "
                "training, so there is nothing to tile; leave tile=auto"
            )
        self.network = network
        self.num_classes = num_classes
        self.resize = resize
        self.tile = settings.tile if resize is None else None
        self.scales, self.flip = tuple(settings.scales), settings.flip
        self._precision = hardware.resolve_precision(settings.precision, self.device.type)

    @property
    def precision(self) -> str:
        """What the network computes in: the type of its weights, unless that is float32."""
        names = {dtype: name for name, dtype in hardware.TRUE_PRECISIONS.items()}
        return names.get(self.network.mean.dtype, self._precision)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.network.mean.device

    def autocast(self) -> AbstractContextManager:
        """Return the context in which the network runs.

        Entered around many images, it keeps the weights that it has cast from one to the next.
        """
        return hardware.autocast(self.precision, self.device.type)

    def batch_size(self, height: int, width: int) -> int:
        """How many images of one size go through the network together.

        A CPU is as fast with one at a time, which leaves its cache less to hold.
        """
        return 1 if self.device.type == "cpu" else max(1, min(16, self._fitting(height, width)))

    def blocks(self, images: Tensor, size: Sequence[int]) -> Iterator[Block]:
        """Yield the logits of every pixel of every image, once.

        Args:
            images: uint8 [N, C, h, w], or float32 of 0 to 255, on any device.
            size: (height, width) of the labels; that of the images where they may be tiled.
        """
        height, width = images.shape[-2:]
        tile = self._tile(height, width)
        if tile is not None:
            for index, image in enumerate(images):
                yield from self._tiled(index, image, tile)
            return
        together = self.batch_size(height, width)
        for start in range(0, len(images), together):
            logits = self._logits(images[start : start + together])
            for index, rows, values in upsampled_chunks(logits, size):
                yield Block(start + index, rows, slice(0, size[1]), values)

    def _tiled(self, index: int, image: Tensor, tile: int) -> Iterator[Block]:
        """Yield the blocks of one image, tile by tile."""
        hardware.return_memory()  # of reading an image of hundreds of megabytes
        height, width = image.shape[-2:]
        overlap = max(32, tile // 8 // 32 * 32)
        dtype = torch.promote_types(torch.float32, self.network.mean.dtype)
        # Made before the network's tensors, whose memory would else be split in two.
        edges = CrossFade(self.num_classes, width, tile, overlap, dtype, self.device)
        for rows in spans(height, tile, overlap):
            # What tiles free is soon in pieces. To do this for each would take a seventh longer.
            hardware.return_memory()
            row, columns = image[:, rows.read : rows.end], spans(width, tile, overlap)
            tiles = self._tile_logits([row[..., span.read : span.end] for span in columns])
            for span in columns:
                covered = index, slice(rows.start, rows.final), slice(span.start, span.final)
                # The logits have no name, and do not come from a zip, which would keep them beside
                # what the network makes of the next tile.
                yield Block(*covered, edges.blend(rows, span, next(tiles)))
        del edges
        hardware.return_memory()  # before the whole image is drawn

    def _tile_logits(self, windows: Sequence[Tensor]) -> Iterator[Tensor]:
        """Logits [C, h, w] of each window; those of one size go through together."""
        for size, group in groupby(windows, lambda window: window.shape[-2:]):
            alike = list(group)
            together = self.batch_size(*size)
            for start in range(0, len(alike), together):
                batch = list(self._logits(torch.stack(alike[start : start + together])))
                while batch:
                    # What is faded is written to: a copy, where upsampling has not made one. The
                    # source is not kept beside it.
                    made = batch[0].shape[-2:] != size
                    yield upsample(batch.pop(0)[None], size)[0] if made else batch.pop(0).clone()

    def _logits(self, images: Tensor) -> Tensor:
        """Images uint8 [N, 3, h, w] -> logits [N, C, ...] at the network's own resolution."""
        images = hardware.to_device(images, self.device)
        with self.autocast():
            if self.scales == (1.0,) and not self.flip:
                return self.network(images)["out"]
            size = images.shape[-2:]
            total = torch.zeros((), device=self.device)
            for scale in self.scales:
                view = images
                if scale != 1:
                    view = resize_image(images, [max(1, round(side * scale)) for side in size])
                total = total + upsample(self.network(view)["out"], size).softmax(1)
                if self.flip:
                    mirrored = upsample(self.network(view.flip(-1))["out"], size)
                    total = total + mirrored.softmax(1).flip(-1)
        mean = total / (len(self.scales) * (2 if self.flip else 1))
        # Probabilities of 0 would be logits of minus infinity, which cannot be faded.
        return mean.clamp_min(1e-30).log()

    def _tile(self, height: int, width: int) -> int | None:
        """Return the side of the tiles for an image of this size, `None` for the whole of it."""
        if self.tile == "auto":
            return None if self._fitting(height, width) else DEFAULT_TILE
        return None if self.tile is None or max(height, width) <= self.tile else self.tile

    def _fitting(self, height: int, width: int) -> int:
        """How many images of one size fit into a quarter of the device's memory.

        The bytes per pixel are an estimate on the safe side: DeepLabv3-ResNet50 in float32 takes
        670 on a CPU. The logits at label size come one image at a time.
        """
        bytes_per_pixel = 1000 * max(self.scales) ** 2 + 8 * self.num_classes
        return int(hardware.total_memory(self.device) / 4 / (height * width * bytes_per_pixel))


def decide(
    logits: Tensor,
    confidence: bool = False,
    probabilities: Tensor | None = None,
    confidence_map: Tensor | None = None,
    min_confidence: float = 0.0,
    missing: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the most probable class of every pixel.

    On a CPU it goes through chunks of rows whose logits stay in its cache.

    Args:
        logits: [C, h, w] of any floating type.
        confidence: Also sum the probabilities of the chosen classes.
        probabilities: float16 [C, h, w]; the softmax is written to it.
        confidence_map: uint8 [h, w]; the probability of the chosen class is written to it, in
            steps of 1/255.
        min_confidence: Pixels whose class has a lower probability become `IGNORE_INDEX`.
        missing: bool [h, w]; where the image has no data. There the class is `IGNORE_INDEX`, and
            all probabilities are 0.

    Returns:
        Class ids, uint8 [h, w], and the float32 sum over the pixels of the probability of the
        class that was chosen (0 if it was not asked for).
    """
    classes, height, width = logits.shape
    on_cpu = logits.device.type == "cpu"
    ids = torch.empty(height, width, dtype=torch.uint8, device=logits.device)
    total = torch.zeros((), device=logits.device)
    most = hardware.CACHE_VALUES if on_cpu else logits.numel()
    for rows in hardware.row_chunks(height, classes * width, most):
        # Rows first: then classes are compared, and added up, for many pixels at a time.
        values = logits[:, rows].movedim(0, 1).to(torch.float32).contiguous()
        ids[rows] = _argmax_on_cpu(values) if on_cpu else values.argmax(1)
        if confidence or min_confidence or probabilities is not None or confidence_map is not None:
            log_probabilities = values.log_softmax(1)
            highest = log_probabilities.amax(1).exp_()
            if missing is not None:
                highest.masked_fill_(missing[rows], 0)
            total += highest.sum()
            if min_confidence:
                ids[rows].masked_fill_(highest < min_confidence, IGNORE_INDEX)
            if confidence_map is not None:
                confidence_map[rows] = highest.mul_(255).round_()
            if probabilities is not None:
                probabilities[:, rows] = log_probabilities.exp_().movedim(1, 0)
        if missing is not None:
            ids[rows].masked_fill_(missing[rows], IGNORE_INDEX)
            if probabilities is not None:
                probabilities[:, rows].masked_fill_(missing[rows], 0)
    return ids, total


def _argmax_on_cpu(logits: Tensor) -> Tensor:
    """`argmax` over the classes of [h, C, w] -> [h, w].

    Pooling finds the same indices, many pixels at a time, in a sixth of the time.
    """
    pixels_as_channels = logits[:, :, None].permute(0, 3, 1, 2)  # [h, w, C, 1]
    _, ids = F.max_pool2d(pixels_as_channels, (logits.shape[1], 1), return_indices=True)
    return ids.view(len(logits), -1)

"""Segmenter: a network that labels pictures. Segmentation: one result that can draw itself."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from seg_torch import checkpoint, hardware
from seg_torch.coco import coco_annotations, write_coco
from seg_torch.datasets.voc import VOC_LABELS
from seg_torch.errors import InputError
from seg_torch.files import write_atomically
from seg_torch.images import read_image, upright_rgb
from seg_torch.labels import Labels, decode_segmap, palette_image
from seg_torch.models import deeplabv3, fcn
from seg_torch.models.network import Network, enlarge_rows
from seg_torch.transforms import resize_image
from seg_torch.visualize import legend, overlay, side_by_side

# What can be saved of one picture, and the format it is saved in.
SUFFIXES = {
    "mask": ".png",
    "colour": ".png",
    "overlay": ".jpg",
    "probabilities": ".npz",
    "coco": ".json",
    "side_by_side": ".jpg",
}
JPEG_QUALITY = 92

# Logits that are decided together. A band that stays in the processor's cache is decided several
# times as fast as a whole picture; a GPU wants enough to be busy.
BAND = {"cpu": 1 << 19}
BAND_ELSEWHERE = 1 << 26

DEFAULT_TILE = 1024


@dataclass(frozen=True, eq=False)
class Segmentation:
    """One labelled picture.

    Attributes:
        mask: class ids, uint8 [H, W], at the size of the picture.
        labels: the classes.
        image: the picture, RGB, uint8 [H, W, 3], upright.
        confidence: the probability of the class that was chosen, averaged over the pixels.
        scores: probabilities of all classes, float16 [C, H, W], where they were asked for.
    """

    mask: np.ndarray
    labels: Labels
    image: np.ndarray
    confidence: float = math.nan
    scores: np.ndarray | None = None

    def probabilities(self) -> np.ndarray:
        """Of every class at every pixel, float16 [C, H, W].

        Raises:
            InputError: they were not asked for. For a large picture they are gigabytes.
        """
        if self.scores is None:
            raise InputError("ask for them: segmenter.predict(photo, probabilities=True)")
        return self.scores

    def colour(self) -> Image.Image:
        """The mask in the colours of its classes."""
        return Image.fromarray(decode_segmap(self.mask, self.labels))

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """The colours laid over the picture, with weight `alpha`."""
        return overlay(self.image, self.mask, self.labels, alpha)

    def legend(self) -> Image.Image:
        """Colours and names of the classes that occur."""
        return legend(self.labels, [i for i, n in enumerate(self._pixels()) if n])

    def side_by_side(self) -> Image.Image:
        """The picture beside its overlay, with a legend."""
        return side_by_side(self.image, {"prediction": (self.mask, self.labels)})

    def areas(self) -> dict[str, float]:
        """Share of the pixels by class name, for all classes."""
        total = max(1, self.mask.size)
        return {name: n / total for name, n in zip(self.labels.names, self._pixels(), strict=True)}

    def coco(self) -> list[dict[str, Any]]:
        """Return COCO annotations, one for each class that occurs: see `seg_torch.coco`."""
        return coco_annotations(self.mask)

    def save(
        self,
        folder: str | Path,
        name: str | Path = "image",
        outputs: Sequence[str] = ("mask", "overlay"),
    ) -> None:
        """Writes `<folder>/<output>/<name>.<suffix>` for each of `outputs`.

        Args:
            folder: where to; made if need be.
            name: of the picture, without a suffix; may contain folders.
            outputs: `mask` (PNG of class ids with the palette, and the names as text), `colour`
                (RGB PNG), `overlay` (JPEG), `probabilities` (compressed npz, float16),
                `coco` (COCO JSON) and `side_by_side` (JPEG).

        Raises:
            InputError: there is no such output, or there are no probabilities.
            OSError: a file cannot be written.
        """
        for output in outputs:
            if output not in SUFFIXES:
                raise InputError(f"there is no output {output!r}: choose of {', '.join(SUFFIXES)}")
            path = Path(folder, output, f"{name}{SUFFIXES[output]}")
            if output == "mask":
                write_atomically(path, self._save_mask)
            elif output == "probabilities":
                write_atomically(path, self._save_probabilities)
            elif output == "coco":
                height, width = self.mask.shape
                images = [(str(name), width, height, self.coco())]
                write_atomically(path, partial(write_coco, images=images, labels=self.labels))
            elif output == "colour":
                write_atomically(path, self.colour().save)
            else:
                picture = self.overlay() if output == "overlay" else self.side_by_side()
                write_atomically(path, partial(picture.save, quality=JPEG_QUALITY))

    def _save_mask(self, path: str) -> None:
        mask = palette_image(self.mask, self.labels)
        text = PngInfo()
        text.add_itxt("names", json.dumps(self.labels.names, ensure_ascii=False))
        # zlib's Z_RLE: masks are runs of one value, which take it a third of the usual time.
        mask.save(path, pnginfo=text, compress_type=3)

    def _save_probabilities(self, path: str) -> None:
        names = np.array(self.labels.names)
        np.savez_compressed(path, probabilities=self.probabilities(), names=names)

    def _pixels(self) -> list[int]:
        """Of each class. Pillow's histogram takes no memory; NumPy's takes eight bytes a pixel."""
        return Image.fromarray(self.mask).histogram()[: len(self.labels)]

    def _repr_png_(self) -> bytes | None:
        return self.overlay()._repr_png_()


class Segmenter:
    """Labels pictures with a network.

    Small pictures go through the network whole. Large ones go through it in overlapping tiles,
    whose logits are cross-faded; they are decided tile by tile, so that memory depends on the size
    of a tile, the width of the picture and the number of classes, but not on its height.

    Args:
        network: images to logits.
        labels: its classes.
        resize: (height, width) at which the network sees pictures; `None` for their own size.
        device: where to run; by default the best there is.
        tile: side of the tiles in pixels, a multiple of 32; `None` for whole pictures whatever
            their size; `"auto"` for tiles of 1,024 where the whole might take more than a quarter
            of the device's memory.
        scales: the network sees each picture at these multiples of its size, and the probabilities
            are averaged.
        flip: the network sees each picture mirrored, too, likewise.

    Raises:
        InputError: a tile or a scale that cannot be.
    """

    def __init__(
        self,
        network: Network,
        labels: Labels,
        resize: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        tile: int | Literal["auto"] | None = "auto",
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> None:
        if tile not in ("auto", None) and (not isinstance(tile, int) or tile < 64 or tile % 32):
            raise InputError(f"tile={tile}: expected auto, null or a multiple of 32, 64 or more")
        if isinstance(tile, int) and resize is not None:
            raise InputError(
                f"tile={tile}: this network sees every picture at {tuple(resize)}, as in training, "
                "so there is nothing to tile; leave tile=auto"
            )
        if not scales or min(scales) <= 0:
            raise InputError(f"scales {list(scales)}: expected numbers above 0")
        self.device = hardware.best_device() if device is None else torch.device(device)
        self.network = network.to(self.device).eval()
        self.labels = labels
        self.resize = resize
        self.tile = tile
        self.scales = tuple(scales)
        self.flip = flip
        self._memory = hardware.total_memory(self.device) / 4

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        trust: Sequence[str] = (),
        **settings: Any,
    ) -> Segmenter:
        """From a checkpoint that `train.py` wrote.

        Args:
            path: of the checkpoint.
            device: where to run; by default the best there is.
            trust: packages besides seg_torch's own from which the model may come.
            settings: `tile`, `scales` and `flip` of the constructor.

        Raises:
            InputError: no checkpoint of seg_torch, or a model from a package that is not trusted.
        """
        content = checkpoint.read(path)
        network, labels = checkpoint.build_network(content, trust)
        resize = content[checkpoint.KEY]["preprocessing"]["resize"]
        return cls(network, labels, resize, device, **settings)

    @classmethod
    def pretrained(
        cls,
        model: str = "deeplabv3",
        backbone: str = "resnet101",
        device: torch.device | str | None = None,
        **settings: Any,
    ) -> Segmenter:
        """With the weights that torchvision publishes, for the 21 classes of PASCAL VOC.

        Args:
            model: `deeplabv3` or `fcn`.
            backbone: `resnet50`, `resnet101` or, of DeepLabv3, `mobilenet_v3_large`.
            device: where to run; by default the best there is.
            settings: `tile`, `scales` and `flip` of the constructor.

        Raises:
            InputError: there is no such model, or its weights cannot be had.
        """
        builders = {"deeplabv3": deeplabv3, "fcn": fcn}
        if model not in builders:
            raise InputError(f"no pretrained {model!r}: there are {' and '.join(builders)}")
        network = Network(builders[model](len(VOC_LABELS), backbone))
        return cls(network, VOC_LABELS, device=device, **settings)

    def predict(
        self,
        image: str | Path | Image.Image | np.ndarray | Tensor,
        probabilities: bool = False,
    ) -> Segmentation:
        """Labels every pixel of one picture.

        Args:
            image: a path, a Pillow image, an array uint8 [H, W, 3] or a tensor uint8 [3, H, W].
            probabilities: keep those of all classes, two bytes for each class and pixel.

        Raises:
            InputError: a file that cannot be read, or an array of another kind.
        """
        return self.predict_batch([image], probabilities)[0]

    @torch.no_grad()  # not inference_mode, which keeps autocast from caching the weights
    def predict_batch(
        self,
        images: Sequence[str | Path | Image.Image | np.ndarray | Tensor],
        probabilities: bool = False,
    ) -> list[Segmentation]:
        """Labels pictures of one size, which go through the network together.

        Convolutions round differently for another number of pictures, but not for other pictures:
        with batches of one length a result does not depend on what else is in its batch.

        Args:
            images: like those of `predict`.
            probabilities: as there.

        Raises:
            InputError: as there, or the pictures have several sizes.
        """
        if not images:
            return []
        photos = [_as_array(image) for image in images]
        sizes = sorted({photo.shape[:2] for photo in photos})
        if len(sizes) > 1:
            raise InputError(f"pictures of several sizes in one batch: {sizes}")
        height, width = sizes[0]
        tile = self._tile(height, width)
        if tile is not None:
            return [self._predict_tiled(photo, tile, probabilities) for photo in photos]
        results = []
        together = max(1, int(self._memory / self._memory_for(height, width)))
        for start in range(0, len(photos), together):
            some = photos[start : start + together]
            logits = self._logits(torch.cat([self._as_input(photo) for photo in some]))
            for i, photo in enumerate(some):
                mask, scores = self._empty(height, width, probabilities)
                total = _decide(logits[i : i + 1], mask, scores)
                results.append(self._result(photo, mask, scores, total))
        return results

    def _predict_tiled(self, photo: np.ndarray, tile: int, probabilities: bool) -> Segmentation:
        """Decides a picture tile by tile.

        A tile fades in over its first `overlap` rows and columns while the one before it fades
        out. Only what is still to be faded into the next tiles is kept: the right edge of the last
        tile, and the lower edge of the last row of tiles.
        """
        height, width = photo.shape[:2]
        mask, scores = self._empty(height, width, probabilities)
        overlap = max(32, tile // 8 // 32 * 32)
        ramp = (torch.arange(overlap, device=self.device) + 0.5) / overlap
        fade_in = 0.5 - 0.5 * torch.cos(torch.pi * ramp)
        lower_edge = torch.empty(len(self.labels), overlap, width, device=self.device)
        total = 0.0
        for read_top, top, bottom in _spans(height, tile, overlap):
            end_row = bottom if bottom == height else bottom - overlap
            right_edge = torch.empty(0)  # there is nothing to the left of the first tile
            for read_left, left, right in _spans(width, tile, overlap):
                end_column = right if right == width else right - overlap
                window = photo[read_top:bottom, read_left:right]
                logits = self._logits(self._as_input(window))
                logits = enlarge_rows(logits, window.shape[:2], 0, window.shape[0]).float()
                logits = logits[0, :, top - read_top :, left - read_left :]
                if left > 0:
                    logits[..., :overlap] = torch.lerp(right_edge, logits[..., :overlap], fade_in)
                right_edge = logits[..., -overlap:].clone()
                logits = logits[..., : end_column - left]
                columns = slice(left, end_column)
                if top > 0:
                    logits[:, :overlap] = torch.lerp(
                        lower_edge[..., columns], logits[:, :overlap], fade_in[:, None]
                    )
                if bottom < height:
                    lower_edge[..., columns] = logits[:, -overlap:]
                total += _decide(
                    logits[None, :, : end_row - top],
                    mask[top:end_row, columns],
                    None if scores is None else scores[:, top:end_row, columns],
                )
        return self._result(photo, mask, scores, total)

    def _logits(self, images: Tensor) -> Tensor:
        """Pictures uint8 [N, 3, h, w] -> logits [N, C, ...], at the network's own resolution."""
        with hardware.autocast(self.device):
            if self.scales == (1.0,) and not self.flip:
                return self.network(images)["out"]
            size = images.shape[-2:]
            total: Tensor | float = 0.0
            for scale in self.scales:
                view = images
                if scale != 1:
                    view = resize_image(images, [max(1, round(side * scale)) for side in size])
                probabilities = self.network.logits(view, size).softmax(1)
                if self.flip:
                    mirrored = self.network.logits(view.flip(-1), size).softmax(1)
                    probabilities = probabilities + mirrored.flip(-1)
                total = total + probabilities
        assert isinstance(total, Tensor)
        mean = total / (len(self.scales) * (2 if self.flip else 1))
        # Probabilities of 0 would be logits of minus infinity, which cannot be faded.
        return mean.clamp_min(1e-30).log()

    def _as_input(self, photo: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> uint8 [1, 3, h, w] at the size that the network is to see."""
        image = torch.from_numpy(photo).permute(2, 0, 1)
        if self.resize is not None:
            image = resize_image(image.contiguous(), self.resize)  # as the data module does it
        return image[None].to(self.device)

    def _tile(self, height: int, width: int) -> int | None:
        """The side of the tiles for a picture of this size, `None` for the whole of it."""
        if self.tile is None or self.resize is not None:
            return None
        if self.tile == "auto":
            return None if self._memory_for(height, width) <= self._memory else DEFAULT_TILE
        return None if max(height, width) <= self.tile else self.tile

    def _memory_for(self, height: int, width: int) -> float:
        """An estimate, in bytes, of what the network needs for one picture."""
        height, width = (height, width) if self.resize is None else self.resize
        return height * width * max(self.scales) ** 2 * (1000 + 8 * len(self.labels))

    def _empty(self, height: int, width: int, probabilities: bool) -> tuple[Tensor, Tensor | None]:
        mask = torch.empty(height, width, dtype=torch.uint8)
        if not probabilities:
            return mask, None
        return mask, torch.empty(len(self.labels), height, width, dtype=torch.float16)

    def _result(
        self, photo: np.ndarray, mask: Tensor, scores: Tensor | None, total: float
    ) -> Segmentation:
        confidence = total / max(1, mask.numel())
        kept = None if scores is None else scores.numpy()
        return Segmentation(mask.numpy(), self.labels, photo, confidence, kept)


def _decide(logits: Tensor, mask: Tensor, scores: Tensor | None) -> float:
    """Writes the most probable class of every pixel into `mask`, band by band.

    Args:
        logits: [1, C, h, w], brought to the size of the mask.
        mask: uint8 [H, W], written to.
        scores: float16 [C, H, W] or `None`; the probabilities are written to it.

    Returns:
        The sum, over the pixels, of the probability of the chosen class.
    """
    height, width = mask.shape
    classes = logits.shape[1]
    band = BAND.get(logits.device.type, BAND_ELSEWHERE)
    rows = min(height, max(1, band // (classes * max(1, width))))
    # The same memory for every band, so that it stays in the cache.
    values, log_probabilities = torch.empty(2, rows, classes, width, device=logits.device)
    total = 0.0
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        if bottom - top < rows:
            values, log_probabilities = values[: bottom - top], log_probabilities[: bottom - top]
        values.copy_(enlarge_rows(logits, mask.shape, top, bottom)[0].movedim(0, 1))
        mask[top:bottom] = _most_probable(values)
        torch.log_softmax(values, 1, out=log_probabilities)
        total += log_probabilities.amax(1).exp_().sum().item()
        if scores is not None:
            scores[:, top:bottom] = log_probabilities.exp_().movedim(1, 0)
    return total


def _most_probable(logits: Tensor) -> Tensor:
    """`argmax` over the classes of [h, C, w] -> [h, w]."""
    if logits.device.type != "cpu":
        return logits.argmax(1)
    # On a processor pooling finds the same indices, and many pixels at a time: 6 times as fast.
    pixels_as_channels = logits[:, :, None].permute(0, 3, 1, 2)  # [h, w, C, 1]
    _, ids = F.max_pool2d(pixels_as_channels, (logits.shape[1], 1), return_indices=True)
    return ids.view(len(logits), -1)


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int, int]]:
    """(read from, use from, end) of the tiles along one side, in order.

    Neighbours share `overlap` pixels. The last tile reads back further than it is used, so that
    the network sees as much around it as around the others; all begin at multiples of 32, where
    the strides of the network begin, too.
    """
    spans = []
    for start in range(0, max(1, length - overlap), tile - overlap):
        end = min(start + tile, length)
        spans.append((min(start, max(0, (end - tile) // 32 * 32)), start, end))
    return spans


def _as_array(image: Any) -> np.ndarray:
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return np.array(upright_rgb(image))
    if isinstance(image, Tensor):
        image = image.permute(1, 2, 0).cpu().numpy()
    array = np.require(image, requirements=["C", "W"])  # torch warns of arrays that are read-only
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise InputError(
            f"the image is {array.dtype} {array.shape}: expected uint8 [H, W, 3] as an array, "
            "uint8 [3, H, W] as a tensor"
        )
    return array

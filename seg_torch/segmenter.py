"""Segmenter: a checkpoint that predicts. Segmentation: one result that can draw itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from seg_torch import checkpoint, hardware
from seg_torch.errors import InputError
from seg_torch.images import read_image, upright_rgb, write_atomically
from seg_torch.labels import Labels, decode_segmap
from seg_torch.models.network import Network
from seg_torch.transforms import resize_image
from seg_torch.visualize import legend, overlay


@dataclass(frozen=True, eq=False)
class Segmentation:
    """One labelled picture.

    Attributes:
        mask: class ids, uint8 [H, W], at the size of the picture.
        labels: the classes.
        image: the picture, RGB, uint8 [H, W, 3], upright.
    """

    mask: np.ndarray
    labels: Labels
    image: np.ndarray

    def colour(self) -> Image.Image:
        """The mask in the colours of its classes."""
        return Image.fromarray(decode_segmap(self.mask, self.labels))

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """The colours laid over the picture, with weight ``alpha``."""
        return overlay(self.image, self.mask, self.labels, alpha)

    def legend(self) -> Image.Image:
        """Colours and names of the classes that occur."""
        return legend(self.labels, np.unique(self.mask).tolist())

    def save(self, folder: str | Path, name: str | Path = "image") -> None:
        """Writes ``mask/<name>.png`` (class ids, with palette) and ``overlay/<name>.jpg``."""
        mask = Image.fromarray(self.mask)
        mask.putpalette(self.labels.palette.tobytes())
        write_atomically(Path(folder, "mask", f"{name}.png"), lambda path: mask.save(path))
        picture = self.overlay()
        write_atomically(
            Path(folder, "overlay", f"{name}.jpg"), lambda path: picture.save(path, quality=92)
        )

    def _repr_png_(self) -> bytes | None:
        return self.overlay()._repr_png_()


class Segmenter:
    """Predicts with a network.

    Args:
        network: images to logits.
        labels: its classes.
        resize: (height, width) at which the network sees images; ``None`` for their own size.
        device: where to run; by default the best there is.
    """

    def __init__(
        self,
        network: Network,
        labels: Labels,
        resize: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.device = hardware.best_device() if device is None else torch.device(device)
        self.network = network.to(self.device).eval()
        self.labels = labels
        self.resize = resize

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        trust: Sequence[str] = (),
    ) -> Segmenter:
        """From a checkpoint that ``train.py`` wrote.

        Args:
            path: of the checkpoint.
            device: where to run; by default the best there is.
            trust: packages besides seg_torch's own from which the model may come.

        Raises:
            InputError: no checkpoint of seg_torch, or a model from a package that is not trusted.
        """
        content = checkpoint.read(path)
        network, labels = checkpoint.build_network(content, trust)
        resize = content[checkpoint.KEY]["preprocessing"]["resize"]
        return cls(network, labels, resize, device)

    @torch.inference_mode()
    def predict(self, image: str | Path | Image.Image | np.ndarray | torch.Tensor) -> Segmentation:
        """Labels every pixel of one picture.

        Args:
            image: a path, a Pillow image, an array uint8 [H, W, 3] or a tensor uint8 [3, H, W].

        Raises:
            InputError: a file that cannot be read, or an array of another kind.
        """
        photo = _as_array(image)
        tensor = torch.from_numpy(photo).permute(2, 0, 1).contiguous()
        if self.resize is not None:
            tensor = resize_image(tensor, self.resize)
        with hardware.autocast(self.device):
            logits = self.network.logits(tensor[None].to(self.device), photo.shape[:2])
        mask = logits.argmax(1)[0].to("cpu", torch.uint8).numpy()
        return Segmentation(mask, self.labels, photo)


def _as_array(image: Any) -> np.ndarray:
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return np.array(upright_rgb(image))
    if isinstance(image, torch.Tensor):
        image = image.permute(1, 2, 0).cpu().numpy()
    array = np.ascontiguousarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise InputError(
            f"the image is {array.dtype} {array.shape}: expected uint8 [H, W, 3] as an array, "
            "uint8 [3, H, W] as a tensor"
        )
    return array

"""What can be saved of the segmentation of an image, and in which form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from seg_torch.drawing.regions import write_coco, write_polygons
from seg_torch.drawing.visualize import save_overlay
from seg_torch.errors import InputError
from seg_torch.images.geotiff import write_geotiff

if TYPE_CHECKING:
    from seg_torch.prediction.segmentation import Segmentation

JPEG_QUALITY = 92


class Output(NamedTuple):
    """A form in which a segmentation is saved.

    Attributes:
        suffix: Of the file.
        write: Is given the segmentation, the name of the image, and the path.
        folder: Below the folder of all outputs; by default named like the output.
    """

    suffix: str
    write: Callable[[Segmentation, str, str], object]
    folder: str = ""


def output_path(folder: str | Path, output: str, name: str) -> Path:
    """Return where an output of the image of this name is saved."""
    return Path(folder, OUTPUTS[output].folder or output, f"{name}{OUTPUTS[output].suffix}")


def _write_overlay(result: Segmentation, name: str, path: str) -> None:
    save_overlay(path, result.image, result.mask, result.labels, JPEG_QUALITY)


def _write_probabilities(result: Segmentation, name: str, path: str) -> None:
    names = np.array(result.labels.names)
    np.savez_compressed(path, probabilities=result.probabilities(), names=names)


def _write_confidence(result: Segmentation, name: str, path: str) -> None:
    if result.confidence_map is None:
        raise InputError("ask for it: segmenter.predict(image, confidence_map=True)")
    Image.fromarray(result.confidence_map).save(path)


def _write_coco(result: Segmentation, name: str, path: str) -> None:
    height, width = result.mask.shape
    write_coco(path, [(name, width, height, result.coco())], result.labels)


def _write_side_by_side(result: Segmentation, name: str, path: str) -> None:
    result.side_by_side().save(path, quality=JPEG_QUALITY)


def _write_geotiff(result: Segmentation, name: str, path: str) -> None:
    write_geotiff(result.mask, result.labels, result.file(), path)


OUTPUTS = {
    "mask": Output(".png", lambda r, name, path: r.save_mask(path)),
    "colour": Output(".png", lambda r, name, path: r.colour().save(path)),
    "overlay": Output(".jpg", _write_overlay),
    "probabilities": Output(".npz", _write_probabilities),
    "confidence": Output(".png", _write_confidence),
    "coco": Output(".json", _write_coco),
    "polygons": Output(".geojson", lambda r, name, path: write_polygons(path, r.mask, r.labels)),
    "side_by_side": Output(".jpg", _write_side_by_side),
    "geotiff": Output(".tif", _write_geotiff),
    # Copies of the images lie in the folder "dataset/images".
    "dataset": Output(".png", lambda r, name, path: r.save_mask(path), "dataset/masks"),
}

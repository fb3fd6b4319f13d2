"""Segmentation: the result of one image, which can draw and save itself."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from seg_torch.drawing.regions import (
    coco_annotations,
    collection,
    polygon_features,
    write_coco,
    write_polygons,
)
from seg_torch.drawing.visualize import legend, overlay, save_overlay, side_by_side
from seg_torch.errors import InputError
from seg_torch.files import write_atomically
from seg_torch.images.format import RGB, ImageFormat, as_tensor
from seg_torch.images.geotiff import SUFFIXES, place, write_geotiff
from seg_torch.images.missing import missing
from seg_torch.images.resize import resize_image, seen_size
from seg_torch.labels import Labels, decode_segmap, palette_image
from seg_torch.prediction.inference import Inference, decide

JPEG_QUALITY = 92


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The segmentation of one image.

    Attributes:
        mask: Class ids, uint8 [H, W], at the size of the image; 255 for pixels that are too
            uncertain (`min_confidence` of the `Segmenter`), and for those without data.
        labels: The classes.
        image: RGB, uint8 [H, W, 3], upright; of other images what is shown of them.
        confidence: The probability of the class that was chosen, averaged over the pixels that
            have data.
        scores: Probabilities of all classes, float16 [C, H, W], where they were asked for; 0 for
            pixels without data.
        confidence_map: The probability of the chosen class, uint8 [H, W] in steps of 1/255, where
            it was asked for.
        source: The file that the image was read from, the first one if it is several.
        format: How it was read.
        missing: Where the file says that there are no data (its no-data value, its mask, or wholly
            transparent), bool [H, W]; `None` where it says so of no pixel.
        compared: What `side_by_side` shows, by titles, where it is more than this segmentation.
    """

    mask: np.ndarray
    labels: Labels
    image: np.ndarray
    confidence: float = math.nan
    scores: np.ndarray | None = None
    confidence_map: np.ndarray | None = None
    source: Path | None = None
    format: ImageFormat = RGB
    missing: np.ndarray | None = None
    compared: Mapping[str, Segmentation] = field(default_factory=dict)

    def probabilities(self) -> np.ndarray:
        """Return the probability of every class at every pixel, float16 [C, H, W].

        Raises:
            InputError: They were not asked for. For a large image they are gigabytes.
        """
        if self.scores is None:
            raise InputError("ask for them: segmenter.predict(image, probabilities=True)")
        return self.scores

    def colour(self) -> Image.Image:
        """Draw the mask in the colours of its classes."""
        return Image.fromarray(decode_segmap(self.mask, self.labels.drawn))

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """Draw the colours over the image, with weight `alpha`."""
        return overlay(self.image, self.mask, self.labels, alpha)

    def legend(self) -> Image.Image:
        """Draw the colours and names of the classes that occur."""
        return legend(self.labels, [i for i, n in enumerate(self._pixels()) if n])

    def side_by_side(self) -> Image.Image:
        """Draw the image beside its overlay, or those of `compared`, with a legend."""
        compared = self.compared or {"prediction": self}
        masks = {title: (result.mask, result.labels) for title, result in compared.items()}
        return side_by_side(self.image, masks)

    def areas(self) -> dict[str, float]:
        """Return the share of the pixels that have data by class name, for all classes."""
        missing = 0 if self.missing is None else np.count_nonzero(self.missing)
        total = max(1, self.mask.size - missing)
        return {name: n / total for name, n in zip(self.labels.names, self._pixels(), strict=True)}

    def coco(self) -> list[dict[str, Any]]:
        """Return a COCO annotation of each class that occurs: see `seg_torch.drawing.regions`."""
        return coco_annotations(self.mask)

    def polygons(self) -> dict[str, Any]:
        """Return outlines as a GeoJSON FeatureCollection: see `seg_torch.drawing.regions`.

        Of a GeoTIFF that is a file they are in its coordinates on earth, else in pixels.

        Raises:
            InputError: The file cannot be read any more.
        """
        matrix, crs = self._place()
        features = list(polygon_features(self.mask, self.labels, matrix))
        return {**collection(crs), "features": features}

    def _place(self) -> tuple[Sequence[float] | None, str]:
        is_tiff = self.source is not None and self.source.suffix.lower() in SUFFIXES
        found = place(self.source) if self.source is not None and is_tiff else None
        return (None, "") if found is None else found

    def save(
        self,
        folder: str | Path,
        name: str | Path = "image",
        outputs: Sequence[str] = ("mask", "overlay"),
    ) -> None:
        """Write `<folder>/<output>/<name>.<suffix>` for each of `outputs`.

        Args:
            folder: Where to; made if need be.
            name: Of the image, without a suffix; may contain folders.
            outputs: `mask` (PNG of class ids with the palette, and the names as text), `colour`
                (RGB PNG), `overlay` (JPEG), `probabilities` (compressed npz, float16),
                `confidence` (grey PNG, 255 is certain), `coco` (COCO JSON), `polygons` (GeoJSON),
                `side_by_side` (JPEG); and of an image that was read from a file `geotiff` (class
                ids in its place on earth) and `dataset` (its mask, and a copy of it).

        Raises:
            InputError: There is no such output, it was not asked for in predicting, its file would
                replace that of the image, or no file can have so long a name.
            OSError: A file cannot be written.
        """
        for output in outputs:
            if output not in OUTPUTS:
                raise InputError(f"there is no output {output!r}: use {', '.join(OUTPUTS)}")
            self._check_place(output_path(folder, output, str(name)))
        for output in outputs:
            if output == "dataset":
                self._copy_image(Path(folder, output, "images"), str(name))
            write = partial(OUTPUTS[output].write, self, str(name))
            write_atomically(output_path(folder, output, str(name)), write)

    def _check_place(self, path: Path) -> None:
        """Refuse a path of an output that is the image's own, or that no file can have."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # without it no name is looked at
            same = self.source is not None and path.samefile(self.source)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                message = f"the name of its output is too long: {path.name}; rename the image"
                raise InputError(f"{self.source or path}: {message}") from None
            return
        if same:
            raise InputError(f"{path} is the image itself: save its outputs in another folder")

    def _copy_image(self, folder: Path, name: str) -> None:
        endings = self.format.files or [self.file().suffix]
        for file, ending in zip(self.format.paths(self.file()), endings, strict=True):
            write_atomically(folder / f"{name}{ending}", partial(shutil.copyfile, file))

    def save_mask(self, path: str | BinaryIO) -> None:
        """Write the mask alone: a PNG of class ids with the palette, and the names as text."""
        mask = palette_image(self.mask, self.labels)
        text = PngInfo()
        text.add_itxt("names", json.dumps(self.labels.names, ensure_ascii=False))
        # zlib's Z_RLE: masks are runs of one value, which take it a third of the usual time.
        mask.save(path, "PNG", pnginfo=text, compress_type=3)

    def file(self) -> Path:
        """Return the file that the image was read from.

        Raises:
            InputError: It was none.
        """
        if self.source is None:
            raise InputError("geotiff and dataset are of images that were read from a file")
        return self.source

    def _pixels(self) -> list[int]:
        """Count per class. Pillow's histogram takes no memory, NumPy's eight bytes per pixel."""
        return Image.fromarray(self.mask).histogram()[: len(self.labels)]

    def _repr_png_(self) -> bytes | None:
        return self.overlay()._repr_png_()


class Output(NamedTuple):
    """A form in which a segmentation is saved.

    Attributes:
        place: Of its file below the folder of all outputs; `{}` is the name of the image.
        write: Is given the segmentation, the name of the image, and the path.
    """

    place: str
    write: Callable[[Segmentation, str, str], object]


def output_path(folder: str | Path, output: str, name: str) -> Path:
    """Return where an output of the image of this name is saved."""
    return Path(folder, OUTPUTS[output].place.format(name))


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


def _write_polygons(result: Segmentation, name: str, path: str) -> None:
    write_polygons(path, result.mask, result.labels, *result._place())


def _write_side_by_side(result: Segmentation, name: str, path: str) -> None:
    result.side_by_side().save(path, quality=JPEG_QUALITY)


def _write_geotiff(result: Segmentation, name: str, path: str) -> None:
    write_geotiff(result.mask, result.labels, result.file(), path)


OUTPUTS = {
    "mask": Output("mask/{}.png", lambda r, name, path: r.save_mask(path)),
    "colour": Output("colour/{}.png", lambda r, name, path: r.colour().save(path)),
    "overlay": Output("overlay/{}.jpg", _write_overlay),
    "probabilities": Output("probabilities/{}.npz", _write_probabilities),
    "confidence": Output("confidence/{}.png", _write_confidence),
    "coco": Output("coco/{}.json", _write_coco),
    "polygons": Output("polygons/{}.geojson", _write_polygons),
    "side_by_side": Output("side_by_side/{}.jpg", _write_side_by_side),
    "geotiff": Output("geotiff/{}.tif", _write_geotiff),
    # Copies of the images lie in the folder "dataset/images".
    "dataset": Output("dataset/masks/{}.png", lambda r, name, path: r.save_mask(path)),
}


@torch.no_grad()  # not inference_mode, which keeps autocast from caching the weights
def segment(
    inference: Inference,
    labels: Labels,
    images: Sequence[np.ndarray],
    format: ImageFormat = RGB,
    min_confidence: float = 0.0,
    probabilities: bool = False,
    confidence_map: bool = False,
) -> list[Segmentation]:
    """Segment images of one size, which go through the network together.

    Args:
        inference: Of a network in evaluation mode.
        labels: Its classes.
        images: uint8 or uint16 [H, W, C], as of `format.read`; masked where there are no data.
        format: Of the images.
        min_confidence: Pixels whose class has a lower probability become 255.
        probabilities: Keep those of all classes, two bytes for each class and pixel.
        confidence_map: Keep that of the chosen class, a byte for each pixel.

    Raises:
        InputError: The images have several sizes.
    """
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) != 1:
        raise InputError(f"images of several sizes in one batch: {sizes}")
    size, count = sizes[0], len(images)
    views = [as_tensor(image) for image in images]
    batch = torch.stack(views) if count > 1 else views[0][None]  # may be large: no copy
    if inference.resize is not None:  # as the data module does it
        batch = resize_image(batch.contiguous(), seen_size(inference.resize, *size))
    masks = torch.empty(count, *size, dtype=torch.uint8)
    maps = torch.empty_like(masks) if confidence_map else None
    shape = count, len(labels), *size
    scores = torch.empty(shape, dtype=torch.float16) if probabilities else None
    totals = torch.zeros(count, device=inference.device)
    hidden = [missing(image) for image in images]
    holes: list[Any] = [None if hole is None else torch.from_numpy(hole) for hole in hidden]
    for index, rows, columns, logits in inference.blocks(batch, size):
        score_part = None if scores is None else scores[index, :, rows, columns]
        map_part = None if maps is None else maps[index, rows, columns]
        hole = None if holes[index] is None else holes[index][rows, columns].to(logits.device)
        ids, total = decide(logits, True, score_part, map_part, min_confidence, hole)
        masks[index, rows, columns] = ids
        totals[index] += total
        del logits  # not to be kept beside what the network makes of the next tile
    valid = [masks[0].numel() - (0 if hole is None else int(hole.sum())) for hole in holes]
    return [
        Segmentation(
            masks[i].numpy(),
            labels,
            format.shown(image),
            (totals[i] / max(1, valid[i])).item(),
            None if scores is None else scores[i].numpy(),
            None if maps is None else maps[i].numpy(),
            format=format,
            missing=hidden[i],
        )
        for i, image in enumerate(images)
    ]

"""Segmenter: a network that segments images. Segmentation: one result that can draw itself."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from seg_torch import hardware
from seg_torch.checkpoints import checkpoint
from seg_torch.checkpoints.exported import ExportedNetwork, load_network
from seg_torch.checkpoints.hub import hub
from seg_torch.checkpoints.publish import SCORES, upload, write_model
from seg_torch.datasets.published.voc import VOC_LABELS
from seg_torch.drawing.coco import coco_annotations, write_coco
from seg_torch.drawing.polygons import polygon_features, write_polygons
from seg_torch.drawing.visualize import legend, overlay, save_overlay, side_by_side
from seg_torch.errors import InputError
from seg_torch.files import write_atomically
from seg_torch.images.format import RGB, ImageFormat, as_tensor
from seg_torch.images.resize import resize_image
from seg_torch.labels import Labels, decode_segmap, palette_image
from seg_torch.models import deeplabv3, fcn
from seg_torch.models.network import Network
from seg_torch.prediction.inference import Inference, decide

# What can be saved of one image, and the format it is saved in.
SUFFIXES = {
    "mask": ".png",
    "colour": ".png",
    "overlay": ".jpg",
    "probabilities": ".npz",
    "confidence": ".png",
    "coco": ".json",
    "polygons": ".geojson",
    "side_by_side": ".jpg",
}
JPEG_QUALITY = 92


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The segmentation of one image.

    Attributes:
        mask: Class ids, uint8 [H, W], at the size of the image; 255 for pixels that are too
            uncertain (`unknown` of the `Segmenter`).
        labels: The classes.
        image: RGB, uint8 [H, W, 3], upright; of other images what is shown of them.
        confidence: The probability of the class that was chosen, averaged over the pixels.
        scores: Probabilities of all classes, float16 [C, H, W], where they were asked for.
        confidence_map: The probability of the chosen class, uint8 [H, W] in steps of 1/255, where
            it was asked for.
    """

    mask: np.ndarray
    labels: Labels
    image: np.ndarray
    confidence: float = math.nan
    scores: np.ndarray | None = None
    confidence_map: np.ndarray | None = None

    def probabilities(self) -> np.ndarray:
        """Return the probability of every class at every pixel, float16 [C, H, W].

        Raises:
            InputError: They were not asked for. For a large image they are gigabytes.
        """
        if self.scores is None:
            raise InputError("ask for them: segmenter.predict(image, probabilities=True)")
        return self.scores

    def colour(self) -> Image.Image:
        """Draws the mask in the colours of its classes."""
        return Image.fromarray(decode_segmap(self.mask, self.labels))

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """Draws the colours over the image, with weight `alpha`."""
        return overlay(self.image, self.mask, self.labels, alpha)

    def legend(self) -> Image.Image:
        """Draws the colours and names of the classes that occur."""
        return legend(self.labels, [i for i, n in enumerate(self._pixels()) if n])

    def side_by_side(self) -> Image.Image:
        """Draws the image beside its overlay, with a legend."""
        return side_by_side(self.image, {"prediction": (self.mask, self.labels)})

    def areas(self) -> dict[str, float]:
        """Return the share of the pixels by class name, for all classes."""
        total = max(1, self.mask.size)
        return {name: n / total for name, n in zip(self.labels.names, self._pixels(), strict=True)}

    def coco(self) -> list[dict[str, Any]]:
        """COCO annotations, one for each class that occurs: see `seg_torch.drawing.coco`."""
        return coco_annotations(self.mask)

    def polygons(self) -> dict[str, Any]:
        """Outlines as a GeoJSON FeatureCollection: see `seg_torch.drawing.polygons`."""
        features = list(polygon_features(self.mask, self.labels))
        return {"type": "FeatureCollection", "features": features}

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
                `confidence` (grey PNG, 255 is certain), `coco` (COCO JSON), `polygons` (GeoJSON)
                and `side_by_side` (JPEG).

        Raises:
            InputError: There is no such output, or it was not asked for in predicting.
            OSError: A file cannot be written.
        """
        for output in outputs:
            if output not in SUFFIXES:
                raise InputError(f"there is no output {output!r}: use {', '.join(SUFFIXES)}")
            path = Path(folder, output, f"{name}{SUFFIXES[output]}")
            if output == "mask":
                write_atomically(path, self.save_mask)
            elif output == "probabilities":
                write_atomically(path, self._save_probabilities)
            elif output == "confidence":
                if self.confidence_map is None:
                    raise InputError("ask for it: segmenter.predict(image, confidence_map=True)")
                write_atomically(path, Image.fromarray(self.confidence_map).save)
            elif output == "coco":
                height, width = self.mask.shape
                images = [(str(name), width, height, self.coco())]
                write_atomically(path, partial(write_coco, images=images, labels=self.labels))
            elif output == "polygons":
                write_atomically(path, partial(write_polygons, mask=self.mask, labels=self.labels))
            elif output == "colour":
                write_atomically(path, self.colour().save)
            elif output == "overlay":
                write_atomically(path, self._save_overlay)
            else:
                write_atomically(path, partial(self.side_by_side().save, quality=JPEG_QUALITY))

    def save_mask(self, path: str | BinaryIO) -> None:
        """Write the mask alone: a PNG of class ids with the palette, and the names as text."""
        mask = palette_image(self.mask, self.labels)
        text = PngInfo()
        text.add_itxt("names", json.dumps(self.labels.names, ensure_ascii=False))
        # zlib's Z_RLE: masks are runs of one value, which take it a third of the usual time.
        mask.save(path, "PNG", pnginfo=text, compress_type=3)

    def _save_overlay(self, path: str) -> None:
        save_overlay(path, self.image, self.mask, self.labels, JPEG_QUALITY)

    def _save_probabilities(self, path: str) -> None:
        names = np.array(self.labels.names)
        np.savez_compressed(path, probabilities=self.probabilities(), names=names)

    def _pixels(self) -> list[int]:
        """Count per class. Pillow's histogram takes no memory, NumPy's eight bytes per pixel."""
        return Image.fromarray(self.mask).histogram()[: len(self.labels)]

    def _repr_png_(self) -> bytes | None:
        return self.overlay()._repr_png_()


class Segmenter:
    """Segments images with a network.

    Args:
        network: Images to logits.
        labels: Its classes.
        resize: (height, width) at which the network sees images; `None` for their own size.
        device: Where to run; by default the best there is.
        tile: See `seg_torch.prediction.inference.Inference`.
        scales: See there.
        flip: See there.
        precision: See there.
        unknown: Pixels whose class has a lower probability than that are 255 in the mask.
        format: How files become images.

    Raises:
        InputError: An impossible tile, scale or precision, or `unknown` is no probability.
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
        precision: str = "auto",
        unknown: float = 0.0,
        format: ImageFormat = RGB,
    ) -> None:
        if not 0 <= unknown <= 1:
            raise InputError(f"unknown={unknown}: expected a probability, such as 0.9")
        self.unknown = unknown
        self.format = format
        self.device = hardware.best_device() if device is None else torch.device(device)
        self.network = network.to(self.device).eval()
        self.labels = labels
        self.resize = resize
        self.inference = Inference(network, len(labels), resize, tile, scales, flip, precision)
        network.to(hardware.TRUE_PRECISIONS.get(self.inference.precision))
        self.description: dict[str, Any] | None = None  # where the network is known by one
        self.scores: Path | None = None  # of the run that the network is from

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        trust: Sequence[str] = (),
        **settings: Any,
    ) -> Segmenter:
        """Load a checkpoint that `train.py` wrote, or what `seg-torch export` made of one.

        Args:
            path: Of the checkpoint, of a run's folder for its best one, or of an ONNX or OpenVINO
                file (`.xml`), which runs on the CPU; or `hf://OWNER/NAME[@REVISION]` of the Hugging
                Face Hub, or a folder, as `push_to_hub` and `save_pretrained` write them.
            device: Where to run; by default the best there is.
            trust: Packages besides seg_torch's own from which the model may come.
            settings: `tile`, `scales`, `flip` and `precision` of the constructor.

        Raises:
            InputError: No checkpoint of seg_torch, or a model from a package that is not trusted.
        """
        network, labels, description = load_network(path, trust)
        format = checkpoint.image_format(description)
        resize = description["preprocessing"]["resize"]
        segmenter = cls(network, labels, resize, device, format=format, **settings)
        if not isinstance(network, ExportedNetwork):
            segmenter.description = description
        folder = Path(path).absolute()
        if folder.parts[-2:] == ("checkpoints", "best.ckpt"):
            folder = folder.parents[1]
        segmenter.scores = folder / SCORES if (folder / SCORES).is_file() else None
        return segmenter

    @classmethod
    def pretrained(
        cls,
        model: str = "deeplabv3",
        backbone: str = "resnet101",
        device: torch.device | str | None = None,
        **settings: Any,
    ) -> Segmenter:
        """Load the weights that torchvision publishes, for the 21 classes of PASCAL VOC.

        Args:
            model: `deeplabv3` or `fcn`.
            backbone: `resnet50`, `resnet101` or, of DeepLabv3, `mobilenet_v3_large`.
            device: Where to run; by default the best there is.
            settings: `tile`, `scales`, `flip` and `precision` of the constructor.

        Raises:
            InputError: There is no such model, or its weights cannot be downloaded.
        """
        builders = {"deeplabv3": deeplabv3, "fcn": fcn}
        if model not in builders:
            raise InputError(f"no pretrained {model!r}: there are {' and '.join(builders)}")
        network = Network(builders[model](len(VOC_LABELS), backbone))
        segmenter = cls(network, VOC_LABELS, device=device, **settings)
        config = {"_target_": f"seg_torch.models.{model}", "backbone": backbone, "weights": None}
        segmenter.description = checkpoint.describe(network, VOC_LABELS, config, {}, None)
        return segmenter

    @classmethod
    def from_hub(
        cls, name: str, device: torch.device | str | None = None, **settings: Any
    ) -> Segmenter:
        """Load a published model of the Hugging Face Hub, see `seg_torch.checkpoints.hub.hub`.

        Args:
            name: Repository, such as `nvidia/segformer-b0-finetuned-ade-512-512`, or a folder.
            device: Where to run; by default the best there is.
            settings: `tile`, `scales`, `flip` and `precision` of the constructor.

        Raises:
            InputError: The repository cannot be had, or it is not of a model that segments.
        """
        return cls(*hub(name), device, **settings)

    def save_pretrained(
        self,
        folder: str | Path,
        license: str | None = None,
        image: str | Path | Image.Image | np.ndarray | Tensor | None = None,
        name: str | None = None,
    ) -> None:
        """Write the network as the Hugging Face Hub has models, for `load(folder)`.

        model.safetensors holds the weights, config.json the classes, the preprocessing and the
        configuration, without paths of this machine, and README.md is the model card, with the
        scores of the run's test_metrics.json, where there are any.

        Args:
            folder: A new one.
            license: As the Hub names it, such as `apache-2.0`.
            image: One to show in the card, with its segmentation; by default none is.
            name: What the card calls it; by default as the folder.

        Raises:
            InputError: The folder is not empty; or the network was not loaded by `load` or
                `pretrained`, was exported, has rounded weights, or needs files of this machine.
        """
        if self.description is None:
            raise InputError(
                "only a network that Segmenter.load has from a checkpoint, or that of "
                "Segmenter.pretrained, is known well enough to be saved; one of from_hub is on the "
                "Hub already, and of an exported one give the checkpoint"
            )
        if self.network.mean.dtype != torch.float32:
            raise InputError(
                f"the weights are rounded to {self.inference.precision}; load the checkpoint "
                "without precision="
            )
        example = None
        if image is not None:
            result = self.predict(image)
            example = side_by_side(result.image, {"segmentation": (result.mask, self.labels)})
        folder = Path(folder)
        write_model(
            folder,
            name or folder.name,
            self.network,
            self.description,
            self.scores,
            example,
            license,
        )

    def push_to_hub(
        self,
        name: str,
        private: bool = False,
        license: str | None = None,
        image: str | Path | Image.Image | np.ndarray | Tensor | None = None,
        commit_message: str = "Upload model",
    ) -> str:
        """Upload the network to the Hugging Face Hub, for `load("hf://OWNER/NAME")`.

        The token is that of `hf auth login` or `HF_TOKEN`. Files of the same names are replaced,
        the model card among them.

        Args:
            name: Repository, `OWNER/NAME`; made if need be.
            private: Whether a new repository can be seen by its owner alone.
            license: See `save_pretrained`.
            image: See there. It is uploaded, with its segmentation.
            commit_message: Of the upload.

        Returns:
            The address of the repository.

        Raises:
            InputError: As `save_pretrained`; or nobody is logged in, the account may not write
                there, or the Hub cannot be reached.
        """
        if name.count("/") != 1:
            raise InputError(f"push_to_hub({name!r}): expected OWNER/NAME")
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, license, image, name)
            return upload(Path(folder), name, private, commit_message)

    def batch_size(self, height: int, width: int) -> int:
        """How many images of one size `predict_batch` should be given."""
        return self.inference.batch_size(*(self.resize or (height, width)))

    def read(self, path: str | Path) -> np.ndarray:
        """Read an image as the network takes it, uint8 or uint16 [H, W, C]."""
        return self.format.read(path)

    def predict(
        self,
        image: str | Path | Image.Image | np.ndarray | Tensor,
        probabilities: bool = False,
        confidence_map: bool = False,
    ) -> Segmentation:
        """Segments one image.

        Args:
            image: A path, a Pillow image, an array uint8 [H, W, 3] or a tensor uint8 [3, H, W].
                Of another format than RGB a path, an array uint8 or uint16 [H, W, C], or the tensor
                [C, H, W] of a dataset.
            probabilities: Keep those of all classes, two bytes for each class and pixel.
            confidence_map: Keep that of the chosen class, a byte for each pixel.

        Raises:
            InputError: A file that cannot be read, or an array of another kind.
        """
        return self.predict_batch([image], probabilities, confidence_map)[0]

    @torch.no_grad()  # not inference_mode, which keeps autocast from caching the weights
    def predict_batch(
        self,
        images: Sequence[str | Path | Image.Image | np.ndarray | Tensor],
        probabilities: bool = False,
        confidence_map: bool = False,
    ) -> list[Segmentation]:
        """Segments images of one size, which go through the network together.

        Convolutions round differently for another number of images, but not for other images: with
        batches of one length a result does not depend on what else is in its batch.

        Args:
            images: As for `predict`.
            probabilities: As for `predict`.
            confidence_map: As for `predict`.

        Raises:
            InputError: As for `predict`, or the images have several sizes.
        """
        if not images:
            return []
        arrays = [
            self.read(image) if isinstance(image, str | Path) else self.format.checked(image)
            for image in images
        ]
        sizes = sorted({array.shape[:2] for array in arrays})
        if len(sizes) > 1:
            raise InputError(f"images of several sizes in one batch: {sizes}")
        size = sizes[0]
        views = [as_tensor(array) for array in arrays]
        batch = torch.stack(views) if len(views) > 1 else views[0][None]  # may be large: no copy
        if self.resize is not None:
            batch = resize_image(batch.contiguous(), self.resize)  # as the data module does it
        masks = torch.empty(len(arrays), *size, dtype=torch.uint8)
        kept: list[Tensor | None] = [None] * len(arrays)
        if probabilities:
            shape = (len(arrays), len(self.labels), *size)
            kept = list(torch.empty(shape, dtype=torch.float16))
        maps = torch.empty_like(masks) if confidence_map else None
        totals = torch.zeros(len(arrays), device=self.device)
        for index, rows, columns, logits in self.inference.blocks(batch, size):
            target = kept[index]
            into = None if target is None else target[:, rows, columns]
            map_part = None if maps is None else maps[index, rows, columns]
            ids, total = decide(logits, True, into, map_part, self.unknown)
            masks[index, rows, columns] = ids
            totals[index] += total
            del logits  # not to be kept beside what the network makes of the next tile
        confidences = (totals / max(1, size[0] * size[1])).tolist()
        return [
            Segmentation(
                masks[i].numpy(),
                self.labels,
                self.format.shown(array),
                confidences[i],
                None if (scores := kept[i]) is None else scores.numpy(),
                None if maps is None else maps[i].numpy(),
            )
            for i, array in enumerate(arrays)
        ]

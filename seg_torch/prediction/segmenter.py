"""Segmenter: a network that segments images; and the one that a configuration names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from seg_torch import hardware
from seg_torch.checkpoints import checkpoint
from seg_torch.checkpoints.exported import ExportedNetwork, load_network
from seg_torch.checkpoints.hub import HUB, hub
from seg_torch.checkpoints.publish import SCORES, upload, write_model
from seg_torch.configuration import escaped, instantiate
from seg_torch.datasets.published.voc import VOC_LABELS
from seg_torch.errors import InputError
from seg_torch.images.format import RGB, ImageFormat
from seg_torch.images.resize import Resize, seen_size
from seg_torch.labels import Labels
from seg_torch.models import deeplabv3, fcn
from seg_torch.models.network import Network
from seg_torch.prediction.inference import Inference, InferenceSettings
from seg_torch.prediction.segmentation import Segmentation, segment

log = logging.getLogger(__name__)

PRETRAINED = {"deeplabv3": deeplabv3, "fcn": fcn}

AnyImage = str | Path | Image.Image | np.ndarray | Tensor


class Segmenter:
    """Segments images with a network.

    Args:
        network: Images to logits. It is moved to the device, and is in evaluation mode from then
            on; for a network in training there is `seg_torch.prediction.segmentation.segment`.
        labels: Its classes.
        resize: (height, width) at which the network sees images, or a number for images that are
            reduced so that no side is longer; `None` for their own size.
        device: Where to run; by default the best there is.
        format: How files become images.
        min_confidence: Pixels whose class has a lower probability than that are 255 in the mask.
        settings: `tile`, `scales`, `flip` and `precision` of
            `seg_torch.prediction.inference.InferenceSettings`.

    Raises:
        InputError: An impossible tile, scale or precision, or `min_confidence` is no probability.
    """

    def __init__(
        self,
        network: Network,
        labels: Labels,
        resize: Resize = None,
        device: torch.device | str | None = None,
        format: ImageFormat = RGB,
        min_confidence: float = 0.0,
        **settings: Any,
    ) -> None:
        if not 0 <= min_confidence <= 1:
            message = f"min_confidence={min_confidence}: expected a probability, such as 0.9"
            raise InputError(message)
        self.min_confidence = min_confidence
        self.format = format
        self.device = hardware.best_device() if device is None else torch.device(device)
        self.network = network.to(self.device).eval()
        self.labels = labels
        self.inference = Inference(network, len(labels), resize, InferenceSettings(**settings))
        network.to(hardware.TRUE_PRECISIONS.get(self.inference.precision))
        self.description: dict[str, Any] | None = None  # where the network is known by one
        self.scores: Path | None = None  # of the run that the network is from
        self.remarked: set[str] = set()

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
            settings: `min_confidence`, `tile`, `scales`, `flip` and `precision`.

        Raises:
            InputError: No checkpoint of seg_torch, or a model from a package that is not trusted.
        """
        network, labels, description = load_network(path, trust)
        resize = description["preprocessing"]["resize"]
        format = checkpoint.image_format(description)
        segmenter = cls(network, labels, resize, device, format, **settings)
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
            settings: `min_confidence`, `tile`, `scales`, `flip` and `precision`.

        Raises:
            InputError: There is no such model, or its weights cannot be downloaded.
        """
        if model not in PRETRAINED:
            raise InputError(f"no pretrained {model!r}: there are {' and '.join(PRETRAINED)}")
        network = Network(PRETRAINED[model](len(VOC_LABELS), backbone))
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
            settings: `min_confidence`, `tile`, `scales`, `flip` and `precision`.

        Raises:
            InputError: The repository cannot be had, or it is not of a model that segments.
        """
        return cls(*hub(name), device, **settings)

    def save_pretrained(
        self,
        folder: str | Path,
        license: str | None = None,
        image: AnyImage | None = None,
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
                "only a network that Segmenter.load has from a checkpoint, not an exported one, or "
                "Segmenter.pretrained can be saved; one of from_hub is on the Hub already"
            )
        if self.network.mean.dtype != torch.float32:
            raise InputError(
                f"the weights are rounded to {self.inference.precision}; load the checkpoint "
                "without precision="
            )
        example = None
        if image is not None:
            result = self.predict(image)
            example = replace(result, compared={"segmentation": result}).side_by_side()
        folder = Path(folder)
        name = name or folder.name
        write_model(folder, name, self.network, self.description, self.scores, example, license)

    def push_to_hub(
        self,
        name: str,
        private: bool = False,
        license: str | None = None,
        image: AnyImage | None = None,
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
        return self.inference.batch_size(*seen_size(self.inference.resize, height, width))

    def read(self, path: str | Path) -> np.ndarray:
        """Read an image as the network takes it, uint8 or uint16 [H, W, C].

        It is a masked array where the file says that there are no data. What is doubtful about a
        file is logged, of each kind once.
        """
        image = self.format.read(path)
        for kind, text in self.format.remarks(path).items():
            if kind not in self.remarked:
                self.remarked.add(kind)
                log.warning("%s: %s (said of the first such file alone)", path, text)
        return image

    def predict(
        self, image: AnyImage, probabilities: bool = False, confidence_map: bool = False
    ) -> Segmentation:
        """Segment one image.

        Args:
            image: A path, a Pillow image, an array uint8 [H, W, 3] or a tensor uint8 [3, H, W].
                Of another format than RGB a path, an array uint8 or uint16 [H, W, C], or the tensor
                [C, H, W] of a dataset. An array may be masked (`numpy.ma`) where it has no data.
            probabilities: Keep those of all classes, two bytes for each class and pixel.
            confidence_map: Keep that of the chosen class, a byte for each pixel.

        Raises:
            InputError: A file that cannot be read, or an array of another kind.
        """
        return self.predict_batch([image], probabilities, confidence_map)[0]

    def predict_batch(
        self,
        images: Sequence[AnyImage],
        probabilities: bool = False,
        confidence_map: bool = False,
    ) -> list[Segmentation]:
        """Segment images of one size, which go through the network together.

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
        paths = [Path(image) if isinstance(image, str | Path) else None for image in images]
        arrays = [
            self.format.checked(image) if path is None else self.read(path)
            for image, path in zip(images, paths, strict=True)
        ]
        results = self.segment(arrays, probabilities, confidence_map)
        return [replace(result, source=path) for result, path in zip(results, paths, strict=True)]

    def segment(
        self,
        images: Sequence[np.ndarray],
        probabilities: bool = False,
        confidence_map: bool = False,
    ) -> list[Segmentation]:
        """Do what `predict_batch` does with images that `read` has read."""
        options = self.format, self.min_confidence, probabilities, confidence_map
        return segment(self.inference, self.labels, images, *options)


def load_segmenter(cfg: DictConfig, device: torch.device) -> Segmenter:
    """Load the model of a configuration: its checkpoint or, without one, a published model.

    Raises:
        InputError: It cannot be loaded, or a setting is impossible.
    """
    name, options = model_name(cfg), _options(cfg, device)
    if cfg.checkpoint is not None:
        return Segmenter.load(cfg.checkpoint, trust=cfg.trust, **options)
    if cfg.model._target_ == HUB:
        return Segmenter.from_hub(name, **options)
    if name in PRETRAINED:
        network = Network(instantiate(cfg.model, num_classes=len(VOC_LABELS)))
        return Segmenter(network, VOC_LABELS, **options)
    raise InputError(
        f"{cfg.model._target_} comes without weights that segment images: give "
        f"checkpoint=FILE, or use model=hub or model={' or model='.join(PRETRAINED)}"
    )


def load_segmenters(cfg: DictConfig, device: torch.device) -> dict[str, Segmenter]:
    """Load the model of a configuration and, where one is asked for, the second one, by name.

    Raises:
        InputError: One cannot be loaded, or they take images of different formats.
    """
    name, first = model_name(cfg), load_segmenter(cfg, device)
    if cfg.compare_with is None:
        return {name: first}
    if cfg.compare_with in PRETRAINED:
        second = Segmenter.pretrained(cfg.compare_with, **_options(cfg, device))
    else:
        config: Any = OmegaConf.merge(cfg, {"checkpoint": escaped(cfg.compare_with)})
        second = load_segmenter(config, device)
    if second.format != first.format:
        raise InputError(f"compare_with={cfg.compare_with}: it takes images of other channels")
    return {name: first, str(cfg.compare_with): second}


def model_name(cfg: DictConfig) -> str:
    """Return what the model of a configuration is called."""
    if cfg.checkpoint is not None:
        return str(cfg.checkpoint)
    return str(cfg.model.name if cfg.model._target_ == HUB else cfg.model._target_.split(".")[-1])


def _options(cfg: DictConfig, device: torch.device) -> dict[str, Any]:
    settings = InferenceSettings.parse(cfg.tile, cfg.tta, cfg.trainer.precision)
    return {"device": device, "min_confidence": cfg.min_confidence, **vars(settings)}

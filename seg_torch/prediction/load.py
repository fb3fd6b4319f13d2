"""The model that a configuration names."""

from __future__ import annotations

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from seg_torch.checkpoints.hub import HUB
from seg_torch.datasets.published.voc import VOC_LABELS
from seg_torch.errors import InputError
from seg_torch.models.network import Network
from seg_torch.prediction.inference import InferenceSettings
from seg_torch.prediction.segmenter import PRETRAINED, Segmenter


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
        config: Any = OmegaConf.merge(cfg, {"checkpoint": cfg.compare_with})
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

"""seg-torch export: a network as one file that other programs run."""

import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Subset

from seg_torch.checkpoints import checkpoint, exported
from seg_torch.checkpoints.comparison import compare, log_int8_scores
from seg_torch.errors import InputError, check_choice
from seg_torch.evaluation.setup import Model, open_data
from seg_torch.files import PARTIAL
from seg_torch.images.resize import Resize, resize_image, seen_size

log = logging.getLogger(__name__)

SAME = 0.999  # the share of the pixels that must be the same in float32
CALIBRATION = 100  # images


def export(cfg: DictConfig) -> None:
    """Export a checkpoint, and compare the file with the network before it takes its place.

    Raises:
        InputError: The checkpoint or a setting cannot be used, the model cannot be exported, or
            what was exported differs from it.
    """
    check_choice("format", cfg.format, exported.FORMATS)
    if cfg.int8 and cfg.format != "openvino":
        raise InputError(f"int8=true needs format=openvino, not {cfg.format}")
    exported.require_packages(cfg.format, cfg.int8)
    network, labels, description = exported.load_network(cfg.checkpoint, cfg.trust)
    if isinstance(network, exported.ExportedNetwork):
        raise InputError(f"checkpoint={cfg.checkpoint} is exported already; give the checkpoint")
    format = checkpoint.image_format(description)
    if format.bits != 8:
        raise InputError("exported graphs take images of 8 bits, and this network those of 16")
    source = checkpoint.locate(cfg.checkpoint)
    path = _output(cfg, source)
    resize = description["preprocessing"]["resize"]
    model = Model(cfg.checkpoint, network, labels, resize, format, description)
    samples = _calibration(cfg, model) if cfg.int8 else None
    images = None if samples is None else _images(samples, resize)
    graph = exported.Graph(network.eval(), resize, cfg.probabilities)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as folder:
        draft = Path(folder, path.name)
        exported.write(graph, draft, cfg.format, description, images)
        run, _ = exported.open_exported(draft)
        same = compare(graph, run)
        if samples is not None:
            log_int8_scores(graph, run, samples, len(labels))
        del run  # Windows moves no file that is open
        if same < SAME and not cfg.int8:
            raise InputError(
                f"{100 * (1 - same):.2f} % of the pixels differ from those of the network, so "
                f"{path} was not written: format={cfg.format} does not do what this model needs"
            )
        _move(draft, path)
    megabytes = [sum(f.stat().st_size for f in files) / 1e6 for files in ([source], _files(path))]
    log.info("%s: %.1f MB; the checkpoint has %.1f MB", path, megabytes[1], megabytes[0])


def _output(cfg: DictConfig, source: Path) -> Path:
    """Return the path of the file; by default beside the checkpoint."""
    if cfg.checkpoint.startswith(checkpoint.HUB_SCHEME) and not cfg.output:
        raise InputError(f"checkpoint={cfg.checkpoint} lies in a cache: give output=FILE")
    suffix = exported.FORMATS[cfg.format].suffix
    path = Path(cfg.output) if cfg.output else source.with_name(source.stem + suffix)
    if not path.name.endswith(suffix):
        raise InputError(f"output={path}: a file of format={cfg.format} is called NAME{suffix}")
    if any(file.exists() and file.samefile(source) for file in _files(path)):
        raise InputError(f"output={path}: would replace the checkpoint {source}; give another name")
    return path


def _calibration(cfg: DictConfig, model: Model) -> DataLoader:
    """Return validation images one by one, evenly spaced, since neighbours are often alike."""
    dataset = open_data(cfg, model).dataset("val")
    return DataLoader(Subset(dataset, range(0, len(dataset), -(-len(dataset) // CALIBRATION))))


def _images(samples: DataLoader, resize: Resize) -> list[np.ndarray]:
    """Return images uint8 [1, C, H, W], at the size at which the network sees them."""
    return [resize_image(x, seen_size(resize, *x.shape[-2:])).numpy() for x, _ in samples]


def _files(path: Path) -> list[Path]:
    """Return an exported network's files, in the order in which they are replaced."""
    return [path.with_suffix(".bin"), path] if path.suffix == ".xml" else [path]


def _move(draft: Path, path: Path) -> None:
    """Put the files in their place. A process that is killed never leaves two that do not fit."""
    if len(_files(path)) > 1:
        path.unlink(missing_ok=True)
    for new, old in zip(_files(draft), _files(path), strict=True):
        os.replace(new, old)

"""What predict.py does: a photograph or a folder of them in, masks and overlays out."""

from __future__ import annotations

import logging
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from rich.progress import track

from seg_torch.datasets.voc import VOC_LABELS
from seg_torch.errors import InputError
from seg_torch.images import write_atomically
from seg_torch.models.network import Network
from seg_torch.segmenter import Segmenter
from seg_torch.visualize import legend

log = logging.getLogger(__name__)


def predict(cfg: DictConfig) -> int:
    """Predicts ``cfg.input`` into ``cfg.output``. Returns the number of files that failed."""
    if cfg.input is None or cfg.output is None:
        raise InputError("predict.py needs input=FILE-OR-FOLDER and output=FOLDER")
    files = find_images(Path(cfg.input))
    if cfg.checkpoint is not None:
        segmenter = Segmenter.load(cfg.checkpoint, trust=cfg.trust)
    else:
        model = instantiate(cfg.model, num_classes=len(VOC_LABELS))
        segmenter = Segmenter(Network(model), VOC_LABELS)

    output = Path(cfg.output)
    key = legend(segmenter.labels)
    try:
        write_atomically(output / "legend.png", lambda path: key.save(path))
    except OSError as error:
        raise InputError(f"output={output}: cannot be written: {error.strerror}") from None
    failures = []
    for name, path in track(files.items(), "predicting"):
        try:
            segmenter.predict(path).save(output, name)
        except InputError as error:
            failures.append(str(error))
    log.info("%d of %d pictures labelled: %s", len(files) - len(failures), len(files), output)
    for failure in failures:
        log.error("failed: %s", failure)
    return len(failures)


def find_images(path: Path) -> dict[str, Path]:
    """The picture files at or below ``path``, by the name of their outputs.

    The name is the path below the folder without its extension, or with it where two files differ
    in nothing else.

    Raises:
        InputError: there is no such path, or no picture below it.
    """
    if path.is_file():
        return {path.stem: path}
    if not path.is_dir():
        raise InputError(f"input={path}: no such file or folder")
    extensions = Image.registered_extensions()
    files = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in extensions and f.is_file()]
    if not files:
        raise InputError(f"input={path}: no pictures below this folder")
    stems = [f.relative_to(path).with_suffix("") for f in files]
    return {
        str(stem if stems.count(stem) == 1 else f.relative_to(path)): f
        for f, stem in zip(files, stems, strict=True)
    }

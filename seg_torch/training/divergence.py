"""What a run leaves when its loss is no longer a number: the batch, and what is in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer

from seg_torch.data.module import SegmentationDataModule
from seg_torch.files import write_atomically

log = logging.getLogger(__name__)


def save_batch(
    folder: Path,
    trainer: Trainer,
    split: str,
    batch: int,
    rank: int,
    found: str,
    losses: Sequence[float],
) -> str:
    """Write `batch.pt` (uint8 `images` and `masks`) and `report.json`.

    Nothing of a batch is kept while training. What it was follows from seed, epoch and place.

    Args:
        folder: Where to write.
        trainer: Knows the data and the epoch.
        split: `train` or `val`.
        batch: The batch of the epoch, counted from 0.
        rank: The process that was given it.
        found: What is wrong.
        losses: The process's training losses of the epoch so far.

    Returns:
        A sentence on where that is, for the user; empty if it could not be written.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, SegmentationDataModule):
        return ""
    try:
        indices, samples = data.rebuild_batch(split, trainer.current_epoch, batch, rank)
        pairs = getattr(data.dataset(split), "pairs", None)
        report = {
            "found": found,
            "split": split,
            "epoch": trainer.current_epoch + 1,
            "batch": batch + 1,
            "process": rank,
            "learning_rate_now": trainer.optimizers[0].param_groups[0]["lr"],
            "precision": str(trainer.precision),
            "last_losses": [f"{loss:g}" for loss in losses[-100:]],
            "images": [
                {"index": index}
                | ({} if pairs is None else _files(pairs[index]))
                | _statistics(*sample)
                for index, sample in zip(indices, samples, strict=True)
            ],
        }
        images, masks = zip(*samples, strict=True)
        content = {"images": [*map(_plain, images)], "masks": [*map(_plain, masks)]}
        write_atomically(folder / "batch.pt", partial(torch.save, content))
        text = json.dumps(report, indent=1)
        write_atomically(folder / "report.json", lambda name: Path(name).write_text(text, "utf-8"))
    except Exception as error:  # such as a full disk, which is not what has to be told
        log.warning("the batch could not be written to %s: %s", folder, error)
        return ""
    return f"{folder} holds that batch and names its files. "


def _plain(part: torch.Tensor) -> torch.Tensor:
    return part.as_subclass(torch.Tensor).clone()  # without the rest of what was cropped


def _files(pair: Any) -> dict[str, str]:
    return {"image": str(pair.image), "mask": str(pair.mask)}


def _statistics(image: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    values, counts = np.unique(mask.numpy(), return_counts=True)
    return {
        "size": list(mask.shape),
        "minimum": int(image.min()),
        "mean": float(image.double().mean()),
        "maximum": int(image.max()),
        "mask_pixels": {str(value): int(n) for value, n in zip(values, counts, strict=True)},
    }

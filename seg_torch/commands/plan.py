"""seg-torch plan: what train would do and why, without doing it."""

import json
import logging
import math
import sys
import time
from typing import Any

import numpy as np
from omegaconf import DictConfig

from seg_torch import hardware
from seg_torch.cli.messages import as_text
from seg_torch.configuration import instantiate
from seg_torch.data import SegmentationDataModule
from seg_torch.distributed import Processes
from seg_torch.drawing.table import print_table
from seg_torch.errors import InputError
from seg_torch.planning.budget import as_time
from seg_torch.planning.plan import Plan, make_plan
from seg_torch.training import build

log = logging.getLogger(__name__)

TRIAL = 2.5  # seconds; train itself takes more, within a budget
FILES = "config.yaml, checkpoints/best.ckpt, checkpoints/last.ckpt, metrics.csv, times.csv, "
FILES += "curves.png, samples/, test_metrics.json, test_images.csv, test_confusion_matrix.png"


@hardware.restored_flags()
def plan(cfg: DictConfig) -> None:
    """Print what a training would be like.

    Raises:
        InputError: Something is wrong with the settings or the data.
    """
    started = time.monotonic()
    if cfg.resume:
        raise InputError(f"resume={cfg.resume}: a run goes on with its own settings")
    if cfg.json:
        logging.disable(logging.INFO)
    build.check_settings(cfg)
    processes = Processes(cfg.trainer)
    data: SegmentationDataModule = instantiate(cfg.data)
    processes.first(data.check_files)
    made, _ = make_plan(cfg, data, processes, started, TRIAL)
    if not processes.is_first:
        return
    if cfg.json:
        json.dump(as_json(made), sys.stdout, indent=2)
        print()
        return
    log.info("%s", about_data(made))
    rows = [[d.setting, as_text(d.value), d.because] for d in made.decisions]
    if rows:
        print_table("", ["setting", "value", "because"], rows, numbers=False)
    elif not cfg.recipe:
        log.info("nothing is decided: experiment= and recipe=null have settings of their own")
    steps = f"{made.steps:.0f} steps" if made.steps < math.inf else "steps without end"
    if made.seconds is not None and made.peak_bytes is not None:
        steps += f", about {as_time(made.seconds)} in all on this machine"
        steps += f", up to {made.peak_bytes / 1e9:.1f} GB of memory"
    log.info("%s", steps)
    log.info("train writes into %s: %s", cfg.output_dir, FILES)


def about_data(made: Plan) -> str:
    """Return what was found in the data, in a sentence."""
    data = made.data
    images = ", ".join(f"{count:,} images of {split}" for split, count in data.images.items())
    heights, widths = data.sizes.min(axis=0), data.sizes.max(axis=0)
    sizes = f"{data.size[0]} x {data.size[1]}"
    if not data.one_size:
        sizes = f"{heights[0]} x {heights[1]} to {widths[0]} x {widths[1]} (median {sizes})"
    kind = "grey" if data.grey else f"{data.channels} channels"
    name, share = data.rarest
    return (
        f"{images}, {sizes}, {kind}; {len(data.names)} classes, the rarest {name} with "
        f"{100 * share:.2g} % of the pixels; {100 * data.unlabelled:.2g} % are not labelled"
    )


def as_json(made: Plan) -> dict[str, Any]:
    """Return a plan as plain data; unknown numbers are null."""
    data = made.data
    classes = zip(data.names, data.shares, data.holders, data.thickness, strict=True)
    return {
        "data": {
            "images": data.images,
            "median_size": data.size,
            "smallest": data.sizes.min(axis=0).tolist(),
            "largest": data.sizes.max(axis=0).tolist(),
            "grey": data.grey,
            "channels": data.channels,
            "unlabelled": data.unlabelled,
            "classes": {
                name: {
                    "share": float(share),
                    "images": int(images),
                    "width": float(width) if np.isfinite(width) else None,
                }
                for name, share, images, width in classes
            },
        },
        "settings": [d._asdict() for d in made.decisions],
        "steps": made.steps if made.steps < math.inf else None,
        "seconds": None if made.steps == math.inf else made.seconds,
        "peak_bytes": made.peak_bytes,
        "files": FILES.split(", "),
    }

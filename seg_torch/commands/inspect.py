"""seg-torch inspect: what is in a dataset, and whether it can be trained on."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seg_torch.data.inspection import class_cells, inspect_dataset

log = logging.getLogger(__name__)


def inspect(cfg: DictConfig) -> bool:
    """Print and writes a report on all splits; returns whether training would be refused."""
    data = instantiate(cfg.data, _convert_="all")
    place: dict[str, Any] = {"download": True} if data.download else {}
    if data.dataset_name is not None:
        place["name"] = data.dataset_name
    make_dataset = partial(data.make_dataset, **place)
    report = inspect_dataset(make_dataset, data.root, cfg.output_dir, data.format)
    if report["splits"]:
        Console().print(_class_table(report))
    if report["mean"]:
        mean, std = ([round(v, 4) for v in report[key]] for key in ("mean", "std"))
        log.info("training images: mean %s, standard deviation %s", mean, std)
    for note in report["notes"]:
        log.info("%s", note)
    problems = report["problems"]
    if problems:
        log.info("training would be refused, %d problems:", len(problems))
    for problem in problems[:5]:
        pixels = [f"{count:,} pixels of {value}" for value, count in problem["pixels"].items()]
        log.info("  %s", "; ".join([problem["message"], *pixels]))
    if len(problems) > 5:
        log.info("  ... and %d more; the files below list all", len(problems) - 5)
    for name in ("inspect.html", "inspect.json"):
        log.info("%s", Path(cfg.output_dir, name))
    return report["refused"]


def _class_table(report: dict[str, Any]) -> Table:
    table = Table(title="share of the pixels, in so many images")
    table.add_column("class")
    for split, counts in report["splits"].items():
        table.add_column(f"{split}: {counts['images']:,} images", justify="right")
    table.add_column("weight", justify="right")
    for name, row in report["classes"].items():
        cells = [cell.replace("\n", " in ") for cell in class_cells(report, row)]
        table.add_row(escape(name), *cells)
    return table

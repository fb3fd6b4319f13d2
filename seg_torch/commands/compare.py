"""seg-torch compare: runs in one table, and what can be concluded from it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig

from seg_torch.drawing.page import render
from seg_torch.drawing.table import print_table
from seg_torch.errors import check_choice
from seg_torch.evaluation.bootstrap import METHOD
from seg_torch.evaluation.comparison import Group, compared, differing, grouped, read_runs
from seg_torch.files import write_text
from seg_torch.folders import claimed
from seg_torch.training.run import write_table

log = logging.getLogger(__name__)

NOTE = (
    "± is the standard deviation over the seeds. A difference is that to the first row, of the "
    "means over the seeds, with its 95 % interval and two-sided p-value by the paired bootstrap: "
    "the same resamples of the images for all runs. It says how the rows would compare on other "
    "images, not with other seeds. Neither p nor the intervals of the classes are corrected for "
    f"the number of comparisons. {METHOD}."
)


class TextTable(NamedTuple):
    """A table with a title; all cells are text."""

    title: str
    header: Sequence[str]
    rows: list[list[str]]


def compare(cfg: DictConfig) -> None:
    """Print and write the tables.

    Raises:
        InputError: There are no such runs, or they were scored on different images or classes.
    """
    check_choice("split", cfg.split, ("train", "val", "test"))
    paths = [cfg.runs] if isinstance(cfg.runs, str) else list(cfg.runs)
    groups = grouped(read_runs(paths, cfg.split))
    rows, changes = compared(groups)
    tables = [_runs_table(rows, cfg.split), _classes_table(changes), _settings_table(groups)]
    tables = [table for table in tables if table.rows]
    for table in tables:
        print_table(*table)
    log.info(NOTE)
    folder = Path(cfg.output_dir)
    known = [{k: v for k, v in row.items() if v == v} for row in rows]  # without nan
    with claimed(folder):
        write_text(folder / "compare.md", render("compare.md", tables=tables, note=NOTE))
        write_table(folder / "compare.csv", dict.fromkeys(rows[0], float), known)
    for name in ("compare.md", "compare.csv"):
        log.info("%s", folder / name)


def _runs_table(rows: Sequence[dict[str, Any]], split: str) -> TextTable:
    header = (
        *("settings", "runs", f"{split} mean IoU", f"{split} pixel accuracy", "best val mean IoU"),
        *("difference [95 % interval]", "p", "s/epoch", "GPU GB"),
    )
    cells = [
        [
            *(row["settings"], str(row["runs"])),
            *(_with_sd(row, name) for name in ("mean_iou", "pixel_accuracy", "val_mean_iou")),
            _signed(row["difference"], row["difference_low"], row["difference_high"]),
            *(_number(row["p"], ".4f"), _number(row["seconds_per_epoch"], ".1f")),
            _number(row["gpu_memory_gb"], ".2f"),
        ]
        for row in rows
    ]
    return TextTable("Runs", header, cells)


def _classes_table(changes: Sequence[tuple]) -> TextTable:
    header = ("settings", "class", "IoU of the first row", "IoU", "difference [95 % interval]")
    cells = [
        [settings, name, f"{before:.4f}", f"{after:.4f}", _signed(*difference)]
        for settings, name, before, after, difference in changes
    ]
    return TextTable("Classes whose IoU differs from the first row's", header, cells)


def _settings_table(groups: Sequence[Group]) -> TextTable:
    keys, settings = differing(groups), [group.runs[0].settings for group in groups]
    cells = [[key, *(each.get(key, "") for each in settings)] for key in keys]
    header = ("setting", *(group.name for group in groups))
    return TextTable("Settings that differ", header, cells)


def _number(value: float, format_spec: str) -> str:
    return "" if np.isnan(value) else format(value, format_spec)


def _with_sd(row: dict[str, Any], name: str) -> str:
    deviation = _number(row[f"{name}_sd"], ".4f")
    return _number(row[name], ".4f") + f" ± {deviation}" * bool(deviation)


def _signed(value: float, low: float, high: float) -> str:
    return "" if np.isnan(value) else f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"

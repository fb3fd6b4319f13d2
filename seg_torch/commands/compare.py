"""seg-torch compare: runs in one table, and what can be concluded from it."""

from __future__ import annotations

import csv
import json
import logging
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seg_torch.checkpoints.moved import with_current_names
from seg_torch.errors import InputError, check_choice
from seg_torch.evaluation.bootstrap import (
    METHOD,
    ImageCounts,
    interval,
    p_value,
    read_image_counts,
    resampled_sums,
)
from seg_torch.files import CONFIG_FOLDER, write_atomically
from seg_torch.metrics.counts import COUNTS, class_scores, mean_scores
from seg_torch.training.run import COLUMNS, TIMES, read_table

log = logging.getLogger(__name__)

# Settings that do not tell runs apart: a repetition has others.
REPEATED = {"seed", "data.seed", "output_dir", "resume"}
# Parts of the configuration that are called by their choice, such as loss=ce.
CHOICES = ("loss", "model", "optimizer", "scheduler")
NOTE = (
    "± is the standard deviation over the seeds. A difference is that to the first row, of the "
    "means over the seeds, with its 95 % interval and two-sided p-value by the paired bootstrap: "
    "the same resamples of the images for all runs. It says how the rows would compare on other "
    "images, not with other seeds. Neither p nor the intervals of the classes are corrected for "
    f"the number of comparisons. {METHOD}."
)


class Run(NamedTuple):
    """What a run's folder holds.

    Attributes:
        folder: Its folder.
        settings: Its configuration as `section.key` -> value, without seeds, folders and
            loggers; choices such as loss=ce by name, and what was changed of them.
        scores: `<split>_metrics.json`.
        val_mean_iou: Of its best epoch, or nan.
        seconds: Of an epoch, on average, or nan.
        memory: Gigabytes on the GPU, or nan.
        counts: `<split>_images.npz`, by name, or `None` where there is none.
    """

    folder: Path
    settings: dict[str, str]
    scores: dict[str, Any]
    val_mean_iou: float
    seconds: float
    memory: float
    counts: ImageCounts | None


class Row(NamedTuple):
    """Numbers of a group of runs; what is not known is nan."""

    settings: str
    runs: int
    mean_iou: float
    mean_iou_sd: float
    pixel_accuracy: float
    pixel_accuracy_sd: float
    val_mean_iou: float
    val_mean_iou_sd: float
    difference: float
    difference_low: float
    difference_high: float
    p: float
    seconds_per_epoch: float
    gpu_memory_gb: float


class Titled(NamedTuple):
    """A table with a title; all cells are text."""

    title: str
    header: Sequence[str]
    rows: list[list[str]]


def compare(cfg: DictConfig) -> None:
    """Print and writes the tables.

    Raises:
        InputError: There are no such runs, or they were scored on different images or classes.
    """
    check_choice("split", cfg.split, ("train", "val", "test"))
    paths = [cfg.runs] if isinstance(cfg.runs, str) else list(cfg.runs)
    found = dict.fromkeys(folder for path in paths for folder in _run_folders(Path(path)))
    runs = [run for folder in found if (run := read_run(folder, cfg.split)) is not None]
    if not runs:
        raise InputError(f"runs={paths}: none of these runs has {cfg.split}_metrics.json")
    _check_comparable(runs)
    groups = _groups(runs)
    names = _names(groups)
    rows, moved = _rows(groups, names)
    tables = [_main_table(rows, cfg.split), moved, _settings_table(groups, names)]
    tables = [table for table in tables if table.rows]
    for table in tables:
        Console().print(_rich(table))
    log.info(NOTE)
    folder = Path(cfg.output_dir)
    text = "\n".join([*map(_markdown, tables), NOTE, ""])
    write_atomically(
        folder / "compare.md", lambda path: Path(path).write_text(text, encoding="utf-8")
    )
    write_atomically(folder / "compare.csv", lambda path: _write_csv(path, rows))
    for name in ("compare.md", "compare.csv"):
        log.info("%s", folder / name)


# Reading


def _run_folders(path: Path) -> list[Path]:
    """Return the folder of a run, or those of the runs of a sweep, by number."""
    if (path / "config.yaml").is_file():
        return [path]
    jobs = [file.parent for file in path.glob("*/config.yaml")]
    if not jobs:
        raise InputError(f"runs: {path} is neither a run (it would hold config.yaml) nor a sweep")
    return sorted(jobs, key=lambda job: (not job.name.isdigit(), job.name.zfill(9)))


def read_run(folder: Path, split: str) -> Run | None:
    """Read a run's folder; `None`, with a warning, if the run has no scores of the split."""
    path = folder / f"{split}_metrics.json"
    if not path.is_file():
        log.warning("%s is left out: it holds no %s", folder, path.name)
        return None
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        stored = OmegaConf.load(folder / "config.yaml")
        config = with_current_names(OmegaConf.to_container(stored))
        history = read_table(folder / "metrics.csv", COLUMNS)
        times = read_table(folder / "times.csv", TIMES)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{folder}: cannot be read as a run: {error}") from None
    counts = None
    if (images := folder / f"{split}_images.npz").is_file():
        counts = _by_name(read_image_counts(images))
    else:
        log.warning("%s holds no %s: it is not compared image by image", folder, images.name)
    own_folder = str(config["output_dir"])
    settings = {
        key: value.replace(own_folder, "output_dir")
        for key, value in _named(dict(_flat(config))).items()
        if key not in REPEATED and not key.startswith("logger.")
    }
    return Run(
        folder,
        settings,
        scores,
        max((row["val_mean_iou"] for row in history if "val_mean_iou" in row), default=np.nan),
        statistics.fmean(row["seconds"] for row in times) if times else np.nan,
        max((row["memory_gb"] for row in times if "memory_gb" in row), default=np.nan),
        counts,
    )


def _by_name(counts: ImageCounts) -> ImageCounts:
    order = np.argsort(counts.names, kind="stable")
    return ImageCounts([counts.names[i] for i in order], counts.counts[order])


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _named(settings: dict[str, str]) -> dict[str, str]:
    """Call choices by their name, such as loss=ce, and leaves out all that it sets."""
    for choice in CHOICES:
        function = settings.pop(f"{choice}._target_", None)
        if function is None:
            continue
        own = {k: v for k, v in settings.items() if k.startswith(f"{choice}.")}
        changed = {}
        for file in sorted((CONFIG_FOLDER / choice).glob("*.yaml")):
            chosen = dict(_flat(OmegaConf.to_container(OmegaConf.load(file)), f"{choice}."))
            if chosen.get(f"{choice}._target_") == function:
                changed[file.stem] = {k: v for k, v in own.items() if chosen.get(k) != v}
        changed.setdefault(function.rpartition(".")[2], own)  # where it is the user's
        name = min(changed, key=lambda name: len(changed[name]))
        settings = {k: v for k, v in settings.items() if k not in own}
        settings |= {choice: name, **changed[name]}
    return settings


def _check_comparable(runs: Sequence[Run]) -> None:
    """Refuses runs that were not scored on the same classes and labelled images.

    Raises:
        InputError: Names two runs and what differs first.
    """
    first = next((run for run in runs if run.counts is not None), runs[0])
    for run in runs:
        both = f"{first.folder} and {run.folder} cannot be compared"
        if list(run.scores["per_class"]) != list(first.scores["per_class"]):
            raise InputError(f"{both}: they have different classes")
        if run.counts is None or first.counts is None:
            continue
        if different := set(run.counts.names) ^ set(first.counts.names):
            raise InputError(
                f"{both}: they were scored on different images; {len(different)} are in one of "
                f"the two only, such as {min(different)}"
            )
        pixels = COUNTS.index("label_pixels")
        same = (run.counts.counts == first.counts.counts)[:, pixels].all(axis=1)
        if not same.all():
            name = run.counts.names[int(same.argmin())]
            raise InputError(f"{both}: their labels of image {name} differ")


# Comparing


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Run whose settings are the same but for the seed, in the order of their first ones."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(sorted(run.settings.items())), []).append(run)
    return list(groups.values())


def _differing(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return the settings that are not the same in all groups, choices and functions first."""
    settings = [group[0].settings for group in groups]
    keys = dict.fromkeys(key for each in settings for key in each)
    differing = [key for key in keys if len({each.get(key) for each in settings}) > 1]
    return sorted(differing, key=lambda key: key not in CHOICES and not key.endswith("_target_"))


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return names of groups: the settings that tell them apart, or the folder of the first run."""
    settings, chosen = [group[0].settings for group in groups], list[str]()
    names = [""] * len(groups)
    for key in _differing(groups):
        longer = [_name(each, [*chosen, key]) for each in settings]
        if len(set(longer)) > len(set(names)):
            chosen.append(key)
            names = longer
    if len(groups) > 1 and max(map(len, names)) < 100:
        return names
    return [str(group[0].folder) for group in groups]


def _name(settings: dict[str, str], keys: Sequence[str]) -> str:
    """Such as "loss=dice optimizer.lr=0.01"."""
    words = []
    for key in keys:
        if key.endswith("_target_") and key in settings:
            function = settings[key].rpartition(".")[2]
            words.append(f"{key.removesuffix('._target_')}={function}")
        elif key in settings:
            words.append(f"{key}={settings[key]}")
    return " ".join(words) or f"no {keys[-1]}"


def _rows(groups: Sequence[Sequence[Run]], names: Sequence[str]) -> tuple[list[Row], Titled]:
    """Return the rows of all groups, and the table of the classes that moved."""
    rows: list[Row] = []
    moved = []
    classes = list(groups[0][0].scores["per_class"])
    baseline = _resampled(groups[0])
    for group, name in zip(groups, names, strict=True):
        paired: Any = [np.nan] * 4
        other = _resampled(group) if len(rows) else None
        if baseline is not None and other is not None:
            means, ious = (b - a for a, b in zip(baseline, other, strict=True))
            paired = [means[0], *interval(means[1:]), p_value(means[1:])]
            low, high = interval(ious[1:])
            for i in np.flatnonzero((low > 0) | (high < 0)):
                first, second = baseline[1][0, i], other[1][0, i]
                change = _signed(ious[0, i], low[i], high[i])
                moved.append([name, classes[i], f"{first:.4f}", f"{second:.4f}", change])
        values: Any = [
            number
            for score in (
                [run.scores["mean_iou"] for run in group],
                [run.scores["pixel_accuracy"] for run in group],
                [run.val_mean_iou for run in group],
            )
            for number in _mean_and_sd(score)
        ]
        seconds = statistics.fmean(run.seconds for run in group)
        memory = max(run.memory for run in group)
        rows.append(Row._make([name, len(group), *values, *map(float, paired), seconds, memory]))
    header = ("settings", "class", "IoU of the first row", "IoU", "difference [95 % interval]")
    return rows, Titled("Classes whose IoU differs from the first row's", header, moved)


def _resampled(group: Sequence[Run]) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean IoU [1 + RESAMPLES] and IoU of the classes [1 + RESAMPLES, C], means over the runs.

    The first of each is that of all images. `None` where a run has no counts of its images.
    """
    means, ious = [], []
    for run in group:
        if run.counts is None:
            return None
        counts = run.counts.counts
        sums = np.concatenate([counts.sum(axis=0, keepdims=True), resampled_sums(counts)])
        means.append(mean_scores(sums)["mean_iou"])
        ious.append(class_scores(sums)["iou"])
    return np.mean(means, axis=0), np.mean(ious, axis=0)


def _mean_and_sd(values: Sequence[float | None]) -> tuple[float, float]:
    known = [np.nan if value is None else value for value in values]
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else np.nan


# Writing


def _main_table(rows: Sequence[Row], split: str) -> Titled:
    header = (
        *("settings", "runs", f"{split} mean IoU", f"{split} pixel accuracy", "best val mean IoU"),
        *("difference [95 % interval]", "p", "s/epoch", "GPU GB"),
    )
    cells = [
        [
            *(row.settings, str(row.runs)),
            _with_sd(row.mean_iou, row.mean_iou_sd),
            _with_sd(row.pixel_accuracy, row.pixel_accuracy_sd),
            _with_sd(row.val_mean_iou, row.val_mean_iou_sd),
            _signed(row.difference, row.difference_low, row.difference_high),
            *(_number(row.p, ".4f"), _number(row.seconds_per_epoch, ".1f")),
            _number(row.gpu_memory_gb, ".2f"),
        ]
        for row in rows
    ]
    return Titled("Runs", header, cells)


def _settings_table(groups: Sequence[Sequence[Run]], names: Sequence[str]) -> Titled:
    rows = [
        [key, *(group[0].settings.get(key, "") for group in groups)] for key in _differing(groups)
    ]
    return Titled("Settings that differ", ("setting", *names), rows)


def _number(value: float, format_spec: str) -> str:
    return "" if np.isnan(value) else format(value, format_spec)


def _with_sd(value: float, sd: float) -> str:
    return _number(value, ".4f") + ("" if np.isnan(sd) else f" ± {sd:.4f}")


def _signed(value: float, low: float, high: float) -> str:
    return "" if np.isnan(value) else f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def _rich(table: Titled) -> Table:
    shown = Table(title=table.title)
    for i, name in enumerate(table.header):
        shown.add_column(escape(name), justify="right" if i else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    return shown


def _markdown(table: Titled) -> str:
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
    cells = ("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines)
    return "\n".join([f"## {table.title}", "", *cells, ""])


def _write_csv(path: str, rows: Sequence[Row]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        for row in rows:
            writer.writerow("" if v != v else v for v in row)

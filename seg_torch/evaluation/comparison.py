"""Runs that have been scored, which of them belong together, and how they differ."""

import json
import logging
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from seg_torch.checkpoints.moved import with_current_names
from seg_torch.errors import InputError, reason
from seg_torch.evaluation import bootstrap
from seg_torch.files import CONFIG_FOLDER
from seg_torch.metrics.counts import COUNTS, class_scores, mean_scores
from seg_torch.training.run import COLUMNS, TIMES, read_table

log = logging.getLogger(__name__)

# Settings that do not tell runs apart: a repetition has others.
REPEATED = {"seed", "data.seed", "output_dir", "resume"}
# Parts of the configuration that are called by their choice, such as loss=ce.
CHOICES = ("loss", "model", "optimizer", "scheduler")


class ScoredRun(NamedTuple):
    """What a run's folder holds.

    Attributes:
        folder: Its folder.
        settings: Its configuration as `section.key` -> value, without seeds, folders and
            loggers; choices such as loss=ce by name, and what was changed of them.
        scores: `<split>_metrics.json`.
        val_mean_iou: Of its best epoch, or nan.
        seconds: Of an epoch, on average, or nan.
        memory: Gigabytes on the GPU, or nan.
        counts: `<split>_images.npz`, or `None` where there is none.
    """

    folder: Path
    settings: dict[str, str]
    scores: dict[str, Any]
    val_mean_iou: float
    seconds: float
    memory: float
    counts: bootstrap.ImageCounts | None


class Group(NamedTuple):
    """Runs whose settings are the same but for the seed, and what tells them from the others."""

    name: str
    runs: list[ScoredRun]


# Reading


def read_runs(paths: Sequence[str], split: str) -> list[ScoredRun]:
    """Read the folders of runs and sweeps; runs without scores are left out, with a warning.

    Raises:
        InputError: There are no such runs, or they were scored on different images or classes.
    """
    folders = dict.fromkeys(folder for path in paths for folder in _run_folders(Path(path)))
    runs = [run for folder in folders if (run := _read_run(folder, split)) is not None]
    if not runs:
        raise InputError(f"runs={paths}: none of these runs has {split}_metrics.json")
    _check_comparable(runs)
    return runs


def _run_folders(path: Path) -> list[Path]:
    """Return the folder of a run, or those of the runs of a sweep, by number."""
    if (path / "config.yaml").is_file():
        return [path]
    jobs = [file.parent for file in path.glob("*/config.yaml")]
    if not jobs:
        raise InputError(f"runs: {path} is neither a run (it would hold config.yaml) nor a sweep")
    return sorted(jobs, key=lambda job: (not job.name.isdigit(), job.name.zfill(9)))


def _read_run(folder: Path, split: str) -> ScoredRun | None:
    path, images = folder / f"{split}_metrics.json", folder / f"{split}_images.npz"
    if not path.is_file():
        log.warning("%s is left out: it holds no %s", folder, path.name)
        return None
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        history = read_table(folder / "metrics.csv", COLUMNS)
        times = read_table(folder / "times.csv", TIMES)
        if not {"mean_iou", "pixel_accuracy", "per_class"} <= scores.keys():
            raise ValueError(f"{path.name} lacks scores")
        settings = _settings(with_current_names(config))
    except Exception as error:  # there is no end to what damaged files raise
        raise InputError(f"{folder}: cannot be read as a run: {reason(error)}") from None
    counts = None
    if images.is_file():
        counts = bootstrap.read_image_counts(images)
    else:
        log.warning("%s holds no %s: it is not compared image by image", folder, images.name)
    return ScoredRun(
        folder,
        settings,
        scores,
        _best_validation(folder, config, history),
        statistics.fmean(row["seconds"] for row in times) if times else np.nan,
        max((row["memory_gb"] for row in times if "memory_gb" in row), default=np.nan),
        counts,
    )


def _best_validation(
    folder: Path, config: dict[str, Any], history: Sequence[dict[str, Any]]
) -> float:
    """Return the mean IoU of the validation that chose `best.ckpt`, or nan.

    Where an epoch has several validations, `metrics.csv` holds the last one, and the best one is in
    the checkpoint. The table has to do where that was deleted.
    """
    best = folder / "checkpoints" / "best.ckpt"
    several = config.get("trainer", {}).get("val_check_interval") is not None
    if several and best.is_file():
        from seg_torch.checkpoints import checkpoint  # takes PyTorch, and reads all weights

        score = checkpoint.best_score(checkpoint.read(best))
        if score is not None:
            return score
    return max((row["val_mean_iou"] for row in history if "val_mean_iou" in row), default=np.nan)


def _settings(config: dict[str, Any]) -> dict[str, str]:
    """Return the settings that tell runs apart; those of a choice by its name, such as loss=ce."""
    settings = dict(_flat({key: value for key, value in config.items() if key != "plan"}))
    for choice in CHOICES:
        function = settings.pop(f"{choice}._target_", None)
        if function is None:
            continue
        of_choice = {k: v for k, v in settings.items() if k.startswith(f"{choice}.")}
        changed = {}
        for file in sorted((CONFIG_FOLDER / choice).glob("*.yaml")):
            named = dict(_flat(OmegaConf.to_container(OmegaConf.load(file)), f"{choice}."))
            if named.get(f"{choice}._target_") == function:
                changed[file.stem] = {k: v for k, v in of_choice.items() if named.get(k) != v}
        changed.setdefault(function.rpartition(".")[2], of_choice)  # where it is the user's
        name = min(changed, key=lambda name: len(changed[name]))
        settings = {k: v for k, v in settings.items() if k not in of_choice}
        settings |= {choice: name, **changed[name]}
    folder = str(config["output_dir"])
    return {
        key: value.replace(folder, "output_dir")
        for key, value in settings.items()
        if key not in REPEATED and not key.startswith("logger.")
    }


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _check_comparable(runs: Sequence[ScoredRun]) -> None:
    """Refuse runs that were not scored on the same classes and labelled images.

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
        same = run.counts.counts == first.counts.counts
        same = same[:, COUNTS.index("label_pixels")].all(axis=1)
        if not same.all():
            name = run.counts.names[int(same.argmin())]
            raise InputError(f"{both}: their labels of image {name} differ")


# Grouping


def grouped(runs: Sequence[ScoredRun]) -> list[Group]:
    """Return the runs by their settings, in the order of their first ones.

    The name of a group is made of the settings that tell it from the others, such as "loss=dice
    optimizer.lr=0.01"; where that takes too many it is the folder of the first run.
    """
    by_settings: dict[tuple, list[ScoredRun]] = {}
    for run in runs:
        by_settings.setdefault(tuple(sorted(run.settings.items())), []).append(run)
    groups = [Group(str(group[0].folder), group) for group in by_settings.values()]
    names, keys = [""] * len(groups), list[str]()
    for key in differing(groups):
        longer = [_name(group.runs[0].settings, [*keys, key]) for group in groups]
        if len(set(longer)) > len(set(names)):
            names, keys = longer, [*keys, key]
    if len(groups) > 1 and max(map(len, names)) < 100:
        return [group._replace(name=name) for group, name in zip(groups, names, strict=True)]
    return groups


def differing(groups: Sequence[Group]) -> list[str]:
    """Return the settings that are not the same in all groups, choices and functions first."""
    settings = [group.runs[0].settings for group in groups]
    keys = dict.fromkeys(key for each in settings for key in each)
    several = [key for key in keys if len({each.get(key) for each in settings}) > 1]
    return sorted(several, key=lambda key: key not in CHOICES and not key.endswith("_target_"))


def _name(settings: dict[str, str], keys: Sequence[str]) -> str:
    words = []
    for key in keys:
        if key.endswith("_target_") and key in settings:
            function = settings[key].rpartition(".")[2]
            words.append(f"{key.removesuffix('._target_')}={function}")
        elif key in settings:
            words.append(f"{key}={settings[key]}")
    return " ".join(words) or f"no {keys[-1]}"


# Comparing


def compared(groups: Sequence[Group]) -> tuple[list[dict[str, Any]], list[tuple]]:
    """Return the numbers of each group, and the classes whose IoU is not that of the first.

    Returns:
        For each group `settings`, `runs`, three means over its runs, each with its standard
        deviation `_sd`, `difference` of mean IoU to the first group with its interval and p-value,
        `seconds_per_epoch` and `gpu_memory_gb`; what is not known is nan. And for each class of a
        group that differs: name of the group, of the class, IoU of the first group, its IoU, and
        (difference, lower limit, upper limit).
    """
    rows, changes = [_row(group) for group in groups], []
    classes = list(groups[0].runs[0].scores["per_class"])
    baseline = _resampled(groups[0])
    for group, row in zip(groups[1:], rows[1:], strict=True):
        other = _resampled(group)
        if baseline is None or other is None:
            continue
        means, ious = (b - a for a, b in zip(baseline, other, strict=True))
        low, high = bootstrap.interval(means[1:])
        row |= {"difference": means[0], "difference_low": low, "difference_high": high}
        row["p"] = bootstrap.p_value(means[1:])
        low, high = bootstrap.interval(ious[1:])
        for i in np.flatnonzero((low > 0) | (high < 0)):
            both = baseline[1][0, i], other[1][0, i]
            changes.append((group.name, classes[i], *both, (ious[0, i], low[i], high[i])))
    return rows, changes


def _row(group: Group) -> dict[str, Any]:
    row: dict[str, Any] = {"settings": group.name, "runs": len(group.runs)}
    for name, values in (
        ("mean_iou", [run.scores["mean_iou"] for run in group.runs]),
        ("pixel_accuracy", [run.scores["pixel_accuracy"] for run in group.runs]),
        ("val_mean_iou", [run.val_mean_iou for run in group.runs]),
    ):
        known = [np.nan if value is None else value for value in values]
        row[name] = statistics.fmean(known)
        row[f"{name}_sd"] = statistics.stdev(known) if len(known) > 1 else np.nan
    row |= dict.fromkeys(("difference", "difference_low", "difference_high", "p"), np.nan)
    row["seconds_per_epoch"] = statistics.fmean(run.seconds for run in group.runs)
    row["gpu_memory_gb"] = max(run.memory for run in group.runs)
    return row


def _resampled(group: Group) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean IoU [1 + RESAMPLES] and IoU of the classes [1 + RESAMPLES, C], means over the runs.

    The first of each is that of all images. `None` where a run has no counts of its images.
    """
    means, ious = [], []
    for run in group.runs:
        if run.counts is None:
            return None
        counts = run.counts.counts
        sums = np.concatenate([counts.sum(axis=0, keepdims=True), bootstrap.resampled_sums(counts)])
        means.append(mean_scores(sums)["mean_iou"])
        ious.append(class_scores(sums)["iou"])
    return np.mean(means, axis=0), np.mean(ious, axis=0)

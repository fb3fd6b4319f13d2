"""seg-torch inspect: what is in a dataset, and whether it can be trained on."""

import logging
from pathlib import Path

from omegaconf import DictConfig

from seg_torch.configuration import instantiate
from seg_torch.data.inspection import class_cells, inspect_data
from seg_torch.drawing.table import print_table
from seg_torch.folders import claimed

log = logging.getLogger(__name__)


def inspect(cfg: DictConfig) -> bool:
    """Print and write what is in all splits; return whether training would be refused."""
    with claimed(cfg.output_dir):
        findings = inspect_data(instantiate(cfg.data), cfg.output_dir)
    if findings["splits"]:
        splits = [f"{name}: {of['images']:,} images" for name, of in findings["splits"].items()]
        rows = [[name, *class_cells(findings, row)] for name, row in findings["classes"].items()]
        cells = [[cell.replace("\n", " in ") for cell in row] for row in rows]
        title = "share of the pixels, in so many images"
        print_table(title, ["class", *splits, "weight"], cells)
    if findings["mean"]:
        mean, std = ([round(v, 4) for v in findings[key]] for key in ("mean", "std"))
        log.info("training images: mean %s, standard deviation %s", mean, std)
    for note in findings["notes"]:
        log.info("%s", note)
    problems = findings["problems"]
    if problems:
        log.info("training would be refused, %d problems:", len(problems))
    for problem in problems[:5]:
        pixels = [f"{count:,} pixels of {value}" for value, count in problem["pixels"].items()]
        log.info("  %s", "; ".join([problem["message"], *pixels]))
    if len(problems) > 5:
        log.info("  ... and %d more; the files below list all", len(problems) - 5)
    for name in ("inspect.html", "inspect.json"):
        log.info("%s", Path(cfg.output_dir, name))
    return findings["refused"]

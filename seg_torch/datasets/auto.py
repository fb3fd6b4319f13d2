"""A folder of any format: which one it is, and why."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from seg_torch.datasets import base
from seg_torch.datasets.annotations.coco import coco, coco_panoptic, is_coco
from seg_torch.datasets.annotations.label_studio import is_label_studio, label_studio
from seg_torch.datasets.annotations.labelme import is_labelme, labelme
from seg_torch.datasets.annotations.masks import cvat, labelme_voc, roboflow
from seg_torch.datasets.annotations.yolo import read_yaml, yolo
from seg_torch.datasets.folder import folder
from seg_torch.datasets.hub import hf
from seg_torch.datasets.layout import find_parts
from seg_torch.errors import InputError

# The formats and what each is recognised by, in the order in which they are looked for.
FORMATS = """\
  folder         images/ and masks/, or other names and places of these; classes.txt
  cvat           labelmap.txt and SegmentationClass/
  labelme_voc    class_names.txt and SegmentationClass/ or SegmentationClassPNG/
  roboflow       _classes.csv beside images and masks
  yolo           a YAML file with names, train and val
  hf             what datasets' save_to_disk wrote, or Parquet files
  coco           JSON with images, annotations and categories
  coco_panoptic  the same, with segments_info
  label_studio   JSON, a list of tasks with data and annotations
  labelme        JSON files with shapes and imagePath"""


def auto(root: str | Path, split: str, **options: Any) -> Any:
    """Return the dataset in a folder, in whichever of these formats it is.

    `folder`, `cvat`, `labelme_voc`, `roboflow`, `yolo`, `hf`, `coco`, `coco_panoptic`,
    `label_studio` and `labelme` are looked for in this order; the log says which was found and by
    what.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".
        options: Of the format that is found, such as `val_fraction`.

    Returns:
        The samples of the split.

    Raises:
        InputError: The folder is in none of these formats, or not as its format has it; or the
            format has no such option.
    """
    dataset, reason = recognise(Path(root).expanduser())
    base.say(f"data=auto: {root} is read as data={dataset.__name__}, because of {reason}")
    known = [*inspect.signature(dataset).parameters][2:]
    for option in options.keys() - known:
        raise InputError(
            f"data.dataset.{option}: data={dataset.__name__} has no such option; it has "
            f"{', '.join(known)}"
        )
    return dataset(root, split, **options)


def recognise(home: Path) -> tuple[Callable[..., Any], str]:
    """Return the function of the dataset in a folder, and what it is recognised by.

    Raises:
        InputError: The folder is in none of the formats.
    """
    if not home.is_dir() or not base.first_names(home):
        source = "export it from your annotation tool, with its images"
        base.find(home, "A dataset", ["images and annotations"], source)
    if (home / "images").is_dir() and (home / "masks").is_dir():
        return folder, "its folders images and masks"
    if (home / "labelmap.txt").is_file() and (home / "SegmentationClass").is_dir():
        return cvat, "labelmap.txt and SegmentationClass"
    for masks in ("SegmentationClass", "SegmentationClassPNG"):
        if (home / "class_names.txt").is_file() and (home / masks).is_dir():
            return labelme_voc, f"class_names.txt and {masks}"
    for file in base.list_files(home, ("_classes.csv",)):
        return roboflow, file
    for file in base.list_files(home, (".yaml", ".yml")):
        try:
            read_yaml(home / file)
        except InputError:
            continue
        return yolo, f"the names and splits in {file}"
    for file in ("dataset_dict.json", "dataset_info.json"):
        if (home / file).is_file():
            return hf, file
    for file in base.list_files(home, (".parquet",)):
        return hf, file
    return _by_json(home, tuple(base.list_files(home, (".json",))))


@lru_cache(maxsize=1)  # a file of COCO takes seconds, for each split
def _by_json(home: Path, files: tuple[str, ...]) -> tuple[Callable[..., Any], str]:
    """Return the same for the formats that are JSON."""
    for file in files[:20]:  # one without annotations, such as a description, may come first
        content = base.read_json(home / file)
        if is_labelme(content):
            return labelme, f"the shapes and the imagePath in {file}"
        if is_label_studio(content):
            return label_studio, f"the tasks with annotations in {file}"
        if is_coco(content):
            if any("segments_info" in annotation for annotation in content["annotations"]):
                return coco_panoptic, f"the segments_info in {file}"
            return coco, f"the images, annotations and categories in {file}"
    where, parts = find_parts(home)
    inside = "" if where == home else f" in {where.relative_to(home).as_posix()}/"
    if any(images == masks for images, masks in parts.values()):
        return folder, f"its images beside masks of the same names with _mask or the like{inside}"
    if parts:
        paths = {path.relative_to(where).as_posix() for pair in parts.values() for path in pair}
        names = ", ".join(sorted(f"{path}/" for path in paths if path != "."))
        what = "masks beside its images" if "." in paths else "images and masks"
        return folder, f"its folders {names} of {what}{inside}"
    raise InputError(
        f"data=auto: {home} holds {base.first_names(home)} and is in none of the formats that "
        f"are known:\n{FORMATS}\n{_likeliest(home)}If it is a dataset that has a name of its own, "
        "give data=NAME; docs/datasets.md lists them."
    )


def _likeliest(home: Path) -> str:
    """Say which format a folder may be meant to have, and what it lacks for that."""
    folders = {path.name for path in home.glob("*") if path.is_dir()}
    texts = base.list_files(home, (".txt",))
    if any("labels" in Path(file).parts[:-1] for file in texts):
        return (
            "It looks like yolo without its data.yaml. Write one, with the names of the classes: "
            '{"train": "images/train", "val": "images/val", "names": ["cat", "dog"]}\n'
        )
    if "SegmentationClass" in folders:
        lists = "cvat has labelmap.txt, labelme_voc has class_names.txt"
        return f"It looks like an export as masks without its list of classes: {lists}.\n"
    if base.list_files(home, ("_mask.png",)):
        return (
            "It looks like roboflow without _classes.csv, or folder with images that lack masks.\n"
        )
    for kind in ("images", "masks"):
        if kind in folders:
            other = "masks/" if kind == "images" else "images/"
            return f"It looks like folder without {other}.\n"
    if base.list_files(home, (".xml",)):
        return "XML is not read: export COCO JSON or masks from the annotation tool instead.\n"
    return ""

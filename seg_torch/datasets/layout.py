"""Where the images and masks of a folder lie, and which split their folders and lists say."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from seg_torch.datasets import base
from seg_torch.errors import InputError
from seg_torch.files import is_hidden, readable
from seg_torch.images.read import IMAGE_SUFFIXES

# How folders of images and of masks are called, in lower case.
IMAGES = {"images", "image", "imgs", "img", "photos", "jpegimages"}
MASKS = {
    *("masks", "mask", "labels", "label", "annotations", "annotation", "gt", "groundtruth"),
    *("ground_truth", "segmentation", "segmentations", "segmentationclass"),
}
# What follows the common part of the names of an image and its mask.
IMAGE_WORD = re.compile(r"(.+)([-_. ](?:image|img|sat|rgb))", re.IGNORECASE)
MASK_WORD = re.compile(r"(.+)([-_. ](?:masks?|labels?|gt|seg|segmentation))", re.IGNORECASE)
SPLIT = re.compile(r"(train|val|test)(?:ing|id|idation)?(?:[-_]?\d{4})?", re.IGNORECASE)


def find_parts(home: Path) -> dict[str, tuple[Path, Path]]:
    """Return the folders of images and of masks, by what the names of their pairs begin with.

    These layouts are understood: `images/` and `masks/`; two folders of other names that can only
    mean the same; `train/` and `val/` (and `test/`), each with two such folders; images beside
    masks whose names end in `_mask`, in the folder itself or in each of `train/` and `val/`.

    Returns:
        "" and the two folders, or `train/` and so on, each with its two; empty where the folder has
        none of these layouts.

    Raises:
        InputError: There are several folders of images or masks, or one split has none.
    """
    if not home.is_dir():
        return {}
    if pair := _images_and_masks(home):
        return {"": pair}
    folders = [folder for folder in folders_in(home) if SPLIT.fullmatch(folder.name)]
    parts = {f"{f.name}/": pair for f in folders if (pair := _images_and_masks(f))}
    missing = [str(folder) for folder in folders if f"{folder.name}/" not in parts]
    if parts and missing:
        raise InputError(
            f"{', '.join(missing)}: no images with masks here, unlike in {', '.join(parts)}"
        )
    return parts


def folders_in(home: Path) -> list[Path]:
    """Return the folders in a folder."""
    with readable(home), os.scandir(home) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)]
    return [home / name for name in sorted(names)]


def _images_and_masks(home: Path) -> tuple[Path, Path] | None:
    """Return the two folders in a folder, or the folder itself twice."""
    if (home / "images").is_dir() and (home / "masks").is_dir():
        return home / "images", home / "masks"
    found = []
    for names in (IMAGES, MASKS):
        named = [folder for folder in folders_in(home) if folder.name.lower() in names]
        found.append([folder for folder in named if base.list_files(folder, IMAGE_SUFFIXES)])
    images, masks = found
    if images and masks:
        if len(images) + len(masks) > 2:
            listed = ", ".join(folder.name for folder in [*images, *masks])
            raise InputError(
                f"{home}: {listed} could be images and masks; call them images and masks"
            )
        return images[0], masks[0]
    stems = {os.path.splitext(file)[0] for file in _images_in(home)}
    if any(match[1] in stems or match[1] + "_sat" in stems for match in _matches(stems)):
        return home, home
    return None


def _images_in(home: Path) -> list[str]:
    with readable(home), os.scandir(home) as entries:
        names = [entry.name for entry in entries if not is_hidden(entry.name)]
    return [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]


def _matches(stems: Iterable[str]) -> list[re.Match[str]]:
    return [match for stem in stems if (match := MASK_WORD.fullmatch(stem))]


def without_words(
    images: dict[str, str], masks: dict[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the endings of images and masks by what their names have in common.

    Args:
        images: Endings by name, such as `{"a": ".jpg"}` or `{"a_sat": ".jpg"}`.
        masks: Those of the masks, such as `{"a_mask": ".png"}`; both may hold all files of one
            folder.

    Returns:
        `{"a": ".jpg"}` or `{"a": "_sat.jpg"}`, and `{"a": "_mask.png"}`; what was given where this
        leads to no pairs.
    """
    if images == masks:
        masks = {name: ending for name, ending in masks.items() if MASK_WORD.fullmatch(name)}
        images = {name: ending for name, ending in images.items() if name not in masks}
    mask_names = _cut(masks, MASK_WORD)
    for image_names in (images, _cut(images, IMAGE_WORD)):
        if mask_names and image_names and mask_names.keys() & image_names.keys():
            return image_names, mask_names
    return images, masks


def _cut(endings: dict[str, str], word: re.Pattern[str]) -> dict[str, str] | None:
    cut: dict[str, str] = {}
    for name, ending in endings.items():
        match = word.fullmatch(name)
        if match is None or match[1] in cut:
            return None
        cut[match[1]] = match[2] + ending
    return cut


def split_of_name(name: str) -> str:
    """Return the split that the first folder of a name stands for, "" where it is none."""
    match = SPLIT.fullmatch(name.partition("/")[0]) if "/" in name else None
    return match[1].lower() if match else ""


def read_split_lists(root: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names in those of `train.txt`, `val.txt` and `test.txt` that `root` has.

    A line is a name, or a path of its image that is absolute or begins at the folder, with or
    without suffix; the path of the mask may follow. An empty `test.txt` counts as none.

    Raises:
        InputError: A list has unknown names, or `train.txt` or `val.txt` has none.
    """
    files = [path for split in base.SPLITS if (path := root / f"{split}.txt").exists()]
    known = set(names) if files else set()
    lists: dict[str, list[str]] = {}
    for path in files:
        lines = base.read_list(path)
        if not lines and path.stem != "test":
            raise InputError(f"{path} is empty: list the names of its images, one per line")
        listed = {line: _listed_name(line, known, root) for line in lines}
        unknown = [line for line, name in listed.items() if name is None]
        what, each = "have no image and mask", f"{path.name} lists it, but it has no image and mask"
        base.raise_problems(unknown, f"names in {path} {what}", each)
        if lines:
            lists[path.stem] = [str(listed[line]) for line in lines]
    return lists


def _listed_name(line: str, known: set[str], root: Path) -> str | None:
    """Return the name of the sample that a line of a list stands for, if it does for one."""
    two = re.fullmatch(r"(.+\.\w+)[\s,;]+(\S.*)\.\w+", line)
    image, mask = (line, None) if two is None or line in known else two.groups()
    parts = image.replace("\\", "/").removeprefix(f"{root.absolute().as_posix()}/").split("/")
    folders = [i for i, part in enumerate(parts[:-1]) if part.lower() in IMAGES]
    # As it is; without the folder of the images; what follows it.
    paths = [image, "/".join(parts).removeprefix("./")]
    paths += ["/".join(parts[:i] + parts[i + 1 :]) for i in folders]
    paths += ["/".join(parts[i + 1 :]) for i in folders]
    for path in paths:
        for name in (path, re.sub(r"\.\w+$", "", path)):
            if name in known:
                same = mask is None or os.path.basename(mask).startswith(os.path.basename(name))
                return name if same else None
    return None

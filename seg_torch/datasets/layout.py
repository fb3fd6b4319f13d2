"""Where the images and masks of a folder lie, and which split their folders and lists say."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from shlex import quote

from seg_torch.datasets import base
from seg_torch.errors import InputError
from seg_torch.files import is_hidden, readable
from seg_torch.images.read import IMAGE_SUFFIXES

Parts = dict[str, tuple[Path, Path]]

# How folders of images and of masks are called, in lower case, without hyphens and the like.
IMAGES = {
    *("images", "image", "imgs", "img", "photos", "photo", "frames", "input", "inputs"),
    *("jpegimages", "pngimages", "originals", "original"),
}
MASKS = {
    *("masks", "mask", "labels", "label", "annotations", "annotation", "annots", "annot"),
    *("gt", "gts", "groundtruth", "groundtruths", "segmentation", "segmentations", "seg", "segs"),
    *("segmentationclass", "segmentationclasspng", "target", "targets"),
}
# What follows the common part of the names of an image and its mask.
IMAGE_WORD = re.compile(r"(.+)([-_. ](?:image|img|sat|rgb))", re.IGNORECASE)
MASK_WORD = re.compile(r"(.+)([-_. ](?:masks?|labels?|gt|seg|segmentation|l))", re.IGNORECASE)
_SPLIT = r"(train|val|test)(?:ing|id|idation)?(?:[-_]?\d{4})?"
SPLIT = re.compile(_SPLIT, re.IGNORECASE)
# `train_images`, `trainannot` and `images_train`
SPLIT_AND_WORD = re.compile(rf"{_SPLIT}[-_. ]?(.*)", re.IGNORECASE)
WORD_AND_SPLIT = re.compile(rf"(.+?)[-_. ]?{_SPLIT}", re.IGNORECASE)
DEPTH = 2  # so many folders of archives may lie around a dataset


def find_parts(home: Path, depth: int = DEPTH) -> tuple[Path, Parts]:
    """Return the folder of a dataset, and its folders of images and masks.

    These layouts are understood: two folders, `images/` and `masks/` or of other names that can
    only mean the same; `train/` and `val/` (and `test/`) in each of the two, or each with two such
    folders, or in their names (`train_images/`, `train_masks/`); images in the folder itself and
    masks in one below; images beside masks whose names end in `_mask`. The dataset may lie in the
    only folder below that has one of these layouts.

    Args:
        home: Where to look.
        depth: In how many folders the dataset may lie.

    Returns:
        The folder, and its two folders by what the names of their pairs begin with: "" or `train/`
        and so on; none where no folder has any of these layouts.

    Raises:
        InputError: There are several folders of images or masks, one split has none, or several
            folders have a layout.
    """
    if not home.is_dir():
        return home, {}
    if (parts := _parts_in(home)) or not depth:
        return home, parts
    below = [find_parts(folder, depth - 1) for folder in folders_in(home)]
    below = [(folder, parts) for folder, parts in below if parts]
    if len(below) < 2:
        return below[0] if below else (home, {})
    if all(images == masks for _, parts in below for images, masks in parts.values()):
        return home, {"": (home, home)}
    choices = [f"data.root={quote(str(folder))}" for folder, _ in below[:5]]
    raise InputError(
        f"{home}: {len(below)} folders hold images and masks of their own; say which one is meant:"
        "\n    " + "\n    ".join(choices)
    )


def _parts_in(home: Path) -> Parts:
    """Return the folders of images and masks in a folder itself."""
    if pair := _images_and_masks(home):
        return _spelled_differently(*pair) or {"": pair}
    folders = {f"{f.name}/": f for f in folders_in(home) if SPLIT.fullmatch(f.name)}
    parts = {start: pair for start, f in folders.items() if (pair := _images_and_masks(f))}
    if parts:
        rest = [folders[start] for start in folders.keys() - parts.keys()]
        _refuse_without_masks(sorted(rest), [*parts])
        return parts
    return _splits_in_names(home)


def _refuse_without_masks(folders: Iterable[Path], others: list[str]) -> None:
    """Refuse folders of train and val without masks; those of test are left out."""
    for folder in folders:
        if split_of_name(f"{folder.name}/") != "test":
            raise InputError(f"{folder}: no images with masks here, unlike in {', '.join(others)}")
        base.say(f"{folder}: there are no masks of these images, so they are left out")


def folders_in(home: Path) -> list[Path]:
    """Return the folders in a folder."""
    with readable(home), os.scandir(home) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)]
    return [home / name for name in sorted(names)]


def _images_and_masks(home: Path) -> tuple[Path, Path] | None:
    """Return the folders of images and of masks in a folder; the folder itself may be one, or both.

    Raises:
        InputError: There are several.
    """
    if (home / "images").is_dir() and (home / "masks").is_dir():
        return home / "images", home / "masks"
    images, masks = (_only_one(home, kind) for kind in ("images", "masks"))
    if images and masks:
        return images, masks
    stems = {os.path.splitext(file)[0] for file in images_in(home)}
    beside = any(match[1] in stems or match[1] + "_sat" in stems for match in _matches(stems))
    if masks and stems:
        return home, masks
    return (home, home) if beside else None


def _only_one(home: Path, kind: str) -> Path | None:
    """Return the folder of "images" or "masks"; that of this very name comes before others."""
    words = IMAGES if kind == "images" else MASKS
    found = [folder for folder in folders_in(home) if _word(folder.name) in words]
    found = [folder for folder in found if base.list_files(folder, IMAGE_SUFFIXES)]
    found = [folder for folder in found if folder.name == kind] or found
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        moves = [f"mv {quote(str(folder))} {quote(str(home / kind))}" for folder in found]
        raise InputError(
            f"{home}: each of the folders {names} could hold the {kind}; rename the one that is "
            f"meant:\n    " + "\n    ".join(moves)
        )
    return found[0] if found else None


def _word(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.lower())


def _spelled_differently(images: Path, masks: Path) -> Parts:
    """Return the folders of the splits where they are not called the same, none where they are.

    Such as `images/Train` and `masks/train`, or `images/test` without masks.
    """
    of_images, of_masks = (
        [folder for folder in folders_in(place) if SPLIT.fullmatch(folder.name)]
        for place in (images, masks)
    )
    if [folder.name for folder in of_images] == [folder.name for folder in of_masks]:
        return {}
    by_split = [{split_of_name(f"{f.name}/"): f for f in each} for each in (of_images, of_masks)]
    clear = [len(by_split[0]), len(by_split[1])] == [len(of_images), len(of_masks)]
    others = images_in(images) or len(folders_in(images)) > len(of_images)
    needed = by_split[0].keys() - {"test"}
    if not clear or others or not needed or needed != by_split[1].keys() - {"test"}:
        return {}
    parts = {f"{s}/": (f, by_split[1][s]) for s, f in by_split[0].items() if s in by_split[1]}
    _refuse_without_masks([f for s, f in by_split[0].items() if f"{s}/" not in parts], [*parts])
    return parts


def _splits_in_names(home: Path) -> Parts:
    """Return the folders whose names are those of a split and of images or masks."""
    found: dict[str, dict[str, list[Path]]] = {}
    for folder in folders_in(home):
        if match := SPLIT_AND_WORD.fullmatch(folder.name):
            split, word = match.groups()
        elif match := WORD_AND_SPLIT.fullmatch(folder.name):
            word, split = match.groups()
        else:
            continue
        kind = "masks" if _word(word) in MASKS else "images" if _word(word) in IMAGES else word
        if kind in ("masks", "images", "") and base.list_files(folder, IMAGE_SUFFIXES):
            found.setdefault(split.lower(), {}).setdefault(kind or "images", []).append(folder)
    if not any(len(kinds) == 2 for kinds in found.values()):
        return {}
    parts = {}
    for split, kinds in found.items():
        for kind, folders in kinds.items():
            if len(folders) > 1:
                names = ", ".join(folder.name for folder in folders)
                raise InputError(
                    f"{home}: each of the folders {names} could hold the {kind} of {split}; move "
                    "those away that are not meant"
                )
        if len(kinds) == 2:
            parts[f"{split}/"] = kinds["images"][0], kinds["masks"][0]
    rest = [kinds["images"][0] for kinds in found.values() if "masks" not in kinds]
    _refuse_without_masks(rest, [f"{images.name}/" for images, _ in parts.values()])
    return parts


def images_in(home: Path) -> list[str]:
    """Return the names of the images in a folder itself."""
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


def folder_of_lists(home: Path, given: Path) -> Path:
    """Return where `train.txt` and `val.txt` are: in the folder itself, or where VOC has them.

    Args:
        home: The folder of the dataset.
        given: The one that the user named, which may lie around it.
    """
    places = [home, home / "ImageSets/Segmentation", home / "ImageSets", given]
    found = [place for place in places if any((place / f"{s}.txt").is_file() for s in base.SPLITS)]
    return found[0] if found else home


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
    folders = [i for i, part in enumerate(parts[:-1]) if _word(part) in IMAGES]
    # As it is; without the folder of the images; what follows it.
    paths = [image, "/".join(parts).removeprefix("./")]
    paths += ["/".join(parts[:i] + parts[i + 1 :]) for i in folders]
    paths += ["/".join(parts[i + 1 :]) for i in folders]
    paths += ["/".join(parts[i:]) for i, part in enumerate(parts[:-1]) if SPLIT.fullmatch(part)]
    for path in paths:
        for name in (path, re.sub(r"\.\w+$", "", path)):
            if name in known:
                same = mask is None or os.path.basename(mask).startswith(os.path.basename(name))
                return name if same else None
    return None

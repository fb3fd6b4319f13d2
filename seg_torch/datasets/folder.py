"""Your own images and masks, in two folders and a list of class names."""

import hashlib
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from seg_torch.datasets import base
from seg_torch.errors import InputError
from seg_torch.files import write_atomically, write_text
from seg_torch.images.format import RGB, ImageFormat
from seg_torch.images.read import IMAGE_SUFFIXES, opened
from seg_torch.labels import IGNORE_INDEX, Labels, palette_image


def folder(
    root: str | Path,
    split: str,
    val_fraction: float = 0.2,
    seed: int = 0,
    extra: Sequence[str | Path] = (),
    format: ImageFormat = RGB,
) -> base.SegmentationDataset:
    """Return the user's own dataset.

    `root` holds `images/`, `masks/` and `classes.txt`. A mask belongs to the image of the
    same path without its suffix. `classes.txt` has one class per line, `name` or `name R G B`,
    in the order of the ids; blank lines and `#` comments are skipped.

    The kind of a mask decides what its pixels mean. RGB and RGBA masks hold the colours of
    `classes.txt` (alpha is ignored); (224, 224, 192) is not labelled. Grey and palette masks hold
    class ids; 255 is not labelled. Where all colours of `classes.txt` are greys, grey masks hold
    these greys: black-and-white masks need the lines `background 0 0 0` and `object 255 255 255`.

    `train.txt` and `val.txt` list the names of the splits, with or without suffix; without
    them the pairs are split at random. `test.txt` is optional; without it the test split is val.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".
        val_fraction: Fraction of the pairs in val, where no lists are given.
        seed: Seed of the random split; it does not depend on the seed of the training.
        extra: More folders of this layout, of the same classes, such as those that predict.py
            writes with save=[dataset]. All of their pairs belong to train.
        format: How files become images; where an image has several files, its name is what
            their names have in common.

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, something is missing in `root`, a list has unknown names,
            pairs are incomplete or ambiguous, or an extra folder has other classes.
    """
    source = "put images in images/, masks of the same names in masks/, class names in classes.txt"
    images, masks = base.find(root, "A dataset of your own", ["images", "masks"], source)
    home, endings = images.parent, _paired_endings(images, masks, format)
    if not (home / "classes.txt").exists():
        mask_files = [mask for _, _, mask in _pairs(endings, endings, images, masks)]
        raise InputError(_how_to_write_classes(home / "classes.txt", mask_files))
    labels, has_colours = base.read_classes(home / "classes.txt")
    read_mask = partial(read_folder_mask, palette=labels.palette if has_colours else None)
    chosen = split_names(home, list(endings), split, val_fraction, seed)
    pairs = _pairs(chosen, endings, images, masks)
    if split == "train":
        pairs = itertools.chain(pairs, *(_extra_pairs(more, labels, format) for more in extra))
    return base.SegmentationDataset(pairs, labels, read_mask, format)


def _extra_pairs(
    root: str | Path, labels: Labels, format: ImageFormat
) -> Iterator[tuple[str, str, str]]:
    entries = ["images", "masks", "classes.txt"]
    images, masks, classes = base.find(root, "data.dataset.extra", entries, "see docs/datasets.md")
    if base.read_classes(classes)[0] != labels:
        raise InputError(f"{classes}: other classes than those of data.root")
    endings = _paired_endings(images, masks, format)
    for name, image, mask in _pairs(endings, endings, images, masks):
        yield f"{root}/{name}", image, mask


def _pairs(
    names: Iterable[str], endings: dict[str, tuple[str, str]], images: Path, masks: Path
) -> Iterator[tuple[str, str, str]]:
    for name in names:
        image, mask = endings[name]
        yield name, f"{images}/{name}{image}", f"{masks}/{name}{mask}"


def write_folder(
    samples: Iterable[tuple[Tensor, Tensor]], labels: Labels, root: str | Path
) -> None:
    """Write samples as PNG files in the layout that `folder` reads.

    Args:
        samples: Images uint8 [3, H, W] with masks uint8 [H, W], such as a dataset of this package.
        labels: Their classes.
        root: Where `images/`, `masks/` and `classes.txt` go; files of the same names are replaced.

    Raises:
        InputError: A file to be replaced is one of the samples' own.
    """
    files = [file for pair in getattr(samples, "pairs", None) or () for file in pair[1:]]
    read = {_identity(file) for file in files if os.path.exists(file)}
    for number, (image, mask) in enumerate(samples):
        rgb = Image.fromarray(image.permute(1, 2, 0).numpy())
        for kind, content in (("images", rgb), ("masks", palette_image(mask.numpy(), labels))):
            path = Path(root, kind, f"{number:04d}.png")
            if path.exists() and _identity(path) in read:
                raise InputError(f"{path} is a file of the samples: write them to another folder")
            write_atomically(path, content.save)
    write_classes(labels, Path(root))


def _identity(file: str | Path) -> tuple[int, int]:
    """Return what tells a file from all others, whatever it is called."""
    stat = os.stat(file)
    return stat.st_dev, stat.st_ino


def write_classes(labels: Labels, root: Path) -> None:
    """Write the names and colours of classes to the `classes.txt` of a folder."""
    colours = zip(labels.names, labels.palette.tolist(), strict=True)
    text = "".join(f"{name} {red} {green} {blue}\n" for name, (red, green, blue) in colours)
    write_text(root / "classes.txt", text)


def read_folder_mask(path: Path, palette: np.ndarray | None) -> np.ndarray:
    """Return a mask of colours or of class ids, told apart by the kind of the file as in `folder`.

    Args:
        path: The file.
        palette: Colours of the classes, uint8 [C, 3], or None where `classes.txt` gives none.

    Returns:
        uint8 [H, W] of class ids and 255.

    Raises:
        InputError: The file cannot be read, or holds colours without a class.
    """
    with opened(path, "a mask") as image:
        mode = image.mode
    all_grey = palette is not None and bool((palette == palette[:, :1]).all())
    if mode not in ("RGB", "RGBA") and not (all_grey and mode in ("L", "1")):
        return base.read_index_mask(path)
    if palette is None:
        raise InputError(f"{path}: a mask of colours ({mode}); classes.txt needs them: name R G B")
    return base.read_colour_mask(path, palette)


def split_names(
    root: Path, names: Sequence[str], split: str, val_fraction: float = 0.2, seed: int = 0
) -> list[str]:
    """Return the names that belong to a split.

    They are read from `train.txt`, `val.txt` and `test.txt` in `root`. Where there is
    neither `train.txt` nor `val.txt`, whatever is not in `test.txt` is split at random, by a hash
    of each name, so that adding an image moves at most one other to the other split. Without
    `test.txt` the test split is val.

    Args:
        root: The folder of the lists.
        names: All names.
        split: "train", "val" or "test".
        val_fraction: Fraction of the names in val, where they are split at random.
        seed: Seed of the random split.

    Returns:
        The names, in the order of the list, or sorted.

    Raises:
        InputError: A list has unknown names, there is `train.txt` without `val.txt` or the reverse,
            or there are too few names to split.
    """
    lists = read_split_lists(root, names)
    split = base.val_for_test(split, root, "test" in lists)
    if split in lists:
        return lists[split]
    if "train" in lists or "val" in lists:
        raise InputError(f"{root / split}.txt is missing: give train.txt and val.txt, or neither")
    rest = sorted(set(names) - set(lists["test"]) if "test" in lists else names)
    if len(rest) < 2 or not 0 < val_fraction < 1:
        raise InputError(
            f"{root}: {len(rest)} pairs cannot be split with val_fraction={val_fraction}; it "
            "takes 2 pairs and a fraction between 0 and 1"
        )
    order = sorted(rest, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    num_val = min(max(round(len(rest) * val_fraction), 1), len(rest) - 1)
    return sorted(order[num_val:] if split == "train" else order[:num_val])


def read_split_lists(root: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names in those of `train.txt`, `val.txt` and `test.txt` that `root` has.

    Raises:
        InputError: A list has unknown names.
    """
    files = [path for split in base.SPLITS if (path := root / f"{split}.txt").exists()]
    known = set(names) if files else set()
    lists: dict[str, list[str]] = {}
    for path in files:
        lines = base.read_list(path)
        listed = [name if name in known else re.sub(r"\.\w+$", "", name) for name in lines]
        unknown = [name for name in listed if name not in known]
        base.raise_problems(unknown, f"names in {path} have no image and mask")
        lists[path.stem] = listed
    return lists


def _paired_endings(images: Path, masks: Path, format: ImageFormat) -> dict[str, tuple[str, str]]:
    """Return the endings of image and mask by name, sorted; each has exactly one partner.

    The names and their files' paths would take five times the memory of names alone.
    """
    problems: list[str] = []
    image_endings = _endings(images, "".join(format.files[:1]), problems)
    mask_endings = _endings(masks, "", problems)
    if not image_endings and not mask_endings:
        raise InputError(f"{images} and {masks} hold no images ({', '.join(IMAGE_SUFFIXES)})")
    for name, ending in image_endings.items():
        if name not in mask_endings:
            problems.append(f"{images / name}{ending}: no mask")
        others = [f"{images / name}{ending}" for ending in format.files]
        problems += [f"{file}: no such file" for file in others if not os.path.exists(file)]
    for name in mask_endings.keys() - image_endings.keys():
        problems.append(f"{masks / name}{mask_endings[name]}: no image")
    base.raise_problems(sorted(problems), "files cannot be paired; a mask is named like its image")
    return {name: (image_endings[name], mask_endings[name]) for name in sorted(image_endings)}


def _endings(folder: Path, suffix: str, problems: list[str]) -> dict[str, str]:
    """Return the ending of each image by name: the suffix or, without one, what an image may have.

    Where several have one name, that is added to the problems.
    """
    endings: dict[str, str] = {}
    for file in base.list_files(folder, (suffix.lower(),) if suffix else IMAGE_SUFFIXES):
        cut = len(file) - len(suffix) if suffix else file.rindex(".")
        name, ending = file[:cut], sys.intern(file[cut:])
        if os.path.basename(file).startswith("."):
            continue
        if endings.setdefault(name, ending) != ending:
            first = folder / f"{name}{endings[name]}"
            problems.append(f"{first}: ambiguous, there is also {os.path.basename(file)}")
    return endings


def _how_to_write_classes(path: Path, masks: Sequence[str]) -> str:
    """Say what to write to a missing classes.txt, judging by some 20 of the masks."""
    distinct: set[tuple[int, ...]] = set()
    for file in masks[:: -(-len(masks) // 20)]:
        with opened(file, "a mask") as mask:
            kinds = {"RGBA": "RGB", "1": "L"}  # black and white as 0 and 255
            pixels = np.array(mask.convert(kinds.get(mask.mode, mask.mode)))
        values = np.unique(pixels.reshape(-1, pixels.shape[2] if pixels.ndim == 3 else 1), axis=0)
        distinct |= {*map(tuple, values.tolist())}
    colours = sorted(distinct)
    if len(colours[0]) == 1:
        ids = [value for (value,) in colours]
        what = f"the values {', '.join(map(str, ids[:20]))} (255 means not labelled)"
        classes = max([i for i in ids if i != IGNORE_INDEX], default=0) + 1
        lines = ["background", *(f"class {i}" for i in range(1, min(classes, 20)))]
        if ids == [0, IGNORE_INDEX]:
            lines = ["background 0 0 0", "object 255 255 255"]
    else:
        what = f"the colours {', '.join(map(str, colours[:20]))}"
        lines = [f"class {i} {' '.join(map(str, rgb))}" for i, rgb in enumerate(colours[:20])]
    return (
        f"{path} is missing: it names the classes, one per line, in the order of their ids. The "
        f"masks that were looked at hold {what}. So write, with names of your own:\n"
        + "\n".join(lines)
    )

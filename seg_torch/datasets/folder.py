"""Your own images and masks, in two folders and a list of class names."""

import hashlib
import itertools
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from seg_torch.datasets import base
from seg_torch.datasets.found import find_classes
from seg_torch.datasets.layout import (
    MASK_WORD,
    SPLIT,
    Parts,
    find_parts,
    folder_of_lists,
    folders_in,
    read_split_lists,
    split_of_name,
    without_words,
)
from seg_torch.errors import InputError
from seg_torch.files import identity, write_atomically, write_text
from seg_torch.images.format import RGB, ImageFormat
from seg_torch.images.read import IMAGE_SUFFIXES, opened
from seg_torch.labels import IGNORE_INDEX, Labels, encode_segmap, palette_image

SOURCE = (
    "put images in images/, masks of the same names in masks/, class names in classes.txt; or "
    "images and masks in train/images, train/masks, val/images, val/masks; or a mask a_mask.png "
    "beside each image a.jpg"
)


def folder(
    root: str | Path,
    split: str,
    val_fraction: float = 0.2,
    seed: int = 0,
    extra: Sequence[str | Path] = (),
    format: ImageFormat = RGB,
) -> base.SegmentationDataset:
    """Return the user's own dataset.

    `root` holds `images/`, `masks/` and `classes.txt`, or another layout of `find_parts`. A mask
    belongs to the image of the same path without its suffix, or to the one whose name it has with
    `_mask` or the like behind it. `classes.txt` has one class per line, `name` or `name R G B`,
    in the order of the ids; blank lines and `#` comments are skipped. Without it, the classes are
    what `find_classes` finds in the masks. The log says what was taken for what.

    The kind of a mask decides what its pixels mean. RGB and RGBA masks hold the colours of
    `classes.txt` (alpha is ignored); (224, 224, 192) is not labelled. Grey and palette masks hold
    class ids; 255 is not labelled. Where all colours of `classes.txt` are greys, grey and palette
    masks hold these greys: black-and-white masks need the lines `background 0 0 0` and
    `object 255 255 255`.

    Folders named train, val and test make the split. `train.txt` and `val.txt` list the names of
    the splits, see `read_split_lists`; without lists and such folders the pairs are split at
    random. Test images are optional; without them the test split is val.

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
        InputError: The split is unknown, something is missing in `root`, a list has unknown names
            or contradicts the folders, pairs are incomplete or ambiguous, or an extra folder has
            other classes.
    """
    given = Path(root).expanduser()
    home, parts, endings = _paired(given, format)
    _refuse_empty_folders(parts, endings)
    splits, reason = _splits(folder_of_lists(home, given), list(endings), val_fraction, seed)
    chosen = splits[base.val_for_test(split, home, "test" in splits)]
    if split == "train":  # which train, inspect and plan read first
        base.say(_found_files(given, parts, endings), given)
        counts = ", ".join(f"{name} {len(names):,}" for name, names in splits.items())
        base.say(f"splits: {counts}, {reason}", given)
    own = next((f for f in (home, given) if (f / "classes.txt").exists()), home) / "classes.txt"
    labels, has_colours = _classes(own, parts, endings)
    read_mask = partial(read_folder_mask, palette=labels.palette if has_colours else None)
    pairs = _pairs(chosen, endings, parts)
    if split == "train":
        pairs = itertools.chain(pairs, *(_extra_pairs(more, labels, format) for more in extra))
    return base.SegmentationDataset(pairs, labels, read_mask, format)


def _extra_pairs(
    root: str | Path, labels: Labels, format: ImageFormat
) -> Iterator[tuple[str, str, str]]:
    home, parts, endings = _paired(Path(root).expanduser(), format)
    (classes,) = base.find(home, "data.dataset.extra", ["classes.txt"], "see docs/datasets.md")
    if base.read_classes(classes)[0] != labels:
        raise InputError(f"{classes}: other classes than those of data.root")
    for name, image, mask in _pairs(endings, endings, parts):
        yield f"{root}/{name}", image, mask


Endings = dict[str, tuple[str, str]]
Ending = dict[str, str]


def _paired(root: Path, format: ImageFormat) -> tuple[Path, Parts, Endings]:
    """Return what `find_parts` does, and the endings of image and mask by name."""
    (home, parts), source = find_parts(root), SOURCE
    if not parts:
        if base.list_files(home / "labels", (".txt",)):
            source = "labels/ holds text files: for YOLO's polygons give data=yolo, which needs a "
            source += "data.yaml; for masks, " + SOURCE
        base.find(home, "A dataset of your own", ["images", "masks"], source)
    if "" in parts:
        return home, parts, _paired_endings(*parts[""], format)
    endings: Endings = {}
    for start, folders in parts.items():
        pairs = _paired_endings(*folders, format)
        endings |= {start + name: ending for name, ending in pairs.items()}
    return home, parts, endings


def _classes(path: Path, parts: Parts, endings: Endings) -> tuple[Labels, bool]:
    """Return the classes and whether they have colours: of classes.txt, or as they are found."""
    if path.exists():
        labels, has_colours = base.read_classes(path)
        base.say(f"classes: {len(labels)}, named in {path}: {_listed(labels.names)}")
        return labels, has_colours
    lines, remembered = find_classes(base.Pairs(_pairs(endings, endings, parts)), path)
    labels, has_colours = base.labels_of(lines, path)
    text = f"classes: {len(labels)}, found in the masks since there is no classes.txt: "
    if remembered is None:
        way = f"write this to {path} and change the names:\n" + "\n".join(lines)
    else:
        copy = shlex.join(["cp", str(remembered), str(path)])
        way = f"change them in a copy of the list:\n  {copy}"
    base.say(f"{text}{_listed(labels.names)}. For other names, {way}")
    return labels, has_colours


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:12], *["..."][: len(names) > 12]])


def _found_files(root: Path, parts: Parts, endings: Endings) -> str:
    """Say which files are taken for images and which for masks."""
    kinds = []
    for number, kind in enumerate(("images", "masks")):
        counts = Counter(ending[number] for ending in endings.values()).most_common(3)
        files = ", ".join(f"{count:,} *{ending}" for ending, count in counts)
        places = [folders[number].relative_to(root).as_posix() for folders in parts.values()]
        where = " and ".join("the folder itself" if p == "." else f"{p}/" for p in places)
        kinds.append(f"{kind}: {files} in {where}")
    return "; ".join(kinds)


def _pairs(names: Iterable[str], endings: Endings, parts: Parts) -> Iterator[tuple[str, str, str]]:
    for name in names:
        start = "" if "" in parts else name.partition("/")[0] + "/"
        (images, masks), (image, mask) = parts[start], endings[name]
        below = name.removeprefix(start)
        yield name, f"{images}/{below}{image}", f"{masks}/{below}{mask}"


def _refuse_empty_folders(parts: Parts, endings: Endings) -> None:
    """Refuse a folder of a split that holds no images, whose split chance would fill."""
    filled = {name.partition("/")[0] for name in endings if "/" in name}
    for place in parts.get("", ()):
        for folder in folders_in(place):
            if SPLIT.fullmatch(folder.name) and folder.name not in filled:
                raise InputError(f"{folder}: no images here; fill it, or remove it")


def _splits(
    place: Path, names: list[str], val_fraction: float, seed: int
) -> tuple[dict[str, list[str]], str]:
    """Return the names of each split, and what made it: folders, lists, or else chance.

    Args:
        place: Where lists are.
        names: All names.
        val_fraction: As in `split_names`.
        seed: As in `split_names`.

    Raises:
        InputError: Folders and lists contradict each other, or the folders leave a split without
            images; or `split_names` raises it.
    """
    by_folder: dict[str, list[str]] = {}
    for name in names:
        by_folder.setdefault(split_of_name(name), []).append(name)
    lists = read_split_lists(place, names)
    for listed_as, listed in lists.items():
        others = [name for name in listed if split_of_name(name) not in ("", listed_as)]
        each = f"{listed_as}.txt lists it, but it lies in the folder of another split"
        what = f"images that {place / listed_as}.txt lists lie in the folder of another split"
        base.raise_problems(others, what, each)
    if lists.keys() & {"train", "val"}:
        reason = f"by {', '.join(f'{name}.txt' for name in lists)} in {place}"
    elif {"train", "val"} <= by_folder.keys():
        others = by_folder.get("", [])
        each = "it is in no folder of a split"
        base.raise_problems(others, "images lie in none of the folders train, val, test", each)
        splits = {name: by_folder[name] for name in base.SPLITS if name in by_folder} | lists
        return splits, "by the folders"
    else:
        if not by_folder.keys() & {"", "train"} or "val" in by_folder:
            found = ", ".join(sorted(filter(None, by_folder)))
            raise InputError(f"{place}: there is a folder {found}, but none for training images")
        reason = f"by chance (data.dataset.val_fraction={val_fraction:g})"
        if "test" in by_folder and "test" not in lists:
            names = [name for name in names if split_of_name(name) != "test"]
            lists["test"] = by_folder["test"]
            reason = f"test by its folder, the others {reason}"
    splits = {
        split: split_names(place, names, split, val_fraction, seed) for split in base.SPLITS[:2]
    }
    return splits | {name: lists[name] for name in lists if name == "test"}, reason


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
    read = {identity(file) for file in files if os.path.exists(file)}
    for number, (image, mask) in enumerate(samples):
        rgb = Image.fromarray(image.permute(1, 2, 0).numpy())
        for kind, content in (("images", rgb), ("masks", palette_image(mask.numpy(), labels))):
            path = Path(root, kind, f"{number:04d}.png")
            if path.exists() and identity(path) in read:
                raise InputError(f"{path} is a file of the samples: write them to another folder")
            write_atomically(path, content.save)
    write_classes(labels, Path(root))


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
        InputError: The file cannot be read, holds colours without a class, or has a palette that
            contradicts `classes.txt`.
    """
    with opened(path, "a mask") as image:
        mode = image.mode
    all_grey = palette is not None and bool((palette == palette[:, :1]).all())
    if mode in ("RGB", "RGBA"):
        if palette is None:
            raise InputError(
                f"{path}: a mask of colours ({mode}); classes.txt needs them: name R G B"
            )
        return base.read_colour_mask(path, palette)
    if mode == "P" and palette is not None:
        return read_palette_mask(path, palette, all_grey)
    ids = base.read_index_mask(path)
    if palette is None or not all_grey:
        return ids
    grey = ids * np.uint8(255) if mode == "1" else ids
    with base.parsing(path):
        return encode_segmap(np.stack([grey] * 3, axis=-1), palette)


def read_palette_mask(path: Path, palette: np.ndarray, by_colour: bool = False) -> np.ndarray:
    """Return the ids in a palette image, unless its own palette gives its pixels other classes.

    Programs that reduce the number of colours (quantize) number them in an order of their own.

    Args:
        path: The file; of another kind than palette, its values are not compared with anything.
        palette: Colours of the classes, uint8 [C, 3].
        by_colour: Take the classes of the colours then, instead of refusing the file.

    Returns:
        uint8 [H, W] of the values in the file or, `by_colour`, of class ids and 255.

    Raises:
        InputError: As `read_index_mask`, or all colours of the file are those of classes, but
            their values are not those of the same classes.
    """
    ids = base.read_index_mask(path)
    with opened(path, "a mask") as image:
        own = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    values = np.flatnonzero(np.bincount(ids.ravel(), minlength=256))
    if values.max(initial=0) >= len(own):
        return ids
    try:
        classes = encode_segmap(own[values], palette)
    except InputError:  # the colours are for viewing alone
        return ids
    other = classes != values
    if not other.any():
        return ids
    if by_colour:
        table = np.full(256, IGNORE_INDEX, np.uint8)
        table[values] = classes
        return table[ids]
    value, named = values[other][0], classes[other][0]
    colour = tuple(own[value].tolist())
    what = "what is not labelled" if named == IGNORE_INDEX else f"class {named}, counted from 0"
    raise InputError(
        f"{path}: its palette contradicts the classes: pixels of the value {value} have the colour "
        f"{colour}, which stands for {what}. If the colours are right, save the masks as RGB; if "
        "the values are, save them as grey images without a palette"
    )


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


def _paired_endings(images: Path, masks: Path, format: ImageFormat) -> Endings:
    """Return the endings of image and mask by name, sorted; each has exactly one partner.

    The names and their files' paths would take five times the memory of names alone.
    """
    problems: list[str] = []
    image_endings = _endings(images, "".join(format.files[:1]), problems)
    mask_endings = _endings(masks, "", problems)
    if images == masks.parent:  # whose images do not lie below it, as the masks do
        below = f"{masks.name}/"
        image_endings = {n: e for n, e in image_endings.items() if not n.startswith(below)}
    _refuse_two_masks(images, masks, image_endings, mask_endings)
    if not image_endings and not mask_endings:
        raise InputError(f"{images} and {masks} hold no images ({', '.join(IMAGE_SUFFIXES)})")
    if images == masks or not any(name in mask_endings for name in image_endings):
        image_endings, mask_endings = without_words(image_endings, mask_endings)
    usual = next(iter(mask_endings.values()), ".png")
    for name, ending in image_endings.items():
        if name not in mask_endings:
            image, mask = f"{images / name}{ending}", f"{masks / name}{usual}"
            problems.append(f"{image}: no mask; add {mask}, or move the image away")
        others = [f"{images / name}{ending}" for ending in format.files]
        problems += [f"{file}: no such file" for file in others if not os.path.exists(file)]
    for name in mask_endings.keys() - image_endings.keys():
        mask = f"{masks / name}{mask_endings[name]}"
        problems.append(f"{mask}: no image; add it, or move the mask away")
    what = "files cannot be paired; a mask is named like its image, or all are with _mask behind it"
    base.raise_problems(sorted(problems), what)
    intern = sys.intern
    return {
        name: (intern(image_endings[name]), intern(mask_endings[name]))
        for name in sorted(image_endings)
    }


def _refuse_two_masks(images: Path, masks: Path, of_images: Ending, of_masks: Ending) -> None:
    """Refuse an image with masks of two kinds: x_mask.png and x_label.png, or masks/x.png."""
    found: dict[str, str] = {}
    for name, ending in of_images.items():
        match = MASK_WORD.fullmatch(name)
        image = match[1] if match else ""
        if match is None or image not in of_images or (images != masks and name in of_masks):
            continue
        mask = f"{images / name}{ending}"
        other = found.get(image)
        if images != masks and image in of_masks:
            other = f"{masks / image}{of_masks[image]}"
        if other is not None:
            raise InputError(
                f"{images / image}{of_images[image]} has two masks, {mask} and {other}: move the "
                "files of one kind to another folder"
            )
        found[image] = mask


def _endings(folder: Path, suffix: str, problems: list[str]) -> Ending:
    """Return the ending of each image by name: the suffix or, without one, what an image may have.

    Where several have one name, that is added to the problems.
    """
    endings: Ending = {}
    for file in base.list_files(folder, (suffix.lower(),) if suffix else IMAGE_SUFFIXES):
        cut = len(file) - len(suffix) if suffix else file.rindex(".")
        name, ending = file[:cut], sys.intern(file[cut:])
        if endings.setdefault(name, ending) != ending:
            first = folder / f"{name}{endings[name]}"
            problems.append(f"{first}: ambiguous, there is also {os.path.basename(file)}")
    return endings

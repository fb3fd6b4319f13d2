"""The classes of masks that no list names: the values or the colours that are in them."""

import hashlib
import os
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ImageColor

from seg_torch.datasets import base
from seg_torch.errors import InputError
from seg_torch.files import cache_folder, write_text
from seg_torch.images.convert import upright
from seg_torch.images.read import opened
from seg_torch.labels import IGNORE_INDEX, VOC_PALETTE

TOO_MANY = 10_000  # values or colours, after which no more masks are read
APART = 32  # values that lie at least so far apart are greys, of which 255 is one, too
WHITE = 0xFFFFFF
VOID = int.from_bytes(VOC_PALETTE[IGNORE_INDEX].tobytes(), "big")
# Of colours with two names, the latter in the alphabet: cyan, grey, magenta.
NAMES = {bytes(ImageColor.getrgb(name)): name for name in sorted(ImageColor.colormap)}


class Counts(NamedTuple):
    """How often a value or a colour occurs.

    Attributes:
        pixels: All of its pixels.
        squares: Those at the upper left of four pixels of the same value: few at smoothed edges.
    """

    pixels: int
    squares: int


def find_classes(masks: base.Pairs, classes: Path) -> tuple[list[str], Path | None]:
    """Return the lines of a `classes.txt` for masks that have none.

    Masks of nothing but 0 and 255, or black and white, hold the background and an object. Other
    values are ids or, where they lie far apart, greys; colours get the names that CSS has for
    them. All masks are read; what was found is remembered in `~/.cache/seg_torch/classes` (or below
    `XDG_CACHE_HOME`) for as long as names, sizes and times of the files stay the same.

    Args:
        masks: The pairs of all splits.
        classes: The missing file, for messages.

    Returns:
        The lines, and the file in which they are remembered, if they could be.

    Raises:
        InputError: No mask can be read; some hold ids, others colours; or there are too many
            values or colours for them to be classes.
    """
    files = [masks.strings(index)[2] for index in range(len(masks))]
    path = _remembered(files)
    if path is not None:
        with suppress(OSError):
            if lines := path.read_text(encoding="utf-8").splitlines():
                return lines, path
    lines, complete = _look_at(files, classes)
    if path is None or not complete:
        return lines, None
    try:
        write_text(path, "".join(f"{line}\n" for line in lines))
    except OSError:  # the home folder may be read-only
        return lines, None
    return lines, path


def _remembered(files: Sequence[str]) -> Path | None:
    digest, here = hashlib.sha256(base.readers_source().encode()), os.getcwd()
    with suppress(OSError):  # a link to nothing
        for file in files:
            stat = os.stat(file)
            path = os.path.join(here, file)
            digest.update(os.fsencode(f"{path}\0{stat.st_size} {stat.st_mtime_ns}\0"))
        return cache_folder() / "classes" / f"{digest.hexdigest()[:16]}.txt"
    return None


def _look_at(files: Sequence[str], classes: Path) -> tuple[list[str], bool]:
    """Return the lines, and whether all files could be read; the check names those that cannot."""
    totals: dict[str, dict[int, Counts]] = {"values": {}, "colours": {}}
    examples: dict[str, str] = {}
    palette: dict[int, tuple[int, str]] = {}
    problems: list[str] = []

    def examine(index: int) -> tuple[dict[int, Counts], dict[int, int] | None, str] | InputError:
        try:
            return _content(files[index])
        except InputError as error:
            return error

    with closing(base.in_threads(examine, range(len(files)))) as contents:
        for file, content in zip(files, contents, strict=True):
            if isinstance(content, InputError):
                problems += content.problems or [str(content)]
                continue
            counts, own, kind = content
            examples.setdefault(kind, file)
            for value, colour in (own or {}).items():
                first, where = palette.setdefault(value, (colour, file))
                if first != colour:
                    raise InputError(
                        f"{file}: the value {value} is {_shown(colour)} here and {_shown(first)} "
                        f"in {where}: programs that reduce the number of colours number them "
                        "anew in each file. Save the masks as RGB, or as grey images of the ids"
                    )
            _add(totals[kind], counts)
            if len(totals[kind]) > TOO_MANY:
                break
    if not examples:
        base.raise_problems(problems, "masks cannot be read")
    if len(totals["colours"]) > 0 and totals["values"]:
        totals = _as_colours(totals, examples)
    kind = "colours" if totals["colours"] else "values"
    _refuse_smoothed(totals[kind], kind, examples[kind], classes)
    lines = _lines(totals[kind], kind, bool(palette))
    if len(lines) < 2:
        only = [
            _shown(value) if kind == "colours" else str(value) for value in sorted(totals[kind])
        ]
        raise InputError(
            f"{examples[kind]} and the other masks hold nothing but {' and '.join(only)}, so there "
            "is nothing to learn; are these the masks?"
        )
    return lines, not problems


def _content(path: str) -> tuple[dict[int, Counts], dict[int, int] | None, str]:
    """Return what a mask holds, the colours in the palette of its values, and what they are.

    Colours are numbers of 24 bits, red first. The palette is `None` where it says nothing.
    """
    with opened(path, "a mask") as image:
        base.refuse_lossy(image, path)
        mode, own = image.mode, image.getpalette("RGB") if image.mode == "P" else None
        if mode in ("RGB", "RGBA"):
            image = upright(image).convert("RGB")
            codes = np.frombuffer(image.tobytes("raw", "BGRX"), "<u4") & 0xFFFFFF
            return _count(codes.reshape(image.height, image.width)), None, "colours"
    values = base.read_index_mask(path)
    counts = _count(values * np.uint8(255) if mode == "1" else values)
    colours = np.array(own or [], np.uint8).reshape(-1, 3)
    known = {v: int.from_bytes(colours[v].tobytes(), "big") for v in counts if v < len(colours)}
    if all(colour == value * 0x10101 for value, colour in known.items()):
        return counts, None, "values"
    return counts, known, "values"


def _count(values: np.ndarray) -> dict[int, Counts]:
    """Count the values in an array [H, W]; of neighbours that are equal, only one is sorted."""
    corner = values[:-1, :-1]
    right = values[:, :-1] == values[:, 1:]
    equal = right[:-1] & right[1:] & (corner == values[1:, :-1])
    pixels, squares = _histogram(values.ravel()), _histogram(corner[equal])
    return {value: Counts(count, squares.get(value, 0)) for value, count in pixels.items()}


def _histogram(flat: np.ndarray) -> dict[int, int]:
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]])[: len(flat)])
    found, number = np.unique(flat[starts], return_inverse=True)
    counts = np.bincount(number, np.diff(starts, append=len(flat)))
    return dict(zip(found.tolist(), counts.astype(np.int64).tolist(), strict=True))


def _add(total: dict[int, Counts], counts: dict[int, Counts]) -> None:
    for value, (pixels, squares) in counts.items():
        before = total.get(value, Counts(0, 0))
        total[value] = Counts(before.pixels + pixels, before.squares + squares)


def _as_colours(
    totals: dict[str, dict[int, Counts]], examples: dict[str, str]
) -> dict[str, dict[int, Counts]]:
    """Return greys as colours, where other masks hold colours.

    Raises:
        InputError: These are not all greys: what a value stands for, no file says.
    """
    colours, values = dict(totals["colours"]), totals["values"]
    grey = all(colour % 0x10101 == 0 for colour in colours)
    if not grey and not (values.keys() == {0} and 0 in colours):  # a mask of nothing but black
        listed = ", ".join(map(str, sorted(values)[:10]))
        raise InputError(
            f"{examples['colours']} holds colours, {examples['values']} the values {listed}: save "
            "all masks in one of the two ways"
        )
    _add(colours, {value * 0x10101: counts for value, counts in values.items()})
    return {"colours": colours, "values": {}}


def _refuse_smoothed(counts: dict[int, Counts], kind: str, file: str, classes: Path) -> None:
    """Refuse what is no class: too many values, or most of them along the edges of others."""
    pixels, squares = (np.array(part) for part in zip(*counts.values(), strict=True))
    edges = int((squares < pixels / 4).sum())
    if len(counts) < 255 and (edges < 3 or edges <= len(counts) / 2):
        return
    most = []
    for value in sorted(counts, key=lambda value: -counts[value].pixels)[:5]:
        share = f"{100 * counts[value].pixels / pixels.sum():.2g} %"
        most.append(f"{_shown(value) if kind == 'colours' else value}: {share}")
    if squares.sum() < pixels.sum() / 2 and len(counts) > 128:
        reason = (
            "Most neighbouring pixels differ, as in a photograph; are images and masks exchanged?"
        )
    elif edges > len(counts) / 2:
        reason = (
            f"{edges:,} of them are hardly anywhere but along edges, as JPEG, smoothing and "
            "resizing leave them. Export the masks anew, as PNG and without smoothed edges; masks "
            "are resized by nearest neighbour."
        )
    else:
        reason = "If each object has its own, these are no classes: give those of a class the same."
    number = f"more than {TOO_MANY:,}" if len(counts) > TOO_MANY else f"{len(counts):,}"
    way_out = "" if len(counts) > 254 else " If each is a class, name them all there."
    raise InputError(
        f"{classes} is missing, and the masks, such as {file}, hold {number} {kind}, too many to "
        f"be taken for classes. The most frequent: {', '.join(most)}. {reason}{way_out}"
    )


def _lines(counts: dict[int, Counts], kind: str, has_palette: bool) -> list[str]:
    """Return the lines of a `classes.txt`, `name` or `name R G B`."""
    found = sorted(counts)
    if found in ([0, 255], [0, WHITE]):
        return ["background 0 0 0", "object 255 255 255"]
    if kind == "colours" and all(colour % 0x10101 == 0 for colour in found):  # ids, three times
        return [f"class {colour & 255} {_rgb(colour)}" for colour in found]
    if kind == "colours":
        return [f"{_name(colour)} {_rgb(colour)}" for colour in found if colour != VOID]
    ids = [value for value in found if value != IGNORE_INDEX]
    if not has_palette and _are_greys(found):
        return [f"class {value} {value} {value} {value}" for value in found]
    return [f"class {value}" for value in range(max(ids, default=0) + 1)]


def _are_greys(values: list[int]) -> bool:
    """Whether values are greys that stand for classes, rather than ids."""
    if len(values) > 1 and min(np.diff(values)) >= APART:
        return True
    return IGNORE_INDEX not in values and (values[0] > 0 or values[-1] >= 2 * len(values))


def _rgb(colour: int) -> str:
    return " ".join(map(str, colour.to_bytes(3, "big")))


def _name(colour: int) -> str:
    return NAMES.get(colour.to_bytes(3, "big"), f"#{colour:06x}")


def _shown(colour: int) -> str:
    return f"{_name(colour)} ({_rgb(colour).replace(' ', ', ')})"

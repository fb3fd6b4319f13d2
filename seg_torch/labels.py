"""What the classes are: their names, their colours, and the id that means "no label".

Everything that shows or stores a mask goes through `Labels`, `decode_segmap` and
`encode_segmap`, so that a class has the same colour in a sample sheet, a saved PNG and a
legend. PyTorch is not imported: class names are wanted where nothing is computed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from unicodedata import category, normalize

import numpy as np
from PIL import Image

from seg_torch.errors import InputError

if TYPE_CHECKING:
    import torch

# The id of unlabelled pixels in every mask, whatever the dataset's files call them.
IGNORE_INDEX = 255


def voc_colour_map(n: int = 256) -> np.ndarray:
    """Return the PASCAL VOC colour map (`VOCcolormap.m` of the VOC 2012 development kit).

    The bits of the class id go in turn to red, green and blue, most significant first.

    Args:
        n: Number of colours, at most 256.

    Returns:
        uint8 [n, 3].
    """
    ids = np.arange(n)
    palette = np.zeros((n, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


VOC_PALETTE = voc_colour_map()
VOC_PALETTE.setflags(write=False)


@dataclass(frozen=True)
class Labels:
    """The classes of a dataset or a model; two are equal whose names are, whatever their colours.

    Args:
        names: One name per class, in the order of the ids; 1 to 255 of them.
        palette: RGB colours, uint8 [C, 3]; by default the PASCAL VOC colour map.

    Raises:
        InputError: There are no names, too many, one twice, one that cannot be shown, or a palette
            of another length.
    """

    names: tuple[str, ...]
    palette: np.ndarray = field(default=None, compare=False)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        names = tuple(str(name) for name in self.names)
        if not 1 <= len(names) <= 255:
            raise InputError(f"{len(names)} class names: masks are 8 bit, so 1 to 255 are possible")
        unprintable = [n for n in names if len(n) > 200 or {*map(category, n)} & {"Cc", "Cs"}]
        if unprintable:
            raise InputError(
                f"the class name {unprintable[0][:50]!r} is longer than 200 characters or holds "
                "control characters"
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"class names given more than once: {', '.join(twice)}")
        palette = VOC_PALETTE[: len(names)] if self.palette is None else np.asarray(self.palette)
        if palette.shape != (len(names), 3) or palette.min() < 0 or palette.max() > 255:
            raise InputError(
                f"the palette has shape {palette.shape}, values {palette.min()} to "
                f"{palette.max()}: {len(names)} names need [{len(names)}, 3] in 0 to 255"
            )
        palette = palette.astype(np.uint8)
        palette.setflags(write=False)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "palette", palette)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def drawn(self) -> Labels:
        """The same classes in the colours of figures.

        Shades of grey are how files encode classes, such as 0 and 255. Over a photo they are
        hardly seen, so the PASCAL VOC colour map takes their place.
        """
        grey = (self.palette == self.palette[:, :1]).all()
        return Labels(self.names) if grey else self

    def colour(self, class_id: int) -> str:
        """Return the colour of a class in figures as HTML has it, `#rrggbb`."""
        return f"#{bytes(self.drawn.palette[class_id]).hex()}"

    def to_dict(self) -> dict:
        """Return names and palette as plain data, for checkpoints and JSON."""
        return {"names": list(self.names), "palette": self.palette.tolist()}

    @classmethod
    def from_dict(cls, data: dict) -> Labels:
        """Return the labels that `to_dict` described; further keys are ignored."""
        return cls(tuple(data["names"]), np.array(data["palette"]))


COLOUR = re.compile(
    r"(.+?)[\s,;:]+(?:rgb)?[(\[]?(\d{1,9})[\s,;]+(\d{1,9})[\s,;]+(\d{1,9})[)\]]?", re.IGNORECASE
)
# A class that is called by its colour.
ITS_COLOUR = re.compile(r"(#[0-9a-f]{6})\s+(\d{1,3} \d{1,3} \d{1,3})", re.IGNORECASE)
HEX_COLOUR = re.compile(r"(.+?)[\s,;:]+#([0-9a-f]{6})(?:\s+#.*)?", re.IGNORECASE)
NUMBERED = re.compile(r"(\d+)(?:\s*[:,;)=]\s*|\s+-\s+|\.\s+|\s+)(\S.*)")


def parse_classes(lines: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Return the names in a list of classes, in the order of their ids, and those colours it gives.

    Args:
        lines: `name`, `name R G B` or `name #RRGGBB`; what follows ` #` otherwise is a comment.
            Where each line begins with a number of 0, 1, 2 ..., that is the id of its class.

    Raises:
        InputError: The lines are numbered from 1.
    """
    names, colours = [], []
    for line in lines:
        code = HEX_COLOUR.fullmatch(line)
        if code and not COLOUR.fullmatch(code[1]):
            names.append(code[1])
            colours.append([*bytes.fromhex(code[2])])
            continue
        called = ITS_COLOUR.fullmatch(line)
        if called and " ".join(map(str, bytes.fromhex(called[1][1:]))) == called[2]:
            names.append(called[1])
            colours.append([*bytes.fromhex(called[1][1:])])
            continue
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if match := COLOUR.fullmatch(line):
            names.append(match[1])
            colours.append([int(value) for value in match.groups()[1:]])
        elif line:
            names.append(line)
    matches = [match for name in names if (match := NUMBERED.fullmatch(name))]
    numbers, rest = [int(match[1]) for match in matches], [match[2] for match in matches]
    if len(matches) < len(names) or len({*rest}) < len(names):  # as in 1 euro, 2 euro
        return names, colours
    order = sorted(range(len(names)), key=lambda i: numbers[i])
    if sorted(numbers) == [*range(len(names))]:
        return [rest[i] for i in order], [colours[i] for i in order if i < len(colours)]
    if len(names) > 1 and sorted(numbers) == [*range(1, len(names) + 1)]:
        raise InputError(
            f"its lines are numbered from 1 to {len(names)}, and ids count from 0: write a line "
            "for 0, such as 0 background; or leave the numbers out, then the first line is 0"
        )
    return names, colours


def near_equal(names: Sequence[str]) -> list[list[str]]:
    """Return the names that differ in nothing but case, spaces, hyphens and the like, in groups."""
    groups: dict[str, list[str]] = {}
    for name in names:
        visible = "".join(c for c in normalize("NFKC", name) if category(c) != "Cf")
        key = re.sub(r"[\s_-]+", " ", visible.casefold()).strip()
        groups.setdefault(key, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _as_array(values: np.ndarray | torch.Tensor) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _colour_table(palette: Labels | np.ndarray | Sequence) -> tuple[np.ndarray, int]:
    """Return colours for all 256 ids, uint8 [256, 3], and the number of classes.

    Ids beyond the palette keep their VOC colour; that of 255, a pale cream, marks ignored pixels.
    """
    colours = palette.palette if isinstance(palette, Labels) else np.asarray(palette, np.uint8)
    table = VOC_PALETTE.copy()
    table[: len(colours)] = colours
    return table, len(colours)


def decode_segmap(
    mask: np.ndarray | torch.Tensor, palette: Labels | np.ndarray | Sequence = VOC_PALETTE
) -> np.ndarray:
    """Return the colours of a map of class ids, by table look-up.

    Args:
        mask: Class ids, any integer type, NumPy or torch, [H, W] or [N, H, W]. 255 is an ignored
            pixel and becomes VOC's void colour (224, 224, 192) unless the palette has 256 entries.
        palette: Labels, or RGB colours [C, 3]; by default the PASCAL VOC colour map.

    Returns:
        uint8 NumPy array [..., H, W, 3].

    Raises:
        InputError: An id is neither in the palette nor 255.
    """
    array = _as_array(mask)
    if array.dtype.kind not in "iub":
        raise InputError(f"a mask holds class ids (integers), this one is {array.dtype}")
    ids = array.astype(np.uint8, copy=False)
    if ids is not array and array.size and not 0 <= array.min() <= array.max() <= 255:
        raise _unknown_ids(array, _colour_table(palette)[1])
    # Pillow's palette conversion is ten times as fast as NumPy's fancy indexing by rows of three.
    image = palette_image(ids.reshape(-1, ids.shape[-1] if ids.ndim else 1), palette)
    return np.array(image.convert("RGB")).reshape(*array.shape, 3)


def palette_image(
    mask: np.ndarray, palette: Labels | np.ndarray | Sequence = VOC_PALETTE
) -> Image.Image:
    """Return a mask as a Pillow image of mode P: pixels are class ids, viewers show the colours.

    The palette always has 256 colours. With fewer, Pillow would save fewer than 8 bits per pixel
    and cut off the bits of 255.

    Args:
        mask: Class ids, uint8 [H, W].
        palette: Labels, or RGB colours [C, 3].

    Raises:
        InputError: An id is neither in the palette nor 255.
    """
    table, num_classes = _colour_table(palette)
    # Adding one in 8 bits takes 255 to 0, so a single maximum checks "a class id or 255".
    if num_classes < 256 and mask.size and (mask + np.uint8(1)).max() > num_classes:
        raise _unknown_ids(mask, num_classes)
    image = Image.fromarray(mask)
    image.putpalette(table.tobytes())
    return image


def _unknown_ids(mask: np.ndarray, num_classes: int) -> InputError:
    found = np.setdiff1d(mask, [*range(num_classes), IGNORE_INDEX])
    return InputError(
        f"the mask holds ids {found[:10].tolist()}, the palette has colours for "
        f"0 to {num_classes - 1} (and 255 for ignored pixels)"
    )


def encode_segmap(
    rgb: np.ndarray | torch.Tensor, palette: Labels | np.ndarray | Sequence = VOC_PALETTE
) -> np.ndarray:
    """Return the class ids of colours: the inverse of `decode_segmap`.

    Args:
        rgb: uint8 [..., H, W, 3], NumPy or torch.
        palette: Labels, or RGB colours [C, 3], no colour twice.

    Returns:
        uint8 NumPy array [..., H, W]; VOC's void colour becomes 255.

    Raises:
        InputError: A colour is not in the palette (the message gives the number of its pixels and
            the position of the first), or the palette has the same colour for two classes.
    """
    array = _as_array(rgb)
    if array.shape[-1:] != (3,) or array.dtype != np.uint8:
        raise InputError(f"expected uint8 [..., H, W, 3], found {array.dtype} {array.shape}")
    table, num_classes = _colour_table(palette)
    ids = np.unique([*range(num_classes), IGNORE_INDEX]).astype(np.uint8)
    keys, first, counts = np.unique(_codes(table[ids]), return_index=True, return_counts=True)
    ids = ids[first]
    if (counts > 1).any():
        raise InputError(
            f"the palette gives the colour {tuple(table[ids[counts > 1][0]].tolist())} to two "
            "classes, so colours cannot be turned back into ids"
        )
    codes = _codes(array)
    position = np.searchsorted(keys, codes).clip(max=len(keys) - 1)
    unknown = keys[position] != codes
    if unknown.any():
        place = tuple(np.argwhere(unknown)[0].tolist())
        colour = tuple(array[place].tolist())
        others = len(np.unique(codes[unknown])) - 1
        raise InputError(
            f"colour {colour} at position {place} is not in the palette of {num_classes} classes "
            f"({int((codes == codes[place]).sum())} pixels; {others} other unknown colours)",
            pixels={
                (code >> 16, code >> 8 & 255, code & 255): count
                for code, count in most_frequent(codes[unknown]).items()
            },
        )
    return ids[position]


def most_frequent(values: np.ndarray) -> dict[int, int]:
    """Return how often each value of an integer array occurs, of the 20 most frequent ones."""
    found, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:20]
    return {int(found[i]): int(counts[i]) for i in order}


def likeliest_mistake(mask: np.ndarray, classes: int) -> str:
    """Say what most often leads to a mask with values that are no class, "" where nothing does."""
    found = np.setdiff1d(mask, IGNORE_INDEX).tolist()
    if found[0] > 0 and found[-1] == classes:
        return ". Ids count from 0: if these count from 1, subtract 1, or name 0 before the others"
    if found[-1] == classes:
        return ". There is one id more than names: if 0 is the background, it is named first"
    if len(found) <= classes:
        grey = found[-1]
        return (
            ". If these are greys that stand for classes, classes.txt gives each class its own, "
            f"such as {grey} {grey} {grey} behind the name"
        )
    if len(found) > max(40, 2 * classes):
        return ". So many values are left by resizing or smoothing a mask, or it is a photograph"
    return ""


def _codes(rgb: np.ndarray) -> np.ndarray:
    """Return colours uint8 [..., 3] as one number each, int32 [...]."""
    codes = rgb[..., 0].astype(np.int32) << 16
    codes |= rgb[..., 1].astype(np.int32) << 8
    return codes | rgb[..., 2]


def check_labels(target: torch.Tensor, num_classes: int) -> None:
    """Refuse label values that are no class, on the CPU only: a GPU would have to be waited for.

    Args:
        target: Integer [...].
        num_classes: Number of classes C.

    Raises:
        InputError: A value is neither in 0..C-1 nor `IGNORE_INDEX`.
    """
    if target.device.type != "cpu" or target.numel() == 0:
        return
    lowest, highest = target.masked_fill(target == IGNORE_INDEX, 0).aminmax()
    if lowest < 0 or highest >= num_classes:
        raise InputError(
            f"the labels hold the values {target.unique().tolist()}; allowed are "
            f"0..{num_classes - 1} and {IGNORE_INDEX} (ignored)"
        )

"""Classes that are merged, renamed, dropped or put in another order, without touching a mask."""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors

from seg_torch.datasets import base
from seg_torch.datasets.masks import check_values, look_up
from seg_torch.errors import InputError
from seg_torch.labels import IGNORE_INDEX, VOC_PALETTE, Labels

# New name of a class -> old names.
Groups = Mapping[str, str | Sequence[str]]
BACKGROUND = "background"
# What becomes of the classes that are in no group.
RESTS = ("keep", "background", "ignore")
EXPECTED = "expected groups such as {vehicle: [car, truck], road: road}"


def map_classes(labels: Labels, classes: Groups, rest: str) -> tuple[Labels, np.ndarray]:
    """Return the classes that groups of others make, and the class of each old id.

    Args:
        labels: The classes of a dataset.
        classes: New name -> a name of `labels`, or several, or none for a class that the dataset
            does not have; in the order of the new ids. Names are taken without regard to case
            where that leaves no doubt.
        rest: What becomes of classes in no group: "keep" keeps each, after the groups;
            "background" makes them the group of that name, by default the first; "ignore" makes
            their pixels unlabelled.

    Returns:
        The new classes, each in the colour of the first class of its group, unless another one
        has it; and a look-up table uint8 [256], in which 255 is left as it is.

    Raises:
        InputError: A name is unknown or in two groups, two new classes would have one name, or
            there is none.
    """
    if not isinstance(classes, Mapping):
        raise InputError(f"data.classes={classes}: {EXPECTED}")
    groups: dict[str, list[int]] = {}
    group_of: dict[int, str] = {}
    for new, old in classes.items():
        groups[str(new)] = [_find(labels, str(new), name) for name in _names(new, old)]
        for i in groups[str(new)]:
            if group_of.setdefault(i, str(new)) != str(new):
                raise InputError(
                    f"data.classes: {labels.names[i]} is in {group_of[i]} and in {new}; take it "
                    "out of one of them"
                )
    others = [i for i in range(len(labels)) if i not in group_of]
    if rest == "background":
        name = next((name for name in groups if name.casefold() == BACKGROUND), None)
        groups = groups if name else {BACKGROUND: [], **groups}
        groups[name or BACKGROUND] += others
    for i in others if rest == "keep" else ():
        name = labels.names[i]
        if name in groups:
            raise InputError(
                f"data.classes: {name} is a class of the data, too, and in no group. Write "
                f"{name}: [{name}, ...] if it belongs to the new one, or choose another name"
            )
        groups[name] = [i]
    if not groups:
        raise InputError(f"data.classes={{}} with data.rest={rest}: no class is left; {EXPECTED}")
    mapped = Labels(tuple(groups), _colours(labels, groups))
    table = np.full(256, IGNORE_INDEX, np.uint8)
    for new_id, ids in enumerate(groups.values()):
        table[ids] = new_id
    return mapped, table


def _names(new: object, old: Any) -> list[str]:
    names = old if isinstance(old, Sequence) and not isinstance(old, str) else [old]
    if not all(isinstance(name, str | int | float) for name in names):
        raise InputError(f"data.classes: {new}: {old} is no name and no list of names; {EXPECTED}")
    return [str(name) for name in names]


def _find(labels: Labels, new: str, name: str) -> int:
    """Return the id of a class by its name."""
    if name in labels.names:
        return labels.names.index(name)
    alike = [i for i, other in enumerate(labels.names) if other.casefold() == name.casefold()]
    if len(alike) == 1:
        return alike[0]
    near = [labels.names[i] for i in alike]
    if not near:
        folded = {other.casefold(): other for other in labels.names}
        close = difflib.get_close_matches(name.casefold(), folded, 3, 0.6)
        near = [folded[key] for key in close]
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise InputError(
        f"data.classes: {new}: the data has no class {name}{hint} Its classes are "
        f"{', '.join(labels.names)}"
    )


def _colours(labels: Labels, groups: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Return a colour for each group that no other one has, uint8 [C, 3]."""
    old, free = labels.palette.tolist(), VOC_PALETTE[:IGNORE_INDEX].tolist()
    free = [colour for colour in free if colour not in old] + free
    chosen: list[list[int]] = []
    for name, ids in groups.items():
        new = name == BACKGROUND and name not in labels.names
        wanted = [[0, 0, 0]] if new else [old[i] for i in ids]
        left = (colour for colour in [*wanted, *free] if colour not in chosen)
        chosen.append(next(left, free[0]))  # which only 256 groups have to share
    return np.array(chosen)


def as_text(groups: Mapping[str, Sequence[str]]) -> str:
    """Return groups as the command line takes them, without blanks: a terminal breaks no word."""

    def quoted(name: str) -> str:
        plain = re.fullmatch(r"\w(?:[\w -]*\w)?", name)
        return name if plain else json.dumps(name, ensure_ascii=False)

    items = (f"{quoted(new)}:[{','.join(map(quoted, old))}]" for new, old in groups.items())
    return f"{{{','.join(items)}}}"


class MappedDataset(base.BaseDataset):
    """The samples of another dataset with the classes that `map_classes` makes.

    Args:
        dataset: Any.
        classes: As in `map_classes`, like `rest`.
        rest: Of the classes in no group.

    Attributes:
        dataset: The samples with their own classes.
        table: The new class of each old one, uint8 [256].
        dropped: The old classes that are not labelled any more.
    """

    def __init__(self, dataset: base.BaseDataset, classes: Groups, rest: str) -> None:
        self.dataset, self.classes, self.rest = dataset, classes, rest
        self.labels, self.table = map_classes(dataset.labels, classes, rest)
        self.format, self.pairs = dataset.format, dataset.pairs
        names = enumerate(dataset.labels.names)
        self.dropped = [name for i, name in names if self.table[i] == IGNORE_INDEX]
        # Where the new 0 is more than the old 0, 0 and 255 alone say nothing of what is in files.
        same = np.flatnonzero(self.table == 0).tolist() == [0] and not self.dropped
        self.white_is_a_class = ""
        if same and dataset.white_is_a_class:
            self.white_is_a_class = "see what inspect says without data.classes"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image, mask = base.checked_sample(self.dataset, index)
        mapped = look_up(mask.numpy(), self.table)
        return image, tv_tensors.Mask(torch.from_numpy(mapped))

    @property
    def base_dataset(self) -> base.BaseDataset:
        """The samples that these were made from, with the new classes; else these."""
        original = self.dataset.base_dataset
        if original is self.dataset or original.labels != self.dataset.labels:
            return self
        return MappedDataset(original, self.classes, self.rest)

    def name(self, index: int, kind: str = "mask") -> str:
        """Return what the sample is called."""
        return self.dataset.name(index, kind)

    def has_same_samples(self, other: base.BaseDataset) -> bool:
        """Return whether these are the samples of another one, as of val that stands for test."""
        return isinstance(other, MappedDataset) and self.dataset.has_same_samples(other.dataset)

    def fingerprint(self) -> str | None:
        """Return what changes with the files, with how they are read, and with the classes."""
        files = self.dataset.fingerprint()
        if files is None:
            return None
        return hashlib.sha256(files.encode() + self.table.tobytes()).hexdigest()

    def image_size(self, index: int) -> tuple[int, int] | None:
        """Return (height, width) of an image by its header; `None` where that takes reading it."""
        return self.dataset.image_size(index)

    def image(self, index: int) -> np.ndarray:
        """Return the image alone, uint8 or uint16 [H, W, C]."""
        return self.dataset.image(index)

    def mask(self, index: int) -> np.ndarray:
        """Return the mask alone, uint8 [H, W], with every value checked."""
        mask = np.asarray(self.dataset.mask(index), np.uint8)
        check_values(mask, self.dataset.labels, self.name(index))
        return look_up(mask, self.table)

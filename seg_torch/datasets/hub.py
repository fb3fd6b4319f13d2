"""Datasets of the Hugging Face Hub, and folders that the library `datasets` reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import tv_tensors

from seg_torch.datasets import base
from seg_torch.datasets.folder import split_names
from seg_torch.errors import InputError, check_choice, require
from seg_torch.images.read import read_image
from seg_torch.labels import IGNORE_INDEX, Labels

log = logging.getLogger(__name__)

IMAGES, MASKS = ("image", "pixel_values"), ("label", "annotation", "mask", "segmentation_mask")


def hf(
    name: str | Path,
    split: str,
    id2label: str | Path | None = None,
    unlabelled: int | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    image_column: str | None = None,
    mask_column: str | None = None,
) -> HubDataset:
    """Return a dataset of the Hugging Face Hub with images and masks of class ids.

    The column `image` holds the images, one of `label`, `annotation`, `mask` and
    `segmentation_mask` the masks, if its type is that of images. `datasets` downloads it once and
    keeps it as files that all processes map into memory. `id2label.json` of the dataset's
    repository or folder names the classes, in the order of their ids. Splits named train,
    validation (or val, valid) and test are taken, others such as `train_tiny` only where there is
    none of these names. Without train or without validation a hash of each image's number makes
    both of the other; a test split is kept apart.

    Args:
        name: `OWNER/NAME` on the Hub, or a folder: one that `save_to_disk` wrote, or with Parquet
            files.
        split: "train", "val" or "test".
        id2label: JSON file of the class names by id; by default the dataset's own.
        unlabelled: Id of pixels that are not labelled; it is no class, and the ids above it move
            down by one. 255 always is not labelled unless it has a name.
        val_fraction: Fraction of the images in val, where the dataset has none.
        seed: Seed of that random split.
        image_column: Column of the images, where it has another name.
        mask_column: Column of the masks, in the same way.

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, the package `datasets` or the dataset is missing, it has
            no such columns or no class names, or nothing to train on.
    """
    check_choice("split", split, base.SPLITS)
    parts = _load(str(name))
    names = _class_names(str(name), id2label)
    ids = {IGNORE_INDEX: IGNORE_INDEX}
    if unlabelled is not None:
        names.pop(unlabelled, None)
        ids[unlabelled] = IGNORE_INDEX
    table = base.id_table(ids | {value: i for i, value in enumerate(names)})
    by_split = _by_split(str(name), parts)
    split = base.val_for_test(split, name, "test" in by_split)
    if split == "test" or {"train", "val"} <= by_split.keys():
        rows = by_split[split]
    else:
        rows = _to_be_split(str(name), parts, by_split)
        numbers = [str(i) for i in range(len(rows))]
        chosen = split_names(Path(name), numbers, split, val_fraction, seed)
        rows = rows.select(sorted(map(int, chosen)))
    with base.parsing(name, "id2label: "):
        labels = Labels(tuple(names.values()))
    return HubDataset(rows, labels, table, f"{name} {split}", image_column, mask_column)


def _by_split(name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables that are train, val and test, as far as there are any.

    Raises:
        InputError: Two names may be those of one split.
    """
    by_split: dict[str, Any] = {}
    used = []
    for split in base.SPLITS:
        named = [part for part in parts if base.split_of(part) == split]
        named = [part for part in named if part.isalpha()] or named  # train before train_tiny
        if len(named) > 1:
            raise InputError(
                f"{name}: each of its splits {', '.join(named)} may be {split}; save a copy with "
                "one of them by save_to_disk, and give data.name=FOLDER"
            )
        used += named
        if named:
            by_split[split] = parts[named[0]]
    if by_split and len(used) < len(parts):
        others = ", ".join(part for part in parts if part not in used)
        log.info("%s: only its splits %s are used, not %s", name, ", ".join(used), others)
    return by_split


def _to_be_split(name: str, parts: Mapping[str, Any], by_split: Mapping[str, Any]) -> Any:
    """Return the table that both train and val are made of.

    Raises:
        InputError: There is none, since nothing is trained on test images, or there are several.
    """
    tables = [by_split[split] for split in ("train", "val") if split in by_split]
    tables = tables or [content for part, content in parts.items() if not base.split_of(part)]
    if len(tables) != 1:
        raise InputError(
            f"{name} has the splits {', '.join(parts)}, none of which is called train or "
            "validation, so there is nothing to train on"
        )
    return tables[0]


class HubDataset(base.BaseDataset):
    """Images and masks in a table of the library `datasets`.

    Items are `(tv_tensors.Image uint8 [3, H, W], tv_tensors.Mask uint8 [H, W])`.

    Args:
        rows: The table; images and masks are not decoded by it.
        labels: The classes.
        table: Class id of each mask value, see `base.id_table`.
        title: What messages call it, with the split.
        image_column: As in `hf`, like `mask_column`.
        mask_column: Of the masks.
    """

    white_is_a_class = 'name it in id2label.json: {{"0": "{0}", "255": "{1}"}}'

    def __init__(
        self,
        rows: Any,
        labels: Labels,
        table: np.ndarray,
        title: str,
        image_column: str | None = None,
        mask_column: str | None = None,
    ) -> None:
        self.labels, self.table, self.title = labels, table, title
        self.columns = [
            _column(rows.features, title, "image_column", image_column, IMAGES),
            _column(rows.features, title, "mask_column", mask_column, MASKS),
        ]
        from datasets import Image

        for column in self.columns:
            rows = rows.cast_column(column, Image(decode=False))
        self.rows = rows.select_columns(self.columns)

    def has_same_samples(self, other: base.BaseDataset) -> bool:
        """Return whether these are the samples of another one, as of val that stands for test."""
        return isinstance(other, HubDataset) and self.title == other.title

    def __len__(self) -> int:
        return len(self.rows)

    def _file(self, index: int, column: int) -> tuple[str, bytes]:
        """Return what a file is called, and its content."""
        cell = self.rows.select_columns([self.columns[column]])[index][self.columns[column]]
        name = f"{self.title}[{index}] {self.columns[column]}"
        if cell is None:
            raise InputError(f"{name}: nothing here")
        return name, cell["bytes"] or Path(cell["path"]).read_bytes()

    def mask(self, index: int) -> np.ndarray:
        """Return the mask alone, uint8 [H, W].

        Raises:
            InputError: It is no image of class ids, or has a value without a name.
        """
        name, content = self._file(index, 1)
        return base.read_mapped_mask(name, self.table, content)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        name, content = self._file(index, 0)
        image, mask = read_image(name, content, self.format.white), self.mask(index)
        base.check_sizes(image, mask, name, f"{self.title}[{index}]")
        return base.as_sample(image, mask)


def _column(
    features: Mapping[str, Any], title: str, setting: str, given: str | None, known: tuple[str, ...]
) -> str:
    """Return the column that is given, or the one of a known name whose cells are images.

    Raises:
        InputError: There is no such column, or several of known names.
    """
    from datasets import Image

    def holds_images(feature: Any) -> bool:
        as_files = isinstance(feature, Mapping) and "bytes" in feature
        return isinstance(feature, Image) or as_files or getattr(feature, "dtype", "") == "binary"

    found = [given] if given else [c for c in known if c in features and holds_images(features[c])]
    if len(found) == 1 and found[0] in features:
        return found[0]
    columns = ", ".join(f"{column} ({type(f).__name__})" for column, f in features.items())
    several = f", and {' and '.join(found)} hold images" if len(found) > 1 else ""
    expected = f"one of {', '.join(known)} with images" if given is None else f"a column {given}"
    raise InputError(
        f"{title} has the columns {columns}{several}; it takes {expected}, or say which column: "
        f"data.dataset.{setting}=NAME"
    )


def _load(name: str) -> Mapping[str, Any]:
    """Return the tables of a dataset by the names of its splits."""
    require("data=hf", "hf", "datasets")
    from datasets import Dataset, load_dataset, load_from_disk

    folder = Path(name).expanduser()
    saved = any((folder / f).exists() for f in ("dataset_dict.json", "dataset_info.json"))
    try:
        content = load_from_disk(folder) if saved else load_dataset(str(folder))
    except Exception as error:  # of the Hub, the network, or any of its readers
        raise InputError(f"data.name={name}: cannot be loaded by datasets: {error}") from None
    return {"train": content} if isinstance(content, Dataset) else content


def _class_names(name: str, file: str | Path | None) -> dict[int, str]:
    """Return the names of the classes by id, in order."""
    path = Path(name).expanduser() / "id2label.json" if file is None else Path(file).expanduser()
    if file is None and not path.parent.is_dir():
        from huggingface_hub import hf_hub_download

        with suppress(Exception):  # the Hub, the network, or no such file
            path = Path(hf_hub_download(name, "id2label.json", repo_type="dataset"))
    if not path.exists():
        raise InputError(
            f"{path}: no such file, so the classes have no names; write them to a file, such as "
            f"{json.dumps({'0': 'background', '1': 'car'})}, and give data.dataset.id2label=FILE"
        )
    with base.parsing(path):
        names = dict(sorted((int(i), str(label)) for i, label in base.read_json(path).items()))
        if not names or min(names) < 0 or max(names) > 255:
            raise InputError(f"{len(names)} ids; masks hold 0 to 255")
        return names

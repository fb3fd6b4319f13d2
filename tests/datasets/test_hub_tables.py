"""Tables of the library datasets, as those of the Hugging Face Hub."""

from __future__ import annotations

import json
import logging
from functools import partial

import make_data
import numpy as np
import pytest
from annotation_copies import (
    HEIGHT,
    WIDTH,
    saved_table,
)
from hydra.utils import instantiate
from PIL import Image

from seg_torch import datasets
from seg_torch.commands.evaluate import evaluate
from seg_torch.commands.train import train
from seg_torch.data.inspection import inspect_data
from seg_torch.data.module import SegmentationDataModule
from seg_torch.errors import InputError

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture
def table(tmp_path):
    """table(): a folder as `save_to_disk` writes it, with 0 for what is not labelled."""
    pytest.importorskip("datasets")
    return partial(saved_table, tmp_path / "table")


@pytest.mark.parametrize("column", ["label", "annotation", "mask"])
def test_tables_of_datasets_are_read(table, column):
    root = table(column)
    for split, start, count in (("train", 0, 5), ("val", 5, 4), ("test", 5, 4)):
        dataset = datasets.hf(str(root), split)
        assert dataset.labels.names == ("unlabeled", "car", "sky")
        assert len(dataset) == count
        image, mask = dataset[1]
        assert (image.permute(1, 2, 0).numpy() == np.asarray(make_data.picture(start + 1))).all()
        assert (mask.numpy() == make_data.tool_mask(start + 1)).all()


def test_an_unlabelled_id_becomes_255_and_the_others_move_down(table):
    dataset = datasets.hf(str(table()), "train", unlabelled=0)
    assert dataset.labels.names == ("car", "sky")
    expected = make_data.tool_mask(0).astype(int) - 1
    assert (dataset.mask(0) == np.where(expected == -1, 255, expected)).all()


def test_one_split_alone_is_split_by_a_hash(table):
    root = table(splits=("train",))
    train, val = (datasets.hf(str(root), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (4, 1)
    images = [{d[i][0].sum().item() for i in range(len(d))} for d in (train, val)]
    assert not images[0] & images[1]


def numbers(dataset) -> list[int]:
    """Which pictures are in a dataset."""
    known = {np.asarray(make_data.picture(i)).tobytes(): i for i in range(30)}
    return [known[dataset[i][0].permute(1, 2, 0).numpy().tobytes()] for i in range(len(dataset))]


def split_table(folder, **splits: range) -> str:
    """A table with the splits of these names, and so many pictures in each."""
    import datasets as hub

    features = hub.Features({"image": hub.Image(), "label": hub.Image()})
    parts = {
        split: hub.Dataset.from_dict(
            {
                "image": [make_data.picture(i) for i in pictures],
                "label": [Image.fromarray(make_data.tool_mask(i)) for i in pictures],
            },
            features=features,
        )
        for split, pictures in splits.items()
    }
    hub.DatasetDict(parts).save_to_disk(folder)
    make_data.write_json(folder / "id2label.json", {"0": "unlabeled", "1": "car", "2": "sky"})
    return str(folder)


def test_e07_a_small_split_beside_train_does_not_replace_it(tmp_path, caplog):
    pytest.importorskip("datasets")
    root = split_table(
        tmp_path / "t",
        train=range(6),
        train_tiny=range(2),
        validation=range(6, 9),
        other=range(9, 11),
    )
    with caplog.at_level(logging.INFO, "seg_torch"):
        found = {split: numbers(datasets.hf(root, split)) for split in ("train", "val", "test")}
    assert found == {"train": [*range(6)], "val": [6, 7, 8], "test": [6, 7, 8]}
    assert "only its splits train, validation are used, not train_tiny, other" in caplog.text


@pytest.mark.parametrize(
    "splits",
    [
        {"validation": range(10), "test": range(10, 20)},
        {"train": range(10), "test": range(10, 20)},
        {"all": range(10), "test": range(10, 20)},
        {"validation": range(10)},
    ],
)
def test_e07_nothing_is_trained_on_that_is_scored(tmp_path, splits):
    pytest.importorskip("datasets")
    root = split_table(tmp_path / "t", **splits)
    train, val, test = (numbers(datasets.hf(root, s)) for s in ("train", "val", "test"))
    assert sorted(train + val) == [*range(10)]
    assert len(train) == 8
    assert test == ([*range(10, 20)] if "test" in splits else val)


def test_e07_test_images_alone_can_be_scored_but_not_trained_on(tmp_path):
    pytest.importorskip("datasets")
    root = split_table(tmp_path / "t", test=range(10))
    assert numbers(datasets.hf(root, "test")) == [*range(10)]
    for split in ("train", "val"):
        with pytest.raises(InputError, match="the splits test, none of which is called train"):
            datasets.hf(root, split)


def test_e07_two_splits_that_may_be_train_are_refused(tmp_path):
    pytest.importorskip("datasets")
    root = split_table(tmp_path / "t", train_a=range(5), train_b=range(5, 9))
    with pytest.raises(InputError, match="each of its splits train_a, train_b may be train"):
        datasets.hf(root, "train")


def columns_table(folder, **columns) -> str:
    """A table of four pictures with these columns beside `image`: type and values."""
    import datasets as hub

    features = {"image": hub.Image(), **{name: kind for name, (kind, _) in columns.items()}}
    values = {"image": [make_data.picture(i) for i in range(4)]}
    values |= {name: values for name, (_, values) in columns.items()}
    table = hub.Dataset.from_dict(values, features=hub.Features(features))
    hub.DatasetDict({"train": table}).save_to_disk(folder)
    make_data.write_json(folder / "id2label.json", {"0": "unlabeled", "1": "car", "2": "sky"})
    return str(folder)


def test_e77_a_column_is_chosen_by_its_type_too(tmp_path):
    hub = pytest.importorskip("datasets")
    masks = [Image.fromarray(make_data.tool_mask(i)) for i in range(4)]
    label = hub.ClassLabel(names=["indoor", "outdoor"])
    root = columns_table(tmp_path / "t", mask=(hub.Image(), masks), label=(label, [0, 1, 0, 1]))
    dataset = datasets.hf(root, "train")
    (number, *_) = numbers(dataset)
    assert (dataset.mask(0) == make_data.tool_mask(number)).all()


def test_e77_a_setting_chooses_a_column(tmp_path, compose):
    hub = pytest.importorskip("datasets")
    masks = [Image.fromarray(make_data.tool_mask(i)) for i in range(4)]
    empty = [Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)) for _ in range(4)]
    columns = {"mask": (hub.Image(), empty), "label": (hub.Image(), masks)}
    root = columns_table(tmp_path / "t", **columns, seen=(hub.Image(), empty))
    with pytest.raises(InputError, match=r"label and mask hold images.*data\.dataset\.mask_column"):
        datasets.hf(root, "train")
    with pytest.raises(InputError, match="it takes a column masks, or say"):
        datasets.hf(root, "train", mask_column="masks")
    assert not datasets.hf(root, "train", mask_column="mask").mask(0).any()
    line = ["data=hf", f"data.name={root}", "data.dataset.mask_column=label"]
    config = compose("train", *line, "data.dataset.image_column=seen")
    dataset = instantiate(config.data, _convert_="all").dataset("train")
    assert dataset.mask(0).any()
    assert not dataset[0][0].any()


def test_e83_inspect_speaks_of_a_table_in_its_own_words(tmp_path):
    hub = pytest.importorskip("datasets")
    masks = [np.where(make_data.tool_mask(i), 255, 0).astype(np.uint8) for i in range(4)]
    root = columns_table(tmp_path / "t", label=(hub.Image(), [*map(Image.fromarray, masks)]))
    findings = inspect_data(SegmentationDataModule(datasets.hf, name=root))
    assert findings["dataset"] == root
    (problem,) = findings["problems"]
    assert "classes.txt" not in problem["message"]
    assert 'name it in id2label.json: {"0": "unlabeled", "255": "car"}' in problem["message"]
    assert not any("images of test are in val" in note for note in findings["notes"])
    assert "There are no test images of their own: val stands in for test." in findings["notes"]
    make_data.write_json(tmp_path / "t" / "id2label.json", {"0": "unlabeled", "255": "car"})
    assert not inspect_data(SegmentationDataModule(datasets.hf, name=root))["problems"]


def test_what_a_table_lacks_is_said(table, tmp_path):
    root = table("pixels")
    with pytest.raises(
        InputError, match=r"columns image \(Image\), pixels \(Image\), caption .*; it takes one of"
    ):
        datasets.hf(str(root), "train")
    root = table(names=("unlabeled", "car"))
    with pytest.raises(InputError, match=r"train\[0\] label: mask values \[0, 1, 2\]"):
        datasets.hf(str(root), "train").mask(0)
    (root / "id2label.json").write_text('{"0": "car", "300": "sky"}')
    with pytest.raises(InputError, match=r"id2label\.json: 2 ids; masks hold 0 to 255"):
        datasets.hf(str(root), "train")
    (root / "id2label.json").unlink()
    with pytest.raises(
        InputError, match=r"id2label\.json: no such file(.|\n)*data\.dataset\.id2label"
    ):
        datasets.hf(str(root), "train")
    with pytest.raises(InputError, match=r"data\.name=.*nowhere: cannot be loaded"):
        datasets.hf(str(tmp_path / "nowhere"), "train")


def test_a_run_on_a_table_is_evaluated_by_its_name(table, compose, tmp_path):
    folder = tmp_path / "run"
    line = ["data=hf", f"data.name={table()}", "model=unet_random", "data.augment.crop=[32,32]"]
    brief = ["trainer.max_epochs=1", "trainer.accelerator=cpu", "data.num_workers=0"]
    train(compose("train", f"output_dir={folder}", "logger=none", *line, *brief))
    scores = json.loads((folder / "test_metrics.json").read_text())
    assert [*scores["per_class"]] == ["unlabeled", "car", "sky"]
    assert sum(row["pixels"] for row in scores["per_class"].values()) == 4 * HEIGHT * WIDTH
    again = tmp_path / "again"
    evaluate(compose("evaluate", f"checkpoint={folder}", f"output_dir={again}", brief[1]))
    found = json.loads((again / "test_metrics.json").read_text())
    assert found["confusion_matrix"] == scores["confusion_matrix"]
    # A file that somebody sends does not make this machine download what it names.
    (tmp_path / "table").rename(tmp_path / "moved")
    line = [f"checkpoint={folder}", f"output_dir={again}", brief[1]]
    with pytest.raises(InputError, match=rf"to fetch it, give data\.name={tmp_path / 'table'}"):
        evaluate(compose("evaluate", *line))
    evaluate(compose("evaluate", *line, f"data.name={tmp_path / 'moved'}"))

"""Tables of the library datasets, as those of the Hugging Face Hub."""

from __future__ import annotations

import json
from functools import partial

import make_data
import numpy as np
import pytest
from annotation_copies import (
    HEIGHT,
    WIDTH,
    saved_table,
)

from seg_torch import datasets
from seg_torch.commands.evaluate import evaluate
from seg_torch.commands.train import train
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


def test_what_a_table_lacks_is_said(table, tmp_path):
    root = table("pixels")
    with pytest.raises(InputError, match=r"the columns image, pixels, caption; it takes one of"):
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

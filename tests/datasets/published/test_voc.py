"""PASCAL VOC and SBD."""

from __future__ import annotations

import random
import shutil

import make_data
import numpy as np
import pytest
from tiny_copies import TinyCopies

from seg_torch import datasets
from seg_torch.datasets.published.voc import VOC_LABELS
from seg_torch.errors import InputError


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder with the tiny copy of each dataset, by name."""
    return TinyCopies(tmp_path_factory)


@pytest.fixture
def build(copies):
    """build(name, split): the dataset."""
    return copies.build


def test_halved_val_is_pythons_shuffle_with_seed_42(build):
    names = [f"2007_{i:06}" for i in range(4, 9)]
    random.Random(42).shuffle(names)
    val, test = (build("voc", split, halve_val=True) for split in ("val", "test"))
    assert [pair.name for pair in val.pairs] == names[:2]
    assert [pair.name for pair in test.pairs] == names[2:]
    assert len(build("voc", "train", halve_val=True)) == 4


def test_voc_2007_has_a_test_set_and_2011_unpacks_elsewhere(copies, tmp_path):
    source = copies["voc"] / "VOCdevkit" / "VOC2012"
    shutil.copytree(source, tmp_path / "VOCdevkit" / "VOC2007")
    shutil.copytree(source, tmp_path / "TrainVal" / "VOCdevkit" / "VOC2011")
    lists = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Segmentation"
    make_data.write_lines(lists / "test.txt", ["2007_000001", "2007_000007"])
    test = datasets.voc(tmp_path, "test", year="2007")
    assert [pair.name for pair in test.pairs] == ["2007_000001", "2007_000007"]
    assert len(datasets.voc(tmp_path, "train", year="2011")) == 4


def test_an_unknown_voc_year_is_refused_with_the_known_ones(build):
    with pytest.raises(InputError, match=r"'2013'.*2007.*2012"):
        build("voc", "train", year="2013")


def test_voc_sbd_is_both_training_sets_without_voc_val(build):
    train = build("voc_sbd", "train")
    assert {pair.name for pair in train.pairs} == {
        *(f"2007_{i:06}" for i in range(4)),
        *(f"2008_{i:06}" for i in range(1, 4)),
    }
    assert not {p.name for p in train.pairs} & {p.name for p in build("voc", "val").pairs}


def test_voc_sbd_prefers_the_masks_of_voc(build):
    masks = {pair.name: pair.mask.suffix for pair in build("voc_sbd", "train").pairs}
    assert masks["2007_000001"] == ".png"
    assert masks["2008_000001"] == ".mat"


def test_voc_sbd_reads_the_layout_of_torchvision_too(copies, build, tmp_path):
    shutil.copytree(copies["voc_sbd"], tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "benchmark_RELEASE" / "dataset").iterdir():
        path.rename(tmp_path / path.name)
    shutil.rmtree(tmp_path / "benchmark_RELEASE")
    names = [pair.name for pair in datasets.voc_sbd(tmp_path, "train").pairs]
    assert names == [pair.name for pair in build("voc_sbd", "train").pairs]


def test_sbd_masks_hold_what_the_matlab_file_holds(build):
    train = build("voc_sbd", "train")
    found = set(np.unique(np.stack([train.mask(i) for i in range(4, 7)])).tolist())
    assert found == {0, 7, 20}
    assert VOC_LABELS.names[7] == "car"
    assert VOC_LABELS.names[20] == "tvmonitor"


@pytest.mark.parametrize("name", ["voc", "pet"])
def test_a_download_that_fails_says_so(tmp_path, monkeypatch, name):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    for module in ("voc", "oxford_iiit_pet"):
        target = f"torchvision.datasets.{module}.download_and_extract_archive"
        monkeypatch.setattr(target, refuse)
    with pytest.raises(InputError, match=r"could not be downloaded to .*: no network"):
        getattr(datasets, name)(tmp_path, "train", download=True)


@pytest.mark.parametrize("name", ["voc", "pet"])
def test_what_is_there_is_not_downloaded_again(build, monkeypatch, name):
    for module in ("voc", "oxford_iiit_pet"):
        target = f"torchvision.datasets.{module}.download_and_extract_archive"
        monkeypatch.setattr(target, None)
    assert len(build(name, "train", download=True)) == 4

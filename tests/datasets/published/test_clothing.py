"""Clothing Co-Parsing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat
from sklearn.model_selection import train_test_split
from tiny_copies import TinyCopies

from seg_torch import datasets
from seg_torch.datasets.published.clothing import CLOTHING_LABELS
from seg_torch.errors import InputError
from seg_torch.images.read import read_image


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder with the tiny copy of each dataset, by name."""
    return TinyCopies(tmp_path_factory)


@pytest.fixture
def build(copies):
    """build(name, split): the dataset."""
    return copies.build


@pytest.fixture
def real():
    if "SEG_TORCH_DATA" not in os.environ:
        pytest.skip("SEG_TORCH_DATA does not name a folder with the real datasets")
    return Path(os.environ["SEG_TORCH_DATA"])


@pytest.mark.parametrize(("limit", "count"), [(None, 6), (5, 5), (100, 6)])
def test_the_clothing_split_is_the_one_of_scikit_learn(build, limit, count):
    train, val = train_test_split(range(count), test_size=0.2, random_state=0)
    for split, expected in (("train", train), ("val", val), ("test", val)):
        names = [pair.name for pair in build("clothing", split, limit=limit).pairs]
        assert names == [f"{i + 1:04}" for i in expected]


def test_clothing_background_is_a_class(build):
    assert CLOTHING_LABELS.names[0] == "null"
    assert all(255 not in build("clothing", "train").mask(i) for i in range(4))


def test_a_clothing_annotation_without_its_variable_is_refused(copies, tmp_path):
    shutil.copytree(copies["clothing"], tmp_path, dirs_exist_ok=True)
    dataset = datasets.clothing(tmp_path, "val")
    savemat(dataset.pairs[0].mask, {"other": np.zeros((2, 2))})
    with pytest.raises(InputError, match=r"\.mat: holds no variable 'groundtruth'"):
        dataset.mask(0)
    dataset.pairs[1].mask.write_bytes(b"cut")
    with pytest.raises(InputError, match=r"\.mat: cannot be read"):
        dataset.mask(1)


@pytest.mark.slow
def test_real_clothing_is_read_as_scipy_reads_it(real):
    root = real / "clothing-co-parsing"
    names = loadmat(root / "label_list.mat")["label_list"][0]
    assert CLOTHING_LABELS.names == tuple(str(name[0]) for name in names)
    val = datasets.clothing(root, "val", limit=20)
    for i, pair in enumerate(val.pairs):
        image, mask = val[i]
        assert (mask.numpy() == loadmat(pair.mask)["groundtruth"]).all()
        assert (image.permute(1, 2, 0).numpy() == read_image(pair.image)).all()

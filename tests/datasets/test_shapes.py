"""Generated shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seg_torch import datasets
from seg_torch.datasets.shapes import SHAPES_LABELS
from seg_torch.errors import InputError


def test_shapes_do_not_depend_on_the_global_generators_or_the_order():
    dataset = datasets.shapes("train")
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    later, first = dataset[3], dataset[0]
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    again = datasets.shapes("train", train=5)
    for a, b in ((again[0], first), (again[3], later)):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_shapes_differ_between_indices_splits_and_seeds():
    images = [
        datasets.shapes("train")[0][0],
        datasets.shapes("train")[1][0],
        datasets.shapes("val")[0][0],
        datasets.shapes("train", seed=1)[0][0],
    ]
    assert len({image.numpy().tobytes() for image in images}) == 4


def test_every_shape_occurs_and_the_ground_covers_most():
    dataset = datasets.shapes("val")
    counts = sum(np.bincount(dataset.mask(i).ravel(), minlength=256) for i in range(100))
    share = counts / counts.sum()
    assert (share[1 : len(SHAPES_LABELS)] > 0.01).all()
    assert 0.6 < share[0] < 0.9
    assert 0.02 < share[255] < 0.1


def test_a_class_of_shapes_has_no_colour_of_its_own():
    dataset = datasets.shapes("train", train=300)
    means = [[] for _ in SHAPES_LABELS.names]
    for i in range(300):
        image, mask = dataset[i]
        for class_id in mask.unique().tolist():
            if 0 < class_id < 255:
                means[class_id].append(image[:, mask == class_id].float().mean(1))
    centres = torch.stack([torch.stack(m).mean(0) for m in means[1:]])
    spread = torch.cat([torch.stack(m) for m in means[1:]]).std(0)
    assert (centres.std(0) < 0.25 * spread).all()


def test_shapes_end_where_their_length_says():
    dataset = datasets.shapes("val", val=2)
    assert len(list(dataset)) == 2


def test_shapes_come_in_any_size():
    image, mask = datasets.shapes("train", size=65)[0]
    assert image.shape == (3, 65, 65)
    assert mask.shape == (65, 65)
    with pytest.raises(InputError, match="size 16"):
        datasets.shapes("train", size=16)

"""The boundary loss and its distances, beside those of SciPy."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from losses_for_tests import NUM_CLASSES

from seg_torch.losses import BoundaryLoss
from seg_torch.losses.boundary import _distances


def test_the_boundary_loss_is_that_of_scipys_distances():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, NUM_CLASSES, 21, 34, generator=generator)
    noise = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(4, 3, 21, 34)), 3)
    target = torch.from_numpy(noise.argmax(1)).byte()
    target[0, 5:9, 10:20] = 255
    target[1, :, :] = 2  # a class alone
    target[2, :, 1:] = 255
    target[2, :, 0] = torch.arange(21) // 20  # one pixel of class 1
    p = logits.double().softmax(1).numpy()
    total = 0.0
    for image, ids in enumerate(target.numpy()):
        for c in range(NUM_CLASSES):
            positive, negative = ids == c, (ids != c) & (ids != 255)
            if positive.any() and negative.any():
                # As in the authors' one_hot2dist.
                outside = scipy.ndimage.distance_transform_edt(~positive) * negative
                inside = (scipy.ndimage.distance_transform_edt(~negative) - 1) * positive
                total += (p[image, c] * (outside - inside)).sum()
    expected = total / (NUM_CLASSES * (target != 255).sum().item())
    assert abs(expected) > 0.01
    assert BoundaryLoss()(logits, target).item() == pytest.approx(expected, rel=1e-5)


def test_distances_are_scipys_for_masks_of_every_kind():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (1, 40), (40, 1), (33, 20), (20, 33)):
        for share in (0.01, 0.5, 1.0):
            mask = rng.random(shape) < share
            mask[0, -1] = True
            expected = scipy.ndimage.distance_transform_edt(~mask)
            found = _distances(torch.from_numpy(mask))
            np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert _distances(torch.zeros(4, 5, dtype=torch.bool)).min() >= 9

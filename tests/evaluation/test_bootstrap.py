"""Intervals and p-values of scores, against scikit-learn, SciPy and plain loops."""

import numpy as np
import pytest
import scipy.stats

from seg_torch.errors import InputError
from seg_torch.evaluation.bootstrap import (
    RESAMPLES,
    interval,
    p_value,
    read_image_counts,
    resampled_sums,
)


def test_a_resample_draws_as_many_images_and_the_same_ones_for_every_run():
    drawn = resampled_sums(np.eye(7, dtype=np.int64))  # how often each image is drawn
    assert drawn.shape == (RESAMPLES, 7)
    assert (drawn.sum(axis=1) == 7).all()
    assert (drawn == drawn.round()).all()
    assert len(np.unique(drawn, axis=0)) > 500, "the resamples differ"
    other = np.random.default_rng(1).integers(0, 10**9, (7, 3, 2))
    expected = np.einsum("rn,nij->rij", drawn, other)
    np.testing.assert_array_equal(resampled_sums(other), expected)


def test_the_interval_of_a_mean_is_scipys():
    accuracy = np.random.default_rng(2).normal(0.7, 0.1, 60)
    low, high = interval(resampled_sums(accuracy) / 60)
    expected = scipy.stats.bootstrap(
        (accuracy,),
        np.mean,
        n_resamples=20000,
        method="percentile",
        random_state=np.random.default_rng(3),
    ).confidence_interval
    spread = accuracy.std() / 60**0.5
    assert abs(low - expected.low) < 0.15 * spread
    assert abs(high - expected.high) < 0.15 * spread


def test_values_that_are_missing_in_some_resamples_are_left_out_and_in_all_are_nan():
    values = np.full((41, 2), np.nan)
    values[:, 0] = np.arange(41)
    values[20:, 0] = np.nan
    low, high = interval(values)
    assert (low[0], high[0]) == (pytest.approx(0.475), pytest.approx(18.525))
    assert np.isnan([low[1], high[1]]).all()


def test_p_values_of_differences():
    ones = np.ones(999)
    assert p_value(ones) == p_value(-ones) == 2 / 1000
    assert p_value(np.zeros(999)) == 1
    some = ones.copy()
    some[:49] = -1
    assert p_value(some) == p_value(-some) == 2 * 50 / 1000


def test_false_alarms_are_as_rare_as_the_p_value_says():
    """Of runs that are equally good, about one in ten has p <= 0.1."""
    generator = np.random.default_rng(4)
    differences = generator.normal(0, 1, (300, 50))
    found = resampled_sums(differences.T).T / 50
    alarms = np.mean([p_value(row) <= 0.1 for row in found])
    assert 0.06 < alarms < 0.16


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "test_images.npz"
    path.write_text("no scores")
    with pytest.raises(InputError, match=r"test_images\.npz: cannot be read as scores of images"):
        read_image_counts(path)
    np.savez(path, names=np.array(["a"]))
    with pytest.raises(InputError, match=r"test_images\.npz: .*intersection"):
        read_image_counts(path)

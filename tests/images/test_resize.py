"""The size at which a network sees an image."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest

from seg_torch.images.resize import in_words, seen_size


def test_the_longest_side_is_the_one_that_was_set_and_the_shape_is_kept():
    rng = np.random.default_rng(0)
    for _ in range(500):
        height, width, longest = (int(value) for value in rng.integers(32, 3000, 3))
        seen = seen_size(longest, height, width)
        factor = min(Fraction(1), Fraction(longest, max(height, width)))
        exact = [side * factor for side in (height, width)]
        assert max(seen) == min(longest, max(height, width))
        rounded = tuple(floor(side + Fraction(1, 2)) for side in exact)  # half a pixel is one
        assert seen == tuple(max(32, side) for side in rounded)
        assert seen_size(longest, width, height) == seen[::-1]
        assert seen_size(longest, *seen) == seen, "what was reduced is not reduced again"


@pytest.mark.parametrize(
    ("resize", "size", "seen"),
    [
        (None, (70, 50), (70, 50)),
        ([264, 352], (70, 50), (264, 352)),
        ((264, 352), (264, 352), (264, 352)),
        (70, (70, 50), (70, 50)),  # never enlarged
        (71, (70, 50), (70, 50)),
        (35, (70, 65), (35, 33)),  # 32.5
        (100, (10, 4000), (10, 100)),  # what is below 32 pixels stays
        (100, (40, 4000), (32, 100)),  # nothing comes below them
        (100, (4000, 40), (100, 32)),
    ],
)
def test_some_sizes(resize, size, seen):
    assert seen_size(resize, *size) == seen


def test_it_is_said_in_words():
    assert in_words(None) == "at their own size"
    assert in_words((264, 352)) == "at [264, 352]"
    assert in_words(640) == "with no side longer than 640 pixels"

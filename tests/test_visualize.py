"""Pictures of masks: the additive overlay and the legend in a given number of columns."""

import numpy as np

from seg_torch.datasets.camvid32 import CAMVID32_LABELS
from seg_torch.labels import Labels
from seg_torch.visualize import additive_overlay, legend

LABELS = Labels(("a", "b"), np.array([(100, 200, 0), (255, 255, 255)]))


def test_the_additive_overlay_is_image_plus_six_tenths_of_the_colours():
    image = np.full((1, 3, 3), 100, np.uint8)
    mask = np.array([[0, 1, 255]], np.uint8)
    # 100 + 0.6 * 100 = 160, 100 + 0.6 * 200 = 220, 100 + 0; 100 + 0.6 * 255 = 253; ignored: 100.
    expected = [[[160, 220, 100], [253, 253, 253], [100, 100, 100]]]
    assert np.asarray(additive_overlay(image, mask, LABELS)).tolist() == expected


def test_the_additive_overlay_saturates():
    image = np.full((1, 2, 3), 200, np.uint8)
    picture = additive_overlay(image, np.array([[0, 1]], np.uint8), LABELS)
    assert np.asarray(picture).tolist() == [[[255, 255, 200], [255, 255, 255]]]


def test_the_legend_of_camvid_has_32_swatches_in_2_rows_of_16():
    palette = CAMVID32_LABELS.palette.copy()
    palette[21] = (1, 2, 3)  # the sky has the grey of the swatches' frames
    picture = np.asarray(legend(Labels(CAMVID32_LABELS.names, palette), columns=16))
    swatches = [np.argwhere((picture == colour).all(-1)) for colour in palette]
    assert all(len(pixels) == 15 * 15 for pixels in swatches)
    tops, lefts = np.array([pixels.min(axis=0) for pixels in swatches]).T.reshape(2, 2, 16)
    assert (tops == tops[:, :1]).all()
    assert tops[0, 0] < tops[1, 0]
    assert (np.diff(lefts) > 15).all()
    assert (lefts[0] == lefts[1]).all()

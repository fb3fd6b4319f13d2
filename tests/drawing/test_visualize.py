"""Images of masks: overlays, legends and sheets."""

import numpy as np
import pytest
from PIL import Image

from seg_torch.datasets.published.camvid32 import CAMVID32_LABELS
from seg_torch.drawing.visualize import (
    legend,
    overlay,
    sample_sheet,
    save_overlay,
    side_by_side,
)
from seg_torch.errors import InputError
from seg_torch.labels import Labels
from seg_torch.prediction.segmentation import Segmentation

LABELS = Labels(("a", "b"), np.array([(100, 200, 0), (255, 255, 255)]))


def test_the_overlay_is_a_weighted_mean_and_leaves_ignored_pixels():
    image = np.full((300, 3, 3), 100, np.uint8)  # more rows than one band
    mask = np.tile(np.array([0, 1, 255], np.uint8), (300, 1))
    blended = np.asarray(overlay(image, mask, LABELS, alpha=0.2))
    # 0.8 * 100 + 0.2 * (100, 200, 0) and 0.8 * 100 + 0.2 * 255 = 131
    assert blended[0].tolist() == [[100, 120, 80], [131, 131, 131], [100, 100, 100]]
    assert (blended == blended[0]).all()


@pytest.mark.parametrize("size", [(1, 1), (256, 40), (257, 333), (2600, 30)])
def test_a_saved_overlay_has_the_pixels_of_pillows_jpeg_of_the_whole(tmp_path, size):
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (*size, 3), np.uint8)
    mask = random.choice(np.array([0, 1, 255], np.uint8), size)
    save_overlay(str(tmp_path / "strips.jpg"), image, mask, LABELS, quality=92)
    overlay(image, mask, LABELS).save(tmp_path / "whole.jpg", quality=92)
    with Image.open(tmp_path / "strips.jpg") as found, Image.open(tmp_path / "whole.jpg") as whole:
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(found), np.asarray(whole))


def test_an_overlay_that_no_jpeg_can_hold_is_refused_and_nothing_is_written(tmp_path):
    image, mask = np.zeros((65_501, 1, 3), np.uint8), np.zeros((65_501, 1), np.uint8)
    with pytest.raises(InputError, match="65501 x 1 pixels, 65500 a side at most: leave overlay"):
        save_overlay(str(tmp_path / "long.jpg"), image, mask, LABELS, quality=92)
    assert not list(tmp_path.iterdir())


def test_the_legend_of_camvid_has_32_swatches_in_2_rows_of_16():
    palette = CAMVID32_LABELS.palette.copy()
    palette[21] = (1, 2, 3)  # the sky has the grey of the swatches' frames
    drawn = np.asarray(legend(Labels(CAMVID32_LABELS.names, palette), columns=16))
    swatches = [np.argwhere((drawn == colour).all(-1)) for colour in palette]
    assert all(len(pixels) == 15 * 15 for pixels in swatches)
    tops, lefts = np.array([pixels.min(axis=0) for pixels in swatches]).T.reshape(2, 2, 16)
    assert (tops == tops[:, :1]).all()
    assert tops[0, 0] < tops[1, 0]
    assert (np.diff(lefts) > 15).all()
    assert (lefts[0] == lefts[1]).all()


def test_side_by_side_shows_the_image_and_an_overlay_with_legend_per_title():
    image = np.full((300, 250, 3), 100, np.uint8)
    masks = {"one": (np.zeros((300, 250), np.uint8), LABELS)}
    masks["two"] = (np.ones((300, 250), np.uint8), LABELS)
    sheet = np.asarray(side_by_side(image, masks))
    assert sheet.shape[1] == 3 * 250 + 2 * 4
    middle = [sheet[24 + 150, left + 125].tolist() for left in (0, 254, 508)]
    assert middle == [[100, 100, 100], [100, 150, 50], [177, 177, 177]]
    below = sheet[24 + 300 + 4 :]
    has_colour = (below == (100, 200, 0)).all(-1).any(axis=0)
    assert has_colour[254:504].any()
    assert not has_colour[508:].any()  # the second mask holds the other class alone
    assert (below[:, :250] == 255).all()


def test_a_sample_sheet_has_a_row_per_sample_and_names_the_classes_in_it():
    images = [np.full((40, 80, 3), 10, np.uint8), np.full((80, 40, 3), 20, np.uint8)]
    masks = [np.full(image.shape[:2], 0, np.uint8) for image in images]
    masks[1][:] = 255
    sheet = np.asarray(sample_sheet(images, masks, masks, LABELS, tile=64))
    assert sheet.shape[1] == 3 * 64 + 2 * 4
    first, second = 24 + 16, 24 + 32 + 4 + 64  # rows of 32 and 128 pixels
    assert sheet[first, [32, 100, 168]].tolist() == [[10] * 3, [100, 200, 0], [100, 200, 0]]
    void = [224, 224, 192]
    assert sheet[second, [32, 100, 168]].tolist() == [[20] * 3, void, void]
    key = sheet[24 + 32 + 4 + 128 + 4 :]
    assert (key == (100, 200, 0)).all(-1).any()
    assert len(key) == 24 + 6  # one line: class b does not occur


@pytest.mark.parametrize("brightness", [40, 128, 220])
def test_e50_the_object_of_a_grey_palette_is_seen_in_all_that_is_drawn(brightness):
    """Classes of 0 and 255 in the files: grey on a grey photo."""
    labels = Labels(("background", "crack"), np.array([[0] * 3, [255] * 3]))
    image = np.full((32, 32, 3), brightness, np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 1
    result = Segmentation(mask, labels, image)
    for drawn in (result.overlay(), result.colour()):
        crack = np.array(drawn)[10, 10].astype(int)
        assert crack.max() - crack.min() > 40  # a colour
    assert {(128, 0, 0)} <= {tuple(row) for row in np.array(result.legend()).reshape(-1, 3)}
    assert labels.colour(1) == "#800000"
    sheet = np.array(sample_sheet([image], [mask], [mask], labels)).reshape(-1, 3)
    assert (sheet == (128, 0, 0)).all(1).sum() > 1000
    # What is read again keeps the colours of the files.
    assert labels.palette.tolist() == [[0] * 3, [255] * 3]
    assert Labels(("a", "b"), np.array([[0] * 3, [0, 0, 9]])).colour(1) == "#000009"

"""Segmenter, Segmentation and predict.py."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from seg_torch.errors import InputError
from seg_torch.images import read_image
from seg_torch.labels import Labels
from seg_torch.models.network import Network
from seg_torch.prediction import find_images
from seg_torch.segmenter import Segmentation, Segmenter

LABELS = Labels(("dark", "bright"), np.array([[10, 20, 30], [200, 100, 50]]))


class Threshold(nn.Module):
    """Bright pixels are class 1: a pointwise model whose masks are known."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        brightness = x.mean(1, keepdim=True) - 0.5
        return torch.cat([-brightness, brightness], 1)


@pytest.fixture
def segmenter() -> Segmenter:
    return Segmenter(Network(Threshold(), mean=(0, 0, 0), std=(1, 1, 1)), LABELS, device="cpu")


@pytest.fixture
def picture() -> np.ndarray:
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, 40:] = 250
    return image


def test_every_kind_of_input_gives_the_same_mask(segmenter, picture, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    expected = (picture[..., 0] > 127).astype(np.uint8)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    for given in (path, str(path), Image.fromarray(picture), picture, tensor):
        result = segmenter.predict(given)
        assert result.mask.dtype == np.uint8
        assert np.array_equal(result.mask, expected)


def test_a_photo_taken_upright_is_labelled_upright(segmenter, picture, tmp_path):
    path = tmp_path / "phone.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    Image.fromarray(picture).save(path, exif=exif, quality=95)
    mask = segmenter.predict(path).mask
    assert mask.shape == (64, 48)
    assert np.array_equal(mask, np.rot90((picture[..., 0] > 127).astype(np.uint8), -1))


def test_masks_have_the_size_of_the_photo_whatever_the_network_sees(picture):
    network = Network(Threshold(), mean=(0, 0, 0), std=(1, 1, 1))
    result = Segmenter(network, LABELS, resize=(24, 32), device="cpu").predict(picture)
    assert result.mask.shape == (48, 64)
    wrong = result.mask != (picture[..., 0] > 127)
    assert not wrong[:, :37].any()
    assert not wrong[:, 43:].any()


def test_saved_masks_are_ids_with_the_palette_of_the_labels(segmenter, picture, tmp_path):
    segmenter.predict(picture).save(tmp_path, "a/b")
    with Image.open(tmp_path / "mask/a/b.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.array(image), picture[..., 0] > 127)
        colours = np.array(image.convert("RGB"))
    assert np.array_equal(np.unique(colours.reshape(-1, 3), axis=0), LABELS.palette)
    assert read_image(tmp_path / "overlay/a/b.jpg").shape == picture.shape


def test_an_overlay_is_the_weighted_mean_and_leaves_ignored_pixels(picture):
    mask = (picture[..., 0] > 127).astype(np.uint8)
    mask[:5] = 255
    pixels = np.array(Segmentation(mask, LABELS, picture).overlay(alpha=0.25)).astype(float)
    expected = 0.75 * picture + 0.25 * LABELS.palette[np.minimum(mask, 1)]
    assert np.abs(pixels - expected)[5:].max() <= 1
    assert np.array_equal(pixels[:5], picture[:5])


def test_the_legend_shows_the_colours_of_the_classes_that_occur(picture):
    mask = np.ones((48, 64), np.uint8)
    legend = np.array(Segmentation(mask, LABELS, picture).legend()).reshape(-1, 3)
    assert (legend == LABELS.palette[1]).all(1).any()
    assert not (legend == LABELS.palette[0]).all(1).any()


@pytest.mark.parametrize("wrong", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_an_array_of_another_kind_is_refused(segmenter, wrong):
    with pytest.raises(InputError, match=r"expected uint8 \[H, W, 3\]"):
        segmenter.predict(wrong)


def test_files_that_differ_in_their_extension_get_outputs_of_their_own(tmp_path):
    for name in ("x/a.png", "x/a.jpg", "b.PNG", "notes.txt", "x/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == {
        "b": tmp_path / "b.PNG",
        "x/a.jpg": tmp_path / "x/a.jpg",
        "x/a.png": tmp_path / "x/a.png",
        "x/c": tmp_path / "x/c.png",
    }


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_pictures_is_refused_by_name(tmp_path, name):
    with pytest.raises(InputError, match=str(tmp_path / name)):
        find_images(tmp_path / name)

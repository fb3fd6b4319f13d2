"""Segmentation: one result that draws and saves itself."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from predictions import LABELS, Threshold

from seg_torch.errors import InputError
from seg_torch.images.read import read_image
from seg_torch.labels import Labels, encode_segmap
from seg_torch.models.network import Network
from seg_torch.prediction.inference import Inference
from seg_torch.prediction.segmentation import OUTPUTS, Segmentation, output_path, segment
from seg_torch.prediction.segmenter import Segmenter


@pytest.fixture
def segmenter() -> Segmenter:
    return Segmenter(Network(Threshold(), mean=(0, 0, 0), std=(1, 1, 1)), LABELS, device="cpu")


@pytest.fixture
def scene() -> np.ndarray:
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, 40:] = 250
    return image


@pytest.mark.promise(23)
def test_saved_masks_are_ids_with_the_palette_of_the_labels(segmenter, scene, tmp_path):
    segmenter.predict(scene).save(tmp_path, "a/b")
    with Image.open(tmp_path / "mask/a/b.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.array(image), scene[..., 0] > 127)
        colours = np.array(image.convert("RGB"))
    assert np.array_equal(np.unique(colours.reshape(-1, 3), axis=0), LABELS.palette)
    assert read_image(tmp_path / "overlay/a/b.jpg").shape == scene.shape


def test_an_overlay_is_the_weighted_mean_and_leaves_ignored_pixels(scene):
    mask = (scene[..., 0] > 127).astype(np.uint8)
    mask[:5] = 255
    pixels = np.array(Segmentation(mask, LABELS, scene).overlay(alpha=0.25)).astype(float)
    expected = 0.75 * scene + 0.25 * LABELS.palette[np.minimum(mask, 1)]
    assert np.abs(pixels - expected)[5:].max() <= 1
    assert np.array_equal(pixels[:5], scene[:5])


@pytest.mark.parametrize("output", ["mask", "colour", "overlay"])
def test_a_mask_with_unknown_ids_is_neither_drawn_nor_saved(scene, tmp_path, output):
    mask = np.full(scene.shape[:2], 7, np.uint8)
    with pytest.raises(InputError, match=r"holds ids \[7\]"):
        Segmentation(mask, LABELS, scene).save(tmp_path, outputs=[output])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_legend_shows_the_colours_of_the_classes_that_occur(scene):
    mask = np.ones((48, 64), np.uint8)
    legend = np.array(Segmentation(mask, LABELS, scene).legend()).reshape(-1, 3)
    assert (legend == LABELS.palette[1]).all(1).any()
    assert not (legend == LABELS.palette[0]).all(1).any()


def test_areas_are_shares_of_the_pixels_by_name(scene):
    mask = np.zeros((48, 64), np.uint8)
    mask[:12] = 1
    assert Segmentation(mask, LABELS, scene).areas() == {"dark": 0.75, "bright": 0.25}


@pytest.mark.promise(23)
def test_a_saved_mask_names_its_classes(segmenter, scene, tmp_path):
    labels = Labels(("straße", "木"))
    mask = segmenter.predict(scene).mask
    Segmentation(mask, labels, scene).save(tmp_path, "a", ["mask"])
    with Image.open(tmp_path / "mask/a.png") as image:
        assert json.loads(image.text["names"]) == ["straße", "木"]


def test_saved_colours_turn_back_into_the_mask(segmenter, scene, tmp_path):
    result = segmenter.predict(scene)
    result.save(tmp_path, "a", ["colour"])
    assert np.array_equal(encode_segmap(read_image(tmp_path / "colour/a.png"), LABELS), result.mask)


def test_saved_probabilities_are_float16_and_decide_the_mask(segmenter, scene, tmp_path):
    result = segmenter.predict(scene, probabilities=True)
    result.save(tmp_path, "a", ["probabilities"])
    with np.load(tmp_path / "probabilities/a.npz") as content:
        probabilities = content["probabilities"]
        assert content["names"].tolist() == ["dark", "bright"]
    assert probabilities.dtype == np.float16
    # Dark: brightness 0, logits (0.5, -0.5), so that the first has exp(1) / (1 + exp(1)).
    assert probabilities[0, 0, 0] == pytest.approx(0.7311, abs=1e-3)
    assert probabilities.sum(0) == pytest.approx(1, abs=2e-3)
    assert np.array_equal(probabilities.argmax(0), result.mask)
    assert result.confidence == pytest.approx(probabilities.max(0).astype(float).mean(), abs=1e-3)


def test_probabilities_have_to_be_asked_for(segmenter, scene):
    with pytest.raises(InputError, match="probabilities=True"):
        segmenter.predict(scene).probabilities()


def test_a_notebook_shows_the_overlay(segmenter, scene):
    result = segmenter.predict(scene)
    with Image.open(io.BytesIO(result._repr_png_())) as shown:
        assert np.array_equal(np.array(shown), np.array(result.overlay()))


@pytest.mark.parametrize("output", OUTPUTS)
def test_every_output_of_an_image_is_a_file(segmenter, scene, tmp_path, output):
    Image.fromarray(scene).save(tmp_path / "a.png")
    result = segmenter.predict(tmp_path / "a.png", probabilities=True, confidence_map=True)
    result.save(tmp_path / "out", "x/a", [output])
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    images = {tmp_path / "out/dataset/images/x/a.png"} if output == "dataset" else set()
    assert set(files) == {output_path(tmp_path / "out", output, "x/a"), *images}
    assert output_path("out", "dataset", "x/a") == Path("out/dataset/masks/x/a.png")
    for copy in images:
        assert copy.read_bytes() == (tmp_path / "a.png").read_bytes()
    if output in ("mask", "geotiff", "dataset"):
        with Image.open(output_path(tmp_path / "out", output, "x/a")) as mask:
            assert np.array_equal(np.array(mask), result.mask)


@pytest.mark.parametrize("output", ["geotiff", "dataset"])
def test_what_is_about_a_file_needs_one(segmenter, scene, tmp_path, output):
    with pytest.raises(InputError, match="read from a file"):
        segmenter.predict(scene).save(tmp_path, outputs=[output])


def test_two_results_are_shown_side_by_side(scene):
    mask = np.zeros(scene.shape[:2], np.uint8)
    first, second = Segmentation(mask, LABELS, scene), Segmentation(mask + 1, LABELS, scene)
    both = replace(first, compared={"one": first, "two": second}).side_by_side()
    assert both.width > first.side_by_side().width


def test_a_network_in_training_stays_in_training(scene):
    network = Network(Threshold(), mean=(0, 0, 0), std=(1, 1, 1)).train()
    (result,) = segment(Inference(network, 2), LABELS, [scene])
    assert np.array_equal(result.mask, scene[..., 0] == 250)
    assert network.training

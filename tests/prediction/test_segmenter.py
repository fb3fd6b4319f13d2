"""Segmenter: images to masks. Segmentation: one result that draws and saves itself."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from seg_torch.errors import InputError
from seg_torch.images.read import read_image
from seg_torch.images.resize import resize_image
from seg_torch.labels import Labels, encode_segmap
from seg_torch.models.network import Network
from seg_torch.prediction.segmenter import Segmentation, Segmenter

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
def scene() -> np.ndarray:
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, 40:] = 250
    return image


def test_every_kind_of_input_gives_the_same_mask(segmenter, scene, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(scene).save(path)
    expected = (scene[..., 0] > 127).astype(np.uint8)
    tensor = torch.from_numpy(scene).permute(2, 0, 1)
    for given in (path, str(path), Image.fromarray(scene), scene, tensor):
        result = segmenter.predict(given)
        assert result.mask.dtype == np.uint8
        assert np.array_equal(result.mask, expected)


@pytest.mark.promise(20)
def test_a_photo_taken_upright_is_segmented_upright(segmenter, scene, tmp_path):
    path = tmp_path / "phone.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    Image.fromarray(scene).save(path, exif=exif, quality=95)
    mask = segmenter.predict(path).mask
    assert mask.shape == (64, 48)
    assert np.array_equal(mask, np.rot90((scene[..., 0] > 127).astype(np.uint8), -1))


@pytest.mark.promise(13)
def test_masks_have_the_size_of_the_image_whatever_the_network_sees(scene):
    network = Network(Threshold(), mean=(0, 0, 0), std=(1, 1, 1))
    result = Segmenter(network, LABELS, resize=(24, 32), device="cpu").predict(scene)
    assert result.mask.shape == (48, 64)
    wrong = result.mask != (scene[..., 0] > 127)
    assert not wrong[:, :37].any()
    assert not wrong[:, 43:].any()


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


@pytest.mark.parametrize("wrong", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_an_array_of_another_kind_is_refused(segmenter, wrong):
    with pytest.raises(InputError, match=r"expected uint8 \[H, W, 3\]"):
        segmenter.predict(wrong)


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


class Strided(nn.Module):
    """Three classes at half the size, as most networks give fewer logits than pixels."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": torch.nn.functional.avg_pool2d(3 * x, 2, 2, ceil_mode=True)}


@pytest.mark.parametrize("resize", [None, (40, 50)])
def test_results_of_a_batch_are_those_of_plain_pytorch(resize):
    """Resize, network, upsample, softmax, argmax."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    images = [np.array(Image.fromarray(values).resize((99, 71))) for values in noise]
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    seen = batch if resize is None else resize_image(batch, resize)
    logits = torch.nn.functional.interpolate(
        Strided()(seen / 255)["out"], (71, 99), mode="bilinear"
    )
    network = Network(Strided(), mean=(0, 0, 0), std=(1, 1, 1))
    segmenter = Segmenter(network, Labels(("a", "b", "c")), resize, "cpu", precision="32-true")
    results = segmenter.predict_batch(images, probabilities=True)
    for result, image, expected in zip(results, images, logits.softmax(1).numpy(), strict=True):
        assert np.array_equal(result.image, image)
        assert np.abs(result.probabilities() - expected).max() < 5e-4
        assert (result.mask == expected.argmax(0)).mean() > 0.999
        assert result.confidence == pytest.approx(expected.max(0).mean(), abs=1e-5)


def test_settings_reach_the_inference(scene):
    network = Network(Threshold(), mean=(0, 0, 0), std=(1, 1, 1))
    settings = {"tile": 64, "scales": (0.5, 1), "flip": True, "precision": "bf16-mixed"}
    segmenter = Segmenter(network, LABELS, device="cpu", **settings)
    assert {name: getattr(segmenter.inference, name) for name in settings} == settings
    with pytest.raises(InputError, match="use one of auto"):
        Segmenter(network, LABELS, device="cpu", precision="bf17")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", torch.bfloat16), (64, torch.float64)]
)
def test_true_precisions_are_those_of_the_weights(scene, precision, dtype):
    seen = []

    class Watched(Threshold):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.dtype)
            return super().forward(x)

    network = Network(Watched(), mean=(0, 0, 0), std=(1, 1, 1))
    result = Segmenter(network, LABELS, device="cpu", precision=precision).predict(scene)
    assert seen == [dtype]
    assert np.array_equal(result.mask, scene[..., 0] > 127)


def test_a_pretrained_model_that_is_not_published_is_refused_by_name():
    with pytest.raises(InputError, match=r"no pretrained 'unet'.*deeplabv3 and fcn"):
        Segmenter.pretrained("unet")


def test_images_of_several_sizes_are_no_batch(segmenter, scene):
    with pytest.raises(InputError, match="several sizes"):
        segmenter.predict_batch([scene, scene[:20]])

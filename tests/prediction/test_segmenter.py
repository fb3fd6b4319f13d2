"""Segmenter: images to masks."""

import numpy as np
import pytest
import torch
from PIL import Image
from predictions import LABELS, Threshold
from torch import nn

from seg_torch.errors import InputError
from seg_torch.images.resize import resize_image
from seg_torch.labels import Labels
from seg_torch.models.network import Network
from seg_torch.prediction.segmenter import Segmenter


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


@pytest.mark.parametrize("wrong", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_an_array_of_another_kind_is_refused(segmenter, wrong):
    with pytest.raises(InputError, match=r"expected uint8 \[H, W, 3\]"):
        segmenter.predict(wrong)


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

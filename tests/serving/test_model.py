"""The model beside the HTTP server, in this process."""

import base64
import json
import re
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastapi import Response
from omegaconf import OmegaConf
from PIL import Image
from predictions import LABELS, Threshold

from seg_torch import Segmenter
from seg_torch.errors import InputError
from seg_torch.images.format import ImageFormat
from seg_torch.labels import Labels
from seg_torch.models import unet
from seg_torch.models.network import Network
from seg_torch.models.weights import adapt_first_conv
from seg_torch.prediction.segmentation import Segmentation
from seg_torch.serving import model
from seg_torch.serving.model import WRITERS, Model, Upload

tifffile = pytest.importorskip("tifffile")

SETTINGS = OmegaConf.create({"max_pixels": 3000, "max_batch_size": None})


@pytest.fixture
def bands(monkeypatch) -> Model:
    """Of images of two channels of 16 bits."""
    torch.manual_seed(0)
    unet_of_two = unet(2, "resnet10t", weights=None, decoder_channels=(8,) * 5)
    adapt_first_conv(unet_of_two, 2)
    network = Network(unet_of_two, [0.3] * 2, [0.2] * 2)
    labels = Labels(("ground", "field"))
    segmenter = Segmenter(network, labels, device="cpu", format=ImageFormat(2, 16))
    monkeypatch.setattr(model, "load_segmenter", lambda cfg, device: segmenter)
    return Model(SETTINGS, "cpu")


def tiff(height: int, width: int, channels: int = 2) -> bytes:
    file = BytesIO()
    values = np.random.default_rng(0).integers(0, 65536, (height, width, channels), np.uint16)
    tifffile.imwrite(file, values, planarconfig="contig", photometric="minisblack")
    return file.getvalue()


def test_images_of_other_channels_are_read_as_predict_reads_them(bands, tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(40, 50))
    expected = bands.segmenter.predict(tmp_path / "a.tif").mask
    uploads = [
        Upload("image", tiff(40, 50), "png"),  # a body without a name
        Upload("scene.TIF", tiff(40, 50), "view"),
        Upload("scene.tif", tiff(40, 50, 3), "png"),
        Upload("scene.tif", tiff(50, 61), "png"),
        Upload("a/b.tif", b"text", "png"),
    ]
    png, view, channels, pixels, text = bands.answer(uploads)
    assert np.array_equal(Image.open(BytesIO(png.body)), expected)
    mask = base64.b64decode(json.loads(view.body)["files"]["mask"])
    assert np.array_equal(Image.open(BytesIO(mask)), expected)
    refused = [(r.status_code, json.loads(r.body)["detail"]) for r in (channels, pixels, text)]
    assert [status for status, _ in refused] == [400, 413, 400]
    assert refused[0][1].startswith("scene.tif: 3 channels, not 2")
    assert refused[1][1] == "the image has 3,050 pixels; the limit is 3,000 (max_pixels)"
    assert refused[2][1].startswith("a/b.tif: cannot be read")


def test_a_model_of_several_files_an_image_is_refused(monkeypatch):
    segmenter = SimpleNamespace(format=ImageFormat(2, files=("_a.tif", "_b.tif")))
    monkeypatch.setattr(model, "load_segmenter", lambda cfg, device: segmenter)
    with pytest.raises(InputError, match="takes several files an image; use seg-torch predict"):
        Model(SETTINGS, "cpu")


def answer(wanted: str, mask: np.ndarray) -> Response:
    labels = Labels(("a", "b"))
    image = np.zeros((*mask.shape, 3), np.uint8)
    return WRITERS[wanted](Segmentation(mask, labels, image, 0.5, confidence_map=mask))


def test_noise_gets_no_polygons():
    noise = torch.randint(2, (2000, 2000), dtype=torch.uint8).numpy()
    refused = answer("json", noise)
    assert refused.status_code == 422
    reason = json.loads(refused.body)["detail"]
    assert re.fullmatch(r"the outlines .* are 3,99\d,\d+ .*polygons: ask for format=png", reason)
    assert answer("png", noise).status_code == 200
    assert json.loads(answer("view", noise).body)["files"].keys() == {
        "image",
        "pixels",
        "mask",
        "overlay",
    }


def test_an_overlay_that_no_jpeg_holds_is_left_out():
    content = json.loads(answer("view", np.zeros((70_000, 1), np.uint8)).body)
    assert content["files"].keys() == {"image", "pixels", "mask", "polygons"}
    assert content["size"] == [1, 70_000]
    assert content["view"] == [1, 8192]


def test_a_model_changes_nothing_in_the_process_that_makes_it(bands):
    """Only `load` does, in a process of the model alone."""
    assert not torch.is_autocast_enabled("cpu")
    assert Image.MAX_IMAGE_PIXELS is not None


def test_e59_pixels_without_data_are_counted_nowhere(monkeypatch):
    """Of a PNG with transparency, in all three answers."""
    rgba = np.full((40, 48, 4), 255, np.uint8)
    rgba[:, :8, :3] = 0
    rgba[:, 24:, 3] = 0
    file = BytesIO()
    Image.fromarray(rgba).save(file, "PNG")
    network = Network(Threshold(), (0, 0, 0), (1, 1, 1))
    segmenter = Segmenter(network, LABELS, device="cpu")
    monkeypatch.setattr(model, "load_segmenter", lambda cfg, device: segmenter)
    uploads = [Upload("a.png", file.getvalue(), wanted) for wanted in ("png", "json", "view")]
    png, answer, view = Model(SETTINGS, "cpu").answer(uploads)
    expected = np.full((40, 48), 255)
    expected[:, :8], expected[:, 8:24] = 0, 1
    assert np.array(Image.open(BytesIO(png.body))).tolist() == expected.tolist()
    content = json.loads(answer.body)
    assert content["areas"] == pytest.approx({"dark": 1 / 3, "bright": 2 / 3})
    assert sum(f["properties"]["area"] for f in content["polygons"]["features"]) == 40 * 24
    counts = json.loads(view.body)["counts"]
    assert (counts[0], counts[1], counts[255]) == (40 * 8, 40 * 16, 0)

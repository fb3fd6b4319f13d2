"""Segmenter, Segmentation and predict.py."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from seg_torch.errors import InputError
from seg_torch.hardware import autocast
from seg_torch.images import read_image
from seg_torch.labels import Labels, encode_segmap
from seg_torch.models import unet
from seg_torch.models.network import Network, enlarge_rows
from seg_torch.segmenter import BAND, Segmentation, Segmenter
from seg_torch.transforms import resize_image

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


@pytest.mark.parametrize("output", ["mask", "colour", "overlay"])
def test_a_mask_with_unknown_ids_is_neither_drawn_nor_saved(picture, tmp_path, output):
    mask = np.full(picture.shape[:2], 7, np.uint8)
    with pytest.raises(InputError, match=r"holds ids \[7\]"):
        Segmentation(mask, LABELS, picture).save(tmp_path, outputs=[output])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_legend_shows_the_colours_of_the_classes_that_occur(picture):
    mask = np.ones((48, 64), np.uint8)
    legend = np.array(Segmentation(mask, LABELS, picture).legend()).reshape(-1, 3)
    assert (legend == LABELS.palette[1]).all(1).any()
    assert not (legend == LABELS.palette[0]).all(1).any()


@pytest.mark.parametrize("wrong", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_an_array_of_another_kind_is_refused(segmenter, wrong):
    with pytest.raises(InputError, match=r"expected uint8 \[H, W, 3\]"):
        segmenter.predict(wrong)


def blobs(height: int, width: int, classes: int, cell: int) -> np.ndarray:
    """A mask of smooth regions, uint8 [height, width], some with holes, some at the border."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, classes, height // cell + 2, width // cell + 2, generator=generator)
    large = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")
    return large[0].argmax(0).to(torch.uint8).numpy()


def test_areas_are_shares_of_the_pixels_by_name(picture):
    mask = np.zeros((48, 64), np.uint8)
    mask[:12] = 1
    assert Segmentation(mask, LABELS, picture).areas() == {"dark": 0.75, "bright": 0.25}


def test_a_saved_mask_names_its_classes(segmenter, picture, tmp_path):
    labels = Labels(("straße", "木"))
    mask = segmenter.predict(picture).mask
    Segmentation(mask, labels, picture).save(tmp_path, "a", ["mask"])
    with Image.open(tmp_path / "mask/a.png") as image:
        assert json.loads(image.text["names"]) == ["straße", "木"]


def test_saved_colours_turn_back_into_the_mask(segmenter, picture, tmp_path):
    result = segmenter.predict(picture)
    result.save(tmp_path, "a", ["colour"])
    assert np.array_equal(encode_segmap(read_image(tmp_path / "colour/a.png"), LABELS), result.mask)


def test_saved_probabilities_are_float16_and_decide_the_mask(segmenter, picture, tmp_path):
    result = segmenter.predict(picture, probabilities=True)
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


def test_probabilities_have_to_be_asked_for(segmenter, picture):
    with pytest.raises(InputError, match="probabilities=True"):
        segmenter.predict(picture).probabilities()


def test_a_notebook_shows_the_overlay(segmenter, picture):
    result = segmenter.predict(picture)
    with Image.open(io.BytesIO(result._repr_png_())) as shown:
        assert np.array_equal(np.array(shown), np.array(result.overlay()))


class Pointwise(nn.Module):
    """Each pixel's logits depend on that pixel alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        red, green, blue = x.unbind(1)
        return torch.stack([red, green.square(), 3 * blue - red, red * green, 0.3 - blue], 1)


class Blurred(nn.Module):
    """Each pixel's logits depend on the 21 x 21 pixels around it, as far as there are any."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.avg_pool2d(x, 21, 1, 10, count_include_pad=False)
        return Pointwise()(x)


FIVE = Labels(tuple("abcde"))


def five_classes(model: nn.Module, **settings) -> Segmenter:
    network = Network(model, mean=(0, 0, 0), std=(1, 1, 1))
    return Segmenter(network, FIVE, device="cpu", **settings)


@pytest.fixture(scope="module")
def landscape() -> np.ndarray:
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 256, (19, 31, 3), np.uint8))
    return np.array(small.resize((487, 331), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("tile", [64, 96, 160, 320])
@pytest.mark.parametrize("size", [(331, 487), (64, 64), (65, 97), (20, 400), (129, 128)])
def test_for_a_pointwise_model_tiled_equals_whole_to_the_last_bit(landscape, size, tile):
    photo = landscape[: size[0], : size[1]]
    whole = five_classes(Pointwise(), tile=None).predict(photo, probabilities=True)
    tiled = five_classes(Pointwise(), tile=tile).predict(photo, probabilities=True)
    assert len(np.unique(whole.mask)) > 1, "nothing to compare"
    assert np.array_equal(tiled.mask, whole.mask)
    assert np.array_equal(tiled.probabilities(), whole.probabilities())
    assert tiled.confidence == pytest.approx(whole.confidence, abs=1e-6)


def test_at_seams_tiles_disagree_with_the_whole_in_few_pixels_and_by_little(landscape):
    """The network sees 10 pixels around each; half a tile's 32 pixels of fading see them all."""
    whole = five_classes(Blurred(), tile=None).predict(landscape, probabilities=True)
    tiled = five_classes(Blurred(), tile=128).predict(landscape, probabilities=True)
    assert (tiled.mask != whole.mask).mean() < 0.002
    difference = np.abs(tiled.probabilities().astype(float) - whole.probabilities())
    assert 0 < difference.max() < 0.02
    # Away from the seams there is none.
    assert difference[:, :80, :80].max() == 0


def test_tiles_of_a_trained_network_agree_with_the_whole(landscape):
    """A U-Net learns the classes of a pointwise model, so that its masks mean something."""
    torch.manual_seed(0)
    target = torch.from_numpy(five_classes(Pointwise()).predict(landscape).mask).long()
    image = torch.from_numpy(landscape).permute(2, 0, 1)
    network = Network(unet(5, "resnet18", weights=None))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(30):
        corners = [(torch.randint(331 - 96, ()), torch.randint(487 - 96, ())) for _ in range(4)]
        windows = [(..., slice(y, y + 96), slice(x, x + 96)) for y, x in corners]
        logits = network(torch.stack([image[window] for window in windows]))["out"]
        labels = torch.stack([target[window] for window in windows])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    masks = [
        Segmenter(network, FIVE, device="cpu", tile=tile).predict(landscape).mask
        for tile in (None, 192)
    ]
    assert (masks[0] == target.numpy()).mean() > 0.7, "it has not learnt enough to compare"
    assert (masks[0] == masks[1]).mean() > 0.9


def test_large_pictures_go_through_in_tiles_by_themselves(landscape, monkeypatch):
    """With a memory of 512 MB, four million pixels are too many and a thousand are not."""
    monkeypatch.setattr("seg_torch.hardware.total_memory", lambda device: 512 << 20)
    seen = []

    class Watched(Pointwise):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(x.shape[-2:]))
            return super().forward(x)

    segmenter = five_classes(Watched())
    segmenter.predict(landscape[:30, :40])
    assert seen.pop() == (30, 40)
    segmenter.predict(np.zeros((2000, 2000, 3), np.uint8))
    assert len(seen) == 9
    assert max(max(size) for size in seen) < 1024 + 32


def test_bands_change_nothing(landscape, monkeypatch):
    """What is decided row by row is what is decided at once, at another size, too."""
    for resize in (None, (150, 211)):
        segmenter = five_classes(Blurred(), resize=resize)
        monkeypatch.setitem(BAND, "cpu", 1)
        rows = segmenter.predict(landscape, probabilities=True)
        monkeypatch.setitem(BAND, "cpu", 1 << 40)
        whole = segmenter.predict(landscape, probabilities=True)
        assert np.array_equal(rows.mask, whole.mask)
        assert np.array_equal(rows.probabilities(), whole.probabilities())


def test_masks_are_those_of_evaluation(landscape):
    """Evaluation decides by the argmax of the network's logits at the size of the labels."""
    for resize in (None, (150, 211)):
        segmenter = five_classes(Blurred(), resize=resize)
        image = torch.from_numpy(landscape).permute(2, 0, 1).contiguous()
        image = image if resize is None else resize_image(image, resize)
        with autocast(torch.device("cpu")):
            logits = segmenter.network.logits(image[None], landscape.shape[:2])
        assert np.array_equal(segmenter.predict(landscape).mask, logits.argmax(1)[0].numpy())


class Levels(nn.Module):
    """Logits of few levels: at most pixels several of the 20 classes share the highest one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(1, 21).view(1, -1, 1, 1)
        return (x.sum(1, keepdim=True) * steps).round().remainder(3)


def test_the_first_of_the_most_probable_classes_wins_and_confidence_is_its_probability(landscape):
    labels = Labels(tuple(f"class {i}" for i in range(20)))
    segmenter = Segmenter(Network(Levels()), labels, device="cpu")
    image = torch.from_numpy(landscape).permute(2, 0, 1)[None]
    logits = segmenter.network.logits(image, landscape.shape[:2])[0].numpy().astype(np.float64)
    assert ((logits == logits.max(0)).sum(0) > 1).mean() > 0.9
    highest = np.exp(logits.max(0)) / np.exp(logits).sum(0)
    result = segmenter.predict(landscape)
    assert np.array_equal(result.mask, logits.argmax(0))
    assert result.confidence == pytest.approx(highest.mean(), rel=1e-6)


@pytest.mark.parametrize(("height", "width"), [(70, 101), (33, 47), (31, 97), (40, 47)])
def test_enlarged_rows_are_those_of_bilinear_interpolation(height, width):
    logits = torch.randn(2, 3, 33, 47)
    expected = torch.nn.functional.interpolate(logits, (height, width), mode="bilinear")
    assert torch.allclose(enlarge_rows(logits, (height, width), 0, height), expected, atol=1e-4)
    bands = [
        enlarge_rows(logits, (height, width), t, min(t + 7, height)) for t in range(0, height, 7)
    ]
    assert torch.equal(torch.cat(bands, 2), enlarge_rows(logits, (height, width), 0, height))


class LeftRight(nn.Module):
    """Class 1 grows more likely to the right, whatever the picture shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ramp = torch.linspace(-2, 1, x.shape[-1]).expand(x.shape[0], 1, *x.shape[-2:])
        return torch.cat([-ramp, ramp], 1)


def test_flipping_averages_the_probabilities_of_both_views(picture):
    network = Network(LeftRight())
    plain = Segmenter(network, LABELS, device="cpu").predict(picture, probabilities=True)
    flipped = Segmenter(network, LABELS, device="cpu", flip=True).predict(picture, True)
    expected = (plain.probabilities() + plain.probabilities()[..., ::-1]) / 2
    assert np.abs(flipped.probabilities() - expected).max() < 2e-3


def test_with_flipping_a_mirrored_photo_gives_the_mirrored_mask(landscape):
    torch.manual_seed(0)
    segmenter = Segmenter(
        Network(unet(5, "resnet18", weights=None)), FIVE, device="cpu", flip=True, tile=192
    )
    photo = landscape[:160, :160]
    mirrored = segmenter.predict(np.ascontiguousarray(photo[:, ::-1]), probabilities=True)
    straight = segmenter.predict(photo, probabilities=True)
    assert np.array_equal(mirrored.mask[:, ::-1], straight.mask)
    assert np.array_equal(mirrored.probabilities()[..., ::-1], straight.probabilities())


def test_scales_average_the_probabilities_of_resized_photos(landscape):
    segmenter = five_classes(Blurred(), scales=(0.5, 1.0))
    image = torch.from_numpy(landscape).permute(2, 0, 1)[None]
    size = landscape.shape[:2]
    half = resize_image(image, [166, 244])  # 165.5 and 243.5, rounded to even
    with autocast(torch.device("cpu")):
        views = [segmenter.network.logits(view, size).softmax(1) for view in (image, half)]
    found = segmenter.predict(landscape, probabilities=True).probabilities()
    assert np.abs(found - torch.stack(views).mean(0)[0].numpy()).max() < 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 100}, "multiple of 32"),
        ({"tile": 32}, "64 or more"),
        ({"tile": 64, "resize": (32, 32)}, "nothing to tile"),
        ({"scales": (0.0, 1.0)}, "above 0"),
        ({"scales": ()}, "above 0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        five_classes(Pointwise(), **settings)


def test_a_pretrained_model_that_is_not_published_is_refused_by_name():
    with pytest.raises(InputError, match=r"no pretrained 'unet'.*deeplabv3 and fcn"):
        Segmenter.pretrained("unet")


def test_pictures_of_several_sizes_are_no_batch(segmenter, picture):
    with pytest.raises(InputError, match="several sizes"):
        segmenter.predict_batch([picture, picture[:20]])

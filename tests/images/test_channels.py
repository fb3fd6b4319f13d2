"""Images of other channels than RGB: TIFF files of 8 and 16 bits, from training to the mask."""

import csv
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
from conftest import run_command
from models_for_tests import MODELS
from PIL import Image
from timm.models import adapt_input_conv
from torch import nn
from torchvision import tv_tensors

from seg_torch import Segmenter
from seg_torch.checkpoints import checkpoint
from seg_torch.data.inspection import inspect_dataset
from seg_torch.data.module import SegmentationDataModule
from seg_torch.data.transforms import ColourJitter, RandomScaleCrop, augment
from seg_torch.datasets import folder
from seg_torch.datasets.base import as_dataset, checked_sample
from seg_torch.errors import InputError
from seg_torch.images.format import RGB, ImageFormat, as_array, as_tensor
from seg_torch.labels import Labels
from seg_torch.models import UNet, unet
from seg_torch.models.network import Network, check_channels
from seg_torch.models.weights import adapt_first_conv

SMALL = (
    "model.encoder=resnet10t model.decoder_channels=[8,8,8,8,8] model.weights=null logger=none "
    "data.batch_size=2 data.augment.crop=[32,32] trainer.accelerator=cpu recipe=null"
)


def noise_over(mask: np.ndarray, channels: int, bits: int, seed: int) -> np.ndarray:
    """Noise, on which the last channel shows the mask."""
    generator = np.random.default_rng(seed)
    dtype, top = (np.uint8, 256) if bits == 8 else (np.uint16, 65536)
    image = generator.integers(0, top // 2, (*mask.shape, channels), dtype)
    image[..., -1] += mask * dtype(top // 2)
    return image


def write_tiff(path: str | Path, image: np.ndarray, **options) -> None:
    tifffile.imwrite(path, image, photometric="minisblack", planarconfig="contig", **options)


def write_dataset(root: Path, channels: int, bits: int, write=None, count: int = 8) -> Path:
    """A folder of TIFF files of two classes, or of what `write(stem, image)` makes of them."""
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for i in range(count):
        mask = np.zeros((41, 47), np.uint8)  # an odd number of bytes
        mask[4 * i % 16 : 20 + i, 8:30] = 1
        Image.fromarray(mask).save(root / f"masks/{i}.png")
        image = noise_over(mask, channels, bits, seed=i)
        if write is None:
            write_tiff(root / f"images/{i}.tif", image)
        else:
            write(root / "images" / str(i), image)
    (root / "classes.txt").write_text("ground\nfield\n")
    return root


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("channels", "bits"), [(4, 8), (6, 16)])
def test_train_resume_evaluate_and_predict(channels, bits, tmp_path):
    """With the default workers, augmentation and precision."""
    root, format = write_dataset(tmp_path / "data", channels, bits), ImageFormat(channels, bits)
    line = f"train data=folder data.root=data data.channels={channels} data.bits={bits} {SMALL}"
    line += " scheduler=none"
    assert run_command(f"{line} output_dir=whole trainer.max_epochs=1", tmp_path) == 0
    assert run_command("train resume=whole trainer.max_epochs=2", tmp_path) == 0
    assert len(metrics(tmp_path / "whole")) == 2
    assert list((tmp_path / "whole/samples").glob("*.png"))

    description = checkpoint.read(tmp_path / "whole")[checkpoint.KEY]
    stored = description["preprocessing"]
    assert checkpoint.image_format(description) == format
    files = [pair.image for pair in folder(root, "train", format=format).pairs]
    pixels = np.concatenate([tifffile.imread(file).reshape(-1, channels) for file in files])
    pixels = pixels / (2**bits - 1)
    assert stored["mean"] == pytest.approx(pixels.mean(0).tolist(), rel=1e-6)
    assert stored["std"] == pytest.approx(pixels.std(0).tolist(), rel=1e-6)

    scores = json.loads((tmp_path / "whole/test_metrics.json").read_text())
    # On its own data, and on others: how images are stored, the checkpoint knows.
    for data in ("", "data=folder data.root=data")[bits == 16 :]:
        line = f"evaluate checkpoint=whole split=val output_dir=scores {data}"
        assert run_command(f"{line} trainer.accelerator=cpu", tmp_path) == 0
        found = json.loads((tmp_path / "scores/val_metrics.json").read_text())
        assert found["confusion_matrix"] == scores["confusion_matrix"]
    line = "predict input=data/images output=out checkpoint=whole save=[mask,overlay]"
    line += " trainer.accelerator=cpu trainer.precision=32-true"
    assert run_command(line, tmp_path) == 0
    counts = np.zeros((2, 2), np.int64)
    for pair in folder(root, "val", format=format).pairs:
        mask = np.array(Image.open(tmp_path / f"out/mask/{pair.name}.png"))
        np.add.at(counts, (np.array(Image.open(pair.mask)), mask), 1)
        assert Image.open(tmp_path / f"out/overlay/{pair.name}.jpg").size == (47, 41)
    assert counts.tolist() == scores["confusion_matrix"]


def trained(folder: Path, data: str, settings: str) -> tuple[list, dict, dict[str, bytes]]:
    """Scores by epoch, weights, and the masks and overlays of all images."""
    line = f"train data=folder data.root={data} output_dir=run-{data} {SMALL} {settings}"
    line += " data.num_workers=0"
    mean = "preprocessing.mean=[0.3,0.3,0.4] preprocessing.std=[0.2,0.3,0.3]"
    assert run_command(f"{line} {mean} trainer.max_epochs=1", folder) == 0
    line = f"predict input={data}/images output=out-{data} checkpoint=run-{data}"
    assert run_command(f"{line} trainer.accelerator=cpu", folder) == 0
    state = checkpoint.network_state(checkpoint.read(folder / f"run-{data}"))
    outputs = {p.name: p.read_bytes() for p in sorted((folder / f"out-{data}").rglob("*.[pj]*g"))}
    return metrics(folder / f"run-{data}"), state, outputs


def assert_same(first: tuple, second: tuple) -> None:
    assert first[0] == second[0]
    assert all(torch.equal(value, second[1][key]) for key, value in first[1].items())
    assert len(first[2]) == 8 + 8 + 1
    assert first[2] == second[2]


def test_a_tiff_of_red_green_and_blue_is_the_png_of_the_same_pixels(tmp_path):
    """Loss, weights, masks and overlays, with the default augmentation."""

    def write_png(stem, image):
        Image.fromarray(image).save(f"{stem}.png")

    write_dataset(tmp_path / "png", 3, 8, write_png)
    write_dataset(tmp_path / "tiff", 3, 8)
    expected = trained(tmp_path, "png", "")
    assert_same(trained(tmp_path, "tiff", "data.channels=3"), expected)


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_16_bits_are_the_8_bits_that_they_are_257_times(cache, tmp_path, new_cache_folder):
    """White is 65535 = 257 x 255, so mean and std in 0 to 1 mean the same. Without the resizing of
    the augmentation, which rounds 8 bits, every batch and what the network makes of it is equal."""

    def write_16(stem, image):
        write_tiff(f"{stem}.tif", image.astype(np.uint16) * 257)

    torch.manual_seed(0)
    network = Network(unet(2, "resnet10t", weights=None, decoder_channels=(8,) * 5))
    found = []
    for bits, write in ((8, None), (16, write_16)):
        root = write_dataset(tmp_path / str(bits), 3, 8, write)
        settings = {"channels": 3, "bits": bits, "num_workers": 0, "batch_size": 2, "cache": cache}
        transform = augment((48, 64), scale=None)
        transform.transforms.pop()  # the jitter
        data = SegmentationDataModule(folder, str(root), augment=transform, **settings)
        images = [images for images, _ in data.train_dataloader()]
        images += [group[0] for groups in data.val_dataloader() for group in groups]
        found.append([(image, network(image)["out"]) for image in images])
    assert len(found[0]) == 3 + 1
    for (low, low_logits), (high, high_logits) in zip(*found, strict=True):
        assert (low.dtype, high.dtype) == (torch.uint8, torch.float32)
        assert torch.equal(low.float(), high)
        assert torch.equal(low_logits, high_logits)


@pytest.mark.parametrize("bits", [8, 16])
def test_an_image_may_be_several_files(bits, tmp_path):
    """Their channels come in the order of the setting; the result is that of one file."""
    endings = ("_red.tif", "_green.png", "_nir.tif")

    def write_apart(stem, image):
        for channel, ending in enumerate(endings):
            if ending.endswith("png"):
                Image.fromarray(image[..., channel]).save(f"{stem}{ending}")
            else:
                tifffile.imwrite(f"{stem}{ending}", image[..., channel])

    one = folder(write_dataset(tmp_path / "one", 3, bits), "train", format=ImageFormat(3, bits))
    root = write_dataset(tmp_path / "several", 3, bits, write_apart)
    several = folder(root, "train", format=ImageFormat(3, bits, endings))
    assert [pair.name for pair in several.pairs] == [pair.name for pair in one.pairs]
    for expected, found in zip(one, several, strict=True):
        assert torch.equal(found[0], expected[0])
    before = several.fingerprint()
    turned = ImageFormat(3, bits, endings, rgb=(2, 1, 0))  # the thumbnails are others
    assert folder(root, "train", format=turned).fingerprint() != before
    image = np.array(Image.open(root / "images/3_green.png"))
    Image.fromarray(image + 1).save(root / "images/3_green.png")
    assert several.fingerprint() != before
    (root / "images/3_nir.tif").unlink()
    with pytest.raises(InputError, match=r"3_nir\.tif: no such file"):
        folder(root, "train", format=ImageFormat(3, bits, endings))


def random_checkpoint(path: Path, format: ImageFormat) -> Path:
    torch.manual_seed(0)
    config = {"encoder": "resnet10t", "weights": None, "decoder_channels": [8, 8, 8, 8, 8]}
    model = unet(2, **config)
    adapt_first_conv(model, format.channels)
    network = Network(model, [0.3] * format.channels, [0.2] * format.channels)
    labels, config = Labels(("ground", "field")), {"_target_": "seg_torch.models.unet", **config}
    content = {
        checkpoint.KEY: checkpoint.describe(network, labels, config, {}, None, format),
        "state_dict": {f"network.{key}": value for key, value in network.state_dict().items()},
    }
    torch.save(content, path)
    return path


def test_predictions_from_several_files_are_a_dataset(tmp_path):
    endings = ("_a.tif", "_b.tif")

    def write_apart(stem, image):
        for channel, ending in enumerate(endings):
            tifffile.imwrite(f"{stem}{ending}", image[..., channel])

    root = write_dataset(tmp_path / "data", 2, 16, write_apart)
    random_checkpoint(tmp_path / "random.ckpt", ImageFormat(2, 16, endings))
    line = "predict input=data/images output=out checkpoint=random.ckpt save=[dataset]"
    assert run_command(f"{line} trainer.accelerator=cpu", tmp_path) == 0
    format = ImageFormat(2, 16, endings)
    before, after = (
        folder(place, "val", format=format) for place in (root, tmp_path / "out/dataset")
    )
    assert torch.equal(before[0][0], after[0][0])
    extra = folder(root, "train", extra=[tmp_path / "out/dataset"], format=format)
    assert len(extra) == len(folder(root, "train", format=format)) + 8


LAYOUTS = {
    "channels last": {"planarconfig": "contig"},
    "channels first": {"planarconfig": "separate"},
    "a page each": {"photometric": "minisblack", "metadata": {"axes": "CYX"}},
    "tiles": {"planarconfig": "contig", "tile": (16, 16), "compression": "zlib"},
    "LZW": {"planarconfig": "contig", "compression": "lzw"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_tiff_gives_the_same_channels(name, tmp_path):
    image = noise_over(np.zeros((40, 48), np.uint8), 5, 16, seed=0)
    first = name in ("channels first", "a page each")
    options = {"photometric": "minisblack", **LAYOUTS[name]}
    tifffile.imwrite(tmp_path / "a.tif", image.transpose(2, 0, 1) if first else image, **options)
    assert np.array_equal(ImageFormat(5, 16).read(tmp_path / "a.tif"), image)
    assert ImageFormat(5, 16).size(tmp_path / "a.tif") == (40, 48)


def test_a_file_that_is_not_as_said_is_refused_with_what_to_do(tmp_path):
    image = noise_over(np.zeros((40, 48), np.uint8), 4, 8, seed=0)
    path = tmp_path / "a.tif"
    write_tiff(path, image)
    with pytest.raises(InputError, match=r"a\.tif: 4 channels, not 6"):
        ImageFormat(6).read(path)
    with pytest.raises(InputError, match=r"holds uint8, not uint16.*data\.bits=8"):
        ImageFormat(4, 16).read(path)
    write_tiff(path, image.astype(np.uint16))
    with pytest.raises(InputError, match=r"holds uint16, not uint8.*data\.bits=16"):
        ImageFormat(4).read(path)
    write_tiff(path, image.astype(np.float32))
    with pytest.raises(InputError, match=r"holds float32.*convert it"):
        ImageFormat(4).read(path)
    with pytest.raises(InputError, match=r"b\.tif: no such file"):
        ImageFormat(4).read(tmp_path / "b.tif")


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.95])
def test_a_damaged_tiff_is_refused_and_not_filled_up(kept, compression, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    path = tmp_path / "a.tif"
    write_tiff(path, image, compression=compression)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(InputError, match=r"a\.tif"):
        ImageFormat(4).read(path)


def test_a_small_tiff_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, shape=(1, 1), dtype=np.uint8)
    with tifffile.TiffFile(path, mode="r+") as file:
        for tag in ("ImageWidth", "ImageLength"):
            file.pages[0].tags[tag].overwrite(1 << 16)
    with pytest.raises(InputError, match="claims to hold 4,294,967,296 values"):
        ImageFormat(1).read(path)


def test_what_training_would_refuse_inspect_lists(tmp_path):
    """And the statistics are those of the training images, channel by channel."""
    format = ImageFormat(4, 16)
    root = write_dataset(tmp_path / "data", 4, 16)
    report = inspect_dataset(folder, root, tmp_path / "report", format)
    assert not report["refused"]
    train = folder(root, "train", format=format)
    pixels = np.concatenate([tifffile.imread(p.image).reshape(-1, 4) for p in train.pairs]) / 65535
    np.testing.assert_allclose(report["mean"], pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(report["std"], pixels.std(0), rtol=1e-9)
    write_tiff(root / "images/5.tif", np.zeros((41, 47, 3), np.uint16))
    report = inspect_dataset(folder, root, format=format)
    assert [p["file"] for p in report["problems"]] == [str(root / "images/5.tif")]
    assert "3 channels, not 4" in report["problems"][0]["message"]
    with pytest.raises(InputError, match="3 channels, not 4"):
        SegmentationDataModule(folder, str(root), channels=4, bits=16).check_files()


def test_a_channel_without_contrast_is_named(tmp_path):
    def write(stem, image):
        image[..., 1] = 7
        write_tiff(f"{stem}.tif", image)

    root = write_dataset(tmp_path / "data", 4, 8, write)
    with pytest.raises(InputError, match="channel 1, counted from 0, has the same value"):
        SegmentationDataModule(folder, str(root), channels=4).mean_and_std()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.channels=0", "data.channels=0: expected at least 1"),
        ("data.channels=4 data.bits=12", "data.bits=12: expected 8 or 16"),
        ("data.channels=4 data.rgb=[4,1,0]", "expected three channels of 0 to 3"),
        ("data.channels=4 data=shapes", "this dataset is RGB; use data=folder"),
        (
            "data.channels=4 preprocessing.mean=[0,0,0] preprocessing.std=[1,1,1]",
            "for the 4 channels",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting, message, tmp_path, capsys):
    write_dataset(tmp_path / "data", 4, 8)
    choice = "" if "data=" in setting else "data=folder data.root=data"
    line = f"train {choice} output_dir=run {SMALL} trainer.max_epochs=1 {setting}"
    assert run_command(line, tmp_path) == 2
    assert message in capsys.readouterr().err


def test_every_channel_is_what_it_is_in_the_file_after_the_transforms():
    """16 bits as float32 of 0 to 255, exactly; the jitter leaves them and other channels alone."""
    image = np.random.default_rng(0).integers(0, 65536, (20, 30, 5), np.uint16)
    tensor = as_tensor(image)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), image / np.float32(257))
    np.testing.assert_array_equal(as_array(tensor), image)
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    np.testing.assert_array_equal(as_array(as_tensor(every)), every)
    mask = tv_tensors.Mask(torch.zeros(20, 30, dtype=torch.uint8))
    for given in (tensor, tensor[:3]):
        jittered, _ = ColourJitter(0.5, 0.5, 0.5, 0.1)(tv_tensors.Image(given), mask)
        assert torch.equal(jittered, given)
    cut, labels = RandomScaleCrop((64, 64), None)(tv_tensors.Image(tensor), mask)
    inside = labels != 255
    assert inside.sum() == 600
    assert torch.equal(cut[:, inside], tensor.flatten(1))
    mean = tensor.mean((1, 2))
    torch.testing.assert_close(cut[:, ~inside], mean[:, None].expand(5, 64 * 64 - 600))


@pytest.mark.parametrize(
    ("format", "stored"),
    [
        (RGB, None),  # as in every checkpoint of RGB images
        (ImageFormat(3), {"channels": 3, "bits": 8, "files": [], "rgb": [0, 1, 2]}),
        (
            ImageFormat(2, 16, ("_a.tif", "_b.tif"), (1, 0, 0)),
            {"channels": 2, "bits": 16, "files": ["_a.tif", "_b.tif"], "rgb": [1, 0, 0]},
        ),
    ],
)
def test_a_format_is_what_it_was_in_a_checkpoint_in_settings_and_in_a_worker(format, stored):
    network = Network(nn.Conv2d(3, 2, 1))
    described = checkpoint.describe(network, Labels(("a", "b")), {}, {}, None, format)
    assert described["preprocessing"]["bands"] == stored
    assert checkpoint.image_format(described) == format
    assert SegmentationDataModule(folder, **format.settings()).format == format
    assert pickle.loads(pickle.dumps(format)) == format
    del described["preprocessing"]["bands"]  # as the first versions wrote it
    assert checkpoint.image_format(described) == RGB != ImageFormat(3)


def test_a_dataset_of_ones_own_may_call_something_else_its_format():
    class Photos:
        labels, format = Labels(("a", "b")), "jpeg"

        def __getitem__(self, index):
            sample = torch.zeros(1, 8, 9, dtype=torch.uint8)
            return tv_tensors.Image(sample), tv_tensors.Mask(sample[0])

    dataset = as_dataset(Photos())
    image, _ = checked_sample(dataset, 0)  # grey, which nothing forbids
    assert dataset.format.shown(as_array(image)).shape == (8, 9, 3)


def test_overlays_show_the_chosen_channels():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 5), np.uint8)
    assert np.array_equal(ImageFormat(5, rgb=(4, 0, 2)).shown(image), image[..., [4, 0, 2]])
    assert np.array_equal(RGB.shown(image), image[..., :3])
    assert np.array_equal(RGB.shown(image[..., :1]), image[..., [0, 0, 0]])
    deep = (image * np.uint16(20)) + np.uint16(1000)
    low, high = np.percentile(deep[..., :3], (2, 98))
    expected = ((deep[..., :3] - low) / (high - low) * 255).clip(0, 255)
    assert np.abs(ImageFormat(5, 16).shown(deep).astype(float) - expected).max() <= 0.51


# Of each family some; EoMT compares the number with that of its configuration.
OTHERS = [name for name in MODELS if not re.search("vgg|frozen|without_aux|eomt", name)]


@pytest.mark.parametrize("name", OTHERS)
def test_every_model_takes_other_channels(name):
    """With weights of red, green and blue in turn: where their images are equal, too, the logits
    stay what they were."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = model(image)["out"]
        adapt_first_conv(model, 6)
        after = model(image.repeat(1, 2, 1, 1))["out"]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_the_first_convolution_is_widened_as_timm_does_it(channels):
    encoder = timm.create_model("resnet10t", features_only=True)
    expected = timm.create_model("resnet10t", features_only=True, in_chans=channels)
    weights = adapt_input_conv(channels, encoder.conv1[0].weight.detach())
    expected.load_state_dict({**encoder.state_dict(), "conv1.0.weight": weights})
    model = UNet(encoder, 2, freeze_encoder=True)
    adapt_first_conv(model, channels)
    image = torch.rand(1, channels, 64, 64)
    for found, wanted in zip(encoder.eval()(image), expected.eval()(image), strict=True):
        assert torch.equal(found, wanted)
    if channels == 7:
        weight = encoder.conv1[0].weight
        torch.testing.assert_close(weight[:, :3], weight[:, 3:6])
    assert not encoder.conv1[0].weight.requires_grad
    assert model(image)["out"].shape == (1, 2, 64, 64)


def test_a_model_that_takes_no_other_channels_is_refused():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return (
                self.first(x) + x[:, :3].view(len(x), 3, *x.shape[2:]).sum() + x.view(1, 3, 64, 64)
            )

    model = Fixed()
    adapt_first_conv(model, 4)
    with pytest.raises(InputError, match="takes no images of 4 channels"):
        check_channels(Network(model, [0.5] * 4, [1] * 4), 4)
    with pytest.raises(InputError, match="takes no images of 4 channels"):
        adapt_first_conv(nn.Conv2d(5, 2, 1), 4)
    model = MODELS["eomt"]()
    adapt_first_conv(model, 6)
    with pytest.raises(InputError, match="takes no images of 6 channels"):
        check_channels(Network(model, [0.5] * 6, [1] * 6), 6)


def test_a_mask_lies_where_its_geotiff_lies(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    from rasterio.transform import from_origin

    place = from_origin(500_000.5, 5_400_000.25, 10, 10)
    profile = {"driver": "GTiff", "width": 47, "height": 41, "count": 4, "dtype": "uint16"}

    def write(stem, image):
        with rasterio.open(
            f"{stem}.tif", "w", crs="EPSG:32632", transform=place, **profile
        ) as file:
            file.write(image.transpose(2, 0, 1))

    write_dataset(tmp_path / "data", 4, 16, write)
    random_checkpoint(tmp_path / "random.ckpt", ImageFormat(4, 16))
    line = "predict input=data/images output=out checkpoint=random.ckpt save=[mask,geotiff]"
    line += " min_confidence=0.5001"
    assert run_command(f"{line} trainer.accelerator=cpu", tmp_path) == 0
    for i in range(8):
        with rasterio.open(tmp_path / f"out/geotiff/{i}.tif") as file:
            assert file.crs == rasterio.crs.CRS.from_epsg(32632)
            assert file.transform == place
            assert file.nodata == 255
            assert file.colormap(1)[1][:3] == (128, 0, 0)  # Pascal VOC's
            mask = file.read(1)
        assert np.array_equal(mask, np.array(Image.open(tmp_path / f"out/mask/{i}.png")))
        with tifffile.TiffFile(tmp_path / f"out/geotiff/{i}.tif") as file:
            assert file.pages[0].colormap[:, 1].tolist() == [257 * 128, 0, 0]  # of 16 bits


def test_segmenter_takes_arrays_of_its_channels_alone(tmp_path):
    torch.manual_seed(0)
    model = unet(2, "resnet10t", weights=None, decoder_channels=(8,) * 5)
    adapt_first_conv(model, 4)
    labels, network = Labels(("ground", "field")), Network(model, [0.5] * 4, [0.2] * 4)
    segmenter = Segmenter(network, labels, device="cpu", format=ImageFormat(4, 16))
    image = noise_over(np.zeros((40, 48), np.uint8), 4, 16, seed=0)
    write_tiff(tmp_path / "a.tif", image)
    masks = [segmenter.predict(x).mask for x in (image, as_tensor(image), tmp_path / "a.tif")]
    assert np.array_equal(masks[0], masks[1])
    assert np.array_equal(masks[0], masks[2])
    with pytest.raises(InputError, match=r"expected uint16 \[H, W, 4\]"):
        segmenter.predict(image.astype(np.uint8))
    with pytest.raises(InputError, match=r"expected uint16 \[H, W, 4\]"):
        segmenter.predict(Image.new("RGB", (48, 40)))

"""Pixels without data in all that is predicted, scored and trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import scenes
import torch
from conftest import run_command
from PIL import Image
from predictions import LABELS, Threshold, random_checkpoint, table
from pycocotools.coco import COCO
from rasterio.features import rasterize
from scenes import VALID, hidden, pixels, with_alpha

from seg_torch import Segmenter
from seg_torch.data.module import SegmentationDataModule
from seg_torch.datasets import folder
from seg_torch.errors import InputError
from seg_torch.labels import Labels
from seg_torch.models.network import Network

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture(autouse=True)
def everything_is_logged(caplog):
    caplog.set_level("INFO")


ALL = "mask,overlay,colour,probabilities,confidence,coco,polygons,geotiff,dataset,side_by_side"
FOUR = Labels(tuple(f"class {i}" for i in range(4)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("weights") / "random.ckpt")


@pytest.mark.parametrize("tile", ["null", "64"])
def test_e59_they_are_255_and_counted_nowhere(weights, tmp_path, tile):
    """Each file is compared with that of the same pixels without the word "no data"."""
    for name, options in (("with", {"mask": "inside"}), ("without", {})):
        (tmp_path / name).mkdir()
        values = pixels(seed=3)
        scenes.write(tmp_path / name / "a.tif", values, **options)
        line = f"predict input={name} output=out-{name} checkpoint={weights} save=[{ALL}]"
        assert run_command(f"{line} tile={tile} trainer.accelerator=cpu", tmp_path) == 0
    out, other = tmp_path / "out-with", tmp_path / "out-without"

    def image(folder: Path, name: str) -> np.ndarray:
        with Image.open(folder / name) as file:
            return np.array(file)

    whole, mask = image(other, "mask/a.png"), image(out, "mask/a.png")
    assert (whole < 4).all()
    assert mask.tolist() == np.where(VALID, whole, 255).tolist()
    assert image(out, "dataset/masks/a.png").tolist() == mask.tolist()
    with rasterio.open(out / "geotiff/a.tif") as file:
        assert file.read(1).tolist() == mask.tolist()
        assert (file.dataset_mask() != 0).tolist() == VALID.tolist()
    whole_map, confidences = (image(f, "confidence/a.png") for f in (other, out))
    assert confidences.tolist() == np.where(VALID, whole_map, 0).tolist()
    scores, of_whole = (np.load(f / "probabilities/a.npz")["probabilities"] for f in (out, other))
    assert (scores == np.where(VALID, of_whole, 0)).all()
    assert scores[:, VALID].min() > 0

    [row] = table(out)
    chosen = np.take_along_axis(of_whole, whole[None].astype(int), 0)[0].astype(float)
    assert float(row["mean_confidence"]) == pytest.approx(chosen[VALID].mean(), abs=1e-3)
    for i in range(4):
        assert float(row[f"class {i}"]) == pytest.approx((whole[VALID] == i).mean(), abs=1e-6)

    coco = COCO(out / "coco.json")
    assert sum(coco.loadAnns(coco.getAnnIds())[i]["area"] for i in range(4)) == VALID.sum()
    for annotation in coco.loadAnns(coco.getAnnIds()):
        found = coco.annToMask(annotation) == 1
        assert found.tolist() == ((whole == annotation["category_id"]) & VALID).tolist()
    features = json.loads((out / "polygons/a.geojson").read_text())["features"]
    drawn = [(f["geometry"], f["properties"]["class_id"]) for f in features]
    with rasterio.open(tmp_path / "with/a.tif") as file:
        transform = file.transform
    assert rasterize(drawn, VALID.shape, fill=255, transform=transform).tolist() == mask.tolist()

    shown, untouched = image(out, "overlay/a.jpg"), np.moveaxis(values, 0, 2)
    Image.fromarray(untouched).save(tmp_path / "plain.jpg", quality=92)
    plain = image(tmp_path, "plain.jpg")
    inside = np.zeros_like(VALID)
    inside[:, :14] = True  # whole blocks of 16 x 16, but for the colours of neighbours
    assert shown[inside].tolist() == plain[inside].tolist()
    assert np.abs(shown[~inside].astype(int) - plain[~inside]).mean() > 10


def bright(**options) -> Segmenter:
    return Segmenter(Network(Threshold(), (0, 0, 0), (1, 1, 1)), LABELS, device="cpu", **options)


def test_e59_in_python_by_path_image_and_masked_array(tmp_path):
    path = scenes.write(tmp_path / "a.tif", hidden(pixels(), 0), nodata=0)
    segmenter = bright(min_confidence=0.6)
    whole = segmenter.predict(np.moveaxis(pixels(), 0, 2))
    rgba = Image.fromarray(np.moveaxis(with_alpha(pixels()), 0, 2))
    array = np.ma.MaskedArray(np.moveaxis(pixels(), 0, 2), np.stack([~VALID] * 3, 2))
    assert (whole.mask == 255).any()
    assert whole.missing is None
    for image in (path, rgba, array, str(path)):
        result = segmenter.predict(image, probabilities=True, confidence_map=True)
        assert result.missing.tolist() == (~VALID).tolist()
        assert result.mask.tolist() == np.where(VALID, whole.mask, 255).tolist()
        shares = {name: (whole.mask[VALID] == i).mean() for i, name in enumerate(LABELS.names)}
        assert result.areas() == pytest.approx(shares)
        assert result.image.shape == (48, 112, 3)
        assert type(result.image) is np.ndarray


def test_e59_an_image_without_any_data(tmp_path):
    Image.new("RGBA", (40, 40)).save(tmp_path / "a.png")
    result = bright().predict(tmp_path / "a.png", probabilities=True)
    assert (result.mask == 255).all()
    assert result.confidence == 0
    assert set(result.areas().values()) == {0}
    assert result.polygons()["features"] == result.coco() == []
    result.save(tmp_path, "a", ["mask", "overlay", "polygons", "coco", "side_by_side"])


def test_e59_of_a_batch_each_image_has_its_own():
    scene = np.moveaxis(pixels(), 0, 2)
    array = np.ma.MaskedArray(scene, np.stack([~VALID] * 3, 2))
    first, second, third = bright().predict_batch([scene, array, scene])
    assert first.mask.tolist() == third.mask.tolist()
    assert (first.mask < 2).all()
    assert second.mask.tolist() == np.where(VALID, first.mask, 255).tolist()


@pytest.fixture
def scenes_with_masks(tmp_path) -> Path:
    """Eight scenes, of each of which a part holds no data and is labelled as class 3."""
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for i in range(8):
        values = hidden(pixels(seed=i), 0)
        scenes.write(tmp_path / f"data/images/{i}.tif", values, nodata=0)
        mask = np.where(VALID, i % 3, 3).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / f"data/masks/{i}.png")
    (tmp_path / "data/classes.txt").write_text("class 0\nclass 1\nclass 2\nclass 3\n")
    return tmp_path / "data"


@pytest.mark.parametrize("settings", [{}, {"channels": 3}, {"cache": "ram"}, {"cache": "disk"}])
def test_e59_they_are_not_labelled_in_training_and_validation(scenes_with_masks, settings):
    data = SegmentationDataModule(
        folder, str(scenes_with_masks), batch_size=1, num_workers=0, **settings
    )
    masks = [mask for _, batch in data.train_dataloader() for mask in batch]
    masks += [m for groups in data.val_dataloader() for _, batch, _ in groups for m in batch]
    assert len(masks) == 8
    for mask in masks:
        assert ((mask == 255).numpy() == ~VALID).all()
    assert data.pixel_counts()[3] == 0


def test_e59_the_check_says_so_and_leaves_them_out_of_mean_and_deviation(scenes_with_masks, caplog):
    data = SegmentationDataModule(folder, str(scenes_with_masks), channels=3)
    files = [str(pair.image) for pair in data.dataset("train").pairs]
    stored = np.concatenate([rasterio.open(file).read()[:, VALID] for file in files], 1) / 255
    for _ in ("checked", "remembered"):
        mean, std = data.mean_and_std()
        assert mean == pytest.approx(stored.mean(1).tolist(), rel=1e-6)
        assert std == pytest.approx(stored.std(1).tolist(), rel=1e-6)
        caplog.clear()
        data.check_files()
        share = 100 * (1 - VALID.mean())
        assert f"{share:.2g} % of the pixels of train hold no data" in caplog.text


def test_e59_evaluation_counts_what_has_data_and_agrees_with_predict(
    scenes_with_masks, weights, tmp_path
):
    line = f"evaluate checkpoint={weights} data=folder data.root=data split=val output_dir=scores"
    assert run_command(f"{line} trainer.accelerator=cpu", tmp_path) == 0
    found = json.loads((tmp_path / "scores/val_metrics.json").read_text())["confusion_matrix"]
    line = f"predict input=data/images output=out checkpoint={weights} save=[mask]"
    line += " trainer.accelerator=cpu trainer.precision=32-true"
    assert run_command(line, tmp_path) == 0
    counts = np.zeros((256, 256), np.int64)
    for pair in folder(tmp_path / "data", "val").pairs:
        mask = np.array(Image.open(tmp_path / f"out/mask/{pair.name}.png"))
        np.add.at(counts, (np.array(Image.open(pair.mask)), mask), 1)
    assert counts[3, 255] == counts[3].sum() > 0
    assert counts[:4, :4].tolist() == found


# Bands that are left out, and the values of white


def test_e60_train_and_predict_say_once_what_is_left_out(tmp_path, weights, caplog, capsys):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for i in range(6):
        scenes.write(tmp_path / f"images/{i}.tif", pixels(4, seed=i))
        Image.fromarray(255 * VALID.astype(np.uint8)).save(tmp_path / f"masks/{i}.png")
    (tmp_path / "classes.txt").write_text("a 0 0 0\nb 255 255 255\n")
    data = SegmentationDataModule(folder, str(tmp_path))
    for _ in ("checked", "remembered"):
        caplog.clear()
        data.check_files()
        count = len(data.dataset("train"))
        assert f"{count} of {count} images of train have a band beside red" in caplog.text
        assert "data.channels=4" in caplog.text
    image, _ = data.dataset("train")[0]
    stored = rasterio.open(data.dataset("train").pairs[0].image).read()
    assert torch.equal(image.as_subclass(torch.Tensor), torch.from_numpy(stored[:3]))
    capsys.readouterr()
    line = f"predict input=images output=out checkpoint={weights} trainer.accelerator=cpu"
    assert run_command(f"{line} save=[mask]", tmp_path) == 0
    text = " ".join("".join(capsys.readouterr()).split())
    assert text.count("is no transparency") == 1
    assert "data.channels=4" in text
    caplog.clear()
    SegmentationDataModule(folder, str(tmp_path), channels=4).check_files()
    assert "beside red" not in caplog.text


def bits_of(tmp_path: Path, bits: int, kind: str) -> Path:
    """A folder of noise of so many bits in files of more, and the same in 8 bits in `plain`."""
    for root in ("data", "plain"):
        for part in ("images", "masks"):
            (tmp_path / root / part).mkdir(parents=True)
        (tmp_path / root / "classes.txt").write_text("a\nb\n")
    top = 2**bits - 1
    for i in range(6):
        generator = np.random.default_rng(i)
        values = generator.integers(0, top + 1, (40, 44))
        values[0, 0] = top
        grey = Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
        grey.save(tmp_path / f"plain/images/{i}.png")
        dtype = {"PNG": np.uint16, "int32": np.int32, "float": np.float32}[kind]
        suffix = "png" if kind == "PNG" else "tif"
        Image.fromarray(values.astype(dtype)).save(tmp_path / f"data/images/{i}.{suffix}")
        for root in ("data", "plain"):
            mask = Image.fromarray((values > top / 2).astype(np.uint8))
            mask.save(tmp_path / root / f"masks/{i}.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("bits", "kind"), [(12, "PNG"), (10, "PNG"), (12, "int32"), (8, "int32"), (8, "float")]
)
def test_e19_the_range_of_values_is_looked_at_and_what_to_set_is_told(tmp_path, bits, kind):
    root, white = bits_of(tmp_path, bits, kind), 2**bits - 1
    data = SegmentationDataModule(folder, str(root))
    for _ in range(2):  # it is not remembered as right
        with pytest.raises(InputError, match=rf"data\.white={white}\b"):
            data.check_files()
    data = SegmentationDataModule(folder, str(root), white=white)
    data.check_files()
    plain = SegmentationDataModule(folder, str(tmp_path / "plain"))
    assert len(data.dataset("train")) == len(plain.dataset("train"))
    for i in range(len(plain.dataset("train"))):
        assert torch.equal(data.dataset("train")[i][0], plain.dataset("train")[i][0])


def test_e19_16_bits_that_are_16_bits_need_no_setting(tmp_path):
    root = bits_of(tmp_path, 16, "PNG")
    SegmentationDataModule(folder, str(root)).check_files()
    SegmentationDataModule(folder, str(root), white=65535).check_files()


def test_e19_white_is_in_the_checkpoint(tmp_path, capsys):
    """From training to the mask, which is that of the same images of 8 bits."""
    bits_of(tmp_path, 12, "PNG")
    small = (
        "model.encoder=resnet10t model.decoder_channels=[8,8,8,8,8] model.weights=null logger=none"
        " data.batch_size=2 data.augment=null trainer.accelerator=cpu trainer.max_epochs=1"
        " data.num_workers=0 scheduler=none recipe=null"
    )
    for root, settings in (("data", "data.white=4095"), ("plain", "")):
        line = f"train data=folder data.root={root} output_dir=run-{root} {settings} {small}"
        assert run_command(line, tmp_path) == 0
        line = f"predict input={root}/images output=out-{root} checkpoint=run-{root} save=[mask]"
        assert run_command(f"{line} trainer.accelerator=cpu", tmp_path) == 0
    runs = [tmp_path / f"run-{root}/test_metrics.json" for root in ("data", "plain")]
    matrices = [json.loads(run.read_text())["confusion_matrix"] for run in runs]
    assert matrices[0] == matrices[1]
    masks = [sorted((tmp_path / f"out-{r}/mask").iterdir()) for r in ("data", "plain")]
    assert [m.read_bytes() for m in masks[0]] == [m.read_bytes() for m in masks[1]]
    assert Segmenter.load(tmp_path / "run-data", device="cpu").format.white == 4095

    capsys.readouterr()  # a network of 8 bits is told what it is given
    line = "predict input=data/images output=out checkpoint=run-plain save=[mask]"
    assert run_command(f"{line} trainer.accelerator=cpu", tmp_path) == 0
    text = " ".join("".join(capsys.readouterr()).split())
    assert text.count("nearly black") == 1
    assert "data.white=4095" in text


def test_e19_channels_of_12_bits_are_scaled_by_what_is_white(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (48, 112, 5), np.uint16)
    values[0, 0] = 4095
    scenes.write(tmp_path / "a.tif", np.moveaxis(values, 2, 0))
    plain, scaled = (Segmenter.load(random_checkpoint_of(tmp_path, w)) for w in (None, 4095))
    assert (plain.read(tmp_path / "a.tif") == values).all()
    expected = np.rint(values * (65535 / 4095))
    assert np.abs(scaled.read(tmp_path / "a.tif") - expected).max() <= 1
    # An array is one as it is in a file.
    by_path, by_array = scaled.predict(tmp_path / "a.tif"), scaled.predict(values)
    assert by_path.mask.tolist() == by_array.mask.tolist()
    assert by_path.confidence == by_array.confidence != plain.predict(values).confidence


def random_checkpoint_of(folder: Path, white: float | None) -> Path:
    """A checkpoint of a network for images of five channels of 16 bits."""
    from seg_torch.checkpoints import checkpoint
    from seg_torch.images.format import ImageFormat
    from seg_torch.models import unet
    from seg_torch.models.weights import adapt_first_conv

    torch.manual_seed(0)
    config = {"encoder": "resnet10t", "weights": None, "decoder_channels": [8, 8, 8, 8, 8]}
    model = unet(2, **config)
    adapt_first_conv(model, 5)
    network = Network(model, [0.5] * 5, [0.2] * 5)
    config |= {"_target_": "seg_torch.models.unet"}
    format = ImageFormat(5, 16, white=white)
    description = checkpoint.describe(network, LABELS, config, {}, None, format)
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({checkpoint.KEY: description, "state_dict": state}, folder / f"{white}.ckpt")
    return folder / f"{white}.ckpt"

"""Which predictions to trust, and how to train on them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command
from PIL import Image
from predictions import FOUR, random_checkpoint

from seg_torch import Segmenter
from seg_torch.commands.predict import predict
from seg_torch.datasets import folder
from seg_torch.datasets.folder import write_folder
from seg_torch.errors import InputError
from seg_torch.labels import Labels
from seg_torch.prediction.inference import decide


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Five images, one of them in a sub-folder and one turned by its EXIF data."""
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (root / "trip").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for name in ("a.png", "b.jpg", "c.webp", "trip/a.png", "turned.jpg"):
        small = Image.fromarray(generator.integers(0, 256, (5, 5, 3), np.uint8))
        image = small.resize((56, 40), Image.Resampling.BICUBIC)
        image.save(root / name, exif=turned if name == "turned.jpg" else Image.Exif())
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("weights") / "random.ckpt")


@pytest.fixture
def run(compose, photos, weights, tmp_path):
    def run(*overrides: str) -> Path:
        inputs = (f"input={photos}", f"output={tmp_path / 'out'}", f"checkpoint={weights}")
        settings = ("trainer.accelerator=cpu", "trainer.precision=32-true")
        assert predict(compose("predict", *inputs, *settings, *overrides)) == 0
        return tmp_path / "out"

    return run


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_pixel_is_unknown_where_its_class_is_less_probable_than_asked_for():
    """Against NumPy's softmax, in more rows than one band of a CPU has."""
    logits = torch.randn(3, 700, 400, generator=torch.Generator().manual_seed(0))
    exponentials = np.exp(logits.numpy().astype(np.float64))
    probability = (exponentials / exponentials.sum(0)).max(0)
    expected = logits.argmax(0).numpy().astype(np.uint8)
    expected[probability < 0.6] = 255
    found = torch.empty(700, 400, dtype=torch.uint8)
    ids, total = decide(logits, confidence_map=found, min_confidence=0.6)
    assert 0.2 < (expected == 255).mean() < 0.8
    assert np.array_equal(ids, expected)
    assert np.abs(found.numpy() - probability * 255).max() < 0.501
    assert total == pytest.approx(probability.sum(), rel=1e-5)
    assert torch.equal(decide(logits)[0].long(), logits.argmax(0))


def test_the_saved_confidence_is_the_largest_probability(run, photos):
    out = run("save=[mask,confidence,probabilities]")
    for row in rows(out):
        name = Path(row["file"]).with_suffix("")
        probabilities = np.load(out / f"probabilities/{name}.npz")["probabilities"]
        confidence = read(out / f"confidence/{name}.png")
        assert confidence.dtype == np.uint8
        assert np.abs(confidence / 255 - probabilities.max(0)).max() < 0.003
        assert float(row["mean_confidence"]) == pytest.approx(confidence.mean() / 255, abs=0.002)


def test_unknown_pixels_are_255_and_all_others_stay_what_they_were(run):
    out = run("save=[mask,confidence]")
    masks = {path: read(path) for path in (out / "mask").rglob("*.png")}
    confidences = [read(path) for path in (out / "confidence").rglob("*.png")]
    unknown = float(np.median(np.concatenate([c.ravel() for c in confidences]))) / 255
    # A setting that changes masks: the files of before are not taken for complete.
    run("save=[mask,confidence]", f"min_confidence={unknown}")
    for path, before in masks.items():
        known = read(out / "confidence" / path.relative_to(out / "mask")) / 255
        after = read(path)
        assert (after[known < unknown - 0.002] == 255).all()
        assert np.array_equal(after[known > unknown + 0.002], before[known > unknown + 0.002])
    assert any(0.05 < (read(path) == 255).mean() < 0.95 for path in masks)
    for row in rows(out):  # what is unknown belongs to no class
        mask = read(out / "mask" / Path(row["file"]).with_suffix(".png"))
        shares = sum(float(row[name]) for name in FOUR.names)
        assert shares == pytest.approx((mask != 255).mean(), abs=1e-5)


def test_python_asks_for_the_same(photos, weights):
    image = photos / "a.png"
    plain = Segmenter.load(weights, "cpu").predict(image, confidence_map=True)
    strict = Segmenter.load(weights, "cpu", min_confidence=0.35).predict(image)
    assert plain.confidence == pytest.approx(plain.confidence_map.mean() / 255, abs=0.002)
    assert set(np.unique(strict.mask)) > {255}
    assert 255 not in {annotation["category_id"] for annotation in strict.coco()}
    with pytest.raises(InputError, match="confidence_map=True"):
        strict.save("nowhere", outputs=["confidence"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("min_confidence=1.5", "min_confidence=1.5: expected a probability"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(run, setting, message):
    with pytest.raises(InputError, match=message):
        run(*setting.split())


def test_predictions_are_a_dataset_in_the_same_pixels(run, photos):
    out = run("save=[mask,dataset]", "min_confidence=0.35")
    train, val = (folder(out / "dataset", split) for split in ("train", "val"))
    assert train.labels == FOUR
    assert np.array_equal(train.labels.palette, FOUR.palette)
    pairs = [*train.pairs, *val.pairs]
    assert {pair.name for pair in pairs} == {"a", "b", "c", "trip/a", "turned"}
    for dataset in (train, val):
        for pair, (image, mask) in zip(dataset.pairs, dataset, strict=True):
            assert image.shape[1:] == mask.shape
            assert np.array_equal(mask, read(out / f"mask/{pair.name}.png"))
            source = photos / pair.image.relative_to(out / "dataset/images")
            assert pair.image.read_bytes() == source.read_bytes()


def annotated(root: Path, labels: Labels = FOUR, count: int = 4) -> Path:
    generator = torch.Generator().manual_seed(1)
    samples = [
        (
            torch.randint(0, 256, (3, 40, 56), generator=generator, dtype=torch.uint8),
            torch.randint(0, len(labels), (40, 56), generator=generator, dtype=torch.uint8),
        )
        for _ in range(count)
    ]
    write_folder(samples, labels, root)
    return root


def test_extra_folders_are_for_training_alone(run, tmp_path):
    extra = run("save=[dataset]") / "dataset"
    own = annotated(tmp_path / "own")
    before = {split: folder(own, split).pairs for split in ("train", "val", "test")}
    after = {split: folder(own, split, extra=[extra]).pairs for split in before}
    assert after["val"] == before["val"]
    assert after["test"] == before["test"]
    assert after["train"][: len(before["train"])] == before["train"]
    added = after["train"][len(before["train"]) :]
    assert [Path(pair.name).relative_to(extra).as_posix() for pair in added] == [
        "a",
        "b",
        "c",
        "trip/a",
        "turned",
    ]


def test_without_extra_folders_no_pair_becomes_an_object(tmp_path, monkeypatch):
    """A copy of 100,000 pairs took half of the time and of the memory of the start."""
    own = annotated(tmp_path / "own")
    monkeypatch.setattr("seg_torch.datasets.base.Pair", None)
    assert len(folder(own, "train")) > 0


def test_an_extra_folder_of_other_classes_is_refused(run, tmp_path):
    extra = run("save=[dataset]") / "dataset"
    own = annotated(tmp_path / "own", Labels(("sky", "road")))
    with pytest.raises(InputError, match=r"dataset.classes\.txt: other classes"):
        folder(own, "train", extra=[extra])


def test_two_commands_train_on_predictions(photos, weights, tmp_path):
    """As in docs/self-training.md, with the default workers."""
    own = annotated(tmp_path / "own")
    predict_line = f"predict input={photos} output=out checkpoint={weights} trainer.accelerator=cpu"
    assert run_command(f"{predict_line} save=[dataset] min_confidence=0.3", tmp_path) == 0
    train_line = f"train data=folder data.root={own} data.dataset.extra=[out/dataset]"
    small = "model.encoder=resnet10t model.weights=null model.decoder_channels=[8,8,8,8,8]"
    brief = "data.augment.crop=[32,32] data.batch_size=4 trainer.max_epochs=1 logger=none"
    line = f"{train_line} {small} {brief} output_dir=run trainer.accelerator=cpu"
    assert run_command(line, tmp_path) == 0
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        (epoch,) = csv.DictReader(file)
    assert int(epoch["step"]) == (3 + 5) // 4
    metrics = json.loads((tmp_path / "run/test_metrics.json").read_text())
    assert sum(map(sum, metrics["confusion_matrix"])) == 40 * 56  # of the one annotated in val

"""The published systems: each trains, and each has what distinguishes it."""

import colorsys
import csv
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import hydra
import make_data
import numpy as np
import pytest
import torch
from conftest import SMALL_MASK2FORMER
from hydra.utils import instantiate
from lightning import Trainer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torchvision import tv_tensors

from seg_torch import Segmenter, datasets
from seg_torch.commands.evaluate import evaluate
from seg_torch.commands.train import train
from seg_torch.data.sampling import EpochSampler
from seg_torch.datasets.eightfold import VARIANTS, EightFold
from seg_torch.files import CONFIG_FOLDER
from seg_torch.labels import Labels
from seg_torch.losses import CrossEntropyLoss
from seg_torch.models import deeplabv3
from seg_torch.models.network import Network
from seg_torch.training.task import SegmentationTask

FEW = ("data.dataset.train=2", "data.dataset.val=1", "data.dataset.test=1")
# What is run: every experiment, and data, models, losses and schedulers that no experiment has.
# Of each run, the data whose tiny copy it gets, and its command line.
RUNS = {
    "shapes": ("shapes", ["experiment=shapes", "data.dataset.size=32", *FEW]),
    "camvid_unet": (
        "camvid",
        [
            "experiment=camvid_unet",
            "data.resize=[32,32]",
            "trainer.check_val_every_n_epoch=1",
        ],
    ),
    "camvid32_hrnet_w48": (
        "camvid32",
        [
            "experiment=camvid32_hrnet_w48",
            "model.encoder=hrnet_w18_small",
            "data.augment.crop=[64,96]",
        ],
    ),
    "clothing_unet_densenet121": (
        "clothing",
        ["experiment=clothing_unet_densenet121", "data.resize=[32,32]", "data.dataset.side=32"],
    ),
    "pet_unet_mobilenetv2": (
        "pet",
        ["experiment=pet_unet_mobilenetv2", "model.encoder=mobilenetv2_050", "data.resize=[32,32]"],
    ),
    "voc_deeplabv3_resnet50": (
        "voc",
        [
            "experiment=voc_deeplabv3_resnet50",
            "model.backbone=mobilenet_v3_large",
            "data.resize=[48,48]",
            "data.augment.crop=[40,40]",
        ],
    ),
    "voc_deeplabv3_resnet101": (
        "voc",
        [
            "experiment=voc_deeplabv3_resnet101",
            "model.backbone=mobilenet_v3_large",
            "data.augment.crop=[32,32]",
        ],
    ),
    "voc_fcn_resnet101": (
        "voc",
        ["experiment=voc_fcn_resnet101", "model.backbone=resnet50", "data.augment.crop=[32,32]"],
    ),
    **{
        f"{data}_dpt_dinov2_{size}": (
            data,
            [
                f"experiment={data}_dpt_dinov2_{size}",
                "model.encoder=test_vit",
                "data.augment.crop=[32,32]",
            ],
        )
        for data, size in (
            *(("voc", "small"), ("voc", "base"), ("ade20k", "small"), ("cityscapes", "small")),
        )
    },
    "folder": ("folder", ["data=folder", "model=lraspp", "loss=weighted_ce", "scheduler=cosine"]),
    "folder_focal": (
        "folder",
        ["data=folder", "model=unet_random", "loss=focal", "loss.weights=dataset"],
    ),
    "camvid": ("camvid", ["data=camvid", "model=unet", "loss=dice", "model.encoder=resnet10t"]),
    "cityscapes": (
        "cityscapes",
        [
            "data=cityscapes",
            "model=smp",
            "model.encoder=tu-resnet10t",
            "scheduler=step",
            "loss=ohem",
        ],
    ),
    "ade20k": (
        "ade20k",
        [
            "data=ade20k",
            "model=segformer",
            "model.config.depths=[1,1,1,1]",
            "scheduler=multistep",
            "loss=lovasz",
        ],
    ),
    "coco_stuff": ("coco_stuff", ["data=coco_stuff", "model=unet_random", "loss=tversky"]),
    "voc_sbd": ("voc_sbd", ["data=voc_sbd", "model=unet_random", "loss=focal_tversky"]),
    "clothing": ("clothing", ["data=clothing", "model=unet_random", "loss=ce_boundary"]),
    "own": ("camvid", ["data=camvid", "loss=model", *SMALL_MASK2FORMER]),
    "auto": ("auto", ["data=auto", "model=unet_random"]),
}
# Formats that differ from the others in how masks are read alone: test_annotations.py loads
# batches through their configurations.
LOADED = {
    f"data={name}"
    for name in (
        *("coco", "coco_panoptic", "cvat", "hf", "label_studio", "labelme", "labelme_voc"),
        *("roboflow", "yolo"),
    )
}
PUBLISHED_DPT = {  # images, batch and steps of UniMatch V2's supervised training: 3,000 VOC samples
    "voc_dpt_dinov2_small": (1464, 32, 60 * (3000 // 32), 518),
    "voc_dpt_dinov2_base": (1464, 32, 60 * (3000 // 32), 518),
    "ade20k_dpt_dinov2_small": (20210, 16, 120 * (20210 // 16), 518),
    "cityscapes_dpt_dinov2_small": (2975, 16, 360 * (2975 // 16), 798),
}
FROZEN = ["clothing_unet_densenet121", "pet_unet_mobilenetv2"]
BRIEF = (
    "data.num_workers=0",
    "data.batch_size=2",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=1",
    "trainer.limit_val_batches=2",
    "trainer.deterministic=true",
)


def command_line(name: str) -> list[str]:
    """Of the run of this name; each network starts from random weights and sees few pixels."""
    line = [*RUNS[name][1], "model.weights=null"]
    return line if line[0].startswith("experiment=") else [*line, "data.augment.crop=[32,32]"]


@pytest.fixture(autouse=True)
def no_confusion_matrix(monkeypatch) -> None:
    """Drawing one takes five seconds for 171 classes; tests/test_visualize.py has its tests."""
    figure = SimpleNamespace(savefig=lambda path: Path(path).touch())
    monkeypatch.setattr("seg_torch.evaluation.results.confusion_matrix", lambda *_: figure)


@pytest.fixture
def run(compose, tmp_path) -> Iterator[Callable[..., Path]]:
    """run("voc", ...): trains briefly on the tiny copy of a dataset; returns the run's folder."""
    folder = tmp_path / "run"

    def run(dataset: str, *overrides: str) -> Path:
        if dataset != "shapes":
            getattr(make_data, f"make_{dataset}")(tmp_path / "data")
            overrides = (*overrides, f"data.root={tmp_path / 'data'}")
        train(compose("train", f"output_dir={folder}", "logger=none", *BRIEF, *overrides))
        return folder

    yield run
    torch.use_deterministic_algorithms(False)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # hundreds of megabytes


@pytest.fixture
def states(monkeypatch) -> list[dict[str, Tensor]]:
    """The model's state when training starts and when it ends, once something is trained."""
    states: list[dict[str, Tensor]] = []

    def keep(self: SegmentationTask) -> None:
        states.append({k: v.clone() for k, v in self.network.model.state_dict().items()})

    monkeypatch.setattr(SegmentationTask, "on_train_start", keep)
    monkeypatch.setattr(SegmentationTask, "on_train_end", keep)
    return states


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def scores(folder: Path) -> dict:
    return json.loads((folder / "test_metrics.json").read_text(encoding="utf-8"))


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_every_choice_of_a_user_is_in_one_of_the_runs_above():
    groups = ("experiment", "data", "model", "loss", "optimizer", "scheduler")
    chosen = set()
    for name in RUNS:
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            cfg = hydra.compose("train", command_line(name), return_hydra_config=True)
        chosen |= {f"{group}={cfg.hydra.runtime.choices[group]}" for group in groups}
    files = {f"{group}={p.stem}" for group in groups for p in (CONFIG_FOLDER / group).iterdir()}
    # No choices of a user, and one that does not train.
    assert files - chosen == {"data=default", "data=from_checkpoint", "model=hub"} | LOADED


@pytest.mark.promise(26)
@pytest.mark.parametrize("name", RUNS)
def test_everything_trains_is_scored_and_predicts(run, states, name):
    dataset, _ = RUNS[name]
    folder = run(dataset, *command_line(name))
    (row,) = history(folder)
    assert row["step"] == "1"
    assert math.isfinite(float(row["train_loss"]))
    before, after = states
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    if name in FROZEN:  # with its BatchNorm statistics, and all else is trained
        frozen = {key for key in before if key.startswith("encoder.")}
        assert any("running_mean" in key for key in frozen)
        assert moved == before.keys() - frozen
    segmenter = Segmenter.load(folder)
    place = {} if dataset == "shapes" else {"root": folder.parent / "data"}
    val = getattr(datasets, dataset)(split="val", **place)
    assert segmenter.labels.names == tuple(scores(folder)["per_class"]) == val.labels.names
    assert sum(row["pixels"] for row in scores(folder)["per_class"].values()) > 0
    mask = segmenter.predict(val[0][0]).mask
    assert mask.shape == val.mask(0).shape
    assert mask.max() < len(val.labels)


# What each experiment promises


def test_scaled_to_0_1_means_neither_mean_nor_deviation(compose):
    for name in ("clothing_unet_densenet121", "pet_unet_mobilenetv2", "voc_deeplabv3_resnet50"):
        preprocessing = compose("train", f"experiment={name}").preprocessing
        assert (preprocessing.mean, preprocessing.std) == ([0, 0, 0], [1, 1, 1])


def test_camvid32_sees_33_outputs_and_whole_images(compose):
    cfg = compose("train", "experiment=camvid32_hrnet_w48", "model.weights=null")
    assert (cfg.model.encoder, cfg.data.augment.crop) == ("hrnet_w48", [720, 960])
    cfg.model.encoder = "hrnet_w18_small"
    model = instantiate(cfg.model, num_classes=32).eval()
    assert model.head[-1].out_channels == 33
    assert model(torch.zeros(1, 3, 32, 32))["out"].shape[1] == 32


def test_clothing_is_the_first_1000_photos_split_as_scikit_learn_does(compose, tmp_path):
    for i in range(1, 1005):
        touch(tmp_path / f"photos/{i:04}.jpg", tmp_path / f"annotations/pixel-level/{i:04}.mat")
    cfg = compose("train", "experiment=clothing_unet_densenet121", f"data.root={tmp_path}")
    data = instantiate(cfg.data, _convert_="all")
    names = [f"{i:04}" for i in range(1, 1001)]
    expected_train, expected_val = train_test_split(names, test_size=0.2, random_state=0)
    assert [pair.name for pair in data.dataset("train").dataset.pairs] == expected_train
    assert [pair.name for pair in data.dataset("val").pairs] == expected_val
    assert len(data.dataset("train")) == 6400
    assert cfg.trainer.limit_train_batches == 800 // 64 == 12
    assert len(data.train_dataloader()) == 6400 // 64


def test_pet_takes_57_steps_an_epoch(compose, tmp_path):
    home = tmp_path / "oxford-iiit-pet"
    names = [f"Abyssinian_{i}" for i in range(3680)]
    make_data.write_lines(home / "annotations/trainval.txt", [f"{name} 1 1 1" for name in names])
    for name in names:
        touch(home / f"images/{name}.jpg", home / f"annotations/trimaps/{name}.png")
    cfg = compose("train", "experiment=pet_unet_mobilenetv2", f"data.root={tmp_path}")
    loader = instantiate(cfg.data, _convert_="all").train_dataloader()
    assert isinstance(loader.batch_sampler, EpochSampler)
    assert len(loader) == 57


def test_the_class_weights_of_pet_are_an_override(compose):
    weights = ["loss=weighted_ce", "loss.weights=[0.4,0.4,0.2]"]
    loss = instantiate(compose("train", "experiment=pet_unet_mobilenetv2", *weights).loss)
    # Three pixels, one of each class; with logits (ln 2, 0, 0) the probabilities are 1/2, 1/4, 1/4.
    logits = torch.tensor([math.log(2), 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 1, 3)
    target = torch.tensor([[[0, 1, 2]]], dtype=torch.uint8)
    expected = 0.4 * math.log(2) + 0.4 * math.log(4) + 0.2 * math.log(4)  # the weights add up to 1
    assert loss(logits, target).item() == pytest.approx(expected, rel=1e-6)


def test_voc_val_is_halved_after_pythons_shuffle_with_seed_42(compose, tmp_path):
    home = tmp_path / "VOCdevkit/VOC2012"
    names = [f"2007_{i:06}" for i in range(1449)]
    make_data.write_lines(home / "ImageSets/Segmentation/val.txt", names)
    for name in names:
        touch(home / f"JPEGImages/{name}.jpg", home / f"SegmentationClass/{name}.png")
    cfg = compose("train", "experiment=voc_deeplabv3_resnet50", f"data.root={tmp_path}")
    data = instantiate(cfg.data, _convert_="all")
    random.Random(42).shuffle(names)
    assert [pair.name for pair in data.dataset("val").pairs] == names[:724]
    assert [pair.name for pair in data.dataset("test").pairs] == names[724:]


def test_the_loss_of_voc_deeplabv3_resnet50_is_the_books_by_hand(compose):
    loss = instantiate(compose("train", "experiment=voc_deeplabv3_resnet50").loss)
    # Two classes, 2 x 2 pixels, three of class 0 and one of class 1: they weigh (4 - 3) / 4 and
    # (4 - 1) / 4. With logits (ln 3, 0) the probabilities are 3/4 and 1/4 everywhere.
    logits = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    target = torch.tensor([[[0, 0], [0, 1]]], dtype=torch.uint8)
    cross_entropy = (3 * 1 / 4 * -math.log(3 / 4) + 3 / 4 * -math.log(1 / 4)) / 4
    # Listing 8.15: sums over pixels and classes of t p w and of (t + p) w.
    intersection = 3 * (3 / 4 * 1 / 4) + 1 / 4 * 3 / 4
    union = 3 * ((1 + 3 / 4) + (0 + 1 / 4)) * 1 / 4 + ((0 + 3 / 4) + (1 + 1 / 4)) * 3 / 4
    dice = 1 - (2 * intersection + 1) / (union + 1)
    assert loss(logits, target).item() == pytest.approx(cross_entropy + dice, rel=1e-6)


def test_the_void_rim_of_voc_is_in_neither_part_of_the_loss(compose):
    loss = instantiate(compose("train", "experiment=voc_deeplabv3_resnet50").loss)
    logits = torch.randn(1, 21, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.randint(21, (1, 4, 4), generator=torch.Generator().manual_seed(1))
    with_rim = torch.nn.functional.pad(target, (1, 1, 1, 1), value=255)
    enlarged = torch.nn.functional.pad(logits, (1, 1, 1, 1), value=5.0)
    torch.testing.assert_close(loss(enlarged, with_rim), loss(logits, target))


def test_voc_deeplabv3_resnet50_has_the_atrous_rates_of_the_book(compose):
    cfg = compose("train", "experiment=voc_deeplabv3_resnet50")
    assert cfg.model.backbone == "resnet50"
    model = deeplabv3(21, "mobilenet_v3_large", None, atrous_rates=cfg.model.atrous_rates)
    rates = [m.dilation[0] for m in model.classifier.modules() if isinstance(m, nn.Conv2d)]
    assert rates == [1, 6, 12, 18, 1, 1, 1, 1]  # 1x1, three 3x3, pooled, projection, 3x3, logits


@pytest.mark.parametrize("name", PUBLISHED_DPT)
def test_dinov2_is_trained_by_the_published_recipe(name, compose):
    images, batch, steps, crop = PUBLISHED_DPT[name]
    cfg = compose("train", f"experiment={name}")
    assert cfg.data.batch_size == batch
    assert cfg.trainer.max_epochs * (images // batch) == steps
    assert (cfg.data.augment.crop, cfg.data.augment.scale) == ([crop, crop], [0.5, 2.0])
    assert (cfg.data.augment.flip, cfg.data.augment.jitter) == (0.5, None)
    assert (cfg.scheduler._target_, cfg.scheduler.power) == (
        "seg_torch.training.schedulers.poly",
        0.9,
    )
    model = instantiate(cfg.model, encoder="test_vit", weights=None, num_classes=4)
    assert model.head.classifier[0].out_channels == {"s": 64, "b": 128}[name.rsplit("_")[-1][0]]
    network = Network(model)
    task = SegmentationTask(
        network,
        Labels(tuple("abcd")),
        CrossEntropyLoss(),
        optimizer=instantiate(cfg.optimizer, _convert_="all"),
    )
    task.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    adamw = task.configure_optimizers()
    assert isinstance(adamw, torch.optim.AdamW)
    encoder = {id(p) for p in model.encoder.parameters()}
    for group in adamw.param_groups:
        of_encoder = {id(p) in encoder for p in group["params"]}
        assert group["lr"] == pytest.approx(5e-6 if of_encoder == {True} else 2e-4)
        assert len(of_encoder) == 1
    assert len(adamw.param_groups) == 2
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.01}


class LearnsNothing(nn.Module):
    """Logits that stay zero, so that the validation loss stays what it is."""

    def __init__(self, num_classes: int, **settings: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_classes, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return 0 * self.weight * x[:, :1]


def test_a_stalled_loss_lowers_the_rate_after_3_epochs_and_ends_the_run_after_6(run):
    small = ["data.resize=[32,32]", "data.augment.crop=[32,32]", "trainer.max_epochs=25"]
    model = f"model._target_={__name__}.LearnsNothing"
    folder = run("voc", "experiment=voc_deeplabv3_resnet50", model, *small)
    # The first epoch sets the best loss; the fourth is the third without a better one.
    rates = [float(row["learning_rate"]) for row in history(folder)]
    np.testing.assert_allclose(rates, [1e-4] * 4 + [1e-5] * 3)


def test_the_published_weights_can_be_scored_without_training(run):
    folder = run("voc", *command_line("voc_deeplabv3_resnet101"), "trainer.max_epochs=0")
    assert sum(row["pixels"] for row in scores(folder)["per_class"].values()) > 0
    assert not (folder / "metrics.csv").exists()


def test_more_scores_are_reported_where_they_are_asked_for(run, compose, tmp_path):
    small = ["data.dataset.size=32", *FEW, "data.dataset.test=3"]
    trained = run("shapes", *small, "model=unet_random")
    reports = []
    for size in (1, 3):
        options = [f"checkpoint={trained}", f"data.eval_batch_size={size}", "data.num_workers=0"]
        folder = tmp_path / f"evaluation{size}"
        settings = ["trainer.accelerator=cpu", f"output_dir={folder}"]
        asked = ["average_precision=true", "boundary=3" if size == 3 else "boundary=true"]
        evaluate(compose("evaluate", *options, *settings, *asked))
        reports.append(scores(folder))
    for report in reports:
        values = [row["average_precision"] for row in report["per_class"].values()]
        known = [value for value in values if value is not None]
        assert report["mean_average_precision"] == pytest.approx(np.mean(known))
        for score in ("boundary_iou", "boundary_f"):
            values = [row[score] for row in report["per_class"].values() if row[score] is not None]
            mean = pytest.approx(np.mean(values)) if values else None
            assert report[f"mean_{score}"] == mean
            assert all(0 <= value <= 1 for value in values)
        pixels = sum(row["pixels"] for row in report["reliability"])
        assert pixels == np.sum(report["confusion_matrix"])
    means = [report["mean_average_precision"] for report in reports]
    assert means[0] == pytest.approx(means[1], abs=1e-4)
    # 2 % of the diagonal of 32 x 32 is 1 pixel.
    assert reports[0]["mean_boundary_iou"] < reports[1]["mean_boundary_iou"]
    for name in ("mean_average_precision", "mean_boundary_iou", "mean_boundary_f"):
        assert name not in scores(trained)
    assert 0 <= scores(trained)["expected_calibration_error"] <= 1


# The eight-fold training set, each variant computed with other means


class Noise:
    """Three square images of noise with masks."""

    labels = Labels(("a", "b", "c"))

    def __init__(self, side: int) -> None:
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (3, 3, side, side), np.uint8)
        self.masks = rng.integers(0, 3, (3, side, side), np.uint8)
        self.masks[:, 0] = 255

    def __len__(self) -> int:
        return len(self.images)

    def mask(self, index: int) -> np.ndarray:
        return self.masks[index]

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image, mask = (torch.from_numpy(a[index].copy()) for a in (self.images, self.masks))
        return tv_tensors.Image(image), tv_tensors.Mask(mask)


SIDE = 20
NOISE = Noise(SIDE)
EIGHT = EightFold(NOISE, SIDE)


def variant(name: str, index: int = 1) -> tuple[Tensor, Tensor]:
    return EIGHT[VARIANTS.index(name) * len(NOISE) + index]


def to_levels(values: np.ndarray) -> np.ndarray:
    """Values on a scale of 0 to 1 to the nearest of 256 levels."""
    return np.floor(np.minimum(values, 1) * 255 + 0.5)


def test_the_eightfold_set_has_each_sample_in_each_variant_once():
    assert len(EIGHT) == 8 * len(NOISE) == 24
    images = {image.numpy().tobytes() for image, _ in map(EIGHT.__getitem__, range(24))}
    assert len(images) == 24
    with pytest.raises(IndexError):
        EIGHT[24]
    assert EIGHT.labels is NOISE.labels


def test_only_the_training_split_is_eightfold(tmp_path):
    make_data.make_clothing(tmp_path)
    sizes = [
        len(datasets.eightfold(datasets.clothing, split, 32, root=tmp_path))
        for split in ("train", "val", "test")
    ]
    assert sizes == [8 * 4, 2, 2]
    train = datasets.eightfold(datasets.clothing, "train", 32, root=tmp_path)
    names = [train.name(index, "name") for index in range(len(train))]
    assert names == 8 * [pair.name for pair in train.dataset.pairs]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_8_bit_and_its_mask_is_that_of_the_item(name):
    image, mask = variant(name)
    assert isinstance(image, tv_tensors.Image)
    assert isinstance(mask, tv_tensors.Mask)
    assert image.dtype == mask.dtype == torch.uint8
    assert image.shape == (3, SIDE, SIDE)
    assert set(mask.unique().tolist()) <= {0, 1, 2, 255}
    assert (EIGHT.mask(VARIANTS.index(name) * len(NOISE) + 1) == mask.numpy()).all()


@pytest.mark.parametrize("name", ["original", "brightness", "gamma", "hue"])
def test_a_change_of_colours_leaves_the_mask_alone(name):
    assert (variant(name)[1].numpy() == NOISE.masks[1]).all()


def test_brightness_adds_a_tenth_and_stops_at_white():
    # 0.1 of 255 is 25.5, which makes x + 25.5 a tie for every x; both neighbours are right.
    difference = variant("brightness")[0].numpy() - np.minimum(NOISE.images[1] + 25.5, 255)
    assert np.abs(difference).max() <= 0.5


def test_gamma_is_the_tenth_root():
    expected = to_levels((NOISE.images[1] / 255.0) ** 0.1)
    assert (variant("gamma")[0].numpy() == expected).all()
    assert to_levels(np.array([1 / 255, 0.0])).tolist() == [1, 0]
    assert to_levels(np.array([(1 / 255) ** 0.1])).tolist() == [147]  # the darkest grey but black


def test_hue_turns_back_by_a_tenth_of_the_circle():
    pixels = NOISE.images[1].reshape(3, -1).T / 255.0
    turned = []
    for pixel in pixels:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        turned.append(colorsys.hsv_to_rgb((hue - 0.1) % 1, saturation, value))
    expected = 255 * np.array(turned).T.reshape(3, SIDE, SIDE)
    # Half a level of rounding, and float32 against Python's doubles.
    assert np.abs(variant("hue")[0].numpy() - expected).max() < 0.51


def test_the_central_crop_is_enlarged_to_the_old_size():
    # int((20 - 20 * 0.7) / 2) = 3 pixels go on each side: 14 x 14 are left. TensorFlow's and
    # NumPy's bilinear value at the centre of new pixel i, which lies at (i + 1/2) 14/20 - 1/2.
    window = NOISE.images[1][:, 3:17, 3:17].astype(float)
    at = np.clip((np.arange(SIDE) + 0.5) * 14 / 20 - 0.5, 0, 13)
    across = np.array([[np.interp(at, range(14), row) for row in c] for c in window])
    expected = np.array([[np.interp(at, range(14), col) for col in c.T] for c in across])
    image, mask = variant("central crop")
    assert np.abs(image.numpy() - expected.transpose(0, 2, 1)).max() <= 1  # two roundings
    nearest = 3 + ((np.arange(SIDE) + 0.5) * 14 / 20).astype(int)
    assert (mask.numpy() == NOISE.masks[1][np.ix_(nearest, nearest)]).all()


def test_the_crop_of_128_pixels_is_tensorflows_of_90():
    # int((128 - 89.6) / 2) = 19 on each side, so that 90 rather than 89.6 are left.
    mask = np.full((128, 128), 1, np.uint8)
    mask[19:109, 19:109] = 0
    noise = Noise(128)
    noise.masks[0] = mask
    cropped = EightFold(noise, 128).mask(4 * 3)
    assert VARIANTS[4] == "central crop"
    assert not cropped.any()
    noise.masks[0, 19] = 1
    assert EightFold(noise, 128).mask(4 * 3)[0].all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("horizontal flip", np.fliplr),
        ("vertical flip", np.flipud),
        ("rotation", np.rot90),  # by 90 degrees, counter-clockwise
    ],
)
def test_flips_and_rotation_move_image_and_mask_alike(name, expected):
    image, mask = variant(name)
    assert (mask.numpy() == expected(NOISE.masks[1])).all()
    for channel in range(3):
        assert (image[channel].numpy() == expected(NOISE.images[1][channel])).all()
    if name == "rotation":
        assert mask[-1, 0] == NOISE.masks[1][0, 0]  # the upper left corner is now the lower left


# Real data


@pytest.mark.slow
def test_real_clothing_trains(compose, tmp_path):
    if "SEG_TORCH_DATA" not in os.environ:
        pytest.skip("SEG_TORCH_DATA does not name a folder with the real datasets")
    options = ["model.weights=null", "model.freeze_encoder=false", "trainer.max_epochs=3"]
    experiment = "experiment=clothing_unet_densenet121"
    train(compose("train", experiment, *options, f"output_dir={tmp_path / 'run'}"))
    rows = history(tmp_path / "run")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])

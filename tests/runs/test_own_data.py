"""A folder of one's own through train.py, evaluate.py and predict.py.

The model is a formula, so that its masks, its scores and its loss are known without it. It also
notes what it is shown and how, which the settings of the command line decide.
"""

import csv
import io
import json
import resource
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import output_in_new_process, run_command
from lightning import Callback
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torchvision import tv_tensors

from seg_torch.checkpoints import checkpoint
from seg_torch.labels import Labels
from seg_torch.models.network import Network

HEIGHT, WIDTH = 40, 56
CLASSES = {"dark": (10, 20, 30), "bright": (200, 100, 0), "absent": (1, 2, 3)}
MEAN, STD = np.array([0.2, 0.3, 0.4]), np.array([0.5, 0.6, 0.7])
THRESHOLDS = (250, 60, 5)  # in the three epochs of the second run


class Shown(NamedTuple):
    """One image as the model got it."""

    training: bool
    dtype: torch.dtype  # of what autocast computes in
    image: np.ndarray  # [3, H, W]


SHOWN: list[Shown] = []


class Threshold(nn.Module):
    """Pixels with more red than a threshold are class 1, the others class 0; class 2 is absent."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        assert num_classes == len(CLASSES)
        self.threshold = nn.Parameter(torch.tensor(128.0))
        self.register_buffer("random", torch.rand(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if not x.is_meta:
            on = torch.is_autocast_enabled("cpu")
            dtype = torch.get_autocast_dtype("cpu") if on else torch.float32
            shown = [Shown(self.training, dtype, image.numpy(force=True)) for image in x]
            # The network's answer to a black image is looked at before the first step.
            SHOWN.extend(image for image in shown if np.ptp(image[2], axis=(1, 2)).any())
        out = logits(255 * (x[:, 0] * STD[0] + MEAN[0]), self.threshold)
        return {"out": out, "aux": 0.3 * out} if self.training else {"out": out}


def logits(red: Tensor, threshold: Tensor | float) -> Tensor:
    """[N, H, W] of 0 to 255 -> [N, 3, H, W]."""
    bright = (red - threshold) / 50
    return torch.stack([-bright, bright, torch.full_like(red, -20)], 1)


class Spoil(Callback):
    """Sets the threshold of each epoch."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.network.model.threshold.data.fill_(THRESHOLDS[trainer.current_epoch])


# The images: dark on the left, bright on the right, whatever the format. Each has its own darkness.

RIGHT = np.zeros((HEIGHT, WIDTH), bool)
RIGHT[:, 30:] = True


def transparent(grey: np.ndarray) -> Image.Image:
    alpha = np.where(RIGHT, 1, 255)  # with 0 there would be no data
    return Image.fromarray(np.dstack([grey, grey, grey, alpha]).astype(np.uint8))


def with_palette(grey: np.ndarray) -> Image.Image:
    image = Image.fromarray((~RIGHT).astype(np.uint8))  # index 0 is the bright one
    image.putpalette([240] * 3 + [int(grey.min())] * 3)
    return image


def cmyk(grey: np.ndarray) -> Image.Image:
    none, black = Image.new("L", (WIDTH, HEIGHT)), Image.fromarray(255 - grey)
    return Image.merge("CMYK", [none, none, none, black])


def colour(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey, grey // 2, 255 - grey], 2)


def as_grey(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, 2)


def on_white(grey: np.ndarray) -> np.ndarray:
    return as_grey(np.where(RIGHT, 255, grey))


# File name -> how it is made from grey values, and the RGB that it has to be read as.
FORMATS: dict[str, tuple[Callable[[np.ndarray], Image.Image], Callable]] = {
    "rgb.png": (lambda grey: Image.fromarray(colour(grey)), colour),
    "grey.png": (Image.fromarray, as_grey),
    "rgba.png": (transparent, on_white),
    "palette.png": (with_palette, as_grey),
    "cmyk.tif": (cmyk, as_grey),
    "16_bit.png": (lambda grey: Image.fromarray(grey.astype(np.uint16) * 257), as_grey),
    "turned.png": (lambda grey: Image.fromarray(np.rot90(grey).copy()), as_grey),
}
TURN = Image.Exif()
TURN[0x0112] = 6  # clockwise, to be seen upright


class Data(NamedTuple):
    images: dict[str, np.ndarray]  # name -> RGB uint8 [H, W, 3]
    masks: dict[str, np.ndarray]  # name -> uint8 [H, W]
    splits: dict[str, list[str]]  # train, val or test -> names


def make_data(root: Path) -> Data:
    """Train and test have an image of each format; val has masks that are wrong in places."""
    data = Data({}, {}, {"train": [], "val": [], "test": []})

    def write(split: str, file: str, image: Image.Image, rgb: np.ndarray, mask: np.ndarray) -> None:
        path = root / "images" / f"{split}_{file}"
        image.save(path, **({"exif": TURN} if file == "turned.png" else {}))
        Image.fromarray(mask).save(root / "masks" / f"{path.stem}.png")
        data.images[path.stem], data.masks[path.stem] = rgb, mask
        data.splits[split].append(path.stem)

    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for s, split in enumerate(("train", "test")):
        for i, (file, (make, read)) in enumerate(FORMATS.items()):
            grey = np.where(RIGHT, 240, 8 * i + 4 * s).astype(np.uint8)
            mask = RIGHT.astype(np.uint8)
            mask[: i + 1] = 255  # not labelled
            if (split, file) == ("train", "grey.png"):
                mask[:] = 255  # not at all
            write(split, file, make(grey), read(grey).astype(np.uint8), mask)
    for i in range(5):
        grey = np.full((HEIGHT, WIDTH - 7 * (i % 2)), 3 + i, np.uint8)
        grey[: 8 + i, :20] = 120
        mask = (np.indices(grey.shape)[1] >= 45).astype(np.uint8)
        grey[:, 45 - i :] = 240
        mask[-2:] = 255
        write("val", f"{i}.png", Image.fromarray(colour(grey)), colour(grey), mask)
    for split, names in data.splits.items():
        (root / f"{split}.txt").write_text("\n".join(names))
    lines = [f"{name} {' '.join(map(str, rgb))}" for name, rgb in CLASSES.items()]
    (root / "classes.txt").write_text("\n".join(lines))
    return data


def matrix_of(masks: dict[str, np.ndarray], predicted: dict[str, np.ndarray]) -> np.ndarray:
    """Rows: label, columns: prediction; over all pixels of all images."""
    matrix = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for name, values in predicted.items():
        labelled = masks[name] != 255
        np.add.at(matrix, (masks[name][labelled], values[labelled]), 1)
    return matrix


class Run(NamedTuple):
    """What the commands left."""

    home: Path
    data: Data
    shown: dict[str, list[Shown]]  # by command
    printed: dict[str, str]

    def report(self, path: str) -> dict[str, Any]:
        return json.loads((self.home / path).read_text())

    def history(self) -> list[dict[str, str]]:
        with (self.home / "run/metrics.csv").open() as file:
            return list(csv.DictReader(file))

    def masks(self, names: list[str]) -> dict[str, np.ndarray]:
        """Those that predict.py wrote."""
        files = {name: self.home / f"masks/mask/{name}.png" for name in names}
        return {name: np.array(Image.open(file)) for name, file in files.items()}


def run_all(home: Path, *commands: str) -> Run:
    """Runs commands, which have to succeed, on the data in `home`."""
    run = Run(home, make_data(home / "data"), {}, {})
    (home / "mine/model").mkdir(parents=True)
    (home / "mine/model/own.yaml").write_text(f"_target_: {__name__}.Threshold\n")
    for line in commands:
        if "=moved" in line and not (home / "moved").exists():
            (home / "data").rename(home / "moved")
        SHOWN.clear()
        output = io.StringIO()
        with redirect_stdout(output), redirect_stderr(output):
            assert run_command(line, home) == 0, output.getvalue()
        name = line.split()[0]
        run.shown[name], run.printed[name] = SHOWN[:], output.getvalue()
    return run


TRUST = f"trust=[{__name__}] trainer.accelerator=cpu"
TRAIN = (
    "train --config-dir=mine model=own data=folder data.root=data output_dir=run data.augment=null "
    "data.batch_size=1 optimizer=sgd optimizer.lr=0 scheduler=none trainer.accelerator=cpu "
    f"recipe=null preprocessing.mean={MEAN.tolist()} preprocessing.std={STD.tolist()}"
).replace(", ", ",")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """One epoch in float32 with class weights, and what comes after it."""
    return run_all(
        tmp_path_factory.mktemp("own"),
        f"{TRAIN} trainer.max_epochs=1 trainer.precision=32 loss=weighted_ce "
        "aux_weight=0.25 data.num_workers=0 trainer.log_every_n_steps=1",
        f"evaluate checkpoint=run data.root=moved output_dir=evaluation {TRUST}",
        f"predict checkpoint=run input=moved/images output=masks {TRUST}",
    )


def names_of(data: Data, shown: list[Shown]) -> set[str]:
    """The names of the images that these are, which have to be normalised."""
    names = set()
    for _, _, found in shown:
        matching = [
            name
            for name, rgb in data.images.items()
            if rgb.shape[:2] == found.shape[1:]
            and np.abs((rgb / 255 - MEAN) / STD - found.transpose(1, 2, 0)).max() < 1e-5
        ]
        assert len(matching) == 1, "an image that was not read as it should be"
        names.update(matching)
    return names


@pytest.mark.promise(19, 20)
def test_images_of_every_format_are_the_same_in_training_evaluation_and_prediction(run):
    """Grey, transparent, palette, CMYK, 16-bit, and turned by EXIF: to the last value."""
    train, val, test = (run.data.splits[split] for split in ("train", "val", "test"))
    training = [shown for shown in run.shown["train"] if shown.training]
    assert names_of(run.data, training) == {*train}
    assert len(training) == len(FORMATS)
    others = [shown for shown in run.shown["train"] if not shown.training]
    assert names_of(run.data, others) == {*val, *test}
    assert names_of(run.data, run.shown["evaluate"]) == {*test}
    assert names_of(run.data, run.shown["predict"]) == {*train, *val, *test}
    predicted = run.masks([*train, *test])
    assert all(np.array_equal(mask, RIGHT) for mask in predicted.values())


@pytest.mark.promise(4)
def test_a_perfect_prediction_scores_1_and_the_absent_class_is_absent(run):
    reports = [run.report("run/test_metrics.json"), run.report("evaluation/test_metrics.json")]
    assert reports[0] == reports[1]
    for mean in ("mean_iou", "mean_dice", "mean_accuracy", "pixel_accuracy"):
        assert reports[0][mean] == 1
    absent = reports[0]["per_class"]["absent"]
    assert absent.pop("pixels") == 0
    assert set(absent.values()) == {None}
    for command in ("train", "evaluate"):
        (row,) = [
            line for line in run.printed[command].splitlines() if line.lstrip().startswith("absent")
        ]
        assert row.count("absent") == 5


def class_weights(data: Data) -> list[float]:
    """Those of the training set, by scikit-learn."""
    pixels = np.concatenate([data.masks[name].ravel() for name in data.splits["train"]])
    labelled = pixels[pixels != 255]
    return [*compute_class_weight("balanced", classes=np.arange(2), y=labelled).tolist(), 0.0]


@pytest.mark.promise(18)
def test_class_weights_are_printed_and_leave_out_ignored_pixels_and_absent_classes(run):
    weights = [round(weight, 4) for weight in class_weights(run.data)]
    assert f"class weights (inverse): {weights}" in run.printed["train"]


@pytest.mark.promise(9)
def test_the_loss_is_pytorchs_and_zero_for_a_batch_without_a_label(run):
    """With class weights, and with a quarter of the auxiliary head's; a batch is an image."""
    options = {"weight": torch.tensor(class_weights(run.data)), "ignore_index": 255}
    losses = []
    for name in run.data.splits["train"]:
        red = torch.from_numpy(run.data.images[name][None, ..., 0]).float()
        target = torch.from_numpy(run.data.masks[name][None]).long()
        out = logits(red, 128)
        main, aux = (F.cross_entropy(scale * out, target, **options) for scale in (1, 0.3))
        losses.append((main + 0.25 * aux).item())
    assert np.isnan(losses).sum() == 1, "PyTorch's own mean over no pixels"
    (row,) = run.history()
    assert float(row["train_loss"]) == pytest.approx(np.nan_to_num(losses).mean(), rel=1e-5)


@pytest.mark.promise(23)
def test_predicted_masks_carry_the_names_and_colours_of_the_classes(run):
    for name in run.data.images:
        with Image.open(run.home / f"masks/mask/{name}.png") as image:
            assert image.mode == "P"
            assert json.loads(image.text["names"]) == list(CLASSES)
            assert np.array_equal(np.array(image.getpalette()[:9]), np.ravel([*CLASSES.values()]))
    header = (run.home / "masks/predictions.csv").read_text().splitlines()[0]
    assert header.split(",")[-3:] == list(CLASSES)


def test_a_checkpoint_is_not_scored_on_data_with_other_classes(run, capsys):
    line = f"evaluate checkpoint=run data=shapes output_dir=shapes {TRUST}"
    assert run_command(line, run.home) == 2
    message = capsys.readouterr().err
    assert "knows the 3 classes (dark, bright, absent), the data has the 6 classes" in message
    assert not (run.home / "shapes").exists()


def test_tensorboard_finds_loss_rate_and_scores_in_the_folder_of_the_run(run):
    tags = set()
    for file in (run.home / "run").rglob("events.out.tfevents*"):
        tags.update(EventAccumulator(str(file)).Reload().Tags()["scalars"])
    assert {"train/loss", "val/mean_iou", "val/loss", "lr-SGD"} <= tags


# With resizing, in bfloat16, and a model that is best in the second of three epochs


@pytest.fixture(scope="module")
def resized(tmp_path_factory) -> Run:
    scored = [
        f"evaluate checkpoint=run split=val output_dir=val{size} data.eval_batch_size={size} "
        f"trainer.precision=bf16-mixed {TRUST}"
        for size in (1, 3, 5)
    ]
    return run_all(
        tmp_path_factory.mktemp("resized"),
        f"{TRAIN} trainer.max_epochs=3 trainer.precision=bf16-mixed data.resize=[20,28] "
        f"seed=7 trainer.accumulate_grad_batches=2 +callbacks.spoil._target_={__name__}.Spoil",
        *scored,
        f"evaluate checkpoint=run output_dir=test {TRUST}",
        f"predict checkpoint=run input=data/images output=masks trainer.precision=32-true {TRUST}",
    )


@pytest.mark.promise(13)
def test_a_network_that_sees_resized_images_is_scored_at_the_size_of_the_labels(resized):
    for shown in resized.shown.values():
        assert {image.shape for _, _, image in shown} == {(3, 20, 28)}
    for split in ("val", "test"):
        predicted = resized.masks(resized.data.splits[split])
        for name, mask in predicted.items():
            assert mask.shape == resized.data.masks[name].shape
        expected = matrix_of(resized.data.masks, predicted).tolist()
        folder = "val1" if split == "val" else "test"
        assert resized.report(f"{folder}/{split}_metrics.json")["confusion_matrix"] == expected


@pytest.mark.promise(2)
def test_scores_are_those_of_one_matrix_over_the_dataset_for_every_batch_size(resized):
    reports = [resized.report(f"val{size}/val_metrics.json") for size in (1, 3, 5)]
    assert reports[0] == reports[1] == reports[2]

    def mean_iou(matrix: np.ndarray) -> float:
        union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
        return (matrix.diagonal()[union > 0] / union[union > 0]).mean()

    predicted = resized.masks(resized.data.splits["val"])
    whole = matrix_of(resized.data.masks, predicted)
    each = [mean_iou(matrix_of(resized.data.masks, {n: m})) for n, m in predicted.items()]
    assert reports[0]["confusion_matrix"] == whole.tolist()
    assert reports[0]["mean_iou"] == pytest.approx(mean_iou(whole))
    assert abs(mean_iou(whole) - np.mean(each)) > 0.001, "nothing to tell them apart by"


def test_the_epoch_with_the_best_mean_iou_is_kept_and_scored(resized):
    mean_iou, accuracy = (
        [float(row[f"val_{name}"]) for row in resized.history()]
        for name in ("mean_iou", "pixel_accuracy")
    )
    assert np.argmax(mean_iou) == 1
    assert np.argmax(accuracy) == 0, "nothing to tell them apart by"
    best = checkpoint.network_state(checkpoint.read(resized.home / "run"))
    assert best["model.threshold"] == THRESHOLDS[1]
    assert resized.report("val1/val_metrics.json")["mean_iou"] == pytest.approx(mean_iou[1])
    assert resized.report("run/test_metrics.json") == resized.report("test/test_metrics.json")


@pytest.mark.promise(16)
def test_the_effective_batch_is_printed_and_decides_how_many_steps_there_are(run, resized):
    for which, batch, steps in ((run, 1, ["7"]), (resized, 2, ["4", "8", "12"])):
        assert "7 training images, 3 classes" in which.printed["train"]
        assert f", effective batch {batch}\n" in which.printed["train"]
        assert [row["step"] for row in which.history()] == steps


def test_another_seed_starts_from_other_weights(run, resized):
    first, other = (
        checkpoint.network_state(checkpoint.read(r.home / "run")) for r in (run, resized)
    )
    assert not torch.equal(first["model.random"], other["model.random"])


def test_each_part_computes_in_the_precision_that_was_asked_for(resized):
    train = resized.shown["train"]
    of_test = len(resized.data.splits["test"])
    assert {shown.dtype for shown in train[:-of_test]} == {torch.bfloat16}
    assert {shown.dtype for shown in train[-of_test:]} == {torch.float32}  # as evaluate.py scores
    assert {shown.dtype for shown in resized.shown["evaluate"]} == {torch.float32}
    assert {shown.dtype for shown in resized.shown["predict"]} == {torch.float32}
    assert resized.report("val1/val_metrics.json")["precision"] == "bf16-mixed"


# Memory


class Plain:
    """Black images of 128 x 128 pixels."""

    labels = Labels(tuple(CLASSES))

    def __init__(self, split: str, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image = torch.zeros(3, 128, 128, dtype=torch.uint8)
        return tv_tensors.Image(image), tv_tensors.Mask(image[0])


class Weighed(Threshold):
    """Notes the memory of this process at each image."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        MEGABYTES.append(pages * resource.getpagesize() / 2**20)
        out = super().forward(x)
        SHOWN.clear()
        return out


MEGABYTES: list[float] = []


def memory_by_image(folder: Path) -> None:
    """Scores 1,000 images by evaluate.py and prints the megabytes at the 10th and the last."""
    network = Network(Weighed(3))
    data = {
        "_target_": "seg_torch.data.SegmentationDataModule",
        "dataset": {"_target_": f"{__name__}.Plain", "_partial_": True, "length": 1000},
    }
    model = {"_target_": f"{__name__}.Weighed"}
    content = {
        "state_dict": {f"network.{key}": value for key, value in network.state_dict().items()},
        checkpoint.KEY: checkpoint.describe(network, Plain.labels, model, data, None),
    }
    torch.save(content, folder / "plain.ckpt")
    assert run_command(f"evaluate checkpoint=plain.ckpt output_dir=run {TRUST}", folder) == 0
    print("memory", len(MEGABYTES), MEGABYTES[9], MEGABYTES[-1])


@pytest.mark.promise(15)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_the_same_at_the_thousandth_image_as_at_the_tenth(tmp_path):
    """Their masks alone would be 16 MB, their images 47 MB, their logits 188 MB."""
    output = output_in_new_process(memory_by_image, tmp_path)
    count, tenth, last = map(float, output.split("memory ")[1].split())
    assert count == 1000
    assert last - tenth < 8

"""Photographs of many sizes and both shapes, reduced to a longest side, through every command."""

import json
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_command
from make_data import blocks, picture, save
from PIL import Image
from torch import Tensor, nn

from seg_torch import Segmenter
from seg_torch.checkpoints import checkpoint, exported

LONGEST = 48
CLASSES = ("one", "two", "three")
# Height and width: landscape, portrait, smaller, square, of one long side.
SIZES = [(60, 90), (90, 60), (36, 40), (64, 64), (50, 160)]
SPLITS = {"train": 6, "val": 5, "test": 5}
SEEN: list[tuple[bool, tuple[int, ...]]] = []  # whether in training, and the shape of the batch


class Tiny(nn.Module):
    """Logits at a quarter of the size, which depend on where in the image a pixel is."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 5, stride=4, padding=2)
        self.classifier = nn.Conv2d(8, num_classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta and isinstance(x.shape[-1], int):
            SEEN.append((self.training, tuple(x.shape)))
        return self.classifier(self.convolution(x).relu())


def reduced(height: int, width: int) -> tuple[int, int]:
    """The size at which an image is seen: a half is rounded up, and 32 pixels are kept."""
    factor = min(Fraction(1), Fraction(LONGEST, max(height, width)))
    rounded = [floor(side * factor + Fraction(1, 2)) for side in (height, width)]
    return max(rounded[0], min(height, 32)), max(rounded[1], min(width, 32))


TRUST = f"trust=[{__name__}] trainer.accelerator=cpu"
TRAIN = (
    "train --config-dir=mine model=own data=folder data.root=data data.max_side=48 "
    "data.augment.crop=[40,40] data.batch_size=3 data.num_workers=0 scheduler=none "
    "trainer.accelerator=cpu trainer.precision=32 logger=none recipe=null"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs at once in `run`, one after the other in `again`, and the shapes of `run`."""
    home = tmp_path_factory.mktemp("max_side")
    for split, count in SPLITS.items():
        names = [f"{split}_{index}" for index in range(count)]
        for index, name in enumerate(names):
            height, width = SIZES[index % len(SIZES)]
            save(picture(index, height, width), home / f"data/images/{name}.png")
            mask = blocks(index, [0, 1, 2], 255, height, width)
            save(mask, home / f"data/masks/{name}.png")
        (home / f"data/{split}.txt").write_text("\n".join(names))
    (home / "data/classes.txt").write_text("\n".join(CLASSES))
    (home / "mine/model").mkdir(parents=True)
    (home / "mine/model/own.yaml").write_text(f"_target_: {__name__}.Tiny\n")
    assert run_command(f"{TRAIN} output_dir=run trainer.max_epochs=2", home) == 0
    (home / "seen.json").write_text(json.dumps(SEEN))
    assert run_command(f"{TRAIN} output_dir=again trainer.max_epochs=1", home) == 0
    assert run_command("train resume=again trainer.max_epochs=2", home) == 0
    return home


def test_training_pads_to_its_crop_and_scoring_sees_whole_reduced_images(home):
    shapes = json.loads((home / "seen.json").read_text())
    seen = [(training, tuple(shape)) for training, shape in shapes]
    assert {shape for training, shape in seen if training} == {(3, 3, 40, 40)}
    scored = {shape[-2:] for training, shape in seen if not training}
    assert {reduced(*size) for size in SIZES} <= scored
    assert reduced(60, 90) == (32, 48)
    assert reduced(36, 40) == (36, 40)


def test_a_resumed_run_ends_as_an_undisturbed_one(home):
    files = [home / name / "checkpoints/last.ckpt" for name in ("run", "again")]
    whole, again = map(checkpoint.read, files)
    assert whole["seg_torch"]["preprocessing"]["resize"] == LONGEST
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, again["state_dict"][key])


def expected_mask(home: Path, name: str) -> np.ndarray:
    """From the weights alone, by Pillow's resizing."""
    content = torch.load(home / "run/checkpoints/best.ckpt", weights_only=True)
    state, prefix = content["state_dict"], "network.model."
    model = Tiny(len(CLASSES))
    model.load_state_dict({k.removeprefix(prefix): state[k] for k in state if prefix in k})
    image = Image.open(home / f"data/images/{name}.png")
    size = image.height, image.width
    small = np.array(image.resize(reduced(*size)[::-1], Image.Resampling.BILINEAR))
    mean, std = (torch.tensor(content["seg_torch"]["preprocessing"][k]) for k in ("mean", "std"))
    x = ((torch.from_numpy(small) / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = F.interpolate(model(x), size, mode="bilinear", align_corners=False)
    return logits.argmax(1)[0].numpy()


@pytest.fixture(scope="module")
def masks(home: Path) -> dict[str, np.ndarray]:
    """What predict writes of the test images."""
    line = f"predict checkpoint=run input=data/images output=masks trainer.precision=32 {TRUST}"
    assert run_command(line, home) == 0
    names = [f"test_{index}" for index in range(SPLITS["test"])]
    return {name: np.array(Image.open(home / f"masks/mask/{name}.png")) for name in names}


def test_predicted_masks_are_those_of_the_reduced_image_at_the_size_of_the_photograph(home, masks):
    for name, mask in masks.items():
        expected = expected_mask(home, name)
        assert len(np.unique(expected)) > 1
        assert mask.shape == expected.shape
        assert (mask == expected).mean() > 0.995, name  # Pillow rounds differently


@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_equals_the_masks_of_prediction(home, masks, batch_size):
    line = f"evaluate checkpoint=run output_dir=e{batch_size} data.eval_batch_size={batch_size} "
    assert run_command(f"{line} +data.max_side=48 {TRUST}", home) == 0
    matrix = np.zeros((3, 3), np.int64)
    for name, mask in masks.items():
        label = np.array(Image.open(home / f"data/masks/{name}.png"))
        np.add.at(matrix, (label[label != 255], mask[label != 255]), 1)
    scores = json.loads((home / f"e{batch_size}/test_metrics.json").read_text())
    assert scores["confusion_matrix"] == matrix.tolist()
    assert scores == json.loads((home / "run/test_metrics.json").read_text())


def test_it_is_not_evaluated_at_another_size(home, capsys):
    for settings, message in (
        ("+data.resize=[48,48]", "data.resize=[48, 48]: the network sees images as it did in "),
        ("+data.max_side=64", "in training, with no side longer than 48 pixels; a checkpoint is"),
        ("tile=64", "sees every image with no side longer than 48 pixels, as in training"),
    ):
        assert run_command(f"evaluate checkpoint=run output_dir=e {settings} {TRUST}", home) == 2
        assert message in capsys.readouterr().err


def test_an_exported_graph_reduces_images_itself(home, masks, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    onnx = home / "a.onnx"
    line = f"export checkpoint=run output={onnx.name} trust=[{__name__}]"
    assert run_command(line, home) == 0
    printed = capsys.readouterr().out
    assert "112 x 80" in printed, "it is compared on an image that is larger, too"
    run, about = exported.open_exported(onnx)
    assert about["preprocessing"]["resize"] == LONGEST
    segmenter = Segmenter.load(onnx, device="cpu")
    for name, mask in masks.items():
        image = np.array(Image.open(home / f"data/images/{name}.png"))
        (classes,) = run(torch.from_numpy(image).permute(2, 0, 1)[None].contiguous(), ["classes"])
        assert classes.shape == (1, *mask.shape)
        assert (classes[0].numpy() == mask).mean() > 0.995, name  # integers round differently
        assert (segmenter.predict(image).mask == mask).mean() > 0.999, name

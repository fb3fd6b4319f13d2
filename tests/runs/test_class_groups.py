"""`data.classes` through a training, and through what is done with its checkpoint."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_TRAINER, SMALL_UNET, run_command
from make_data import picture
from PIL import Image

from seg_torch.checkpoints import checkpoint
from seg_torch.datasets import write_folder
from seg_torch.labels import Labels

NAMES = ("sky", "car", "truck", "road", "tree")
GROUPS = "{_Straße 1.a: [road, tree], vehicle: [CAR, truck]}"
IDS = [0, 2, 2, 1, 1]  # of NAMES in the new classes
NEW = ["background", "_Straße 1.a", "vehicle"]
ALL = ("trainer.accelerator=cpu", "data.num_workers=0")


def samples(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(3):
        image = np.array(picture(int(rng.integers(1000)), 32, 32)).transpose(2, 0, 1)
        mask = rng.choice(np.array([0, 1, 1, 2, 3, 3, 4, 255], np.uint8), (4, 4)).repeat(8, 0)
        found.append((torch.from_numpy(image.copy()), torch.from_numpy(mask.repeat(8, 1))))
    return found


def scores(start: Path) -> dict:
    return json.loads(Path(f"{start}_metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with `data`, the same data with `other` names, and a run of two epochs."""
    home = tmp_path_factory.mktemp("home")
    for folder, names in (("data", NAMES), ("other", ("Sky", "Vehicle", "TRUCK", "lane", "Tree"))):
        for split, seed in (("train", 0), ("val", 1)):
            write_folder(samples(seed), Labels(names), home / folder / split)
            (home / folder / split / "classes.txt").rename(home / folder / "classes.txt")
    line = ["train", "recipe=null", "data=folder", "data.root=data", f"data.classes={GROUPS}", *ALL]
    line += ["data.rest=background", "data.augment=null", "output_dir=run", "loss=weighted_ce"]
    line += [*SMALL_TRAINER, *SMALL_UNET, "model.weights=null", "data.batch_size=2"]
    assert run_command([*line, "trainer.max_epochs=1"], home) == 0
    assert run_command("train resume=run data.classes={a:[car]}", home) == 2
    assert run_command("train resume=run trainer.max_epochs=2", home) == 0
    return home


def test_a_run_and_its_checkpoint_have_the_new_names(trained):
    config = (trained / "run/config.yaml").read_text(encoding="utf-8")
    assert "  classes:\n    _Straße 1.a:\n    - road\n    - tree\n    vehicle:\n" in config
    assert "  rest: background\n" in config
    content = checkpoint.read(trained / "run/checkpoints/last.ckpt")
    assert content["epoch"] == 1
    assert content[checkpoint.KEY]["labels"]["names"] == NEW
    assert list(content[checkpoint.KEY]["data"]["classes"]) == NEW[1:]
    assert list(scores(trained / "run/test")["per_class"]) == NEW


def test_the_confusion_matrix_is_the_grouped_one_of_the_masks_that_predict_writes(trained):
    """A row for each class of the files, added up by NumPy."""
    line = "predict data/val/images checkpoint=run output=masks save=[dataset]"
    line += " trainer.accelerator=cpu trainer.precision=32-true"  # as evaluate has it
    assert run_command(line, trained) == 0
    matrix = np.zeros((5, 3), int)
    for path in sorted((trained / "data/val/masks").iterdir()):
        label = np.array(Image.open(path)).ravel()
        predicted = trained / "masks/dataset/masks" / path.name
        pairs = label[label != 255], np.array(Image.open(predicted)).ravel()[label != 255]
        np.add.at(matrix, pairs, 1)
    grouped = np.zeros((3, 3), int)
    np.add.at(grouped, IDS, matrix)
    assert run_command(["evaluate", "run", *ALL, "output_dir=own_scores"], trained) == 0
    for place in ("run", "own_scores"):
        assert scores(trained / place / "test")["confusion_matrix"] == grouped.tolist()
    assert len(np.unique(matrix.nonzero()[1])) > 1
    lines = (trained / "masks/dataset/classes.txt").read_text(encoding="utf-8").splitlines()
    assert [line.rsplit(" ", 3)[0] for line in lines] == NEW


def test_on_data_with_other_names_the_message_has_the_line_to_type(trained, capsys):
    line = ["evaluate", "run", "data=folder", "data.root=other", "split=val", *ALL]
    assert run_command([*line, "output_dir=none"], trained) == 2
    message = capsys.readouterr().err
    settings = shlex.split(re.search(r"\n  (.*)", message)[1])
    assert settings == [
        'data.classes={background:[],"_Straße 1.a":[Tree],vehicle:[Vehicle,TRUCK]}',
        "data.rest=background",
    ]
    assert run_command([*line, *settings, "output_dir=other_scores"], trained) == 0
    masks = np.stack([mask.numpy() for _, mask in samples(1)])
    ids = np.array([0, 2, 2, 0, 1])[masks[masks != 255]]  # what was a road is a lane: background
    matrix = np.array(scores(trained / "other_scores/val")["confusion_matrix"])
    assert matrix.sum(1).tolist() == np.bincount(ids).tolist()


def test_without_a_name_in_common_it_says_that_the_classes_can_be_named(trained, capsys):
    shutil.copytree(trained / "other", trained / "third")
    (trained / "third/classes.txt").write_text("a\nb\nc\nd\ne\n")
    line = ["evaluate", "run", "data=folder", "data.root=third", *ALL, "output_dir=none"]
    assert run_command(line, trained) == 2
    assert "; data.classes='{NEW: [OLD, OLD]}' says which" in capsys.readouterr().err

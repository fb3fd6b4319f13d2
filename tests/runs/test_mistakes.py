"""Files with mistakes in them, and what the command that meets them says."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from make_data import make_camvid
from PIL import Image


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder dataset of eight pairs."""
    folder = tmp_path / "photos"
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (40, 40), (30 * i, 0, 0)).save(folder / f"images/{i}.png")
        Image.fromarray(np.full((40, 40), i % 2, np.uint8)).save(folder / f"masks/{i}.png")
    (folder / "classes.txt").write_text("background\nobject\n")
    return folder


def test_a_text_file_is_no_checkpoint(command, tmp_path):
    (tmp_path / "notes.ckpt").write_text("to do")
    code, message = command("evaluate checkpoint=notes.ckpt")
    assert code == 2
    assert "notes.ckpt: not a checkpoint" in message


def test_a_checkpoint_of_another_program_is_named_as_such(command, tmp_path):
    import torch

    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    code, message = command("evaluate checkpoint=other.ckpt")
    assert code == 2
    assert "checkpoint=other.ckpt: " in message
    assert "not a checkpoint of seg_torch; expected one that train.py wrote" in message


WRONG_MASKS = {  # how the mask i of 0 and 1 is stored, and what the message has to say
    "off by one": (lambda mask: mask + 1, r"masks/\d\.png: mask values \[2\]; allowed are 0 to 1"),
    "one of eight": (
        lambda mask, i: np.full_like(mask, 7) if i == 3 else mask,
        r"masks/3\.png: mask values \[7\]; allowed are 0 to 1",
    ),
    "0 and 255": (lambda mask: 255 * mask, "only 0 and 255.*background 0 0 0\nobject 255 255 255"),
    "colours": (
        lambda mask: np.stack([200 * mask, mask, mask], 2),
        r"masks/\d\.png.*a mask of colours.*name R G B",
    ),
    "colours that no class has": (
        lambda mask: np.stack([200 * mask, mask, mask], 2),
        r"masks/\d\.png: colour \(200, 1, 1\)",
    ),
}


@pytest.mark.promise(1)
@pytest.mark.parametrize("kind", WRONG_MASKS)
def test_masks_that_are_no_class_ids_are_refused_before_training(command, photos, tmp_path, kind):
    store, message = WRONG_MASKS[kind]
    for i in range(8):
        mask = np.full((40, 40), i % 2, np.uint8)
        wrong = store(mask, i) if kind == "one of eight" else store(mask)
        Image.fromarray(wrong).save(photos / f"masks/{i}.png")
    if kind == "colours that no class has":
        (photos / "classes.txt").write_text("background 0 0 0\nobject 200 0 0\n")
    line = f"train data=folder data.root={photos} model=unet_random output_dir=run"
    code, printed = command(line)
    assert code == 2
    assert re.search(message, printed, re.DOTALL), printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists(), "training has begun"


@pytest.mark.promise(8)
def test_an_image_too_many_for_the_last_batch_trains_and_batches_of_one_are_refused(
    command, photos, tmp_path
):
    """DeepLabv3 normalises pooled features, which one image alone does not have."""
    (photos / "train.txt").write_text("0\n1\n2\n3\n4\n")
    (photos / "val.txt").write_text("5\n6\n7\n")
    line = (
        f"train data=folder data.root={photos} model=deeplabv3 model.weights=null "
        "model.backbone=mobilenet_v3_large data.augment.crop=[32,32] data.num_workers=0 "
        "trainer.max_epochs=1 trainer.accelerator=cpu"
    )
    assert command(f"{line} output_dir=four data.batch_size=4") == (0, "")
    assert (tmp_path / "four/metrics.csv").read_text().splitlines()[1].startswith("1,1,")
    code, message = command(f"{line} output_dir=one data.batch_size=1")
    assert code == 2
    assert "data.batch_size=2" in message
    assert not (tmp_path / "one/metrics.csv").exists()


@pytest.mark.promise(17)
def test_two_classes_train_and_predict_by_default_and_one_channel_is_refused(
    command, photos, tmp_path
):
    line = (
        f"train data=folder data.root={photos} model=unet_random data.augment.crop=[32,32] "
        "data.num_workers=0 trainer.max_epochs=1 trainer.accelerator=cpu "
        "model.encoder=mobilenetv3_small_050 model.decoder_channels=[8,8,8,8,8]"
    )
    assert command(f"{line} output_dir=two")[0] == 0
    assert command("predict checkpoint=two input=photos/images output=out save=[mask]")[0] == 0
    masks = [np.array(Image.open(path)) for path in (tmp_path / "out/mask").iterdir()]
    assert len(masks) == 8
    assert np.unique(masks).max() <= 1
    report = json.loads((tmp_path / "two/test_metrics.json").read_text())
    assert list(report["per_class"]) == ["background", "object"]

    for path in (photos / "masks").iterdir():
        Image.new("L", (40, 40)).save(path)
    (photos / "classes.txt").write_text("object\n")
    code, message = command(f"{line} output_dir=one")
    assert code == 2
    assert "num_classes=2" in message
    assert not (tmp_path / "one/metrics.csv").exists()


@pytest.mark.promise(21)
def test_a_mask_of_another_size_than_its_image_is_refused(command, photos):
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(photos / "masks/3.png")
    code, message = command(f"train data=folder data.root={photos} model.weights=null")
    assert code == 2
    assert "3.png" in message
    assert "40 x 30" in message


def test_an_empty_folder_is_refused(command, tmp_path):
    (tmp_path / "bare").mkdir()
    for line, reason in (
        ("train data=folder data.root=bare", "bare.*is empty"),
        ("predict input=bare output=out", "input=bare: no images below this folder"),
    ):
        code, message = command(line)
        assert code == 2
        assert re.search(reason, message), message


def test_an_error_in_a_worker_process_keeps_its_short_message(command, tmp_path):
    make_camvid(tmp_path / "camvid")
    mask = sorted((tmp_path / "camvid/valannot").iterdir())[0]
    Image.fromarray(np.full((48, 64), 77, np.uint8)).save(mask)
    code, message = command(
        "train data=camvid data.root=camvid data.num_workers=1 data.check=false "
        "model=unet_random data.augment.crop=[32,32] trainer.accelerator=cpu"
    )
    assert code == 2
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    assert mask.name in message
    assert "Traceback" not in message


def test_an_output_folder_that_cannot_be_written_is_refused(command, tmp_path):
    (tmp_path / "file").touch()
    small = "data.dataset.size=32 data.num_workers=0 trainer.accelerator=cpu"
    code, message = command(f"train output_dir=file/run {small}")
    assert code == 2
    assert "file/run" in message

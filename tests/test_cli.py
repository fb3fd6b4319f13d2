"""The command line: what a mistake is answered with, and what the other processes are told."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from make_data import make_camvid
from PIL import Image

from seg_torch.cli import entry_point
from seg_torch.commands.predict import predict
from seg_torch.trainer import evaluate, train

ROOT = Path(__file__).parents[1]
FUNCTIONS = {"train": train, "evaluate": evaluate, "predict": predict}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command("train data=voc ...")` runs it here and returns (exit code, standard error)."""

    def command(line: str) -> tuple[int | str | None, str]:
        name, *arguments = line.split()
        GlobalHydra.instance().clear()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(ROOT / f"{name}.py"), *arguments])
        code: int | str | None = 0
        try:
            entry_point(FUNCTIONS[name], name)
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return command


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


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train data.batchsize=4", "no setting data.batchsize; did you mean data.batch_size"),
        ("train modle=unet", "no setting modle; did you mean model"),
        ("train model=unett", "no model=unett; did you mean unet"),
        ("train model.encoder=resnet3", "did you mean resnet"),
        ("train optimizer.lr=fast", "optimizer.lr=fast: expected a number"),
        ("train trainer.deterministic=ye", "trainer.deterministic=ye: expected true or false"),
        ("train trainer.precision=bf17", "trainer: Precision 'bf17' is invalid"),
        ("train data.batch_size=0", "data.batch_size=0: expected at least 1"),
        ("train data.batch_size=[", "data.batch_size=["),
        ("train data=folder", "data.root must be given"),
        ("train data=folder data.root=nowhere", "nowhere"),
        ("train data=voc data.root=nowhere", "data.download=true"),
        ("train loss=weighted_ce loss.weights=datset", "loss.weights"),
        ("train checkpoint=nothing.ckpt", "checkpoint=nothing.ckpt: no such file"),
        ("evaluate", "needs checkpoint=FILE"),
        ("evaluate checkpoint=nothing.ckpt", "checkpoint=nothing.ckpt: no such file"),
        ("evaluate checkpoint=nothing.ckpt split=vall", "split=vall: expected train, val or test"),
        ("predict input=nothing output=out model.weights=null", "input=nothing: no such file"),
        ("predict", "needs input=FILE-OR-FOLDER and output=FOLDER"),
    ],
)
def test_a_mistake_is_answered_in_a_few_lines(command, line, expected, tmp_path):
    code, message = command(line)
    assert code == 2
    assert expected in message
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 6
    assert not list(tmp_path.glob("runs/*")), "a run that never started leaves nothing behind"


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
    assert "other.ckpt: not a checkpoint of seg_torch" in message


def test_a_mask_with_a_value_outside_the_classes_is_refused(command, photos):
    Image.fromarray(np.full((40, 40), 7, np.uint8)).save(photos / "masks/3.png")
    code, message = command(f"train data=folder data.root={photos} model.weights=null")
    assert code == 2
    assert "3.png" in message
    assert "7" in message
    assert "0 to 1" in message


def test_a_mask_of_another_size_than_its_image_is_refused(command, photos):
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(photos / "masks/3.png")
    code, message = command(f"train data=folder data.root={photos} model.weights=null")
    assert code == 2
    assert "3.png" in message
    assert "40 x 30" in message


def test_an_empty_folder_is_refused(command, tmp_path):
    (tmp_path / "empty").mkdir()
    for line in ("train data=folder data.root=empty", "predict input=empty output=out"):
        code, message = command(line)
        assert code == 2
        assert "empty" in message


def test_an_error_in_a_worker_process_keeps_its_short_message(command, tmp_path):
    make_camvid(tmp_path / "camvid")
    mask = sorted((tmp_path / "camvid/valannot").iterdir())[0]
    Image.fromarray(np.full((48, 64), 77, np.uint8)).save(mask)
    code, message = command(
        "train data=camvid data.root=camvid data.num_workers=1 model=unet_random "
        "data.augment.crop=[32,32] trainer.accelerator=cpu"
    )
    assert code == 2
    assert mask.name in message
    assert "Traceback" not in message


def test_an_output_folder_that_cannot_be_written_is_refused(command, tmp_path):
    (tmp_path / "file").touch()
    small = "data.dataset.size=32 data.num_workers=0 trainer.accelerator=cpu"
    code, message = command(f"train output_dir=file/run {small}")
    assert code == 2
    assert "file/run" in message


def test_two_jobs_on_two_processes_make_one_sweep_with_one_folder_each(command, tmp_path):
    """Each process would start the sweep again if it were told the sweep's command line."""
    line = (
        "-m loss=ce,dice output_dir=sweep data.dataset.size=32 data.dataset.train=8 "
        "data.dataset.val=5 data.dataset.test=5 data.batch_size=2 data.num_workers=0 "
        "trainer.max_epochs=1 trainer.accelerator=cpu trainer.devices=2 trainer.precision=32"
    )
    subprocess.run(
        [sys.executable, ROOT / "train.py", *line.split()],
        cwd=tmp_path,
        check=True,
        timeout=300,
        capture_output=True,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sweep"]
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir() if p.is_dir()) == ["0", "1"]

    # Five images on two processes give the same counts as on one.
    for job in ("0", "1"):
        folder = tmp_path / "sweep" / job
        best = folder / "checkpoints/best.ckpt"
        code, _ = command(
            f"evaluate checkpoint={best} output_dir=alone{job} data.num_workers=0 "
            "trainer.accelerator=cpu trainer.devices=1 trainer.precision=32"
        )
        assert code == 0
        alone = json.loads((tmp_path / f"alone{job}/test_metrics.json").read_text())
        together = json.loads((folder / "test_metrics.json").read_text())
        assert alone == together

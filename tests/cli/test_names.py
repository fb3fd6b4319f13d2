"""Names that other programs have for settings, and folders where a choice is expected."""

import os

import pytest

from seg_torch.cli.names import nearest
from seg_torch.cli.overrides import complete_overrides


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train epochs=50", "write trainer.max_epochs=50"),
        ("train --epochs 50", "settings are given as trainer.max_epochs=value"),
        ("train batch=4", "write data.batch_size=4"),
        ("train batch_size=4", "data.batch_size"),
        ("evaluate run batch=4", "write data.eval_batch_size=4"),
        ("predict photo.jpg batch=4", "write batch_size=4"),
        ("train imgsz=640", "write data.max_side=640 for whole images of that size, or data"),
        ("train imgsz=[480,640]", "write data.resize=[480,640] for whole images of that size"),
        ("train lr=0.01", "write optimizer.lr=0.01"),
        ("train lr0=0.01", "write optimizer.lr=0.01"),
        ("train device=cpu", "write trainer.accelerator=cpu"),
        ("train device=cuda", "write trainer.accelerator=gpu"),
        ("train device=0", "write trainer.devices=[0]"),
        ("train device=0,1", "write trainer.devices=[0,1]"),
        ("evaluate run device=cuda:1", "write trainer.devices=[1]"),
        ("train workers=8", "write data.num_workers=8"),
        ("train classes=3", "no setting classes; the classes are those of the data"),
        ("train resume=true", "say which run goes on: resume=runs/new"),
        ("train runs/old", "runs/old is a run: resume=runs/old goes on with it"),
        ("predict source=photo.jpg", "write input=photo.jpg"),
        ("predict model=best.ckpt input=photo.jpg", "a file of weights is checkpoint=best.ckpt"),
        ("train encoder=resnet50", "write model.encoder=resnet50"),
        ("train data.batchsize=1", "did you mean data.batch_size or data.eval_batch_size?"),
        ("train data=vocc", "no data=vocc, and no folder of that name; did you mean voc"),
        ("train data.augment.rotate=1", "no setting data.augment.rotate"),
        ("predict a.jpg b.jpg", "predict is about one file or folder with all that is below it"),
        ("evaluate run checkpoint=run", "run and checkpoint= are two; give one of them"),
        ("export -m run", "export runs once"),
    ],
)
def test_e51_what_people_type_first_is_answered_with_the_exact_setting(
    command, tmp_path, line, expected
):
    for i, name in enumerate(("new", "old")):
        (tmp_path / f"runs/{name}/checkpoints").mkdir(parents=True)
        (tmp_path / f"runs/{name}/checkpoints/last.ckpt").touch()
        os.utime(tmp_path / f"runs/{name}/checkpoints/last.ckpt", (9 - i, 9 - i))
    (tmp_path / "run").mkdir()
    for name in ("best.ckpt", "photo.jpg"):
        (tmp_path / name).touch()
    code, message = command(line)
    assert code == 2
    assert expected in message
    assert "adds it" not in message, "for functions that do not take it"


def test_e51_a_folder_is_data_of_whichever_format_it_is_in(command, stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "shapes"):  # the second is the name of a choice, too
        (tmp_path / name).mkdir()
    auto = ["data=auto", "data.root='photos'"]
    for line, expected in (
        ("photos", auto),
        ("data=photos", auto),
        ("data.root=photos", auto),
        ("data=auto data.root=photos", auto),
        ("photos model=deeplabv3", [*auto, "model=deeplabv3"]),
        ("data=./photos", ["data=auto", "data.root='./photos'"]),
        ("photos data=folder", ["data.root='photos'", "data=folder"]),
        ("experiment=voc data.root=photos", ["experiment=voc", "data.root='photos'"]),
        ("data=shapes", ["data=shapes"]),
        ("data=./shapes", ["data=auto", "data.root='./shapes'"]),
        ("voc", ["data=voc"]),
    ):
        assert complete_overrides("train", line.split()) == expected, line
    seen = []
    stub(seen.append)
    assert command("train photos data.dataset.val_fraction=0.3") == (0, "")
    assert seen[-1].data.dataset._target_ == "seg_torch.datasets.auto"
    assert seen[-1].data.dataset.val_fraction == 0.3
    for line in ("train nowhere", "train data=./nowhere", "inspect nowhere"):
        code, message = command(line)
        assert code == 2
        assert "nowhere: no such file or folder" in message


def test_e51_the_nearest_name_is_like_it_in_its_last_part():
    names = ["data.rgb", "data.resize", "optimizer.lr", "data", "model.encoder"]
    assert nearest("data.root", names) == []
    assert nearest("data.resise", names) == ["data.resize"]
    assert nearest("encodr", names) == ["model.encoder"]


@pytest.mark.parametrize(
    ("line", "adds"),
    [
        ("optimizer.amsgrad=true", "if torch.optim.AdamW takes it"),
        ("trainer.barebones=true", "if Lightning's Trainer takes it"),
        ("data=auto data.root=. data.dataset.background=x", "if seg_torch.datasets.auto takes it"),
        ("model.depth=4", None),
        ("data.augment.vflip=0.5", None),
        ("preprocessing.gamma=1", None),
        ("seeed=1", None),
    ],
)
def test_e51_a_plus_is_proposed_only_where_a_function_may_take_more(command, line, adds):
    code, message = command(f"train {line}")
    assert code == 2
    assert ("adds it" in message) == (adds is not None)
    assert (adds or "no setting") in message

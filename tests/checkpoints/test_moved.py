"""Names that configurations and checkpoints of earlier versions hold."""

import json
from pathlib import Path

import hydra
import pytest
import torch

from seg_torch.checkpoints import exported
from seg_torch.checkpoints.checkpoint import KEY
from seg_torch.checkpoints.moved import with_current_names

# All that conf/ of 204dd53 names, the last version before modules moved; a run's config.yaml and a
# checkpoint may hold any of them.
NAMES = {
    "seg_torch.datamodule": ["SegmentationDataModule"],
    "seg_torch.datasets": [
        "ade20k",
        "auto",
        "camvid",
        "camvid32",
        "cityscapes",
        "clothing",
        "coco",
        "coco_panoptic",
        "coco_stuff",
        "cvat",
        "eightfold",
        "folder",
        "hf",
        "label_studio",
        "labelme",
        "labelme_voc",
        "pet",
        "roboflow",
        "shapes",
        "voc",
        "voc_sbd",
        "yolo",
    ],
    "seg_torch.hub": ["hub"],
    "seg_torch.losses": [
        "BoundaryLoss",
        "CrossEntropyLoss",
        "DiceLoss",
        "FocalLoss",
        "LovaszSoftmaxLoss",
        "OhemCrossEntropyLoss",
        "OwnLoss",
        "TverskyLoss",
        "WeightedSum",
    ],
    "seg_torch.models": [
        "deeplabv3",
        "fcn",
        "hrnet",
        "lraspp",
        "smp",
        "transformers",
        "unet",
        "unet_transposed",
        "vit",
    ],
    "seg_torch.schedulers": ["cosine", "one_cycle", "poly"],
    "seg_torch.transforms": ["augment"],
}


@pytest.mark.parametrize("name", [f"{m}.{name}" for m, names in NAMES.items() for name in names])
def test_what_a_configuration_of_an_earlier_version_names_is_there(name):
    target = with_current_names({"_target_": name})["_target_"]
    assert callable(hydra.utils.get_object(target))
    assert with_current_names({"_target_": target}) == {"_target_": target}


def test_names_are_replaced_at_every_depth_and_nothing_else_is():
    config = {
        "data": {
            "_target_": "seg_torch.datamodule.SegmentationDataModule",
            "root": "${oc.env:HOME}",
        },
        "callbacks": [
            {"_target_": "seg_torch.callbacks.History", "folder": "seg_torch.callbacks.x"}
        ],
        "mine": {"_target_": "seg_torch.datamodule_of_mine.Data", "mean": None, "crop": [1, 2.5]},
    }
    renamed = with_current_names(config)
    assert renamed["data"]["_target_"] == "seg_torch.data.SegmentationDataModule"
    assert renamed["data"]["root"] == config["data"]["root"]
    [callback] = renamed["callbacks"]
    assert callback["_target_"] == "seg_torch.training.callbacks.History"
    assert callback["folder"] == "seg_torch.callbacks.x"
    assert renamed["mine"] == config["mine"]
    assert config["data"]["_target_"].startswith("seg_torch.datamodule")


def test_a_users_own_file_may_still_have_the_old_names(command, stub, tmp_path):
    seen = []
    stub(seen.append)
    (tmp_path / "mine/scheduler").mkdir(parents=True)
    (tmp_path / "mine/scheduler/own.yaml").write_text(
        "_target_: seg_torch.schedulers.poly\n_partial_: true\npower: 2.0\n"
    )
    line = "train --config-dir mine scheduler=own"
    assert command(line) == (0, "")
    assert seen[-1].scheduler._target_ == "seg_torch.training.schedulers.poly"
    code, message = command(f"{line} scheduler.power=steep")
    assert code == 2
    assert "scheduler.power=steep: expected a number, such as 2.0" in message


def test_the_description_of_an_exported_network_has_the_names_of_today(tmp_path, monkeypatch):
    path = Path(__file__).parents[1] / "support/old_run/run/checkpoints/best.ckpt"
    before = torch.load(path, weights_only=True)[KEY]
    assert before["data"]["_target_"] == "seg_torch.datamodule.SegmentationDataModule"
    onnx = exported.FORMATS["onnx"]._replace(open=lambda path: (None, json.dumps(before)))
    monkeypatch.setitem(exported.FORMATS, "onnx", onnx)
    (tmp_path / "old.onnx").touch()
    _, description = exported.open_exported(tmp_path / "old.onnx")
    assert description["data"]["_target_"] == "seg_torch.data.SegmentationDataModule"
    assert description["labels"] == before["labels"]

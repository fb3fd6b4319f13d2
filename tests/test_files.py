"""What is left of files when the power goes, and when somebody reads what is to be replaced."""

import json
import os
import sys
from pathlib import Path

import hydra
import pytest
from conftest import SMALL_DATA, SMALL_TRAINER, SMALL_UNET
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from predictions import random_checkpoint

from seg_torch import Segmenter, files
from seg_torch.checkpoints import checkpoint
from seg_torch.cli.overrides import complete_overrides
from seg_torch.commands.predict import predict
from seg_torch.commands.train import train
from seg_torch.datasets import shapes, write_folder
from seg_torch.files import write_atomically, write_text
from seg_torch.training.run import COLUMNS, read_table, resumed_config
from seg_torch.training.task import SegmentationTask


class Disk:
    """A disk that keeps the content of those files alone that were waited for, as XFS may do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: set[int] = set()
        sync = os.fsync

        def fsync(file: int) -> None:
            sync(file)
            self.kept.add(os.fstat(file).st_ino)

        monkeypatch.setattr(os, "fsync", fsync)

    def lose_power(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_ino not in self.kept:
                os.truncate(path, 0)


@pytest.fixture(scope="module")
def after_power_cut(tmp_path_factory) -> Path:
    """The folder of a run of one epoch that had just ended when the power went."""
    folder = tmp_path_factory.mktemp("power") / "run"
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        train(compose_small(folder))
    disk.lose_power(folder)
    return folder


def compose_small(folder: Path) -> DictConfig:
    line = [*SMALL_DATA, *SMALL_TRAINER, *SMALL_UNET, f"output_dir={folder}", "logger=none"]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(files.CONFIG_FOLDER), version_base="1.3"):
        return hydra.compose("train", complete_overrides("train", [*line, "trainer.max_epochs=1"]))


def test_e28_after_a_power_cut_a_run_has_its_checkpoints_table_and_scores(after_power_cut):
    for name in ("best", "last"):
        content = checkpoint.read(after_power_cut / f"checkpoints/{name}.ckpt")
        assert content["global_step"] == 3
    assert len(read_table(after_power_cut / "metrics.csv", COLUMNS)) == 1
    assert json.loads((after_power_cut / "test_metrics.json").read_text())["per_class"]
    assert not (after_power_cut / "curves.png").stat().st_size, "the disk lost nothing"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_e29_a_run_that_goes_on_keeps_no_checkpoint_open(after_power_cut, monkeypatch):
    """Windows replaces no file that is mapped into memory or open."""
    used, begin = [], SegmentationTask.on_train_start

    def on_train_start(task):
        begin(task)
        used.append(files_in_use())

    monkeypatch.setattr(SegmentationTask, "on_train_start", on_train_start)
    cfg = OmegaConf.create({"resume": str(after_power_cut), "trainer": {"max_epochs": 2}})
    train(resumed_config(cfg, ["trainer.max_epochs=2"]))
    assert len(read_table(after_power_cut / "metrics.csv", COLUMNS)) == 2
    segmenter = Segmenter.load(after_power_cut)
    assert not [name for name in used[0] + files_in_use() if name.endswith(".ckpt")]
    assert segmenter.labels == shapes("val").labels


def files_in_use() -> list[str]:
    """The names of all files that this process has open or mapped into its memory."""
    mapped = [line.rpartition("  ")[2] for line in Path("/proc/self/maps").read_text().split("\n")]
    opened = [os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()]
    return mapped + opened


@pytest.mark.parametrize("patience", [5, 0])
def test_e29_on_windows_a_file_is_replaced_when_its_reader_has_closed_it(
    tmp_path, monkeypatch, patience
):
    """Elsewhere the system refuses it for other reasons, which stay, and nobody waits."""
    attempts, replace = [], os.replace

    def refused(source, target):
        attempts.append(target)
        if len(attempts) < 3:
            raise PermissionError(13, "Access is denied", str(source))
        replace(source, target)

    monkeypatch.setattr(files, "PATIENCE", patience)
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "replace", refused)
    if patience:
        write_text(tmp_path / "a.txt", "new")
    else:
        with pytest.raises(PermissionError, match=r"a\.txt"):
            write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == ("new" if patience else "old")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_e28_small_files_are_not_waited_for(tmp_path, monkeypatch, compose):
    disk = Disk(monkeypatch)
    samples = [shapes("val", 32)[i] for i in range(2)]
    write_folder(samples, shapes("val").labels, tmp_path / "data")
    weights = random_checkpoint(tmp_path / "a.ckpt", labels=shapes("val").labels)
    line = [f"input={tmp_path / 'data/images'}", f"output={tmp_path / 'out'}"]
    predict(compose("predict", *line, f"checkpoint={weights}", "trainer.accelerator=cpu"))
    assert len(list((tmp_path / "out/mask").iterdir())) == 2
    assert not disk.kept


def test_a_file_system_that_cannot_wait_for_a_folder_is_no_obstacle(tmp_path, monkeypatch):
    sync = os.fsync

    def fsync(file):
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(22, "Invalid argument")
        sync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "a", lambda name: Path(name).write_text("x"), durable=True)
    assert (tmp_path / "a").read_text() == "x"

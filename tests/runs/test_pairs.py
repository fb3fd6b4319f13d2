"""Pairs of trainings that start in the same moment."""

import os
from pathlib import Path

import pytest
from conftest import ROOT, SMALL_DATA, SMALL_TRAINER, SMALL_UNET
from forked import Forked

PAIRS = 20
TRAIN = (*SMALL_DATA, *SMALL_TRAINER, *SMALL_UNET, "trainer.max_epochs=1", "logger=none")


def trained_at_once(folder: Path, *overrides: str) -> list[tuple[int | None, str]]:
    """The exit codes and outputs of two trainings that start in the same moment."""
    line = [ROOT / "train.py", *TRAIN, *overrides]
    both = [Forked(line, folder, OMP_NUM_THREADS="1") for _ in range(2)]
    return [process.finish() for process in both]


def assert_complete(run: Path) -> None:
    names = {"config.yaml", "metrics.csv", "test_metrics.json", "checkpoints"}
    assert names <= set(os.listdir(run))
    assert sorted(os.listdir(run / "checkpoints")) == ["best.ckpt", "last.ckpt"]


def test_e01_two_trainings_at_once_have_a_folder_each(tmp_path):
    """Named after the second in which they start."""
    results = trained_at_once(tmp_path)
    assert [code for code, _ in results] == [0, 0], results
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        assert_complete(run)
        assert sum(f"output_dir=runs/{run.name}\n" in output for _, output in results) == 1


@pytest.mark.slow
def test_e01_20_pairs_of_trainings_at_once(tmp_path):
    """In the folders of their time, and in one that both are given."""
    for number in range(PAIRS):
        (tmp_path / f"{number}").mkdir()
        test_e01_two_trainings_at_once_have_a_folder_each(tmp_path / f"{number}")
        results = trained_at_once(tmp_path / f"{number}", "output_dir=same")
        assert sorted(code or 0 for code, _ in results) == [0, 2], results
        (refusal,) = [output for code, output in results if code]
        assert "output_dir=same: another run is writing into this folder" in refusal
        assert_complete(tmp_path / f"{number}/same")

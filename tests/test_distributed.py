"""Several processes equal one: scores, BatchNorm, training, and what they leave behind."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import several_processes
import torch
from several_processes import SPLITS, Numbers, batchnorm_step, scored

from seg_torch import Segmenter, checkpoint
from seg_torch.commands.evaluate import evaluate
from seg_torch.commands.train import train
from seg_torch.errors import InputError
from seg_torch.trainer import build_trainer

ROOT = Path(__file__).parents[1]


def environment(folder: Path, **others: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    notes, cache = str(folder / "notes.txt"), str(folder / "cache")
    own = {"PYTHONPATH": paths, "NOTES": notes, "XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, **others}


def finish(*processes: subprocess.Popen) -> str:
    """Returns what they printed when all have ended well; ends all if one takes too long."""
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=240)[0])
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    output = "".join(outputs)
    assert all(process.returncode == 0 for process in processes), output
    return output


def start(folder: Path, *command: str | Path, **others: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment(folder, **others),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def torchrun(count: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]


# Scores, and BatchNorm

# (images, images per batch): shards of 3, 2 and 2; one that is empty; two of them.
CASES = [(7, 2), (2, 1), (1, 4)]
WORLD = 3


@pytest.fixture(scope="module")
def of_three(tmp_path_factory) -> Path:
    """Where three processes have left what each of them computed."""
    folder = tmp_path_factory.mktemp("three")
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    torch.save(images, folder / "images.pt")
    script = ROOT / "tests/several_processes.py"
    finish(start(folder, *torchrun(WORLD), script, folder, json.dumps(CASES)))
    return folder


@pytest.mark.promise(5)
@pytest.mark.promise(27)
@pytest.mark.parametrize(("case", "length"), [(i, CASES[i][0]) for i in range(len(CASES))])
def test_three_processes_score_uneven_and_empty_shards_as_one_does(of_three, case, length):
    files = [of_three / f"scores-{rank}.json" for rank in range(WORLD)]
    first, *others = [json.loads(file.read_text())[case] for file in files]
    matrix = np.zeros((3, 3), int)
    for image, mask in map(Numbers(length).__getitem__, range(length)):
        valid = mask.numpy() != 255
        np.add.at(matrix, (mask.numpy()[valid], image[0].numpy()[valid]), 1)
    assert first["test"]["confusion_matrix"] == matrix.tolist()
    alone = scored(length, batch_size=1, devices=1)
    assert first["test"] == alone["test"]
    # Whose loss is a mean of floats.
    assert first["validation"] == pytest.approx(alone["validation"], rel=1e-6, nan_ok=True)
    correct, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou = (correct / (labelled + predicted - correct)).mean()
    assert first["validation"]["val/mean_iou"] == pytest.approx(iou)
    assert others == [first, first], "the processes disagree"


@pytest.mark.promise(16)
def test_synchronised_batchnorm_of_three_processes_is_that_of_the_whole_batch(of_three):
    """Without a GPU: with PyTorch's module, and kernels written after their definitions."""
    expected = batchnorm_step(torch.load(of_three / "images.pt"), synchronised=False)
    steps = [torch.load(of_three / f"batchnorm-{rank}.pt") for rank in range(WORLD)]
    outputs = torch.stack([step.pop("output") for step in steps], 1).flatten(0, 1)
    torch.testing.assert_close(outputs, expected.pop("output"), rtol=1e-9, atol=1e-9)
    for step in steps:
        assert step.keys() == expected.keys()
        torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-9)

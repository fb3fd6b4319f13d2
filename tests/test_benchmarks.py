"""The benchmarks run: one comparison of each kind, at a size of no interest."""

import importlib
import math
import sys
from functools import partial

import make_data
import pytest
from conftest import ROOT

pytest.importorskip("segmentation_models_pytorch")


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a file of the folder by its name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_sides_take_turns_in_processes_of_their_own(benchmarks, tmp_path, monkeypatch):
    comparison = benchmarks("comparison")
    program = tmp_path / "side.py"
    program.write_text(
        "import json, os, pathlib, sys\n"
        "with open(sys.argv[1], 'a') as log: log.write(f'{sys.argv[2]} {os.getpid()}\\n')\n"
        "print('what a library says')\n"
        "print(json.dumps({'seconds': {'ours': 1, 'SMP': 3}[sys.argv[2]], 'memory': 0.5}))\n"
    )
    log = tmp_path / "log"
    case = comparison.Case("work", lambda: None, {"SMP": lambda: None})
    (result,) = comparison.compare(case, [str(program), str(log)], 2)
    ways, processes = zip(*(line.split() for line in log.read_text().splitlines()), strict=True)
    assert ways == ("ours", "SMP", "ours", "SMP")
    assert len(set(processes)) == 4
    assert result.ratios == [3, 3]
    assert result.memory == (0.5, 0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_only_our_sides_get_our_setting_of_the_memory(benchmarks, monkeypatch):
    comparison = benchmarks("comparison")
    calls = []
    monkeypatch.setattr(comparison.hardware, "reuse_memory", lambda: calls.append(1))
    case = comparison.Case("work", lambda: 1.0, {"SMP": lambda: 2.0}, {"ours, too": lambda: 3.0})
    found = [case.measure(way, "cpu")["seconds"] for way in ("ours", "SMP", "ours, too")]
    assert found == [1, 2, 3]
    assert len(calls) == 2


def test_training_comparisons_run(benchmarks, tmp_path, monkeypatch):
    training = benchmarks("training")
    monkeypatch.setattr(training, "CROP", (32, 32))
    monkeypatch.setattr(training, "TRAINING", {"cpu": ("resnet18", 2, 5)})
    monkeypatch.setattr(training, "STEPS", 3)
    monkeypatch.setattr(training, "WARM_UP", 1)
    monkeypatch.setattr(training, "UNET_SIZE", {"cpu": (2, 32, 32)})
    monkeypatch.setattr(training, "seconds_of", lambda step, calls: step() or 1.0)
    monkeypatch.setattr(training.hardware, "available_cpus", lambda: 0)  # no workers
    root = tmp_path / "camvid"
    make_data.make_camvid(root)
    monkeypatch.setattr(training, "TORCHVISION_SIZE", {"cpu": (2, 33, 33)})
    for comparison in (
        training.unet,
        partial(training.unet_step, "mobilenetv2_100"),
        partial(training.torchvision_step, "fcn"),
    ):
        case = comparison(root, "cpu")
        for way in (case.ours, *case.peers.values(), *case.also.values()):
            assert math.isfinite(way())
            assert case.name


@pytest.mark.parametrize("name", ["palette", "scores", "dice", "tiles"])
def test_the_other_comparisons_run(benchmarks, tmp_path, monkeypatch, name):
    pytest.importorskip("monai")
    run = benchmarks("run")
    monkeypatch.setattr(run, "TILED", (700, 600))
    case = run.COMPARISONS[name](tmp_path, "cpu")
    monkeypatch.setattr(benchmarks("comparison"), "seconds_of", lambda step: step() is None or 1.0)
    for way in ("ours", *case.peers, *case.also):
        assert math.isfinite(case.measure(way, "cpu")["seconds"])


def test_scaling_draws_what_it_measures(benchmarks, tmp_path):
    scaling = benchmarks("scaling")
    costs = {amount: scaling.files(amount) for amount in (10, 20)}
    assert all(cost.seconds > 0 and cost.memory >= 0 for cost in costs.values())
    scaling.draw({"files": costs, "processes": costs}, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 1000

"""The benchmarks run: one comparison of each kind, at a size of no interest."""

import csv
import importlib
import json
import math
import sys
from functools import partial

import make_data
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from seg_torch.datasets import camvid, folder, shapes

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


def test_a_dataset_is_copied_for_all_sides(benchmarks, tmp_path):
    planning = benchmarks("planning")
    make_data.make_camvid(tmp_path / "camvid")
    drawn = partial(shapes, size=32, train=2, val=1)
    for name, original in {"drawn": drawn, "copy": partial(camvid, tmp_path / "camvid")}.items():
        planning.prepare(original, tmp_path / name)
        for split in ("train", "val"):
            copy, samples = folder(tmp_path / name, split), original(split)
            assert copy.labels == samples.labels
            for i in range(len(samples)):
                assert all(map(torch.equal, copy[i], samples[i]))
            assert len(copy) == len(samples)
    masks = sorted((tmp_path / "copy/masks").glob("val*.png"))
    truth = np.stack([np.array(Image.open(mask)) for mask in masks])
    found = np.where((truth == 2) | (truth == 255), 0, truth)  # all of class 2 is missed
    for mask, values in zip(masks, found, strict=True):
        Image.fromarray(values).save(tmp_path / mask.name)
    known = truth != 255
    both = [((truth == c) & (found == c) & known).sum() for c in range(11)]
    either = [((truth == c) | (found == c))[known].sum() for c in range(11)]
    expected = np.mean([b / e for b, e in zip(both, either, strict=True) if e])
    assert planning.score(tmp_path / "copy", tmp_path) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("images", "step"), [(24, 0.6), (88, 0.3), (367, 0.9), (600, 0.07)])
def test_a_recipe_gets_as_many_steps_as_fit(benchmarks, tmp_path, monkeypatch, images, step):
    planning = benchmarks("planning")
    runs = []

    def train(settings, place):
        given = dict(setting.split("=", 1) for setting in settings)
        epochs, steps = (
            int(given[f"trainer.{key}"]) for key in ("max_epochs", "limit_train_batches")
        )
        assert steps <= images // 8
        every = int(given["trainer.check_val_every_n_epoch"])
        times = [steps * step + 4 * (epoch % every == 0) for epoch in range(1, epochs + 1)]
        runs.append(10 + sum(times) + 6)  # start and test
        (place / "run").mkdir(parents=True)
        with (place / "run/times.csv").open("w") as file:
            writer = csv.writer(file)
            writer.writerows([["epoch", "seconds"], *enumerate(times, 1)])
        return {"seconds": runs[-1], "mean_iou": 0.5}

    monkeypatch.setattr(planning, "train", train)
    (tmp_path / "train.txt").write_text("name\n" * images)
    planning.by_hand(planning.RECIPES["shapes"][0], tmp_path, "weights", 5, tmp_path / "place")
    assert 0.93 * 300 <= runs[-1] <= 300


def test_what_was_measured_is_not_measured_again(benchmarks, tmp_path, monkeypatch):
    planning = benchmarks("planning")
    done = []

    def measured(name, *arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((arguments[-1].parent.name, name))
        return {"mean_iou": 0.1 * len(done), "seconds": 300.0, "memory_gb": 1.0}

    monkeypatch.setattr(planning, "prepare", lambda *_: None)
    for name in ("ours", "by_hand", "tutorial"):
        monkeypatch.setattr(planning, name, partial(measured, name))
    arguments = ["DATA", "WEIGHTS", "--only", "cracks", "shapes", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["planning.py", *arguments])
    with pytest.raises(KeyboardInterrupt):
        planning.main()
    monkeypatch.setattr(planning, "tutorial", lambda *_: {**measured_again, "mean_iou": 0.4})
    measured_again = {"seconds": 300.0, "memory_gb": 1.0}
    for name in ("ours", "by_hand"):
        monkeypatch.setattr(planning, name, lambda *_: {**measured_again, "mean_iou": 0.6})
    planning.main()
    assert done == [("cracks", "ours"), ("cracks", "by_hand"), ("cracks", "by_hand")]
    results = json.loads((tmp_path / "results.json").read_text())
    scores = {name: [found["mean_iou"] for found in row.values()] for name, row in results.items()}
    assert scores["cracks"] == pytest.approx([0.1, 0.2, 0.3, 0.6, 0.4])
    assert scores["shapes"] == [0.6, 0.6, 0.6, 0.6, 0.4]
    line = next(line for line in (tmp_path / "results.md").open() if line.startswith("| cracks |"))
    assert line.startswith("| cracks | 0.100 (300 s, 1.0 GB) | 0.200 ")
    assert line.endswith(f"| {0.1 / 0.6:.3f} |\n")  # ours by the best recipe


def test_time_to_accuracy_leaves_validation_out(benchmarks, tmp_path, monkeypatch):
    camvid = benchmarks("camvid")
    now = iter([0.0, 5.0, 30.0, 100.0, 101.0, 107.0])
    clock = camvid.Clock(str(tmp_path / "seconds.json"))
    with monkeypatch.context() as patch:
        patch.setattr(camvid.time, "perf_counter", lambda: next(now))
        for _ in range(2):  # a validation of 70 s between two epochs of two steps
            clock.on_train_epoch_start()
            clock.on_train_batch_end()
            clock.on_train_batch_end()
            clock.on_train_epoch_end()
    assert json.loads((tmp_path / "seconds.json").read_text()) == [30, 37]
    fast, slow = ({"minutes": [1, 2, 3 * k], "mean_iou": [0.3, 0.5, 0.45]} for k in (1, 2))
    assert [camvid.minutes_until(t, fast) for t in (0.2, 0.4, 0.5, 0.6)] == [1, 2, 2, None]
    results = {"ours": {"0": fast, "1": slow}, "peer": {"0": slow}}
    assert "| 0.40 | 2.0, 2.0 | 2.0 |" in camvid.table(results)
    assert "| 0.60 | not reached, not reached | not reached |" in camvid.table(results)
    camvid.draw(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000

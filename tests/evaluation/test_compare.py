"""seg-torch compare: what the tables say of runs whose scores are known."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_command
from omegaconf import OmegaConf
from predictions import random_checkpoint

from seg_torch.folders import LOCK, locked

CLASSES = ("road", "car", "sky")
IMAGES = 30


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """`command("runs/a runs/b")` compares them: (exit code, standard output and error)."""
    monkeypatch.setenv("COLUMNS", "200")

    def command(line: str) -> tuple[int | str | None, str]:
        code = run_command(f"compare {line} output_dir=tables", tmp_path)
        output = capsys.readouterr()
        return code, output.out + output.err

    return command


def make_run(
    folder: Path,
    loss: str = "CrossEntropyLoss",
    seed: int = 0,
    share: tuple[float, ...] = (0.8, 0.5, 0.9),
    **config: object,
) -> np.ndarray:
    """Writes a run whose IoU of each class is about `share`; returns its counts [N, 3, C]."""
    folder.mkdir(parents=True)
    label = np.random.default_rng(0).integers(50, 100, (IMAGES, len(CLASSES)))
    generator = np.random.default_rng([len(loss) * (seed > 0), seed])
    noise = generator.uniform(0.9, 1.1, label.shape)
    correct = np.minimum(label, (label * share * noise).astype(int))
    names = [f"image_{i:02d}" for i in range(IMAGES)]
    counts = np.stack([correct, label, label], axis=1)
    np.savez(
        folder / "test_images.npz",
        names=names,
        intersection=correct,
        label_pixels=label,
        predicted_pixels=label,
        confidence=np.ones(IMAGES, np.float32),
    )
    write_scores(folder, counts)
    settings = {
        "output_dir": str(folder),
        "seed": seed,
        "loss": {"_target_": f"seg_torch.losses.{loss}", "weights": None},
        "data": {"seed": seed, "root": "camvid"},
        "logger": {"tensorboard": {"save_dir": str(folder)}},
        "callbacks": {"mine": {"folder": f"{folder}/mine"}},
        **config,
    }
    OmegaConf.save(settings, folder / "config.yaml")
    rows = "epoch,val_mean_iou\n1,0.25\n2,0.5\n3,\n"
    (folder / "metrics.csv").write_text(rows)
    (folder / "times.csv").write_text("epoch,seconds,memory_gb\n1,12.0,1.5\n2,8.0,2.5\n")
    return counts


def write_scores(folder: Path, counts: np.ndarray, classes: tuple[str, ...] = CLASSES) -> None:
    scores = {
        "mean_iou": float(iou(counts).mean()),
        "pixel_accuracy": float(counts[:, 0].sum() / counts[:, 1].sum()),
        "per_class": {name: {} for name in classes},
    }
    (folder / "test_metrics.json").write_text(json.dumps(scores))


def iou(counts: np.ndarray) -> np.ndarray:
    correct, label, prediction = counts.sum(0)
    return correct / (label + prediction - correct)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "tables/compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_runs_that_differ_only_in_their_seed_are_one_row(tmp_path, command):
    counts = [make_run(tmp_path / f"sweep/{seed}", seed=seed) for seed in (0, 1, 2)]
    make_run(tmp_path / "sweep/10", loss="DiceLoss")
    code, _ = command("sweep")
    assert code == 0
    first, second = table(tmp_path)
    assert (first["settings"], first["runs"]) == ("loss=ce", "3")
    assert (second["settings"], second["runs"]) == ("loss=dice", "1")
    means = [iou(each).mean() for each in counts]
    assert float(first["mean_iou"]) == pytest.approx(np.mean(means))
    assert float(first["mean_iou_sd"]) == pytest.approx(np.std(means, ddof=1))
    assert (second["mean_iou_sd"], first["difference"], first["p"]) == ("", "", "")
    assert (float(first["val_mean_iou"]), float(first["val_mean_iou_sd"])) == (0.5, 0)
    assert (first["seconds_per_epoch"], first["gpu_memory_gb"]) == ("10.0", "2.5")


def test_e57_the_best_validation_is_that_of_the_checkpoint_where_an_epoch_has_several(
    tmp_path, command
):
    """`metrics.csv` has the last one of each epoch, here 0.5; it has to do without a checkpoint."""
    for name, score in (("a", 0.75), ("b", None)):
        make_run(tmp_path / name, seed=len(name), trainer={"val_check_interval": 0.5})
        path = tmp_path / name / "checkpoints/best.ckpt"
        path.parent.mkdir()
        random_checkpoint(path)
        content = torch.load(path, weights_only=True)
        states = {"monitor": None, "best_model_score": None}, {"monitor": "val/mean_iou"}
        states[1]["best_model_score"] = None if score is None else torch.tensor(score)
        content["callbacks"] = {f"Checkpoints{i}": state for i, state in enumerate(states)}
        torch.save(content, path)
        assert command(name)[0] == 0
        assert float(table(tmp_path)[0]["val_mean_iou"]) == (score or 0.5)


def test_e01_the_tables_are_not_written_into_a_folder_in_which_another_run_writes(
    tmp_path, command
):
    make_run(tmp_path / "a")
    with locked(tmp_path / "tables"):
        code, output = command("a")
        assert os.listdir(tmp_path / "tables") == [LOCK]
    assert code == 2
    assert "error: output_dir=tables: another run is writing into this folder" in output


def test_a_difference_has_the_interval_and_p_value_of_a_plain_paired_bootstrap(tmp_path, command):
    baseline = make_run(tmp_path / "a", seed=1)
    others = [
        make_run(tmp_path / f"b{seed}", "DiceLoss", seed, (0.81, 0.49, 0.91)) for seed in (1, 2)
    ]
    assert command("a b1 b2")[0] == 0
    row = table(tmp_path)[1]

    def difference(drawn: np.ndarray) -> float:
        scores = [iou(counts[drawn]).mean() for counts in (*others, baseline)]
        return np.mean(scores[:2]) - scores[2]

    observed = difference(np.arange(IMAGES))
    assert float(row["difference"]) == pytest.approx(observed)
    generator = np.random.default_rng(5)
    resampled = [difference(generator.integers(0, IMAGES, IMAGES)) for _ in range(4000)]
    limits = float(row["difference_low"]), float(row["difference_high"])
    spread = np.std(resampled)
    np.testing.assert_allclose(limits, np.percentile(resampled, (2.5, 97.5)), atol=0.2 * spread)
    expected = 2 * min(np.mean(np.array(resampled) < 0), np.mean(np.array(resampled) > 0))
    assert float(row["p"]) == pytest.approx(expected, abs=0.04)


def test_the_class_that_moved_is_named_with_its_interval_and_no_other(tmp_path, command):
    first = make_run(tmp_path / "a")
    second = make_run(tmp_path / "b", "DiceLoss", 0, (0.8, 0.6, 0.9))
    code, output = command("a b")
    assert code == 0
    text = (tmp_path / "tables/compare.md").read_text()
    section = text.split("## Classes")[1].split("##")[0]
    moved = [line.split(" | ") for line in section.splitlines() if line.startswith("| loss")]
    assert [cells[1] for cells in moved] == ["car"]
    before, after = iou(first)[1], iou(second)[1]
    assert moved[0][2:4] == [f"{before:.4f}", f"{after:.4f}"]
    assert moved[0][4].startswith(f"{after - before:+.4f} [+0.")
    assert "Classes whose IoU differs" in output
    assert float(table(tmp_path)[1]["p"]) == pytest.approx(2 / 2001)


def test_the_same_scores_are_no_difference(tmp_path, command):
    for name, loss in (("a", "CrossEntropyLoss"), ("b", "DiceLoss")):
        make_run(tmp_path / name, loss)
    assert command("a b")[0] == 0
    assert float(table(tmp_path)[1]["difference"]) == 0
    assert float(table(tmp_path)[1]["p"]) == 1
    assert "## Classes" not in (tmp_path / "tables/compare.md").read_text()


def test_choices_are_called_by_name_with_what_was_changed_of_them(tmp_path, command):
    """Of the files that set the same function, mask2former and segformer, the nearest one."""
    library = "seg_torch.models.transformers"
    segformer = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/model/segformer.yaml"))
    assert segformer["_target_"] == library
    make_run(tmp_path / "runs/a", model=segformer)
    make_run(tmp_path / "runs/b", model={**segformer, "weights": None})
    make_run(tmp_path / "runs/c", model={"_target_": "mine.Model", "weights": None})
    assert command("runs")[0] == 0
    assert [row["settings"] for row in table(tmp_path)] == [
        "model=segformer",
        "model=segformer model.weights=null",
        "model=Model model.weights=null",
    ]


def test_a_name_that_has_moved_tells_no_runs_apart(tmp_path, command):
    poly = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/scheduler/poly.yaml"))
    make_run(tmp_path / "runs/a", scheduler=poly)
    before = {**poly, "_target_": "seg_torch.schedulers.poly"}
    make_run(tmp_path / "runs/b", scheduler=before, seed=1)
    assert command("runs")[0] == 0
    assert [row["runs"] for row in table(tmp_path)] == ["2"]


def test_comparing_does_without_torch():
    line = "import sys, seg_torch.commands.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], cwd=ROOT).returncode == 0


def test_only_settings_that_change_a_result_are_told_apart(tmp_path, command):
    make_run(
        tmp_path / "runs/lr=0.1", optimizer={"lr": 0.1}, model={"encoder": "a", "weights": None}
    )
    make_run(tmp_path / "runs/b", optimizer={"lr": 0.2}, model={"encoder": "a", "weights": "a|b"})
    make_run(tmp_path / "runs/c", optimizer={"lr": 0.2}, model={"encoder": "a"})
    assert command("runs/lr=0.1 runs/b runs/c")[0] == 0
    names = [row["settings"] for row in table(tmp_path)]
    assert names == [
        "optimizer.lr=0.1 model.weights=null",
        "optimizer.lr=0.2 model.weights=a|b",
        "optimizer.lr=0.2",
    ]
    text = (tmp_path / "tables/compare.md").read_text().split("## Settings that differ")[1]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows[2:]] == ["optimizer.lr", "model.weights"]
    assert r"a\|b" in text


def test_a_run_without_scores_is_left_out_by_name(tmp_path, command):
    make_run(tmp_path / "sweep/0")
    make_run(tmp_path / "sweep/1", "DiceLoss")
    (tmp_path / "sweep/1/test_metrics.json").unlink()
    code, output = command("sweep")
    assert code == 0
    assert "sweep/1 is left out: it holds no test_metrics.json" in output
    assert len(table(tmp_path)) == 1


def test_runs_without_scores_of_images_are_in_the_table_unpaired(tmp_path, command):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "DiceLoss")
    (tmp_path / "b/test_images.npz").unlink()
    code, output = command("a b")
    assert code == 0
    assert "b holds no test_images.npz: it is not compared image by image" in output
    assert [row["p"] for row in table(tmp_path)] == ["", ""]


def other_image(run: Path) -> None:
    arrays = dict(np.load(run / "test_images.npz"))
    arrays["names"][4] = "image_99"
    np.savez(run / "test_images.npz", **arrays)


def other_labels(run: Path) -> None:
    arrays = dict(np.load(run / "test_images.npz"))
    arrays["label_pixels"][7, 1] += 1
    np.savez(run / "test_images.npz", **arrays)


def damaged(run: Path) -> None:
    """Its names, which are read first, are not what was written."""
    content = bytearray((run / "test_images.npz").read_bytes())
    start = content.index("image_".encode("utf-32-le"))
    content[start : start + 400] = bytes(400)
    (run / "test_images.npz").write_bytes(content)


def other_classes(run: Path) -> None:
    write_scores(run, np.ones((1, 3, 3)), ("road", "van", "sky"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_image, "different images; 2 are in one of the two only, such as image_04"),
        (other_labels, "their labels of image image_07 differ"),
        (other_classes, "they have different classes"),
        (damaged, "test_images.npz: cannot be read as scores of images"),
        (lambda run: (run / "test_metrics.json").write_text("{"), "b: cannot be read as a run"),
        (
            lambda run: (run / "test_metrics.json").write_text("{}"),
            "b: cannot be read as a run: test_metrics.json lacks scores",
        ),
        (lambda run: (run / "config.yaml").write_text("a: 1\na: 2"), "b: cannot be read as a run"),
        (lambda run: (run / "metrics.csv").write_bytes(b"epoch\n\xb4"), "metrics.csv is damaged"),
        (lambda run: (run / "config.yaml").unlink(), "b is neither a run"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, command, change, message):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "DiceLoss")
    change(tmp_path / "b")
    code, output = command("a b")
    assert code == 2
    assert message in output
    assert not (tmp_path / "tables").exists()


def test_the_order_of_the_images_does_not_matter(tmp_path, command):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "DiceLoss", 3)
    assert command("a b")[0] == 0
    before = table(tmp_path)
    arrays = dict(np.load(tmp_path / "b/test_images.npz"))
    np.savez(tmp_path / "b/test_images.npz", **{name: a[::-1] for name, a in arrays.items()})
    assert command("a b")[0] == 0
    assert table(tmp_path) == before


def test_paths_may_be_given_with_and_without_their_key(tmp_path, command):
    make_run(tmp_path / "it's a run")
    make_run(tmp_path / "b")
    assert run_command("compare runs=[b] output_dir=tables", tmp_path) == 0
    assert len(table(tmp_path)) == 1
    assert run_command("compare runs=b output_dir=tables", tmp_path) == 0
    assert command("")[0] == 2

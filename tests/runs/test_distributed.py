"""Several processes equal one: scores, BatchNorm, training, and what they leave behind."""

import json
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import several_processes
import torch
from forked import Forked
from hydra.utils import instantiate
from omegaconf import OmegaConf
from several_processes import SPLITS, Numbers, batchnorm_step, scored
from torch.nn import SyncBatchNorm

from seg_torch import Segmenter
from seg_torch.checkpoints import checkpoint
from seg_torch.commands.evaluate import evaluate
from seg_torch.distributed import Processes
from seg_torch.errors import InputError
from seg_torch.training import build, run

ROOT = Path(__file__).parents[2]


def finish(*started: Forked) -> str:
    """Returns what they printed when all have ended well; ends all if one takes too long."""
    end = time.monotonic() + 240
    results = [process.finish(max(0, end - time.monotonic())) for process in started]
    output = "".join(output for _, output in results)  # of all, where one waited for another, too
    assert [code for code, _ in results] == [0] * len(started), output
    return output


def start(folder: Path, *command: str | Path) -> Forked:
    notes, cache = str(folder / "notes.txt"), str(folder / "cache")
    return Forked(command, folder, NOTES=notes, XDG_CACHE_HOME=cache, OMP_NUM_THREADS="1")


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
    script = ROOT / "tests/support/several_processes.py"
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
    assert first["images"] == alone["images"]
    assert np.sum(first["images"]["intersection"], 0).tolist() == matrix.diagonal().tolist()
    # Whose loss is a mean of floats.
    assert first["validation"] == pytest.approx(alone["validation"], rel=1e-6, nan_ok=True)
    correct, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou = (correct / (labelled + predicted - correct)).mean()
    assert first["validation"]["val/mean_iou"] == pytest.approx(iou)
    assert others == [first, first], "the processes disagree"


@pytest.mark.promise(16)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_several_gpus_synchronise_batchnorm_and_say_so(small, device, tmp_path, caplog):
    caplog.set_level("INFO")
    cfg = small("train", "trainer.accumulate_grad_batches=3")
    processes: Any = SimpleNamespace(count=2, device=torch.device(device))
    trainer: Any = SimpleNamespace(
        is_global_zero=True,
        world_size=2,
        precision="32-true",
        accumulate_grad_batches=3,
        strategy=SimpleNamespace(root_device=torch.device(device)),
    )
    data = instantiate(cfg.data, _convert_="all")
    network = build.build_network(cfg, data, None, processes)
    run.begin(cfg, tmp_path, trainer, network, data)
    layers = several_processes.batchnorms(network)
    assert layers
    assert all(isinstance(layer, SyncBatchNorm) == (device == "cuda") for layer in layers)
    assert ("2 processes, synchronised BatchNorm" in caplog.text) == (device == "cuda")
    assert "effective batch 24" in caplog.text  # 4 images, 2 processes, 3 batches for one step


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


# Training

# Ten steps of eight images, of which 5 to 30 % of the pixels are ignored, differently in each.
STEPS = SPLITS["train"] // 8
RUN = (
    "data=pet",  # whose settings include `download`
    "data.dataset._target_=several_processes.downloaded",
    "data.root=data",
    "data.download=true",
    "data.augment.crop=[32,32]",
    "data.augment.paste=0.5",
    "data.sample=rare",
    "model=unet_random",
    "model.decoder_channels=[8,8,8,8,8]",
    "loss=weighted_ce",
    "optimizer=sgd",  # Adam would turn rounding errors of tiny gradients into whole steps
    "optimizer.lr=0.01",
    "logger=none",
    "+callbacks.freeze._target_=several_processes.FreezeBatchNorm",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "trainer.max_epochs=1",
)
# A time, which differs between the processes.
FOLDER = (f"--config-dir={ROOT / 'tests/support/timed'}", "experiment=timed")


def agents(folder: Path, *command: str | Path) -> list[Forked]:
    """Starts torchrun as on two machines, with a process on each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1"]
    run = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *meet]
    # Both would take loopback for the machine of the endpoint.
    return [start(folder, *run, f"--rdzv-conf=is_host={i}", *command) for i in (1, 0)]


def run_in(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def last(folder: Path) -> dict:
    return checkpoint.read(run_in(folder) / "checkpoints/last.ckpt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Where one process has trained with batches of eight."""
    folder = tmp_path_factory.mktemp("alone")
    finish(start(folder, ROOT / "train.py", *RUN, *FOLDER, "data.batch_size=8"))
    return folder


FSDP = pytest.param(
    "fsdp", marks=pytest.mark.skipif(torch.__version__ < "2.14", reason="refused there on a CPU")
)


@pytest.fixture(scope="module", params=["1 x 2", "2 x 1", FSDP])
def of_two(request, tmp_path_factory) -> tuple[Path, str]:
    """Where two processes have trained with batches of four, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    command = (ROOT / "train.py", *RUN, "data.batch_size=4")
    if request.param == "2 x 1":
        return folder, finish(*agents(folder, *command, *FOLDER))
    strategy = {"1 x 2": "auto", "fsdp": "fsdp"}[request.param]
    strategy = f"trainer.strategy={strategy}"
    return folder, finish(start(folder, *torchrun(2), *command, strategy, *FOLDER))


def test_two_batches_of_four_train_as_one_of_eight(of_two, alone):
    """Class weights, ignored pixels and the optimizer included, and without its BatchNorm."""
    two, one = (last(folder)["step_losses"].mean(0) for folder in (of_two[0], alone))
    assert len(two) == len(one) == STEPS
    assert (two - one).abs().max() < 1e-5
    assert one.std() > 0.01, "nothing was learnt"


def test_processes_make_one_folder_fetch_once_count_once_and_speak_once(of_two):
    folder, output = of_two
    run = run_in(folder)
    assert list(folder.rglob("config.yaml")) == [run / "config.yaml"]
    assert len((run / "metrics.csv").read_text().splitlines()) == 2
    assert (run / "samples/epoch_001.png").is_file()
    counted = [f"counted {i:04d}" for i in range(sum(SPLITS.values()))]
    assert sorted((folder / "notes.txt").read_text().splitlines()) == [*counted, "downloaded"]
    for text in ("effective batch 8", "2 processes", "class weights", "epoch 1 of 1"):
        assert output.count(text) == 1, text


def test_what_two_processes_saved_scores_alike_in_one(of_two, compose, monkeypatch, tmp_path):
    """Also where their BatchNorm statistics have gone apart: those of the checkpoint are scored."""
    folder, _ = of_two
    run = run_in(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes.txt"))
    for split in ("val", "test"):
        options = (f"checkpoint={run}", f"split={split}", f"output_dir={tmp_path}")
        trust = ("trust=[several_processes]", "trainer.accelerator=cpu")
        evaluate(compose("evaluate", *options, *trust))
    test = json.loads((run / "test_metrics.json").read_text())
    alone = json.loads((tmp_path / "test_metrics.json").read_text())
    # Confidence is a float, and FSDP's weights lie in another order.
    first, second = (scores.pop("expected_calibration_error") for scores in (test, alone))
    assert first == pytest.approx(second, abs=1e-4)
    assert len(test.pop("reliability")) == len(alone.pop("reliability"))
    assert test == alone
    names, row = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    validation = json.loads((tmp_path / "val_metrics.json").read_text())
    for name in ("mean_iou", "pixel_accuracy", "mean_accuracy", "mean_dice"):
        assert float(row[names.index(f"val_{name}")]) == pytest.approx(validation[name]), name
    image = np.zeros((40, 50, 3), np.uint8)
    assert Segmenter.load(run, trust=["several_processes"]).predict(image).mask.shape == (40, 50)


@pytest.mark.slow  # tests/test_nodes.py has two machines
def test_two_processes_of_evaluate_write_the_bytes_of_one(alone, compose, monkeypatch, tmp_path):
    command = (f"checkpoint={run_in(alone)}", "trainer.accelerator=cpu", "average_precision=true")
    command = (*command, "trust=[several_processes]")
    two = ("trainer.devices=2", f"output_dir={tmp_path / 'two'}")
    finish(start(alone, ROOT / "evaluate.py", *command, *two))
    monkeypatch.chdir(alone)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes.txt"))
    evaluate(compose("evaluate", *command, f"output_dir={tmp_path / 'one'}"))
    one, two = (tmp_path / n / "test_metrics.json" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_fsdp_with_clipped_gradients_goes_on_after_its_first_epoch(tmp_path):
    program = [*torchrun(2), ROOT / "train.py"]
    fsdp = ("trainer.strategy=fsdp", "trainer.gradient_clip_val=1", "optimizer=adamw")
    finish(start(tmp_path, *program, *RUN, *fsdp, "output_dir=runs/a"))
    finish(start(tmp_path, *program, "resume=runs/a", "trainer.max_epochs=2"))
    content = last(tmp_path)
    assert content["global_step"] == 2 * (SPLITS["train"] // 16)
    assert content["optimizer_states"][0]["state"][0]["step"] == content["global_step"]
    assert len((tmp_path / "runs/a/metrics.csv").read_text().splitlines()) == 3
    Segmenter.load(tmp_path / "runs/a", trust=["several_processes"])


@pytest.mark.slow
def test_machines_with_disks_of_their_own_fetch_once_each_and_count_once(tmp_path):
    finish(*agents(tmp_path, ROOT / "train.py", *RUN, *FOLDER, "data.root=data-MACHINE"))
    notes = (tmp_path / "notes.txt").read_text().splitlines()
    assert notes.count("downloaded") == 2
    assert len(notes) == 2 + sum(SPLITS.values())


def test_a_process_too_many_is_refused(tmp_path, monkeypatch):
    """Lightning would let each train alone, in the folder of the other."""
    two = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1", "RANK": "0"}
    for name, value in {**two, "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="torchrun has started 2 processes"):
        Processes(OmegaConf.create({"accelerator": "cpu", "devices": 1, "num_nodes": 1}))

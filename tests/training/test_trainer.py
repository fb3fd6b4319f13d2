"""Lightning's Trainer for this hardware: devices, checkpoints that survive, several processes."""

import copy
import json
import os
import resource
import signal
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from conftest import SMALL_DATA, SMALL_TRAINER, SMALL_UNET
from forked import Forked
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import nn

from seg_torch.checkpoints import checkpoint
from seg_torch.commands.evaluate import evaluate
from seg_torch.commands.train import train
from seg_torch.datasets import shapes
from seg_torch.distributed import Processes
from seg_torch.errors import InputError
from seg_torch.labels import Labels
from seg_torch.models import unet, weights
from seg_torch.models.network import Network
from seg_torch.prediction.segmenter import Segmenter
from seg_torch.training.trainer import AtomicCheckpointIO, build_trainer

ROOT = Path(__file__).parents[2]
MODEL = {"encoder": "resnet18", "weights": None, "decoder_channels": [8, 8, 8, 8, 8]}


def settings(**others) -> DictConfig:
    plain = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": "32-true"}
    return OmegaConf.create({**plain, **others})


def trainer_of(folder: Path = Path("run"), **others: Any) -> Trainer:
    cfg = OmegaConf.create({"trainer": settings(**others)})
    return build_trainer(cfg, Processes(cfg.trainer), folder)


# Devices


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["gpu", "cuda", "mps"])
def test_d19_a_gpu_that_is_not_there_is_refused_before_anything_is_written(
    small, compose, tmp_path, name
):
    setting = f"trainer.accelerator={name}"
    with pytest.raises(InputError, match=f"{setting}: PyTorch finds no such device"):
        train(small("train", setting))
    labels = Labels(("a", "b"))
    network = Network(unet(2, **MODEL))
    config = {"_target_": "seg_torch.models.unet", **MODEL}
    content = {
        "state_dict": {f"network.{k}": v for k, v in network.state_dict().items()},
        checkpoint.KEY: checkpoint.describe(network, labels, config, {}, None),
    }
    torch.save(content, tmp_path / "a.ckpt")
    options = (f"checkpoint={tmp_path / 'a.ckpt'}", f"output_dir={tmp_path / 'e'}", "data=shapes")
    with pytest.raises(InputError, match=f"{setting}: PyTorch finds no such device"):
        evaluate(compose("evaluate", *options, setting))
    assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"accelerator": "abacus"},
        {"devices": 0},
        {"devices": "many"},
        {"strategy": "dpp"},
        {"precision": "bf17"},
        {"max_time": "an hour"},
        {"gradient_clip_algorithm": "none"},
        {"no_such_setting": 1},
    ],
)
def test_what_lightning_does_not_take_is_an_error_of_the_user(wrong):
    with pytest.raises(InputError, match="trainer"):
        trainer_of(**wrong)


def test_d20_a_requeued_job_of_slurm_looks_for_its_state_in_the_folder_of_the_run(
    tmp_path, monkeypatch
):
    """Another run's `hpc_ckpt` in the current folder would be resumed without a word."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    trainer = trainer_of(Path("."))
    assert trainer._checkpoint_connector._hpc_resume_path, "Lightning does not look there"
    trainer = trainer_of(Path("runs/a"))
    assert Path(trainer.default_root_dir) == Path("runs/a")
    assert trainer._checkpoint_connector._hpc_resume_path is None


# Checkpoints


def file_size_limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("how", ["disk full", "killed half-way"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, how):
    path = tmp_path / "checkpoints" / "last.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"epoch": 1}, path)
    before = path.read_bytes()
    large = {"epoch": 2, "weights": torch.zeros(1 << 20)}
    if how == "disk full":  # as far as PyTorch can tell
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        file_size_limit(1 << 20)
        try:
            with pytest.raises(OSError, match=r"File too large: '.*last\.ckpt'"):
                writer.save_checkpoint(large, path)
        finally:
            file_size_limit(limit)
    else:

        def half(content: dict, file: BinaryIO) -> None:
            file.write(b"half of it")
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            writer.save_checkpoint(large, path)
        monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["last.ckpt"]
    writer.save_checkpoint(large, path)
    assert writer.load_checkpoint(path, weights_only=True)["epoch"] == 2


@pytest.mark.parametrize("value", [np.float64(0.5), {"a": [np.int64(1)]}, np.zeros(2)])
def test_e30_a_checkpoint_that_could_not_be_read_again_is_refused_when_it_is_saved(tmp_path, value):
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    good = {"callbacks": {"Mine": {"best": 0.5, "size": torch.Size([2])}, "None": None}}
    writer.save_checkpoint({**good, "weights": torch.ones(2)}, path)
    bad = {"callbacks": {**good["callbacks"], "Other": {"best": value}}}
    with pytest.raises(InputError, match=r"again: callbacks\.Other\.best.* is a numpy\..*float\("):
        writer.save_checkpoint({**bad, "weights": torch.zeros(2)}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert weights.load(path)["weights"].tolist() == [1, 1]


def test_lightning_saves_checkpoints_that_way(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        "seg_torch.training.trainer.write_atomically",
        lambda path, write, durable: saved.append(Path(path)),
    )
    trainer = trainer_of()
    trainer.strategy.save_checkpoint({}, tmp_path / "a.ckpt")
    assert saved == [tmp_path / "a.ckpt"]


# Several processes


@pytest.mark.parametrize("error", [InputError("no such file"), OSError("disk full")])
def test_an_error_of_the_only_process_is_raised_as_it_is(error):
    def fail() -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        Processes(settings()).first(fail)


# train.py, and what each process counts and is told, written beside the run.
PROGRAM = """
import json, os, signal
from pathlib import Path
from seg_torch.cli.main import main
from seg_torch.data.module import SegmentationDataModule
from seg_torch.losses import CrossEntropyLoss
from seg_torch.training.task import SegmentationTask
from seg_torch.distributed import Processes

notes = Path(os.environ["NOTES"])
def note(what, value):
    with open(notes / f"{what}-{os.environ['RANK']}", "a") as file:
        file.write(json.dumps(value) + chr(10))

count, take = SegmentationDataModule.pixel_counts, CrossEntropyLoss.set_pixel_counts
def pixel_counts(self):
    counts = count(self)
    note("counted", counts.tolist())
    return counts
def set_pixel_counts(self, counts):
    note("given", counts.tolist())
    take(self, counts)
def same(self, value):
    agreed = choose(self, value)
    if isinstance(value, str):
        note("folder", [value, agreed])
    return agreed
choose, Processes.same = Processes.same, same
SegmentationDataModule.pixel_counts = pixel_counts
CrossEntropyLoss.set_pixel_counts = set_pixel_counts
def training_step(self, batch, index):
    note("seen", int(batch[0].sum()))
    factor = float("nan") if (os.environ["RANK"], index) == ("1", 1) else 1
    spoil = self.loss.register_forward_hook(lambda module, inputs, loss: loss * factor)
    loss = step(self, batch, index)
    spoil.remove()
    return loss
step = SegmentationTask.training_step
def validation_step(self, groups, index):
    if os.environ["RANK"] == "1" and not self.trainer.sanity_checking and index == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    validate(self, groups, index)
validate = SegmentationTask.validation_step
if os.environ.get("SPOIL"):
    SegmentationTask.training_step = training_step
if os.environ.get("STOP"):
    SegmentationTask.validation_step = validation_step
if os.environ.get("FAIL"):
    def check_files(self):
        raise OSError(os.environ["FAIL"])
    SegmentationDataModule.check_files = check_files
try:
    main("train")
except SystemExit as end:
    note("exit", end.code)
    raise
"""
FIVE = (*SMALL_DATA, *SMALL_UNET, "data.dataset.test=5", "trainer.max_epochs=1", "loss=weighted_ce")


def on_two_processes(tmp_path: Path, *overrides: str, **environment: str) -> tuple[int, str]:
    """Runs train.py under torchrun with gloo; returns its exit code and what it printed."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    small = (*SMALL_TRAINER, "trainer.devices=2", *FIVE)
    command = [*torchrun, program, *small, *overrides]
    process = Forked(command, tmp_path, NOTES=str(tmp_path), OMP_NUM_THREADS="1", **environment)
    code, output = process.finish(timeout=120)
    assert code is not None, output
    return code, output


def noted(folder: Path, what: str) -> list:
    """What each process noted: a list of values by process."""
    return [
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in sorted(folder.glob(f"{what}-*"))
    ]


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory) -> Path:
    """The folder in which two processes have trained."""
    folder = tmp_path_factory.mktemp("two")
    timed = f"--config-dir={ROOT / 'tests/support/timed'}"
    code, output = on_two_processes(folder, timed, "experiment=timed", "model=unet_random")
    assert code == 0, output
    return folder


def test_d20_two_processes_make_one_run_whose_name_differs_between_them(run_of_two):
    (run,) = (run_of_two / "runs").iterdir()
    ((first, *chosen),), ((second, *told),) = noted(run_of_two, "folder")
    assert first != second, "nothing to agree on"
    assert chosen == told == [first] == [f"runs/{run.name}"]
    assert list(run_of_two.rglob("config.yaml")) == [run / "config.yaml"]
    assert (run / "checkpoints/best.ckpt").is_file()
    assert len((run / "metrics.csv").read_text().splitlines()) == 2
    assert OmegaConf.load(run / "config.yaml").output_dir == f"runs/{run.name}"


def test_d20_one_process_counts_the_pixels_and_tells_the_other(run_of_two):
    masks = [np.asarray(shapes("train", 32, train=12)[i][1]) for i in range(12)]
    expected = np.bincount(np.stack(masks).ravel(), minlength=256)[:6].tolist()
    assert noted(run_of_two, "counted") == [[expected]]
    assert noted(run_of_two, "given") == [[expected], [expected]]


@pytest.mark.promise(5)
def test_five_images_score_alike_on_two_processes_and_on_one(run_of_two, compose, tmp_path):
    (run,) = (run_of_two / "runs").iterdir()
    options = (f"checkpoint={run}", "trainer.accelerator=cpu", f"output_dir={tmp_path}")
    evaluate(compose("evaluate", *options))
    two, one = (json.loads((f / "test_metrics.json").read_text()) for f in (run, tmp_path))
    assert np.sum(one["confusion_matrix"]) == sum(
        int((np.asarray(shapes("test", 32, test=5)[i][1]) != 255).sum()) for i in range(5)
    )
    assert two == one


def test_d20_into_the_folder_of_a_run_no_process_goes_on_or_waits(run_of_two):
    (run,) = (run_of_two / "runs").iterdir()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, output = on_two_processes(run_of_two, f"output_dir=runs/{run.name}")
    assert code != 0
    assert noted(run_of_two, "exit") == [[0, 2], [0, 2]]
    assert f"error: output_dir=runs/{run.name} holds a run already" in output
    assert f'File "{ROOT / "seg_torch"}' not in output, "a traceback"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_d20_whatever_fails_in_the_first_process_ends_the_others(tmp_path):
    code, output = on_two_processes(tmp_path, "output_dir=runs/a", FAIL="the disk is on fire")
    assert code != 0
    assert "the disk is on fire" in output
    assert noted(tmp_path, "exit") == [[1], [2]]


@pytest.mark.promise(28)
def test_two_processes_name_the_batch_and_the_process_whose_loss_is_no_number(tmp_path):
    code, output = on_two_processes(tmp_path, "output_dir=a", "data.batch_size=2", SPOIL="1")
    assert code != 0
    assert "the training loss is nan at batch 2 of epoch 1 in process 1" in output
    batch = torch.load(tmp_path / "a/diverged/batch.pt", weights_only=True)
    assert int(torch.stack(batch["images"]).sum()) == noted(tmp_path, "seen")[1][1]
    report = json.loads((tmp_path / "a/diverged/report.json").read_text())
    assert (report["batch"], report["process"]) == (2, 1)


def test_two_processes_stop_together_during_a_validation_of_unequal_shares(tmp_path):
    options = ("output_dir=a", "data.dataset.val=23", "data.eval_batch_size=1")
    code, output = on_two_processes(tmp_path, *options, STOP="1")
    assert code != 0
    assert "stopped in epoch 1; go on with resume=a" in output
    assert {code for codes in noted(tmp_path, "exit") for code in codes} == {128 + signal.SIGTERM}
    assert checkpoint.read(tmp_path / "a/checkpoints/last.ckpt")["global_step"] == 1


# Compiled models


class Compiler:
    """In the place of torch.compile's: runs the model's own operations, and counts."""

    def __init__(self) -> None:
        self.compiled = self.called = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any, mode: str = "default") -> Any:
        self.compiled += 1

        def call(*arguments: Any) -> Any:
            self.called += 1
            return graph.forward(*arguments)

        return call


@pytest.fixture
def compiler(monkeypatch) -> Compiler:
    torch._dynamo.reset()
    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    return compiler


def test_a_compiled_run_saves_resumes_and_loads_as_any_other(small, compiler, tmp_path):
    """Compiled once and used in every training step, but not to score images of other sizes."""
    plain, whole, parts = (tmp_path / name for name in ("plain", "whole", "parts"))
    # A network whose few layers compile faster, and a rate that does not depend on the epochs.
    settings = ("logger=none", "model.encoder=resnet18", "scheduler=none")
    train(small("train", f"output_dir={plain}", *settings))
    assert compiler.called == 0
    compiled = ("trainer.compile=default", *settings)
    train(small("train", f"output_dir={whole}", *compiled))
    assert (compiler.compiled, compiler.called) == (1, 6)  # of two epochs, 3 batches each
    train(small("train", f"output_dir={parts}", *compiled, "trainer.max_epochs=1"))
    cfg = OmegaConf.load(parts / "config.yaml")
    train(OmegaConf.merge(cfg, {"resume": str(parts), "trainer": {"max_epochs": 2}}))
    states = [
        checkpoint.network_state(checkpoint.read(folder / "checkpoints/last.ckpt"))
        for folder in (plain, whole, parts)
    ]
    assert list(states[1]) == list(states[0])
    torch.testing.assert_close(states[2], states[1], rtol=0, atol=0)
    # Sums of gradients are taken in another order.
    losses = [
        [float(line.split(",")[3]) for line in (f / "metrics.csv").read_text().splitlines()[1:]]
        for f in (plain, whole)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    image = np.zeros((40, 50, 3), np.uint8)
    assert Segmenter.load(whole, "cpu").predict(image).mask.shape == (40, 50)


def test_batches_of_another_shape_are_not_compiled_nor_is_a_copy(compiler):
    network = Network(unet(2, **MODEL)).train()
    network.compile_for_training("max-autotune")
    for images, height in ((4, 32), (4, 32), (3, 32), (4, 64), (1, 96), (4, 32)):
        network(torch.zeros(images, 3, height, 32, dtype=torch.uint8))
    assert (compiler.compiled, compiler.called) == (1, 3)
    network.eval()(torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    assert compiler.called == 3
    other = copy.deepcopy(network).train()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert not other(torch.full((4, 3, 32, 32), 9, dtype=torch.uint8))["out"].any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"compile": "fast"}, "trainer.compile is 'fast'; use one of None, default, max-autotune"),
        ({"benchmark": "auto"}, "trainer.benchmark is 'auto'"),
        ({"compile": "default", "deterministic": True}, "bit for bit.*trainer.compile=default"),
        ({"benchmark": True, "deterministic": True}, "bit for bit.*trainer.benchmark=True"),
        ({"strategy": "fsdp", "precision": "bf16-true"}, "fsdp .* not trainer.precision=bf16-true"),
    ],
)
def test_what_cannot_be_compiled_or_repeated_is_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        trainer_of(**wrong)


def test_a_model_that_cannot_be_compiled_is_an_error_of_the_user(small, monkeypatch):
    def no_compiler(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler found\n\nand a long story")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=no_compiler))
    with pytest.raises(InputError, match=r"no C\+\+ compiler found. Set trainer.compile=null"):
        train(small("train", "trainer.compile=default", "logger=none"))


@pytest.mark.slow
def test_pytorchs_own_compiler_gives_the_loss_and_gradients_of_the_model():
    torch._dynamo.reset()
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    network = Network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).train()
    results = []
    for compiled in (False, True):
        if compiled:
            network.compile_for_training("default")
        network.zero_grad()
        network(images)["out"].square().mean().backward()
        results.append([parameter.grad.clone() for parameter in network.parameters()])
    torch.testing.assert_close(*results)

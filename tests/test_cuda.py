"""On a GPU: the defaults of training, that a step never waits for the device, and compiled models.

What can be shown without a GPU runs on the CPU, too, or on PyTorch's device "meta", whose tensors
have no values that one could wait for.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning import Callback, LightningModule
from losses_for_tests import LOSSES, NUM_CLASSES
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from seg_torch.commands.train import train
from seg_torch.evaluation.scorer import Scorer
from seg_torch.labels import Labels
from seg_torch.losses import base
from seg_torch.models.network import Network
from seg_torch.prediction.inference import Inference, InferenceSettings
from seg_torch.prediction.segmenter import Segmenter
from seg_torch.training.task import SegmentationTask

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = pytest.param("cuda", marks=needs_gpu)
LABELS = Labels(tuple("abcd"))
# Operations whose result, or its size, the CPU has to know.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2"}


class NoWaiting(TorchDispatchMode):
    """Refuses on the CPU what would make it wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        assert name not in WAITING, f"{name} waits for the device"
        assert not by_mask, "indexing by a mask waits for the device"
        return function(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Refuses what makes the CPU wait for a GPU; on "cpu" what would, see NoWaiting."""
    if device == "cpu":
        with pytest.MonkeyPatch.context() as patch, NoWaiting():
            patch.setattr(base, "check_labels", lambda *_: None)  # which a GPU is spared
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def small_task(loss: nn.Module, device: str) -> SegmentationTask:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    network = Network(model)
    precision = "bf16-mixed" if device == "cuda" else "32-true"
    task = SegmentationTask(network, LABELS, loss, torch.optim.SGD)
    task.inference = Inference(
        network, NUM_CLASSES, settings=InferenceSettings(precision=precision)
    )
    return task.to(device)


def small_batch(device: str) -> tuple[Tensor, Tensor]:
    images = torch.randint(256, (2, 3, 32, 48), dtype=torch.uint8)
    masks = torch.randint(NUM_CLASSES, (2, 32, 48), dtype=torch.uint8)
    masks[:, :4] = 255
    return images.to(device), masks.to(device)


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> nn.Module:
    return LOSSES[request.param]()


@pytest.mark.parametrize(
    ("device", "where"),
    [
        ("meta", "at once"),  # where there are no values to wait for
        ("meta", "by chunks"),
        pytest.param("cuda", "at once", marks=needs_gpu),
        pytest.param("cuda", "by chunks", marks=needs_gpu),
    ],
)
def test_no_loss_lets_a_training_step_wait_for_the_device(loss, device, where, monkeypatch):
    if device == "meta":
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    memory = 1 if where == "by chunks" else 1 << 40
    monkeypatch.setattr("seg_torch.losses.upsampled.total_memory", lambda _: memory)
    task = small_task(loss, device).train()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1, foreach=device == "cuda")
    batch = small_batch(device)

    def step(index: int) -> None:
        bf16 = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()
        with bf16:
            value = task.training_step(batch, index)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    if device == "meta":
        step(0)
        return
    step(0)  # in which libraries are loaded
    with no_waiting(device):
        step(1)
    assert task.step_losses.isfinite().all()


@needs_gpu
def test_no_loss_lets_validation_wait_for_the_gpu(loss):
    task = small_task(loss, "cuda").eval()
    groups = [(*small_batch("cuda"), [0, 1])]
    with torch.no_grad():
        task.validation_step(groups, 0)
        with no_waiting("cuda"):
            task.validation_step(groups, 1)
    assert task.confusion.compute().sum() == 2 * (groups[0][1] != 255).sum()


class NoWaitingInSteps(Callback):
    """Forbids it from the start of each step to the end of the task's part of it, but the last."""

    def __init__(self, device: str, patch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        inner = SegmentationTask.on_train_batch_end

        def after(task: SegmentationTask, *arguments: Any) -> None:
            inner(task, *arguments)
            if self.context is not None:
                self.context.__exit__(None, None, None)
                self.steps += 1

        patch.setattr(SegmentationTask, "on_train_batch_end", after)
        self.forbid = partial(no_waiting, device)
        self.context: Any = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_index) -> None:  # type: ignore[no-untyped-def]
        # The losses are looked at after the last; the first loads libraries.
        inside = 0 < batch_index < trainer.num_training_batches - 1
        self.context = self.forbid() if inside else None
        if self.context is not None:
            self.context.__enter__()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_nothing_in_a_run_waits_for_the_device_in_a_step(small, device, monkeypatch):
    """Lightning, its progress bar, callbacks, clipping and the optimizer included."""
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    callback = NoWaitingInSteps(device, monkeypatch)
    monkeypatch.setattr(
        "seg_torch.training.build.SampleSheet", lambda folder: callback
    )  # in the place of one that does nothing in training
    settings = ("data.dataset.train=20", "trainer.max_epochs=1", "logger=none", "loss=ce_dice")
    gpu = ("trainer.accelerator=gpu", "trainer.devices=1", "trainer.precision=auto")
    try:
        train(small("train", *settings, *(gpu if device == "cuda" else ())))
    finally:
        if callback.context is not None:  # or all tests after this one would fail, too
            callback.context.__exit__(None, None, None)
    assert callback.steps == 3


# The defaults


@needs_gpu
def test_a_gpu_trains_in_half_precision_with_one_fused_optimizer_pass(small, monkeypatch):
    seen: list[Any] = []
    start = SegmentationTask.on_train_start

    def note(task: SegmentationTask) -> None:
        start(task)
        seen.append((task.trainer.precision, task.optimizers().optimizer.defaults["fused"]))
        loader = task.trainer.train_dataloader
        assert loader.pin_memory
        assert next(iter(task.trainer.datamodule.val_dataloader()))[0][0].is_pinned()

    monkeypatch.setattr(SegmentationTask, "on_train_start", note)
    train(small("train", "trainer.accelerator=auto", "trainer.devices=1", "trainer.precision=auto"))
    half = "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"
    assert seen == [(half, True)]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", ["unet_random", "deeplabv3"])
def test_the_memory_format_stays_channels_last_from_layer_to_layer(compose, name, device):
    weights = "model.weights=null"
    model = instantiate(compose("train", f"model={name}", weights).model, num_classes=3)
    network = Network(model).to(device).train()
    wrong = []

    def look(layer: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if not output.is_contiguous(memory_format=torch.channels_last):
            wrong.append(layer)

    for layer, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(partial(look, layer))
    network(torch.zeros(2, 3, 64, 96, dtype=torch.uint8, device=device))
    assert not wrong


def test_cudnn_tries_algorithms_in_training_alone_and_only_if_asked(small, monkeypatch, tmp_path):
    seen = set()
    steps = [
        (SegmentationTask, "training_step"),
        (SegmentationTask, "validation_step"),
        (Scorer, "test_step"),
    ]
    for module, name in steps:
        inner = getattr(module, name)

        def note(task: LightningModule, *arguments: Any, name: str = name, inner=inner) -> Any:  # type: ignore[no-untyped-def]
            seen.add((name, torch.backends.cudnn.benchmark))
            return inner(task, *arguments)

        monkeypatch.setattr(module, name, note)
    one_epoch = ("trainer.max_epochs=1", "logger=none")
    train(small("train", *one_epoch))
    assert {tried for _, tried in seen} == {False}
    seen.clear()
    train(small("train", *one_epoch, "trainer.benchmark=true", f"output_dir={tmp_path}"))
    rest = {("validation_step", False), ("test_step", False)}
    assert seen == {("training_step", True), *rest}


@needs_gpu
def test_a_gpu_gives_the_losses_of_the_cpu(loss):
    batch = small_batch("cpu")
    torch.manual_seed(0)
    task = small_task(loss, "cpu").train()
    on_cpu = task.training_step(batch, 0)
    on_gpu = task.cuda().training_step(tuple(part.cuda() for part in batch), 0)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-2, atol=1e-2)  # TensorFloat-32


@needs_gpu
def test_a_deterministic_run_on_a_gpu_resumes_bit_for_bit(small, tmp_path):
    gpu = ("trainer.accelerator=gpu", "trainer.devices=1", "trainer.precision=auto")
    # No schedule, which would be as long as each run.
    settings = (*gpu, "trainer.deterministic=true", "scheduler=none", "logger=none")
    whole, parts = (f"output_dir={tmp_path / name}" for name in ("whole", "parts"))
    train(small("train", *settings, whole))
    train(small("train", *settings, parts, "trainer.max_epochs=1"))
    cfg = OmegaConf.merge(
        OmegaConf.load(tmp_path / "parts/config.yaml"), {"resume": str(tmp_path / "parts")}
    )
    cfg.trainer.max_epochs = 2
    train(cfg)
    first, second = (
        Segmenter.load(tmp_path / n / "checkpoints/last.ckpt", "cpu").network.state_dict()
        for n in ("whole", "parts")
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_a_model_compiled_for_a_gpu_trains_as_it_does_without(small, tmp_path, mode):
    gpu = ("trainer.accelerator=gpu", "trainer.devices=1", "trainer.precision=32", "logger=none")
    rows = []
    for compiled in ("null", mode):
        folder = tmp_path / compiled
        train(small("train", *gpu, f"trainer.compile={compiled}", f"output_dir={folder}"))
        lines = (folder / "metrics.csv").read_text().splitlines()
        rows.append([float(line.split(",")[3]) for line in lines[1:]])
    assert rows[0] == pytest.approx(rows[1], rel=0.05)

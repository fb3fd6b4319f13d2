"""What the processes that test_distributed.py starts run and import: data, models, and a script."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from lightning import Callback
from omegaconf import OmegaConf
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from seg_torch.data.module import SegmentationDataModule
from seg_torch.datasets import base, folder, shapes, write_folder
from seg_torch.distributed import Processes
from seg_torch.evaluation.scorer import Scorer
from seg_torch.images.read import read_image
from seg_torch.labels import Labels
from seg_torch.losses import CrossEntropyLoss
from seg_torch.models.network import Network
from seg_torch.prediction.inference import Inference, InferenceSettings
from seg_torch.training.task import SegmentationTask
from seg_torch.training.trainer import build_trainer

# Scores


class Numbers(Dataset):
    """Images of several sizes whose pixels are what `ReadsNumbers` predicts for them."""

    labels = Labels(("a", "b", "c"))

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple:
        rng = np.random.default_rng(index)
        size = (32 + 8 * (index % 3), 40)
        image, mask = rng.integers(0, 3, size, np.uint8), rng.integers(0, 3, size, np.uint8)
        mask[rng.random(size) < 0.1 * index] = 255
        if index == 1:
            mask[:] = 255
        return base.as_sample(np.stack([image] * 3, 2), mask)


class ReadsNumbers(nn.Module):
    """Logits by the distance of a pixel's value to the class."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return -((255 * x[:, :1] - torch.arange(3.0).view(1, 3, 1, 1)) ** 2)


def scored(length: int, batch_size: int, devices: int | str = "auto") -> dict:
    """The scores of validation and test, as this process knows them."""
    settings = {"accelerator": "cpu", "devices": devices, "num_nodes": 1, "precision": "32-true"}
    cfg = OmegaConf.create({"trainer": settings})
    trainer = build_trainer(cfg, Processes(cfg.trainer), Path("."))
    data = SegmentationDataModule(
        lambda split: Numbers(length), eval_batch_size=batch_size, num_workers=0
    )
    network = Network(ReadsNumbers())
    task = SegmentationTask(network, Numbers.labels, CrossEntropyLoss(), torch.optim.SGD)
    trainer.validate(task, datamodule=data, verbose=False)
    validation = {name: value.item() for name, value in trainer.callback_metrics.items()}
    inference = Inference(network, 3, settings=InferenceSettings(precision="32-true"))
    scorer = Scorer(inference, Numbers.labels, average_precision=True, boundary=True)
    trainer.test(scorer, datamodule=data, verbose=False)
    results = scorer.results
    images = {name: np.nan_to_num(values).tolist() for name, values in results.images.items()}
    return {"validation": validation, "test": results.scores, "images": images}


# BatchNorm


def batchnorm_step(images: Tensor, synchronised: bool) -> dict[str, Tensor]:
    """Outputs, running statistics and gradients of a training step, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), BatchNormAct2d(4)
    )
    network = Network(model).train().double().to(images.device)
    if synchronised:
        convert_sync_batchnorm(network)
    output = network(images)["out"]
    output.square().mean().backward()
    if synchronised:
        for parameter in network.parameters():  # as DistributedDataParallel does
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()
    gradients = {f"gradient of {n}": p.grad for n, p in network.named_parameters()}
    results = {"output": output, **dict(network.named_buffers()), **gradients}
    return {name: value.detach().cpu() for name, value in results.items() if value is not None}


def let_pytorch_synchronise_on_the_cpu() -> None:
    """PyTorch's SyncBatchNorm has kernels for GPUs alone; these are the five by their definitions.

    The module, and what its processes tell each other, are PyTorch's own.
    """
    torch._C._get_privateuse1_backend_name = lambda: "cpu"  # of the devices that it lets through
    library = torch.library.Library("aten", "IMPL")

    def channels(x: Tensor) -> tuple[int, ...]:
        return (0, *range(2, x.ndim))

    def column(x: Tensor) -> Tensor:
        return x[:, None, None]

    def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return x.mean(channels(x)), (x.var(channels(x), correction=0) + eps).rsqrt()

    def gather(x, means, invstds, running_mean, running_var, momentum, eps, counts):  # type: ignore[no-untyped-def]
        counts = counts[:, None]
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        square = (counts * (invstds**-2 - eps + means**2)).sum(0) / total
        variance = square - mean**2
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * total / (total - 1), momentum)
        return mean, (variance + eps).rsqrt()

    def elemt(x, weight, bias, mean, invstd, eps):  # type: ignore[no-untyped-def]
        return (x - column(mean)) * column(invstd * weight) + column(bias)

    def backward_reduce(gradient, x, mean, invstd, weight, *_):  # type: ignore[no-untyped-def]
        total = gradient.sum(channels(x))
        projected = (gradient * (x - column(mean))).sum(channels(x))
        return total, projected, projected * invstd, total.clone()

    def backward_elemt(gradient, x, mean, invstd, weight, total, projected, counts):  # type: ignore[no-untyped-def]
        count = counts.sum()
        centred = (x - column(mean)) * column(invstd**2 * projected / count)
        return (gradient - column(total / count) - centred) * column(invstd * weight)

    library.impl("batch_norm_stats", stats, "CPU")
    library.impl("batch_norm_gather_stats_with_counts", gather, "CPU")
    library.impl("batch_norm_elemt", elemt, "CPU")
    library.impl("batch_norm_backward_reduce", backward_reduce, "CPU")
    library.impl("batch_norm_backward_elemt", backward_elemt, "CPU")
    globals()["_kept"] = library  # they last as long as it does


# Training


class FreezeBatchNorm(Callback):
    """Leaves the running statistics as they are in training, and normalises by them.

    At its end they differ between the processes, as they do where they are not synchronised.
    """

    def on_train_batch_start(self, trainer, pl_module, batch, batch_index) -> None:  # type: ignore[no-untyped-def]
        for module in batchnorms(pl_module):
            module.eval()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_index) -> None:  # type: ignore[no-untyped-def]
        if batch_index + 1 == trainer.num_training_batches:
            for module in batchnorms(pl_module):
                module.running_mean += trainer.global_rank


def batchnorms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def note(what: str) -> None:
    """Adds a line to a file, whichever process it is."""
    with Path(os.environ["NOTES"]).open("a") as file:
        file.write(f"{what}\n")


class Counted(base.SegmentationDataset):
    """Notes whose mask is read to be counted. Training does not come this way."""

    def mask(self, index: int) -> np.ndarray:
        note(f"counted {self.pairs[index].name}")
        return super().mask(index)

    def __getitem__(self, index: int) -> tuple:
        pair = self.pairs[index]
        return base.as_sample(read_image(pair.image), self.read_mask(pair.mask))


SPLITS = {"train": 83, "val": 5, "test": 3}


def downloaded(root: str, split: str, download: bool = False) -> Counted:
    """A dataset in files that can be fetched: 83 images to train, 5 to validate, 3 to test."""
    home = Path(root.replace("MACHINE", os.environ.get("GROUP_RANK", "0")))
    if download and not home.exists():
        note("downloaded")
        samples = shapes("train", 32, train=sum(SPLITS.values()))
        write_folder([samples[i] for i in range(len(samples))], samples.labels, home)
        time.sleep(1)  # in which another process might find it there, but incomplete
        first = 0
        for name, length in SPLITS.items():
            numbers = range(first, first + length)
            (home / f"{name}.txt").write_text("".join(f"{i:04d}\n" for i in numbers))
            first += length
    found = folder(home, split)
    return Counted(found.pairs, found.labels, found.read_mask)


if __name__ == "__main__":
    results, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    scores = [scored(length, batch_size) for length, batch_size in cases]
    (results / f"scores-{rank}.json").write_text(json.dumps(scores))
    if not torch.cuda.is_available():
        let_pytorch_synchronise_on_the_cpu()
    images = torch.load(results / "images.pt").to("cuda" if torch.cuda.is_available() else "cpu")
    step = batchnorm_step(images[rank::world], synchronised=True)
    torch.save(step, results / f"batchnorm-{rank}.pt")

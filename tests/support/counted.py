"""A training whose images, steps and validations are counted: numbered images, a tiny model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors

from seg_torch.data.module import SegmentationDataModule
from seg_torch.distributed import Processes
from seg_torch.files import CONFIG_FOLDER
from seg_torch.labels import Labels
from seg_torch.losses import CrossEntropyLoss
from seg_torch.models.network import Network
from seg_torch.training.task import SegmentationTask
from seg_torch.training.trainer import build_trainer

LABELS = Labels(("left", "right"))
SIZES = {"train": 8, "val": 6, "test": 4}  # batches of 2


class Numbered(Dataset):
    """Images of 32 x 32 whose red value is their number; the right half is class 1."""

    labels = LABELS

    def __init__(self, split: str = "train") -> None:
        self.split = split

    def __len__(self) -> int:
        return SIZES[self.split]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image = torch.full((3, 32, 32), index, dtype=torch.uint8)
        return tv_tensors.Image(image), tv_tensors.Mask(self.mask(index))

    def mask(self, index: int) -> Tensor:
        mask = torch.zeros(32, 32, dtype=torch.uint8)
        mask[:, 16:] = 1
        return mask


def augment(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Makes the green value a random number."""
    image = image.clone()
    image[1] = torch.randint(256, ())
    return image, mask


@dataclass
class Counter(Callback):
    """Counts.

    Attributes:
        train: Of each epoch, each batch's (number, random number) of its images.
        val: Of each validation, the numbers of its images.
        after: The batches that each validation came after.
        tried: Numbers of the images of the validation before training.
        tested: Numbers of the images that were scored.
        steps: Of the optimizer.
    """

    train: list[list[list[tuple[int, int]]]] = field(default_factory=list)
    val: list[list[int]] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    tried: list[int] = field(default_factory=list)
    tested: list[int] = field(default_factory=list)
    steps: int = 0

    def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
        self.train.append([])

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, index: int) -> None:
        images = batch[0]
        self.train[-1].append([(int(i[0, 0, 0]), int(i[1, 0, 0])) for i in images])

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.steps = trainer.global_step

    def on_validation_start(self, trainer: Any, task: Any) -> None:
        if not trainer.sanity_checking:
            self.val.append([])
            self.after.append(sum(map(len, self.train)))

    def on_validation_batch_start(self, trainer: Any, task: Any, batch: Any, *_: Any) -> None:
        seen = self.tried if trainer.sanity_checking else self.val[-1]
        seen += [number for *_, numbers in batch for number in numbers]

    def on_test_batch_start(self, trainer: Any, task: Any, batch: Any, *_: Any) -> None:
        self.tested += [number for *_, numbers in batch for number in numbers]

    @property
    def numbers(self) -> list[list[int]]:
        """Of each epoch, the numbers of its images."""
        return [[n for batch in epoch for n, _ in batch] for epoch in self.train]


def data_of_numbers(**settings: Any) -> SegmentationDataModule:
    """The data of `Numbered`, two images a batch."""
    settings = {"batch_size": 2, "eval_batch_size": 2, "num_workers": 0, **settings}
    return SegmentationDataModule(Numbered, augment=augment, **settings)


def pixelwise() -> Network:
    """A model of one convolution that sees a pixel."""
    torch.manual_seed(0)
    return Network(nn.Conv2d(3, 2, 1))


def counted_task(network: Network | None = None, **settings: Any) -> SegmentationTask:
    """What trains it, by steps of length 1 against the gradient."""
    optimizer: Callable = partial(torch.optim.SGD, lr=1.0)
    arguments = {"loss": CrossEntropyLoss(), "optimizer": optimizer, **settings}
    return SegmentationTask(network or pixelwise(), LABELS, **arguments)


def counted_trainer(folder: Path, counter: Counter, **options: Any) -> Trainer:
    """The Trainer of `train` with its defaults, but for some options, on the CPU."""
    defaults = OmegaConf.load(CONFIG_FOLDER / "trainer/default.yaml")
    settings = {"accelerator": "cpu", "devices": 1, "precision": "32-true", **options}
    cfg = OmegaConf.create({"trainer": OmegaConf.merge(defaults, settings)})
    return build_trainer(cfg, Processes(cfg.trainer), folder, [counter])


def count(folder: Path, max_steps: int = -1, **options: Any) -> Counter:
    """Trains with some options of `conf/trainer`."""
    counter = Counter()
    trainer = counted_trainer(folder, counter, max_steps=max_steps, **options)
    trainer.fit(counted_task(max_steps=max_steps), datamodule=data_of_numbers())
    return counter

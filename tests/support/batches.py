"""What the tests of `seg_torch.data` share: a small dataset, its batches, a stub of a trainer."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from seg_torch.data.module import SegmentationDataModule
from seg_torch.datasets import shapes


def small_shapes(split: str):
    return shapes(split, size=32, train=11, val=5, test=3)


def epoch(module: SegmentationDataModule, number: int) -> list[torch.Tensor]:
    return [tensor for batch in loader_at(module, number) for tensor in batch]


def loader_at(module: SegmentationDataModule, epoch: int):
    loader = module.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return loader


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def trainer_stub(device="cpu", num_devices=1, local_rank=0, barrier=lambda: None):
    return SimpleNamespace(
        num_devices=num_devices,
        node_rank=0,
        local_rank=local_rank,
        global_rank=local_rank,
        world_size=num_devices,
        overfit_batches=0,
        strategy=SimpleNamespace(
            root_device=torch.device(device), barrier=barrier, broadcast=lambda name: "a-name"
        ),
    )

"""The moving average of the weights: what is averaged, and what is not."""

import torch
from counted import counted_task, counted_trainer, data_of_numbers
from torch import nn

from seg_torch.models.network import Network
from seg_torch.training.averaging import WeightAverage


class WithTables(nn.Module):
    """Counts its batches; has a table of indices, as Swin transformers have, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)
        self.register_buffer("index", torch.arange(169))
        self.register_buffer("visible", torch.arange(169) % 3 == 0)
        self.register_buffer("batches", torch.tensor(0))
        self.register_buffer("level", torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.batches += 1
            self.level += 1
        return self.layer(x)


def test_e13_only_floating_point_numbers_are_averaged(tmp_path):
    """At this decay PyTorch's own function changes 29 of the 170 indices of a Swin."""
    network = Network(WithTables())
    first = network.model.layer.weight.detach().clone()
    average = WeightAverage(0.9999, torch.device("cpu"))
    trainer = counted_trainer(tmp_path, average, max_epochs=2, num_sanity_val_steps=0)
    task = counted_task(network)
    trainer.fit(task, datamodule=data_of_numbers())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    found = torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(found["network.model.index"], torch.arange(169))
    assert torch.equal(found["network.model.visible"], torch.arange(169) % 3 == 0)
    assert found["network.model.batches"] == 8
    assert 1 < found["network.model.level"] < 1.01  # begins with that of the first step
    assert (found["network.model.layer.weight"] - first).abs().max() > 0

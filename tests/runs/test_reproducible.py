"""The same seed gives the same run, and trainer.deterministic keeps its word."""

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from models_for_tests import Calls
from test_training import plain_content
from torch import Tensor, nn

from seg_torch.commands.train import train
from seg_torch.errors import InputError
from seg_torch.metrics import ConfusionMatrix

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def leave_no_trace():
    yield
    torch.use_deterministic_algorithms(False)


# The seed

# With all of the augmentation, and the precision that the hardware is given by default.
RUN = (
    "model.encoder=mobilenetv2_050",
    "data.dataset.size=48",
    "data.dataset.train=12",
    "data.dataset.val=2",
    "data.dataset.test=1",
    "data.batch_size=4",
    "data.cache=none",  # as for datasets in files: workers read and augment
    "data.augment.crop=[32,32]",
    "data.augment.jitter=0.25",
    "data.augment.paste=0.5",
    "data.sample=rare",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "logger=none",
)


def results(folder: Path) -> dict[str, Any]:
    """The values of last.ckpt by their paths, and the texts of the scores."""
    values: dict[str, Any] = plain_content(folder)
    del values["/seg_torch/data/num_workers"]
    for name in ("metrics.csv", "test_metrics.json"):
        values[name] = (folder / name).read_text()
    return values


def different(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    assert first.keys() == second.keys()
    return [
        key
        for key, value in first.items()
        if not (
            torch.equal(value, second[key]) if isinstance(value, Tensor) else value == second[key]
        )
    ]


@pytest.mark.promise(25)
def test_a_seed_gives_the_same_checkpoint_twice_and_with_0_1_and_4_workers(compose, tmp_path):
    def run(name: str, *overrides: str) -> dict[str, Any]:
        train(compose("train", *RUN, f"output_dir={tmp_path / name}", *overrides))
        return results(tmp_path / name)

    line = [ROOT / "train.py", *RUN, "data.num_workers=1", f"output_dir={tmp_path / 'process'}"]
    code, output = Forked(line).finish()
    assert code == 0, output
    reference = results(tmp_path / "process")
    for workers in (0, 4):
        assert not different(run(f"workers_{workers}", f"data.num_workers={workers}"), reference)
    weights = {key for key in reference if key.startswith("/state_dict/") and "mean" not in key}
    changed = different(run("other_seed", "data.num_workers=0", "seed=1"), reference)
    assert len(weights & {*changed}) > len(weights) / 2


# trainer.deterministic; that no model calls what it refuses is in test_models.py


class Overwrites(nn.Module):
    """Calls what has no deterministic implementation on any device, a CPU included."""

    def __init__(self, num_classes: int, **_: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.conv(x)
        if self.training:
            logits = logits.contiguous().put_(torch.zeros(2, dtype=torch.int64), torch.ones(2))
        return logits


@pytest.mark.promise(25)
def test_an_operation_that_is_never_deterministic_is_named_before_the_first_step(small, tmp_path):
    """With the way out, which works in the folder that the refused run was to have."""
    model = "model._target_=test_reproducible.Overwrites"
    options = (model, "trainer.max_epochs=1", "logger=none")
    with pytest.raises(InputError, match=r"put_, which .*trainer\.deterministic=warn"):
        train(small("train", *options, "trainer.deterministic=true"))
    assert not list((tmp_path / "run/checkpoints").glob("*"))
    with pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
        train(small("train", *options, "trainer.deterministic=warn"))
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()


@pytest.mark.promise(25)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_deterministic_scores_cost_no_more_operations_however_many_classes(device):
    """torchmetrics' confusion matrix then makes one pass over the pixels for each of its cells."""

    def operations(num_classes: int) -> int:
        labels = torch.zeros(1, 64, 64, dtype=torch.uint8, device=device)
        confusion = ConfusionMatrix(num_classes).to(device)
        with Calls() as calls:
            confusion.update(labels.long(), labels)
        return calls.counts.total()

    expected = operations(2)
    torch.use_deterministic_algorithms(True)
    assert operations(2) == operations(200) == expected

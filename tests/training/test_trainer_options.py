"""Each option of `conf/trainer` about loaders, steps and time does what its comment says.

Eight training images in batches of two, six to validate on: counted, not asked for.
"""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from counted import (
    Counter,
    count,
    counted_task,
    counted_trainer,
    data_of_numbers,
    pixelwise,
)
from lightning import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn import functional

ALL = list(range(8))
VAL = list(range(6))


def test_by_default_each_epoch_trains_on_all_images_in_another_order_and_is_validated(tmp_path):
    found = count(tmp_path, max_epochs=2)
    assert [sorted(numbers) for numbers in found.numbers] == [ALL, ALL]
    assert found.numbers[0] != found.numbers[1]
    assert found.val == [VAL, VAL]
    assert found.after == [4, 8]
    assert found.tried == [0, 1]  # one batch of validation before training
    assert found.steps == 8


@pytest.mark.parametrize(
    ("options", "images"),
    [
        ({"limit_train_batches": 3}, 6),
        ({"limit_train_batches": 0.5}, 4),
        ({"limit_train_batches": 1}, 2),
        ({"limit_train_batches": 1.0}, 8),
    ],
)
def test_limit_train_batches_is_a_number_of_batches_or_a_share(tmp_path, options, images):
    found = count(tmp_path, max_epochs=1, **options)
    assert len(set(found.numbers[0])) == images
    assert found.steps == images // 2
    assert found.val == [VAL]


@pytest.mark.parametrize(
    ("options", "images"),
    [({"limit_val_batches": 1}, [0, 1]), ({"limit_val_batches": 0.7}, [0, 1, 2, 3])],
)
def test_limit_val_batches_is_a_number_of_batches_or_a_share(tmp_path, options, images):
    found = count(tmp_path, max_epochs=1, **options)
    assert found.val == [images]
    assert sorted(found.numbers[0]) == ALL


def test_limit_val_batches_of_0_is_no_validation(tmp_path):
    found = count(tmp_path, max_epochs=1, limit_val_batches=0)
    assert (found.val, found.tried, found.steps) == ([], [], 4)


def test_e09_overfit_batches_repeats_the_same_images_with_the_same_augmentation(tmp_path):
    """Lightning repeats those of a loader with a `sampler`; ours has a batch sampler."""
    found = count(tmp_path, max_epochs=3, overfit_batches=2)
    first, *others = found.train
    assert others == [first, first]
    assert len({number for batch in first for number, _ in batch}) == 4
    assert found.val == [[0, 1, 2, 3]] * 3  # as many batches of the validation images
    assert found.steps == 6


def test_e09_a_batch_of_them_is_rebuilt_as_it_was(tmp_path):
    counter, data = Counter(), data_of_numbers()
    trainer = counted_trainer(tmp_path, counter, max_epochs=2, overfit_batches=2)
    trainer.fit(counted_task(), datamodule=data)
    numbers, samples = data.rebuild_batch("train", epoch=1, batch=1, rank=0)
    found = [(int(image[0, 0, 0]), int(image[1, 0, 0])) for image, _ in samples]
    assert found == counter.train[1][1]
    assert numbers == [number for number, _ in found]


class Batches(Callback):
    """Keeps what is trained on, and the weights after each batch."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.weights: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.batches.append(batch)
        self.weights.append(task.network.model.weight.detach().clone())


def gradient(weight: Tensor, bias: Tensor, network: Any, images: Tensor, masks: Tensor) -> Any:
    """Of the mean cross-entropy over the pixels, with PyTorch's own functions."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    x = (images / 255 - network.mean) / network.std
    loss = functional.cross_entropy(functional.conv2d(x, weight, bias), masks.long())
    return torch.autograd.grad(loss, (weight, bias))


def test_e69_each_step_follows_the_mean_of_its_batches_also_the_last_with_fewer(tmp_path):
    """Four batches, three for a step: the fourth alone would count a third."""
    network, seen = pixelwise(), Batches()
    weight, bias = (p.detach().clone() for p in network.model.parameters())
    trainer = counted_trainer(tmp_path, seen, max_epochs=2, accumulate_grad_batches=3)
    trainer.fit(counted_task(network), datamodule=data_of_numbers())
    assert trainer.global_step == 4
    assert len(seen.batches) == 8
    for batches in ((0, 1, 2), (3,), (4, 5, 6), (7,)):
        of_batches = [gradient(weight, bias, network, *seen.batches[i]) for i in batches]
        of_weight, of_bias = (torch.stack(parts).mean(0) for parts in zip(*of_batches, strict=True))
        weight, bias = weight - of_weight, bias - of_bias  # the learning rate is 1
        torch.testing.assert_close(seen.weights[batches[-1]], weight, rtol=1e-3, atol=1e-4)


def test_check_val_every_n_epoch_counts_epochs(tmp_path):
    found = count(tmp_path, max_epochs=5, check_val_every_n_epoch=2, limit_train_batches=1)
    assert found.after == [2, 4]


@pytest.mark.parametrize(
    ("options", "after"),
    [
        ({"val_check_interval": 0.5}, [2, 4, 6, 8]),
        ({"val_check_interval": 2, "accumulate_grad_batches": 2}, [2, 4, 6, 8]),  # batches
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 6]),  # across epochs
    ],
)
def test_val_check_interval_is_a_share_of_the_epoch_or_a_number_of_batches(
    tmp_path, options, after
):
    assert count(tmp_path, max_epochs=2, limit_val_batches=1, **options).after == after


@pytest.mark.parametrize("max_epochs", [-1, 2])
def test_max_steps_counts_steps_of_the_optimizer_and_validates_the_last(tmp_path, max_epochs):
    options = {"max_epochs": max_epochs, "accumulate_grad_batches": 2, "limit_val_batches": 1}
    found = count(tmp_path, max_steps=3, **options)
    assert found.steps == 3
    assert list(map(len, found.train)) == [4, 2]
    assert found.after == [4, 6]


def test_max_time_ends_a_training_without_end(tmp_path):
    begun = time.monotonic()
    found = count(tmp_path, max_epochs=-1, max_time="00:00:00:01", limit_val_batches=0)
    assert found.steps > 0
    assert 1 <= time.monotonic() - begun < 30


@pytest.mark.parametrize(("batches", "tried"), [(0, []), (2, [0, 1, 2, 3]), (-1, VAL)])
def test_num_sanity_val_steps_are_batches_before_training(tmp_path, batches, tried):
    options = {"max_epochs": 1, "limit_train_batches": 1, "num_sanity_val_steps": batches}
    assert count(tmp_path, **options).tried == tried


class Steps(Logger):
    """Keeps the steps of which the training loss was logged."""

    name, version, steps = "steps", "0", []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "train/loss" in metrics:
            self.steps.append(step)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def test_log_every_n_steps_is_for_the_loggers(tmp_path):
    logger = Steps()
    trainer = counted_trainer(tmp_path, Counter(), max_epochs=2, log_every_n_steps=3)
    trainer.loggers = [logger]
    trainer.fit(counted_task(), datamodule=data_of_numbers())
    assert logger.steps == [2, 5]  # of 0 to 7


@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
def test_gradients_are_clipped_by_their_norm_or_each_value(tmp_path, algorithm):
    network = pixelwise()
    before = nn.utils.parameters_to_vector(network.parameters())
    options = {"gradient_clip_val": 0.001, "gradient_clip_algorithm": algorithm}
    trainer = counted_trainer(tmp_path, Counter(), max_epochs=1, limit_train_batches=1, **options)
    trainer.fit(counted_task(network), datamodule=data_of_numbers())
    moved = before - nn.utils.parameters_to_vector(network.parameters())
    size = moved.abs().max() if algorithm == "value" else moved.norm()
    assert size.item() == pytest.approx(0.001, rel=1e-3)


class NanGradient(nn.Module):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return (logits * 0).sum().sqrt()


def test_detect_anomaly_names_the_operation_that_gave_nan(tmp_path):
    options = {"max_epochs": 1, "detect_anomaly": True, "num_sanity_val_steps": 0}
    trainer = counted_trainer(tmp_path, Counter(), **options)
    with pytest.raises(RuntimeError, match="MulBackward0' returned nan"):
        trainer.fit(counted_task(loss=NanGradient()), datamodule=data_of_numbers())


@pytest.mark.parametrize(
    ("profiler", "text"),
    [("simple", "run_training_batch"), ("advanced", "function calls")],
)
def test_a_profiler_leaves_a_file_in_the_folder_of_the_run(tmp_path, profiler, text):
    """Lightning logs what it found, and the commands do not show what Lightning logs."""
    options = {"max_epochs": 1, "limit_train_batches": 1, "profiler": profiler}
    count(tmp_path, **options)
    (file,) = Path(tmp_path).glob("fit-profile*.txt")
    assert text in file.read_text()


def test_limit_test_batches_is_scored_alone(tmp_path):
    from seg_torch.evaluation.scorer import Scorer
    from seg_torch.prediction.inference import Inference

    counter = Counter()
    trainer = counted_trainer(tmp_path, counter, limit_test_batches=1)
    scorer = Scorer(Inference(pixelwise(), 2), counted_task().labels)
    trainer.test(scorer, datamodule=data_of_numbers(), verbose=False)
    assert counter.tested == [0, 1]
    assert sum(map(sum, scorer.results.scores["confusion_matrix"])) == 2 * 32 * 32

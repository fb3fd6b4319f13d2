"""The task by itself: from Python, with a model of the user's, an encoder frozen for a while."""

import copy
import itertools
import logging
from functools import partial
from typing import Any

import pytest
import torch
from counted import (
    LABELS,
    Counter,
    counted_task,
    counted_trainer,
    data_of_numbers,
    pixelwise,
)
from lightning import Callback, Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from seg_torch.errors import InputError
from seg_torch.evaluation.scorer import Scorer
from seg_torch.losses import CrossEntropyLoss
from seg_torch.models.base import EncoderModel
from seg_torch.models.network import Network
from seg_torch.prediction.inference import Inference
from seg_torch.training.schedulers import cosine, one_cycle, poly
from seg_torch.training.task import SegmentationTask


def plain_trainer(**options: Any) -> Trainer:
    """Lightning's, as a user of Python has it."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet, **options)


def test_e40_validate_comes_before_fit_and_gives_what_a_validation_in_fit_gives():
    """`inference_mode` is on by default: what is made in it cannot be changed outside."""
    task, data, trainer = counted_task(), data_of_numbers(), plain_trainer()
    (before,) = trainer.validate(task, datamodule=data, verbose=False)
    trainer.fit(task, datamodule=data)
    after = {name: value.item() for name, value in trainer.callback_metrics.items()}
    (again,) = trainer.validate(task, datamodule=data, verbose=False)
    assert again["val/loss"] == pytest.approx(after["val/loss"])
    assert again["val/mean_iou"] == pytest.approx(after["val/mean_iou"])
    assert before["val/loss"] != pytest.approx(after["val/loss"])


class Interrupt(Callback):
    def on_validation_batch_end(self, *_: Any) -> None:
        raise RuntimeError("interrupted")


def test_a_validation_that_was_interrupted_counts_for_no_other():
    task, data = counted_task(), data_of_numbers()
    (expected,) = plain_trainer().validate(counted_task(), datamodule=data, verbose=False)
    with pytest.raises(RuntimeError, match="interrupted"):
        plain_trainer(callbacks=[Interrupt()]).validate(task, datamodule=data, verbose=False)
    (found,) = plain_trainer().validate(task, datamodule=data, verbose=False)
    assert found == expected


def test_e40_loaders_do_without_a_data_module():
    data, trainer = data_of_numbers(), plain_trainer()
    trainer.fit(counted_task(), data.train_dataloader(), data.val_dataloader())
    assert trainer.global_step == 4
    assert trainer.callback_metrics["val/loss"].isfinite()


def test_e40_weights_of_the_data_set_without_one_are_refused():
    data, task = data_of_numbers(), counted_task(loss=CrossEntropyLoss("dataset"))
    with pytest.raises(InputError, match="set_pixel_counts"):
        plain_trainer().fit(task, data.train_dataloader(), data.val_dataloader())


class Answering(nn.Module):
    """A user's model, which answers as `answer` has it."""

    def __init__(self, answer: Any, classes: int = 2) -> None:
        super().__init__()
        self.layer, self.answer = nn.Conv2d(3, classes, 1), answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.layer(x))


class Output:
    """As models of transformers answer."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


ANSWERS = {
    "a tuple": (lambda x: (x, x), r"Answering answers with a tuple; .* \{\"out\": logits\}"),
    "logits": (Output, "Answering answers with a Output; its forward has to return logits"),
    "a dictionary": (lambda x: {"logits": x}, r"a dict of logits \[.*\]; its forward"),
    "flat": (lambda x: x.flatten(1), r"a tensor of shape \[\d+, \d+\]; its forward"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_e40_a_model_that_answers_otherwise_is_told_what_is_expected(kind):
    answer, message = ANSWERS[kind]
    task = counted_task(Network(Answering(answer)))
    with pytest.raises(InputError, match=message):
        plain_trainer(num_sanity_val_steps=0).fit(task, datamodule=data_of_numbers())


@pytest.mark.parametrize("classes", [1, 3])
def test_e40_a_wrong_number_of_outputs_is_the_models_not_the_datas(classes):
    task = counted_task(Network(Answering(lambda x: x, classes)))
    text = f"Answering gives logits of {classes} classes for data of 2 classes"
    with pytest.raises(InputError, match=text):
        plain_trainer().fit(task, datamodule=data_of_numbers())


class OwnModes(nn.Module):
    """Answers as it should; a part of it stays in evaluation mode; takes one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2).eval()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if x.shape[-1] != 32:
            raise ValueError("images of 32 x 32, please")
        return {"out": self.norm(self.layer(x))}


def test_a_model_that_is_right_is_not_refused_and_keeps_its_modes():
    network = Network(OwnModes())
    trainer = plain_trainer()
    trainer.fit(counted_task(network), datamodule=data_of_numbers())
    assert trainer.global_step == 4
    assert (network.training, network.model.norm.training) == (True, False)
    assert network.model.norm.num_batches_tracked == 0


# An encoder that is frozen for some epochs


class Encoded(EncoderModel):
    """With an encoder as timm's are: it has BatchNorm, and says how images were normalised."""

    def __init__(self, freeze_encoder: bool | int) -> None:
        torch.manual_seed(0)
        encoder: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        encoder.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
        super().__init__(encoder, freeze_encoder)
        self.classifier = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.classifier(self.encoder(x))}


class States(Callback):
    """Keeps the weights after each epoch, and where to stop."""

    def __init__(self, stop_at: tuple[int, int] = (-1, -1)) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.stop_at = stop_at

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, index: int) -> None:
        if (trainer.current_epoch, index) == self.stop_at:
            raise KeyboardInterrupt

    def on_train_batch_end(self, trainer: Any, task: Any, *arguments: Any) -> None:
        if (trainer.current_epoch, arguments[-1] + 1) == self.stop_at:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/stopped.ckpt")

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        self.states.append(copy.deepcopy(task.network.state_dict()))


def encoder_task(freeze_encoder: bool | int, scheduler: Any) -> SegmentationTask:
    """Trains `Encoded` with AdamW, whose weight decay needs no gradient."""
    optimizer = partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1)
    network = Network(Encoded(freeze_encoder))
    return SegmentationTask(network, LABELS, CrossEntropyLoss(), optimizer, scheduler)


def fit_encoder(folder: Any, freeze_encoder: bool | int, scheduler: Any, **options: Any) -> States:
    states = States()
    trainer = counted_trainer(folder, states, max_epochs=3, **options)
    trainer.fit(encoder_task(freeze_encoder, scheduler), datamodule=data_of_numbers())
    return states


def moved(before: dict[str, Tensor], after: dict[str, Tensor], part: str) -> list[bool]:
    names = [name for name in before if name.startswith(f"model.{part}.")]
    return [not torch.equal(before[name], after[name]) for name in names]


SCHEDULES = {
    "one_cycle": one_cycle,
    "poly": poly,
    "cosine": cosine,
    "step": partial(StepLR, step_size=1),
    "plateau": partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0),
    "none": None,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_e42_an_encoder_is_frozen_for_so_many_epochs_with_every_schedule(tmp_path, name):
    first, second, third = fit_encoder(tmp_path, 2, SCHEDULES[name]).states
    start = Network(Encoded(2)).state_dict()
    assert not any(moved(start, first, "encoder") + moved(start, second, "encoder"))
    assert all(moved(second, third, "encoder"))  # with the statistics of BatchNorm
    for before, after in ((start, first), (first, second), (second, third)):
        assert all(moved(before, after, "classifier"))


@pytest.mark.parametrize(
    ("freeze_encoder", "epochs"), [(True, 3), (False, 0), (0, 0), (1, 1), (5, 3)]
)
def test_e42_true_is_for_ever_and_1_is_an_epoch(tmp_path, freeze_encoder, epochs):
    states = [Network(Encoded(freeze_encoder)).state_dict()]
    states += fit_encoder(tmp_path, freeze_encoder, poly).states
    found = [any(moved(*pair, "encoder")) for pair in itertools.pairwise(states)]
    assert found == [False] * epochs + [True] * (3 - epochs)


@pytest.mark.promise(22)
@pytest.mark.parametrize("stop_at", [(0, 2), (1, 2), (2, 2)])
def test_e42_a_run_that_is_stopped_while_it_is_frozen_or_after_goes_on_rightly(tmp_path, stop_at):
    """In the middle of an epoch, with accumulated and clipped gradients."""
    options = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    whole = fit_encoder(tmp_path, 1, one_cycle, **options)
    stopped = counted_trainer(tmp_path, States(stop_at), max_epochs=3, **options)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stopped.fit(encoder_task(1, one_cycle), datamodule=data_of_numbers())
    resumed = States()
    trainer = counted_trainer(tmp_path, resumed, max_epochs=3, **options)
    last = tmp_path / "stopped.ckpt"
    task = encoder_task(1, one_cycle)
    trainer.fit(task, datamodule=data_of_numbers(), ckpt_path=last, weights_only=True)
    for name, value in whole.states[-1].items():
        assert torch.equal(resumed.states[-1][name], value), name


@pytest.mark.parametrize("value", [-1, 1.5, "yes"])
def test_e42_an_impossible_number_of_epochs_is_refused(value):
    with pytest.raises(InputError, match=f"model.freeze_encoder={value}: expected true, false or"):
        Encoded(value)


# Scores


def test_e68_test_returns_the_scores_and_logs_them(tmp_path):
    trainer = counted_trainer(tmp_path, Counter())
    network = pixelwise()
    scorer = Scorer(Inference(network, 2), LABELS)
    (found,) = trainer.test(scorer, datamodule=data_of_numbers(), verbose=False)
    matrix = torch.zeros(2, 2)
    for index in range(4):
        image = torch.full((1, 3, 32, 32), index, dtype=torch.uint8)
        predicted = network.eval()(image)["out"].argmax(1)[0]
        for label, columns in ((0, slice(0, 16)), (1, slice(16, 32))):
            for chosen in (0, 1):
                matrix[label, chosen] += (predicted[:, columns] == chosen).sum()
    union = matrix.sum(0) + matrix.sum(1) - matrix.diag()
    assert found["test/mean_iou"] == pytest.approx((matrix.diag() / union).mean().item())
    assert found["test/pixel_accuracy"] == pytest.approx(matrix.diag().sum().item() / matrix.sum())

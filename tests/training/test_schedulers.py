"""Learning-rate schedules: their rates, when they are stepped, and wrong settings."""

import csv
import io
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import ListConfig, OmegaConf
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)

from seg_torch.commands.train import train
from seg_torch.errors import InputError
from seg_torch.files import CONFIG_FOLDER
from seg_torch.training.optimizers import PARTS
from seg_torch.training.schedulers import cosine, one_cycle, poly, scheduler_config

STEPS = 100
PARAMETER = torch.nn.Parameter(torch.zeros(1))
CHOICES = sorted(path.stem for path in (CONFIG_FOLDER / "scheduler").iterdir())


def optimizer(lr: float = 1.0) -> Optimizer:
    return SGD([PARAMETER], lr=lr, momentum=0.9)


def rates(make_scheduler, count: int = STEPS, lr: float = 1.0) -> np.ndarray:
    """The rate of each of `count` steps of a training of STEPS steps."""
    sgd = optimizer(lr)
    scheduler = scheduler_config(make_scheduler, sgd, STEPS)["scheduler"]
    values = []
    for step in range(count):
        values.append(sgd.param_groups[0]["lr"])
        sgd.step()
        if step < count - 1:
            scheduler.step()
    return np.array(values)


def test_one_cycle_reaches_its_peak_and_its_end():
    values = rates(instantiate(OmegaConf.load(CONFIG_FOLDER / "scheduler/one_cycle.yaml")))
    assert values[0] == pytest.approx(1 / 25)
    assert values.max() == pytest.approx(1)
    assert values.argmax() == 29  # step 30 of 100
    assert values[-1] == pytest.approx(1 / 25 / 1e4)


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (poly, lambda share: (1 - share) ** 0.9),
        (partial(poly, power=2), lambda share: (1 - share) ** 2),
        (cosine, lambda share: 0.5 + 0.5 * np.cos(np.pi * share)),
    ],
)
def test_rates_are_those_of_the_papers(schedule, formula):
    expected = 0.3 * formula(np.arange(STEPS) / STEPS)
    np.testing.assert_allclose(rates(schedule, lr=0.3), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (poly, partial(PolynomialLR, total_iters=STEPS, power=0.9)),
        (cosine, partial(CosineAnnealingLR, T_max=STEPS)),
    ],
)
def test_rates_are_those_of_torch(schedule, reference):
    np.testing.assert_allclose(rates(schedule), rates(reference), rtol=1e-9)


@pytest.mark.parametrize("schedule", [poly, cosine])
def test_a_finished_run_that_goes_on_gets_the_rates_of_the_longer_one(schedule):
    sgd = optimizer()
    finished = scheduler_config(schedule, sgd, STEPS)["scheduler"]
    for _ in range(STEPS):
        sgd.step()
        finished.step()
    assert sgd.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    file = io.BytesIO()
    torch.save([sgd.state_dict(), finished.state_dict()], file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)  # as checkpoints are read

    sgd = optimizer()
    longer = scheduler_config(schedule, sgd, 2 * STEPS)["scheduler"]
    sgd.load_state_dict(stored[0])
    longer.load_state_dict(stored[1])
    sgd.step()
    longer.step()
    half_way = scheduler_config(schedule, expected := optimizer(), 2 * STEPS)["scheduler"]
    for _ in range(STEPS + 1):
        expected.step()
        half_way.step()
    assert sgd.param_groups[0]["lr"] == expected.param_groups[0]["lr"] > 0.4


@pytest.mark.parametrize(
    ("make_scheduler", "interval"),
    [
        (one_cycle, "step"),
        (poly, "step"),
        (cosine, "step"),
        (partial(OneCycleLR, max_lr=1.0), "step"),
        (partial(OneCycleLR, max_lr=1.0, total_steps=7), "step"),
        (partial(StepLR, step_size=3), "epoch"),
        (partial(MultiStepLR, milestones=[2, 4]), "epoch"),
        (partial(ExponentialLR, gamma=0.9), "epoch"),
        (partial(CosineAnnealingLR, T_max=9), "epoch"),
    ],
)
def test_d14_d22_a_schedule_steps_by_what_it_is_made_for(make_scheduler, interval):
    config = scheduler_config(make_scheduler, optimizer(), STEPS)
    assert config["interval"] == interval
    assert not config["reduce_on_plateau"]


def test_total_steps_go_only_to_the_argument_of_that_name():
    assert (
        scheduler_config(partial(StepLR, step_size=3), optimizer(), STEPS)["scheduler"].step_size
        == 3
    )
    make = partial(OneCycleLR, max_lr=1.0)
    assert scheduler_config(make, optimizer(), STEPS)["scheduler"].total_steps == STEPS
    make = partial(make, total_steps=7)  # set by the user
    assert scheduler_config(make, optimizer(), STEPS)["scheduler"].total_steps == 7


@pytest.mark.parametrize(
    ("make_scheduler", "expected"),
    [
        (poly, (1 - 6 / 6) ** 0.9),  # 2 epochs of 3 steps
        (partial(StepLR, step_size=1, gamma=0.5), 0.5**2),
        (partial(MultiStepLR, milestones=[1], gamma=0.5), 0.5),
    ],
)
def test_d22_lightning_steps_each_schedule_as_often_as_it_is_made_for(
    make_scheduler, expected, tmp_path
):
    class Module(BoringModel):
        def configure_optimizers(self):
            sgd = SGD(self.parameters(), lr=1.0)
            steps = int(self.trainer.estimated_stepping_batches)
            return {
                "optimizer": sgd,
                "lr_scheduler": scheduler_config(make_scheduler, sgd, steps),
            }

    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=3,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)


class Patient(ReduceLROnPlateau):
    pass


def plateau_after(optimizer: Optimizer, total_steps: int) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, patience=total_steps)


@pytest.mark.parametrize("make", [partial(ReduceLROnPlateau, factor=0.5), Patient, plateau_after])
def test_d22_a_plateau_is_recognised_by_what_is_built(make):
    config = scheduler_config(make, optimizer(), STEPS)
    assert config["reduce_on_plateau"]
    assert config["interval"] == "epoch"
    assert config["monitor"] == "val/loss"
    assert config["strict"] is False


@pytest.mark.parametrize(
    ("make_scheduler", "message"),
    [
        (partial(StepLR, gamma=0.5), "scheduler: .*missing .*'step_size'.*step_size, gamma"),
        (partial(StepLR, step_size=3, gama=0.5), "scheduler: .*unexpected .*'gama'.*step_size"),
        (partial(poly, pwoer=2), "scheduler: .*'pwoer'.*power"),
        (partial(one_cycle, warmup=2.0), "scheduler: .*between 0 and 1"),
        (partial(ReduceLROnPlateau, factor=2.0), "scheduler: Factor should be < 1.0"),
    ],
)
def test_d14_wrong_settings_are_named(make_scheduler, message):
    with pytest.raises(InputError, match=message):
        scheduler_config(make_scheduler, optimizer(), STEPS)


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "none"])
def test_every_choice_builds_also_for_zero_steps_and_is_stored_as_plain_data(name):
    make = instantiate(OmegaConf.load(CONFIG_FOLDER / f"scheduler/{name}.yaml"))
    for total_steps in (0, STEPS):
        scheduler = scheduler_config(make, optimizer(), total_steps)["scheduler"]
        torch.save(scheduler.state_dict(), file := io.BytesIO())
        file.seek(0)
        torch.load(file, weights_only=True)


def test_none_is_no_schedule(compose):
    assert not instantiate(compose("train", "scheduler=none").scheduler)


@pytest.mark.parametrize(
    "path", sorted((CONFIG_FOLDER / "optimizer").iterdir()), ids=lambda p: p.stem
)
def test_d35_usual_settings_of_optimizers_are_listed_with_torchs_defaults(path, compose):
    config = compose("train", f"optimizer={path.stem}", "optimizer.weight_decay=0.25").optimizer
    own = {key: value for key, value in config.items() if key not in PARTS}
    built = instantiate(own)([PARAMETER])
    assert built.defaults["weight_decay"] == 0.25
    ours, torchs = instantiate(OmegaConf.load(path)), type(built)([PARAMETER]).defaults
    chosen = {"lr", "weight_decay", "momentum"}  # by this project
    for key, value in ours.keywords.items():
        assert not isinstance(value, ListConfig)  # checkpoints hold only plain data
        if key not in chosen:
            assert value == torchs[key] or tuple(value) == torchs[key], key


@pytest.mark.parametrize(("scheduler", "power"), [("poly", 0.9), ("none", 0)])
def test_e15_the_rate_that_is_logged_is_the_rate_that_is_used(small, tmp_path, scheduler, power):
    """In warm-up, too: the first four steps have a quarter, a half, ... of the scheduled rate."""
    used = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, task, optimizer):
            used.append(optimizer.param_groups[0]["lr"])

    settings = ("logger=csv", "warmup_steps=4", "trainer.log_every_n_steps=1")
    cfg = small("train", f"scheduler={scheduler}", *settings)
    with mock.patch("seg_torch.training.build.StopOnDivergence", return_value=Watch()):
        train(cfg)
    rows = list(csv.DictReader((tmp_path / "run/csv/metrics.csv").open()))
    (column,) = (name for name in rows[0] if name.startswith("lr-"))
    assert [float(row[column]) for row in rows if row[column]] == pytest.approx(used)
    rate = cfg.optimizer.lr
    scheduled = [rate * (1 - step / 6) ** power * min(1, (step + 1) / 4) for step in range(6)]
    assert used == pytest.approx(scheduled)
    # After the epoch's three steps that of the fourth, which is the last of the warm-up.
    first = next(csv.DictReader((tmp_path / "run/metrics.csv").open()))
    assert float(first["learning_rate"]) == pytest.approx(scheduled[3])

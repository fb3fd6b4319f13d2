"""From settings to the parts of a run: what is refused before the data is read."""

from typing import Any

import pytest
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping

from seg_torch.commands.train import train
from seg_torch.data import SegmentationDataModule
from seg_torch.errors import InputError
from seg_torch.training.build import check_settings

WRONG = {
    "optimizer.lr=-1": "optimizer: AdamW refuses lr=-1.*Invalid learning rate",
    "optimizer.lr=null": "optimizer: AdamW refuses lr=None",
    "optimizer.betas=[0.9]": r"optimizer: AdamW refuses .*betas=\[0.9\]",
    "optimizer.betas=[2,0.9]": "optimizer: .*Invalid beta",
    "+optimizer.momentum=0.9": r"optimizer: .*'momentum' \(its settings: lr, betas",
    "+optimizer.differentiable=true": "optimizer.differentiable=true .*leave it out",
    "optimizer=sgd optimizer.nesterov=true optimizer.momentum=0": "optimizer: .*Nesterov",
    "scheduler=step scheduler.step_size=0": r"scheduler: .*\(its settings: step_size, gamma",
    "scheduler=plateau scheduler.factor=2": "scheduler: Factor should be < 1.0",
    "scheduler=one_cycle scheduler.warmup=3": "scheduler: .*between 0 and 1",
    "scheduler=multistep +scheduler.steps=3": "scheduler: .*'steps'.*milestones",
    "trainer.limit_train_batches=0": "trainer.limit_train_batches=0: nothing would be trained",
}


@pytest.mark.parametrize("settings", WRONG)
def test_e41_what_pytorch_refuses_is_told_before_the_data_is_read(
    small, tmp_path, monkeypatch, settings
):
    def read(*_: Any) -> None:
        raise AssertionError("the data is read")

    monkeypatch.setattr(SegmentationDataModule, "dataset", read)
    with pytest.raises(InputError, match=WRONG[settings]):
        train(small("train", *settings.split()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        "optimizer=sgd optimizer.nesterov=true",
        "+optimizer.foreach=true",
        "+optimizer.amsgrad=true optimizer.betas=[0.9,0.95]",
        "scheduler=multistep",
        "scheduler=plateau",
        "scheduler=none",
        "scheduler._target_=torch.optim.lr_scheduler.OneCycleLR ~scheduler.warmup "
        "~scheduler.final_divisor +scheduler.max_lr=0.1",
    ],
)
def test_what_pytorch_takes_is_not_refused(compose, settings):
    check_settings(compose("train", *settings.split()))


def test_e41_an_optimizer_that_takes_foreach_trains(small):
    train(small("train", "+optimizer.foreach=true", "trainer.max_epochs=1", "logger=none"))


class Unfreeze(BaseFinetuning):
    """As the documentation of Lightning has it."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.network.model.encoder)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.network.model.encoder, optimizer)


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        ("test_build.Unfreeze", "model.freeze_encoder=5 trains the encoder from the sixth epoch"),
        ("lightning.pytorch.callbacks.BatchSizeFinder", "set data.batch_size"),
        ("lightning.pytorch.callbacks.LearningRateFinder", "set optimizer.lr"),
    ],
)
def test_e42_callbacks_that_break_a_run_are_refused_with_what_to_do(
    small, tmp_path, target, advice
):
    with pytest.raises(InputError, match=f"callbacks.mine: .*{advice}"):
        train(small("train", f"+callbacks.mine._target_={target}"))
    assert not (tmp_path / "run/config.yaml").exists()


def test_other_callbacks_of_lightning_work(small, tmp_path):
    names = (
        "DeviceStatsMonitor",
        "GradientAccumulationScheduler",
        "LearningRateMonitor",
        "ModelSummary",
        "ModelCheckpoint",
        "StochasticWeightAveraging",
        "Timer",
    )
    package = "lightning.pytorch.callbacks"
    options = [f"+callbacks.{name}._target_={package}.{name}" for name in names]
    options += ["+callbacks.GradientAccumulationScheduler.scheduling={1:2}", "scheduler=poly"]
    options += ["+callbacks.StochasticWeightAveraging.swa_lrs=1e-3"]
    options += [f"+callbacks.stop._target_={EarlyStopping.__module__}.EarlyStopping"]
    options += ["+callbacks.stop.monitor=val/loss"]
    train(small("train", *options))
    assert (tmp_path / "run/test_metrics.json").exists()

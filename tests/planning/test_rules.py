"""Rules of the plan, on made fingerprints."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from seg_torch.errors import InputError
from seg_torch.files import CONFIG_FOLDER
from seg_torch.planning import rules
from seg_torch.planning.fingerprint import Fingerprint
from seg_torch.planning.rules import Decision, Situation, is_given


def made(
    size: tuple[int, int] = (360, 480),
    images: int = 100,
    shares: tuple[float, ...] = (0.6, 0.4),
    thickness: tuple[float, ...] = (20.0, 20.0),
    **other: Any,
) -> Fingerprint:
    pixels = (np.array(shares) * images * size[0] * size[1]).astype(np.int64)
    fields: dict[str, Any] = {
        "names": tuple(f"c{i}" for i in range(len(shares))),
        "images": {"train": images, "val": 20},
        "sizes": np.array([size] * images),
        "pixels": pixels,
        "holders": np.full(len(shares), images),
        "thickness": np.array(thickness),
        "unlabelled": 0.0,
        "grey": False,
        "channels": 3,
        "upright": True,
    }
    return Fingerprint(**{**fields, **other})


def situation(data: Fingerprint, **other: Any) -> Situation:
    fields = {"device": "cpu", "processes": 1, "seconds": None, "pixel_rate": 1e6, "memory": 1e9}
    return Situation(data, **{**fields, **other})


@pytest.fixture
def cfg(compose) -> DictConfig:
    cfg = compose("train", "data=folder", "data.root=.")
    OmegaConf.update(cfg, "given", [], force_add=True)
    return cfg


def decided(rule: Any, cfg: DictConfig, now: Situation) -> dict[str, Decision]:
    return {decision.setting: decision for decision in rule(cfg, now)}


def sizes(cfg: DictConfig, now: Situation) -> dict[str, Decision]:
    """What the rules of the size decide, one after the other."""
    found = decided(rules.size, cfg, now)
    for decision in found.values():
        OmegaConf.update(cfg, decision.setting, decision.value)
    return found | decided(rules.crop, cfg, now)


def test_settings_of_the_user_are_told_from_others():
    given = ["data", "data.batch_size", "data.augment", "loss.gamma", "model.encoder"]
    for setting in ("data.batch_size", "data.augment.crop", "loss", "model.encoder"):
        assert is_given(setting, given), setting
    for setting in ("data.resize", "optimizer.lr", "data.batch", "model.weights"):
        assert not is_given(setting, given), setting


def test_wide_classes_let_images_be_reduced(cfg):
    # Classes of 48 pixels: a quarter of the size leaves them the 12 that are enough.
    found = sizes(cfg, situation(made((1024, 1024), thickness=(48.0, 48.0))))
    assert found["data.resize"].value == [256, 256]
    assert "48 pixels wide" in found["data.resize"].because


def test_thin_classes_keep_the_size_of_the_images(cfg):
    found = sizes(cfg, situation(made((256, 256), thickness=(8.0, 12.0))))
    assert "data.resize" not in found
    assert found["data.augment.crop"].value is None


def test_the_mean_width_is_that_of_the_thin_ones(cfg):
    # The harmonic mean of 100 and 4 is 7.7: too thin to be reduced.
    found = sizes(cfg, situation(made((400, 400), thickness=(100.0, 4.0))))
    assert "data.resize" not in found


def test_images_without_an_upright_direction_are_cropped_at_their_size(cfg):
    data = made((512, 512), thickness=(8.0, 10.0), upright=False)
    # 240 s x 1 MP/s x 0.8 for 4,500 images: 43,000 pixels of each.
    found = sizes(cfg, situation(data, seconds=240.0))
    assert "data.resize" not in found
    assert found["data.augment.crop"].value == [192, 192]
    assert found["data.augment.scale"].value is None
    data = replace(data, sizes=2 * data.sizes)
    more = sizes(cfg, situation(data, seconds=24000.0))
    assert more["data.augment.crop"].value == [512, 512]
    assert more["data.augment.scale"].value == [0.75, 1.5]
    assert decided(rules.augmentation, cfg, situation(data))["data.augment.turn"].value is True


def test_upright_ones_are_reduced_as_far_as_the_budget_asks(cfg):
    data = made((512, 512), thickness=(20.0, 20.0))
    found = sizes(cfg, situation(data, seconds=240.0))
    assert found["data.resize"].value == [192, 192]
    cfg.data.resize = None
    more = sizes(cfg, situation(data, seconds=2400.0))
    assert more["data.resize"].value == [320, 320]  # 12 pixels of 20 are enough


def test_no_class_becomes_thinner_than_it_may(cfg):
    data = made((512, 512), thickness=(8.0, 8.0))
    found = sizes(cfg, situation(data, seconds=60.0))
    assert found["data.resize"].value == [256, 256]  # 4 pixels
    # 60 s x 1 MP/s x 0.8 / 4,500 = 11,000 pixels, but no smaller ones
    assert found["data.augment.crop"].value == [128, 128]


def test_images_of_many_shapes_keep_theirs(cfg):
    shapes = np.array([[1200, 1600], [1600, 1200]] * 50)
    data = made((1200, 1600), thickness=(96.0, 96.0), sizes=shapes)
    found = sizes(cfg, situation(data, device="cuda"))
    assert found["data.max_side"].value == 192
    assert "data.resize" not in found


def test_images_of_several_sizes_become_crops_of_one(cfg):
    shapes = np.array([[200, 200], [256, 256], [300, 300]] * 10)
    found = sizes(cfg, situation(made(thickness=(9.0, 9.0), sizes=shapes)))
    assert found["data.augment.crop"].value == [256, 256]


@pytest.mark.parametrize("setting", ["data.resize", "data.max_side"])
def test_a_size_of_the_user_stays(cfg, setting):
    cfg.given = [setting]
    OmegaConf.update(cfg, setting, [512, 512] if setting == "data.resize" else 512)
    data = made((2048, 2048), thickness=(96.0, 96.0))
    found = sizes(cfg, situation(data))
    assert not {"data.resize", "data.max_side"} & found.keys()
    assert found["data.augment.crop"].value is None


def test_a_crop_of_the_user_stays_at_the_scale_of_the_images(cfg):
    cfg.given, cfg.data.augment.crop = ["data.augment.crop"], [200, 300]
    assert not decided(rules.size, cfg, situation(made((2048, 2048), thickness=(96.0, 96.0))))


@pytest.mark.parametrize(("batch", "rate"), [(8, 2e-3), (2, 1e-3), (32, 4e-3)])
def test_the_rate_follows_the_root_of_the_batch(cfg, batch, rate):
    cfg.data.batch_size = batch
    assert decided(rules.learning_rate, cfg, situation(made()))["optimizer.lr"].value == rate


def test_the_rate_counts_processes_and_accumulated_batches(cfg):
    cfg.data.batch_size, cfg.trainer.accumulate_grad_batches = 4, 2
    now = situation(made(), processes=4)
    assert decided(rules.learning_rate, cfg, now)["optimizer.lr"].value == 4e-3


def test_the_rate_of_other_optimizers_stays(compose, cfg):
    cfg.optimizer = compose("train", "data=folder", "data.root=.", "optimizer=sgd").optimizer
    assert not decided(rules.learning_rate, cfg, situation(made()))


@pytest.mark.parametrize(("rarest", "loss"), [(0.3, "ce"), (0.05, "ce_dice")])
def test_the_loss_follows_the_rarest_class(cfg, rarest, loss):
    data = made(shares=(1 - rarest, rarest))
    assert decided(rules.loss, cfg, situation(data))["loss"].value == loss


def test_classes_that_never_occur_are_not_the_rarest(cfg):
    data = made(shares=(0.5, 0.5, 0.0), thickness=(20.0, 20.0, math.inf))
    assert data.rarest == ("c0", 0.5)


def test_what_does_not_fit_into_memory_is_not_kept(cfg):
    # 120 images of 360 x 480 in four bytes a pixel: 83 MB.
    assert decided(rules.cache, cfg, situation(made(), memory=84e6))["data.cache"].value == "ram"
    assert not decided(rules.cache, cfg, situation(made(), memory=82e6))
    cfg.data.resize = [180, 240]
    assert decided(rules.cache, cfg, situation(made(), memory=21e6))


def test_batches_that_do_not_fit_are_added_up(cfg):
    cfg.data.batch_size = 16
    rule = partial(rules.fitting_batch, fitting=2)
    found = decided(rule, cfg, situation(made(), device="cuda"))
    assert found["data.batch_size"].value == 2
    assert found["trainer.accumulate_grad_batches"].value == 4


def length(cfg, now, step=1.0, validation=5.0, rest=10.0) -> dict[str, Any]:
    rule = partial(rules.length, times=(step, validation, rest))
    return {setting: d.value for setting, d in decided(rule, cfg, now).items()}


def test_a_budget_is_spent(cfg):
    found = length(cfg, situation(made(), seconds=600.0))
    epochs, each = found["trainer.max_epochs"], found["trainer.limit_train_batches"]
    assert epochs == 11  # a tenth of 590 seconds, of 5 seconds each
    assert 600 - epochs <= 10 + epochs * (5 + each) <= 600
    assert found["data.repeat"] == math.ceil(each * 8 / 100)


def test_a_budget_that_is_too_short_is_refused_with_one_that_is_not(cfg):
    cfg.budget = "15s"
    with pytest.raises(InputError, match=r"budget=15s.*15 s.*give at least 65 s"):
        length(cfg, situation(made(), seconds=15.0))


def test_without_a_budget_the_data_say_how_long(cfg):
    found = length(cfg, situation(made(images=400)))
    # 1,000 x sqrt(400) images in batches of 8
    steps = found["trainer.max_epochs"] * found["trainer.limit_train_batches"]
    assert 0.99 * 2500 <= steps <= 2500


def test_epochs_of_the_user_stay_within_a_budget(cfg):
    cfg.given, cfg.trainer.max_epochs = ["trainer.max_epochs"], 3
    found = length(cfg, situation(made(), seconds=600.0))
    assert found["trainer.limit_train_batches"] == (590 - 3 * 5) // 3


def test_several_batches_make_a_step(cfg):
    cfg.trainer.accumulate_grad_batches = 4
    found = length(cfg, situation(made(), seconds=600.0))
    steps = found["trainer.limit_train_batches"] / 4
    assert 10 + found["trainer.max_epochs"] * (5 + steps) <= 600


def test_an_interval_of_an_experiment_gives_way(cfg):
    cfg.trainer.check_val_every_n_epoch = 3
    assert length(cfg, situation(made(), seconds=600.0))["trainer.check_val_every_n_epoch"] == 1


def test_long_runs_are_averaged(cfg):
    cfg.recipe = "auto"
    assert length(cfg, situation(made(images=400)), step=0.01)["data.repeat"]
    long = situation(replace(made(images=4000)))
    assert length(cfg, long)["ema"] == 0.999
    cfg.recipe = None
    assert "ema" not in length(cfg, long)


@pytest.mark.parametrize("model", sorted(p.stem for p in (CONFIG_FOLDER / "model").glob("*.yaml")))
def test_every_model_has_a_rate(model):
    function = OmegaConf.load(CONFIG_FOLDER / f"model/{model}.yaml").get("_target_")
    assert model in ("hub", "unet_random") or function in rules.RATES


def test_small_crops_aim_at_rare_classes(cfg):
    rare = situation(made((512, 512), shares=(0.995, 0.005)))
    cfg.data.augment.crop = [256, 256]
    assert decided(rules.sampling, cfg, rare)["data.sample"].value == "rare"
    assert not decided(rules.sampling, cfg, situation(made((512, 512), shares=(0.98, 0.02))))
    for window in ([384, 384], None):  # more than half of an image, all of it
        cfg.data.augment.crop = window
        assert not decided(rules.sampling, cfg, rare)

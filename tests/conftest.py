"""What several test files need: configurations composed as the command line would."""

from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from seg_torch.cli import CONFIG_FOLDER, complete_overrides

# Small enough for two processor cores, and still every part of the real thing.
SMALL_DATA = (
    "data.dataset.size=32",
    "data.dataset.train=12",
    "data.dataset.val=5",
    "data.dataset.test=3",
    "data.batch_size=4",
    "data.num_workers=0",
)
SMALL_TRAINER = ("trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.precision=32")


@pytest.fixture
def compose() -> Callable[..., DictConfig]:
    """`compose("train", "model=fcn", ...)`: the configuration of that command line.

    As there, `train` without data or experiment is the demo, `experiment=shapes`.
    """

    def compose(name: str, *overrides: str) -> DictConfig:
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            return hydra.compose(name, complete_overrides(name, overrides))

    return compose


@pytest.fixture
def small(compose: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., DictConfig]:
    """`small("train", ...)`: the same, on small images, small networks and two epochs."""

    def small(name: str, *overrides: str) -> DictConfig:
        return compose(
            name,
            f"output_dir={tmp_path / 'run'}",
            *SMALL_DATA,
            *SMALL_TRAINER,
            *overrides,
        )

    return small

"""evaluate.py: scores a checkpoint on its own or on other data; or a published model."""

from omegaconf import DictConfig

from seg_torch.evaluation.scorer import score
from seg_torch.evaluation.setup import open_for_scoring
from seg_torch.hardware import restored_flags


@restored_flags()
def evaluate(cfg: DictConfig) -> None:
    """Score a checkpoint or a published model on a split of its own data or of other data."""
    setup = open_for_scoring(cfg)
    with setup.processes.claimed(setup.folder):
        score(setup.trainer, setup.scorer, setup.data, setup.folder, cfg.split)

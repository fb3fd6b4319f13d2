"""evaluate.py: scores a checkpoint on its own or on other data; or a published model."""

from omegaconf import DictConfig

from seg_torch.evaluation.scorer import score
from seg_torch.evaluation.setup import open_for_scoring


def evaluate(cfg: DictConfig) -> None:
    """Score a checkpoint or a published model on a split of its own data or of other data."""
    trainer, scorer, data, folder, _ = open_for_scoring(cfg)
    score(trainer, scorer, data, folder, cfg.split)

"""The command train."""

from omegaconf import DictConfig, OmegaConf

from seg_torch import trainer


def train(cfg: DictConfig) -> None:
    """Trains."""
    start = f"{cfg.resume}/checkpoints/last.ckpt" if cfg.resume else cfg.init_from
    OmegaConf.update(cfg, "checkpoint", start, force_add=True)
    trainer.train(cfg)

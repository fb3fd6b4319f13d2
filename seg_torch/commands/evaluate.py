"""The command evaluate."""

from seg_torch.trainer import evaluate

__all__ = ["evaluate"]

"""Scores a checkpoint: python evaluate.py checkpoint=runs/.../checkpoints/best.ckpt split=val"""

from seg_torch.cli import entry_point
from seg_torch.trainer import evaluate

if __name__ == "__main__":
    entry_point(evaluate, "evaluate")

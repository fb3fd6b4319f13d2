"""Scores a checkpoint: python evaluate.py checkpoint=runs/.../checkpoints/best.ckpt split=val"""

from seg_torch.cli.main import main

if __name__ == "__main__":
    main("evaluate")

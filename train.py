"""Trains a model: python train.py model=deeplabv3 data=voc"""

from seg_torch.cli import entry_point
from seg_torch.trainer import train

if __name__ == "__main__":
    entry_point(train, "train")

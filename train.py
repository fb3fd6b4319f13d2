"""Trains a model: python train.py data=folder data.root=my_data model=deeplabv3"""

from seg_torch.cli.main import main

if __name__ == "__main__":
    main("train")

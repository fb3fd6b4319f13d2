"""Segments images and videos: python predict.py input=photos output=predictions checkpoint=..."""

from seg_torch.cli.main import main

if __name__ == "__main__":
    main("predict")

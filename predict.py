"""Labels photographs: python predict.py input=photos output=predictions checkpoint=..."""

from seg_torch.prediction import predict

from seg_torch.cli import entry_point

if __name__ == "__main__":
    entry_point(predict, "predict")

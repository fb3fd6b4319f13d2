"""Semantic segmentation in PyTorch: train, score exactly, colour photographs."""

from seg_torch.labels import Labels, decode_segmap, encode_segmap
from seg_torch.segmenter import Segmentation, Segmenter

__all__ = ["Labels", "Segmentation", "Segmenter", "decode_segmap", "encode_segmap"]

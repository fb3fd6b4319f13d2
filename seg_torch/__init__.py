"""Semantic segmentation in PyTorch: train, score exactly, colour photographs."""

from seg_torch.labels import Labels, decode_segmap, encode_segmap

__all__ = ["Labels", "decode_segmap", "encode_segmap"]

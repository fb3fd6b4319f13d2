"""From datasets to batches."""

from seg_torch.data.module import SegmentationDataModule as SegmentationDataModule

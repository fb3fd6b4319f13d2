"""Semantic segmentation in PyTorch: train, score exactly, segment your own images.

Names are imported when they are first used, so that `import seg_torch` loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from seg_torch.version import __version__ as __version__

if TYPE_CHECKING:
    from seg_torch.data import SegmentationDataModule
    from seg_torch.labels import Labels, decode_segmap, encode_segmap
    from seg_torch.models.network import Network
    from seg_torch.prediction.segmentation import Segmentation
    from seg_torch.prediction.segmenter import Segmenter
    from seg_torch.training.task import SegmentationTask

__all__ = [
    "Labels",
    "Network",
    "Segmentation",
    "SegmentationDataModule",
    "SegmentationTask",
    "Segmenter",
    "decode_segmap",
    "encode_segmap",
]
MODULES = {
    "Network": "models.network",
    "Segmentation": "prediction.segmentation",
    "SegmentationDataModule": "data",
    "SegmentationTask": "training.task",
    "Segmenter": "prediction.segmenter",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = MODULES.get(name, "labels")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

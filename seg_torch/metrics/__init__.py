"""Scores over a dataset, from sums of integers.

All are the same for every batch size and number of processes, and take the same memory however many
pixels there are. Names are imported when they are first used: `counts` alone needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seg_torch.metrics.blocks import ScoredBlock as ScoredBlock
    from seg_torch.metrics.blocks import confidence_steps as confidence_steps
    from seg_torch.metrics.boundary import BoundaryScores as BoundaryScores
    from seg_torch.metrics.confusion import ConfusionMatrix as ConfusionMatrix
    from seg_torch.metrics.confusion import report as report
    from seg_torch.metrics.confusion import scores as scores
    from seg_torch.metrics.images import ImageScores as ImageScores
    from seg_torch.metrics.images import LabelQuality as LabelQuality
    from seg_torch.metrics.probabilities import AveragePrecision as AveragePrecision
    from seg_torch.metrics.probabilities import Calibration as Calibration

MODULES = {
    "blocks": ("ScoredBlock", "confidence_steps"),
    "boundary": ("BoundaryScores",),
    "confusion": ("ConfusionMatrix", "report", "scores"),
    "images": ("ImageScores", "LabelQuality"),
    "probabilities": ("AveragePrecision", "Calibration"),
}


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

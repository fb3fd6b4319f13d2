"""Scores over a dataset, from sums of integers.

Names are imported when they are first used: `counts` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seg_torch.metrics.base import CALIBRATION_BINS as CALIBRATION_BINS
    from seg_torch.metrics.base import CONFIDENCE_STEPS as CONFIDENCE_STEPS
    from seg_torch.metrics.base import CPU_BAND as CPU_BAND
    from seg_torch.metrics.base import LABEL_TEMPERATURE as LABEL_TEMPERATURE
    from seg_torch.metrics.base import SCORE_STEPS as SCORE_STEPS
    from seg_torch.metrics.base import AveragePrecision as AveragePrecision
    from seg_torch.metrics.base import BoundaryScores as BoundaryScores
    from seg_torch.metrics.base import Calibration as Calibration
    from seg_torch.metrics.base import ConfusionMatrix as ConfusionMatrix
    from seg_torch.metrics.base import ImageScores as ImageScores
    from seg_torch.metrics.base import LabelQuality as LabelQuality
    from seg_torch.metrics.base import confidence_steps as confidence_steps
    from seg_torch.metrics.base import report as report
    from seg_torch.metrics.base import scores as scores


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("seg_torch.metrics.base"), name)

"""Functions and classes that the configurations of earlier versions name elsewhere."""

from __future__ import annotations

from typing import Any

# Old name -> name of today. A module stands for all that is in it.
MOVED = {
    "seg_torch.callbacks": "seg_torch.training.callbacks",
    "seg_torch.datamodule": "seg_torch.data",
    "seg_torch.hub": "seg_torch.checkpoints.hub",
    "seg_torch.optimizers": "seg_torch.training.optimizers",
    "seg_torch.schedulers": "seg_torch.training.schedulers",
    "seg_torch.transforms": "seg_torch.data.transforms",
}


def with_current_names(config: Any) -> Any:
    """Return a configuration, plain data, in which each `_target_` has the name of today."""
    if isinstance(config, dict):
        return {
            key: current_name(value)
            if key == "_target_" and isinstance(value, str)
            else with_current_names(value)
            for key, value in config.items()
        }
    return [*map(with_current_names, config)] if isinstance(config, list) else config


def current_name(target: str) -> str:
    """Return the dotted name that a function or class has today."""
    for old, new in MOVED.items():
        if target == old or target.startswith(f"{old}."):
            return new + target.removeprefix(old)
    return target

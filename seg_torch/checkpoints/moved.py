"""Functions and classes that the configurations of earlier versions name elsewhere."""

from typing import Any

# Old name -> name of today. A module stands for all that is in it.
MOVED = {
    "seg_torch.callbacks": "seg_torch.training.callbacks",
    "seg_torch.datamodule": "seg_torch.data",
    "seg_torch.hub": "seg_torch.checkpoints.hub",
    "seg_torch.losses.OwnLoss": "seg_torch.losses.ModelLoss",
    "seg_torch.optimizers": "seg_torch.training.optimizers",
    "seg_torch.schedulers": "seg_torch.training.schedulers",
    "seg_torch.transforms": "seg_torch.data.transforms",
}


def with_current_names(config: Any, key: str = "") -> Any:
    """Return a configuration, plain data, in which each `_target_` has the name of today.

    Args:
        config: All of it, or a value in it.
        key: Of that value.
    """
    if isinstance(config, dict):
        return {key: with_current_names(value, key) for key, value in config.items()}
    if isinstance(config, list):
        return [with_current_names(value) for value in config]
    for old, new in MOVED.items():
        if key == "_target_" and f"{config}.".startswith(f"{old}."):
            return new + str(config).removeprefix(old)
    return config

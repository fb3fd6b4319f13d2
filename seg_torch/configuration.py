"""Configurations as plain data, and the objects that they name.

In a configuration `${key}` stands for the value of another setting. A path may have `${` in its
name: there it has a backslash in front, which OmegaConf takes off when the value is read.
"""

import re
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf


def escaped(value: Any) -> Any:
    r"""Return plain data, in which nothing is a reference, with `\${` for every `${`."""
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escaped(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def plain(config: Any) -> Any:
    """Return a configuration as plain data without references; a `${` that stays is escaped."""
    return escaped(OmegaConf.to_container(config, resolve=True))


def instantiate(config: Any, **arguments: Any) -> Any:
    """Call Hydra's `instantiate`, which would look for references in what is resolved already.

    Args:
        config: A configuration, or plain data as `plain` returns it.
        arguments: Further ones of its `_target_`.
    """
    node = config if OmegaConf.is_config(config) else OmegaConf.create(config)
    resolved = _with_paths(OmegaConf.to_container(node, resolve=True))
    return hydra.utils.instantiate(resolved, **arguments, _convert_="all")


def _with_paths(value: Any) -> Any:
    """Return resolved data with a `Path`, which is never a reference, for every text with `${`."""
    if isinstance(value, dict):
        return {key: _with_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_paths(item) for item in value]
    return Path(value) if isinstance(value, str) and "${" in value else value

"""Checkpoints that describe themselves: a Lightning checkpoint plus, as plain data, the labels, the
preprocessing and the configurations of model and data.

Reading one runs nothing that comes from the file: it is loaded with `weights_only=True`, and a
configuration may only name the packages that are listed here.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from torch import Tensor

from seg_torch.errors import InputError
from seg_torch.labels import Labels
from seg_torch.models.network import Network

KEY = "seg_torch"
KNOWN_PACKAGES = (
    "seg_torch.models",
    "seg_torch.datasets",
    "seg_torch.datamodule",
    "seg_torch.transforms",
    "torchvision.models.segmentation",
    "torchvision.transforms.v2",
)
# More than any configuration has. References to one list can make a small file endless.
MAX_NODES = 100_000


def describe(
    network: Network,
    labels: Labels,
    model: dict[str, Any],
    data: dict[str, Any],
    resize: Sequence[int] | None,
) -> dict[str, Any]:
    """Returns what a checkpoint says of itself, as plain data.

    Args:
        network: For its mean and standard deviation.
        labels: The classes.
        model: Configuration of the model, plain data with `_target_`.
        data: Configuration of the data module, plain data with `_target_`.
        resize: (height, width) at which the network sees images, or `None`.
    """
    return {
        "version": 1,
        "labels": labels.to_dict(),
        "model": model,
        "data": data,
        "preprocessing": {
            "mean": network.mean.flatten().tolist(),
            "std": network.std.flatten().tolist(),
            "resize": None if resize is None else [int(side) for side in resize],
        },
    }


def read(path: str | Path) -> dict[str, Any]:
    """Reads the content of a checkpoint, on the CPU.

    Args:
        path: Of the file, or of a run's folder for its best one.

    Raises:
        InputError: The file is missing, is no checkpoint, or none of seg_torch's.
    """
    if os.path.isdir(path):
        folder, path = path, Path(path, "checkpoints", "best.ckpt")
        if not path.is_file():
            raise InputError(
                f"checkpoint={folder}: no run there, or one that was stopped before its first "
                "validation (it would hold checkpoints/best.ckpt)"
            )
    if not os.path.isfile(path):
        raise InputError(f"checkpoint={path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:  # what torch.save writes
            size = sum(member.file_size for member in archive.infolist())
        # torch.save does not compress; PyTorch would unpack gigabytes from a file of a few MB.
        if size > os.path.getsize(path):
            raise ValueError(f"it would unpack to {size:,} bytes")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile:
        raise InputError(
            f"checkpoint={path}: not a checkpoint, or cut off while it was copied"
        ) from None
    except Exception as error:  # there is no end to what broken files raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"checkpoint={path}: cannot be read as a checkpoint: {reason}") from None
    if not isinstance(content, dict) or KEY not in content or "state_dict" not in content:
        raise InputError(
            f"checkpoint={path}: not a checkpoint of seg_torch; expected one that train.py wrote, "
            "such as runs/.../checkpoints/best.ckpt"
        )
    return content


def build_network(content: dict[str, Any], trust: Sequence[str] = ()) -> tuple[Network, Labels]:
    """Builds the network that a checkpoint describes, with its weights, and its labels.

    Args:
        content: From `read`.
        trust: Further packages from which the model may come.

    Raises:
        InputError: The model is from a package that is not known, or the weights do not fit it.
    """
    description = content[KEY]
    labels = Labels.from_dict(description["labels"])
    config = dict(description["model"])
    if "weights" in config:
        config["weights"] = None  # they are in the checkpoint
    preprocessing = description["preprocessing"]
    model = instantiate(config, trust, num_classes=len(labels), _convert_="all")
    network = Network(model, preprocessing["mean"], preprocessing["std"])
    try:
        network.load_state_dict(network_state(content))
    except RuntimeError as error:
        raise InputError(f"the checkpoint's weights do not fit its own model: {error}") from None
    return network, labels


def network_state(content: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the weights of the network alone."""
    prefix = "network."
    return {
        key.removeprefix(prefix): value
        for key, value in content["state_dict"].items()
        if key.startswith(prefix)
    }


def instantiate(config: dict[str, Any], trust: Sequence[str] = (), **arguments: Any) -> Any:
    """Calls Hydra's `instantiate` on a configuration from a file, which may come from anywhere.

    Raises:
        InputError: A `_target_` outside the known and trusted packages, or an interpolation, which
            could read the environment.
    """
    nodes = list(_nodes(config))
    if any(isinstance(node, str) and "${" in node for node in nodes):
        raise InputError(
            "the checkpoint's configuration holds an interpolation (${...}), which seg_torch never "
            "writes; resolving it could read this machine's environment"
        )
    for node in nodes:
        if isinstance(node, dict) and "_target_" in node:
            _check_target(str(node["_target_"]), (*KNOWN_PACKAGES, *trust))
    return hydra.utils.instantiate(config, **arguments)


def _check_target(target: str, packages: Sequence[str]) -> None:
    inside = any(target.startswith(f"{package}.") for package in packages)
    # The name alone proves little: `seg_torch.models.weights.torch.hub.load` begins well, too.
    try:
        home = getattr(hydra.utils.get_object(target), "__module__", None) if inside else None
    except (ImportError, ValueError):
        raise InputError(f"the checkpoint names {target}, which is not installed") from None
    if not any(f"{home}.".startswith(f"{package}.") for package in packages):
        raise InputError(
            f"the checkpoint wants to run {target}, which is outside the packages that "
            f"checkpoints may use ({', '.join(packages)}); if you trust the file, pass "
            f"trust=[{target.split('.')[0]}]"
        )


def _nodes(config: Any) -> Iterator[Any]:
    """Yields a configuration and everything inside it.

    Raises:
        InputError: There is no end to it.
    """
    todo = [config]
    for _ in range(MAX_NODES):
        if not todo:
            return
        node = todo.pop()
        yield node
        if isinstance(node, dict):
            todo += [*node.keys(), *node.values()]
        elif isinstance(node, (list, tuple)):
            todo += node
    raise InputError(f"the checkpoint's configuration has more than {MAX_NODES:,} values")

"""Checkpoints that describe themselves.

A Lightning checkpoint plus, as plain data, the labels, the preprocessing and the configurations of
model and data. Or, as the Hugging Face Hub has them, the weights in model.safetensors and the rest
in config.json.

They may come from anybody. Reading one runs nothing that comes from the file, and what it asks for
is compared with what it holds before there is memory for it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import textwrap
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from huggingface_hub import HfApi, hf_hub_download
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from seg_torch.checkpoints.hub import hub_file, read_config
from seg_torch.checkpoints.moved import with_current_names
from seg_torch.errors import InputError
from seg_torch.images.format import MOST_CHANNELS, RGB, ImageFormat
from seg_torch.labels import Labels
from seg_torch.models import weights
from seg_torch.models.network import Network

log = logging.getLogger(__name__)

KEY = "seg_torch"
HUB_SCHEME = "hf://"
# What `Segmenter.save_pretrained` writes.
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What a checkpoint may call. A package as a whole would be too much: among its functions are some
# that write files and some that download them.
MODELS = {
    f"seg_torch.models.{name}"
    for name in (
        *("deeplabv3", "fcn", "hrnet", "lraspp", "smp", "transformers", "unet"),
        *("unet_transposed", "vit"),
    )
}
DATA = {
    "seg_torch.data.SegmentationDataModule",
    *(
        f"seg_torch.datasets.{name}"
        for name in (
            *("ade20k", "auto", "camvid", "camvid32", "cityscapes", "clothing", "coco"),
            *("coco_panoptic", "coco_stuff", "cvat", "eightfold", "folder", "hf", "label_studio"),
            *("labelme", "labelme_voc", "pet", "roboflow", "shapes", "voc", "voc_sbd", "yolo"),
        )
    ),
}
# More than any configuration has. References to one list can make a small file endless.
MAX_NODES = 100_000
# More than the numbers in a model's configuration, such as its channels, ever add up to.
MAX_SUM = 1_000_000
# Values of layers that are made and thrown away, such as the classifier of a VGG.
SPARE_VALUES = 1 << 27
MAX_SIDE = 8192  # of the images that a network is given


def describe(
    network: Network,
    labels: Labels,
    model: dict[str, Any],
    data: dict[str, Any],
    resize: Sequence[int] | None,
    format: ImageFormat = RGB,
) -> dict[str, Any]:
    """Return what a checkpoint says of itself, as plain data.

    Args:
        network: For its mean and standard deviation.
        labels: The classes.
        model: Configuration of the model, plain data with `_target_`.
        data: Configuration of the data module, plain data with `_target_`.
        resize: (height, width) at which the network sees images, or `None`.
        format: How files become images.
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
            "bands": format.to_dict(),  # so called in all checkpoints
        },
    }


def image_format(description: dict[str, Any]) -> ImageFormat:
    """Return how files become the images that a network is for."""
    return ImageFormat.from_dict(description["preprocessing"].get("bands"))


def locate(path: str | Path) -> Path:
    """Return the file that holds the weights of a checkpoint.

    Args:
        path: Of that file; of a run's folder, for its best one; of a folder that
            `Segmenter.save_pretrained` wrote; or `hf://OWNER/NAME[@REVISION]` of the Hugging Face
            Hub, of which the files are downloaded that the local cache lacks.

    Raises:
        InputError: There is no such file, or it cannot be downloaded.
    """
    if str(path).startswith(HUB_SCHEME):
        return _published(path)
    file = Path(path)
    if file.is_dir() and (file / CONFIG).is_file():
        return hub_file(file, WEIGHTS, f"checkpoint={path}")
    if file.is_dir():
        file = file / "checkpoints" / "best.ckpt"
        if not file.is_file():
            raise InputError(
                f"checkpoint={path}: no run there, or one that was stopped before its first "
                "validation (it would hold checkpoints/best.ckpt)"
            )
    if not file.is_file():
        raise InputError(f"checkpoint={path}: no such file")
    return file


def run_of(path: str | Path) -> Path | None:
    """Return the folder of the run that a checkpoint belongs to, if it lies in one.

    Args:
        path: Of the run's folder, or of a file in its folder `checkpoints`.
    """
    path = Path(path).absolute()
    folder = path if path.is_dir() else path.parent.parent
    return folder if (folder / "config.yaml").is_file() else None


def _published(path: str | Path) -> Path:
    setting = f"checkpoint={path}"
    found = re.fullmatch(r"([^/@]+/[^/@]+)(?:@(.+))?", str(path).removeprefix(HUB_SCHEME))
    if found is None:
        raise InputError(f"{setting}: expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    name, revision = found.groups()
    with suppress(Exception):  # such as having no network: then the newest that is in the cache
        HfApi().model_info(name, revision=revision, timeout=10)  # soon says whether there is one
        hf_hub_download(name, CONFIG, revision=revision)
    config = hub_file(name, CONFIG, setting, revision)
    if KEY not in read_config(config, setting):  # before what may be gigabytes
        raise InputError(
            f"{setting}: its config.json is none of seg_torch's; models of transformers and SMP "
            f"are used by model=hub model.name={name}, without checkpoint="
        )
    return hub_file(name, WEIGHTS, setting, revision=config.parent.name)  # of the same commit


def read(path: str | Path) -> dict[str, Any]:
    """Read the content of a checkpoint, on the CPU.

    Args:
        path: See `locate`.

    Raises:
        InputError: The file is missing, is no checkpoint, or none of seg_torch's.
    """
    file = locate(path)
    if str(path).startswith(HUB_SCHEME):
        log.info("%s: commit %s", path, file.parent.name)
    published = file.suffix == ".safetensors"
    if file.suffix in (".onnx", ".xml", ".pt2"):
        raise InputError(f"checkpoint={path}: an exported network, which cannot be trained")
    if not published and not zipfile.is_zipfile(file):
        raise InputError(f"checkpoint={path}: not a checkpoint, or cut off while it was copied")
    try:
        content = _read_published(file) if published else weights.load(file)
        ours = isinstance(content, dict) and KEY in content and "state_dict" in content
        if ours:
            _check(content, os.path.getsize(file))
            content[KEY] = with_current_names(content[KEY])
    except Exception as error:  # there is no end to what broken files raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = f"it has no {reason}" if isinstance(error, KeyError) else reason
        raise InputError(f"checkpoint={path}: cannot be read as a checkpoint: {reason}") from None
    if not ours:
        raise InputError(
            f"checkpoint={path}: not a checkpoint of seg_torch; expected one that train.py wrote, "
            "such as runs/.../checkpoints/best.ckpt"
        )
    return content


def _read_published(file: Path) -> dict[str, Any]:
    config = json.loads(file.with_name(CONFIG).read_text(encoding="utf-8"))
    state = weights.read_state_dict(file)
    return {**config, "state_dict": {f"network.{key}": value for key, value in state.items()}}


def _check(content: dict[str, Any], size: int) -> None:
    """Refuses what `describe` and PyTorch would not have written into a file of so many bytes.

    Raises:
        Exception: Of any type.
    """
    state, description = content["state_dict"], content[KEY]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise InputError("its weights are not tensors by name")
    if weights.stored_bytes(state) > size:
        raise InputError("it describes larger weights than it holds")
    check_description(description)


def check_description(description: dict[str, Any]) -> None:
    """Refuses what `describe` would not have written.

    Raises:
        Exception: Of any type.
    """
    plain = (dict, list, tuple, str, int, float, type(None))
    if not all(isinstance(node, plain) for node in nodes(description)):
        raise InputError("its description is not plain data")
    Labels.from_dict(description["labels"])
    if not isinstance(description["model"], dict) or not isinstance(description["data"], dict):
        raise InputError("its configurations are no mappings")
    mean, std, resize = (description["preprocessing"][key] for key in ("mean", "std", "resize"))
    if len(mean) != len(std) or not all(
        isinstance(value, int | float) and abs(value) <= MAX_SUM for value in (*mean, *std)
    ):
        raise InputError("its mean and std are not two lists of numbers of one length")
    format = image_format(description)
    if (format != RGB and len(mean) != format.channels) or len(mean) > MOST_CHANNELS:
        raise InputError("its mean and std are not those of its channels")
    sides = (1, 1) if resize is None else resize
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
        raise InputError(f"its resize is {str(resize)[:50]}: two sides of 1 to {MAX_SIDE} pixels")


def build_network(content: dict[str, Any], trust: Sequence[str] = ()) -> tuple[Network, Labels]:
    """Build the network that a checkpoint describes, with its weights, and its labels.

    Args:
        content: From `read`.
        trust: Packages from which the model may come.

    Raises:
        InputError: The model is none of seg_torch's and not trusted, is larger than the weights in
            the file, or these do not fit it.
    """
    description = content[KEY]
    labels = Labels.from_dict(description["labels"])
    config = dict(description["model"])
    known = str(config.get("_target_")) in MODELS
    if known or "weights" in config:
        config["weights"] = None  # they are in the checkpoint
    make = partial(instantiate, config, trust, MODELS, num_classes=len(labels))
    state = network_state(content)
    if known:
        numbers = [node for node in nodes(config) if isinstance(node, int | float)]
        if not all(abs(n) <= MAX_SUM for n in numbers) or sum(map(abs, numbers)) > MAX_SUM:
            raise InputError("the checkpoint's model has numbers that no network has")
        # Weights in half precision have two bytes.
        model = _made_within(make, weights.stored_bytes(state) // 2 + SPARE_VALUES)
    else:
        model = make()
    if not isinstance(model, nn.Module):
        raise InputError(f"the checkpoint's model is a {type(model).__name__}, not a module")
    preprocessing = description["preprocessing"]
    if image_format(description) != RGB:
        weights.adapt_first_conv(model, len(preprocessing["mean"]))
    network = Network(model, preprocessing["mean"], preprocessing["std"])
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 400, placeholder=" ...")
        raise InputError(f"the checkpoint's weights do not fit its own model: {reason}") from None
    return network, labels


def _made_within(make: Callable[[], Any], values: int) -> Any:
    """Make a model, unless its parameters and buffers have more than so many values.

    They are counted as they are made, first on the device "meta", where they take no memory. A
    model whose constructor asks for their values cannot be made there; on a CPU memory is taken
    only when it is written to, which comes after the count.

    Raises:
        InputError: There are more.
    """
    total = 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal total
        # Small layers without end are stopped, too: with that of 13,000 tensors at the latest.
        total += 10_000 + (0 if tensor is None else tensor.numel())
        if total > values:
            raise refusal

    refusal = InputError("the checkpoint's model is larger than the weights in the file")
    hooks = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        with suppress(Exception), torch.device("meta"):
            make()
        if total > values:
            raise refusal
        total = 0
        return make()
    finally:
        for hook in hooks:
            hook.remove()


def network_state(content: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of the network alone."""
    prefix = "network."
    return {
        key.removeprefix(prefix): value
        for key, value in content["state_dict"].items()
        if key.startswith(prefix)
    }


def instantiate(
    config: dict[str, Any], trust: Sequence[str], known: Collection[str], **arguments: Any
) -> Any:
    """Call Hydra's `instantiate` on a configuration from a file, which may come from anywhere.

    Args:
        config: Plain data with `_target_`.
        trust: Packages from which it may name anything.
        known: What it may name besides.
        arguments: Further ones of its `_target_`.

    Raises:
        InputError: A `_target_` that is neither known nor trusted, another of Hydra's own keys, an
            interpolation, which could read the environment, or arguments that do not fit.
    """
    everything = list(nodes(config))
    if any(isinstance(node, str) and "${" in node for node in everything):
        raise InputError(
            "the checkpoint's configuration holds an interpolation (${...}), which seg_torch never "
            "writes; resolving it could read this machine's environment"
        )
    for node in everything:
        for key in node if isinstance(node, dict) else ():
            if key == "_target_":
                _check_target(str(node[key]), trust, known)
            elif str(key).startswith("_") and key != "_partial_" and not trust:
                raise InputError(f"the checkpoint's configuration holds {key}, an order to Hydra")
    try:
        return hydra.utils.instantiate(config, **arguments, _convert_="all")
    except (HydraException, OmegaConfBaseException) as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        reason = textwrap.shorten(str(error.__cause__ or error), 300, placeholder=" ...")
        raise InputError(
            f"the checkpoint's {config.get('_target_')} cannot be made as it says: {reason}"
        ) from error


def _check_target(target: str, trust: Sequence[str], known: Collection[str]) -> None:
    if target in known:
        return
    inside = any(target.startswith(f"{package}.") for package in trust)
    # The name alone proves little: `my_package.os.system` begins well, too.
    try:
        home = getattr(hydra.utils.get_object(target), "__module__", None) if inside else None
    except (ImportError, ValueError):
        raise InputError(f"the checkpoint names {target}, which is not installed") from None
    if not any(f"{home}.".startswith(f"{package}.") for package in trust):
        raise InputError(
            f"the checkpoint wants to run {target[:100]}, which is none of seg_torch's own models "
            "or datasets; if you trust the file, pass "
            f"trust=[{target.split('.')[0][:100]}]"
        )


def nodes(config: Any) -> Iterator[Any]:
    """Yield a configuration and everything inside it, keys included.

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

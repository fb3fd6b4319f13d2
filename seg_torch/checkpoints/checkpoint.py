"""Checkpoints that describe themselves.

A Lightning checkpoint plus, as plain data, the labels, the preprocessing and the configurations of
model and data. Or, as the Hugging Face Hub has them, the weights in model.safetensors and the rest
in config.json.

They may come from anybody. Reading one runs nothing that comes from the file, and what it asks for
is compared with what it holds before there is memory for it.
"""

import json
import logging
import os
import re
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from torch import Tensor, nn

from seg_torch.checkpoints import trusted
from seg_torch.checkpoints.hub import hub_file, read_config
from seg_torch.checkpoints.moved import with_current_names
from seg_torch.errors import InputError, reason
from seg_torch.images.format import MOST_CHANNELS, RGB, ImageFormat
from seg_torch.images.resize import Resize
from seg_torch.labels import Labels
from seg_torch.models import weights
from seg_torch.models.network import Network

log = logging.getLogger(__name__)

KEY = "seg_torch"
SCORE = "val/mean_iou"  # by which the best epoch is chosen
HUB_SCHEME = "hf://"
# What `Segmenter.save_pretrained` writes.
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_SIDE = 8192  # of the images that a network is given


def describe(
    network: Network,
    labels: Labels,
    model: dict[str, Any],
    data: dict[str, Any],
    resize: Resize,
    format: ImageFormat = RGB,
) -> dict[str, Any]:
    """Return what a checkpoint says of itself, as plain data.

    Args:
        network: For its mean and standard deviation.
        labels: The classes.
        model: Configuration of the model, plain data with `_target_`.
        data: Configuration of the data module, plain data with `_target_`.
        resize: At which size the network sees images, see `seg_torch.images.resize.seen_size`.
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
            "resize": [int(side) for side in resize] if isinstance(resize, Sequence) else resize,
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
    match = re.fullmatch(r"([^/@]+/[^/@]+)(?:@(.+))?", str(path).removeprefix(HUB_SCHEME))
    if match is None:
        raise InputError(f"{setting}: expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    name, revision = match.groups()
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
    if file.suffix in (".onnx", ".xml"):
        raise InputError(f"checkpoint={path}: an exported network, which cannot be trained")
    if not published and not zipfile.is_zipfile(file):
        raise InputError(f"checkpoint={path}: not a checkpoint, or cut off while it was copied")
    try:
        content = _read_published(file) if published else weights.load(file)
        if not published:
            _check_sums(file)
        _check(content, os.path.getsize(file))
        content[KEY] = with_current_names(content[KEY])
    except Exception as error:  # there is no end to what broken files raise
        why = f"it has no {error}" if isinstance(error, KeyError) else reason(error)
        raise InputError(f"checkpoint={path}: cannot be read as a checkpoint: {why}") from None
    return content


def _check_sums(file: Path) -> None:
    """Refuse a file whose content is not what was written, which PyTorch does not look at.

    It takes a second or two for a gigabyte.
    """
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise InputError(f"it is damaged ({damaged} is not what was written): copy it again")


def _read_published(file: Path) -> dict[str, Any]:
    config = json.loads(file.with_name(CONFIG).read_text(encoding="utf-8"))
    state = weights.read_state_dict(file)
    return {**config, "state_dict": {f"network.{key}": value for key, value in state.items()}}


def _check(content: Any, size: int) -> None:
    """Refuse what `describe` and PyTorch would not have written into a file of so many bytes.

    Raises:
        Exception: Of any type.
    """
    if not isinstance(content, dict) or not {KEY, "state_dict"} <= content.keys():
        raise InputError(
            "it is not a checkpoint of seg_torch; expected one that train.py wrote, such as "
            "runs/.../checkpoints/best.ckpt"
        )
    state, description = content["state_dict"], content[KEY]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise InputError("its weights are not tensors by name")
    if weights.stored_bytes(state) > size:
        raise InputError("it describes larger weights than it holds")
    check_description(description)


def check_description(description: dict[str, Any]) -> None:
    """Refuse what `describe` would not have written.

    Raises:
        Exception: Of any type.
    """
    plain = (dict, list, tuple, str, int, float, type(None))
    if not all(isinstance(node, plain) for node in trusted.nodes(description)):
        raise InputError("its description is not plain data")
    Labels.from_dict(description["labels"])
    if not isinstance(description["model"], dict) or not isinstance(description["data"], dict):
        raise InputError("its configurations are no mappings")
    mean, std, resize = (description["preprocessing"][key] for key in ("mean", "std", "resize"))
    if len(mean) != len(std) or not all(
        isinstance(value, int | float) and abs(value) <= trusted.MAX_SUM for value in (*mean, *std)
    ):
        raise InputError("its mean and std are not two lists of numbers of one length")
    format = image_format(description)
    if (format != RGB and len(mean) != format.channels) or len(mean) > MOST_CHANNELS:
        raise InputError("its mean and std are not those of its channels")
    sides = (1, 1) if resize is None else resize
    if type(resize) is int:  # no side of an image is longer
        sides = resize, resize
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
        raise InputError(f"its resize is {str(resize)[:50]}: two sides of 1 to {MAX_SIDE} pixels")


def build_network(content: dict[str, Any], trust: Sequence[str] = ()) -> Network:
    """Build the network that a checkpoint describes, with its weights.

    Args:
        content: From `read`.
        trust: Packages from which the model may come.

    Raises:
        InputError: The model is none of seg_torch's and not trusted, is larger than the weights in
            the file, or these do not fit it.
    """
    description, state = content[KEY], network_state(content)
    preprocessing, names = description["preprocessing"], description["labels"]["names"]
    config = dict(description["model"])
    known = str(config.get("_target_")) in trusted.MODELS
    if known or "weights" in config:
        config["weights"] = None  # they are in the checkpoint
    make = partial(
        trusted.instantiate_trusted, config, trust, trusted.MODELS, num_classes=len(names)
    )
    if known:
        trusted.check_numbers(config)
        # Weights in half precision have two bytes.
        model = trusted.made_within(make, weights.stored_bytes(state) // 2 + trusted.SPARE_VALUES)
    else:
        model = make()
    if not isinstance(model, nn.Module):
        raise InputError(f"the checkpoint's model is a {type(model).__name__}, not a module")
    if image_format(description) != RGB:
        weights.adapt_first_conv(model, len(preprocessing["mean"]))
    network = Network(model, preprocessing["mean"], preprocessing["std"])
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        message = f"the checkpoint's weights do not fit its own model: {reason(error, 400)}"
        raise InputError(message) from None
    return network


def best_score(content: dict[str, Any]) -> float | None:
    """Return the best validation's mean IoU of a run up to a checkpoint of it, if there was one."""
    for state in content.get("callbacks", {}).values():
        of_best = isinstance(state, dict) and state.get("monitor") == SCORE
        if of_best and state["best_model_score"] is not None:
            return float(state["best_model_score"])
    return None


def network_state(content: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of the network alone."""
    state = content["state_dict"].items()
    return {k.removeprefix("network."): value for k, value in state if k.startswith("network.")}

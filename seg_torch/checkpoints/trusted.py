"""What strangers' configurations may make: known models and data, of a size that is bounded."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any

import hydra
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from seg_torch.configuration import instantiate
from seg_torch.errors import InputError, reason

# What a checkpoint may call. A package as a whole would be too much: among its functions are some
# that write files and some that download them.
_MODELS = "deeplabv3 fcn hrnet lraspp smp transformers unet unet_transposed vit"
_DATASETS = (
    "ade20k auto camvid camvid32 cityscapes clothing coco coco_panoptic coco_stuff cvat eightfold "
    "folder hf label_studio labelme labelme_voc pet roboflow shapes voc voc_sbd yolo"
)
MODELS = {f"seg_torch.models.{name}" for name in _MODELS.split()}
DATA = {f"seg_torch.datasets.{name}" for name in _DATASETS.split()}
DATA.add("seg_torch.data.SegmentationDataModule")
# More than any configuration has. References to one list can make a small file endless.
MAX_NODES = 100_000
# More than the numbers in a model's configuration, such as its channels, ever add up to.
MAX_SUM = 1_000_000
# Values of layers that are made and thrown away, such as the classifier of a VGG.
SPARE_VALUES = 1 << 27


def instantiate_trusted(
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
    # With a backslash in front it is part of a path.
    if any(isinstance(node, str) and re.search(r"(?<!\\)(\\\\)*\$\{", node) for node in everything):
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
        return instantiate(config, **arguments)
    except (HydraException, OmegaConfBaseException) as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        cause = reason(error.__cause__ or error)
        raise InputError(
            f"the checkpoint's {config.get('_target_')} cannot be made as it says: {cause}"
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


def check_numbers(config: dict[str, Any]) -> None:
    """Refuse a model's configuration with numbers that no network has.

    Raises:
        InputError: It has such.
    """
    numbers = [abs(node) for node in nodes(config) if isinstance(node, int | float)]
    if not all(number <= MAX_SUM for number in numbers) or sum(numbers) > MAX_SUM:
        raise InputError("the checkpoint's model has numbers that no network has")


def made_within(make: Callable[[], Any], values: int) -> Any:
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
    with (
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ):
        with suppress(Exception), torch.device("meta"):
            make()
        if total > values:
            raise refusal
        total = 0
        return make()

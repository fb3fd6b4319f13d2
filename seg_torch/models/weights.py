"""Pretrained weights: from a file, or from where torchvision and timm publish them."""

import logging
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from seg_torch.errors import InputError

logger = logging.getLogger(__name__)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a model from a file, without running anything from it.

    Args:
        path: A `.safetensors` file, or what `torch.save(model.state_dict(), path)` wrote.

    Returns:
        Parameter and buffer names to tensors on the CPU.

    Raises:
        InputError: The file is missing, unreadable or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights file {path} does not exist")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path} cannot be read as a state dict (is the download complete?): "
            f"{str(error).splitlines()[0] if str(error) else 'the file is empty'}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        found = f"the keys {list(content)[:5]}" if isinstance(content, dict) else type(content)
        raise InputError(
            f"{path} holds {found}, not a state dict; write one with "
            "torch.save(model.state_dict(), path)"
        )
    return content


def load_state_dict(
    model: nn.Module, state_dict: dict[str, Tensor], source: str, new_layers: tuple[str, ...] = ()
) -> None:
    """Load pretrained weights into a model whose last layers may be new.

    What the model does not use, such as the classes of another dataset, is skipped and logged.

    Args:
        model: Receives the weights.
        state_dict: Names to tensors.
        source: Where `state_dict` came from, for messages.
        new_layers: Prefixes of the names that may keep their random values.

    Raises:
        InputError: The model needs a tensor that `state_dict` lacks or has in another shape.
    """
    own = model.state_dict()
    other_shape = {k for k, v in state_dict.items() if k in own and v.shape != own[k].shape}
    fitting = {k: v for k, v in state_dict.items() if k not in other_shape}
    result = model.load_state_dict(fitting, strict=False)
    lacking = [key for key in result.missing_keys if not key.startswith(new_layers)]
    if lacking:
        raise InputError(
            f"{source} does not fit the model: {len(lacking)} of its {len(own)} tensors are absent "
            f"or of another shape, such as {', '.join(lacking[:3])}"
        )
    skipped = [k for k in state_dict if k in other_shape or k in result.unexpected_keys]
    if skipped:
        logger.info("skipped in %s: %s", source, ", ".join(skipped))
    if result.missing_keys:
        logger.info("newly initialised: %s", ", ".join(result.missing_keys))


def load_torchvision_weights(
    model: nn.Module,
    weights: str | Path,
    published: type[WeightsEnum],
    new_layers: tuple[str, ...],
) -> None:
    """Load torchvision's published weights by their name, or those of a file.

    Args:
        model: A torchvision segmentation model.
        weights: A member of `published`, or the path of a state dict.
        published: The weights that torchvision offers for the model.
        new_layers: Prefixes of the names that may keep their random values.

    Raises:
        InputError: `weights` is neither, cannot be downloaded, or does not fit the model.
    """
    if str(weights) not in published.__members__:
        if not Path(weights).is_file():
            raise InputError(
                f"model.weights is {str(weights)!r}, which is not a file; use "
                f"{', '.join(member.name for member in published)}, a file, or null for random ones"
            )
        load_state_dict(model, read_state_dict(weights), str(weights), new_layers)
        return
    url = published[str(weights)].url
    try:
        state_dict = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"cannot load {url} ({error}); download it by other means and put it into "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'} under the same name, or start from "
            "random weights with model.weights=null"
        ) from error
    load_state_dict(model, state_dict, str(weights), new_layers)


def download_from_hugging_face(repository: str, file_name: str) -> Path:
    """Find a file of the Hugging Face Hub in the local cache, or download it there.

    Args:
        repository: Such as `timm/resnet34.a1_in1k`.
        file_name: Such as `model.safetensors`.

    Raises:
        InputError: It is not in the cache and cannot be downloaded.
    """
    try:
        cached = huggingface_hub.hf_hub_download(repository, file_name, local_files_only=True)
        return Path(cached)
    except LocalEntryNotFoundError:
        pass
    url = huggingface_hub.hf_hub_url(repository, file_name)
    try:
        # Asked once, since hf_hub_download asks for half a minute when there is no network.
        huggingface_hub.get_hf_file_metadata(url, timeout=10)
        return Path(huggingface_hub.hf_hub_download(repository, file_name))
    except Exception as error:  # whatever the HTTP library of the installed version raises
        raise InputError(
            f"cannot download {url} ({error}); download it by other means and give "
            "model.weights=FILE, or start from random weights with model.weights=null"
        ) from error

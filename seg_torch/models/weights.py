"""Pretrained weights: from a file, or from where torchvision and timm publish them."""

import difflib
import logging
import os
import pickletools
import re
import zipfile
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import huggingface_hub
import safetensors.torch
import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torchvision.models import get_model_weights

from seg_torch.errors import InputError, reason
from seg_torch.folders import locked

log = logging.getLogger(__name__)

# All that a state dict or a checkpoint of Lightning has to name. PyTorch's own list is longer:
# `bytearray(10**12)` is on it, and tensors that are made without a storage in the file.
_GLOBALS = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) set"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (\w+Storage|Size|device|b?float\w*|u?int\w*|bool)"
)


def load(path: str | Path) -> Any:
    """Read what `torch.save` wrote, on the CPU, without running anything from it.

    The file decides what is read, but not how much memory that takes: no more than its own size.

    Args:
        path: Of the file, in the format of today (zip) or that before PyTorch 1.6.

    Raises:
        Exception: Of any type; there is no end to what broken files raise.
    """
    is_zip = check_names(path)
    # Mapped, no storage can reach beyond the file. Read, PyTorch before 2.10 lets it.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def check_names(path: str | Path) -> bool:
    """Refuse a file of `torch.save` that names what weights do not need, without reading tensors.

    Returns:
        Whether it is in the format of today.

    Raises:
        ValueError: It names such a thing. Of broken files, errors of any type.
    """
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\3\4"  # as PyTorch tells the formats apart
        file.seek(0)
        if not is_zip:
            for _ in range(5):  # format, version, machine, content, names of the storages
                _check_pickle(file)
        else:
            with zipfile.ZipFile(file) as archive:
                # torch.save does not compress; PyTorch would unpack gigabytes from a few MB.
                unpacked = sum(member.file_size for member in archive.infolist())
                if unpacked > os.path.getsize(path):
                    raise ValueError(f"it would unpack to {unpacked:,} bytes")
                for member in archive.infolist():
                    if member.filename.lower().endswith(".pkl"):
                        with archive.open(member) as pickled:
                            _check_pickle(pickled)
    return is_zip


def _check_pickle(file: IO[bytes]) -> None:
    """Refuse a pickle that names what weights do not need; the file is then behind it."""
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument)):
            raise ValueError(f"it names {str(argument).replace(' ', '.')}, which no weights need")


def stored_bytes(state_dict: dict[str, Tensor]) -> int:
    """Return the memory that tensors take when each is copied; shared ones count once."""
    return sum(size for _, size in {(v.data_ptr(), v.nbytes) for v in state_dict.values()})


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
    read = safetensors.torch.load_file if path.suffix == ".safetensors" else load
    try:
        content: Any = read(path)
    except Exception as error:  # text alone makes the unpickler raise a dozen different ones
        raise InputError(
            f"{path} cannot be read as a state dict (is the download complete?): "
            f"{reason(error) if path.stat().st_size else 'the file is empty'}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        kind = f"the keys {list(content)[:5]}" if isinstance(content, dict) else type(content)
        raise InputError(
            f"{path} holds {kind}, not a state dict; write one with "
            "torch.save(model.state_dict(), path)"
        )
    if stored_bytes(content) > path.stat().st_size:
        raise InputError(f"{path} describes larger tensors than it holds")
    return content


def load_matching_weights(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    source: str,
    new_layers: tuple[str, ...] | None = None,
) -> None:
    """Load the weights whose names and shapes fit, and log in one line which those are not.

    Args:
        module: Receives the weights.
        state_dict: Names to tensors.
        source: Where `state_dict` came from, for messages.
        new_layers: Prefixes of the names that may keep their random values; `None`: all may.

    Raises:
        InputError: The module needs a tensor that `state_dict` lacks or has in another shape, or no
            parameter fits.
    """
    tensors = module.state_dict()
    fitting = {k: v for k, v in state_dict.items() if k in tensors and v.shape == tensors[k].shape}
    new = module.load_state_dict(fitting, strict=False).missing_keys
    lacking = [k for k in new if new_layers is not None and not k.startswith(new_layers)]
    if lacking:
        raise InputError(
            f"{source} does not fit the model: {len(lacking)} of its {len(tensors)} tensors are "
            f"absent or of another shape, such as {', '.join(lacking[:3])}"
        )
    if not fitting.keys() & dict(module.named_parameters()).keys():
        raise InputError(f"{source}: it has no weights that fit this model (another architecture?)")
    log_loading(source, len(tensors), new, [k for k in state_dict if k not in fitting])


def log_loading(source: str, total: int, new: Collection[str], skipped: Collection[str]) -> None:
    """Log in one line what a model took over of some weights.

    Args:
        source: Where they came from.
        total: Number of the model's tensors.
        new: Names of those that keep their random values.
        skipped: Names in the source of what the model does not use.
    """
    lists = {"skipped": skipped, "newly initialised": new}
    if set(new) == set(skipped):
        lists = {"skipped and newly initialised": new}
    rest = "".join(f"; {what}: {', '.join(names)}" for what, names in lists.items() if names)
    log.info("loaded %d of %d tensors from %s%s", total - len(new), total, source, rest)


def load_torchvision_weights(
    model: nn.Module, name: str, weights: str | Path | None, new_layers: tuple[str, ...]
) -> None:
    """Load torchvision's published weights by their name, or those of a file.

    Args:
        model: A torchvision segmentation model, or the backbone of one.
        name: torchvision's for the model, such as `fcn_resnet50`.
        weights: torchvision's name for them, the path of a state dict, or `None` for none.
        new_layers: Prefixes of the names that may keep their random values.

    Raises:
        InputError: `weights` is neither, cannot be downloaded, or does not fit the model.
    """
    if weights is None:
        return
    published = get_model_weights(name)
    if str(weights) in published.__members__:
        state_dict = _downloaded(published[str(weights)].url)
    else:
        state_dict = read_state_dict(weights_file(weights, published.__members__))
    load_matching_weights(model, state_dict, str(weights), new_layers)


def weights_file(weights: str | Path, published: Collection[str]) -> Path:
    """Return the path of a file of weights.

    Args:
        weights: The setting, which is no name of published weights.
        published: These names.

    Raises:
        InputError: There is no such file.
    """
    if not Path(weights).is_file():
        raise InputError(
            f"model.weights is {str(weights)!r}, which is not a file; use "
            f"{', '.join(published)}, a file, or null for random ones"
        )
    return Path(weights)


def _downloaded(url: str) -> dict[str, Tensor]:
    """Return torchvision's weights, from the local cache or by downloading them to it."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    try:
        # One of the processes of a run downloads, which the others then need not.
        missing = not (folder / Path(url).name).exists()
        with locked(folder, wait=True) if missing else nullcontext():
            state_dict = torch.hub.load_state_dict_from_url(
                url, map_location="cpu", check_hash=True, weights_only=True
            )
    except Exception as error:  # no network, or whatever torch.load makes of a broken file
        raise InputError(
            f"cannot load {url} ({error}); download it by other means and put it into {folder} "
            "under the same name, or start from random weights with model.weights=null"
        ) from error
    # A backbone is the features of torchvision's classifier of that name.
    return {name.removeprefix("features."): value for name, value in state_dict.items()}


def download_from_hugging_face(
    repository: str, file_name: str, revision: str | None = None
) -> Path:
    """Find a file of the Hugging Face Hub in the local cache, or download it there.

    Args:
        repository: Such as `timm/resnet34.a1_in1k`.
        file_name: Such as `model.safetensors`.
        revision: Commit; by default the newest.

    Raises:
        InputError: It is not in the cache and cannot be downloaded.
    """
    cached = huggingface_hub.try_to_load_from_cache(repository, file_name, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    url = huggingface_hub.hf_hub_url(repository, file_name, revision=revision)
    try:
        # Asked once, since hf_hub_download asks for half a minute when there is no network.
        huggingface_hub.get_hf_file_metadata(url, timeout=10)
        return Path(huggingface_hub.hf_hub_download(repository, file_name, revision=revision))
    except Exception as error:  # whatever the HTTP library of the installed version raises
        raise InputError(
            f"cannot download {url} ({error}); download it by other means and give "
            "model.weights=FILE, or start from random weights with model.weights=null"
        ) from error


def adapt_first_conv(model: nn.Module, channels: int) -> None:
    """Let a model of RGB images take others: its first convolution gets as many input channels.

    The weights are those of red, green and blue in turn, scaled by 3 / channels, as timm does it;
    for one channel their sum.

    Args:
        model: Changed in place; one that takes so many channels already stays as it is.
        channels: Number of channels.

    Raises:
        InputError: Its first convolution takes neither 3 channels nor so many.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or first.in_channels not in (3, channels):
        raise InputError(f"this model takes no images of {channels} channels")
    if first.in_channels != channels:
        widened = adapt_input_conv(channels, first.weight.detach())
        first.weight = nn.Parameter(widened, first.weight.requires_grad)
        first.in_channels = channels


def timm_model(name: str, weights: str | Path | None, **options: Any) -> nn.Module:
    """Build a timm model, with every one of its weights loaded or none.

    Args:
        name: Of the architecture, such as `resnet34`, or with the tag of its weights,
            `resnet50.a1_in1k`.
        weights: `imagenet` (what timm publishes under the name), the path of a state dict of the
            timm model, or `None` for random ones.
        options: Of `timm.create_model`, such as `features_only=True`.

    Raises:
        InputError: Unknown name, or weights that cannot be loaded or do not fit.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(nearest)}?" if nearest else "see timm.list_models()"
        raise InputError(f"model.encoder is {name!r}, which timm does not have; {hint}")
    try:
        if weights is None:
            return _with_active_residuals(timm.create_model(name, **options))
        file = _published_file(name) if weights == "imagenet" else Path(weights)
        names = read_state_dict(file).keys()
        overlay = {"file": str(file)}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except InputError:
        raise
    except Exception as error:  # also what timm's translation of names makes of other names
        message = f"timm cannot make {name!r} with weights {weights}: {reason(error)}"
        raise InputError(message) from error
    lacking = _random_tensors(model, name, file, names)
    if lacking:
        raise InputError(
            f"{file} does not fit the encoder {name}: no weights for {len(lacking)} of its "
            f"{len(model.state_dict())} tensors, such as {', '.join(lacking[:3])}"
        )
    log.info("loaded the weights of the encoder %s from %s", name, file)
    return model


def _random_tensors(model: nn.Module, name: str, file: Path, names: Collection[str]) -> list[str]:
    """Find what timm left random: it loads what fits and does not tell.

    Args:
        model: timm's, made with the weights of `file`.
        name: Its name.
        file: A state dict.
        names: The names in it.

    Returns:
        Names of the tensors of `model` that are not from the file.
    """
    plain = {_plain_name(key) for key in names}
    tensors = {k: tensor for k, tensor in model.state_dict().items() if "num_batches" not in k}
    lacking = [key for key in tensors if _plain_name(key) not in plain]
    if not lacking:
        return []
    # Or the names are those of another project, which timm translates. Then it loads them strictly
    # into the whole model, with the classifier, or, if it is not strict, what is random differs.
    try:
        whole = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    except RuntimeError:
        return lacking
    translated = {_plain_name(key): tensor for key, tensor in whole.state_dict().items()}
    fits = len(plain - translated.keys()) >= len(lacking) and all(
        torch.equal(tensors[key], translated[_plain_name(key)]) for key in lacking
    )
    return [] if fits else lacking


def _plain_name(key: str) -> str:
    """Return the name of a tensor without what timm's feature extractors make of it."""
    return key.removeprefix("model.").removeprefix("body.").replace(".", "_")


def _with_active_residuals(model: nn.Module) -> nn.Module:
    """Undo timm's zero gains at the end of random residual branches.

    They serve the hundreds of epochs on ImageNet. In the dozens of epochs from scratch for which
    one takes a random encoder they seem to cost accuracy: on CamVid (12 epochs, ResNet-18, a U-Net
    with another decoder) mIoU was 0.39 with them, 0.42 without, though the latter run also flipped
    by image, not by batch.
    """
    gains = [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for gain in gains:
        # On "meta", where a stranger's model is made at first, there are no values to look at.
        if not gain.is_meta and not gain.any():
            nn.init.ones_(gain)
    return model


def _published_file(name: str) -> Path:
    pretrained_cfg = timm.get_pretrained_cfg(name)
    if pretrained_cfg is None or not pretrained_cfg.hf_hub_id:
        raise InputError(
            f"timm publishes no weights of {name}; use model.weights=null, a file, or another "
            "model.encoder"
        )
    return download_from_hugging_face(pretrained_cfg.hf_hub_id, "model.safetensors")


def is_at_hand(encoder: str) -> bool:
    """Return whether the published weights of a timm encoder are in the local cache."""
    published = timm.get_pretrained_cfg(encoder)
    repository = published.hf_hub_id if published is not None else None
    if not repository:
        return False
    found = huggingface_hub.try_to_load_from_cache(repository, "model.safetensors")
    return isinstance(found, str)


def encoder_of_file(path: str | Path, others: Collection[str] = ()) -> str | None:
    """Return the timm encoder whose weights a file holds: by its name, or that of its folder.

    Args:
        path: Such as `resnet34.a1_in1k.safetensors`, or `model.safetensors` in a folder
            `resnet34.a1_in1k`, or in that of the cache of the Hugging Face Hub.
        others: Encoders whose tensors are compared with those of the file, if no name helps.

    Returns:
        The name, `None` if it is none of them.
    """
    path = Path(path)
    for part in (path.name, *reversed(path.parts[:-1])):
        name = re.sub(r"^models--timm--|\.(safetensors|pth|pt|bin)$", "", part)
        if timm.is_model(name.split(".")[0]):
            return name
    tensors = {_plain_name(name): value.shape for name, value in read_state_dict(path).items()}
    for name in others:
        with torch.device("meta"):
            own = timm.create_model(name, features_only=True).state_dict()
        if all(tensors.get(_plain_name(key)) == value.shape for key, value in own.items()):
            return name
    return None

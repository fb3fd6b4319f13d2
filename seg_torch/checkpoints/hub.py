"""Published models of the Hugging Face Hub that segment without training, with their own classes.

Nothing of what is downloaded is run: the configuration is plain data that is checked like that of a
stranger's checkpoint, and the weights are tensors.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import errors
from torch import Tensor, nn

from seg_torch.datasets.base import published_labels
from seg_torch.errors import InputError
from seg_torch.labels import Labels
from seg_torch.models.network import Network
from seg_torch.models.smp import published_smp
from seg_torch.models.transformers import transformers
from seg_torch.models.weights import download_from_hugging_face

log = logging.getLogger(__name__)

HUB = "seg_torch.checkpoints.hub.hub"  # as conf/model/hub.yaml names it
# What SMP's models are published for stands in their names alone: a word there -> dataset.
WORDS = {"ade": "ade20k", "cityscapes": "cityscapes", "voc": "voc"}
KNOWN_LABELS = {word: published_labels(name) for word, name in WORDS.items()}
# Models whose position embeddings fit images of one size.
FIXED_SIZE = ("dpt", "data2vec-vision", "sapiens2", "tipsv2_dpt")


class Published(NamedTuple):
    """A network that segments, its classes, and the (height, width) at which it sees images."""

    network: Network
    labels: Labels
    resize: tuple[int, int] | None


def hub(name: str, num_classes: int | None = None) -> Published:
    """Load a semantic or universal segmentation model of transformers, or one of SMP.

    Its images are scaled as its preprocessor_config.json says, or SMP's
    albumentations_config_eval.json, but not resized, except for models that take one size.

    Args:
        name: Repository, such as `nvidia/segformer-b0-finetuned-ade-512-512`, or a folder with its
            files.
        num_classes: Refused: the classes are the model's.

    Raises:
        InputError: The repository cannot be had, or it is not of a model that segments.
    """
    if num_classes is not None:
        raise InputError(
            "model=hub predicts and is evaluated, with its own classes; to train such a model use "
            f"model=segformer, mask2former or smp with model.weights={name} or its encoder, and in "
            "model.config what its config.json says"
        )
    setting, folder = f"model.name={name}", Path(name).expanduser()
    source = folder if folder.is_dir() else name
    config = read_config(hub_file(source, "config.json", setting), setting)
    if "_model_class" in config:
        file = _optional_file(source, "albumentations_config_eval.json", setting)
        statistics = None if file is None else _albumentations(read_config(file, setting))
        model: Any = published_smp(config, hub_file(source, "model.safetensors", setting))
        model.mean, model.std = statistics or (model.mean, model.std)
        return Published(Network(model), _smp_labels(name, int(config["classes"])), None)
    names = _names(name, config)
    _optional_file(source, "preprocessor_config.json", setting)
    weights = _optional_file(source, "model.safetensors", setting)  # else sharded, or older
    home = weights.parent if weights else source
    try:
        model = transformers(len(names), _architecture(config), home, complete=True)
    except InputError as error:
        raise InputError(f"model.name={name}: {error}") from error
    side = model.image_size
    resize = (side, side) if config["model_type"] in FIXED_SIZE else None
    return Published(Network(model), _with_palette(names), resize)


def with_classes(network: Network, labels: Labels, wanted: Labels, name: str) -> Network:
    """Return a published network with the classes of a dataset, in their order.

    Args:
        network: Stays as it is.
        labels: Its classes.
        wanted: Those of the dataset.
        name: Of the network, for the message.

    Raises:
        InputError: It does not know all of them.
    """
    order = match_class_names(labels.names, wanted.names)
    if order is None:
        missing = [n for n in wanted.names if match_class_names(labels.names, [n]) is None]
        raise InputError(
            f"{name} knows the {len(labels)} classes {first_names(labels)}; of the {len(wanted)} "
            f"classes of the data it lacks {len(missing)}: {', '.join(missing[:5])}"
        )
    if order == list(range(len(labels))):
        return network
    model = SelectClasses(network.model, order)
    return Network(model, network.mean.flatten().tolist(), network.std.flatten().tolist())


def first_names(labels: Labels) -> str:
    """Return the names of classes, or the first of them, for a message."""
    names = ", ".join(labels.names[:5])
    return f"({names}, …)" if len(labels) > 5 else f"({names})"


def match_class_names(names: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Find classes of one list in another by name.

    Names are compared without case and without the synonyms behind a comma. Lists of one length,
    or with a background before it, are also taken for the same where they agree in half of the
    names and no name is at two positions: what differs are other words, such as "window" for
    "windowpane".

    Args:
        names: Of a model.
        wanted: Of a dataset.

    Returns:
        For each of `wanted` its index in `names`, or `None` where one is not there.
    """
    known, keys = ([_key(name) for name in each] for each in (names, wanted))
    if set(keys) <= set(known):
        return [known.index(key) for key in keys]
    first = len(known) - len(keys)
    same = sum(a == b for a, b in zip(known[first:], keys, strict=False))
    moved = any(key in known and known.index(key) != first + i for i, key in enumerate(keys))
    if first in (0, 1) and 2 * same >= len(keys) and not moved:
        return list(range(first, len(known)))
    return None


class SelectClasses(nn.Module):
    """A model whose classes are some of another's, in another order.

    Args:
        model: Float [N, 3, H, W] -> {"out": logits [N, K, h, w]}.
        order: Indices of the classes.
    """

    def __init__(self, model: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.order = list(order)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute `out`, float [N, len(order), h, w]."""
        return {"out": self.model(x)["out"][:, self.order]}


def hub_file(source: str | Path, file: str, setting: str, revision: str | None = None) -> Path:
    """Find a file of a model of the Hub, in the local cache or by downloading it.

    Args:
        source: Repository, `OWNER/NAME`; as a `Path` a folder with its files.
        file: Such as `config.json`.
        setting: What the user gave, such as `model.name=OWNER/NAME`; messages begin with it.
        revision: Branch, tag or commit; by default the newest that is in the cache.

    Raises:
        InputError: It cannot be had; the message says why, and what to do.
    """
    absent = _AbsentError(
        f"{setting}: there is no {file} in it; expected a model of transformers or SMP for "
        "model=hub, or what Segmenter.save_pretrained writes for checkpoint="
    )
    if isinstance(source, Path):
        if not (source / file).is_file():
            raise absent
        return source / file
    try:
        return download_from_hugging_face(source, file, revision)
    except errors.HFValidationError:
        message = f"{setting}: neither a folder nor the name of a repository (OWNER/NAME)"
        raise InputError(message) from None
    except InputError as error:
        cause = error.__cause__
    if isinstance(cause, errors.RemoteEntryNotFoundError):
        raise absent from cause
    if isinstance(cause, errors.GatedRepoError):
        reason = (
            f"its owner asks for consent: give it at https://huggingface.co/{source} and log in "
            "with hf auth login"
        )
    elif isinstance(cause, errors.RepositoryNotFoundError):
        reason = "the Hugging Face Hub has no such repository, or it is private (hf auth login)"
    elif isinstance(cause, errors.RevisionNotFoundError):
        reason = f"the repository has no branch, tag or commit {revision}"
    else:
        reason = (
            f"{file} is not in the local cache, and the Hugging Face Hub cannot be reached "
            f"({cause}); where it can, run hf download {source} --local-dir FOLDER, and give "
            f"{setting.partition('=')[0]}=FOLDER here"
        )
    raise InputError(f"{setting}: {reason}") from cause


class _AbsentError(InputError):
    """The model can be had, and has no such file."""


def _optional_file(source: str | Path, file: str, setting: str) -> Path | None:
    try:
        return hub_file(source, file, setting)
    except _AbsentError:
        return None


def read_config(path: Path, setting: str) -> dict[str, Any]:
    """Read a JSON file of a model, which may come from anybody.

    Args:
        path: Of the file.
        setting: See `hub_file`.

    Raises:
        InputError: It does not hold settings by name.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{setting}: {path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{setting}: {path} holds no settings by name")
    return content


def _architecture(config: Any) -> Any:
    """Return a config.json without the names of its classes, of where it came from and of code.

    That of MaskFormer's decoder names the backbone of a whole DETR, of which nothing is used.
    """
    if isinstance(config, list):
        return [_architecture(value) for value in config]
    if not isinstance(config, dict):
        return config
    left_out = {"id2label", "label2id", "auto_map", "architectures", "quantization_config"}
    plain = {k: _architecture(v) for k, v in config.items() if k not in left_out and k[0] != "_"}
    if isinstance(plain.get("decoder_config"), dict):
        decoder = plain["decoder_config"]
        plain["decoder_config"] = {k: v for k, v in decoder.items() if "backbone" not in k}
    return plain


def _names(name: str, config: dict[str, Any]) -> list[str]:
    """Return the names of the classes, each once."""
    id2label = config.get("id2label")
    if not isinstance(id2label, dict) or not all(str(key).isdigit() for key in id2label):
        raise InputError(f"model.name={name}: its config.json has no id2label, the classes' names")
    names: list[str] = []
    for i, key in enumerate(sorted(id2label, key=int)):
        label = str(id2label[key]).strip() or f"class {i}"
        names.append(f"{label} {i}" if label in names else label)
    return names


def _with_palette(names: Sequence[str]) -> Labels:
    """Return the classes, with the colours of the dataset whose classes they are."""
    for labels in KNOWN_LABELS.values():
        if match_class_names(names, labels.names) == list(range(len(names))):
            return Labels(tuple(names), labels.palette)
    return Labels(tuple(names))


def _smp_labels(name: str, classes: int) -> Labels:
    for word, labels in KNOWN_LABELS.items():
        if word in name.lower() and len(labels) == classes:
            return labels
    log.info("%s does not name its %d classes", name, classes)
    return Labels(tuple(f"class {i}" for i in range(classes)))


def _albumentations(config: dict[str, Any]) -> tuple[list[float], list[float]] | None:
    """Return the statistics of images scaled to [0, 1] in the file that SMP's models come with."""
    for transform in config.get("transform", {}).get("transforms", []):
        if transform.get("__class_fullname__", "").endswith("Normalize"):
            scale = transform.get("max_pixel_value", 255) / 255
            return [m * scale for m in transform["mean"]], [s * scale for s in transform["std"]]
    return None


def _key(name: str) -> str:
    return name.split(",")[0].split(";")[0].strip().lower().replace("_", " ").replace("-", " ")

"""What is scored, and on what: a checkpoint or a published model, and its own or other data."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning import Trainer
from omegaconf import MISSING, DictConfig

from seg_torch import hardware
from seg_torch.checkpoints import checkpoint
from seg_torch.checkpoints.exported import load_network
from seg_torch.checkpoints.hub import HUB, first_names, with_classes
from seg_torch.checkpoints.trusted import DATA, instantiate_trusted
from seg_torch.configuration import instantiate, plain
from seg_torch.data import SegmentationDataModule
from seg_torch.datasets.base import SPLITS, BaseDataset
from seg_torch.datasets.class_map import Groups, MappedDataset, as_text
from seg_torch.distributed import Processes
from seg_torch.errors import InputError
from seg_torch.evaluation.scorer import Scorer
from seg_torch.hardware import available_cpus
from seg_torch.images.format import RGB, ImageFormat
from seg_torch.images.resize import Resize, in_words
from seg_torch.labels import Labels
from seg_torch.models.network import Network
from seg_torch.prediction.inference import Inference, InferenceSettings
from seg_torch.training.trainer import build_trainer


class Model(NamedTuple):
    """A network, and what is known of it.

    Attributes:
        name: As the user gave it.
        network: Images to logits.
        labels: Its classes.
        resize: At which size it sees images, see `seg_torch.images.resize.seen_size`.
        format: How files become its images.
        config: Configurations of `model`, `data` and `preprocessing`, where there are any.
    """

    name: str
    network: Network
    labels: Labels
    resize: Resize
    format: ImageFormat
    config: dict[str, Any]


class Setup(NamedTuple):
    """All that `seg_torch.evaluation.scorer.score` needs but the split, and where it comes from."""

    trainer: Trainer
    scorer: Scorer
    data: SegmentationDataModule
    folder: Path
    model: Model
    processes: Processes


def open_for_scoring(cfg: DictConfig, label_quality: bool = False) -> Setup:
    """Open the model and the data of a command, in all its processes.

    Args:
        cfg: Settings of the command.
        label_quality: Score the labels of each image, too.

    Raises:
        InputError: The checkpoint, the data or a setting cannot be used.
    """
    if cfg.split not in SPLITS:
        raise InputError(f"split={cfg.split}: expected train, val or test")
    model = open_model(cfg)
    data = open_data(cfg, model)
    processes = Processes(cfg.trainer)
    folder = Path(processes.same(str(cfg.output_dir)))
    processes.first(lambda: len(data.dataset(cfg.split)))  # which fetches it, if it can
    processes.first_of_each_machine(lambda: data.dataset(cfg.split))
    model = with_labels(model, data, cfg.split)
    trainer = build_trainer(cfg, processes, folder)
    hardware.forget_shapes()
    settings = InferenceSettings.parse(cfg.tile, cfg.tta, trainer.precision)
    inference = Inference(model.network, len(model.labels), data.resize, settings)
    scorer = Scorer(inference, model.labels, cfg.average_precision, cfg.boundary, label_quality)
    return Setup(trainer, scorer, data, folder, model, processes)


def open_model(cfg: DictConfig) -> Model:
    """Open the checkpoint of a command, or a published model.

    Raises:
        InputError: It cannot be used, or both are given, or none.
    """
    published = cfg.get("model") is not None and cfg.model._target_ == HUB
    if published == (cfg.checkpoint is not None):
        raise InputError("evaluate needs checkpoint=FILE, or model=hub model.name=OWNER/NAME")
    if published:
        network, labels, resize = instantiate(cfg.model)
        return Model(cfg.model.name, network, labels, resize, RGB, {})
    network, labels, description = load_network(cfg.checkpoint, cfg.trust)
    config = {key: description[key] for key in ("model", "data", "preprocessing")}
    resize, format = config["preprocessing"]["resize"], checkpoint.image_format(description)
    return Model(str(cfg.checkpoint), network, labels, resize, format, config)


def with_labels(model: Model, data: SegmentationDataModule, split: str) -> Model:
    """Return a model with the classes of the data; only a published one may know others, too.

    Raises:
        InputError: It has other classes; the message says how `data.classes` makes them the same.
    """
    dataset = data.dataset(split)
    labels = dataset.labels
    if not model.config:
        network = with_classes(model.network, model.labels, labels, model.name)
        return model._replace(network=network, labels=labels)
    if labels != model.labels:
        raise InputError(
            f"{model.name} knows the {len(model.labels)} classes {first_names(model.labels)}, the "
            f"data has the {len(labels)} classes {first_names(labels)}"
            + _how_to_match(model, dataset, data.classes)
        )
    return model


def _how_to_match(model: Model, dataset: BaseDataset, given: Groups | None) -> str:
    """Return the `data.classes` that groups classes of the data as those of a model, if any do.

    Args:
        model: Its classes are looked for by their names and, where it was trained with
            `data.classes`, by those of that.
        dataset: The data, with whichever classes.
        given: The `data.classes` that led to them, if any.
    """
    own = (dataset.dataset if isinstance(dataset, MappedDataset) else dataset).labels
    groups, left = {}, {name.casefold(): name for name in own.names}
    for name in model.labels.names:
        names = [name]
        for known in (model.config["data"].get("classes"), given):
            old = known.get(name, []) if isinstance(known, Mapping) else []
            names += map(str, old if isinstance(old, list) else [old])
        groups[name] = [left.pop(n.casefold()) for n in names if n.casefold() in left]
    if not any(groups.values()):
        return "; data.classes='{NEW: [OLD, OLD]}' says which of them are the same"
    rest = "background" if "background" in map(str.casefold, groups) else "ignore"
    setting = shlex.quote(f"data.classes={as_text(groups)}")
    return f". Those of the same names are scored with\n  {setting} data.rest={rest}"


def open_data(cfg: DictConfig, model: Model) -> SegmentationDataModule:
    """Open the data of a command: `cfg.data`, on top of the checkpoint's own settings.

    Raises:
        InputError: They cannot be used.
    """
    given = {key: value for key, value in plain(cfg.data).items() if value is not None}
    reduced = isinstance(model.resize, int)
    seen = {"resize": None, "max_side": model.resize} if reduced else {"resize": model.resize}
    for key in ("resize", "max_side"):
        if given.get(key) not in (None, seen.get(key)):
            raise InputError(
                f"data.{key}={given[key]}: the network sees images as it did in training, "
                f"{in_words(model.resize)}; a checkpoint is not evaluated at another size"
            )
    # Without data=…: the checkpoint's own, with what was set on top.
    stored = {} if "_target_" in given else stored_settings(model.config.get("data", {}), given)
    settings = {**stored, **given, **model.format.settings(), **seen}
    settings["augment"] = None  # which only training needs
    # Names of classes, of which none is an order to Hydra.
    groups = {key: settings.pop(key) for key in ("classes", "rest") if key in settings}
    data = instantiate_trusted(settings, cfg.trust, DATA)
    if not isinstance(data, SegmentationDataModule):
        raise InputError(f"the checkpoint's data are no data module but a {type(data).__name__}")
    data.group_classes(**groups)
    return data


def stored_settings(stored: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's settings of its data, without what is another machine's business.

    Args:
        stored: Plain data, which stays as it is.
        given: The user's settings, which go on top.

    Raises:
        InputError: The model comes without data, or does not say where they are.
    """
    if not stored:
        raise InputError("this model comes without data: give data=ade20k data.root=FOLDER")
    for key in ("root", "name"):
        if stored.get(key) == MISSING and key not in given:  # of a model of the Hub
            raise InputError(f"the model does not say where its data are: give data.{key}=...")
    name = stored.get("name")
    if name and "name" not in given and not Path(str(name)).expanduser().is_dir():
        # Nothing is downloaded because a file says so.
        raise InputError(f"trained on the dataset {name}; to fetch it, give data.name={name}")
    settings = without_key(stored, "download")
    if isinstance(settings.get("num_workers"), int):
        settings["num_workers"] = min(settings["num_workers"], available_cpus())
    return settings


def without_key(node: Any, name: str) -> Any:
    """Return plain data without a key, wherever in it."""
    if isinstance(node, dict):
        return {key: without_key(value, name) for key, value in node.items() if key != name}
    return [without_key(value, name) for value in node] if isinstance(node, list) else node

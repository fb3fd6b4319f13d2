"""evaluate.py: scores a checkpoint on its own or on other data; or a published model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning import Trainer
from omegaconf import MISSING, DictConfig, OmegaConf

from seg_torch.checkpoints import checkpoint
from seg_torch.checkpoints.exported import load_network
from seg_torch.checkpoints.hub import HUB, Selection, class_order
from seg_torch.data.module import SegmentationDataModule
from seg_torch.errors import InputError
from seg_torch.hardware import available_cpus
from seg_torch.images.format import RGB, ImageFormat
from seg_torch.labels import Labels
from seg_torch.models.network import Network
from seg_torch.prediction.inference import Inference, parse_tta
from seg_torch.training.task import SegmentationTask
from seg_torch.training.trainer import (
    build_trainer,
    on_first_process,
    on_other_machines,
    run_folder,
    score,
)


def evaluate(cfg: DictConfig) -> None:
    """Scores a checkpoint or a published model on a split of its own data or of other data."""
    score(*prepare(cfg), cfg.split)


def prepare(
    cfg: DictConfig, label_quality: bool = False
) -> tuple[Trainer, SegmentationTask, SegmentationDataModule, Path]:
    """Return all that `seg_torch.training.trainer.score` needs but the split.

    Args:
        cfg: Settings of the command.
        label_quality: Score the labels of each image, too.

    Raises:
        InputError: The checkpoint, the data or a setting cannot be used.
    """
    if cfg.split not in ("train", "val", "test"):
        raise InputError(f"split={cfg.split}: expected train, val or test")
    model = cfg.get("model")
    if (cfg.checkpoint is None) != (model is not None and model._target_ == HUB):
        raise InputError("evaluate needs checkpoint=FILE, or model=hub model.name=OWNER/NAME")
    if cfg.checkpoint is not None:
        network, labels, description = load_network(cfg.checkpoint, cfg.trust)
        resize, own_data = description["preprocessing"]["resize"], description["data"]
        format = checkpoint.image_format(description)
    else:
        network, labels, resize = instantiate(cfg.model)
        own_data, format = {}, RGB
    trainer = build_trainer(cfg.trainer)
    folder = run_folder(trainer, cfg)
    data = data_module(cfg, own_data, resize, format)
    data.test_split = cfg.split
    on_first_process(trainer, lambda: data.dataset(cfg.split))
    on_other_machines(trainer, lambda: data.dataset(cfg.split))
    found = data.dataset(cfg.split).labels
    if cfg.checkpoint is None:
        network, labels = _with_classes_of(network, labels, found, cfg.model.name)
    if found != labels:
        raise InputError(
            f"{cfg.checkpoint} knows the {len(labels)} classes {_shortened(labels)}, the data "
            f"has the {len(found)} classes {_shortened(found)}"
        )
    inference = Inference(
        network, len(labels), data.resize, cfg.tile, *parse_tta(cfg.tta), str(trainer.precision)
    )
    task = SegmentationTask(
        network,
        labels,
        inference,
        average_precision=cfg.average_precision,
        boundary=cfg.boundary,
        label_quality=label_quality,
    )
    return trainer, task, data, folder


def data_module(
    cfg: DictConfig, own: dict[str, Any], resize: Sequence[int] | None, format: ImageFormat
) -> SegmentationDataModule:
    """Return the data of a command: `cfg.data`, on top of the checkpoint's own settings.

    Raises:
        InputError: They cannot be used.
    """
    settings = _data_settings(cfg, own, resize, format)
    data = checkpoint.instantiate(settings, cfg.trust, checkpoint.DATA)
    if not isinstance(data, SegmentationDataModule):
        raise InputError(f"the checkpoint's data are no data module but a {type(data).__name__}")
    return data


def _with_classes_of(
    network: Network, labels: Labels, wanted: Labels, name: str
) -> tuple[Network, Labels]:
    """Return a published network with the classes of the data, in their order.

    Raises:
        InputError: It does not know all of them.
    """
    order = class_order(labels.names, wanted.names)
    if order is None:
        missing = [n for n in wanted.names if class_order(labels.names, [n]) is None]
        raise InputError(
            f"{name} knows the {len(labels)} classes {_shortened(labels)}; of the {len(wanted)} "
            f"classes of the data it lacks {len(missing)}: {', '.join(missing[:5])}"
        )
    if order != list(range(len(labels))):
        network.model = Selection(network.model, order)
    return network, wanted


def _data_settings(
    cfg: DictConfig,
    own: dict[str, Any],
    resize: Sequence[int] | None,
    format: ImageFormat,
) -> dict[str, Any]:
    """Return the settings of the data module: the checkpoint's own, and the user's on top."""
    given: Any = OmegaConf.to_container(cfg.data, resolve=True)
    settings = {key: value for key, value in given.items() if value is not None}
    if "_target_" not in settings:  # no data=…: the checkpoint's own, with what was set on top
        if not own:
            raise InputError("this model comes without data: give data=ade20k data.root=FOLDER")
        for key in ("root", "name"):
            if own.get(key) == MISSING and key not in settings:  # of a model of the Hub
                raise InputError(f"the model does not say where its data are: give data.{key}=...")
        name = own.get("name")
        if name and "name" not in settings and not Path(str(name)).expanduser().is_dir():
            # Nothing is downloaded because a file says so.
            raise InputError(f"trained on the dataset {name}; to fetch it, give data.name={name}")
        settings = {**_own_data(own), **settings}
    if given.get("resize") not in (None, resize):
        raise InputError(
            f"data.resize={given['resize']}: the network sees images as it did in training, at "
            f"{resize or 'their own size'}; a checkpoint is not evaluated at another size"
        )
    settings |= format.settings()  # which the network decides, too
    return {**settings, "resize": resize, "augment": None}  # which only training needs


def _own_data(data: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's settings without what is this machine's business."""
    for node in checkpoint.nodes(data):
        if isinstance(node, dict):
            node.pop("download", None)
    workers = data.get("num_workers")
    if isinstance(workers, int):
        data["num_workers"] = min(workers, available_cpus())
    return data


def _shortened(labels: Labels) -> str:
    names = ", ".join(labels.names[:5])
    return f"({names}, …)" if len(labels) > 5 else f"({names})"

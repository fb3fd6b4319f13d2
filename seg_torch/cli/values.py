"""Whether the values of settings are of the right type and in their range."""

import math
import re
from contextlib import suppress
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from seg_torch.cli.messages import as_text
from seg_torch.configuration import escaped
from seg_torch.errors import InputError
from seg_torch.files import CONFIG_FOLDER

EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}
# Of [height, width], for which one number stands as well.
SIDES = ("data.resize", "data.augment.crop")
# Settings that are lists of words, for which one word stands as well.
WORDS = ("save", "trust", "data.band_files")
# Settings that are false, true or a number; what they are for looks at it.
SWITCHES_OR_NUMBERS = ("boundary", "model.freeze_encoder")
# What settings are like that are null by default.
SAMPLES = {
    "data.resize": [256, 256],
    "data.max_side": 640,
    "data.augment.crop": [352, 480],
    "data.augment.paste": 0.5,
    "data.channels": 4,
    "data.rgb": [0, 1, 2],
    "data.eval_batch_size": 4,
    "data.num_workers": 4,
    "data.dataset.limit": 1000,
    "data.dataset.unlabelled": 0,
    "ema": 0.999,
    "patience": 10,
    "batch_size": 8,
    "max_batch_size": 8,
    "max_pixels": 1e9,
    "port": 7860,
}
# Settings, and of lists each item: the smallest and the largest value.
RANGES = {
    "data.resize": (1, 8192),
    "data.max_side": (32, 8192),
    "data.augment.crop": (1, math.inf),
    "data.augment.flip": (0, 1),
    "data.augment.jitter": (0, math.inf),
    "data.augment.hue": (0, 0.5),
    "data.augment.paste": (0, 1),
    "data.batch_size": (1, math.inf),
    "data.eval_batch_size": (1, math.inf),
    "data.repeat": (1, math.inf),
    "data.channels": (1, math.inf),
    "data.num_workers": (0, math.inf),
    "data.rgb": (0, math.inf),
    "data.dataset.val_fraction": (0, 1),
    "min_confidence": (0, 1),
    "warmup_steps": (0, math.inf),
    "batch_size": (1, math.inf),
    "max_batch_size": (1, math.inf),
    "max_pixels": (1, math.inf),
    "workers": (1, math.inf),
}


def check(cfg: DictConfig, defaults: DictConfig) -> None:
    """Refuse values of another type than the default's, and out of their range.

    What can only mean one thing becomes that: `data.resize=256` is `[256,256]`, and `save=mask` is
    `[mask]`.

    Raises:
        InputError: There is such a value.
    """
    for key in (*SIDES, *WORDS):
        value = OmegaConf.select(cfg, key)
        if key in SIDES and type(value) is int:
            OmegaConf.update(cfg, key, [value, value])
        if key in WORDS and isinstance(value, str):
            OmegaConf.update(cfg, key, [value])
    groups = OmegaConf.select(cfg, "data.classes")
    if isinstance(groups, str):
        OmegaConf.update(cfg, "data.classes", escaped(_groups(groups)))
    _check_type("", OmegaConf.to_container(cfg), OmegaConf.to_container(defaults))
    for key, (low, high) in RANGES.items():
        value = OmegaConf.select(cfg, key)
        items = value if OmegaConf.is_list(value) else [value]
        if any(item is not None and not low <= item <= high for item in items):
            limits = f"{low} to {high}" if high < math.inf else f"at least {low}"
            raise InputError(f"{key}={as_text(_plain(value))}: expected {limits}")


def _groups(text: str) -> dict[str, Any]:
    """Return the groups of classes that a text stands for, YAML in which every value is a text."""
    with suppress(yaml.YAMLError):
        node = yaml.compose(text, yaml.BaseLoader)
        if isinstance(node, yaml.MappingNode):
            groups = yaml.load(text, yaml.BaseLoader)
            if len(groups) < len(node.value):
                raise InputError(f"data.classes={text}: a new class is there twice")
            spaced = re.sub(r":(?=\S)", ": ", text)  # else road:road is one name
            return _groups(spaced) if "" in groups.values() and spaced != text else groups
    raise InputError(
        f"data.classes={text}: expected groups, in quotes: "
        "data.classes='{vehicle: [car, truck], road: road}'"
    )


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _check_type(key: str, value: Any, default: Any) -> None:
    """Refuse a value of another type than the default, also in lists and in sections."""
    if value is None or (isinstance(value, str) and "${" in value):
        return
    if default is None:  # such as the demo's data.augment.crop, which the file below it gives
        group, _, name = key.partition(".")
        path = CONFIG_FOLDER / group / "default.yaml"
        default = _plain(OmegaConf.select(OmegaConf.load(path), name)) if path.is_file() else None
        default = SAMPLES.get(key, default)
    if isinstance(default, dict):
        if not isinstance(value, dict):
            raise InputError(f"{key}={as_text(value)}: expected {key}.KEY=VALUE")
        if value.get("_target_") == default.get("_target_"):
            for name in value.keys() & default.keys():
                _check_type(f"{key}.{name}".lstrip("."), value[name], default[name])
        return
    items = value if isinstance(value, list) else [value]
    sample = default[0] if isinstance(default, list) and default else default
    kind = type(sample)
    if kind is int and list in (type(value), type(default)):
        kind = float  # lists may mix them
    if kind not in EXPECTED or (key, value) == ("trainer.deterministic", "warn"):
        return
    if key in SWITCHES_OR_NUMBERS and type(value) is int:
        return
    kinds = (int, float) if kind is float else (kind,)
    right = all(type(item) in kinds and item == item for item in items)  # nan is none
    pair = key in SIDES or key == "data.augment.scale"
    if isinstance(default, list) and key != "data.augment.jitter":  # one number, or three
        right &= isinstance(value, list) and (not pair or len(items) == 2)
    elif isinstance(value, list) and isinstance(default, int):
        right &= key.startswith(("trainer.devices", "model."))
    if not right:
        expected = EXPECTED[type(sample)]
        if isinstance(default, list):
            expected = "two numbers" if pair else "numbers"
        raise InputError(f"{key}={as_text(value)}: expected {expected}, such as {as_text(default)}")

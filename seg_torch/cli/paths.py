"""Settings that are paths: what the user gives is the path, whatever characters are in it.

Hydra reads the command line by a grammar of its own, in which brackets, commas, `=` and letters
outside ASCII mean something or nothing. So a path is quoted before Hydra sees it.
"""

import os
import re
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from seg_torch.commands import COMMANDS
from seg_torch.configuration import escaped
from seg_torch.errors import InputError

# Besides those of each command: what is in the sections. Some may be names as well, of the Hub or
# of published weights.
IN_SECTIONS = (
    *("data.root", "data.name", "data.dataset.extra", "data.dataset.id2label"),
    *("model.name", "model.weights"),
)
SEVERAL = ("runs", "data.dataset.extra")
# One of several values: in quotes, in brackets, or up to the next comma.
_PART = re.compile(r"'((?:\\'|[^'])*)'(?=,|$)|\"((?:\\\"|[^\"])*)\"(?=,|$)|\[[^]]*\](?=,|$)|[^,]*")


def settings_of(command: str) -> tuple[str, ...]:
    """Return the names of a command's settings that are paths."""
    return (*COMMANDS[command].paths, *IN_SECTIONS)


def exists(text: str) -> bool:
    """Return whether there is a file or folder of that name; `~` may stand for the home."""
    return os.path.lexists(text) or os.path.exists(os.path.expanduser(text))


def expanded(text: str) -> str:
    """Return a path with `~` replaced by the home, unless there is one that begins with it."""
    return text if os.path.lexists(text) else os.path.expanduser(text)


def literal(text: str) -> str:
    """Return a text as Hydra's grammar has to see it to take every character for itself."""
    return quoted(escaped(text))


def quoted(text: str) -> str:
    """Return a text in quotes of Hydra's grammar."""
    return QuotedString(text, Quote.single).with_quotes()


def as_override(key: str, text: str, sweep: bool) -> str:
    """Return the value of a setting that is a path as Hydra has to see it.

    Args:
        key: Of the setting.
        text: What the user gave. Where no path of this name exists, commas separate the values of
            a sweep, and brackets hold the items of a setting that takes several.
        sweep: Whether there may be a value for each of several jobs.

    Raises:
        InputError: It is empty.
    """
    # A sweep has one folder, whose name may have a comma.
    several = sweep and key not in ("output_dir", "output") and not exists(text)
    parts = split(text) if several else [text]
    return ",".join(_one_job(key, part) for part in parts)


def _one_job(key: str, text: str) -> str:
    if key not in SEVERAL:
        return _path(key, text)
    in_brackets = text.startswith("[") and text.endswith("]") and not exists(text)
    items = (split(text[1:-1]) if text != "[]" else []) if in_brackets else [text]
    return f"[{','.join(_path(key, item) for item in items)}]"


def _path(key: str, text: str) -> str:
    if not text:
        raise InputError(f"{key} is empty: expected a path")
    # ??? is OmegaConf's word for a value that is missing.
    return literal("./???" if text == "???" else expanded(text))


def split(text: str) -> list[str]:
    """Return the parts of a text between its commas; in quotes, a comma belongs to the part."""
    parts, position = [], 0
    while position <= len(text):
        match = _PART.match(text, position)
        assert match is not None  # it may be empty
        single, double = match.groups()
        parts.append(
            single.replace("\\'", "'") if single is not None
            else double.replace('\\"', '"') if double is not None
            else match[0]
        )  # fmt: skip
        position = match.end() + 1
    return parts


def as_typed(value: Any) -> str:
    """Return a path, or several, as a command line says it."""
    if isinstance(value, str):
        return value
    return "[" + ",".join("'" + str(item).replace("'", "\\'") + "'" for item in value) + "]"


def resolve(command: str, cfg: DictConfig) -> None:
    """Make text of all paths of a configuration, those from YAML files included, with the home.

    Raises:
        InputError: One is no text, and what it is in the file cannot be told.
    """
    for key in settings_of(command):
        value = OmegaConf.select(cfg, key)
        if value is None:
            continue
        if key in SEVERAL:
            items = list(value) if OmegaConf.is_list(value) else [value]
            OmegaConf.update(cfg, key, escaped([_as_text(key, item) for item in items]))
        elif (text := _as_text(key, value)) != value:
            OmegaConf.update(cfg, key, escaped(text))


def _as_text(key: str, value: Any) -> str:
    if type(value) is int:
        value = str(value)  # a folder such as 2024
    if not isinstance(value, str | Path):
        raise InputError(
            f"{key}={value}: expected one path; in a YAML file, put quotes around a name that is "
            "a number, true or false"
        )
    return expanded(str(value))

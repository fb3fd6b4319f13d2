"""Reading what others wrote: messages that name the file, JSON, the names of splits."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seg_torch.errors import InputError


@contextmanager
def parsing(file: str | Path, part: str = "") -> Iterator[None]:
    """Turn whatever goes wrong in reading a part of a file into an InputError that names both."""
    try:
        yield
    except KeyError as error:
        raise InputError(f"{file}: {part}{error} is missing") from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{file}: {part}{reason}", pixels=getattr(error, "pixels", {})) from None


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        InputError: It is no JSON, or not UTF-8.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        what = f"no valid JSON: {error.msg} in line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError as error:
        what = f"not UTF-8 (byte {error.start})"
    except RecursionError:
        what = "no annotations: lists within lists without end"
    raise InputError(f"{path}: {what}; is the download complete?")


def split_of(path: str) -> str:
    """Return which split the words of a path stand for, "" where there are none.

    `train2017`, `training`, `valid`, `validation` and `instances_val2017.json` are understood.
    """
    words = r"(?<![a-z])(train|val|test)(?:ing|id|idation)?(?:[-_]?\d+)?(?![a-z])"
    splits = re.findall(words, path.lower())
    return splits[-1] if splits else ""

"""Writing files so that a killed process leaves the old file or the complete new one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

# How the names of files begin that are still being written; a killed process may leave some.
PARTIAL = ".partial-"


def write_atomically(path: str | Path, write: Callable[[str], object]) -> None:
    """Calls `write(temporary_name)` and renames the result to `path`.

    The temporary file lies in the same folder and keeps the suffix, from which writers choose
    their format. Whatever happens, `path` is the old file or the complete new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}{path.suffix}")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

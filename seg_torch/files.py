"""Where configurations lie, listing files, and writing so that a killed process leaves no half."""

import json
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from seg_torch.errors import InputError

log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent
# In the wheel the folder lies inside the package, in the repository beside it.
CONFIG_FOLDER = next(p for p in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if p.is_dir())
# The beginning of the names of files that are still being written; a killed process leaves some.
# 32 hexadecimal digits and the suffix follow.
PARTIAL = ".partial-"
# Folders that systems leave between a user's files: macOS in archives, Synology in its shares,
# Linux and Windows on every disk; those of Windows hold deleted files.
SYSTEM_FOLDERS = {
    *("__MACOSX", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN"),
    "System Volume Information",
}
# Seconds in which a file may be read to its end that is to be replaced. Elsewhere nobody waits.
PATIENCE = 30 if os.name == "nt" else 0


def cache_folder() -> Path:
    """Return the folder of what can be made anew: `~/.cache/seg_torch`, or in `XDG_CACHE_HOME`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "seg_torch"


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of that name is none of the user's data.

    Hidden are names with a dot in front, such as `._photo.jpg` and `.ipynb_checkpoints`, and
    `SYSTEM_FOLDERS`.
    """
    return name.startswith(".") or name in SYSTEM_FOLDERS


def list_files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Return the files below a folder whose names end in one of the suffixes.

    Linked folders are followed. One that was seen already, or that holds the folder itself, is not
    listed again, so loops end. What `is_hidden` says is none of the user's data is left out.

    Args:
        folder: Searched with its subfolders.
        suffixes: In lower case; a suffix matches upper case as well.

    Returns:
        Paths relative to the folder, with `/`, sorted folder by folder.

    Raises:
        InputError: A folder cannot be read.
    """
    if not folder.is_dir():
        return []
    files: list[str] = []
    above = {*folder.resolve().parents, *folder.absolute().parents}
    seen = {identity(path) for path in above}
    folders: list[str] = [""]
    links: list[str] = []  # links come last: the name of a folder itself counts
    while folders or links:
        below = folders.pop() if folders else links.pop(0)
        with readable(folder / below):
            folder_id = identity(folder / below)
            if folder_id in seen:
                continue
            seen.add(folder_id)
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    if entry.is_dir():
                        into = links if entry.is_symlink() else folders
                        into.append(f"{below}{entry.name}/")
                    elif entry.name.lower().endswith(suffixes):
                        files.append(below + entry.name)
                    elif entry.is_symlink() and not os.path.exists(entry.path):
                        _warn_of_dead_link(entry.path)
    files.sort(key=lambda file: file.replace("/", "\0"))
    return files


@cache  # once, not for each split
def _warn_of_dead_link(path: str) -> None:
    log.warning("%s is a link to nothing: what it stood for is left out", path)


def identity(path: str | Path) -> tuple[int, int]:
    """Return what tells a file or folder from all others, whatever it is called."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn the error of a folder that cannot be read into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{folder}: this folder cannot be read ({error.strerror}); give yourself the right to "
            "read it, or move it away"
        ) from None


def by_suffix(names: Iterable[str]) -> str:
    """Return how many files have which suffix, most first: `7 .heic, 1 without a suffix`."""
    counts = Counter(Path(name).suffix.lower() or "without a suffix" for name in names)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common())


def write_atomically(
    path: str | Path, write: Callable[[str], object], durable: bool = False
) -> None:
    """Call `write(temporary_name)` and rename the result to `path`.

    The temporary file lies in the same folder and keeps the suffix, from which writers choose
    their format. Whatever happens to the process, `path` is the old file or the complete new one.

    Args:
        path: The file to write; its folder is created if need be.
        write: Writes a file of the name that it is given.
        durable: Wait for the disk (fsync), so that this holds after a power cut, too; without it
            the file may then be empty. For 1,000 small files that would take 4 s instead of 0.2 s.

    Raises:
        OSError: With `path` as its `filename`: the disk is full, or it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}{path.suffix}")
    try:
        write(str(temporary))
        if durable:
            _wait_for_disk(temporary, os.O_RDWR)
        _replace(temporary, path)
        if durable and os.name != "nt":  # where folders cannot be opened
            with suppress(OSError):  # nor waited for on some network disks
                _wait_for_disk(path.parent, os.O_RDONLY)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # none for a full disk, else the temporary one
        raise


def _wait_for_disk(path: Path, flags: int) -> None:
    file = os.open(path, flags)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _replace(temporary: Path, path: Path) -> None:
    """Rename a file; Windows refuses that while anybody has `path` open, such as to read it."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            if time.monotonic() >= end:
                raise
        time.sleep(0.1)


def write_text(path: str | Path, text: str, durable: bool = False) -> None:
    """Write UTF-8 text as `write_atomically` does; file names in it may be any bytes."""
    content = text.encode("utf-8", "surrogateescape")
    write_atomically(path, lambda name: Path(name).write_bytes(content), durable)


def write_json(path: str | Path, content: Any, durable: bool = False) -> None:
    """Write plain data as JSON, as `write_atomically` does."""
    write_text(path, json.dumps(content, indent=1), durable)

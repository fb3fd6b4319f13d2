"""The folders that commands write into: a new one for each, and no two in one at the same time."""

import errno
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path

from seg_torch.errors import InputError

log = logging.getLogger(__name__)

LOCK = ".lock"
# What systems say of a file that another process has locked.
BUSY = {errno.EACCES, errno.EAGAIN}
_held: dict[Path, int] = {}  # the locks of this process, as open files


def new_folder(path: str) -> str:
    """Make a folder of that name, or with -2, -3, ... behind it where there is one already."""
    for number in count(1):
        name = path if number == 1 else f"{path}-{number}"
        with suppress(FileExistsError):
            os.makedirs(name)
            break
    return name


@contextmanager
def claimed(folder: str | Path, setting: str = "output_dir") -> Iterator[None]:
    """Enter a context in which no other command writes into a folder.

    Args:
        folder: Its path; it is made if need be.
        setting: That named it.

    Raises:
        InputError: Another command does, or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(Path(folder)))
        except BlockingIOError as error:
            raise InputError(f"{setting}={folder}: {error.strerror}") from None
        except OSError as error:
            raise InputError(f"{setting}={folder}: cannot be written: {error.strerror}") from None
        yield


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Enter a context that one process at a time is in for a folder, which is made if need be.

    The lock is the system's, on the file `.lock` in the folder. It ends with the process, in
    whatever way that ends, on all systems and on network disks. Of NFS, SMB, GPFS, and Lustre that
    is mounted with `flock`, it holds for all machines. A machine that loses its power keeps a lock
    on NFS until the server gives it up; deleting `.lock` frees it at once.

    Args:
        folder: Its path.
        wait: Wait for other processes.

    Raises:
        BlockingIOError: Another process is in it, and `wait` is false.
        OSError: The folder cannot be written.
    """
    new, path = not folder.exists(), Path(os.path.realpath(folder), LOCK)
    while not _acquire(path):
        if not wait:
            raise BlockingIOError(errno.EAGAIN, _who_holds(path), str(folder))
        time.sleep(0.05)
    try:
        yield
    finally:
        _release(path)
        if new:
            with suppress(OSError):  # it is not empty
                os.rmdir(path.parent)


def _acquire(path: Path) -> bool:
    """Return whether this process has the lock now."""
    while path not in _held:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # its last holder has removed the folder again
        try:
            _lock(file)
        except OSError as error:
            if error.errno in BUSY:
                os.close(file)
                return False
            log.warning(
                "%s: this disk has no locks (%s); see to it that no other command writes there",
                path.parent,
                error.strerror,
            )
        if _is_at(path, file):
            _held[path] = file
            with suppress(OSError):  # a full disk, which is told when something is to be saved
                os.truncate(file, 0)
                now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
                holder = f"process {os.getpid()} on {socket.gethostname()}, since {now}"
                os.write(file, holder.encode())
            return True
        os.close(file)  # its last holder has deleted it
    return False


def _lock(file: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, 1 << 20, os.SEEK_SET)  # what is locked cannot be read
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _release(path: Path) -> None:
    """Delete the file and give up the lock; a forked process, which has none, does nothing."""
    file = _held.pop(path, None)
    if file is None:
        return
    with suppress(OSError):  # Windows deletes no open file
        if _is_at(path, file):
            path.unlink()
    os.close(file)
    if sys.platform == "win32":
        with suppress(OSError):  # another process has opened it
            path.unlink()


def _is_at(path: Path, file: int) -> bool:
    """Return whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _who_holds(path: Path) -> str:
    holder = ""
    with suppress(OSError):
        holder = path.read_text(encoding="utf-8", errors="replace")
    return (
        f"another run is writing into this folder ({holder or 'it has just begun'}). Wait for its "
        f"end, or choose another folder; if it is gone with its machine, delete {path}"
    )


def _forget_locks() -> None:
    for file in _held.values():
        os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    # A worker process must not keep the lock when the process that it was forked from is killed.
    os.register_at_fork(after_in_child=_forget_locks)

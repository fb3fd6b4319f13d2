"""What is printed on standard error, and by which of several processes."""

import difflib
import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Collection
from datetime import timedelta
from typing import Any

from hydra import errors
from omegaconf.errors import OmegaConfBaseException

from seg_torch.errors import InputError

# Files that are parts of others, no choices of the user.
INTERNAL = {"default", "from_checkpoint"}
# Where launchers say which process this is: torchrun, Slurm, and Lightning.
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
# Lines that begin with one of these are commands for the user's shell.
PROGRAMS = ("cp ", "mv ", "python ", "seg-torch ")
LOST = """\
another process of this run has ended or cannot be reached; its own message, if any, says why.
What was finished is kept: give the command again, for train with resume=RUN_FOLDER\
"""


class Wrapped(logging.Formatter):
    """Formats log messages as bare text, which on a terminal is broken between words."""

    def format(self, record: logging.LogRecord) -> str:
        return wrapped(super().format(record), sys.stdout)


def wrapped(text: str, file: Any) -> str:
    """Return a text whose lines fit the terminal that a file is, if it is one.

    Paths and other long words stay whole, so that they can be copied; so do lines of `PROGRAMS`.
    """
    if not file.isatty():
        return text
    width = shutil.get_terminal_size().columns
    # The lines of a list or of a traceback are indented, and so is what is broken off.
    return "\n".join(
        line
        if line.lstrip().startswith(PROGRAMS)
        else textwrap.fill(
            line,
            width,
            subsequent_indent=" " * (len(line) - len(line.lstrip()) + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.split("\n")
    )


def print_error(message: str) -> None:
    """Print an error, unless it is known that another process of this machine prints the same."""
    # Before torch is loaded there were only the settings, which are the same for all. Later an
    # error may be known to one process alone, except for the loss of another one.
    if "torch" not in sys.modules or message.startswith(LOST):
        first = is_first_on_machine()
    else:
        first = _is_first_with(message)
    if first:
        print(wrapped(f"error: {message}", sys.stderr), file=sys.stderr)


def is_first() -> bool:
    """Return whether no launcher says that this is another process than the first of all."""
    return all(os.environ.get(name) in (None, "", "0") for name in RANKS)


def is_first_on_machine() -> bool:
    """Return whether no other process that a launcher started on this machine prints the same."""
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return rank == "0"


def _is_first_with(message: str) -> bool:
    """Return whether no process that the same torchrun has started came with this message before.

    Elsewhere there is no such place to ask, and every process takes itself for the first.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=3))
        return store.add(f"{os.environ['GROUP_RANK']}: {message}", 1) == 1
    except RuntimeError:
        # Elsewhere the first machine is gone, which nobody has said. On the first one torchrun has
        # ended, since another process has failed, which has said why.
        return os.environ["GROUP_RANK"] != "0"


def explain(error: BaseException) -> str | None:
    """Return a message of a few lines for what the user can fix, `None` for a bug."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for cause in chain:
        if isinstance(cause, InputError):
            # From a worker process the message comes with the worker's traceback in front.
            return str(cause).rsplit(f"{InputError.__name__}: ", 1)[-1].strip()
        if type(cause).__name__ in ("DistStoreError", "DistNetworkError"):
            return f"{LOST}\n{str(cause).splitlines()[0]}"
        if "gloo/transport" in str(cause):
            return LOST
        if type(cause).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(cause):
            return (
                "out of memory; use a smaller data.batch_size, data.eval_batch_size, "
                "data.augment.crop or tile, or trainer.precision=16-mixed"
            )
    if isinstance(error, errors.MissingConfigException) and error.options:
        group, choice = str(error.missing_cfg_file).rsplit("/", 1)
        options = [option for option in error.options if option not in INTERNAL]
        hint = did_you_mean(choice, options)
        if group == "data":
            hint = f", and no folder of that name{hint}"
        if group == "model" and os.path.isfile(choice):
            hint = f"; a file of weights is checkpoint={choice}"
        return f"there is no {group}={choice}{hint}\nThere are: {', '.join(options) or 'none'}"
    if isinstance(error, errors.OverrideParseException):
        return f"{error.override}: {str(error).splitlines()[0]}"
    # The last one is Lightning's, which takes seconds to import.
    known = isinstance(error, errors.HydraException | OmegaConfBaseException)
    if known or type(error).__name__ == "MisconfigurationException":
        lines = [line for line in str(error).splitlines() if line.strip()]
        if not isinstance(chain[-1], errors.HydraException) and chain[-1] is not error:
            lines.append(f"{type(chain[-1]).__name__}: {chain[-1]}")
        return "\n".join(lines[:12])
    if "Config group override" in str(error):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return None


def did_you_mean(name: str, names: Collection[str]) -> str:
    """Return the end of a message about an unknown name: those that are like it, if any."""
    near = difflib.get_close_matches(name, names, 2, 0.7)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def as_text(value: Any) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(as_text, value))}]"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))

"""From the command line to a function: Hydra, short messages, a clean command a process."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seg_torch.errors import InputError

log = logging.getLogger(__name__)

CONFIG_FOLDER = Path(__file__).parents[1] / "conf"


def entry_point(function: Callable[[DictConfig], Any], config_name: str) -> None:
    """Runs `function` with the configuration that the command line asks for.

    What the user can mend is told in a few lines on standard error, with exit code 2; everything
    else is a bug and keeps its traceback. A result that is true means failures: exit code 1.
    """
    # Otherwise Hydra prints errors itself and the message cannot be improved.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    @hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name=config_name)
    def main(cfg: DictConfig) -> None:
        with _short_messages(config_name):
            _check_values(cfg, config_name)
            if _run_job(function, cfg):
                sys.exit(1)

    with _short_messages(config_name):
        main()


@contextmanager
def _short_messages(config_name: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = _explain(error, config_name)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _run_job(function: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """Calls `function` and leaves the process as it was, for the next job of a sweep.

    With several devices Lightning starts the other processes by the command line of this one. In
    a sweep that would start the sweep again in each of them, so the command line becomes that of
    the job alone, with its folder, and Hydra's own state is put out of Lightning's sight.
    """
    # Lightning's advertisements and notes on its own insides.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*treespec.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*in eval mode at the start.*")  # frozen encoders are
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")  # all processes hold the same scores
    state = HydraConfig.get()
    argv, environment = sys.argv[:], set(os.environ)
    sys.argv[1:] = state.overrides.task
    if "output_dir" in cfg:
        if state.mode == RunMode.MULTIRUN:
            cfg.output_dir = state.runtime.output_dir
        others = [o for o in state.overrides.task if not o.startswith("output_dir=")]
        sys.argv[1:] = [*others, f"output_dir='{cfg.output_dir}'"]
    HydraConfig.instance().cfg = None
    try:
        return function(cfg)
    finally:
        sys.argv = argv
        if "LOCAL_RANK" not in environment:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                if name not in environment:
                    os.environ.pop(name, None)


def _explain(error: BaseException, config_name: str) -> str | None:
    """A message of a few lines for what the user can mend, `None` for a bug."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            # From a worker process the message comes with the worker's traceback in front.
            return str(cause).rsplit(f"{InputError.__name__}: ", 1)[-1].strip()
        cause = cause.__cause__
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if isinstance(error, ConfigCompositionException) and unknown:
        key = unknown[1].split("@")[0]
        return f"there is no setting {key}{_did_you_mean(key, _known_keys(config_name, key))}"
    if isinstance(error, MissingConfigException) and error.options:
        group, choice = str(error.missing_cfg_file).rsplit("/", 1)
        hint = _did_you_mean(choice, error.options)
        return f"there is no {group}={choice}{hint}\nThere are: {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {str(error).splitlines()[0]}"
    if isinstance(error, HydraException | OmegaConfBaseException | MisconfigurationException):
        innermost: BaseException = error
        while innermost.__cause__ is not None:
            innermost = innermost.__cause__
        lines = [line for line in str(error).splitlines() if line.strip()]
        if innermost is not error and not isinstance(innermost, HydraException):
            lines.append(f"{type(innermost).__name__}: {innermost}")
        return "\n".join(lines[:12])
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return None


def _did_you_mean(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, 2, 0.7)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _check_values(cfg: DictConfig, config_name: str) -> None:
    """Refuses a required value that is missing and a text where a number belongs."""
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        raise InputError(f"{', '.join(sorted(missing))} must be given")
    overrides = HydraConfig.get().overrides.task
    groups = {folder.name for folder in CONFIG_FOLDER.iterdir() if folder.is_dir()}
    choices = [o for o in overrides if o.split("=")[0] in groups]
    usual = hydra.compose(config_name, choices)
    for key in (o.split("=")[0] for o in overrides):
        before = None if key in groups else OmegaConf.select(usual, key, default=None)
        now = OmegaConf.select(cfg, key) if isinstance(before, int | float) else None
        if isinstance(now, str):
            kind = "true or false" if isinstance(before, bool) else "a number"
            raise InputError(f"{key}={now}: expected {kind}, such as {str(before).lower()}")


def _known_keys(config_name: str, unknown: str) -> set[str]:
    """All settings and groups, with the other choices of the command line taken into account."""
    GlobalHydra.instance().clear()
    others = [o for o in sys.argv[1:] if "=" in o and not o.lstrip("+~").startswith(unknown)]
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        for overrides in (others, []):
            try:
                cfg = hydra.compose(config_name, overrides)
                break
            except (HydraException, OmegaConfBaseException):
                continue
    groups = [folder.name for folder in CONFIG_FOLDER.iterdir() if folder.is_dir()]
    plain: dict = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    return {*groups, *_paths(plain)}


def _paths(node: dict, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")

"""From the words of a command line to the overrides that Hydra composes a configuration with."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from seg_torch.cli.messages import INTERNAL, is_first_on_machine
from seg_torch.commands import COMMANDS
from seg_torch.errors import InputError, require
from seg_torch.files import CONFIG_FOLDER
from seg_torch.training import run

# What train does where the command line names no data, experiment or run.
DEMO = "experiment=shapes"
OPTUNA = "hydra/sweeper=optuna"
# Old name of a setting or choice, which is taken for one version -> name of today.
RENAMED = {
    "beside": "compare_with",
    "unknown": "min_confidence",
    "loss=own": "model",
}


@dataclass
class Call:
    """A command line.

    Attributes:
        command: The name of the command.
        start: The arguments that named it, if the program does not.
        flags: Hydra's own, such as `--multirun`.
        overrides: The settings, as Hydra has to see them.
        config_dir: The folder of the user's own choices.
        help: Whether a description is asked for.
    """

    command: str
    start: list[str]
    flags: list[str]
    overrides: list[str]
    config_dir: str | None
    help: bool


def parse(command: str, start: list[str], arguments: list[str]) -> Call:
    """Take a command line apart.

    Args:
        command: The name of the command.
        start: The arguments that named it, if the program does not.
        arguments: The others.

    Raises:
        InputError: An argument that is none, or see `complete_overrides`.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise InputError(f"{message}; settings are given as key=value, see --help")

    parser.error = refuse  # type: ignore[method-assign]
    given = parser.parse_intermixed_args(arguments)
    flags = [argument for argument in arguments if argument not in given.overrides]
    overrides = complete_overrides(command, given.overrides, given.config_dir)
    return Call(command, start, flags, overrides, given.config_dir, given.help)


def complete_overrides(
    command: str, overrides: Sequence[str], folder: str | None = None
) -> list[str]:
    """Return the overrides of the command line as Hydra has to see them.

    Args:
        command: Whose settings they are.
        overrides: Each as `key=value`, `+key=value` or `~key`; for `compare` and `report` also
            the paths of runs.
        folder: Of further configurations (`--config-dir`).

    Raises:
        InputError: A choice that must not be null, or what may not be set when resuming.
    """
    overrides = _with_current_names(_with_keys(command, overrides))
    given = {run.key_of(override): override.partition("=")[2] for override in overrides}
    complete = _with_none(overrides, groups(command, folder))
    if OPTUNA in complete:
        require(OPTUNA, "sweep", "optuna")
        complete[complete.index(OPTUNA)] = f"{OPTUNA}_miou"
    if command == "evaluate" and "model" in given and "checkpoint" not in given:
        return [*complete, "checkpoint=null"]  # a published model in its place
    if command != "train":
        return complete
    if "checkpoint" in given:
        raise InputError(
            "train takes no checkpoint=. resume=RUN_FOLDER goes on with that run, in its folder "
            "and with its settings; init_from=CHECKPOINT starts a new run with its weights"
        )
    steps = given.get("trainer.max_steps", "-1")
    if not steps.startswith("-") and "trainer.max_epochs" not in given:
        complete.append("trainer.max_epochs=-1")  # whose default would end the run before
    if given.get("resume", "null") != "null":
        run.check_resumable(given["resume"], complete)
        return [o if o.startswith(("+", "hydra.")) else f"++{o}" for o in complete]
    return complete if {"data", "experiment"} & given.keys() else [DEMO, *complete]


def groups(command: str, folder: str | None = None) -> dict[str, list[str]]:
    """Return the choices that a user has in each group of a command's configuration."""
    config: Any = OmegaConf.load(CONFIG_FOLDER / f"{command}.yaml")
    folders = [CONFIG_FOLDER, *([Path(folder)] if folder else [])]
    names = [str(name) for e in config.defaults if isinstance(e, DictConfig) for name in e]
    return {
        name: sorted({p.stem for f in folders for p in f.glob(f"{name}/*.yaml")} - INTERNAL)
        for name in names
    }


def _with_keys(command: str, arguments: Sequence[str]) -> Sequence[str]:
    """Return the arguments with `runs=` or `checkpoint=` in place of the bare paths."""
    about = COMMANDS[command]
    # A folder's name may have a = in it.
    paths = [a for a in arguments if a[:1] not in "+~" and ("=" not in a or Path(a).exists())]
    if about.positional is None or not paths:
        return arguments
    if len(paths) > 1 and not about.takes_several:
        raise InputError(f"{command} is about one run, but {len(paths)} are given; see compare")
    quoted = ",".join("'" + path.replace("'", "\\'") + "'" for path in paths)
    value = f"[{quoted}]" if about.takes_several else quoted
    return [f"{about.positional}={value}", *(a for a in arguments if a not in paths)]


def _with_current_names(overrides: Sequence[str]) -> list[str]:
    """Return the overrides with the names of today, and print those that were old.

    Raises:
        InputError: A setting is given by both of its names.
    """
    keys = [run.key_of(override) for override in overrides]
    renamed = []
    for key, override in zip(keys, overrides, strict=True):
        if RENAMED.get(key) in keys:
            raise InputError(f"{key} is the old name of {RENAMED[key]}; give one of them")
        name, equals, value = override.partition("=")
        values = [RENAMED.get(f"{key}={choice}", choice) for choice in value.split(",")]
        renamed.append(name.replace(key, RENAMED.get(key, key)) + equals + ",".join(values))
        if renamed[-1] != override and is_first_on_machine():
            print(f"{override} is now {renamed[-1]}", file=sys.stderr)
    return renamed


def _with_none(overrides: Sequence[str], choices: dict[str, list[str]]) -> list[str]:
    """Return the overrides with `=none` in place of choices that are null or removed.

    Raises:
        InputError: There is no such choice.
    """
    complete = []
    for override in overrides:
        key, value = run.key_of(override), override.partition("=")[2]
        if key not in choices or not (override.startswith("~") or value in ("", "null")):
            complete.append(override)
        elif "none" in choices[key]:
            complete.append(f"{key}=none")
        elif key != "experiment":
            raise InputError(f"{key} must not be null; there are: {', '.join(choices[key])}")
    return complete

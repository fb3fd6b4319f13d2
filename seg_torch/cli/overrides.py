"""From the words of a command line to the overrides that Hydra composes a configuration with."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from seg_torch.cli import names, paths
from seg_torch.cli.messages import INTERNAL, is_first_on_machine
from seg_torch.commands import COMMANDS
from seg_torch.errors import InputError, require
from seg_torch.files import CONFIG_FOLDER
from seg_torch.training import run

# What train does where the command line names no data, experiment or run.
DEMO = "experiment=shapes"
# What it does with a folder of whose format nothing is said.
OWN_DATA = "data=auto"
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
    if command == "plan":
        arguments = ["json=true" if argument == "--json" else argument for argument in arguments]

    def refuse(message: str) -> NoReturn:
        flag = re.search(r"--([\w-]+)", message)
        key = flag[1].replace("-", "_") if flag else ""
        hint = ", ".join(names.SYNONYMS.get(key, ())[:1]) or "key"
        raise InputError(f"{message}; settings are given as {hint}=value, see --help")

    parser.error = refuse  # type: ignore[method-assign]
    known = parser._option_string_actions
    dashed = [a for a in arguments if a[:1] == "-" and a not in known and os.path.lexists(a)]
    arguments = [a for a in arguments if a not in dashed]
    given = parser.parse_intermixed_args(arguments)
    flags = [paths.expanded(a) for a in arguments if a not in given.overrides]
    if given.config_dir is not None:
        given.config_dir = paths.expanded(given.config_dir)
    if given.multirun and COMMANDS[command].folder is None:
        raise InputError(f"{command} runs once: -m is for commands with a folder of results")
    overrides = complete_overrides(
        command, [*given.overrides, *dashed], given.config_dir, given.multirun
    )
    return Call(command, start, flags, overrides, given.config_dir, given.help)


def complete_overrides(
    command: str, overrides: Sequence[str], folder: str | None = None, sweep: bool = False
) -> list[str]:
    """Return the overrides of the command line as Hydra has to see them.

    Args:
        command: Whose settings they are.
        overrides: Each as `key=value`, `+key=value` or `~key`; or a path, for the setting that the
            command takes without its key.
        folder: Of further configurations (`--config-dir`).
        sweep: Whether commas separate the values of several jobs.

    Raises:
        InputError: A choice that must not be null, or what may not be set when resuming.
    """
    choices = groups(command, folder)
    overrides = _with_current_names(_with_keys(command, overrides, choices))
    if "data" in choices:
        overrides = _with_data(overrides, choices["data"], sweep)
    given = {run.key_of(override): override.partition("=")[2] for override in overrides}
    complete = _with_none(overrides, choices)
    if OPTUNA in complete:
        require(OPTUNA, "sweep", "optuna")
        complete[complete.index(OPTUNA)] = f"{OPTUNA}_miou"
    if command == "evaluate" and "model" in given and "checkpoint" not in given:
        complete.append("checkpoint=null")  # a published model in its place
    if command in ("train", "plan"):
        complete = _for_training(complete, given)
    return [_literal(command, override, sweep) for override in complete]


def _for_training(overrides: list[str], given: dict[str, str]) -> list[str]:
    """Return the overrides with what else train needs: the demo, or the marks of a resumed run."""
    if "checkpoint" in given:
        raise InputError(
            "train takes no checkpoint=. resume=RUN_FOLDER goes on with that run, in its folder "
            "and with its settings; init_from=CHECKPOINT starts a new run with its weights"
        )
    if given.get("resume") in ("true", "True", "last") and not paths.exists(given["resume"]):
        runs = sorted(Path("runs").glob("*/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
        newest = f"resume={runs[-1].parents[1]}" if runs else "resume=RUN_FOLDER"
        raise InputError(f"resume={given['resume']}: say which run goes on: {newest}")
    steps = given.get("trainer.max_steps", "-1")
    if not steps.startswith("-") and "trainer.max_epochs" not in given:
        # The default would end the run before.
        overrides = [*overrides, "trainer.max_epochs=-1"]
    if given.get("resume", "null") != "null":
        run.check_resumable(given["resume"], overrides)
        return [o if o.startswith(("+", "hydra.")) else f"++{o}" for o in overrides]
    if {"data", "experiment"} & given.keys():
        return overrides
    return [OWN_DATA if "data.root" in given else DEMO, *overrides]


def given_settings(
    overrides: Sequence[str], choices: dict[str, str], folder: str | None
) -> list[str]:
    """Return the names of the settings that are the user's: of the command line and own files.

    Args:
        overrides: Of one job.
        choices: The choice in each group.
        folder: Of the user's own choices.
    """
    given = [run.key_of(override) for override in overrides]
    for group, choice in choices.items():
        file = Path(folder or "", f"{group}/{choice}.yaml")
        if folder and file.is_file():
            content: Any = OmegaConf.to_container(OmegaConf.load(file))
            given += [f"{group}.{key}" for key in content if key not in ("defaults", "_target_")]
    return given


def groups(command: str, folder: str | None = None) -> dict[str, list[str]]:
    """Return the choices that a user has in each group of a command's configuration."""
    folders = [CONFIG_FOLDER, *([Path(folder)] if folder else [])]
    groups = [str(name) for e in _page(command)["defaults"] if isinstance(e, dict) for name in e]
    return {
        name: sorted({p.stem for f in folders for p in f.glob(f"{name}/*.yaml")} - INTERNAL)
        for name in groups
    }


@cache
def _page(command: str) -> dict[str, Any]:
    """Return the settings at the top level of a command, with their defaults."""
    page: Any = OmegaConf.to_container(OmegaConf.load(CONFIG_FOLDER / f"{command}.yaml"))
    if "train" in page["defaults"]:  # whose settings plan has
        return {**_page("train"), **page, "defaults": _page("train")["defaults"]}
    return page


def _with_keys(
    command: str, arguments: Sequence[str], choices: dict[str, list[str]]
) -> Sequence[str]:
    """Return the arguments with the key of the command's first setting before bare paths."""
    about, known = COMMANDS[command], {*_page(command), *choices, "hydra"}

    def is_bare(argument: str) -> bool:
        # A folder's name may have a = in it.
        if "=" in argument:
            section = re.split(r"[.=@]", argument.lstrip("+"))[0]
            return section not in known and os.path.lexists(argument)
        return argument[:1] not in "+~" or argument[:2] == "~/" or os.path.lexists(argument)

    bare = [argument for argument in arguments if is_bare(argument)]
    if not bare:
        return arguments
    key, rest = about.positional, [argument for argument in arguments if argument not in bare]
    if len(bare) > 1 and not about.takes_several:
        what = "run, but {} are given; see compare"
        if key != "checkpoint":
            what = "file or folder with all that is below it, but {} are given"
        raise InputError(f"{command} is about one {what.format(len(bare))}")
    if key in map(run.key_of, rest):
        raise InputError(f"{bare[0]} and {key}= are two; give one of them")
    if key == "data.root" and Path(bare[0], "checkpoints").is_dir():
        raise InputError(f"{bare[0]} is a run: resume={bare[0]} goes on with it")
    if key == "data.root" and bare[0] in choices["data"] and not os.path.lexists(bare[0]):
        return [f"data={bare[0]}", *rest]
    return [f"{key}={paths.as_typed(bare) if about.takes_several else bare[0]}", *rest]


def _with_data(overrides: Sequence[str], names: Sequence[str], sweep: bool) -> list[str]:
    """Return the overrides with `data=auto data.root=FOLDER` in place of `data=FOLDER`."""

    def is_folder(text: str) -> bool:
        is_name = text in names or text in INTERNAL
        return not is_name and (paths.exists(text) or re.match(r"[.~]|.*[/\\]", text) is not None)

    complete = []
    for override in overrides:
        key, _, value = override.partition("=")
        several = sweep and not paths.exists(value)
        if key == "data" and all(map(is_folder, paths.split(value) if several else [value])):
            complete += [OWN_DATA, f"data.root={value}"]
        else:
            complete.append(override)
    return complete


def _literal(command: str, override: str, sweep: bool) -> str:
    """Return an override whose value is taken as it is: a path, and what Hydra cannot read.

    Raises:
        InputError: The path is empty, or there can be no such setting.
    """
    name, equals, value = override.partition("=")
    key = run.key_of(override)
    if not equals or override.startswith("~"):
        return override
    if key in paths.settings_of(command):
        default = _page(command).get(key)
        has_default = isinstance(default, str) and default != "???"
        if value == "null" and not paths.exists(value) and not has_default:
            return override
        return f"{name}={paths.as_override(key, value, sweep)}"
    if isinstance(_page(command).get(key), list) and "," in value and value[0] != "[" and not sweep:
        return f"{name}=[{value}]"
    if key == "data.classes" and value.startswith("{") and not sweep:
        # Hydra would take no umlaut in a name, and merge this with what a YAML file has.
        return f"{name}={paths.literal(value)}"
    try:
        OverridesParser.create().parse_overrides([override])
    except OverrideParseException:
        if not re.fullmatch(r"[\w./@:-]+", key, re.ASCII):
            raise InputError(f"there is no setting {key}") from None
        return f"{name}={paths.literal(value)}"
    return override


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

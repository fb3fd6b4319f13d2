"""Command line -> composed configuration -> command.

`main` is all that the entry points call. A command NAME is conf/NAME.yaml, whose first comment says
what it does, and the function NAME of the module `seg_torch.commands.NAME`. Nothing heavy, such as
torch or NumPy, is imported before the configuration is known to be right.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import os
import re
import sys
import textwrap
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import errors
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seg_torch.errors import InputError, StoppedError
from seg_torch.training import run
from seg_torch.version import __version__

_PACKAGE = Path(__file__).parents[1]
# In the wheel the folder lies inside the package, in the repository beside it.
CONFIG_FOLDER = next(p for p in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if p.is_dir())
# What train does where the command line names no data, experiment or run.
DEMO = "experiment=shapes"
# Files that are parts of others, no choices of the user.
INTERNAL = {"default", "from_checkpoint", "hydra_defaults"}
# Settings below the top level that null would break.
NOT_NULL = ["data.dataset", "data.batch_size", "optimizer.lr", "trainer.devices"]
FILES = ["checkpoint", "init_from", "input", "data.root", "model.weights"]
# What a command's arguments without a key are.
POSITIONAL = {"report": "checkpoint", "compare": "runs"}
# The packages that a command needs besides those of every installation; its extra has its name.
EXTRAS = {"app": "gradio", "serve": "litserve"}
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}
WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
LOST = """\
another process of this run has ended or cannot be reached; its own message, if any, says why.
What was finished is kept: give the command again, for train with resume=RUN_FOLDER\
"""
HINTS = """\
+key=value adds a setting, ~key removes one. With -m, key=a,b runs the command for each value.
--cfg job prints the configuration; --config-dir FOLDER adds choices of your own."""


def main(command: str | None = None) -> NoReturn:
    """Run a command and exits: 0 done, 1 some files failed, 2 the user's error, 130 Ctrl-C.

    Errors that the user can fix are printed on standard error in a few lines; everything else is a
    bug and keeps its traceback.

    Args:
        command: Its name; if `None`, the first argument of the command line.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints errors and ends the process itself
    arguments, start = sys.argv[1:], []
    if "--version" in arguments:
        print(__version__)
        sys.exit(0)
    if command is None:
        command = _first_argument(arguments)
        start = [arguments.pop(0)]
    codes: list[int] = []  # of the jobs: one, or those of a sweep
    code = _exit_code(lambda: _compose_and_run(_parse(command, start, arguments), codes))
    failed = [str(job) for job, code in enumerate(codes) if code]
    if len(codes) > 1 and failed:
        _print_error(f"{len(failed)} of {len(codes)} jobs failed: {', '.join(failed)}")
    sys.exit(max(code, *codes, 0))


def complete_overrides(command: str, overrides: Sequence[str], folder: Any = None) -> list[str]:
    """Return the overrides of the command line as Hydra has to see them.

    Args:
        command: Whose settings they are.
        overrides: Each as `key=value`, `+key=value` or `~key`; for `compare` and `report` also
            the paths of runs.
        folder: Of further configurations (`--config-dir`).

    Raises:
        InputError: A choice that must not be null, or what may not be set when resuming.
    """
    groups, complete = _groups(command, folder), []
    overrides = _with_keys(command, overrides)
    given = {run.key_of(override): override.partition("=")[2] for override in overrides}
    for override in overrides:
        key = run.key_of(override)
        if key in groups and (override.startswith("~") or given[key] in ("", "null")):
            if key == "experiment":
                continue
            if "none" not in groups[key]:
                raise InputError(f"{key} must not be null; there are: {', '.join(groups[key])}")
            override = f"{key}=none"
        if override == "hydra/sweeper=optuna":
            if importlib.util.find_spec("optuna") is None:
                raise InputError(f"{override} needs a package: pip install hydra-optuna-sweeper")
            override = "hydra/sweeper=optuna_miou"
        complete.append(override)
    if command == "evaluate" and "model" in given and "checkpoint" not in given:
        return [*complete, "checkpoint=null"]  # a published model in its place
    if command != "train":
        return complete
    if "checkpoint" in given:
        raise InputError(
            "train takes no checkpoint=. resume=RUN_FOLDER goes on with that run, in its folder "
            "and with its settings; init_from=CHECKPOINT starts a new run with its weights"
        )
    if given.get("resume", "null") != "null":
        run.check_resumable(given["resume"], complete)
        return [o if o.startswith(("+", "hydra.")) else f"++{o}" for o in complete]
    return complete if {"data", "experiment"} & given.keys() else [DEMO, *complete]


def _with_keys(command: str, arguments: Sequence[str]) -> Sequence[str]:
    """Return the arguments with `runs=` or `checkpoint=` in place of the bare paths."""
    if command not in POSITIONAL:
        return arguments
    # A folder's name may have a = in it.
    paths = [a for a in arguments if a[:1] not in "+~" and ("=" not in a or Path(a).exists())]
    if not paths:
        return arguments
    quoted = ["'" + path.replace("'", "\\'") + "'" for path in paths]
    if command == "report" and len(paths) > 1:
        raise InputError(f"report is about one run, but {len(paths)} are given; see compare")
    value = f"[{','.join(quoted)}]" if command == "compare" else quoted[0]
    return [f"{POSITIONAL[command]}={value}", *(a for a in arguments if a not in paths)]


def _first_argument(arguments: list[str]) -> str:
    """Return the command; prints the list of commands and exits where there is none."""
    files = {p.stem: p for p in sorted(CONFIG_FOLDER.glob("*.yaml")) if p.stem not in INTERNAL}
    name = arguments[0] if arguments else "--help"
    if name in files:
        return name
    wrong = name not in ("--help", "-h")
    if wrong:
        _print_error(f"there is no command {name}{_did_you_mean(name, files)}")
    program = _program([])
    lines = [f"Usage: {program} COMMAND [key=value ...]", "", "Commands:"]
    lines += [f"  {n:10}{_comments(path, '')[''].splitlines()[0]}" for n, path in files.items()]
    lines += ["", f"{program} COMMAND --help shows examples and all settings."]
    print("\n".join(lines), file=sys.stderr if wrong else sys.stdout)
    sys.exit(2 if wrong else 0)


def _parse(command: str, start: list[str], arguments: list[str]) -> Namespace:
    """Hydra's own flags, `overrides`, `command`, and `start`, which other processes start with."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise InputError(f"{message}; settings are given as key=value, see --help")

    parser.error = refuse  # type: ignore[method-assign]
    call = parser.parse_intermixed_args(arguments)
    call.flags = [argument for argument in arguments if argument not in call.overrides]
    call.command, call.program = command, _program(start)
    call.overrides = complete_overrides(command, call.overrides, call.config_dir)
    kept = ("config_dir", "config_path", "config_name", "experimental_rerun")
    flags = [f"--{n.replace('_', '-')}={value}" for n, value in vars(call).items() if n in kept]
    call.start = [*start, *(flag for flag in flags if not flag.endswith("=None"))]
    return call


def _program(start: list[str]) -> str:
    name = Path(sys.argv[0]).name
    name = "python -m seg_torch" if name == "__main__.py" else name
    return " ".join([f"python {name}" if name.endswith(".py") else name, *start])


def _groups(command: str, folder: Any = None) -> dict[str, list[str]]:
    """Return the choices that a user has in each group of a command's configuration."""
    config: Any = OmegaConf.load(CONFIG_FOLDER / f"{command}.yaml")
    folders = [CONFIG_FOLDER, *([Path(folder)] if folder else [])]
    names = [str(name) for e in config.defaults if isinstance(e, DictConfig) for name in e]
    return {
        name: sorted({p.stem for f in folders for p in f.glob(f"{name}/*.yaml")} - INTERNAL)
        for name in names
    }


# Running


def _compose_and_run(call: Namespace, codes: list[int]) -> None:
    """Call Hydra, which runs the command once, or once for each job of a sweep."""

    def job(cfg: DictConfig) -> float | None:
        """Return the score of a run that was trained: sweepers such as Optuna's go by it."""
        score = None

        def work() -> Any:
            nonlocal score
            result = _run(call, _check(call, cfg))
            if call.command != "train":
                return result
            score = result

        codes.append(_exit_code(work))
        return score

    argv = sys.argv
    sys.argv = [argv[0], *call.flags, *call.overrides]
    try:
        if call.help:
            print(_help(call))
        else:
            hydra.main(str(CONFIG_FOLDER), call.command, version_base="1.3")(job)()
    except errors.ConfigCompositionException as error:
        unknown = re.search(r"Could not override '([^'@]+)", str(error))
        if unknown is None:
            raise
        raise InputError(_unknown_setting(call, unknown[1])) from None
    finally:
        sys.argv = argv


def _exit_code(work: Callable[[], Any]) -> int:
    """Return 1 if the result of `work` is true, 2 after printing an error of the user."""
    try:
        return 1 if work() else 0
    except KeyboardInterrupt:
        sys.exit(130)
    except StoppedError as stop:  # by agreement of all processes
        if _is_first_on_machine():
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)
    except SystemExit as stop:
        # Lightning turns Ctrl-C into exit(1).
        sys.exit(130 if isinstance(stop.__context__, KeyboardInterrupt) else stop.code)
    except Exception as error:
        message = _explain(error)
        if message is None:
            traceback.print_exc()
            return 1
        _print_error(message)
        return 2


def _run(call: Namespace, cfg: DictConfig) -> Any:
    """Call the command and leaves the process as it was, for the next job of a sweep.

    With several devices Lightning starts the other processes by the command line of this one. In
    a sweep that would start the sweep again in each of them, so the command line becomes that of
    the job alone, with its folder, and Hydra's own state is hidden from Lightning.
    """
    # Lightning's notes on its own insides. Frozen encoders are in eval mode, and all processes hold
    # the same scores (sync_dist). The loader is resumable, by the data module's state.
    notes = "treespec|smaller than the logging|not have many workers|in eval mode at|sync_dist=True"
    notes += "|exists and is not empty|dataloader is not resumable"
    warnings.filterwarnings("ignore", f".*({notes})")
    state = HydraConfig.get()
    argv, environment = sys.argv, set(os.environ)
    overrides = list(state.overrides.task)
    if "output_dir" in cfg and not (call.command == "train" and cfg.get("resume")):
        if state.mode == RunMode.MULTIRUN:
            cfg.output_dir = state.runtime.output_dir
        overrides = [o for o in overrides if not o.startswith("output_dir=")]
        overrides.append(f"output_dir='{cfg.output_dir}'")
    sys.argv = [argv[0], *call.start, *overrides]
    HydraConfig.instance().cfg = None
    try:
        module = importlib.import_module(f"seg_torch.commands.{call.command}")
        # Its advertisements, too; on being imported it asks for them.
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        return getattr(module, call.command)(cfg)
    finally:
        sys.argv = argv
        if "LOCAL_RANK" not in environment:
            distributed: Any = sys.modules.get("torch.distributed")
            if distributed and distributed.is_available() and distributed.is_initialized():
                distributed.destroy_process_group()
            for name in os.environ.keys() - environment:
                del os.environ[name]


# Errors


def _print_error(message: str) -> None:
    """Print an error, unless it is known that another process of this machine prints the same."""
    # Before torch is loaded there were only the settings, which are the same for all. Later an
    # error may be known to one process alone, except for the loss of another one.
    if "torch" not in sys.modules or message.startswith(LOST):
        first = _is_first_on_machine()
    else:
        first = _is_first_with(message)
    if first:
        print(f"error: {message}", file=sys.stderr)


def _is_first_on_machine() -> bool:
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return rank == "0"


def _is_first_with(message: str) -> bool:
    """Whether no process that the same torchrun has started came with this message before.

    Elsewhere there is no such place to ask, and every process takes itself for the first.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=2))
        return store.add(f"{os.environ['GROUP_RANK']}: {message}", 1) == 1
    except RuntimeError:  # the machine of the first process is gone
        return True


def _explain(error: BaseException) -> str | None:
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
        hint = _did_you_mean(choice, options)
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


def _unknown_setting(call: Namespace, key: str) -> str:
    """Return the nearest settings, given the other choices of the command line."""
    others = [o for o in call.overrides if "=" in o and not o.lstrip("+~").startswith(key)]
    try:
        cfg, _ = _compose(call.command, others, call.config_dir)
    except (errors.HydraException, OmegaConfBaseException):
        cfg, _ = _compose(call.command, [], call.config_dir)
    keys = [name for name, _ in _settings(OmegaConf.to_container(cfg))]
    message = f"there is no setting {key}{_did_you_mean(key, {*_groups(call.command), *keys})}"
    if key.rpartition(".")[0] in keys:
        message += f"\n+{key}=VALUE adds it, for a function that takes it"
    return message


def _did_you_mean(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, 2, 0.7)
    return f"; did you mean {' or '.join(near)}?" if near else ""


# Help


def _help(call: Namespace) -> str:
    """Return what a command does, with examples, its choices and every setting with its comment."""
    cfg, comments = _compose(call.command, call.overrides, call.config_dir)
    about = _comments(CONFIG_FOLDER / f"{call.command}.yaml", "")[""]
    lines = [about.replace(f"python {call.command}.py", call.program)]
    lines += [f"Usage: {call.program} [key=value ...]", "", "Choices:"]
    groups = _groups(call.command, call.config_dir).items()
    lines += [_columns(f"  {name}=", "  ".join(names), 15) for name, names in groups if names]
    lines += ["", "Settings, as this command line leaves them:"]
    plain: Any = OmegaConf.to_container(cfg)
    for key, value in _settings(dict(sorted(plain.items(), key=lambda i: isinstance(i[1], dict)))):
        if value or key in comments:
            lines.append(_columns(f"  {key}{value}", comments.get(key, ""), 44))
    return "\n".join([*lines, "", HINTS])


def _compose(command: str, overrides: list[str], folder: Any) -> tuple[DictConfig, dict[str, str]]:
    """Return the configuration, and the comments of the files that it comes from by key."""
    folders = [CONFIG_FOLDER]
    if folder:
        folders.append(Path(folder).absolute())
        overrides = [*overrides, f"hydra.searchpath=['file://{folders[-1]}']"]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        cfg = hydra.compose(command, overrides)
        loader = GlobalHydra.instance().config_loader()
        defaults = loader.compute_defaults_list(command, overrides, RunMode.RUN).defaults
    comments: dict[str, str] = {}
    for path, package in (
        (f / f"{d.config_path}.yaml", d.package) for d in defaults for f in folders
    ):
        found = _comments(path, package or "") if path.is_file() else {}
        comments |= {key: text for key, text in found.items() if text}
    return cfg, comments


def _comments(path: Path, package: str) -> dict[str, str]:
    """Return the comments of one of our YAML files by key; that at its head is the package's."""
    comments = {package: ""}
    keys = [(-1, package)]  # around this line, with their indentation
    for line in path.read_text(encoding="utf-8").splitlines():
        setting = re.match(r"( *)(\w+):.*?(?:\s#\s*(.*))?$", line)
        if setting:
            while keys[-1][0] >= len(setting[1]):
                keys.pop()
            keys.append((len(setting[1]), f"{keys[-1][1]}.{setting[2]}".lstrip(".")))
            comments[keys[-1][1]] = setting[3] or ""
        elif line.lstrip().startswith("#") and not line.startswith("# @package"):
            # The head of the file, or a comment that goes on.
            comments[keys[-1][1]] += line.replace("# ", "", 1).replace("#", "", 1) + "\n"
    return comments


def _settings(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting and section with its value; that of a section is its function, if any."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield f"{prefix}{key}", f": {value['_target_']}" if "_target_" in value else ""
            yield from _settings(value, f"{prefix}{key}.")
        elif key not in ("_target_", "_partial_"):
            yield f"{prefix}{key}", f"={_text(value)}"


def _columns(left: str, right: str, width: int) -> str:
    left = left.ljust(width - 1) + " "
    text = textwrap.fill(right, 100, initial_indent=left, subsequent_indent=" " * width)
    return (text or left).rstrip()


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


# Checks


def _check(call: Namespace, cfg: DictConfig) -> DictConfig:
    """Return the configuration, or raises InputError for what is wrong in it."""
    overrides, files = list(HydraConfig.get().overrides.task), FILES
    comments: dict[str, str] = {}
    if call.command == "train" and cfg.get("resume"):
        cfg, usual = run.resumed_config(cfg, overrides), run.resumed_config(cfg, [])
        files = ["data.root"]
    else:
        name = str(HydraConfig.get().job.config_name)
        choices = [o for o in overrides if run.key_of(o) in _groups(call.command)]
        usual, comments = _compose(name, choices, call.config_dir)
    if "callbacks" in usual and cfg.get("callbacks") is None:
        OmegaConf.update(cfg, "callbacks", {}, force_add=True)
    for key in [*(str(k) for k in usual if not OmegaConf.is_missing(usual, k)), *NOT_NULL]:
        default = OmegaConf.select(usual, key)
        if default not in (None, "auto") and OmegaConf.select(cfg, key) is None:
            raise InputError(f"{key} must not be null")
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise InputError(f"{key} must be given: {comments.get(key, 'no default')}")
    _check_type("", OmegaConf.to_container(cfg), OmegaConf.to_container(usual))
    for key in files:
        _check_file(cfg, key, OmegaConf.select(cfg, key))
    extra = EXTRAS.get(call.command)
    if extra and importlib.util.find_spec(extra) is None:
        raise InputError(
            f"{call.command} needs the package {extra}: pip install segwright[{call.command}]"
        )
    for package in ("wandb", "mlflow"):
        if package in cfg.get("logger", {}) and importlib.util.find_spec(package) is None:
            raise InputError(f"logger={package} needs a package: pip install {package}")
    return cfg


def _check_type(key: str, value: Any, default: Any) -> None:
    """Refuses a value of another type than the default, also in lists and in sections."""
    if value is None or (isinstance(value, str) and "${" in value):
        return
    if default is None:  # such as the demo's data.augment.crop, which the file below it gives
        group, _, name = key.partition(".")
        path = CONFIG_FOLDER / group / "default.yaml"
        found = OmegaConf.select(OmegaConf.load(path), name) if path.is_file() else None
        default = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
    if isinstance(default, dict):
        if not isinstance(value, dict):
            raise InputError(f"{key}={_text(value)}: expected {key}.KEY=VALUE")
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
    kinds = (int, float) if kind is float else (kind,)
    if not all(type(item) in kinds for item in items):
        expected = EXPECTED[kind]
        expected = expected.removeprefix("a ") + "s" if isinstance(default, list) else expected
        raise InputError(f"{key}={_text(value)}: expected {expected}, such as {_text(default)}")


def _check_file(cfg: DictConfig, key: str, value: Any) -> None:
    if not isinstance(value, str) or Path(value).expanduser().exists():
        return
    if key in ("checkpoint", "init_from") and value.startswith("hf://"):
        return  # of the Hugging Face Hub
    download = cfg.data.get("download") if key == "data.root" else None
    # Other values of model.weights are names of published ones.
    is_path = value.startswith((".", "/", "~")) or value.endswith(WEIGHTS)
    if (is_path or key != "model.weights") and not download:
        hint = "" if download is None else "; data.download=true fetches the dataset"
        raise InputError(f"{key}={value}: no such file or folder{hint}")

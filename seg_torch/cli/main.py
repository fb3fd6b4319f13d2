"""Command line -> composed configuration -> command.

`main` is all that the entry points call. Nothing heavy, such as torch or NumPy, is imported before
the configuration is known to be right.
"""

import importlib
import logging
import os
import re
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from seg_torch.cli import paths
from seg_torch.cli.checks import checked, unknown_setting
from seg_torch.cli.help import help_page, named_command
from seg_torch.cli.messages import explain, is_first, is_first_on_machine, print_error
from seg_torch.cli.overrides import Call, parse
from seg_torch.commands import COMMANDS
from seg_torch.configuration import escaped
from seg_torch.errors import InputError, StoppedError
from seg_torch.files import CONFIG_FOLDER
from seg_torch.folders import claimed, new_folder
from seg_torch.training.run import key_of
from seg_torch.version import __version__

# Lightning's notes on its own insides. Frozen encoders are in eval mode, and all processes hold the
# same scores (sync_dist). The loader is resumable, by the data module's state.
NOTES = (
    "treespec|smaller than the logging|not have many workers|in eval mode at|sync_dist=True"
    "|exists and is not empty|dataloader is not resumable"
)
# Lightning advertises, timm tells of weights what seg_torch tells in one line, and httpx of every
# request of huggingface_hub.
QUIET = {"lightning.pytorch": logging.WARNING, "lightning.fabric": logging.WARNING}
QUIET |= {"timm": logging.ERROR, "httpx": logging.WARNING, "httpx2": logging.WARNING}
QUIET |= {"matplotlib": logging.WARNING}  # which tells of its list of fonts when it is imported

log = logging.getLogger(__name__)


def main(command: str | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 1 some files failed, 2 the user's error, 130 Ctrl-C.

    Errors that the user can fix are printed on standard error in a few lines; everything else is a
    bug and keeps its traceback.

    Args:
        command: Its name; if `None`, the first argument of the command line.
    """
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", "") == "strict":
            # A console of Windows (cp1252) has no Chinese, and none has every file's name.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints errors and ends the process itself
    arguments, start = sys.argv[1:], []
    if "--version" in arguments:
        print(__version__)
        sys.exit(0)
    if command is None:
        command = named_command(arguments)
        start = [arguments.pop(0)]
    code, codes = attempt(lambda: run_jobs(parse(command, start, arguments)))
    codes = codes or []
    failed = [str(job) for job, code in enumerate(codes) if code]
    if len(codes) > 1 and failed:
        print_error(f"{len(failed)} of {len(codes)} jobs failed: {', '.join(failed)}")
    sys.exit(max(code, *codes, 0))


def run_jobs(call: Call) -> list[int]:
    """Run a command once, or once for each job of a sweep, and return their exit codes."""
    codes: list[int] = []
    sweep, folders = ExitStack(), list[str]()  # the claim to its folder

    def job(cfg: DictConfig) -> Any:
        """Return what the command did: sweepers such as Optuna's go by the score of train."""
        if HydraConfig.get().mode == RunMode.MULTIRUN and not codes and is_first():
            # Before any job: those of two sweeps in one folder would be taken for one sweep's.
            folders.append(HydraConfig.get().sweep.dir)
            sweep.enter_context(claimed(folders[0]))
        code, result = attempt(lambda: execute(call, checked(call, cfg)))
        files_failed = call.command != "train" and bool(result)
        codes.append(code or int(files_failed))
        return result

    # For the folder of a sweep, which Hydra makes before it calls the job.
    OmegaConf.register_new_resolver("path", lambda path: paths.expanded(str(path)), replace=True)
    argv = sys.argv
    sys.argv = [argv[0], *call.flags, *call.overrides]  # which Hydra reads
    try:
        if call.help:
            print(help_page(call))
        else:
            with sweep:
                hydra.main(str(CONFIG_FOLDER), call.command, version_base="1.3")(job)()
            if call.command == "train" and folders and codes.count(0) > 1:
                compare_jobs(folders[0])
    except ConfigCompositionException as error:
        # A list without brackets, device=0,1, is refused before its setting is looked for.
        key = re.search(
            r"(?:Could not override|Ambiguous value for argument) '([^'@=]+)", str(error)
        )
        message = unknown_setting(call, key[1]) if key else None
        if message is None:
            raise
        raise InputError(message) from None
    finally:
        sys.argv = argv
    return codes


def compare_jobs(folder: str) -> None:
    """Print the table of a sweep's runs, which is also left in its folder, and its command."""
    compare = importlib.import_module("seg_torch.commands.compare")
    where = escaped(folder)
    try:
        compare.compare(OmegaConf.create({"runs": where, "split": "test", "output_dir": where}))
    except InputError as error:  # such as runs on several datasets
        log.info("the runs are in no common table: %s", error)
    program = "seg-torch" if shutil.which("seg-torch") else "python -m seg_torch"
    log.info("the same for these or other runs:\n  %s compare %s", program, shlex.quote(folder))


def attempt(work: Callable[[], Any]) -> tuple[int, Any]:
    """Return 0 and what `work` returns, or the exit code after printing an error."""
    try:
        return 0, work()
    except KeyboardInterrupt:
        sys.exit(130)
    except StoppedError as stop:  # by agreement of all processes
        if is_first_on_machine():
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)
    except SystemExit as stop:
        # Lightning turns Ctrl-C into exit(1).
        sys.exit(130 if isinstance(stop.__context__, KeyboardInterrupt) else stop.code)
    except Exception as error:
        message = explain(error)
        if message is None:
            traceback.print_exc()
            return 1, None
        print_error(message)
        return 2, None


def execute(call: Call, cfg: DictConfig) -> Any:
    """Call the command and leave the process as it was, for the next job of a sweep.

    With several devices Lightning starts the other processes by the command line of this one. In
    a sweep that would start the sweep again in each of them, so the command line becomes that of
    the job alone, with its folder, and Hydra's own state is hidden from Lightning.
    """
    warnings.filterwarnings("ignore", f".*({NOTES})")
    state = HydraConfig.get()
    overrides, made, folder = list(state.overrides.task), "", COMMANDS[call.command].folder
    plain: Any = OmegaConf.to_container(cfg)
    if folder is not None and not (call.command == "train" and cfg.resume):
        if state.mode == RunMode.MULTIRUN:
            # Hydra has not escaped it: read like a setting, its ${ would be a reference.
            runtime: Any = OmegaConf.to_container(state.runtime)
            cfg[folder] = escaped(runtime["output_dir"])
        elif re.search(r"(?<!\\)\$\{now:", plain[folder]) and is_first():
            made = new_folder(cfg[folder])  # another run may begin just now
            cfg[folder] = escaped(made)
        overrides = [o for o in overrides if not o.startswith(f"{folder}=")]
        overrides.append(f"{folder}=")
    overrides = [_as_typed(call.command, cfg, override) for override in overrides]
    environment = set(os.environ)
    HydraConfig.instance().cfg = None
    flags = [flag for flag in call.flags if flag not in ("-m", "--multirun")]
    sys.argv = [sys.argv[0], *call.start, *flags, *overrides]  # run_jobs puts back what it was
    try:
        quieten()
        module = importlib.import_module(f"seg_torch.commands.{call.command}")
        quieten()  # Lightning sets its own levels when it is imported
        return getattr(module, call.command)(cfg)
    finally:
        with suppress(OSError):  # the run has left something in it
            os.rmdir(made)
        if "LOCAL_RANK" not in environment:
            distributed: Any = sys.modules.get("torch.distributed")
            if distributed and distributed.is_available() and distributed.is_initialized():
                distributed.destroy_process_group()
            for name in os.environ.keys() - environment:
                del os.environ[name]


def quieten() -> None:
    """Set the levels of the loggers of libraries."""
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)


def _as_typed(command: str, cfg: DictConfig, override: str) -> str:
    """Return an override as the user would give it: Hydra's form of a path is quoted."""
    key, (name, equals, _) = key_of(override), override.partition("=")
    value = OmegaConf.select(cfg, key) if equals and key in paths.settings_of(command) else None
    return override if value is None else f"{name}={paths.as_typed(value)}"

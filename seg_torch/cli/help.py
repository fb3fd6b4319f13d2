"""What `--help` shows: the commands, and what the comments of the YAML files say of settings."""

import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from seg_torch.cli.messages import as_text, did_you_mean, print_error
from seg_torch.cli.overrides import Call, groups
from seg_torch.cli.paths import quoted
from seg_torch.commands import COMMANDS
from seg_torch.files import CONFIG_FOLDER

HINTS = """\
+key=value adds a setting, ~key removes one. With -m, key=a,b runs the command for each value.
--cfg job prints the configuration; --config-dir FOLDER adds choices of your own."""


def named_command(arguments: Sequence[str]) -> str:
    """Return the first argument, or print the list of commands and exit where it is none."""
    name = arguments[0] if arguments else "--help"
    if name in COMMANDS:
        return name
    wrong = name not in ("--help", "-h")
    if wrong:
        print_error(f"there is no command {name}{did_you_mean(name, COMMANDS)}")
    program = _program([])
    lines = [f"Usage: {program} COMMAND [key=value ...]", "", "Commands:"]
    lines += [f"  {command:10}{_about(command).splitlines()[0]}" for command in COMMANDS]
    lines += ["", f"{program} COMMAND --help shows examples and all settings."]
    print("\n".join(lines), file=sys.stderr if wrong else sys.stdout)
    sys.exit(2 if wrong else 0)


def help_page(call: Call) -> str:
    """Return what a command does, with examples, its choices and every setting with its comment."""
    cfg, comments = compose(call.command, call.overrides, call.config_dir)
    program = _program(call.start)
    lines = [_about(call.command).replace(f"python {call.command}.py", program)]
    lines += [f"Usage: {program} [key=value ...]", "", "Choices:"]
    choices = groups(call.command, call.config_dir).items()
    lines += [_columns(f"  {name}=", "  ".join(names), 15) for name, names in choices if names]
    lines += ["", "Settings, as this command line leaves them:"]
    plain: Any = OmegaConf.to_container(cfg)
    sections_last = dict(sorted(plain.items(), key=lambda item: isinstance(item[1], dict)))
    for key, value in settings(sections_last):
        if value or key in comments:
            lines.append(_columns(f"  {key}{value}", comments.get(key, ""), 44))
    return "\n".join([*lines, "", HINTS])


def compose(
    command: str, overrides: list[str], folder: str | None
) -> tuple[DictConfig, dict[str, str]]:
    """Return the configuration, and the comments of the files that it comes from by key."""
    folders = [CONFIG_FOLDER]
    if folder:
        folders.append(Path(folder).absolute())
        overrides = [*overrides, f"hydra.searchpath=[{quoted(f'file://{folders[-1]}')}]"]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        cfg = hydra.compose(command, overrides)
        loader = GlobalHydra.instance().config_loader()
        defaults = loader.compute_defaults_list(command, overrides, RunMode.RUN).defaults
    comments: dict[str, str] = {}
    for default in defaults:
        for path in (folder / f"{default.config_path}.yaml" for folder in folders):
            if path.is_file():
                texts = _comments(path, default.package or "")
                comments |= {key: text for key, text in texts.items() if text}
    return cfg, comments


def settings(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting and section with its value; that of a section is its function, if any."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield f"{prefix}{key}", f": {value['_target_']}" if "_target_" in value else ""
            yield from settings(value, f"{prefix}{key}.")
        elif key not in ("_target_", "_partial_"):
            yield f"{prefix}{key}", f"={as_text(value)}"


def _program(start: Sequence[str]) -> str:
    """Return how the user started the program, with the arguments that named the command."""
    name = Path(sys.argv[0]).name
    name = "python -m seg_torch" if name == "__main__.py" else name
    return " ".join([f"python {name}" if name.endswith(".py") else name, *start])


def _about(command: str) -> str:
    return _comments(CONFIG_FOLDER / f"{command}.yaml", "")[""]


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


def _columns(left: str, right: str, width: int) -> str:
    left = left.ljust(width - 1) + " "
    text = textwrap.fill(right, 100, initial_indent=left, subsequent_indent=" " * width)
    return (text or left).rstrip()

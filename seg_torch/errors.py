"""The errors that are no bugs."""

import importlib.util
import json
import shlex
import textwrap
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname


class InputError(ValueError):
    """The user gave something that cannot be used.

    The message names the file or value, what was found and what to do about it. The command line
    prints it without a traceback.

    Args:
        message: What is printed.
        problems: All that is wrong, where the message shows only the first.
        pixels: Of a mask: values or colours that no class has, with the number of their pixels.
    """

    def __init__(
        self,
        message: str = "",
        problems: Sequence[str] = (),
        pixels: Mapping[Any, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.problems = list(problems)
        self.pixels = {str(value): count for value, count in (pixels or {}).items()}


class StoppedError(BaseException):
    """A signal stopped the run: like KeyboardInterrupt, past every `except Exception`.

    Args:
        message: How to go on.
        signum: Number of the signal.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def check_choice(setting: str, value: object, choices: Collection[object]) -> None:
    """Refuses a value that is none of the choices.

    Args:
        setting: Its name on the command line.
        value: What was given.
        choices: What is possible.

    Raises:
        InputError: The value is something else.
    """
    if value not in choices:
        raise InputError(f"{setting} is {value!r}; use one of {', '.join(map(str, choices))}")


def require(what: str, extra: str, *packages: str) -> None:
    """Refuse to do what needs packages that are not installed.

    Args:
        what: What needs them, such as `format=onnx` or the path of a file.
        extra: Of this project, which brings them.
        packages: Names under which they are imported.

    Raises:
        InputError: One of them is missing; the message says how to install it.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{what} needs {', '.join(missing)}: {install_command(extra)}")


def install_command(extra: str) -> str:
    """Return the command that installs an extra of this project, as the project was installed.

    The brackets are quoted, since in zsh they are patterns. Where neither the sources nor the wheel
    are there any more, the packages of the extra are named.
    """
    root = Path(__file__).parents[1]
    if (root / "pyproject.toml").is_file():
        where = "." if root == Path.cwd() else str(root)
        return f"pip install -e {shlex.quote(f'{where}[{extra}]')}"
    try:
        installed = distribution("segwright")
    except PackageNotFoundError:
        return f"install the extra {extra} of segwright"
    source = json.loads(installed.read_text("direct_url.json") or "{}").get("url", "")
    path = url2pathname(urlparse(source).path)
    if source.startswith("file:") and Path(path).exists():
        return f"pip install {shlex.quote(f'{path}[{extra}]')}"
    requirements = [text.partition(";") for text in installed.requires or []]
    packages = [
        shlex.quote(package.strip())
        for package, _, marker in requirements
        if f"extra == '{extra}'" in marker.replace('"', "'")
    ]
    return f"pip install {' '.join(packages)}"


def reason(error: BaseException, length: int = 300) -> str:
    """Return what an error says as one line of limited length; its type where it says nothing."""
    return textwrap.shorten(str(error), length, placeholder=" ...") or type(error).__name__

"""The errors that are no bugs."""

import importlib.util
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any


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
        raise InputError(f"{what} needs {', '.join(missing)}: pip install 'segwright[{extra}]'")


def reason(error: BaseException, length: int = 300) -> str:
    """Return what an error says as one line of limited length; its type where it says nothing."""
    return textwrap.shorten(str(error), length, placeholder=" ...") or type(error).__name__

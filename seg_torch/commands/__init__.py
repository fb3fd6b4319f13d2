"""What a user can ask for, one module each; nothing else imports them.

A command NAME is conf/NAME.yaml, whose first comment says what it does, and the function NAME of
the module `seg_torch.commands.NAME`. The command line reads this file, which imports nothing heavy.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """What the command line knows of a command besides its configuration.

    Attributes:
        positional: The setting that its arguments without a key are.
        takes_several: Such arguments may be more than one.
        packages: What it needs besides what is always installed; the extra has its name.
    """

    positional: str | None = None
    takes_several: bool = False
    packages: tuple[str, ...] = ()


COMMANDS = {
    "inspect": Command(),
    "train": Command(),
    "evaluate": Command(),
    "report": Command(positional="checkpoint"),
    "compare": Command(positional="runs", takes_several=True),
    "predict": Command(),
    "export": Command(),
    "app": Command(packages=("fastapi", "uvicorn", "python_multipart")),
    "serve": Command(packages=("fastapi", "uvicorn", "python_multipart")),
}

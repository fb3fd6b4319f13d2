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
        paths: Its settings at the top level that are paths.
        folder: That of them in which its results are, with one folder for each job of a sweep.
        takes_several: Arguments without a key may be more than one.
        packages: What it needs besides what is always installed; the extra has its name.
    """

    positional: str
    paths: tuple[str, ...]
    folder: str | None = "output_dir"
    takes_several: bool = False
    packages: tuple[str, ...] = ()


SERVER = ("fastapi", "uvicorn", "python_multipart")
COMMANDS = {
    "inspect": Command("data.root", ("output_dir",)),
    "plan": Command("data.root", ("output_dir", "resume", "init_from"), None),
    "train": Command("data.root", ("output_dir", "resume", "init_from")),
    "evaluate": Command("checkpoint", ("checkpoint", "output_dir")),
    "report": Command("checkpoint", ("checkpoint", "output_dir")),
    "compare": Command("runs", ("runs", "output_dir"), takes_several=True),
    "predict": Command("input", ("input", "output", "checkpoint", "compare_with"), "output"),
    "export": Command("checkpoint", ("checkpoint", "output"), None),
    "app": Command("checkpoint", ("checkpoint",), None, packages=SERVER),
    "serve": Command("checkpoint", ("checkpoint",), None, packages=SERVER),
}

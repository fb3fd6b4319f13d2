"""The errors that are no bugs."""


class InputError(ValueError):
    """The user gave something that cannot be used.

    The message names the file or value, what was found and what to do about it. The command line
    prints it without a traceback.
    """


class StoppedError(Exception):
    """A signal stopped the run, which has saved where it was.

    Args:
        message: How to go on.
        signum: Number of the signal.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum

"""The one exception that is the user's to fix."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message names the file or value, what was found and what to do about it. The command line
    prints it without a traceback.
    """

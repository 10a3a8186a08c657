"""The one error a person is meant to read: bad input, told in one line.

Everything that a user can correct (a wrong name, an impossible number, a missing file) is raised as `InputError`; the command line prints
its message without a traceback and exits with code 2. Any other exception is a defect of ours or of the machine and keeps its traceback.
"""

__all__ = ["InputError"]


class InputError(ValueError):
    """Input that a person can correct. The message is one line: what is wrong, where, and what to do about it.

    Example:
        >>> lab.load_experiment("quik")
        Traceback (most recent call last):
            ...
        dynamoe_lab.errors.InputError: unknown profile 'quik': choose one of ..., or give a path to a YAML file
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))

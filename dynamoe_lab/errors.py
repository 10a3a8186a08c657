"""The one error a person is meant to read: bad input, told in one line.

Everything that a user can correct (a wrong name, an impossible number, a missing file) is raised as `InputError`; the command line prints
its message without a traceback and exits with code 2. Any other exception is a defect of ours or of the machine and keeps its traceback.
"""

__all__ = ["InputError", "first_line", "printable"]

_LONGEST = 1_200  # characters: what was typed may be of any length, and the remedy stands at the end
_PLAIN = (OSError, ValueError, RuntimeError, ImportError)  # kinds whose messages are sentences


class InputError(ValueError):
    """Input that a person can correct. The message is one line: what is wrong, where, and what to do about it.

    Characters that a terminal would obey stand in it as their codes, and the middle of a very long one is left out.

    Example:
        >>> lab.load_experiment("quik")
        Traceback (most recent call last):
            ...
        dynamoe_lab.errors.InputError: unknown profile 'quik': choose one of ..., or give a path to a YAML file
    """

    def __init__(self, message: str):
        line = printable(" ".join(str(message).split()))
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST * 2 // 3]} [...] {line[-_LONGEST // 3 :]}"
        super().__init__(line)


def printable(text: str, keep: str = "") -> str:
    r"""A text for a terminal: characters that it would obey stand as their codes, but those in `keep`.

    >>> from dynamoe_lab.errors import printable
    >>> print(printable("\x1b[2Jgone\nbut the line", keep="\n"))
    \x1b[2Jgone
    but the line
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What an error of a library says, in a line without its full stop; its kind, too, where the text alone would be a riddle."""
    kind = type(error).__name__
    if isinstance(error, RecursionError):
        return "nested too deeply"
    mark = getattr(error, "problem_mark", None)  # of PyYAML, whose first line says what was being read
    if mark is not None and getattr(error, "problem", None):
        return f"{error.problem}, line {mark.line + 1}"
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(" .:") if lines else ""
    if text in ("", "None"):
        return kind
    riddle = type(error).__module__ == "builtins" and not isinstance(error, _PLAIN)  # a key, or what a value lacks
    return f"{kind}: {text}" if riddle else text

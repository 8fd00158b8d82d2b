"""Errors that are shown as one line, and helpers for their messages."""

import difflib
from collections.abc import Iterable, Sequence

SHOWN = 5  # names in a message


class UserError(ValueError):
    """A user error in the config, the data, a path, the environment or a checkpoint.

    Its message is one line: what was found, what was expected, what to do. A command prints that line and exits with
    status 2 (`command.py`). Any other exception is a bug and keeps its traceback.
    """


class RunError(RuntimeError):
    """A failure during a run, such as a loss that is not finite.

    Its message is one line as well. A command prints it and exits with status 1.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """Return `did you mean X?` with up to `most` of the `known` names that are similar to `name`, "" if none is."""
    near = difflib.get_close_matches(name, list(known), n=most)
    return f"did you mean {' or '.join(near)}?" if near else ""


def few_of(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

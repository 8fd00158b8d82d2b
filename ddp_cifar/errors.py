"""Errors that are shown as one line, and helpers for their messages."""

import contextlib
import difflib
import os
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

SHOWN = 5  # names in a message

PACKAGE = Path(__file__).parent


class UserError(ValueError):
    """A user error in the config, the data, a path, the environment or a checkpoint.

    Its message is one line: what was found, what was expected, what to do. A command prints that line and exits with
    status 2 (`command.py`). Any other exception is a bug and keeps its traceback.
    """


class RunError(RuntimeError):
    """A failure during a run, such as a loss that is not finite.

    Its message is one line as well. A command prints it and exits with status 1.
    """


class FaultyReplica(RunError):
    """The same, on a rank whose weights, or results, are not those of most ranks. Its node must not be used again."""


class LostRank(RunError):
    """Another rank was killed, and this one knows why. The state of the run is not the cause."""


class NoRestart(RunError):
    """The job must end, also if restarts are left: another start would fail too, or on a device that is not trusted."""


DEVICE_FAILURES = (
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
    "hardware stack error",
    "memory over nvlink or a hardware error",
)
"""Parts of messages of CUDA errors that broken hardware causes, in lower case (cudaErrorECCUncorrectable and so on).

Source: `cudaGetErrorString` in NVIDIA's CUDA Runtime API, "Error handling".
"""


def is_device_failure(error: BaseException) -> bool:
    """True if the hardware of a GPU has caused the error, so that the GPU must not be used again."""
    message = str(error).lower()
    return any(part in message for part in DEVICE_FAILURES)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def user_code(problem: str, expected: str = "") -> Iterator[None]:
    """Turn any exception of the body, which calls user-defined code, into a `UserError`.

    Its message is `problem: the exception's first line (file.py:12); expected`. A `UserError` stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # user-defined code may raise anything
        raise UserError(f"{problem}: {first_line(error)}{_place(error)}{expected and '; ' + expected}") from error


def _place(error: BaseException) -> str:
    """` (models.py:31)`: the innermost line that is neither in a library nor in this package; "" if there is none."""
    files = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_library(frame.filename)]
    own = [frame for frame in files if not _is_own(frame.filename)]
    return f" ({short_name(own[-1].filename)}:{own[-1].lineno})" if own else ""


def is_library(path: str) -> bool:
    """True for a source file of Python or of an installed package other than this one."""
    if _is_own(path):
        return False
    return path.startswith((sysconfig.get_path("stdlib"), "<")) or bool(
        {"site-packages", "dist-packages"} & {*Path(path).parts}
    )


def short_name(path: str) -> str:
    """The name of a source file in messages: training/step.py for one of this package, or else the last part of its path."""
    return path.removeprefix(f"{PACKAGE}{os.sep}") if _is_own(path) else Path(path).name


def _is_own(path: str) -> bool:
    return path.startswith(f"{PACKAGE}{os.sep}")


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """Return `did you mean X?` with up to `most` of the `known` names that are similar to `name`, "" if none is."""
    near = difflib.get_close_matches(name, list(known), n=most)
    return f"did you mean {' or '.join(near)}?" if near else ""


def few_of(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

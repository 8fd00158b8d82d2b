"""Shared code of all commands: arguments, exit statuses, one-line user errors, and formatting for tables."""

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from ddp_cifar.distributed.environment import is_lost_peer, rank_and_world_size
from ddp_cifar.errors import LostRank, NoRestart, RunError, UserError, first_line
from ddp_cifar.log import log, set_up_logging

EXIT_FAILED, EXIT_USER_ERROR, EXIT_SAVE_FAILED = 1, 2, 3

SPACE, SPACE_BYTES = "space", 16_384
"""A file next to torchrun's error file, and its size. It gives way to the error, whose cause may be a full disk."""

TRUST_HELP = "call user-defined functions that the checkpoint names, such as its model's"


class Arguments(argparse.ArgumentParser):
    """An argument parser with the command's docstring as `--help` text. It raises `UserError` for invalid arguments."""

    def __init__(self, module: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the arguments")


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Raise `UserError` if one of these options is given and is less than 1."""
    for name in names:
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is out of range: expected 1 or more")


def run_command(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run `main(argv)` and exit with its status, with 2 after a `UserError`, or with 1 after any other exception.

    The exception is also recorded for torchrun, so that torchrun's report and launch/*.sh repeat the line. A lost peer is
    not recorded, because it is not the cause of the failure.
    """
    set_up_logging(0, 1)
    _reserve_space()
    try:
        set_up_logging(*rank_and_world_size())
        status = main(sys.argv[1:])
    except UserError as error:
        log.error(error)
        status = EXIT_USER_ERROR
        record_error(str(error), status)
    except KeyboardInterrupt:
        log.error("interrupted")
        status = EXIT_FAILED
    except NoRestart as error:
        log.error(error)
        status = record_final_error(str(error), EXIT_FAILED)
    except LostRank as error:
        leave(str(error), ranks=())
    except RunError as error:
        leave(str(error))
    except Exception as error:
        status = EXIT_FAILED
        if is_lost_peer(error):
            log.error(f"a peer rank exited; shutting down ({first_line(error)})", extra={"is_cause": False})
            record_lost_peer()
        else:
            details = "".join(traceback.format_exception(error)).rstrip()
            summary = f"{type(error).__name__}: {error}"
            log.error(details, extra={"summary": summary})
            record_error(summary, status, details)
    _flush()
    # skip the interpreter's shutdown: it could wait for lost peers, and a signal could still change the exit status
    os._exit(status)


def leave(message: str, *, is_cause: bool = True, ranks: Sequence[int] | None = None) -> NoReturn:
    """Exit immediately with a one-line error, from any thread, whatever the other threads do.

    `is_cause`: false if another rank failed first, so that torchrun's report does not name this one. `ranks`: those that are
    the cause, none if they are not known; None: this one.
    """
    try:
        log.error(message, extra={"is_cause": is_cause, "ranks": ranks})
        if is_cause:
            record_error(message, EXIT_FAILED)
        else:
            record_lost_peer()
        _flush()
    finally:  # even if the terminal is closed
        os._exit(EXIT_FAILED)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager around code that writes all of `path`, which the user chose. Raises `UserError` if it cannot."""
    with writing_part(path):
        yield
    log.info(f"wrote {path}")


@contextlib.contextmanager
def writing_part(path: Path) -> Iterator[None]:
    """Like `writing`, for code that writes only a part of `path`, so that success is not logged."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another file") from error


def percent(share: float | None) -> str:
    """Format a fraction from 0 to 1 as percent, None as `-`."""
    return "-" if share is None else f"{100 * share:.2f}%"


def megabytes(num_bytes: float, digits: int = 1) -> str:
    """Format bytes as MB (10^6 bytes) with `digits` decimals, or as GB if 1 GB or more."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.{digits}f} MB"


def span(fewest: int, most: int) -> str:
    """Format a range: `3`, or `2 to 3` if the ends differ."""
    return str(most) if fewest == most else f"{fewest} to {most}"


def counted(number: int | str, noun: str, plural: str = "") -> str:
    """Format a count with its noun: `1 rank`, `3 ranks`, `2 to 3 ranks`."""
    return f"{number} {noun if str(number) == '1' else plural or noun + 's'}"


def final_status(status: int) -> int:
    """Return the status with which every rank has to exit to end the job: if restarts are left, torchrun restarts all others."""
    return 0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) else status


def record_final_error(message: str, status: int) -> int:
    """Write the error that ends the job, as `record_error`, and return the status with which this rank has to exit.

    If it cannot be written, that is `status`: launch/*.sh would take 0 for a success.
    """
    return final_status(status) if record_error(message, status, is_final=True) else status


def _reserve_space() -> None:
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        with contextlib.suppress(OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).with_name(SPACE).write_bytes(bytes(SPACE_BYTES))


def record_lost_peer() -> None:
    """Note next to torchrun's error file that this rank exits because another one did."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        with contextlib.suppress(OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).with_name("lost_peer").touch()


def record_run_dir(path: Path) -> None:
    """Note the folder of the run next to torchrun's error file. If the run fails, launch/*.sh print what has happened to it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        with contextlib.suppress(OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).with_name("run_dir").write_text(f"{path.absolute()}\n")


def record_error(message: str, status: int, details: str = "", *, is_final: bool = False) -> bool:
    """Write the error to the file that torchrun reads, in the format of torch's `@record`. Return True if it is written.

    (`@record` itself would also print a traceback, and add one to torchrun's report, for a user error.) Next to that
    file, `error.txt` has the line that launch/*.sh repeat, and `error.status` the exit status that they return.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return False
    path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
    extra = {"py_callstack": details or message, "timestamp": str(int(time.time()))}
    line = f"[rank {os.environ.get('RANK')}] error: {message}\n"
    try:
        path.with_name(SPACE).unlink(missing_ok=True)
        path.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        path.with_suffix(".status").write_text(f"{status}\n")
        path.with_suffix(".txt").write_text(line, errors="backslashreplace")
        if is_final:
            path.with_suffix(".final").touch()
    except OSError:  # such as a full disk; or torchrun has exited and removed its folder
        return False
    return True

"""What every command does around its `main`: a user's mistake is one line, a bug keeps its traceback, both are recorded."""

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

from ddp_cifar.distributed import is_lost_peer, place_from_environment
from ddp_cifar.errors import RunError, UserError
from ddp_cifar.log import log, set_up_logging

EXIT_FAILED, EXIT_USER_ERROR, EXIT_SAVE_FAILED = 1, 2, 3


class Arguments(argparse.ArgumentParser):
    """A command's arguments, in its docstring's words. What it cannot read is a `UserError`, one line."""

    def __init__(self, module: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the arguments")


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Raise `UserError` where one of these options is given and is not 1 or more."""
    for name in names:
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is out of range: expected 1 or more")


def run_command(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run `main(argv)` and exit: its status, 2 after a `UserError`, 1 after any other exception.

    The exception is also left where torchrun looks for it, so that its report, and launch/*.sh, repeat the line. But for
    that of a rank whose peers are gone, which is no reason.
    """
    set_up_logging(0, 1)
    try:
        set_up_logging(*place_from_environment())
        status = main(sys.argv[1:])
    except UserError as error:
        log.error(error)
        status = EXIT_USER_ERROR
        record_error(str(error), status)
    except KeyboardInterrupt:
        log.error("interrupted")
        status = EXIT_FAILED
    except RunError as error:
        leave(str(error))
    except Exception as error:
        status = EXIT_FAILED
        if is_lost_peer(error):
            log.error(f"another rank is gone, so this one ends ({str(error).splitlines()[0]})")
        else:
            details = "".join(traceback.format_exception(error)).rstrip()
            log.error(details)
            record_error(f"{type(error).__name__}: {error}", status, details)
    _flush()
    # past the interpreter's own end, which could wait for peers that are gone, and in which a signal would still kill
    os._exit(status)


def leave(message: str) -> NoReturn:
    """End this process at once, from any thread and whatever the others do, with an error of one line."""
    try:
        log.error(message)
        record_error(message, EXIT_FAILED)
        _flush()
    finally:  # even where there is no terminal any more
        os._exit(EXIT_FAILED)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """The body writes the file that the user has named. Raises `UserError` if it cannot."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another file") from error
    log.info(f"wrote {path}")


def show(text: str) -> None:
    """Print on the terminal, whatever is in the names of files; a reader that has gone, such as `head`, has seen enough."""
    sys.stdout.flush()
    output = getattr(sys.stdout, "buffer", None)
    try:
        if output is None:
            print(text, flush=True)
        else:
            output.write(f"{text}\n".encode(sys.stdout.encoding, "surrogateescape"))
            output.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush would fail again


def percent(share: float | None) -> str:
    """A share of 0 to 1 as a table has it."""
    return "-" if share is None else f"{100 * share:.2f}%"


def megabytes(num_bytes: float, digits: int = 1) -> str:
    """As a table has it: so many MB, of a million bytes, with `digits` behind the point; GB from one on."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.{digits}f} MB"


def record_error(message: str, status: int, details: str = "") -> None:
    """Leave the error where torchrun looks for it, in the form that torch's `@record` writes.

    (`@record` itself would print a traceback, and put one into torchrun's report, for a user's mistake too.) Beside it
    go `error.txt`, the one line that launch/*.sh repeat, and `error.status`, the exit status that they end with.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        extra = {"py_callstack": details or message, "timestamp": str(int(time.time()))}
        line = f"[rank {os.environ.get('RANK')}] error: {message}\n"
        with contextlib.suppress(OSError):  # a torchrun that is gone has taken its folder along
            path.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
            path.with_suffix(".status").write_text(f"{status}\n")
            path.with_suffix(".txt").write_text(line, errors="backslashreplace")

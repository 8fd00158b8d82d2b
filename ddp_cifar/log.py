"""Log lines: info from rank 0, warnings and errors from every rank, each line prefixed with its rank."""

import contextlib
import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

from ddp_cifar.errors import UserError

log = logging.getLogger("ddp_cifar")


def set_up_logging(rank: int, world_size: int) -> None:
    """Log info to stdout from rank 0 only, and warnings and errors to stderr from every rank."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO)
    handler = _TerminalHandler()
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handler.setFormatter(_formatter(rank, world_size))
    log.addHandler(handler)


def log_to_file(path: Path, rank: int, world_size: int) -> None:
    """Also append this rank's lines, including info, to a file. Raises `UserError` if it cannot be written."""
    try:
        handler = _FileHandler(path, errors="backslashreplace")  # file names need not be UTF-8
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another run_dir") from error
    handler.setFormatter(_formatter(rank, world_size))
    log.addHandler(handler)


def _formatter(rank: int, world_size: int) -> logging.Formatter:
    width = len(str(world_size - 1))
    return _Formatter(f"[rank {rank:{width}d}] %(asctime)s %(level)s%(message)s", "%H:%M:%S")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        record.level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return printable(super().format(record))


def printable(text: str) -> str:
    """Escape control characters, with which a name from a file could move the cursor or change the terminal's settings."""
    return text.translate(CONTROL_CHARACTERS)


CONTROL_CHARACTERS = {
    number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160)) if chr(number) not in "\t\n"
}


class _FileHandler(logging.FileHandler):
    """Warns once if a line cannot be written, as on a full disk. The standard library would print a traceback per line."""

    warned = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.warned:
            self.warned = True
            log.warning(f"cannot write {self.baseFilename} ({error.strerror}); this file lacks lines")


class _TerminalHandler(logging.Handler):
    """Writes lines above the progress bar, if there is one, so that they do not break it."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        with contextlib.suppress(OSError, ValueError):  # a run continues after its terminal is closed
            tqdm.write(self.format(record), file=stream)
            stream.flush()


def show(text: str) -> None:
    """Print to stdout, including file names that are not UTF-8. A closed pipe (such as to `head`) is not an error."""
    sys.stdout.flush()
    output = getattr(sys.stdout, "buffer", None)
    try:
        text = printable(text)
        if output is None:
            print(text, flush=True)
        else:
            output.write(f"{text}\n".encode(sys.stdout.encoding, "surrogateescape"))
            output.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the flush at exit would fail again

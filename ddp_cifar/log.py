"""Text for people: what happens on rank 0, warnings from any rank, the rank in front of every line."""

import contextlib
import logging
import sys
from pathlib import Path

from tqdm import tqdm

from ddp_cifar.errors import UserError

log = logging.getLogger("ddp_cifar")


def set_up_logging(rank: int, world_size: int) -> None:
    """Send info lines to stdout from rank 0 alone, and warnings and errors to stderr from every rank."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO)
    handler = _TerminalHandler()
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handler.setFormatter(_formatter(rank, world_size))
    log.addHandler(handler)


def log_to_file(path: Path, rank: int, world_size: int) -> None:
    """Append this rank's lines, info included, to a file as well. Raises `UserError` if it cannot be written."""
    try:
        handler = logging.FileHandler(path, errors="backslashreplace")  # file names need not be UTF-8
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
        return super().format(record)


class _TerminalHandler(logging.Handler):
    """Writes above a progress bar, if there is one, rather than through it."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone is no reason to end a run
            tqdm.write(self.format(record), file=stream)
            stream.flush()

"""Folders that are made once: whole or not at all, however many processes want them at the same time."""

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from ddp_cifar.log import log


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Have `make` fill `folder`, unless it is there; other processes, of other nodes too, wait and then find it.

    It is filled under another name and renamed, so that a process that dies on the way leaves no half of it. Raises
    `OSError` if it cannot be written, and whatever `make` raises.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with only_one(folder.with_name(f".{folder.name}.lock")) as is_alone:
        if folder.is_dir():
            return
        if is_alone:
            # of this host alone: some cluster file systems' locks hold within a host, and another may be at work
            for left_over in folder.parent.glob(f".{folder.name}.tmp-{socket.gethostname()}-*"):
                shutil.rmtree(left_over, ignore_errors=True)
        temporary = folder.with_name(f".{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            make(temporary)
            _rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        # on a file system without locks another process may have been first: what it made is the same
        if not folder.is_dir():
            raise


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[bool]:
    """Hold a lock on `path` in the body; gives False where the file system has no locks."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info(f"waiting for another process to make what {path.parent} is to hold")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True

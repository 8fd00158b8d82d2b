"""Create a folder once and atomically, even if several processes need it at the same time."""

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from ddp_cifar.errors import UserError
from ddp_cifar.log import log


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Create `folder` with `make` unless it exists. Other processes, also on other nodes, wait and then use it.

    `make` fills a temporary folder, which is then renamed, so that a killed process leaves no incomplete folder. Raises
    `OSError` if the folder cannot be written, `UserError` if someone could have planted it, and any exception of `make`.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with only_one(folder.with_name(f".{folder.name}.lock")) as is_alone:
            if not folder.is_dir():
                _create(folder, make, is_alone)
    check_owner(folder)


def _create(folder: Path, make: Callable[[Path], None], is_alone: bool) -> None:
    prefix = f".{folder.name}.tmp-{socket.gethostname()}-"
    if is_alone:
        # only of this host: on some cluster file systems a lock is local to a host, and another host may be working
        for left_over in folder.parent.glob(f"{prefix}*"):
            shutil.rmtree(left_over, ignore_errors=True)
    temporary = folder.with_name(prefix + secrets.token_hex(8))  # a name that nobody could have used before
    temporary.mkdir()
    try:
        make(temporary)
        _rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_owner(folder: Path) -> None:
    """Raise `UserError` if someone could have planted `folder`: it belongs neither to this user, to root, nor to whoever owns the
    folder that it is in."""
    owner = folder.lstat().st_uid
    if owner not in (os.geteuid(), 0, folder.parent.stat().st_uid):
        raise UserError(
            f"{folder} belongs to another user (uid {owner}), who could have changed its images: set data.cache to a folder of "
            f"your own"
        )


def _rename(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        # on a file system without locks, another process may have created the folder first, with the same content
        if not folder.is_dir():
            raise


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[bool]:
    """Hold a lock on `path` in the body. Yields False if the file system does not support locks."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW  # never through a link that someone planted
    with open(os.open(path, flags, 0o666), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info(f"waiting for another process to prepare the data in {path.parent}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True

"""Read text files with limits: whoever wrote the file, a wrong one costs an error message, not the machine's memory."""

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

MAX_TEXT_BYTES = 16 * 2**20
MAX_LINE_BYTES = 2**20


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file. Raises `OSError`, or `ValueError` if it is too large or not UTF-8."""
    with _open(path) as file:
        content = file.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"it is larger than {MAX_TEXT_BYTES // 2**20} MiB")
    return _decode(content)


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their line ends. Raises `OSError`, or `ValueError` as `read_text` does."""
    with _open(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"it has a line of more than {MAX_LINE_BYTES // 2**20} MiB")
            yield _decode(line)


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises `ValueError`, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error


def _open(path: Path) -> IO[bytes]:
    """Open a regular file. A pipe would wait for a writer, and a device has no end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115 - returned
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return file

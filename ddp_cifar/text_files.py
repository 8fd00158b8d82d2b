"""Read text files with limits: whoever wrote the file, a wrong one costs an error message, not the machine's memory."""

import errno
import json
import os
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
    return content.decode("utf-8")


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their line ends. Raises `OSError`, or `ValueError` as `read_text` does."""
    with _open(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"it has a line of more than {MAX_LINE_BYTES // 2**20} MiB")
            yield line.decode("utf-8")


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises `ValueError`, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _open(path: Path) -> IO[bytes]:
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would block, and a device has no end
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return open(path, "rb")

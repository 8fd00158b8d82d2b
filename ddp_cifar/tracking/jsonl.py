"""metrics.jsonl: one JSON object per row of scalars."""

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ddp_cifar.errors import UserError
from ddp_cifar.run.run_dir import is_row
from ddp_cifar.text_files import parse_json, read_lines
from ddp_cifar.tracking.base import NullTracker, Scalars


class JsonLinesTracker(NullTracker):
    """Writes a JSON object per row: `step`, then the scalars. Numbers that JSON does not support (nan, inf) become null.

    Rows that cannot be written, for example on a full disk, are kept in memory and written as soon as possible.
    """

    def __init__(self, path: Path) -> None:
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self.unwritten = b""
        self.lock = threading.Lock()

    def log(self, scalars: Scalars, step: int) -> None:
        row = {tag: None if _is_not_json(value) else value for tag, value in scalars.items()}
        self._write((json.dumps({"step": step} | row) + "\n").encode())

    def sync(self) -> None:
        self._write()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        try:
            self._write()
        finally:
            self.file.close()

    def _write(self, more: bytes = b"") -> None:
        with self.lock:
            self.unwritten += more
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]


def last_value(metrics: Path, tag: str) -> float:
    """Return the value of `tag` in the last row that has it, or 0. The file must be cleaned by `drop_later_rows`."""
    for line in reversed(list(read_lines(metrics))):
        if isinstance(value := parse_json(line).get(tag), float | int):
            return float(value)
    return 0.0


def drop_later_rows(path: Path, step: int, epoch: int) -> tuple[list[dict[str, Any]], bool]:
    """Drop the rows after `step` or `epoch`, and an incomplete row left by a crash.

    Returns the kept rows, and True if a row of `step` itself was, or may have been, dropped. Raises `UserError` if the file is
    not text.
    """
    lines: list[str] = []
    kept: list[dict[str, Any]] = []
    drops_at_step = False
    if not path.exists():
        return kept, drops_at_step
    for line in _lines(path):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not is_row(row):
            drops_at_step = True
        elif line.endswith("\n") and is_before(row, step, epoch):
            lines.append(line)
            kept.append(row)
        else:
            drops_at_step |= row["step"] <= step
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return kept, drops_at_step


def is_before(row: Mapping[str, Any], step: int, epoch: int) -> bool:
    """True if the row was logged up to `step` and `epoch` completed epochs."""
    return bool(row["step"] <= step and row.get("train/epoch", 0) <= epoch)


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from read_lines(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; remove it, or choose another run_dir") from error


def _is_not_json(value: float | str) -> bool:
    return not isinstance(value, str) and not math.isfinite(value)

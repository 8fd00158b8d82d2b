"""What a run has logged, by step: the rows of metrics.jsonl, and the pictures beside it."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddp_cifar.run.run_dir import RunDir, is_row
from ddp_cifar.text_files import parse_json
from ddp_cifar.tracking.base import TIME, Picture

ACCURACIES = ("val/accuracy", "test/accuracy")
"""The accuracy that chooses the best step: the first of these that a run has."""

ROWS = 1000
"""Rows for which the folder of pictures is listed once."""


@dataclass
class Record:
    """What a run has logged at one step."""

    step: int
    time: float = 0.0
    """Unix time, in seconds."""
    scalars: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)
    """PNG files by tag."""


class Records:
    """Reads what a run has logged, from the first step on. More can be read later, while the run continues."""

    def __init__(self, run_dir: RunDir) -> None:
        self.metrics = run_dir.metrics
        self.pictures = run_dir.pictures
        self.best: dict[str, Record] = {}
        """The record with the best accuracy so far, for each of `ACCURACIES`."""
        self._offset = 0
        self._last: Record | None = None
        self._shown = -1
        """The last step whose pictures have been read."""

    def read(self, *, with_last: bool) -> Iterator[Record]:
        """Yield the new records in the order of steps.

        Rows and pictures of the last step may follow as long as there is no row of a later step. It is held back for the next
        call, unless `with_last`. Raises `OSError`.
        """
        rows = self._new_rows()
        while some := list(itertools.islice(rows, ROWS)):
            pictures = self._new_pictures()  # after these rows: what was shown before them is there
            for row in some:
                if self._last is None or row["step"] > self._last.step:
                    yield from self._up_to(row["step"], pictures)
                    self._last = Record(row["step"])
                self._add(self._last, row)
        if with_last and self._last:
            yield from self._up_to(self._last.step + 1, self._new_pictures())
            self._last = None

    def _add(self, record: Record, row: dict[str, Any]) -> None:
        numbers = {tag: float(value) for tag, value in row.items() if isinstance(value, int | float) and tag != "step"}
        record.time = numbers.pop(TIME, record.time)
        record.scalars |= numbers
        for tag in ACCURACIES:
            if tag in numbers and (tag not in self.best or numbers[tag] > self.best[tag].scalars[tag]):
                self.best[tag] = Record(record.step, record.time, {tag: numbers[tag]})

    def _up_to(self, before: int, pictures: list[tuple[int, Path]]) -> Iterator[Record]:
        """Yield the last record, and records for pictures alone, of steps below `before`, in the order of steps."""
        records = {self._last.step: self._last} if self._last else {}
        for step, path in pictures:
            if self._shown < step < before:
                record = records.setdefault(step, Record(step, path.stat().st_mtime))
                record.pictures[path.stem.partition("-")[2].replace("--", "/")] = path
        for step in sorted(records):
            self._shown = step
            yield records[step]

    def _new_pictures(self) -> list[tuple[int, Path]]:
        """The steps and files of the pictures that have not been read."""
        files = [(path.stem.partition("-")[0], path) for path in sorted(self.pictures.glob("*.png"))]
        return [(int(step), path) for step, path in files if step.isdigit() and int(step) > self._shown]

    def _new_rows(self) -> Iterator[dict[str, Any]]:
        if not self.metrics.exists():
            return
        with open(self.metrics, "rb") as file:
            file.seek(self._offset)
            while (line := file.readline()).endswith(b"\n"):
                self._offset = file.tell()
                with contextlib.suppress(ValueError):
                    row = parse_json(line.decode())
                    if is_row(row):
                        yield row


def write_picture(folder: Path, tag: str, pixels: Picture, step: int) -> None:
    """Write the picture of `step` to a file in `folder`, where `Records` finds it. Raises `OSError`."""
    from PIL import Image

    path = folder / f"{step:08d}-{tag.replace('/', '--')}.png"
    folder.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    Image.fromarray(pixels).save(temporary, format="png")
    os.replace(temporary, path)

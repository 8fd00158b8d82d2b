"""Predictions as rows, one per image: filled from logits, and written to a file as CSV or JSON lines."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddp_cifar.command import writing_part
from ddp_cifar.data.dataset import Split
from ddp_cifar.errors import UserError
from ddp_cifar.log import log, show

BATCH = 10_000  # rows that are written at once, which limits memory

Row = dict[str, Any]
"""`file` (or `index`), then the prediction, or `error`: an object of JSON lines. Its values in order are the cells of CSV."""


def add_predictions(rows: Sequence[Row], logits: Tensor, classes: Sequence[str], top_k: int | None = None) -> None:
    """Add predictions from (B, classes) logits to their rows: the class, and the probabilities of all or of `top_k` classes."""
    probabilities = logits.cpu().double().softmax(1)
    # stable: of equally likely classes, the first one is the class, as for argmax
    order = probabilities.argsort(dim=1, descending=True, stable=True)
    for row, shares, best in zip(rows, probabilities.tolist(), order[:, : top_k or 1].tolist(), strict=True):
        row["class"] = classes[best[0]]
        if top_k is None:
            row["probabilities"] = dict(zip(classes, shares, strict=True))
        else:
            row["top"] = [{"class": classes[i], "probability": shares[i]} for i in best]


def prediction_columns(classes: Sequence[str], top_k: int | None) -> list[str]:
    """Return the names of the cells that `add_predictions` adds to a row."""
    if top_k is None:
        return ["class", *classes]
    return ["class", *(name for k in range(1, top_k + 1) for name in (f"top{k}", f"top{k}_probability"))]


def write_evaluated(path: Path, form: str, split: Split, logits: Tensor, classes: Sequence[str]) -> None:
    """Write a row per image of a split with (N, classes) logits: file or index, label, predicted class and its probability.

    Raises `UserError` if `path` cannot be written.
    """
    files = split.file_names()
    image = "index" if files is None else "file"
    output = Output(path, form, [image, "label", "class", "probability"])
    for indices in torch.arange(len(split)).split(BATCH):
        probability, predicted = logits[indices].double().softmax(1).max(1)
        columns = (indices, split.labels[indices], predicted, probability)
        output.write(
            [
                {image: files[i] if files else i, "label": classes[label], "class": classes[j], "probability": share}
                for i, label, j, share in zip(*(column.tolist() for column in columns), strict=True)
            ]
        )
    output.close()


class Output:
    """Writes rows batch by batch, on rank 0: CSV with the given columns (an error is in the last one), or JSON lines.

    Methods raise `UserError` if `path` cannot be written.
    """

    def __init__(self, path: Path | None, form: str, columns: Sequence[str]) -> None:
        self.path = path
        self.form = form
        self.columns = columns
        self.num_rows = self.num_errors = 0

    def write(self, rows: Sequence[Row]) -> None:
        """Append `rows`. The first call replaces the file."""
        text = io.StringIO()
        if self.form == "csv":
            writer = csv.writer(text, lineterminator="\n")
            if not self.num_rows:
                writer.writerow(self.columns)
            writer.writerows(self._line(row) for row in rows)
        else:
            text.writelines(json.dumps(row) + "\n" for row in rows)
        if self.path is None:
            show(text.getvalue().rstrip("\n"))
        else:
            mode = "a" if self.num_rows else "w"
            with (
                writing_part(self.path),
                open(self.path, mode, newline="", encoding="utf-8", errors="surrogateescape") as file,
            ):
                file.write(text.getvalue())
        self.num_rows += len(rows)
        for row in rows:
            if "error" in row:
                self.num_errors += 1
                log.warning(f"{row['file']} is skipped: {row['error']}")

    def close(self) -> None:
        """Log the file. Raises `UserError` if no file could be decoded."""
        if self.num_errors == self.num_rows:
            raise UserError(f"none of the {self.num_rows} files can be decoded as an image: expected at least one")
        if self.path is not None:
            log.info(f"wrote {self.path}")

    def _line(self, row: Row) -> list[str]:
        if "error" in row:
            return [row["file"], *[""] * (len(self.columns) - 2), row["error"]]
        cells = list(_cells(row))
        return cells + [""] * (len(self.columns) - len(cells))


def _cells(value: Any) -> Iterator[str]:
    """Yield the numbers and strings in nested dicts and lists, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _cells(item)
    else:
        yield f"{value:.6f}" if isinstance(value, float) else str(value)

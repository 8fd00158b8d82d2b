"""Find and read image files, and fill one row per file with the predictions of a trained network."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddp_cifar.config import ImageShape
from ddp_cifar.data.decode import ReadError, decode_all
from ddp_cifar.data.files import SUFFIXES, find_image_files, warn_of_skipped
from ddp_cifar.errors import UserError

Row = dict[str, Any]
"""`file`, then `class` and `probabilities`, or `error`."""


def find_images(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the given files, and all images in the given folders. Raises `UserError` if a path does not exist."""
    for path in paths:
        if path.is_dir():
            found, others = find_image_files(path)
            if not found:
                raise UserError(f"{path} has no images: expected files of the types {', '.join(sorted(SUFFIXES))}")
            warn_of_skipped(others, str(path))
            yield from found
        elif path.is_file():
            yield path
        else:
            raise UserError(f"{path} does not exist: expected an image or a folder of images")


def read_batch(files: Sequence[Path], image_shape: ImageShape) -> tuple[list[Row], Tensor]:
    """Return a row per file, with `error` if it cannot be decoded, and the pixels of the others, (B, C, H, W) uint8."""
    channels, height, width = image_shape
    rows: list[Row] = [{"file": str(path)} for path in files]
    pixels = bytearray()
    readable = []
    for row, path in zip(rows, files, strict=True):
        try:
            with open(path, "rb") as file:
                file.read(1)
            readable.append((row, path))
        except OSError as error:
            row["error"] = f"it cannot be read ({error.strerror})"
    decoded = decode_all([path for _, path in readable], image_shape, num_workers=torch.get_num_threads())
    try:
        for (row, _), found in zip(readable, decoded, strict=True):
            if isinstance(found, str):
                row["error"] = found
            else:
                pixels += found
    except ReadError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from error
    flat = torch.frombuffer(pixels, dtype=torch.uint8) if pixels else torch.empty(0, dtype=torch.uint8)
    return rows, flat.view(-1, height, width, channels).permute(0, 3, 1, 2)


def name_classes(rows: Sequence[Row], logits: Tensor, classes: Sequence[str]) -> None:
    """Add the class and the probabilities from (B, classes) logits to their rows."""
    for row, shares in zip(rows, logits.double().softmax(1).tolist(), strict=True):
        most_likely = max(range(len(classes)), key=shares.__getitem__)
        row["class"] = classes[most_likely]
        row["probabilities"] = dict(zip(classes, shares, strict=True))

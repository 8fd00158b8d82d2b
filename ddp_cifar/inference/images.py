"""Find and read image files: one row per file, and the pixels of those that can be decoded."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddp_cifar.config import ImageShape
from ddp_cifar.data.decode import Decoded
from ddp_cifar.data.files import SUFFIXES, find_image_files, warn_of_skipped
from ddp_cifar.errors import UserError
from ddp_cifar.inference.rows import Row


def find_images(paths: Sequence[Path]) -> list[str]:
    """Return the given files, and all images in the given folders. Raises `UserError` if a path does not exist."""
    files: list[str] = []
    for path in paths:
        if path.is_dir():
            found, others = find_image_files(path)
            if not found:
                raise UserError(f"{path} has no images: expected files of the types {', '.join(sorted(SUFFIXES))}")
            warn_of_skipped(others, str(path))
            files += found
        elif path.is_file():
            files.append(str(path))
        else:
            raise UserError(f"{path} does not exist: expected an image or a folder of images")
    return files


def read_batch(files: Sequence[str], decoded: Iterator[Decoded], image_shape: ImageShape) -> tuple[list[Row], Tensor]:
    """Return a row per file, with `error` if it cannot be decoded, and the pixels of the others, (B, C, H, W) uint8.

    The next images of `decoded` belong to `files`.
    """
    channels, height, width = image_shape
    rows: list[Row] = [{"file": file} for file in files]
    pixels = bytearray()
    for row, found in zip(rows, decoded, strict=False):  # `decoded` may have more
        if isinstance(found, bytes):
            pixels += found
        else:
            row["error"] = found if isinstance(found, str) else f"it cannot be read ({found.strerror})"
    flat = torch.frombuffer(pixels, dtype=torch.uint8) if pixels else torch.empty(0, dtype=torch.uint8)
    return rows, flat.view(-1, height, width, channels).permute(0, 3, 1, 2)

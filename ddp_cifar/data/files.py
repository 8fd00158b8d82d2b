"""The image files of a folder, the same ones for training and for predict."""

import os
from collections.abc import Iterator, Sequence

from PIL import Image

from ddp_cifar.command import counted
from ddp_cifar.log import log

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif"}
"""Files with these suffixes are images. Other files are opened to find out."""

FORMATS = {"JPEG", "MPO", "PNG", "BMP", "PPM", "WEBP", "TIFF", "GIF"}
"""The formats that are read, by Pillow's names."""


def find_image_files(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """Return the images under `folder`, at any depth, and the files that are not images.

    Links are followed. Hidden files and folders are ignored. Sorted by folder, then by name, as torchvision's ImageFolder.
    """
    images: list[str] = []  # strings: a Path takes several times the memory, and the time to make
    others: list[str] = []
    for parent, names in sorted(_folders(os.fspath(folder), ())):
        prefix = os.path.join(parent, "").removeprefix("./")
        for name in sorted(names):
            is_image = name[name.rfind(".") :].lower() in SUFFIXES or _has_image_content(prefix + name)
            (images if is_image else others).append(prefix + name)
    return images, others


def warn_of_skipped(others: Sequence[str], place: str) -> None:
    """Log that `others`, found in `place`, are skipped, if there are any."""
    if others:
        log.warning(f"skipping {counted(len(others), 'file')} of {place} that are not images, such as {others[0]}")


def _folders(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder with the names of its files. A link to one of the folders `above` is not followed."""
    stat = os.stat(folder)
    above += ((stat.st_dev, stat.st_ino),)
    names: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                names.append(entry.name)
                continue
            below = entry.stat()
            if (below.st_dev, below.st_ino) not in above:
                yield from _folders(entry.path, above)
    yield folder, names


def _has_image_content(path: str) -> bool:
    if not os.path.isfile(path):  # a pipe would block
        return False
    try:
        with Image.open(path) as image:
            return image.format in FORMATS
    except Exception:  # Pillow raises many exception types for other files
        return False

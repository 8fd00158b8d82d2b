"""One's own images: `ROOT/train/CLASS/*` and `ROOT/test/CLASS/*`, 32 x 32 pixels, in colour."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddp_cifar.config import DataConfig
from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.distributed import World
from ddp_cifar.errors import UserError

SIZE = 32  # pixels; what the network takes
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff", ".gif"}


def read_imagefolder(config: DataConfig, world: World) -> DataSet:
    """Decode every image under `config.root` into memory, on all cores of this rank; classes are the folders' names.

    Raises `UserError` for a missing folder, classes that differ between train and test, and a file that is not a
    32 x 32 colour image.
    """
    root = Path(config.root)
    folders = {name: _class_folders(root / name) for name in ("train", "test")}
    classes = tuple(folder.name for folder in folders["train"])
    for folder in folders["test"]:
        if folder.name not in classes:
            raise UserError(f"{folder} is a class without training images: expected one of {', '.join(classes)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(max(1, cores // world.local_world_size)) as pool:
        splits = {name: _read_split(folders[name], classes, pool) for name in folders}
    return DataSet(splits["train"], splits["test"], classes)


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(
            f"data.root needs the folder {folder}, which does not exist: expected train/CLASS/* and test/CLASS/* under it"
        )
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"{folder} has no class folders: expected images in {folder}/CLASS/*")
    return folders


def _read_split(folders: Sequence[Path], classes: Sequence[str], pool: ThreadPoolExecutor) -> Split:
    paths, labels = [], []
    for folder in folders:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not found:
            raise UserError(f"{folder} holds no images: expected files ending in {', '.join(sorted(SUFFIXES))}")
        paths += found
        labels += [classes.index(folder.name)] * len(found)
    images = torch.empty(len(paths), 3, SIZE, SIZE, dtype=torch.uint8)

    def decode_into(index: int) -> str | None:
        decoded = _decode(paths[index])
        if isinstance(decoded, str):
            return decoded
        images[index] = decoded
        return None

    mistakes = [mistake for mistake in pool.map(decode_into, range(len(paths))) if mistake]
    if mistakes:
        more = f" (and {len(mistakes) - 1} more such files)" if len(mistakes) > 1 else ""
        raise UserError(f"{mistakes[0]}{more}: expected {SIZE} x {SIZE} colour images; mend or remove them")
    return Split.of(images, torch.tensor(labels))


def _decode(path: Path) -> Tensor | str:
    """(3, 32, 32) uint8, or what is wrong with the file."""
    try:
        with Image.open(path) as image:
            if image.size != (SIZE, SIZE) or image.mode != "RGB":
                width, height = image.size
                return f"{path} is a {width} x {height} image of mode {image.mode}"
            pixels = np.array(image)
    except Exception as error:  # a decoder may raise anything for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{path} cannot be decoded ({reason})"
    return torch.from_numpy(pixels).permute(2, 0, 1)

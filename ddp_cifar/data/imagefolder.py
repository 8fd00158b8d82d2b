"""One's own images: `ROOT/train/CLASS/*` and `ROOT/test/CLASS/*`, of any size, in any number of classes.

They are decoded once, into a folder of two raw arrays and an index, which the ranks of a node share by memory map. The
folder's name has a hash of what it was made from (each file's name, size and time, and the settings), so that any change
makes another one.
"""

import hashlib
import os
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddp_cifar.config import DataConfig
from ddp_cifar.data.cache import make_once
from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.data.decode import SUFFIXES, ReadError, decode_all
from ddp_cifar.distributed import World
from ddp_cifar.errors import UserError
from ddp_cifar.log import log

FORMAT = 1  # of the cache; another number makes other folders
SHOWN = 20  # files that are named at most


@dataclass(frozen=True, slots=True)
class ImageFile:
    name: str
    """Path under data.root."""
    label: int
    size: int
    """Bytes."""
    time_ns: int
    """Of the last change."""


@dataclass(frozen=True)
class Tree:
    """The files under data.root."""

    classes: tuple[str, ...]
    splits: dict[str, list[ImageFile]]


def read_imagefolder(config: DataConfig, world: World) -> DataSet:
    """The images under `config.root`, decoded by one process a node if they are not yet; classes are the folders' names.

    Raises `UserError` for a missing folder, classes that differ between train and test, a file that cannot be decoded
    (unless config.on_corrupt is skip) or read, and a cache that cannot be written, cannot be read or is damaged.
    """
    folder = world.on_each_node(lambda: _decoded_folder(config))
    try:
        index = np.load(folder / "index.npz", allow_pickle=False)
        skipped = [str(line) for line in index["skipped"]]
        classes = tuple(str(name) for name in index["classes"])
        splits = {name: _open_split(folder, name, index[name], config.image_size) for name in index["splits"]}
    except (PermissionError, FileNotFoundError) as error:
        raise UserError(
            f"cannot read the decoded images in {folder} ({error.strerror}: {error.filename}): have them made readable, "
            f"or set data.cache to a folder of your own"
        ) from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"the decoded images in {folder} are damaged ({error}): remove that folder") from error
    if skipped and world.is_main:
        log.warning(f"{len(skipped)} files are left out (data.on_corrupt=skip): {'; '.join(skipped[:3])}")
    return DataSet(splits["train"], splits.get("test"), classes)


def files_of_imagefolder(config: DataConfig) -> list[Path]:
    """The images under `config.root`. Raises `UserError` as `outline_imagefolder` does."""
    tree, _ = _look(config)
    return [Path(config.root, file.name) for files in tree.splits.values() for file in files]


def outline_imagefolder(config: DataConfig) -> DataSet:
    """The shape of the images under `config.root`, by their names; said if they are not decoded yet.

    Raises `UserError` for a missing folder and for classes that differ between train and test.
    """
    tree, folder = _look(config)
    sizes = {name: len(files) for name, files in tree.splits.items()}
    if not folder.exists():
        log.info(
            f"{sum(sizes.values())} files are decoded at the start; python -m ddp_cifar.prepare does it beforehand"
        )
    splits = {name: Split.outline(size, config.image_size) for name, size in sizes.items()}
    return DataSet(splits["train"], splits.get("test"), tree.classes)


def _look(config: DataConfig) -> tuple[Tree, Path]:
    """The files, and the cache's folder for them, which may not be there yet."""
    root = Path(config.root)
    tree = _scan(root, needs_test=config.val_images == 0)
    cache = root / ".cache" if config.cache == "auto" else Path(config.cache)
    return tree, cache / f"imagefolder-{config.image_size}px-{_fingerprint(tree, config)}"


def _decoded_folder(config: DataConfig) -> Path:
    """The cache's folder, made if need be."""
    tree, folder = _look(config)
    try:
        make_once(folder, lambda temporary: _decode_tree(tree, config, temporary))
    except ReadError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}): see to it that it can, or remove it"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot write the decoded images to {folder.parent} ({error.strerror}): set data.cache to another folder, with "
            f"room for them"
        ) from error
    return folder


def _open_split(folder: Path, name: str, labels: "np.typing.NDArray[np.int64]", image_size: int) -> Split:
    path = folder / f"{name}.images"
    num_bytes = len(labels) * image_size * image_size * 3
    with open(path, "rb") as file:
        found = os.fstat(file.fileno()).st_size
    if found != num_bytes:
        raise ValueError(f"{path.name} has {found} bytes, expected {num_bytes}")
    # mapped, private: nobody writes, so all ranks of a node see the same pages of memory
    pixels: Tensor = torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)
    images = pixels.view(len(labels), image_size, image_size, 3).permute(0, 3, 1, 2)
    return Split.of(images, torch.from_numpy(labels))


# -- the files


def _scan(root: Path, needs_test: bool) -> Tree:
    splits = {"train": _class_folders(root / "train", "")}
    if needs_test or (root / "test").is_dir():
        way_out = ", or hold some training images out to evaluate on instead, with data.val_images"
        splits["test"] = _class_folders(root / "test", way_out)
    classes = tuple(folder.name for folder in splits["train"])
    if len(classes) < 2:
        raise UserError(
            f"{root / 'train'} has one class folder, {classes[0]}: expected train/CLASS/*, two classes or more"
        )
    for folder in splits.get("test", []):
        if folder.name not in classes:
            raise UserError(f"{folder} is a class without training images: expected one of {', '.join(classes)}")
    return Tree(classes, {name: _files(name, folders, classes) for name, folders in splits.items()})


def _class_folders(folder: Path, way_out: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(
            f"data.root needs the folder {folder}, which does not exist: expected train/CLASS/* and test/CLASS/* under "
            f"it{way_out}"
        )
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist: mend or remove it")
    folders = [path for path in paths if path.is_dir()]
    if not folders:
        raise UserError(f"{folder} has no class folders: expected images in {folder}/CLASS/*")
    return folders


def _files(split: str, folders: Sequence[Path], classes: Sequence[str]) -> list[ImageFile]:
    """The images of each class folder, by name."""
    files: list[ImageFile] = []
    others: list[str] = []
    for folder in folders:
        label, before = classes.index(folder.name), len(files)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.name[0] != ".":
                try:
                    stat = entry.stat()
                    size, time_ns = stat.st_size, stat.st_mtime_ns
                except FileNotFoundError:  # a link to nowhere: found to be no image when it is decoded
                    size = time_ns = 0
                files.append(ImageFile(f"{split}/{folder.name}/{entry.name}", label, size, time_ns))
            elif entry.name[0] != ".":
                others.append(entry.path)
        if len(files) == before:
            endings = ", ".join(sorted(SUFFIXES))
            raise UserError(f"{folder} holds no images: expected files ending in {endings}, in this folder itself")
    if others:
        log.warning(f"left out of {split}: {len(others)} whose names are not an image's, such as {others[0]}")
    return files


def _fingerprint(tree: Tree, config: DataConfig) -> str:
    """A hash of what the decoded images depend on: each file's name, size and time, and the settings."""
    # a cache inside the tree moves with it; one that serves several trees tells them apart by their place too
    place = "" if config.cache == "auto" else str(Path(config.root).resolve())
    settings = f"{FORMAT} {config.image_size} {config.on_corrupt} {tree.classes} {place}"
    sha = hashlib.sha256(settings.encode(errors="surrogateescape"))
    for files in tree.splits.values():
        for file in files:
            sha.update(f"{file.name}\0{file.size} {file.time_ns}\n".encode(errors="surrogateescape"))
    return sha.hexdigest()[:16]


# -- decoding


def _decode_tree(tree: Tree, config: DataConfig, folder: Path) -> None:
    """Write `train.images`, `test.images` ((N, S, S, 3) bytes each) and `index.npz` into `folder`."""
    started = time.perf_counter()
    num_files = sum(len(files) for files in tree.splits.values())
    log.info(f"decoding {num_files} files under {config.root}, once, into {folder.parent}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    problems: list[str] = []
    index: dict[str, object] = {"classes": list(tree.classes), "splits": list(tree.splits)}
    with tqdm(total=num_files, desc="decoding", unit="file", leave=False, disable=None) as bar:
        for name, files in tree.splits.items():
            labels = []
            paths = [Path(config.root, file.name) for file in files]
            with open(folder / f"{name}.images", "wb") as output:
                for file, decoded in zip(files, decode_all(paths, config.image_size, cores), strict=True):
                    bar.update()
                    if isinstance(decoded, bytes):
                        output.write(decoded)
                        labels.append(file.label)
                    else:
                        problems.append(f"{Path(config.root, file.name)} cannot be decoded ({decoded})")
            index[name] = np.array(labels, dtype=np.int64)
            if config.on_corrupt == "skip":
                _check_what_is_left(name, labels, tree.classes)
    if problems and config.on_corrupt == "refuse":
        more = f" (and {len(problems) - 1} more such files, the first of them above)" if len(problems) > 1 else ""
        for problem in problems[1:SHOWN]:
            log.warning(problem)
        raise UserError(f"{problems[0]}{more}: mend or remove them, or leave them out with data.on_corrupt=skip")
    np.savez(folder / "index.npz", skipped=np.array(problems, dtype=np.str_), **index)  # type: ignore[arg-type]
    log.info(f"decoded in {time.perf_counter() - started:.1f} s")


def _check_what_is_left(split: str, labels: Sequence[int], classes: Sequence[str]) -> None:
    if not labels:
        raise UserError(f"none of the files of {split} can be decoded: mend them")
    if split == "train":
        for label in set(range(len(classes))) - set(labels):
            raise UserError(
                f"none of the files of train/{classes[label]} can be decoded: mend them, or remove the folder"
            )

"""A folder of user images: `ROOT/train/CLASS/*` and `ROOT/test/CLASS/*`, of any size, in any number of classes.

They are decoded once, into a cache folder: per split, an array of pixels and one of file names, which the ranks of a node share
by memory map, and an index. The folder's name contains a hash of its inputs (name, size and time of each file, and the
settings), so that any change creates another folder.
"""

import dataclasses
import hashlib
import os
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddp_cifar.command import counted
from ddp_cifar.config import DataConfig, ImageShape
from ddp_cifar.data.cache import make_once
from ddp_cifar.data.dataset import DataSet, Moments, Split
from ddp_cifar.data.decode import decode_all
from ddp_cifar.data.files import SUFFIXES, find_image_files, warn_of_skipped
from ddp_cifar.data.source import Source
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError
from ddp_cifar.log import log

FORMAT = 2  # version of the cache; a new version creates new folders
SHOWN = 20  # maximum number of files that a log lists


@dataclass(frozen=True, slots=True)
class ImageFile:
    name: str
    """Path relative to data.root."""
    label: int
    size: int
    """Bytes."""
    time_ns: int
    """Time of the last modification."""


@dataclass(frozen=True)
class Tree:
    """The files under data.root."""

    classes: tuple[str, ...]
    splits: dict[str, list[ImageFile]]


class ImageFolder(Source):
    """The images under data.root. The names of the folders are the classes.

    If `test_of` is set, and ROOT/train does not exist or has other classes, only ROOT/test is read.

    All methods raise `UserError` for a missing folder, and for a class in test that is not in train, or not in `test_of`.
    """

    def read(self, world: World) -> DataSet:
        """Return the decoded images. If the cache does not exist, one process per node decodes them first.

        Also raises `UserError` for a file that cannot be read, or cannot be decoded (unless data.on_corrupt is skip), and
        for a cache that cannot be written, cannot be read or is damaged.
        """
        folder = world.on_each_node(self._decoded_folder)
        try:
            index = np.load(folder / "index.npz", allow_pickle=False)
            skipped = [str(line) for line in index["skipped"]]
            classes = tuple(str(name) for name in index["classes"])
            splits = {name: _open_split(folder, name, index[name], self.config.image_shape) for name in index["splits"]}
            dataset = _dataset(splits, classes)
            num_pixels = dataset.train.images.numel() // dataset.train.image_shape[0]
            moments = Moments(num_pixels, tuple(index["sums"].tolist()), tuple(index["squares"].tolist()))
            checksum = int(index["checksum"])
        except (PermissionError, FileNotFoundError) as error:
            raise UserError(
                f"cannot read the decoded images in {folder} ({error.strerror}: {error.filename}): make them readable, or "
                f"set data.cache to another folder"
            ) from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"the decoded images in {folder} are damaged ({error}): remove that folder") from error
        if skipped and world.is_main:
            log.warning(f"skipping {len(skipped)} files (data.on_corrupt=skip): {'; '.join(skipped[:3])}")
        return dataclasses.replace(dataset, checksum=checksum, moments=moments)

    def metadata(self, world: World) -> DataSet:
        """Return the shapes, from the names of the files. Logs the number of files if they are not decoded yet."""
        tree, folder = self._look()
        sizes = {name: len(files) for name, files in tree.splits.items()}
        if not folder.exists():
            log.info(
                f"the run will first decode {sum(sizes.values())} files; to decode them now, run python -m ddp_cifar.prepare"
            )
        splits = {name: Split.metadata_only(size, self.config.image_shape) for name, size in sizes.items()}
        return _dataset(splits, tree.classes)

    def files(self) -> list[Path]:
        tree, _ = self._look()
        return [Path(self.config.root, file.name) for files in tree.splits.values() for file in files]

    def _look(self) -> tuple[Tree, Path]:
        """Return the files and their cache folder, which may not exist yet."""
        config, (channels, height, width) = self.config, self.config.image_shape
        root = Path(config.root)
        tree = _scan_test(root, self.test_of) or _scan(root, needs_test=config.val_images == 0)
        cache = root / ".cache" if config.cache == "auto" else Path(config.cache)
        return tree, cache / f"imagefolder-{height}x{width}x{channels}-{_fingerprint(tree, config)}"

    def _decoded_folder(self) -> Path:
        """Return the cache folder, after creating it if it does not exist."""
        tree, folder = self._look()
        if not folder.is_dir():
            self.check_may_write(f"the images are not decoded in {folder.parent} yet")
        try:
            make_once(folder, lambda temporary: _decode_tree(tree, self.config, temporary))
        except OSError as error:
            raise UserError(
                f"cannot write the decoded images to {folder.parent} ({error.strerror}): set data.cache to another folder "
                f"with enough space"
            ) from error
        return folder


def _dataset(splits: Mapping[str, Split], classes: tuple[str, ...]) -> DataSet:
    """Return the data set of these splits. Without `train`, that is an empty part of `test`."""
    train = splits["train"] if "train" in splits else splits["test"].take(torch.arange(0))
    return DataSet(train, splits.get("test"), classes)


def _open_split(folder: Path, name: str, labels: "np.typing.NDArray[np.int64]", image_shape: ImageShape) -> Split:
    path = folder / f"{name}.images"
    channels, height, width = image_shape
    num_bytes = len(labels) * height * width * channels
    with open(path, "rb") as file:
        found = os.fstat(file.fileno()).st_size
    if found != num_bytes:
        raise ValueError(f"{path.name} has {found} bytes, expected {num_bytes}")
    # a private map that is never written: all ranks of a node share its pages
    pixels: Tensor = torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)
    images = pixels.view(len(labels), height, width, channels).permute(0, 3, 1, 2)
    files = np.load(folder / f"{name}.files.npy", mmap_mode="r", allow_pickle=False)
    if len(files) != len(labels):
        raise ValueError(f"{name}.files.npy has {len(files)} files, expected {len(labels)}")
    return dataclasses.replace(Split.of(images, torch.from_numpy(labels)), files=files)


# -- the files


def _scan_test(root: Path, classes: Sequence[str]) -> Tree | None:
    """Return ROOT/test for a network of these classes; None without classes, or if ROOT/train has the same."""
    train = root / "train"
    if not classes or (train.is_dir() and [folder.name for folder in _class_folders(train, "")] == [*classes]):
        return None
    folders = _class_folders(root / "test", "")
    _check_known(folders, classes, "is not a class that the network was trained on")
    return Tree(tuple(classes), {"test": _files("test", folders, classes)})


def _scan(root: Path, needs_test: bool) -> Tree:
    splits = {"train": _class_folders(root / "train", "")}
    if needs_test or (root / "test").is_dir():
        alternative = ", or set data.val_images to evaluate on held-out training images"
        splits["test"] = _class_folders(root / "test", alternative)
    classes = tuple(folder.name for folder in splits["train"])
    if len(classes) < 2:
        raise UserError(
            f"{root / 'train'} has only one class folder, {classes[0]}: expected train/CLASS/* with two or more classes"
        )
    _check_known(splits.get("test", []), classes, "is a class without training images")
    return Tree(classes, {name: _files(name, folders, classes) for name, folders in splits.items()})


def _check_known(folders: Sequence[Path], classes: Sequence[str], problem: str) -> None:
    for folder in folders:
        if folder.name not in classes:
            raise UserError(f"{folder} {problem}: expected only {', '.join(classes)}")


def _class_folders(folder: Path, alternative: str) -> list[Path]:
    if not folder.is_dir():
        start = "" if folder.is_absolute() else f" in the current folder, {Path.cwd()}"
        raise UserError(
            f"the folder {folder} does not exist{start}: expected train/CLASS/* and test/CLASS/* in data.root{alternative}"
        )
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist: fix or remove it")
    folders = [path for path in paths if path.is_dir()]
    if not folders:
        raise UserError(f"{folder} has no class folders: expected images in {folder}/CLASS/*")
    return folders


def _files(split: str, folders: Sequence[Path], classes: Sequence[str]) -> list[ImageFile]:
    """Return the images of all class folders, at any depth, sorted by folder and name."""
    files: list[ImageFile] = []
    parent = folders[0].parent
    others = [str(path) for path in sorted(parent.iterdir()) if path.is_file() and not path.name.startswith(".")]
    for folder in folders:
        label = classes.index(folder.name)
        images, not_images = find_image_files(folder)
        others += not_images
        if not images:
            raise UserError(f"{folder} contains no images: expected files of the types {', '.join(sorted(SUFFIXES))}")
        for path in images:
            try:
                stat = os.stat(path)
                size, time_ns = stat.st_size, stat.st_mtime_ns
            except FileNotFoundError:  # a broken link: decoding will report it
                size = time_ns = 0
            files.append(ImageFile(f"{split}/{path.removeprefix(f'{parent}/')}", label, size, time_ns))
    warn_of_skipped(others, split)
    return files


def _fingerprint(tree: Tree, config: DataConfig) -> str:
    """Return a hash of all inputs of the cache: name, size and time of each file, and the settings."""
    # a cache inside the tree moves with it; in a cache of several trees, the path is part of the key
    location = "" if config.cache == "auto" else str(Path(config.root).resolve())
    settings = f"{FORMAT} {config.image_size} {config.channels} {config.on_corrupt} {tree.classes} {location}"
    sha = hashlib.sha256(settings.encode(errors="surrogateescape"))
    for files in tree.splits.values():
        for file in files:
            sha.update(f"{file.name}\0{file.size} {file.time_ns}\n".encode(errors="surrogateescape"))
    return sha.hexdigest()[:16]


# -- decoding


def _decode_tree(tree: Tree, config: DataConfig, folder: Path) -> None:
    """Write into `folder`, per split, `SPLIT.images` ((N, H, W, C) bytes) and `SPLIT.files.npy` ((N,) names), and `index.npz`."""
    started = time.perf_counter()
    num_files = sum(len(files) for files in tree.splits.values())
    log.info(f"decoding {num_files} files in {config.root} to {folder.parent} (only once)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    problems: list[str] = []
    index: dict[str, Any] = {"classes": list(tree.classes), "splits": list(tree.splits)}
    with tqdm(total=num_files, desc="decoding", unit="file", leave=False, disable=None) as bar:
        for name, files in tree.splits.items():
            labels, names = [], []
            paths = [os.path.join(config.root, file.name) for file in files]
            with open(folder / f"{name}.images", "wb") as output:
                for file, path, decoded in zip(files, paths, decode_all(paths, config.image_shape, cores), strict=True):
                    bar.update()
                    if isinstance(decoded, OSError):
                        problem = f"{path} cannot be read ({decoded.strerror}): make it readable, or remove it"
                        raise UserError(problem) from decoded
                    if isinstance(decoded, bytes):
                        output.write(decoded)
                        labels.append(file.label)
                        names.append(os.fsencode(file.name))
                    else:
                        problems.append(f"{path} cannot be decoded ({decoded})")
            index[name] = np.array(labels, dtype=np.int64)
            np.save(folder / f"{name}.files.npy", np.array(names, dtype=np.bytes_))
            if config.on_corrupt == "skip":
                _check_decoded(name, labels, tree.classes)
    if problems and config.on_corrupt == "refuse":
        more = f" (and {counted(len(problems) - 1, 'more file')}, see the warnings above)" if len(problems) > 1 else ""
        for problem in problems[1:SHOWN]:
            log.warning(problem)
        raise UserError(f"{problems[0]}{more}: fix or remove them, or skip them with data.on_corrupt=skip")
    splits = {name: _open_split(folder, name, index[name], config.image_shape) for name in tree.splits}
    dataset = _dataset(splits, tree.classes)
    moments = dataset.pixel_moments
    index |= {"checksum": dataset.image_checksum, "sums": moments.sums, "squares": moments.squares}
    np.savez(folder / "index.npz", skipped=np.array(problems, dtype=np.str_), **index)
    log.info(f"decoded in {time.perf_counter() - started:.1f} s")


def _check_decoded(split: str, labels: Sequence[int], classes: Sequence[str]) -> None:
    if not labels:
        raise UserError(f"none of the files of {split} can be decoded: fix them")
    if split == "train":
        for label in set(range(len(classes))) - set(labels):
            raise UserError(
                f"none of the files of train/{classes[label]} can be decoded: fix them, or remove the folder"
            )

"""CIFAR-10 by torchvision's reader: downloaded once a node, its checksum verified."""

import contextlib
import http.client
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddp_cifar.config import DataConfig
from ddp_cifar.data.cache import only_one
from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.distributed import World
from ddp_cifar.errors import UserError
from ddp_cifar.log import log

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")

DOWNLOAD_TIMEOUT_S = 30.0  # of silence; without it a firewall that drops packets keeps the job waiting for minutes


def read_cifar10(config: DataConfig, world: World) -> DataSet:
    """CIFAR-10 from `config.root`, downloaded there if need be. Raises `UserError` if it can be had neither way."""
    from torchvision.datasets import CIFAR10  # here, as it takes seconds to import

    def read(train: bool, download: bool) -> Any:
        try:
            with _timeout(DOWNLOAD_TIMEOUT_S):
                return CIFAR10(config.root, train=train, download=download)
        except (OSError, RuntimeError, http.client.HTTPException, tarfile.TarError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"CIFAR-10 is not in data.root={config.root}, and cannot be downloaded ({reason}): copy the folder "
                f"cifar-10-batches-py there from a machine that has it, or train on the embedded images with data.name=shapes"
            ) from error

    def download() -> None:
        with contextlib.suppress(UserError):
            read(train=False, download=False)
            return  # it is there, perhaps in a folder that cannot be written
        root = Path(config.root)
        root.mkdir(parents=True, exist_ok=True)
        with only_one(root / ".cifar10.lock"):  # nodes that share the folder take turns
            read(train=False, download=True)

    world.on_each_node(download)
    train, test = (read(train=is_train, download=False) for is_train in (True, False))
    return DataSet(_split(train), _split(test), tuple(train.classes))


def files_of_cifar10(config: DataConfig) -> list[Path]:
    """The seven files that a download leaves in `config.root`."""
    return [Path(config.root) / "cifar-10-batches-py" / name for name in FILES]


def outline_cifar10(config: DataConfig) -> DataSet:
    """CIFAR-10's shape; a warning if it is not in `config.root`."""
    if not all(path.is_file() for path in files_of_cifar10(config)):
        log.warning(
            f"CIFAR-10 is not in data.root={config.root} yet: the run downloads it, where its nodes have a way out; "
            f"python -m ddp_cifar.prepare has it there beforehand"
        )
    return DataSet(Split.outline(50_000, 32), Split.outline(10_000, 32), CLASSES)


def _split(dataset: Any) -> Split:
    images: Tensor = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)
    return Split.of(images, torch.tensor(dataset.targets))


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

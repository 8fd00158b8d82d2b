"""CIFAR-10, read by torchvision: downloaded once per node, with its checksum verified."""

import contextlib
import http.client
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ddp_cifar.data.cache import only_one
from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.data.source import Source
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError, first_line
from ddp_cifar.log import log

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")

DOWNLOAD_TIMEOUT_S = 30.0  # without data; otherwise a firewall that drops packets would block the job for minutes


class Cifar10(Source):
    """CIFAR-10 from data.root, downloaded there if missing."""

    image_size = 32

    def read(self, world: World) -> DataSet:
        """Read the data set, and first download it once per node if missing. Raises `UserError` if that fails."""
        world.on_each_node(self._download)
        train, test = (self._open(train=is_train) for is_train in (True, False))
        return DataSet(self._split(train), self._split(test), tuple(train.classes))

    def metadata(self, world: World) -> DataSet:
        """Return the shapes of CIFAR-10; warn if it is not in data.root."""
        if not all(path.is_file() for path in self.files()):
            log.warning(
                f"CIFAR-10 is not in data.root={self.config.root} yet: the run will download it, which needs internet "
                f"access on the compute nodes; to download it now, run python -m ddp_cifar.prepare"
            )
        train, test = (Split.metadata_only(count, self.config.image_shape) for count in (50_000, 10_000))
        return DataSet(train, test, CLASSES)

    def files(self) -> list[Path]:
        """Return the seven files that a download creates in data.root."""
        return [Path(self.config.root) / "cifar-10-batches-py" / name for name in FILES]

    def _download(self) -> None:
        with contextlib.suppress(UserError):
            self._open(train=False)
            return  # it exists, perhaps in a read-only folder
        root = Path(self.config.root)
        self.check_may_write(f"CIFAR-10 is not in {root}")
        root.mkdir(parents=True, exist_ok=True)
        with only_one(root / ".cifar10.lock"):  # nodes that share the folder take turns downloading
            self._open(train=False, download=True)

    def _split(self, dataset: Any) -> Split:
        images = self.to_channels(torch.from_numpy(dataset.data).permute(0, 3, 1, 2))
        return Split.of(images, torch.tensor(dataset.targets))

    def _open(self, *, train: bool, download: bool = False) -> Any:
        from torchvision.datasets import CIFAR10  # imported here because it takes seconds

        try:
            with _timeout(DOWNLOAD_TIMEOUT_S):
                return CIFAR10(self.config.root, train=train, download=download)
        except (OSError, RuntimeError, http.client.HTTPException, tarfile.TarError, EOFError) as error:
            raise UserError(
                f"CIFAR-10 is not in data.root={self.config.root} and cannot be downloaded ({first_line(error)}): copy the "
                f"folder cifar-10-batches-py there from another machine, or train on generated images with data.name=shapes"
            ) from error


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

"""`Source`, the base class of the built-in data sets."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddp_cifar.config import DataConfig
from ddp_cifar.data.dataset import DataSet, to_grayscale
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError


class Source:
    """A data set described by the `data` section of the config. A subclass implements `read`, and may override the rest."""

    image_size: int | None = None
    """Height and width of all images, in pixels; None if data.image_size sets it."""

    read_only = False
    """Whether files in data.root and data.cache may only be read."""

    test_of: Sequence[str] = ()
    """The classes of the trained network that only needs test images. A data set may then read no others."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def read(self, world: World) -> DataSet:
        """Read, download or generate the data set; called on every rank. Raises `UserError`, or `OSError` for a file."""
        raise NotImplementedError

    def metadata(self, world: World) -> DataSet:
        """Return the data set on torch's meta device, if possible without reading the images."""
        return self.read(world).to(torch.device("meta"))

    def files(self) -> list[Path]:
        """Return the files that are read, which may not exist yet."""
        return []

    def check_may_write(self, missing: str) -> None:
        """Raise `UserError`, which says what is `missing`, if files may only be read."""
        if self.read_only:
            root = self.config.root
            raise UserError(
                f"{missing}, and only the checkpoint names data.root={root}: to write there, add data.root={root}"
            )

    def to_channels(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, C, H, W) with the channels of `data.channels`."""
        return to_grayscale(images) if self.config.channels == 1 else images

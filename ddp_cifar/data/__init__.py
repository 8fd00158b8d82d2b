"""Data sets, the order of their images, and batches. A new data set is a file here and a line in `DATASETS`."""

from collections.abc import Callable

from ddp_cifar.config import DataConfig
from ddp_cifar.data.cifar10 import read_cifar10
from ddp_cifar.data.dataset import DataSet
from ddp_cifar.data.imagefolder import read_imagefolder
from ddp_cifar.data.shapes import draw_shapes
from ddp_cifar.distributed import World

DATASETS: dict[str, Callable[[DataConfig, World], DataSet]] = {
    "cifar10": read_cifar10,
    "imagefolder": read_imagefolder,
    "shapes": draw_shapes,
}


def build_dataset(config: DataConfig, world: World) -> DataSet:
    """Read or draw the data set on every rank, with data.val_images held out. Raises `UserError` if it cannot be read."""
    return DATASETS[config.name](config, world).hold_out(config.val_images)

"""Data sets, the order of their images, and batches. A new data set is a file here and a line in `DATASETS`."""

import socket
from collections.abc import Callable
from pathlib import Path

import torch

from ddp_cifar.config import DataConfig
from ddp_cifar.data.cifar10 import files_of_cifar10, outline_cifar10, read_cifar10
from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.data.imagefolder import files_of_imagefolder, outline_imagefolder, read_imagefolder
from ddp_cifar.data.shapes import draw_shapes, outline_shapes
from ddp_cifar.distributed import World
from ddp_cifar.errors import UserError
from ddp_cifar.named import call, find, is_own

__all__ = ["DATASETS", "DataSet", "Split", "build_dataset", "outline_dataset"]

DATASETS: dict[str, Callable[[DataConfig, World], DataSet]] = {
    "cifar10": read_cifar10,
    "imagefolder": read_imagefolder,
    "shapes": draw_shapes,
}
"""Name -> function of the config's section and the world."""

OUTLINES: dict[str, Callable[[DataConfig], DataSet]] = {
    "cifar10": outline_cifar10,
    "imagefolder": outline_imagefolder,
    "shapes": outline_shapes,
}
"""Name -> function that looks at files without reading them, and gives the data set's shape."""


FILES: dict[str, Callable[[DataConfig], list[Path]]] = {
    "cifar10": files_of_cifar10,
    "imagefolder": files_of_imagefolder,
    "shapes": lambda config: [],
}
"""Name -> the files that the data set is read from."""


def build_dataset(config: DataConfig, world: World) -> DataSet:
    """Read or draw the data set on every rank, with data.val_images held out.

    Raises `UserError` if it cannot be read, or if the ranks have read other data each.
    """
    function = find("data.name", config.name, DATASETS)
    try:
        dataset = _read_own(function, config, world) if is_own(config.name) else function(config, world)
    except OSError as error:
        if is_own(config.name):
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"data.name={config.name} failed at data.root={config.root} ({reason})") from error
        raise UserError(f"cannot read data.root={config.root} ({error.strerror}: {error.filename})") from error
    if not is_own(config.name):
        _check_image_size(dataset, config)
    dataset = dataset.hold_out(config.val_images)
    own = dataset.describe()
    main = world.on_main(lambda: own)
    if not world.all(own == main):
        here = "" if own == main else f", rank {world.rank} on {socket.gethostname()} has {own}"
        raise UserError(
            f"the ranks do not read the same data: rank 0 has {main}{here}; is data.root the same on every node?"
        )
    return dataset


def files_of(config: DataConfig) -> list[Path]:
    """The files that the data set is read from, some of which may not be there; none for one of the user's own."""
    return FILES[config.name](config) if config.name in FILES else []


def outline_dataset(config: DataConfig, world: World) -> DataSet:
    """The data set's shape, with images and labels on torch's meta device, by a look at its files, not into them.

    One of the user's own is read. Raises `UserError` as `build_dataset` does; what would be downloaded or decoded is logged.
    """
    find("data.name", config.name, DATASETS)
    if is_own(config.name):
        return build_dataset(config, world).to(torch.device("meta"))
    dataset = OUTLINES[config.name](config)
    _check_image_size(dataset, config)
    return dataset.hold_out(config.val_images)


def _check_image_size(dataset: DataSet, config: DataConfig) -> None:
    if dataset.train.image_size != config.image_size:
        size = dataset.train.image_size
        raise UserError(
            f"data.image_size={config.image_size}, but the images of {config.name} have {size} x {size} pixels: leave it out"
        )


def _read_own(function: Callable[..., DataSet], config: DataConfig, world: World) -> DataSet:
    """What a function of the user's own returns for `data.root` and `data.args`, on each rank.

    The first rank of a node calls it before the others, so that what it downloads it downloads once.
    """
    first: list[DataSet] = []

    def read() -> DataSet:
        return call("data.name", config.name, function, config.root, **config.args)

    world.on_each_node(lambda: first.append(read()))
    dataset = first[0] if first else read()
    if not isinstance(dataset, DataSet):
        raise UserError(
            f"data.name={config.name} returned a {type(dataset).__name__}: expected a ddp_cifar.data.DataSet"
        )
    return dataset.checked(f"data.name={config.name}")

"""Data sets, the order of their images, and batches.

To add a data set, add a file here with a `Source`, or with a function of `data.root` and `data.args` that returns a `DataSet`,
and a line in registry.py.
"""

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from ddp_cifar.config import DataConfig
from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.data.source import Source
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError
from ddp_cifar.registry import call, resolve

__all__ = ["DataSet", "Source", "Split", "build_dataset", "dataset_metadata", "files_of"]


def build_dataset(config: DataConfig, world: World, *, read_only: bool = False, test_of: Sequence[str] = ()) -> DataSet:
    """Read or generate the data set on every rank, and hold out data.val_images training images.

    With `read_only`, nothing is downloaded to data.root or decoded to data.cache. With `test_of`, the classes of a trained
    network, a folder of images needs no training images, and `train` may be empty. Raises `UserError` if it cannot be read, or
    if ranks have read different data.
    """
    try:
        source = _open_source(config)
        source.read_only, source.test_of = read_only, test_of
        dataset = source.read(world)
        dataset = dataset.hold_out(config.val_images) if len(dataset.train) else dataset
    except OSError as error:
        raise UserError(f"cannot read data.root={config.root} ({error.strerror}: {error.filename})") from error
    description = dataset.describe()
    main = world.on_main(lambda: description)
    if not world.all(description == main):
        here = "" if description == main else f", rank {world.rank} on {socket.gethostname()} has {description}"
        raise UserError(
            f"ranks have read different data: rank 0 has {main}{here}; make data.root the same on every node"
        )
    return dataset


def dataset_metadata(config: DataConfig, world: World) -> DataSet:
    """Return the data set with images and labels on torch's meta device: shapes only, from the names of its files.

    A user-defined data set is read. Raises `UserError` as `build_dataset` does; logs what would be downloaded or decoded.
    """
    return _open_source(config).metadata(world).hold_out(config.val_images)


def files_of(config: DataConfig) -> list[Path]:
    """Return the files that the data set is read from, which may not exist yet; none if it is user-defined."""
    return _open_source(config).files()


def _open_source(config: DataConfig) -> Source:
    function = resolve("data.name", config.name)
    is_source = isinstance(function, type) and issubclass(function, Source)
    if is_source and config.args:
        raise UserError(f"data.name={config.name} accepts no data.args, found {', '.join(config.args)}: remove them")
    source: Source = function(config) if is_source else _FunctionSource(config, function)
    if source.image_size not in (None, config.image_size):
        raise UserError(
            f"data.image_size={config.image_size}, but the images of {config.name} have {source.image_size} x "
            f"{source.image_size} pixels: remove data.image_size"
        )
    return source


class _FunctionSource(Source):
    """A function of `data.root` and `data.args`, usually user-defined, as a source."""

    def __init__(self, config: DataConfig, function: Callable[..., DataSet]) -> None:
        super().__init__(config)
        self.function = function

    def read(self, world: World) -> DataSet:
        """Call the function on the first rank of each node before the others, so that it downloads once per node."""
        first: list[DataSet] = []
        world.on_each_node(lambda: first.append(self._call()))
        return first[0] if first else self._call()

    def _call(self) -> DataSet:
        source = f"data.name={self.config.name}"
        try:
            dataset = call("data.name", self.config.name, self.function, self.config.root, **self.config.args)
        except OSError as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{source} failed at data.root={self.config.root} ({reason})") from error
        if not isinstance(dataset, DataSet):
            raise UserError(f"{source} returned a {type(dataset).__name__}: expected a ddp_cifar.data.DataSet")
        return dataset.checked(source)

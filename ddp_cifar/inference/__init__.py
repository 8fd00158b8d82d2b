"""Load a trained network from a checkpoint: on every rank for a command, or in another program."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddp_cifar.config import Config, ImageShape, flatten, get, keys_with_role, load_config
from ddp_cifar.data import DataSet, build_dataset
from ddp_cifar.data.normalization import Normalization, normalization_of
from ddp_cifar.distributed.rendezvous import open_world
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError
from ddp_cifar.models import at_most_parameters, build_model
from ddp_cifar.models.weights import load_weights
from ddp_cifar.registry import user_defined_names
from ddp_cifar.run.checkpoint_file import load_checkpoint
from ddp_cifar.run.checkpoint_store import Loaded, load_newest
from ddp_cifar.run.resume import find_weights
from ddp_cifar.training.precision import missing_for

MAX_IMAGE_VALUES = 2**26
"""The most values (C x H x W) of an image: 4096 x 4096 pixels in color, and some."""

MAX_OTHER_PARAMETERS = 3 * 10**7
"""The number of parameters that building a model may create besides twice its weights, such as a head that it replaces."""


@contextlib.contextmanager
def open_trained(source: str, arguments: Sequence[str], uses: Sequence[str], *, trust: bool) -> Iterator["Trained"]:
    """Open a `World`, load the same checkpoint on every rank, and yield both with its config overridden by `arguments`.

    `uses` are the config keys, such as `model.name`, whose functions the caller calls. A user-defined function that only the
    checkpoint names is rejected unless `trust` is true, and folders that only it names are not written to.

    If `source` is a run_dir, its newest valid checkpoint is used. Device and backend are chosen for this machine. The
    checkpoint's precision is used if this machine supports it. Raises `UserError` for wrong arguments, before a process
    group opens, if there is no checkpoint, and for names that are not trusted.
    """
    asked = load_config(arguments)
    with open_world(asked.device, asked.backend) as world:
        loaded = world.on_main(lambda: _read(Path(source)))
        trained = _config_of(loaded)
        if missing_for(str(trained.get("precision")), world.device):
            trained["precision"] = "auto"
        config = load_config(arguments, base=trained)
        if not trust:
            _check_names(loaded.path, config, asked, uses)
        is_named = (config.data.root, config.data.cache) == (asked.data.root, asked.data.cache)
        yield Trained(world, loaded, config, read_only=not (trust or is_named))


class Trained(NamedTuple):
    """A checkpoint on every rank."""

    world: World
    loaded: Loaded
    config: Config
    read_only: bool
    """Whether data.root and data.cache are the checkpoint's choice, so that nothing may be written there."""

    def build_dataset(self, split: str = "") -> DataSet:
        """Read the data set, at least `split`. Raises `UserError` if it cannot be read, or differs between ranks."""
        test_of = classes_and_image_shape(self.loaded)[0] if split == "test" and "classes" in self.loaded.state else []
        return build_dataset(self.config.data, self.world, read_only=self.read_only, test_of=test_of)


def _check_names(path: Path, config: Config, asked: Config, uses: Sequence[str]) -> None:
    """Raise `UserError` if `config` has user-defined names that are used but not in `asked`, the command line's config."""
    names = user_defined_names({key: get(config, key) for key in uses if get(config, key) != get(asked, key)})
    if names:
        raise UserError(
            f"{path} would run code of its own choice: {', '.join(names)}; if you trust it, add --trust (in Python, trust=True), "
            f"or give the names yourself as key=value"
        )


class TrainedNetwork(nn.Module):
    """A network that includes its input normalization: (B, C, H, W) uint8 images -> (B, classes) float32 logits."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self, network: nn.Module, classes: Sequence[str], image_shape: ImageShape, normalization: Normalization
    ) -> None:
        """`image_shape`: (C, H, W)."""
        super().__init__()
        self.network = network
        self.classes = tuple(classes)
        self.image_shape = image_shape
        self.normalization = normalization
        scale, shift = normalization.channel_scale_and_shift()
        self.register_buffer("scale", scale.view(1, -1, 1, 1))
        self.register_buffer("shift", shift.view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.to(torch.float32) * self.scale + self.shift)
        return logits


def load_trained(source: str | Path, device: str = "cpu", *, trust: bool = False) -> TrainedNetwork:
    """Load the network of a checkpoint, or of a run_dir's newest valid checkpoint, in eval mode. Needs no process group.

    Raises `UserError` if there is no checkpoint, if its model cannot be built, or if the model is user-defined and `trust` is
    false: the checkpoint chooses the function that would be called.
    """
    loaded = _read(Path(source))
    classes, image_shape = classes_and_image_shape(loaded)
    config = load_config(["train.channels_last=false"], base=_config_of(loaded))
    if not trust:
        _check_names(loaded.path, config, Config(), ["model.name"])
    model = trained_model(loaded, config, len(classes), image_shape, torch.device(device))
    return TrainedNetwork(model, classes, image_shape, normalization_of(loaded.state)).to(device).eval()


def classes_and_image_shape(loaded: Loaded) -> tuple[list[str], ImageShape]:
    """Return the names of the classes, and (C, H, W) of the images. Raises `UserError` if the checkpoint lacks them."""
    if "classes" not in loaded.state:
        raise UserError(f"{loaded.path} has no class names: an older version wrote it; resume its run once to add them")
    state = loaded.state
    size = state.get("image_size")  # of an older checkpoint, of square color images
    classes, shape = state["classes"], state.get("image_shape", [3, size, size])
    are_names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    are_sizes = isinstance(shape, list) and len(shape) == 3 and all(type(side) is int and side > 0 for side in shape)
    if not are_names or not are_sizes or math.prod(shape) > MAX_IMAGE_VALUES:
        raise UserError(f"{loaded.path} is damaged: expected the names of its classes and the (C, H, W) of its images")
    channels, height, width = shape
    return classes, (channels, height, width)


def _config_of(loaded: Loaded) -> dict[str, Any]:
    """The config of the checkpoint by dotted keys, without the keys that describe a machine."""
    return {
        key: value for key, value in flatten(loaded.state["config"]).items() if key not in keys_with_role("machine")
    }


def _read(path: Path) -> Loaded:
    return load_newest(path, "CHECKPOINT") if path.is_dir() else Loaded(path, load_checkpoint(path))


def check_classes(loaded: Loaded, classes: tuple[str, ...], source: str) -> None:
    """Raise `UserError` if the classes of the data differ from those that the checkpoint was trained on."""
    if "classes" not in loaded.state:
        return  # an older checkpoint
    trained, _ = classes_and_image_shape(loaded)
    if list(classes) != trained:
        raise UserError(
            f"data.name={source} has the classes {', '.join(classes[:10])}, but {loaded.path} was trained on "
            f"{', '.join(trained[:10])}: choose data with the same classes by data.name or data.root"
        )


def trained_model(
    loaded: Loaded, config: Config, num_classes: int, image_shape: ImageShape, device: torch.device
) -> nn.Module:
    """Return the checkpoint's network on a device, in eval mode, with its EMA weights if it has them.

    Raises `UserError` if the weights do not fit the network of `config`.
    """
    weights = find_weights(loaded.state["ema" if "ema" in loaded.state else "model"], str(loaded.path))
    with at_most_parameters(2 * sum(map(Tensor.numel, weights.values())) + MAX_OTHER_PARAMETERS, str(loaded.path)):
        model = build_model(config.model, num_classes, image_shape)
    load_weights(model, weights, str(loaded.path))
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device).eval()

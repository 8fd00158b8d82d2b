"""Load a trained network from a checkpoint: on every rank for a command, or in another program."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddp_cifar.config import Config, ImageShape, flatten, keys_with_role, load_config
from ddp_cifar.data.normalization import Normalization, normalization_of
from ddp_cifar.distributed.rendezvous import open_world
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError
from ddp_cifar.models import build_model
from ddp_cifar.models.weights import load_weights
from ddp_cifar.run.checkpoint_file import load_checkpoint
from ddp_cifar.run.checkpoint_store import Loaded, load_newest
from ddp_cifar.training.precision import missing_for


@contextlib.contextmanager
def open_trained(source: str, arguments: Sequence[str]) -> Iterator[tuple[World, Loaded, Config]]:
    """Open a `World`, load the same checkpoint on every rank, and yield both with its config overridden by `arguments`.

    If `source` is a run_dir, its newest valid checkpoint is used. Device and backend are chosen for this machine. The
    checkpoint's precision is used if this machine supports it. Raises `UserError` for wrong arguments, before a process
    group opens, and if there is no checkpoint.
    """
    asked = load_config(arguments)
    with open_world(asked.device, asked.backend) as world:
        loaded = world.on_main(lambda: _read(Path(source)))
        trained = _config_of(loaded)
        if missing_for(str(trained["precision"]), world.device):
            trained["precision"] = "auto"
        yield world, loaded, load_config(arguments, base=trained)


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


def load_trained(source: str | Path, device: str = "cpu") -> TrainedNetwork:
    """Load the network of a checkpoint, or of a run_dir's newest valid checkpoint, in eval mode. Needs no process group.

    Raises `UserError` if there is no checkpoint, or if its model cannot be built.
    """
    loaded = _read(Path(source))
    classes, image_shape = classes_and_image_shape(loaded)
    config = load_config(["train.channels_last=false"], base=_config_of(loaded))
    model = trained_model(loaded, config, len(classes), image_shape, torch.device(device))
    return TrainedNetwork(model, classes, image_shape, normalization_of(loaded.state)).to(device).eval()


def classes_and_image_shape(loaded: Loaded) -> tuple[list[str], ImageShape]:
    """Return the names of the classes, and (C, H, W) of the images. Raises `UserError` if the checkpoint lacks them."""
    if "classes" not in loaded.state:
        raise UserError(f"{loaded.path} has no class names: an older version wrote it; resume its run once to add them")
    state = loaded.state
    if "image_shape" not in state:  # an older checkpoint, of square color images
        return state["classes"], (3, state["image_size"], state["image_size"])
    channels, height, width = state["image_shape"]
    return state["classes"], (channels, height, width)


def _config_of(loaded: Loaded) -> dict[str, Any]:
    """The config of the checkpoint by dotted keys, without the keys that describe a machine."""
    return {
        key: value for key, value in flatten(loaded.state["config"]).items() if key not in keys_with_role("machine")
    }


def _read(path: Path) -> Loaded:
    return load_newest(path, "CHECKPOINT") if path.is_dir() else Loaded(path, load_checkpoint(path))


def check_classes(loaded: Loaded, classes: tuple[str, ...], source: str) -> None:
    """Raise `UserError` if the classes of the data differ from those that the checkpoint was trained on."""
    trained = loaded.state.get("classes", list(classes))  # absent in older checkpoints
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
    model = build_model(config.model, num_classes, image_shape)
    weights: Mapping[str, Tensor] = loaded.state["ema" if "ema" in loaded.state else "model"]
    load_weights(model, weights, str(loaded.path))
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device).eval()

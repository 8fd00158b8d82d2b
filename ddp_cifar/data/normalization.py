"""The mean and the standard deviation per channel with which pixels are normalized."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddp_cifar.config import PRESETS, DataConfig
from ddp_cifar.data.dataset import DataSet
from ddp_cifar.errors import UserError
from ddp_cifar.log import log

VALUES = {
    # Of CIFAR-10's training set, as in the original script. The std is the mean of the per-image stds, kept for parity; the
    # std over all pixels is (0.2470, 0.2435, 0.2616).
    "cifar10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)},
    # https://docs.pytorch.org/vision/stable/models.html, for torchvision's pre-trained weights
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
}
assert set(VALUES) == set(PRESETS)


class Normalization:
    """Maps uint8 pixels to (pixel / 255 - mean) / std. Loaders share one, which a checkpoint restores."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """`mean` and `std`: one number per channel, of pixels scaled to 0 to 1."""
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._repeated: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        mean, std = (" ".join(f"{value:.4f}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean} and std {std}"

    def channel_scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(C,) float32 each: pixel x scale + shift is (pixel / 255 - mean) / std."""
        mean, std = torch.tensor(self.mean, dtype=torch.float64), torch.tensor(self.std, dtype=torch.float64)
        return (1 / (255 * std)).float(), (-mean / std).float()

    def scale_and_shift(self, num_pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(num_pixels x C,) float32 each, for every value of an image: broadcasting over channels would take twice as long."""
        key = (num_pixels, device)
        if key not in self._repeated:
            scale, shift = self.channel_scale_and_shift()
            self._repeated[key] = scale.repeat(num_pixels).to(device), shift.repeat(num_pixels).to(device)
        return self._repeated[key]

    def normalize(self, images: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """(B, C, H, W) uint8 -> float32."""
        return scale_images(
            images, *self.scale_and_shift(images.shape[2] * images.shape[3], images.device), memory_format
        )

    def to_pixels(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalized float32 -> uint8, to show them."""
        scale, shift = (values.view(1, -1, 1, 1).to(images.device) for values in self.channel_scale_and_shift())
        return ((images - shift) / scale).round().clamp(0, 255).to(torch.uint8)

    def state_dict(self) -> dict[str, list[float]]:
        """Return `mean` and `std`, as lists."""
        return {"mean": list(self.mean), "std": list(self.std)}

    def load_state_dict(self, state: Mapping[str, Sequence[float]], source: str) -> None:
        """Use the mean and the std of a checkpoint. All loaders that share this object use them from now on.

        Logs them, and `source`, if they differ.
        """
        before = self.state_dict()
        self.mean, self.std = tuple(state["mean"]), tuple(state["std"])
        self._repeated.clear()
        if self.state_dict() != before:
            log.info(f"normalized as in {source}, with {self}")


def scale_images(images: Tensor, scale: Tensor, shift: Tensor, memory_format: torch.memory_format) -> Tensor:
    """(B, C, H, W) uint8 or float32 -> float32, images x scale + shift, which have a number per value of an image."""
    num_images, channels, height, width = images.shape
    flat = images.permute(0, 2, 3, 1).reshape(num_images, height * width * channels)
    flat = flat.to(torch.float32, copy=True)  # in place from here on
    normalized = flat.mul_(scale).add_(shift).view(num_images, height, width, channels).permute(0, 3, 1, 2)
    return normalized.contiguous(memory_format=memory_format)


def normalization_for(config: DataConfig, dataset: DataSet) -> Normalization:
    """Return the normalization that `data.mean` and `data.std` select for the data set.

    Raises `UserError` if the number of values is not the number of channels.
    """
    given = given_values(config, dataset.train.image_shape[0])
    mean, std = (given[key] or getattr(dataset.pixel_moments, key) for key in ("mean", "std"))
    return Normalization(mean, std)


def given_values(config: DataConfig, channels: int) -> dict[str, tuple[float, ...] | None]:
    """Return `mean` and `std` as numbers per channel, None if the images determine them.

    Raises `UserError` if the number of values is not the number of channels.
    """
    by_default = "cifar10" if config.name in ("cifar10", "shapes") and channels == 3 else "auto"
    values: dict[str, tuple[float, ...] | None] = {}
    for key, given in (("mean", config.mean), ("std", config.std)):
        given = by_default if given is None else given
        if given == "auto":
            values[key] = None
            continue
        numbers = VALUES[given][key] if isinstance(given, str) else _numbers(given, channels)
        if len(numbers) != channels:
            shown = given if isinstance(given, str) else list(numbers)
            raise UserError(
                f"data.{key}={shown} has {len(numbers)} values, but the images have {channels} channels: use one number per "
                f"channel, or data.{key}=auto"
            )
        values[key] = numbers
    return values


def _numbers(given: Any, channels: int) -> tuple[float, ...]:
    """Return one number per channel from a number or a list."""
    return tuple(map(float, given)) if isinstance(given, list) else (float(given),) * channels


def normalization_of(state: Mapping[str, Any]) -> Normalization:
    """Return the normalization of a checkpoint. Older checkpoints have none: they were trained with CIFAR-10's.

    Raises `UserError` if it is not a mean and a std per channel.
    """
    values = state.get("normalization", VALUES["cifar10"])
    try:
        return Normalization(tuple(map(float, values["mean"])), tuple(map(float, values["std"])))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"the checkpoint is damaged: its normalization is not a mean and a std per channel: {values}"
        ) from error

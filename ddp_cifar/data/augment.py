"""Random crop, horizontal flip and normalization of whole batches, equivalent to the original script's per-image transforms.

The augmentation of an image is a function of (seed, epoch, sample id): it does not depend on the number of ranks or on a
resume. Images are channels-last in memory, where a pixel is three consecutive bytes and a crop is a gather of pixels.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ddp_cifar.seeding import generator

# Of CIFAR-10's training set, as in the original script. STD is the mean of the per-image stds, kept for parity; the std over
# all pixels is (0.2470, 0.2435, 0.2616).
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


def padding_of(image_size: int) -> int:
    """Return the padding on each side before the crop, in pixels: 4 for 32, as RandomCrop(32, padding=4) does."""
    return image_size // 8


def draw_augmentations(
    num_samples: int, *, seed: int, epoch: int, image_size: int = 32, purpose: str = "augment"
) -> Tensor:
    """Return (num_samples, 3) int32 per sample id: top and left of the crop, 0 to 2 x padding, and 1 if flipped, else 0."""
    random = generator(purpose, seed, epoch)
    corners = torch.randint(2 * padding_of(image_size) + 1, (num_samples, 2), generator=random, dtype=torch.int32)
    mirrored = torch.randint(2, (num_samples, 1), generator=random, dtype=torch.int32)
    return torch.cat([corners, mirrored], dim=1)


def augment(images: Tensor, augmentations: Tensor) -> Tensor:
    """(B, C, H, W) uint8 -> same shape and dtype: pad with zeros, crop and flip each image by its row of (B, 3)."""
    num_images, channels, height, width = images.shape
    pad = padding_of(height)
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad))
    padded_height, padded_width = padded.shape[1:3]
    top, left, mirrored = (column.unsqueeze(1) for column in augmentations.unbind(1))  # (B, 1) each

    def count(n: int) -> Tensor:
        return torch.arange(n, dtype=augmentations.dtype, device=images.device)

    rows = count(num_images).unsqueeze(1) * padded_height + top + count(height)  # (B, H)
    columns = left + torch.where(mirrored > 0, width - 1 - count(width), count(width))  # (B, W)
    pixels = (rows * padded_width).unsqueeze(2) + columns.unsqueeze(1)  # (B, H, W)
    cropped = padded.view(-1, channels).index_select(0, pixels.flatten())
    return cropped.view(num_images, height, width, channels).permute(0, 3, 1, 2)


def normalize(images: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """(B, 3, H, W) uint8 -> float32, (pixel / 255 - MEAN) / STD."""
    scale, shift = scale_and_shift(images.shape[2] * images.shape[3], images.device)
    return transform(images, None, scale, shift, memory_format)


def transform(
    images: Tensor, augmentations: Tensor | None, scale: Tensor, shift: Tensor, memory_format: torch.memory_format
) -> Tensor:
    """(B, 3, H, W) uint8 -> float32: augment by the rows of `augmentations` (B, 3), if given, and normalize.

    `scale` and `shift` come from `scale_and_shift` for this image size and device.
    """
    if augmentations is not None:
        images = augment(images, augmentations)
    num_images, _, height, width = images.shape
    flat = images.permute(0, 2, 3, 1).reshape(num_images, height * width * 3).to(torch.float32)
    normalized = flat.mul_(scale).add_(shift).view(num_images, height, width, 3).permute(0, 3, 1, 2)
    return normalized.contiguous(memory_format=memory_format)


@functools.cache
def scale_and_shift(num_pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and shift for every value of an image: broadcasting over three channels would take twice as long."""
    return tuple(t.repeat(num_pixels).to(device) for t in channel_scale_and_shift())  # type: ignore[return-value]


def channel_scale_and_shift() -> tuple[Tensor, Tensor]:
    """(3,) float32 each: pixel x scale + shift is (pixel / 255 - MEAN) / STD."""
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    return (1 / (255 * std)).float(), (-mean / std).float()

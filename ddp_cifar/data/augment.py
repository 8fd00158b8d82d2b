"""Random crop, mirror and normalisation of whole batches, as the article does them one image at a time.

What happens to an image is a function of (seed, epoch, sample id): the same whatever the number of ranks, and after a resume.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ddp_cifar.seeding import generator

PADDING = 4  # pixels on each side before the crop: torchvision's RandomCrop(32, padding=4) in the article

# Of CIFAR-10's training set, as the article has them. The stds are the mean of each image's own std, kept for parity;
# the std over all pixels is (0.2470, 0.2435, 0.2616).
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


def draw_augmentations(num_samples: int, *, seed: int, epoch: int, purpose: str = "augment") -> Tensor:
    """(num_samples, 3) uint8: for each sample id the crop's top and left, 0 to 8, and 1 where it is mirrored."""
    random = generator(purpose, seed, epoch)
    corners = torch.randint(2 * PADDING + 1, (num_samples, 2), generator=random, dtype=torch.uint8)
    mirrored = torch.randint(2, (num_samples, 1), generator=random, dtype=torch.uint8)
    return torch.cat([corners, mirrored], dim=1)


def augment(images: Tensor, augmentations: Tensor) -> Tensor:
    """(B, C, H, W) uint8 -> same shape and type: pad with black, crop, mirror, each image by its row of (B, 3)."""
    top, left, mirrored = augmentations.long().unbind(1)
    height, width = images.shape[2:]
    padded = F.pad(images, (PADDING,) * 4)
    # (B, C, 9, 9, H, W): a view of every crop there is, of which each image takes one
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)
    cropped = crops[torch.arange(len(images), device=images.device), :, top, left]
    return torch.where(mirrored.bool().view(-1, 1, 1, 1), cropped.flip(3), cropped)


def normalize(images: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """(B, 3, H, W) uint8 -> float32, (pixel / 255 - MEAN) / STD."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1)
    return images.to(torch.float32, memory_format=memory_format).div_(255).sub_(mean).div_(std)

"""What a data set is here: two tensors a split, in memory."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ddp_cifar.errors import UserError
from ddp_cifar.seeding import generator


@dataclass(frozen=True)
class Split:
    """Images and labels of one split."""

    images: Tensor
    """(N, 3, H, W) uint8"""
    labels: Tensor
    """(N,) int64, 0 to the number of classes - 1"""
    sample_ids: Tensor
    """(N,) int64: which image of the whole training (or test) set each is. Augmentation goes by it."""

    def __len__(self) -> int:
        return len(self.labels)

    @staticmethod
    def of(images: Tensor, labels: Tensor) -> "Split":
        """A split of all images, in their own order."""
        assert images.dtype == torch.uint8, images.dtype
        assert images.ndim == 4, images.shape
        assert len(images) == len(labels), (images.shape, labels.shape)
        return Split(images, labels.long(), torch.arange(len(labels)))

    def take(self, indices: Tensor) -> "Split":
        return Split(self.images[indices], self.labels[indices], self.sample_ids[indices])


@dataclass(frozen=True)
class DataSet:
    """The splits of a data set and the names of its classes."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    val: Split | None = None

    def describe(self) -> str:
        """Sizes, and a checksum of the classes' names and all labels: equal for two readings of the same data."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        sizes = ", ".join(f"{len(split)} {name}" for name, split in splits.items() if split)
        sha = hashlib.sha256("\0".join(self.classes).encode())
        for split in splits.values():
            if split:
                sha.update(split.labels.numpy().tobytes() + b"|")
        return f"{sizes} images of {len(self.classes)} classes, labels {sha.hexdigest()[:8]}"

    def hold_out(self, val_images: int) -> "DataSet":
        """The same with `val_images` of the training images as `val`; with 0, no `val`.

        Which ones does not depend on the run's seed: runs with other seeds choose their best by the same images.
        Raises `UserError` if nothing would be left to train on.
        """
        if val_images == 0:
            return self
        if val_images >= len(self.train):
            raise UserError(
                f"data.val_images={val_images} leaves none of the {len(self.train)} training images to train on"
            )
        shuffled = torch.randperm(len(self.train), generator=generator("val"))
        val, train = shuffled[:val_images].sort().values, shuffled[val_images:].sort().values
        return DataSet(self.train.take(train), self.test, self.classes, val=self.train.take(val))

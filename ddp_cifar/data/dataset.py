"""What a data set is here: two tensors a split, in memory."""

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddp_cifar.errors import UserError
from ddp_cifar.seeding import generator


@dataclass(frozen=True)
class Split:
    """Images and labels of one split, which may be a part of the tensor of images."""

    images: Tensor
    """(M, 3, H, W) uint8, channels-last in memory: all images that there are, of this split or of others as well"""
    labels: Tensor
    """(N,) int64, 0 to the number of classes - 1"""
    sample_ids: Tensor
    """(N,) int64: where in `images` each image of the split is. Augmentation goes by it."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        """Height and width, in pixels."""
        return self.images.shape[2]

    @staticmethod
    def outline(num_images: int, image_size: int) -> "Split":
        """The shape of a split alone, on torch's meta device."""
        shape = (num_images, 3, image_size, image_size)
        labels = torch.empty(num_images, dtype=torch.int64, device="meta")
        return Split(torch.empty(shape, dtype=torch.uint8, device="meta"), labels, labels)

    @staticmethod
    def of(images: Tensor, labels: Tensor) -> "Split":
        """A split of all images (N, 3, S, S) uint8, in their own order, with labels (N,). Raises `UserError` for other ones."""
        shape = tuple(images.shape)
        if images.dtype != torch.uint8 or images.ndim != 4 or shape[1] != 3 or shape[2] != shape[3]:
            raise UserError(
                f"the images of a split are {images.dtype} of shape {shape}: expected uint8 of shape (N, 3, S, S)"
            )
        if tuple(labels.shape) != shape[:1]:
            raise UserError(f"{shape[0]} images have labels of shape {tuple(labels.shape)}: expected ({shape[0]},)")
        channels_last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return Split(channels_last, labels.long(), torch.arange(len(labels)))

    def to(self, device: torch.device) -> "Split":
        """The same on a device."""
        return Split(self.images.to(device), self.labels.to(device), self.sample_ids.to(device))

    def take(self, indices: Tensor) -> "Split":
        """The part of the split that `indices` (K,) picks, over the same tensor of images."""
        return Split(self.images, self.labels[indices], self.sample_ids[indices])


@dataclass(frozen=True)
class DataSet:
    """The splits of a data set and the names of its classes."""

    train: Split
    test: Split | None
    classes: tuple[str, ...]
    val: Split | None = None

    def checked(self, source: str) -> "DataSet":
        """Itself. Raises `UserError`, which names `source`, where splits do not fit each other or the classes."""
        for name, split in (("train", self.train), ("test", self.test), ("val", self.val)):
            if split is None:
                continue
            low, high = (int(split.labels.min()), int(split.labels.max())) if len(split) else (0, 0)
            if not len(split):
                raise UserError(f"{source}: the {name} split has no images")
            if low < 0 or high >= len(self.classes):
                raise UserError(
                    f"{source}: labels of the {name} split go from {low} to {high}: expected 0 to {len(self.classes) - 1} "
                    f"({len(self.classes)} classes)"
                )
            if split.image_size != self.train.image_size:
                raise UserError(
                    f"{source}: the {name} images have {split.image_size} x {split.image_size} pixels, those of train "
                    f"{self.train.image_size} x {self.train.image_size}: expected one size"
                )
        names = list(self.classes)
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise UserError(f"{source}: the names of classes are {names[:10]}: expected strings, each once")
        # plain ones: a checkpoint that holds numpy's could not be read again
        return dataclasses.replace(self, classes=tuple(str(name) for name in names))

    def describe(self) -> str:
        """Sizes, and a checksum of the classes' names and all labels: equal for two readings of the same data."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        sizes = ", ".join(f"{len(split)} {name}" for name, split in splits.items() if split)
        sha = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
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

    def to(self, device: torch.device) -> "DataSet":
        """The same on a device; images that splits share are there once."""
        moved: dict[int, Tensor] = {}

        def move(split: Split) -> Split:
            if id(split.images) not in moved:
                moved[id(split.images)] = split.images.to(device)
            return Split(moved[id(split.images)], split.labels.to(device), split.sample_ids.to(device))

        test, val = (split and move(split) for split in (self.test, self.val))
        return DataSet(move(self.train), test, self.classes, val)


def place_of(splits: Iterable[Split | None], device: torch.device, residency: str) -> torch.device:
    """Where the images of `splits` go for training on `device`: there or, by `data.residency`, into the host's memory."""
    if residency == "auto" and device.type == "cuda":
        each = {id(split.images): split.images.numel() for split in splits if split}  # bytes; splits may share images
        free, _ = torch.cuda.mem_get_info(device)
        residency = "device" if sum(each.values()) <= free / 2 else "host"
    return torch.device("cpu") if residency == "host" else device

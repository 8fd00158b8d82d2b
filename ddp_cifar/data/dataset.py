"""Data sets in memory: two tensors per split, images and labels."""

import dataclasses
import functools
import hashlib
import math
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddp_cifar.config import ImageShape
from ddp_cifar.errors import UserError
from ddp_cifar.seeding import generator

CHUNK_BYTES = 16 * 2**20  # of images, whose sums are computed at once


@dataclass(frozen=True)
class Split:
    """Images and labels of one split. Several splits may share one tensor of images."""

    images: Tensor
    """(M, C, H, W) uint8, channels-last in memory; may also contain images of other splits"""
    labels: Tensor
    """(N,) int64, 0 to the number of classes - 1"""
    sample_ids: Tensor
    """(N,) int64: the index in `images` of each image of the split. Augmentation depends on it."""
    files: NDArray[np.bytes_] | None = None
    """(M,) the file of each of `images`, relative to data.root; None if they are not files"""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> ImageShape:
        """(C, H, W)"""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @staticmethod
    def metadata_only(num_images: int, image_shape: ImageShape) -> "Split":
        """Return a split without data, on torch's meta device."""
        images = torch.empty(num_images, *image_shape, dtype=torch.uint8, device="meta")
        labels = torch.empty(num_images, dtype=torch.int64, device="meta")
        return Split(images, labels, labels)

    @staticmethod
    def of(images: Tensor, labels: Tensor) -> "Split":
        """Return a split of all images (N, C, H, W) uint8 with labels (N,). Raises `UserError` for other shapes or types."""
        shape = tuple(images.shape)
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UserError(
                f"the images of a split have type {images.dtype} and shape {shape}: expected torch.uint8 and (N, C, H, W)"
            )
        if tuple(labels.shape) != shape[:1]:
            raise UserError(f"{shape[0]} images have labels of shape {tuple(labels.shape)}: expected ({shape[0]},)")
        channels_last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return Split(channels_last, labels.long(), torch.arange(len(labels)))

    def to(self, device: torch.device) -> "Split":
        """Return the split on a device."""
        labels, sample_ids = self.labels.to(device), self.sample_ids.to(device)
        return dataclasses.replace(self, images=self.images.to(device), labels=labels, sample_ids=sample_ids)

    def take(self, indices: Tensor) -> "Split":
        """Return the subset at `indices` (K,), which shares the tensor of images."""
        return dataclasses.replace(self, labels=self.labels[indices], sample_ids=self.sample_ids[indices])

    def file_names(self) -> list[str] | None:
        """Return the file of each image of the split, relative to data.root; None if they are not files."""
        return None if self.files is None else [os.fsdecode(name) for name in self.files[self.sample_ids.numpy()]]


@dataclass(frozen=True)
class Moments:
    """Exact sums over pixels, per channel, from which mean and standard deviation follow."""

    num_pixels: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean per channel, of values scaled to 0 to 1."""
        return tuple(total / (255 * self.num_pixels) for total in self.sums)

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation per channel over all pixels, of values scaled to 0 to 1. At least 1/255: never 0."""
        n = self.num_pixels
        variances = [n * square - total * total for total, square in zip(self.sums, self.squares, strict=True)]
        return tuple(max(math.sqrt(variance) / n, 1.0) / 255 for variance in variances)

    @staticmethod
    def of(images: Tensor) -> "Moments":
        """Return the sums over (N, C, H, W) uint8 images. They are integers, so the order does not matter."""
        channels = images.shape[1]
        sums = squares = torch.zeros(channels, dtype=torch.int64)
        for chunk in images.split(max(1, CHUNK_BYTES // images[0].numel())):
            values = chunk.permute(0, 2, 3, 1).reshape(-1, channels).to(torch.int32)
            sums = sums + values.sum(0)  # int64
            squares = squares + (values * values).sum(0)
        return Moments(images.numel() // channels, tuple(sums.tolist()), tuple(squares.tolist()))


@dataclass(frozen=True)
class DataSet:
    """The splits of a data set and its class names."""

    train: Split
    test: Split | None
    classes: tuple[str, ...]
    val: Split | None = None
    checksum: int | None = None
    """The `image_checksum`, if it is known without reading the images."""
    moments: Moments | None = None
    """The `pixel_moments`, if they are known."""

    def checked(self, source: str) -> "DataSet":
        """Return the data set. Raises `UserError`, which names `source`, if splits do not fit each other or the classes."""
        for name, split in (("train", self.train), ("test", self.test), ("val", self.val)):
            if split is None:
                continue
            low, high = (int(split.labels.min()), int(split.labels.max())) if len(split) else (0, 0)
            if not len(split):
                raise UserError(f"{source}: the {name} split has no images")
            if low < 0 or high >= len(self.classes):
                raise UserError(
                    f"{source}: the labels of the {name} split range from {low} to {high}: expected 0 to {len(self.classes) - 1} "
                    f"({len(self.classes)} classes)"
                )
            if split.image_shape != self.train.image_shape:
                raise UserError(
                    f"{source}: the {name} images have the shape {split.image_shape}, the train images "
                    f"{self.train.image_shape}: expected the same channels, height and width"
                )
        names = list(self.classes)
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise UserError(f"{source}: the class names are {names[:10]}: expected distinct strings")
        # plain strings: a checkpoint with numpy's strings could not be loaded
        return dataclasses.replace(self, classes=tuple(str(name) for name in names))

    @functools.cached_property
    def image_checksum(self) -> int:
        """CRC-32 of all pixels. It detects changes, not attacks."""
        if self.checksum is not None:
            return self.checksum
        checksum = 0
        for images in {id(split.images): split.images for split in (self.train, self.val, self.test) if split}.values():
            checksum = zlib.crc32(images.permute(0, 2, 3, 1).contiguous().numpy().data, checksum)
        return checksum

    @functools.cached_property
    def pixel_moments(self) -> Moments:
        """The sums over the training images, including those held out for validation."""
        return self.moments or Moments.of(self.train.images)

    def describe(self) -> str:
        """Return the sizes, and checksums of classes and labels, and of pixels; equal if the same data is read twice."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        sizes = ", ".join(f"{len(split)} {name}" for name, split in splits.items() if split)
        sha = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for split in splits.values():
            if split:
                sha.update(split.labels.numpy().tobytes() + b"|")
        return f"{sizes} images of {len(self.classes)} classes, labels {sha.hexdigest()[:8]}, pixels {self.image_checksum:08x}"

    def hold_out(self, val_images: int) -> "DataSet":
        """Return the data set with `val_images` of the training images moved to `val`; with 0, `val` is None.

        The choice is random, but leaves an image of each class to train on. It does not depend on the run's seed, so that runs
        with different seeds choose their best checkpoint by the same images. Raises `UserError` if too few images would be left.
        """
        if val_images == 0:
            return self
        shuffled = torch.randperm(len(self.train), generator=generator("val"))
        labels = self.train.labels
        # the last image of each class in this order; none is known on the meta device
        kept = {} if labels.is_meta else {label: i for i, label in enumerate(labels[shuffled].tolist())}
        most = len(self.train) - max(1, len(kept))
        if val_images > most:
            raise UserError(
                f"data.val_images={val_images} leaves too few of the {len(self.train)} training images, one of each class, to "
                f"train on: use at most {most}"
            )
        is_kept = torch.zeros(len(shuffled), dtype=torch.bool)
        is_kept[list(kept.values())] = True
        shuffled = torch.cat([shuffled[~is_kept], shuffled[is_kept]])
        val, train = shuffled[:val_images].sort().values, shuffled[val_images:].sort().values
        return dataclasses.replace(self, train=self.train.take(train), val=self.train.take(val))

    def to(self, device: torch.device) -> "DataSet":
        """Return the data set on a device. A tensor of images that splits share is copied once."""
        moved: dict[int, Tensor] = {}

        def move(split: Split) -> Split:
            if id(split.images) not in moved:
                moved[id(split.images)] = split.images.to(device)
            return dataclasses.replace(split, images=moved[id(split.images)]).to(device)

        test, val = (split and move(split) for split in (self.test, self.val))
        return dataclasses.replace(self, train=move(self.train), test=test, val=val)


def is_same_data(before: str, now: str) -> bool:
    """Compare results of `DataSet.describe`. Those of older versions have no checksum of pixels."""
    return now == before or now.rpartition(", pixels ")[0] == before


def choose_data_device(splits: Iterable[Split | None], device: torch.device, residency: str) -> torch.device:
    """Return where to store the images of `splits` for training on `device`: `device` or the CPU, by `data.residency`."""
    each = {id(split.images): split.images.numel() for split in splits if split}  # bytes; splits may share images
    return choose_device_for(sum(each.values()), device, residency)


def choose_device_for(num_bytes: float, device: torch.device, residency: str) -> torch.device:
    """Return where to store so many bytes of images, as `choose_data_device` does."""
    if residency == "auto" and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        residency = "device" if num_bytes <= free / 2 else "host"
    return torch.device("cpu") if residency == "host" else device


def to_grayscale(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, 1, H, W) uint8: luma of ITU-R BT.601, rounded as Pillow's convert("L")."""
    red, green, blue = images.int().unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8).unsqueeze(1)

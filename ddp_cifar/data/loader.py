"""From indices to batches on the device: gathered, augmented and normalised as whole tensors.

A split is on the device, where it fits, and nothing is sent for a batch. Else it is in the host's memory, and each batch is
sent as uint8, from pinned memory, on a stream of its own, while the one before is trained on.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ddp_cifar.data.augment import draw_augmentations, scale_and_shift, transform
from ddp_cifar.data.dataset import Split
from ddp_cifar.data.sampler import MicroBatchIndices, StepIndices, StepSampler
from ddp_cifar.distributed import World

Item = TypeVar("Item")
Batch = TypeVar("Batch", bound="MicroBatch | EvalBatch")
Transform = Callable[[Tensor, Tensor | None, Tensor, Tensor, torch.memory_format], Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes."""

    index: int
    """Of this micro-batch in the step's global batch: the same on whatever rank it is computed."""
    images: Tensor
    """(B, 3, H, W) float32, normalised, on the device"""
    labels: Tensor
    """(B,) int64, on the device"""
    sample_ids: Tensor
    """(B,) int64, on the device: which images they are"""


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of a step; iterating makes its micro-batches one after another."""

    indices: StepIndices
    make: Callable[[MicroBatchIndices], MicroBatch]

    @property
    def num_images(self) -> int:
        """Images of the whole global batch, over all ranks."""
        return self.indices.num_images

    def __len__(self) -> int:
        return len(self.indices.micro_batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        return map(self.make, self.indices.micro_batches)


@dataclass(frozen=True)
class EvalBatch:
    """What one forward pass takes in an evaluation."""

    images: Tensor
    """(B, 3, H, W) float32, normalised, on the device"""
    labels: Tensor
    """(B,) int64, on the device"""
    indices: Tensor
    """(B,) int64, on the CPU: where in the split they are"""


class Ahead(Generic[Item, Batch]):
    """Makes batches of items; with a stream, the next one's there, while the one before is in use."""

    def __init__(self, make: Callable[[Item], Batch], items: Iterable[Item], stream: torch.cuda.Stream | None) -> None:
        """`items` are those that will be taken, in this order."""
        self.make = make
        self.items = iter(items)
        self.stream = stream
        if stream:
            self._start()

    def take(self, item: Item) -> Batch:
        """The batch of an item. One that is not the next of `items` is made at once."""
        if not self.stream or item is not self.item:
            return self.make(item)
        user = torch.cuda.current_stream(self.stream.device)
        user.wait_stream(self.stream)
        batch = self.batch
        for part in vars(batch).values():
            if isinstance(part, Tensor) and part.is_cuda:
                part.record_stream(user)  # the other stream's allocator is not to take its memory before
        self._start()
        return batch

    def _start(self) -> None:
        self.item = next(self.items, None)
        if self.item is not None:
            with torch.cuda.stream(self.stream):
                self.batch = self.make(self.item)


class EvalLoader:
    """A split, as uint8, and this rank's share of it for an evaluation on `device`.

    Batches are made where the split is, and sent to the device as uint8.
    """

    def __init__(self, split: Split, channels_last: bool, device: torch.device) -> None:
        self.split = split
        self.device = device
        self.is_resident = split.images.device == device
        self.stream = None if self.is_resident or device.type != "cuda" else torch.cuda.Stream(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.scale, self.shift = scale_and_shift(split.image_size**2, device)
        self.transform: Transform = transform
        """uint8 images to the network's input; train.compile puts a compiled one here."""

    def __len__(self) -> int:
        return len(self.split)

    @property
    def image_shape(self) -> torch.Size:
        """(3, H, W)"""
        return self.split.images.shape[1:]

    def gather(self, indices: Tensor, augmentations: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) int64 indices -> (B, 3, H, W) float32 images, (B,) int64 labels and sample ids, on the device.

        Each image is augmented by its sample id's row of `augmentations` (num_ids, 3), where those are given.
        """
        indices = indices.to(self.split.images.device)
        sample_ids = self.split.sample_ids[indices]
        images = self.split.images.permute(0, 2, 3, 1).index_select(0, sample_ids).permute(0, 3, 1, 2)
        labels = self.split.labels[indices]
        own = None if augmentations is None else augmentations[sample_ids]
        if not self.is_resident:
            images, labels, sample_ids = (self._send(tensor) for tensor in (images, labels, sample_ids))
            own = None if own is None else self._send(own)
        return self.transform(images, own, self.scale, self.shift, self.memory_format), labels, sample_ids

    def _send(self, tensor: Tensor) -> Tensor:
        """To the device, and nothing waits for it but the device's own stream."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def evaluation_batches(
        self, world: World, batch_size: int, augmentations: Tensor | None = None
    ) -> Iterator[EvalBatch | None]:
        """This rank's batches of the split, images and labels `gather`ed: number rank, rank + world_size ...

        A batch holds the same images on any number of ranks, since an image's logits depend, in their last bits, on its
        batch. Each image is on exactly one rank, where `DistributedSampler` would pad and so count some twice. Every rank
        gets as many batches, which a rank that has none left for the last turn gets as None.
        """
        batches = torch.arange(len(self)).split(batch_size)

        def make(indices: Tensor) -> EvalBatch:
            images, labels, _ = self.gather(indices, augmentations)
            return EvalBatch(images, labels, indices)

        own = batches[world.rank :: world.world_size]
        ahead = Ahead(make, own, self.stream)
        for turn in range(math.ceil(len(batches) / world.world_size)):
            yield ahead.take(own[turn]) if turn < len(own) else None


class TrainLoader(EvalLoader):
    """The training split, and this rank's part of each step."""

    def __init__(
        self, split: Split, sampler: StepSampler, seed: int, channels_last: bool, device: torch.device
    ) -> None:
        super().__init__(split, channels_last, device)
        self.sampler = sampler
        self.seed = seed

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[StepBatch]:
        """The epoch's steps from `first_step` on."""
        augmentations = self.augmentations(epoch)
        steps, again = itertools.tee(self.sampler.steps(epoch, first_step, self.split.images.device))

        def make(micro: MicroBatchIndices) -> MicroBatch:
            return MicroBatch(micro.index, *self.gather(micro.indices, augmentations))

        ahead = Ahead(make, (micro for step in again for micro in step.micro_batches), self.stream)
        for indices in steps:
            yield StepBatch(indices, ahead.take)

    def augmentations(self, epoch: int, purpose: str = "augment") -> Tensor:
        """(num_ids, 3) int32, where the split is: the epoch's crop and mirror of each sample id."""
        table = draw_augmentations(
            len(self.split.images), seed=self.seed, epoch=epoch, image_size=self.split.image_size, purpose=purpose
        )
        return table.to(self.split.images.device)

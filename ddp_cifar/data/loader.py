"""From indices to batches on the device: images are gathered, augmented and normalized as whole tensors.

If a split fits on the device, it is stored there, and nothing is copied per batch. Otherwise it is in host memory, and each
batch is copied as uint8 from pinned memory, on a separate stream, while the previous batch is in use.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ddp_cifar.config import AugmentConfig, ImageShape
from ddp_cifar.data.augment import Function, Geometry, build_function, mix, soft_labels, transform
from ddp_cifar.data.dataset import Split
from ddp_cifar.data.normalization import Normalization
from ddp_cifar.data.sampler import MicroBatchIndices, StepIndices, StepSampler
from ddp_cifar.distributed.world import World
from ddp_cifar.seeding import seed_all

Item = TypeVar("Item")
Batch = TypeVar("Batch", bound="MicroBatch | EvalBatch")
Transform = Callable[[Tensor, Tensor | None, Tensor, Tensor, torch.memory_format, Geometry, Function | None], Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass in training."""

    index: int
    """Index of this micro-batch in the step's global batch, independent of the rank that computes it."""
    images: Tensor
    """(B, C, H, W) float32, normalized, on the device"""
    labels: Tensor
    """(B,) int64, on the device"""
    sample_ids: Tensor
    """(B,) int64, on the device: the ids of the images"""
    targets: Tensor
    """What the loss compares with the logits: `labels` or, with mixup or cutmix, (B, classes) float32 soft labels"""


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of a step, which may be empty. Iteration creates its micro-batches one by one."""

    indices: StepIndices
    make: Callable[[MicroBatchIndices], MicroBatch]

    @property
    def num_images(self) -> int:
        """Number of images in the global batch, over all ranks."""
        return self.indices.num_images

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches in the step, over all ranks."""
        return self.indices.num_micro_batches

    def __len__(self) -> int:
        return len(self.indices.micro_batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        return map(self.make, self.indices.micro_batches)


@dataclass(frozen=True)
class EvalBatch:
    """The input of one forward pass in an evaluation."""

    images: Tensor
    """(B, C, H, W) float32, normalized, on the device"""
    labels: Tensor
    """(B,) int64, on the device"""
    indices: Tensor
    """(B,) int64, on the CPU: the indices of the images in the split"""


class Prefetcher(Generic[Item, Batch]):
    """Makes batches from items. With a stream, makes the next batch on it while the previous one is in use."""

    def __init__(self, make: Callable[[Item], Batch], items: Iterable[Item], stream: torch.cuda.Stream | None) -> None:
        """`items` are the expected arguments of `take`, in order."""
        self.make = make
        self.items = iter(items)
        self.stream = stream
        if stream:
            self._start()

    def take(self, item: Item) -> Batch:
        """Return the batch of an item. If it is not the next of `items`, its batch is made immediately."""
        if not self.stream or item is not self.item:
            return self.make(item)
        user = torch.cuda.current_stream(self.stream.device)
        user.wait_stream(self.stream)
        batch = self.batch
        for part in vars(batch).values():
            if isinstance(part, Tensor) and part.is_cuda:
                part.record_stream(user)  # keeps the allocator from reusing the memory too early
        self._start()
        return batch

    def _start(self) -> None:
        self.item = next(self.items, None)
        if self.item is not None:
            with torch.cuda.stream(self.stream):
                self.batch = self.make(self.item)


class EvalLoader:
    """A split, as uint8, and this rank's share of it for an evaluation on `device`.

    Batches are gathered where the split is stored, and copied to the device as uint8.
    """

    def __init__(self, split: Split, normalization: Normalization, channels_last: bool, device: torch.device) -> None:
        self.split = split
        self.normalization = normalization
        self.device = device
        self.is_resident = split.images.device == device
        self.stream = None if self.is_resident or device.type != "cuda" else torch.cuda.Stream(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.geometry = Geometry(padding=0, flip=False, cutout=0)
        self.function: Function | None = None
        self.transform: Transform = transform
        """Function from uint8 images to the network's input; train.compile replaces it by a compiled one."""

    def __len__(self) -> int:
        return len(self.split)

    @property
    def image_shape(self) -> ImageShape:
        """(C, H, W)"""
        return self.split.image_shape

    def gather(
        self, indices: Tensor, augmentations: Tensor | None = None, *place: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) int64 indices -> (B, C, H, W) float32 images, (B,) int64 labels and sample ids, on the device.

        If `augmentations` (num_ids, 3 or 5) is given, each image is augmented by the row of its sample id, and by the
        user-defined function, whose random numbers depend on `place`.
        """
        indices = indices.to(self.split.images.device)
        sample_ids = self.split.sample_ids[indices]
        images = self.split.images.permute(0, 2, 3, 1).index_select(0, sample_ids).permute(0, 3, 1, 2)
        labels = self.split.labels[indices]
        table = None if augmentations is None else augmentations[sample_ids]
        if not self.is_resident:
            images, labels, sample_ids = (self._send(tensor) for tensor in (images, labels, sample_ids))
            table = None if table is None else self._send(table)
        _, height, width = self.image_shape
        scale, shift = self.normalization.scale_and_shift(height * width, self.device)
        function = self.function if augmentations is not None else None
        if function:
            seed_all(self.device, "augment.name", *place)
        images = self.transform(images, table, scale, shift, self.memory_format, self.geometry, function)
        return images, labels, sample_ids

    def _send(self, tensor: Tensor) -> Tensor:
        """Copy to the device; only the device's stream waits for the copy."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def evaluation_batches(
        self, world: World, batch_size: int, augmentations: Tensor | None = None
    ) -> Iterator[EvalBatch | None]:
        """Yield this rank's batches of the split: those with the indices rank, rank + world_size, ...

        A batch has the same images on any number of ranks, because the last bits of an image's logits depend on its batch.
        Each image is on exactly one rank; `DistributedSampler` would pad and count some images twice. Every rank yields
        the same number of batches: a rank without a batch in the last round yields None.
        """
        batches = torch.arange(len(self)).split(batch_size)

        def make(indices: Tensor) -> EvalBatch:
            images, labels, _ = self.gather(indices, augmentations, int(indices[0]))
            return EvalBatch(images, labels, indices)

        rank_batches = batches[world.rank :: world.world_size]
        prefetcher = Prefetcher(make, rank_batches, self.stream)
        for i in range(math.ceil(len(batches) / world.world_size)):
            yield prefetcher.take(rank_batches[i]) if i < len(rank_batches) else None


class TrainLoader(EvalLoader):
    """The training split, and this rank's part of each step."""

    def __init__(
        self,
        split: Split,
        normalization: Normalization,
        channels_last: bool,
        device: torch.device,
        *,
        sampler: StepSampler,
        config: AugmentConfig,
        num_classes: int,
        seed: int,
    ) -> None:
        """Raises `UserError` if there is no user-defined augmentation of the name in `config`."""
        super().__init__(split, normalization, channels_last, device)
        self.sampler = sampler
        self.config = config
        self.num_classes = num_classes
        self.seed = seed
        self.geometry = Geometry.of(config, split.image_shape)
        self.function = build_function(config)

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[StepBatch]:
        """Yield the epoch's steps, starting with `first_step`."""
        steps, again = itertools.tee(self.sampler.steps(epoch, first_step, self.split.images.device))
        make = functools.partial(self._make, epoch, self.augmentations(epoch))
        prefetcher = Prefetcher(make, (micro for step in again for micro in step.micro_batches), self.stream)
        for indices in steps:
            yield StepBatch(indices, prefetcher.take)

    def micro_batch(self, epoch: int, step: int, index: int) -> MicroBatch:
        """Return any micro-batch of step `step` of an epoch, also one of another rank."""
        batch, count = self.sampler.global_batch(epoch, step, self.split.images.device)
        return self._make(epoch, self.augmentations(epoch), MicroBatchIndices(step, index, batch[index::count]))

    def _make(self, epoch: int, augmentations: Tensor, micro: MicroBatchIndices) -> MicroBatch:
        place = (self.seed, epoch, micro.step, micro.index)
        images, labels, sample_ids = self.gather(micro.indices, augmentations, *place)
        targets = labels
        if self.config.mixes:
            images, share = mix(images, self.config, *place)
            images = images.contiguous(memory_format=self.memory_format)
            targets = soft_labels(labels, share, self.num_classes)
        return MicroBatch(micro.index, images, labels, sample_ids, targets)

    def augmentations(self, epoch: int, purpose: str = "augment") -> Tensor:
        """Return (num_ids, 3 or 5) int32, where the split is stored: crop, flip and cutout of each sample id in this epoch."""
        table = self.geometry.draw(
            len(self.split.images), self.image_shape, seed=self.seed, epoch=epoch, purpose=purpose
        )
        return table.to(self.split.images.device)

    def sample_ids(self, epoch: int) -> Tensor:
        """Return (N,) int64: the sample id of each image that the epoch trains on, in no particular order."""
        ids = self.split.sample_ids
        return ids if self.sampler.labels is None else ids[self.sampler.order(epoch).to(ids.device)]

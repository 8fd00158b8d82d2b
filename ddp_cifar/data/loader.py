"""From indices to batches on the device: gathered, augmented and normalised as whole tensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddp_cifar.data.augment import augment, draw_augmentations, normalize
from ddp_cifar.data.dataset import Split
from ddp_cifar.data.sampler import StepIndices, StepSampler
from ddp_cifar.distributed import World


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
    loader: "TrainLoader"
    augmentations: Tensor

    @property
    def num_images(self) -> int:
        """Images of the whole global batch, over all ranks."""
        return self.indices.num_images

    def __len__(self) -> int:
        return len(self.indices.micro_batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        for micro in self.indices.micro_batches:
            images, labels, sample_ids = self.loader.gather(micro.indices, self.augmentations)
            yield MicroBatch(micro.index, images, labels, sample_ids)


class EvalBatch(NamedTuple):
    """What one forward pass takes in an evaluation."""

    images: Tensor
    """(B, 3, H, W) float32, normalised, on the device"""
    labels: Tensor
    """(B,) int64, on the device"""
    indices: Tensor
    """(B,) int64, on the CPU: where in the split they are"""


class EvalLoader:
    """A split that is whole on the device as uint8, and this rank's share of it for an evaluation."""

    def __init__(self, split: Split, channels_last: bool) -> None:
        self.split = split
        self.device = split.images.device
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

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
        indices = indices.to(self.device)
        sample_ids = self.split.sample_ids[indices]
        images = self.split.images.permute(0, 2, 3, 1).index_select(0, sample_ids).permute(0, 3, 1, 2)
        if augmentations is not None:
            images = augment(images, augmentations[sample_ids])
        return normalize(images, self.memory_format), self.split.labels[indices], sample_ids

    def evaluation_batches(
        self, world: World, batch_size: int, augmentations: Tensor | None = None
    ) -> Iterator[EvalBatch | None]:
        """This rank's batches of the split, images and labels `gather`ed: number rank, rank + world_size ...

        A batch holds the same images on any number of ranks, since an image's logits depend, in their last bits, on its
        batch. Each image is on exactly one rank, where `DistributedSampler` would pad and so count some twice. Every rank
        gets as many batches, which a rank that has none left for the last turn gets as None.
        """
        batches = torch.arange(len(self)).split(batch_size)
        for turn in range(0, len(batches), world.world_size):
            if turn + world.rank < len(batches):
                indices = batches[turn + world.rank]
                images, labels, _ = self.gather(indices, augmentations)
                yield EvalBatch(images, labels, indices)
            else:
                yield None


class TrainLoader(EvalLoader):
    """The training split, and this rank's part of each step."""

    def __init__(self, split: Split, sampler: StepSampler, seed: int, channels_last: bool) -> None:
        super().__init__(split, channels_last)
        self.sampler = sampler
        self.seed = seed

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[StepBatch]:
        """The epoch's steps from `first_step` on."""
        augmentations = self.augmentations(epoch)
        for indices in self.sampler.steps(epoch, first_step):
            yield StepBatch(indices, self, augmentations)

    def augmentations(self, epoch: int, purpose: str = "augment") -> Tensor:
        """(num_ids, 3) int32 on the device: the epoch's crop and mirror of each sample id."""
        table = draw_augmentations(
            len(self.split.images), seed=self.seed, epoch=epoch, image_size=self.split.image_size, purpose=purpose
        )
        return table.to(self.device)

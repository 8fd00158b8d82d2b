"""The order of images, as in `DistributedSampler`, and this rank's part of each step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from ddp_cifar.data.batch_plan import BatchPlan
from ddp_cifar.seeding import generator


@dataclass(frozen=True)
class MicroBatchIndices:
    """One micro-batch of a step."""

    step: int
    """The step of the epoch."""
    index: int
    """The index of the micro-batch in the global batch."""
    indices: Tensor
    """(B,) int64 indices into the training split."""


@dataclass(frozen=True)
class StepIndices:
    """One rank's part of one step."""

    num_images: int
    """Number of images in the global batch, over all ranks."""
    num_micro_batches: int
    """Number of micro-batches in the step, over all ranks."""
    micro_batches: tuple[MicroBatchIndices, ...]
    """This rank's micro-batches; empty if the step has fewer images than ranks."""


class StepSampler:
    """Splits each epoch's order of images into steps, and selects this rank's micro-batches.

    The order is that of torch's `DistributedSampler`: micro-batch m has the images of replica m of V, without the padding.
    Each image is in exactly one micro-batch of an epoch, for any world size.
    """

    def __init__(self, plan: BatchPlan, rank: int, seed: int, labels: Tensor | None = None) -> None:
        """With the `labels` (N,) of the images, each epoch has equally many images of each class (`data.oversample`)."""
        self.plan = plan
        self.rank = rank
        self.seed = seed
        self.labels = labels
        # one replica gives the whole order; V replicas would shuffle it V times, and pad it
        images = cast("Dataset[int]", range(plan.num_images))  # only its length is used
        self.sampler: DistributedSampler[int] = DistributedSampler(
            images, num_replicas=1, rank=0, shuffle=True, seed=seed
        )

    def order(self, epoch: int) -> Tensor:
        """Return (N,) int64: the images of the epoch, in the order of training."""
        if self.labels is not None:
            return balanced_order(self.labels, generator("oversample", self.seed, epoch))
        self.sampler.set_epoch(epoch)  # without it, every epoch would have the order of the first
        return torch.tensor(list(self.sampler))

    def global_batch(self, epoch: int, step: int, device: torch.device | None = None) -> tuple[Tensor, int]:
        """Return the (B,) indices of a step of an epoch over all ranks, in their order, and the number of micro-batches."""
        images = self.plan.images_of(step)
        return self.order(epoch)[images.start : images.stop].to(device), self.plan.micro_batches(len(images))

    def steps(self, epoch: int, first_step: int = 0, device: torch.device | None = None) -> Iterator[StepIndices]:
        """Yield this rank's part of the epoch's steps, starting with `first_step`; earlier steps are not read.

        Indices are on `device`, to which the epoch's whole order is copied, or on the CPU.
        """
        order = self.order(epoch).to(device)
        plan = self.plan
        for step in range(first_step, plan.steps_per_epoch):
            images = plan.images_of(step)
            batch = order[images.start : images.stop]
            count = plan.micro_batches(len(batch))
            share = plan.shares(len(batch))[self.rank]
            yield StepIndices(len(batch), count, tuple(MicroBatchIndices(step, m, batch[m::count]) for m in share))


def balanced_order(labels: Tensor, random: torch.Generator) -> Tensor:
    """Return (N,) int64 indices of `labels` (N,) in random order, with equally many (to within one) of each class.

    The images of a class are shuffled, and repeated only after all have been used.
    """
    classes = labels.unique()
    size, larger = divmod(len(labels), len(classes))
    chosen = []
    for position, label in enumerate(classes):
        images = (labels == label).nonzero().squeeze(1)
        count = size + (position < larger)
        rounds = [images[torch.randperm(len(images), generator=random)] for _ in range(-(-count // len(images)))]
        chosen.append(torch.cat(rounds)[:count])
    return torch.cat(chosen)[torch.randperm(len(labels), generator=random)]

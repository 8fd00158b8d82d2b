"""Which images each step, micro-batch and rank sees: `DistributedSampler`'s order, cut into micro-batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from ddp_cifar.config import TrainConfig
from ddp_cifar.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """How a step's global batch is cut: derived once from the config, the number of ranks and of training images."""

    num_images: int
    """Training images."""
    global_batch_size: int
    """Images a step; the last step of an epoch has what is left."""
    num_micro_batches: int
    """Micro-batches a step (V). Micro-batch m holds positions m, m + V, m + 2V ... of the global batch."""
    world_size: int

    @property
    def micro_batch_size(self) -> int:
        return self.global_batch_size // self.num_micro_batches

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches a rank computes in a step."""
        return self.num_micro_batches // self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_images // self.global_batch_size)

    def micro_batch_sizes(self) -> list[int]:
        """Images of a micro-batch, of any rank: as usual, and in an epoch's last step, largest first."""
        last, count = self.num_images % self.global_batch_size, self.num_micro_batches
        short = {-(-(last - m) // count) for m in range(count)} if last else set()
        return sorted({self.micro_batch_size} | short, reverse=True)

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        accumulated = f" x {self.grad_accum_steps} micro-batches" if self.grad_accum_steps > 1 else ""
        return (
            f"{self.global_batch_size} images a step = {ranks} x {self.micro_batch_size} images{accumulated}, "
            f"{self.steps_per_epoch} steps an epoch of {self.num_images} images"
        )


def check_batch_size(train: TrainConfig, world_size: int) -> int:
    """The number of micro-batches a step. Raises `UserError` where the global batch does not split evenly."""
    size, micro = train.global_batch_size, train.micro_batch_size
    if train.reproducible:
        return _check_reproducible(size, micro, world_size)
    if micro is None:
        if size % world_size:
            raise UserError(
                f"train.global_batch_size={size} does not split over {world_size} ranks; use {_multiples(size, world_size)}"
            )
        return world_size
    if size % micro:
        raise UserError(
            f"train.global_batch_size={size} does not split into micro-batches of train.micro_batch_size={micro}; "
            f"use {_multiples(size, micro)} images a step"
        )
    if (size // micro) % world_size:
        raise UserError(
            f"train.global_batch_size={size} makes {size // micro} micro-batches of {micro} images, which do not split over "
            f"{world_size} ranks; use {_multiples(size, micro * world_size)} images a step, or another number of ranks"
        )
    return size // micro


def _check_reproducible(size: int, micro: int | None, world_size: int) -> int:
    """The number of micro-batches a step, where it and the number of ranks are to be powers of two."""
    if micro is None:
        raise UserError(
            "train.reproducible=true with train.micro_batch_size=null, by which results depend on the number of ranks: "
            "set train.micro_batch_size"
        )
    count = size // micro
    if size % micro or not is_power_of_two(count):
        whole = [n for n in (2**i for i in range(size.bit_length())) if size % n == 0]
        raise UserError(
            f"train.reproducible=true needs a power of two of micro-batches a step, found train.global_batch_size={size} / "
            f"train.micro_batch_size={micro} = {size / micro:g}: use train.micro_batch_size="
            f"{', '.join(str(size // n) for n in whole)}, or another train.global_batch_size"
        )
    if world_size not in (sizes := reproducible_world_sizes(count)):
        raise UserError(
            f"train.reproducible=true with {count} micro-batches a step serves {', '.join(map(str, sizes))} ranks, found "
            f"{world_size}: use one of these, or another train.micro_batch_size"
        )
    return count


def reproducible_world_sizes(num_micro_batches: int) -> list[int]:
    """The numbers of ranks over which `num_micro_batches`, a power of two, split into subtrees."""
    return [2**i for i in range(num_micro_batches.bit_length())]


def plan_batches(train: TrainConfig, world_size: int, num_images: int) -> BatchPlan:
    """The plan for `num_images` training images. Raises `UserError` where a step would be too small to split."""
    plan = BatchPlan(num_images, train.global_batch_size, check_batch_size(train, world_size), world_size)
    if 0 < (last := num_images % plan.global_batch_size) < plan.num_micro_batches:
        raise UserError(
            f"the last step of an epoch would have {last} images for {plan.num_micro_batches} micro-batches: {num_images} "
            f"training images with train.global_batch_size={plan.global_batch_size}; use another batch size or data.val_images"
        )
    return plan


def is_power_of_two(number: int) -> bool:
    """True for 1, 2, 4 ..."""
    return number > 0 and number & (number - 1) == 0


def _multiples(size: int, of: int) -> str:
    below = size // of * of
    return f"{below} or {below + of}" if below else str(of)


@dataclass(frozen=True)
class MicroBatchIndices:
    """One micro-batch: its index in the global batch, and (B,) int64 indices into the training split."""

    index: int
    indices: Tensor


@dataclass(frozen=True)
class StepIndices:
    """One rank's part of one step."""

    num_images: int
    """Images of the whole global batch, over all ranks."""
    micro_batches: tuple[MicroBatchIndices, ...]


class StepSampler:
    """Cuts each epoch's order into steps and gives this rank its micro-batches.

    The order is torch's `DistributedSampler`: micro-batch m sees what its replica m of V would, but for its padding.
    Each image is in exactly one micro-batch of an epoch, whatever the world size.
    """

    def __init__(self, plan: BatchPlan, rank: int, seed: int) -> None:
        self.plan = plan
        self.rank = rank
        # one replica is the whole order: V strided ones would shuffle it V times over, and pad it
        images = cast("Dataset[int]", range(plan.num_images))  # it asks for the length alone
        self.order: DistributedSampler[int] = DistributedSampler(
            images, num_replicas=1, rank=0, shuffle=True, seed=seed
        )

    def steps(self, epoch: int, first_step: int = 0, device: torch.device | None = None) -> Iterator[StepIndices]:
        """This rank's part of the epoch's steps from `first_step` on; earlier ones are sliced off, not read.

        Indices are on `device`, where the epoch's order is sent whole; or on the CPU.
        """
        self.order.set_epoch(epoch)  # without it every epoch replays the first one's order
        order = torch.tensor(list(self.order)).to(device)
        plan = self.plan
        first = self.rank * plan.grad_accum_steps
        for step in range(first_step, plan.steps_per_epoch):
            batch = order[step * plan.global_batch_size : (step + 1) * plan.global_batch_size]
            micro_batches = tuple(
                MicroBatchIndices(m, batch[m :: plan.num_micro_batches])
                for m in range(first, first + plan.grad_accum_steps)
            )
            yield StepIndices(len(batch), micro_batches)

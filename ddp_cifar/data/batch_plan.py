"""The split of a step into micro-batches and ranks."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddp_cifar.command import counted, span
from ddp_cifar.config import TrainConfig
from ddp_cifar.errors import UserError

FEW_STEPS = 10  # per epoch; with fewer, the default recipe hardly learns
FEW_IMAGES_PER_GPU = 32  # per step; with fewer, launching kernels takes longer than running them (docs/performance.md)
MAX_IDLE_SHARE = 0.1  # of a step; above it, `advice` suggests another micro-batch size


@dataclass(frozen=True)
class BatchPlan:
    """How a step's global batch is split, derived from the config, the number of ranks and the number of training images.

    No divisibility is needed: the sizes of a step's micro-batches differ by at most one image, and the ranks' numbers of
    micro-batches by at most one.
    """

    num_images: int
    """Number of training images."""
    global_batch_size: int
    """Images per step. The last step of an epoch has the remaining images."""
    num_micro_batches: int
    """Micro-batches per step (V). Micro-batch m contains positions m, m + V, m + 2V, ... of the global batch."""
    world_size: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_images // self.global_batch_size)

    @property
    def micro_batch_size(self) -> int:
        """Number of images in the largest micro-batch."""
        return self.micro_batch_sizes()[0]

    @property
    def grad_accum_steps(self) -> int:
        """Largest number of micro-batches per step on one rank."""
        return -(-self.num_micro_batches // self.world_size)

    @property
    def idle_share(self) -> float:
        """Fraction (0 to 1) of a full step in which ranks wait for those that have one more micro-batch."""
        return 1 - self.num_micro_batches / (self.grad_accum_steps * self.world_size)

    def micro_batches(self, num_images: int) -> int:
        """Return the number of micro-batches in a step of `num_images`; none is empty."""
        return min(self.num_micro_batches, num_images)

    def images_of(self, step: int) -> range:
        """Return the positions of step `step` of an epoch in the epoch's order of images."""
        first = step * self.global_batch_size
        return range(first, min(first + self.global_batch_size, self.num_images))

    def shares(self, num_images: int) -> tuple[range, ...]:
        """Return each rank's micro-batches in a step of `num_images`; a rank may have none."""
        return split_over_ranks(self.micro_batches(num_images), self.world_size)

    def micro_batch_sizes(self) -> list[int]:
        """Return the distinct sizes of micro-batches in an epoch, in full steps and the last step, largest first."""
        steps = {min(self.global_batch_size, self.num_images), self.num_images % self.global_batch_size} - {0}
        return sorted({size for images in steps for size in self.sizes(images)}, reverse=True)

    def sizes(self, num_images: int) -> list[int]:
        """Return the sizes of the micro-batches in a step of `num_images`, largest first."""
        count = self.micro_batches(num_images)
        size, larger = divmod(num_images, count)
        return [size + 1] * larger + [size] * (count - larger)

    def images_per_rank(self) -> list[int]:
        """Return the number of images per rank in a full step."""
        num_images = min(self.global_batch_size, self.num_images)
        sizes = self.sizes(num_images)
        return [sum(sizes[m] for m in share) for share in self.shares(num_images)]

    def __str__(self) -> str:
        num_images = min(self.global_batch_size, self.num_images)
        counts = [len(share) for share in self.shares(num_images)]
        images = counted(_span_of(self.sizes(num_images)), "image")
        each = f" ({_span_of(self.images_per_rank())} per rank)" if max(counts) > 1 and self.world_size > 1 else ""
        return (
            f"{counted(self.global_batch_size, 'image')} per step = {counted(self.world_size, 'rank')} x "
            f"{_micro_batches(_span_of(counts))} of {images}{each}; {counted(self.steps_per_epoch, 'step')} per epoch of "
            f"{counted(self.num_images, 'image')}"
        )


def _micro_batches(number: int | str) -> str:
    return counted(number, "micro-batch", "micro-batches")


def _span_of(numbers: Sequence[int]) -> str:
    return span(min(numbers), max(numbers))


@functools.cache
def split_over_ranks(num_micro_batches: int, world_size: int) -> tuple[range, ...]:
    """Return each rank's micro-batches: consecutive ones, whose number differs by at most one between ranks.

    The ranks with the larger shares are chosen so that the largest number of subtrees (`subtrees`) on a rank is minimal,
    and then their total, because each subtree is sent: 8 over 5 ranks is 0-1, 2-3, 4-5, 6, 7, one subtree each.
    """
    size, larger = divmod(num_micro_batches, world_size)
    counts = functools.cache(lambda first, count: len(subtrees(range(first, first + count), num_micro_batches)))
    for most in itertools.count(1):
        # number of larger shares so far -> (subtrees, (last share, previous entry)) of the best split of the ranks so far
        best: dict[int, tuple[int, Any]] = {0: (0, None)}
        for rank in range(world_size):
            longer: dict[int, tuple[int, Any]] = {}
            for used, (total, before) in best.items():
                for extra in (1, 0):
                    # the remaining ranks must be able to take the remaining larger shares
                    if not 0 <= larger - used - extra <= world_size - rank - 1:
                        continue
                    first = rank * size + used
                    count = counts(first, size + extra)
                    known = longer.get(used + extra)
                    if count <= most and (known is None or total + count < known[0]):
                        longer[used + extra] = total + count, (range(first, first + size + extra), before)
            best = longer
        if best:
            break
    shares = []
    entry = best[larger][1]
    while entry:
        share, entry = entry
        shares.append(share)
    return tuple(reversed(shares))


def check_batch_size(train: TrainConfig, world_size: int) -> int:
    """Return the number of micro-batches per step. Raises `UserError` if a step cannot be split over `world_size` ranks."""
    size, micro = train.global_batch_size, train.micro_batch_size
    if world_size > size:
        raise UserError(
            f"train.global_batch_size={size} is less than the number of ranks ({world_size}): use "
            f"train.global_batch_size={world_size} or more, or at most {size} ranks"
        )
    if micro is None and train.reproducible:
        raise UserError(
            "train.reproducible=true cannot be combined with train.micro_batch_size=null, with which results depend on the "
            "number of ranks: set train.micro_batch_size"
        )
    fixed = 1 if micro is None else -(-size // micro)
    if train.reproducible and world_size > fixed:
        raise UserError(
            f"train.reproducible=true with {_micro_batches(fixed)} per step supports at most {counted(fixed, 'rank')}, found "
            f"{world_size}: use train.micro_batch_size={micro_batch_size_for(size, world_size)} or less, or fewer ranks"
        )
    return max(fixed, world_size)


def micro_batch_size_for(global_batch_size: int, num_micro_batches: int) -> int:
    """Return the size of the largest micro-batch if a step is split evenly into at least `num_micro_batches`."""
    largest = global_batch_size if num_micro_batches == 1 else (global_batch_size - 1) // (num_micro_batches - 1)
    count = -(-global_batch_size // largest)
    return -(-global_batch_size // count)


def plan_batches(train: TrainConfig, world_size: int, num_images: int) -> BatchPlan:
    """Return the plan for `num_images` training images. Raises `UserError` as `check_batch_size` does."""
    return BatchPlan(num_images, train.global_batch_size, check_batch_size(train, world_size), world_size)


def larger_micro_batches(train: TrainConfig, plan: BatchPlan) -> str:
    """Return a setting `key=value` with which every micro-batch of an epoch has at least two images; "" if none is found."""

    def works(setting: str, size: int) -> bool:
        changed = dataclasses.replace(train, **{setting: size})  # type: ignore[arg-type]
        try:
            return min(plan_batches(changed, plan.world_size, plan.num_images).micro_batch_sizes()) > 1
        except UserError:
            return False

    size, micro = train.global_batch_size, train.micro_batch_size
    settings = [("global_batch_size", near) for d in range(1, size + 1) for near in (size - d, size + d) if near > 0]
    if micro is not None:
        settings += [("micro_batch_size", larger) for larger in range(micro + 1, size + 1)]
    return next((f"train.{setting}={value}" for setting, value in settings if works(setting, value)), "")


def advice(train: TrainConfig, plan: BatchPlan, *, on_gpus: bool) -> list[str]:
    """Return warnings about a plan, one line each."""
    size, micro, ranks = train.global_batch_size, train.micro_batch_size, plan.world_size
    lines = []
    if plan.steps_per_epoch < FEW_STEPS:
        lines.append(
            f"{plan.num_images} images make only {counted(plan.steps_per_epoch, 'step')} per epoch: for more steps, reduce "
            f"train.global_batch_size"
        )
    if micro is None:
        lines.append(
            "train.micro_batch_size is null: BatchNorm and dropout, and therefore the results, depend on the number of ranks"
        )
    elif ranks > (fixed := -(-size // micro)):
        same = micro_batch_size_for(size, ranks)
        sees = counted(_span_of(plan.sizes(min(size, plan.num_images))), "image")
        lines.append(
            f"{ranks} ranks are more than the {_micro_batches(fixed)} per step of train.micro_batch_size={micro}: BatchNorm now "
            f"sees {sees} per micro-batch, and results differ from those on {counted(span(1, fixed), 'rank')}. With "
            f"train.micro_batch_size={same} results are the same on 1 to {-(-size // same)} ranks; "
            f"train.global_batch_size={ranks * min(micro, size)} keeps {counted(min(micro, size), 'image')} per micro-batch"
        )
    if micro is not None and plan.idle_share > MAX_IDLE_SHARE:
        even = next(
            (m for m in range(min(micro, size) - 1, 1, -1) if _idle_share(train, m, plan) <= MAX_IDLE_SHARE), None
        )
        lines.append(
            f"{ranks} ranks have {_span_of([len(share) for share in plan.shares(size)])} of {plan.num_micro_batches} "
            f"micro-batches each, and a rank waits for {plan.idle_share:.0%} of a step on average"
            + (
                f": train.micro_batch_size={even} splits it more evenly, but changes the batches of BatchNorm"
                if even
                else ""
            )
        )
    if on_gpus and min(plan.images_per_rank()) < FEW_IMAGES_PER_GPU:
        lines.append(
            f"{counted(_span_of(plan.images_per_rank()), 'image')} per GPU and step are too few for good utilization: increase "
            f"train.global_batch_size, scale optim.lr with it, and set optim.warmup_epochs (docs/batch-size.md)"
        )
    return lines


def _idle_share(train: TrainConfig, micro_batch_size: int, plan: BatchPlan) -> float:
    """Return the `idle_share` of the plan with another micro-batch size."""
    changed = dataclasses.replace(train, micro_batch_size=micro_batch_size)
    return plan_batches(changed, plan.world_size, plan.num_images).idle_share


def subtrees(leaves: range, num_leaves: int) -> list[range]:
    """Return the fewest subtrees of a tree over `num_leaves` that cover these consecutive leaves, from left to right."""
    found, first = [], leaves.start
    while first < leaves.stop:
        size = 1
        while (
            size < leaves.stop - first and first % (2 * size) == 0 and min(first + 2 * size, num_leaves) <= leaves.stop
        ):
            size *= 2
        found.append(range(first, min(first + size, num_leaves)))
        first = found[-1].stop
    return found

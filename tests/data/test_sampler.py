"""The order of images, and its split into steps, micro-batches and ranks."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from ddp_cifar.config import TrainConfig
from ddp_cifar.data.batch_plan import advice, plan_batches
from ddp_cifar.data.sampler import StepSampler


def epoch_of(
    num_images: int, world_size: int, *, batch: int = 16, micro: int = 4, epoch: int = 3
) -> list[dict[int, Tensor]]:
    """A dict per step, micro-batch index -> indices, over all ranks."""
    plan = plan_batches(TrainConfig(global_batch_size=batch, micro_batch_size=micro), world_size, num_images)
    steps: list[dict[int, Tensor]] = [{} for _ in range(plan.steps_per_epoch)]
    for rank in range(world_size):
        for step, part in enumerate(StepSampler(plan, rank, seed=7).steps(epoch)):
            for m in part.micro_batches:
                assert m.index not in steps[step]
                steps[step][m.index] = m.indices
    return steps


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_image_is_in_exactly_one_micro_batch_of_an_epoch(world_size: int) -> None:
    seen = torch.cat([indices for step in epoch_of(70, world_size) for indices in step.values()])
    assert sorted(seen.tolist()) == list(range(70))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_micro_batches_do_not_depend_on_the_world_size(world_size: int) -> None:
    for one, several in zip(epoch_of(70, 1), epoch_of(70, world_size), strict=True):
        assert one.keys() == several.keys()
        assert all(torch.equal(one[m], several[m]) for m in one)


@pytest.mark.parametrize("batch", [7, 16, 30])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
def test_micro_batches_differ_by_at_most_one_image_and_ranks_by_one_micro_batch(batch: int, world_size: int) -> None:
    for num_images in (70, 72, 99):
        plan = plan_batches(TrainConfig(global_batch_size=batch, micro_batch_size=4), world_size, num_images)
        assert plan.num_micro_batches == max(math.ceil(batch / 4), world_size)
        steps = epoch_of(num_images, world_size, batch=batch)
        for step in steps:
            sizes = sorted((len(indices) for indices in step.values()), reverse=True)
            assert sizes == plan.sizes(sum(sizes))
            assert sizes[0] - sizes[-1] <= 1
            shares = [len(share) for share in plan.shares(sum(sizes))]
            assert max(shares) - min(shares) <= 1
        assert (
            sorted({len(indices) for step in steps for indices in step.values()}, reverse=True)
            == plan.micro_batch_sizes()
        )
        assert sum(plan.images_per_rank()) == batch


def test_a_suggested_micro_batch_size_reduces_the_idle_share() -> None:
    for size, micro, world_size in itertools.product(range(1, 34), range(1, 34), range(1, 9)):
        if world_size <= size:
            train = TrainConfig(global_batch_size=size, micro_batch_size=micro)
            plan = plan_batches(train, world_size, 50)
            for found in re.findall(r"train.micro_batch_size=(\d+) splits", "".join(advice(train, plan, on_gpus=True))):
                better = plan_batches(dataclasses.replace(train, micro_batch_size=int(found)), world_size, 50)
                assert better.idle_share <= 0.1 < plan.idle_share


def test_micro_batch_m_of_v_has_the_images_of_replica_m_of_v_of_distributed_sampler() -> None:
    steps = epoch_of(64, 2)
    for m in range(4):
        sampler = DistributedSampler(range(64), num_replicas=4, rank=m, seed=7)
        sampler.set_epoch(3)
        assert torch.cat([step[m] for step in steps]).tolist() == list(sampler)


def test_resuming_within_an_epoch_gives_the_remaining_steps() -> None:
    plan = plan_batches(TrainConfig(global_batch_size=16, micro_batch_size=4), 1, 70)
    whole, rest = (list(StepSampler(plan, 0, seed=1).steps(0, first)) for first in (0, 3))
    assert len(rest) == 2
    for a, b in zip(whole[3:], rest, strict=True):
        assert all(torch.equal(x.indices, y.indices) for x, y in zip(a.micro_batches, b.micro_batches, strict=True))


def test_every_epoch_and_seed_has_a_different_order() -> None:
    plan = plan_batches(TrainConfig(global_batch_size=64, micro_batch_size=64), 1, 64)
    orders = {
        tuple(next(StepSampler(plan, 0, seed).steps(epoch)).micro_batches[0].indices.tolist())
        for seed, epoch in [(0, 0), (0, 1), (5, 0)]
    }
    assert len(orders) == 3


def test_oversampling_draws_all_classes_equally_often_and_repeats_no_image_needlessly() -> None:
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 9 + [5])
    plan = plan_batches(TrainConfig(global_batch_size=16, micro_batch_size=4), 1, len(labels))
    sampler = StepSampler(plan, 0, 3, labels)
    order = sampler.order(0)
    drawn = torch.bincount(order, minlength=100)
    assert torch.bincount(labels[order]).tolist() == [25, 25, 25, 0, 0, 25]
    assert drawn[:70].max() == 1
    assert sorted(set(drawn[70:90].tolist())) == [1, 2]
    assert torch.equal(order, sampler.order(0))
    assert not torch.equal(order, sampler.order(1))
    trained = torch.cat([micro.indices for step in sampler.steps(0) for micro in step.micro_batches])
    assert sorted(trained.tolist()) == sorted(order.tolist())

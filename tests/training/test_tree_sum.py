"""Sums in a fixed binary tree."""

import re

import pytest
import torch
from launched import CHECKOUT
from ranks import RankPool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_cifar.config import TrainConfig
from ddp_cifar.data.batch_plan import check_batch_size, split_over_ranks
from ddp_cifar.distributed.rendezvous import open_world
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError
from ddp_cifar.training.buffers import BufferMean, sum_rows
from ddp_cifar.training.tree_sum import TreeReduction, TreeSum, rows_of


def tree(values: list[Tensor]) -> Tensor:
    """Return the expected sum by recursion. The left half is the largest power of two below the number of values."""
    if len(values) == 1:
        return values[0]
    left = 2 ** ((len(values) - 1).bit_length() - 1)
    return tree(values[:left]) + tree(values[left:])


def test_tree_sum_adds_in_the_order_of_the_tree() -> None:
    for count in range(1, 18):
        values = list(torch.randn(count, 1000) * 10.0 ** torch.randint(-6, 6, (count, 1000)))
        summed = TreeSum(count)
        for i, value in enumerate(values):
            summed.add(range(i, i + 1), [value.clone(), -value])
        ((leaves, total),) = summed.sums
        assert leaves == range(count)
        assert torch.equal(total[0], tree(values))
        assert torch.equal(total[1], -tree(values))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 8, 12, 13, 16])
def test_micro_batches_are_split_evenly_and_the_subtrees_match_those_of_tree_sum(count: int) -> None:
    for world_size in range(1, count + 3):
        shares = split_over_ranks(count, world_size)
        assert [m for share in shares for m in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        for share, rows in zip(shares, rows_of(shares), strict=True):
            counted = TreeSum(count)
            for m in share:
                counted.add(range(m, m + 1), [torch.zeros(1)])
            assert [leaves for leaves, _ in counted.sums] == rows


def test_the_number_of_subtrees_sent_matches_the_docs() -> None:
    page = (CHECKOUT / "docs" / "reproducibility.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d, ]+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for micro_batches, counts in rows:
        for world_size, expected in enumerate(map(int, counts.split(", ")), start=2):
            shares = split_over_ranks(int(micro_batches), world_size)
            assert max(map(len, rows_of(shares))) == expected, (micro_batches, world_size)
    assert [len(share) for share in split_over_ranks(7, 3)] == [2, 2, 3], "the position of the larger share decides"


def reduce_gradients(world: World, micro_batches: int, numbers: int) -> list[Tensor]:
    """Return the reduced gradients of a model in several buckets, and their expected sum.

    The loss is a sum of products, so the gradients are `values`. Bucket sizes are not divisible by the number of ranks.
    """
    torch.manual_seed(0)
    values = torch.randn(micro_batches, numbers) * 10.0 ** torch.randint(-6, 6, (micro_batches, numbers))
    model = nn.Module()
    sizes = [numbers // 2, numbers - numbers // 2 - 1, 1]
    for i, size in enumerate(sizes):
        model.register_parameter(f"weight{i}", nn.Parameter(torch.zeros(size)))
    model.forward = lambda value: sum(  # type: ignore[method-assign]
        (parameter * part).sum() for parameter, part in zip(model.parameters(), value.split(sizes), strict=True)
    )
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.001, gradient_as_bucket_view=True)
    reduction = TreeReduction(world, ddp)
    shares = split_over_ranks(micro_batches, world.world_size)
    own = shares[world.rank]
    for _ in range(2):  # DDP rebuilds its buckets after the first pass
        model.zero_grad()
        reduction.begin_step(shares)
        for i in own:
            with ddp.no_sync() if i != own[-1] else torch.enable_grad():
                ddp(values[i]).backward()
            reduction.end_micro_batch(i)
        if not own:
            ddp(torch.full_like(values[0], torch.nan)).backward()  # must not affect the sum
        reduction.end_step()
    return [torch.cat([parameter.grad for parameter in model.parameters()]), tree(list(values))]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_gradients_are_summed_in_the_tree_for_any_buckets(ranks: RankPool, world_size: int) -> None:
    for micro_batches in (1, 3, 4, 6, 7, 8, 11):
        for summed, expected in ranks.run(reduce_gradients, world_size, micro_batches, 1003):
            assert torch.equal(summed, expected), micro_batches


@pytest.mark.gpu
def test_with_nccl_the_sum_runs_on_a_separate_stream() -> None:
    with open_world("cuda") as world:
        reduction = TreeReduction(world, DistributedDataParallel(nn.Linear(3, 3).to(world.device)))
        group = world.new_group("test")
        reduction.groups = (group, group)
        reduction.begin_step([range(3)])
        values = torch.randn(1001, device=world.device)
        expected = values.clone()
        reduction.sum_async([values], values)()
        assert torch.equal(values, expected)


def test_buffers_are_summed_in_the_tree(alone: World) -> None:
    model = nn.BatchNorm1d(3)
    mean = BufferMean(model, 5, sum_rows(alone))
    mean.begin_step(5)
    start, changes = mean.floats[0].clone(), []
    for i in range(5):
        mean.begin_micro_batch()
        model(torch.randn(8, 3))
        changes.append((mean.floats[0] - start) * 0.2)
        mean.end_micro_batch(i, 0.2)
    mean.start_reducing()()
    assert torch.equal(mean.floats[0], start + tree(changes))


@pytest.mark.parametrize(
    ("size", "micro", "world_size", "message"),
    [
        (512, None, 2, "train.micro_batch_size=null, with which results depend on the number of ranks: set"),
        (
            512,
            64,
            9,
            "with 8 micro-batches per step supports at most 8 ranks, found 9: use train.micro_batch_size=57 or less, or fewer",
        ),
        (
            100,
            30,
            5,
            "with 4 micro-batches per step supports at most 4 ranks, found 5: use train.micro_batch_size=20 or less",
        ),
        (512, 64, 513, "train.global_batch_size=512 is less than the number of ranks (513): use"),
    ],
)
def test_a_number_of_ranks_that_the_tree_does_not_support_is_rejected_with_one_that_it_does(
    size: int, micro: int | None, world_size: int, message: str
) -> None:
    train = TrainConfig(global_batch_size=size, micro_batch_size=micro, reproducible=True)
    with pytest.raises(UserError) as error:
        check_batch_size(train, world_size)
    assert message in str(error.value)

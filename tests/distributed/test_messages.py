"""Communication of gradients: hooks and buckets."""

from typing import Any

import pytest
import torch
from helpers import SMALL, config_of, make_trainer, random_dataset, take_step, trained
from ranks import RankPool
from torch import nn

from ddp_cifar.distributed.world import World


def rounded_gradients(world: World, hook: str) -> tuple[bool, float]:
    """Whether all ranks have the same gradients with a hook, and their relative distance from gradients without one."""
    norms = []
    for name in ("none", hook):
        torch.manual_seed(0)
        ddp = world.wrap(nn.Linear(1000, 1000), bucket_mb=1, hook=name)
        torch.manual_seed(world.rank)
        ddp(torch.randn(8, 1000)).square().sum().backward()
        norms.append(torch.cat([p.grad.flatten() for p in ddp.parameters() if p.grad is not None]))
    exact, rounded = norms
    prints = world.gather([int(rounded.view(torch.int32).long().sum())])
    return len({value for (value,) in prints}) == 1, float((rounded - exact).norm() / exact.norm())


@pytest.mark.parametrize(("hook", "bits"), [("fp16", 11), ("bf16", 8)])
def test_a_hook_rounds_gradients_equally_on_all_ranks(ranks: RankPool, hook: str, bits: int) -> None:
    for equal, distance in ranks.run(rounded_gradients, 2, hook):
        assert equal
        assert 2.0 ** -(bits + 3) < distance < 2.0**-bits


def buckets(world: World, *arguments: str) -> int:
    config = config_of(*SMALL, "model.name=cnn", "train.global_batch_size=16", *arguments)
    trainer = make_trainer(world, config, random_dataset(44))
    sent = []

    def count(_, bucket):  # type: ignore[no-untyped-def]  # DDP accepts only its own annotations
        sent.append(bucket.buffer().numel())
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    trainer.train_step.ddp.register_comm_hook(None, count)  # type: ignore[union-attr, operator]
    take_step(trainer, next(trainer.train_loader.steps(0)))
    return len(sent)


def test_small_buckets_send_more_messages(ranks: RankPool) -> None:
    (large,), (small,) = (ranks.run(buckets, 1, f"comm.bucket_mb={size}") for size in (100, 1))
    assert large <= 2 < small


def test_training_works_with_a_hook(ranks: RankPool) -> None:
    exact, rounded = (ranks.run(trained, 2, f"comm.hook={hook}")[0][1] for hook in ("none", "bf16"))
    assert [row["train/loss"] for row in rounded[:1]] == [row["train/loss"] for row in exact[:1]]
    assert rounded[-1]["fingerprint"] != exact[-1]["fingerprint"]

"""Sums over images."""

import pytest
import torch

from ddp_cifar.distributed.world import World
from ddp_cifar.training.totals import LOSS_UNIT, ImageCounter, Totals


def test_sums_of_losses_do_not_depend_on_their_order(alone: World) -> None:
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 8 * 20
    logits, labels = torch.zeros(1000, 10), torch.zeros(1000, dtype=torch.long)
    sums = set()
    for order in (torch.arange(1000), torch.arange(999, -1, -1), losses.argsort()):
        counter = ImageCounter(alone.device)
        for part in order.split(37):
            counter.add(losses[part], logits[part], labels[part])
        sums.add(counter.reduce(alone))
    (totals,) = sums
    assert totals.loss == pytest.approx(losses.double().sum().item(), abs=1000 * LOSS_UNIT)
    assert totals.correct == totals.images == 1000


def test_losses_that_are_not_finite_are_counted_separately(alone: World) -> None:
    counter = ImageCounter(alone.device)
    losses = torch.tensor([1.0, float("nan"), float("inf"), 2.0])
    counter.add(losses, torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
    totals = counter.reduce(alone)
    assert totals.nonfinite == 2
    assert totals.loss_units * LOSS_UNIT == 3.0
    assert torch.tensor(totals.mean_loss).isnan()
    assert Totals() + totals == totals

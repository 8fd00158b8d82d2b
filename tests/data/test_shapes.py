"""The generated data set."""

import pytest
import torch
import torch.nn.functional as F
from helpers import config_of
from ranks import RankPool

from ddp_cifar.data import build_dataset
from ddp_cifar.data.dataset import DataSet
from ddp_cifar.data.shapes import FORMS
from ddp_cifar.distributed.world import World


def shapes(world: World, *arguments: str) -> DataSet:
    return build_dataset(config_of("data.name=shapes", *arguments).data, world)


def test_the_same_seed_gives_the_same_shapes(alone: World) -> None:
    small = ("data.shapes.train_images=50", "data.shapes.test_images=20")
    one, same, other = shapes(alone, *small), shapes(alone, *small), shapes(alone, *small, "data.shapes.seed=1")
    assert torch.equal(one.train.images, same.train.images)
    assert not torch.equal(one.train.images, other.train.images)
    assert one.train.images.shape == (50, 3, 32, 32)
    assert torch.bincount(one.train.labels).tolist() == [5] * 10
    assert one.classes == tuple(FORMS)


def test_ranks_that_share_the_drawing_get_the_images_of_one(alone: World, ranks: RankPool) -> None:
    """Seven blocks of at most 100 images, of which one rank draws three."""
    for drawn in ranks.run(_checksum, 3):
        assert drawn == _checksum(alone)


def _checksum(world: World) -> tuple[str, str]:
    color = shapes(world, "data.shapes.train_images=550", "data.shapes.test_images=20")
    gray = shapes(world, "data.shapes.train_images=550", "data.shapes.test_images=20", "data.channels=1")
    return color.describe(), gray.describe()


@pytest.mark.slow
def test_a_linear_model_is_far_less_accurate_than_the_cnn_on_shapes(alone: World) -> None:
    """The CNN of the demo reaches 95 %; logistic regression, trained to convergence, stays below 50 %."""
    dataset = shapes(alone)
    train, test = ((split.images.flatten(1).float() / 255 - 0.5) for split in (dataset.train, dataset.test))
    torch.manual_seed(0)
    linear = torch.nn.Linear(3072, 10)
    optimizer = torch.optim.Adam(linear.parameters(), 1e-3, weight_decay=1e-3)
    for _ in range(20):
        for batch in torch.randperm(len(train)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(linear(train[batch]), dataset.train.labels[batch]).backward()
            optimizer.step()
    accuracy = (linear(test).argmax(1) == dataset.test.labels).float().mean()
    assert accuracy < 0.5

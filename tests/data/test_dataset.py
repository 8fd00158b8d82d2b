"""Splits, and the check for equal data on every rank. User errors in the data are in test_mistakes.py."""

import dataclasses

import pytest
import torch
from helpers import random_dataset
from ranks import RankPool

from ddp_cifar.config import DataConfig, ShapesConfig
from ddp_cifar.data import build_dataset
from ddp_cifar.data.dataset import Moments
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError


def test_held_out_images_are_removed_from_training_and_do_not_depend_on_the_seed() -> None:
    dataset = random_dataset(100, val=30)
    assert dataset.val is not None
    ids = torch.cat([dataset.train.sample_ids, dataset.val.sample_ids])
    assert sorted(ids.tolist()) == list(range(100))
    again = random_dataset(100, val=30).val
    assert again is not None
    assert torch.equal(dataset.val.sample_ids, again.sample_ids)


def test_a_class_cannot_lose_all_its_training_images() -> None:
    dataset = random_dataset(40)
    rare = dataclasses.replace(dataset.train, labels=(torch.arange(40) == 7).long())
    dataset = dataclasses.replace(dataset, train=rare)
    message = f"data.val_images=39 holds out all training images of {dataset.classes[1]}: use fewer"
    with pytest.raises(UserError, match=message):
        dataset.hold_out(39)


def test_splits_share_one_tensor_of_images_on_a_device() -> None:
    dataset = random_dataset(40, val=10).to(torch.device("meta"))
    assert dataset.val is not None
    assert dataset.train.images is dataset.val.images


def test_pixel_moments_are_exact_on_any_split_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(256, (7, 2, 5, 3), dtype=torch.uint8)
    moments = Moments.of(images)
    monkeypatch.setattr("ddp_cifar.data.dataset.CHUNK_BYTES", 2 * images[0].numel())
    assert Moments.of(images) == moments
    values = images.double() / 255
    assert moments.mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert moments.std == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), abs=1e-12)
    assert Moments.of(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8)).std == (
        1 / 255,
    )  # not 0, by which pixels are divided


def test_held_out_images_count_in_the_pixel_moments() -> None:
    assert random_dataset(40, val=10).pixel_moments == random_dataset(40).pixel_moments


def test_a_run_whose_ranks_read_different_data_does_not_start(ranks: RankPool) -> None:
    """For example, data.root is a local disk of each node."""
    messages = ranks.run(read_by_rank, 2, [100, 200])
    assert all("ranks have read different data: rank 0 has 100 train" in message for message in messages)
    assert "rank 1 on" in messages[1]
    assert "has 200 train" in messages[1]
    assert ranks.run(read_by_rank, 2, [100, 100]) == ["", ""]


def read_by_rank(world: World, train_images: list[int]) -> str:
    shapes = ShapesConfig(train_images=train_images[world.rank], test_images=10)
    try:
        build_dataset(DataConfig(name="shapes", shapes=shapes), world)
    except UserError as error:
        return str(error)
    return ""

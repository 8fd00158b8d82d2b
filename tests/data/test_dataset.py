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


def test_an_image_of_each_class_is_left_to_train_on() -> None:
    dataset = random_dataset(40)
    rare = dataclasses.replace(dataset.train, labels=(torch.arange(40) == 7).long())
    dataset = dataclasses.replace(dataset, train=rare)
    for val_images in range(1, 39):
        held_out = dataset.hold_out(val_images)
        assert held_out.val is not None
        assert len(held_out.val) == val_images
        assert sorted(held_out.train.labels.unique().tolist()) == [0, 1]
        assert sorted([*held_out.train.sample_ids.tolist(), *held_out.val.sample_ids.tolist()]) == list(range(40))
    with pytest.raises(
        UserError, match=r"data.val_images=39 leaves too few of the 40 training images.* use at most 38"
    ):
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

"""Order, augmentation, and the data sets. Mistakes in the data are in test_mistakes.py."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import config_of, random_dataset, random_split
from ranks import RankPool
from torch import Tensor
from torch.utils.data import DistributedSampler
from torchvision import transforms

from ddp_cifar.config import DataConfig, ShapesConfig, TrainConfig
from ddp_cifar.data import build_dataset
from ddp_cifar.data.augment import MEAN, STD, augment, draw_augmentations, normalize
from ddp_cifar.data.dataset import DataSet
from ddp_cifar.data.loader import EvalLoader
from ddp_cifar.data.sampler import StepSampler, plan_batches
from ddp_cifar.data.shapes import FORMS
from ddp_cifar.distributed import World
from ddp_cifar.errors import UserError

# -- order


def epoch_of(
    num_images: int, world_size: int, *, batch: int = 16, micro: int = 4, epoch: int = 3
) -> list[dict[int, Tensor]]:
    """For each step, micro-batch index -> indices, over all ranks."""
    plan = plan_batches(TrainConfig(global_batch_size=batch, micro_batch_size=micro), world_size, num_images)
    steps: list[dict[int, Tensor]] = [{} for _ in range(plan.steps_per_epoch)]
    for rank in range(world_size):
        for step, part in enumerate(StepSampler(plan, rank, seed=7).steps(epoch)):
            for m in part.micro_batches:
                assert m.index not in steps[step]
                steps[step][m.index] = m.indices
    return steps


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_image_is_in_one_micro_batch_of_an_epoch(world_size: int) -> None:
    seen = torch.cat([indices for step in epoch_of(70, world_size) for indices in step.values()])
    assert sorted(seen.tolist()) == list(range(70))


@pytest.mark.parametrize("world_size", [2, 4])
def test_micro_batches_do_not_depend_on_the_world_size(world_size: int) -> None:
    for one, several in zip(epoch_of(70, 1), epoch_of(70, world_size), strict=True):
        assert one.keys() == several.keys()
        assert all(torch.equal(one[m], several[m]) for m in one)


def test_micro_batch_m_of_v_sees_what_replica_m_of_v_of_distributed_sampler_does() -> None:
    steps = epoch_of(64, 2)
    for m in range(4):
        sampler = DistributedSampler(range(64), num_replicas=4, rank=m, seed=7)
        sampler.set_epoch(3)
        assert torch.cat([step[m] for step in steps]).tolist() == list(sampler)


def test_going_on_in_mid_epoch_gives_the_rest_of_its_steps() -> None:
    plan = plan_batches(TrainConfig(global_batch_size=16, micro_batch_size=4), 1, 70)
    whole, rest = (list(StepSampler(plan, 0, seed=1).steps(0, first)) for first in (0, 3))
    assert len(rest) == 2
    for a, b in zip(whole[3:], rest, strict=True):
        assert all(torch.equal(x.indices, y.indices) for x, y in zip(a.micro_batches, b.micro_batches, strict=True))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    plan = plan_batches(TrainConfig(global_batch_size=64, micro_batch_size=64), 1, 64)
    orders = {
        tuple(next(StepSampler(plan, 0, seed).steps(epoch)).micro_batches[0].indices.tolist())
        for seed, epoch in [(0, 0), (0, 1), (5, 0)]
    }
    assert len(orders) == 3


def test_held_out_images_leave_training_and_do_not_depend_on_the_seed() -> None:
    dataset = random_dataset(100, val=30)
    assert dataset.val is not None
    ids = torch.cat([dataset.train.sample_ids, dataset.val.sample_ids])
    assert sorted(ids.tolist()) == list(range(100))
    again = random_dataset(100, val=30).val
    assert again is not None
    assert torch.equal(dataset.val.sample_ids, again.sample_ids)


# -- augmentation


def test_a_crop_is_torchvisions_and_the_normalisation_too() -> None:
    images = random_split(50).images
    table = draw_augmentations(50, seed=1, epoch=2)
    ours = normalize(augment(images, table))
    finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    for image, (top, left, mirrored), result in zip(images, table.tolist(), ours, strict=True):
        picture = transforms.functional.to_pil_image(image)
        picture = transforms.functional.pad(picture, [4])
        picture = transforms.functional.crop(picture, top, left, 32, 32)
        picture = transforms.functional.hflip(picture) if mirrored else picture
        assert torch.allclose(finish(picture), result, atol=1e-6)


def test_an_images_augmentation_depends_on_seed_epoch_and_id_alone() -> None:
    table = draw_augmentations(100, seed=1, epoch=2)
    assert torch.equal(table, draw_augmentations(100, seed=1, epoch=2))
    assert not torch.equal(table, draw_augmentations(100, seed=1, epoch=3))
    assert not torch.equal(table, draw_augmentations(100, seed=2, epoch=2))


def test_every_crop_and_both_mirrors_occur_equally_often() -> None:
    table = draw_augmentations(81_000, seed=0, epoch=0).long()
    assert table[:, :2].amin() == 0
    assert table[:, :2].amax() == 8
    for column, kinds in ((0, 9), (1, 9), (2, 2)):
        counts = torch.bincount(table[:, column], minlength=kinds).double() / len(table)
        assert torch.allclose(counts, torch.full_like(counts, 1 / kinds), atol=0.01)


def test_held_out_training_images_keep_their_augmentation(alone: World) -> None:
    """Augmentation goes by the sample id, not by the place in the split."""
    dataset = random_dataset(40, val=10)
    loader = EvalLoader(dataset.train, channels_last=False, device=alone.device)
    table = draw_augmentations(40, seed=0, epoch=0)
    images, _, _ = loader.gather(torch.tensor([5]), table)
    sample = int(dataset.train.sample_ids[5])
    whole = random_split(40).images
    assert torch.equal(images, normalize(augment(whole[sample : sample + 1], table[sample : sample + 1])))


# -- shapes


def shapes(world: World, *arguments: str) -> DataSet:
    return build_dataset(config_of("data.name=shapes", *arguments).data, world)


def test_shapes_are_the_same_from_the_same_seed(alone: World) -> None:
    small = ("data.shapes.train_images=50", "data.shapes.test_images=20")
    one, same, other = shapes(alone, *small), shapes(alone, *small), shapes(alone, *small, "data.shapes.seed=1")
    assert torch.equal(one.train.images, same.train.images)
    assert not torch.equal(one.train.images, other.train.images)
    assert one.train.images.shape == (50, 3, 32, 32)
    assert torch.bincount(one.train.labels).tolist() == [5] * 10
    assert one.classes == tuple(FORMS)


def test_a_linear_model_stays_far_below_the_cnn_on_shapes(alone: World) -> None:
    """The demo's CNN reaches 95 %; logistic regression, fitted well beyond need, stays under half."""
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


# -- CIFAR-10


def test_cifar10_is_read_from_disk_by_torchvision(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files' own form, a few random images in each; the real files' checksums are stood in for."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import calculate_md5

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, calculate_md5(str(folder / name))]

    def batch() -> dict[str, object]:
        return {"data": random.integers(256, size=(4, 3072), dtype=np.uint8), "labels": [0, 3, 9, 1]}

    names = [[name for name, _ in files] for files in (CIFAR10.train_list, CIFAR10.test_list)]
    monkeypatch.setattr(CIFAR10, "train_list", [write(name, batch()) for name in names[0]])
    first = batch()
    monkeypatch.setattr(CIFAR10, "test_list", [write(name, first) for name in names[1]])
    name, md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})

    dataset = build_dataset(DataConfig(name="cifar10", root=str(tmp_path)), alone)
    assert len(dataset.train) == 20
    assert dataset.test.labels.tolist() == [0, 3, 9, 1]
    pixels = torch.from_numpy(np.array(first["data"])).view(4, 3, 32, 32)
    assert torch.equal(dataset.test.images, pixels)


# -- several ranks


def test_splits_share_one_tensor_of_images_on_a_device() -> None:
    dataset = random_dataset(40, val=10).to(torch.device("meta"))
    assert dataset.val is not None
    assert dataset.train.images is dataset.val.images


def test_ranks_that_read_other_data_each_do_not_start(ranks: RankPool) -> None:
    """As where data.root is a disk of each node's own."""
    messages = ranks.run(read_by_rank, 2, [100, 200])
    assert all("the ranks do not read the same data: rank 0 has 100 train" in message for message in messages)
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


class Unsendable(Exception):
    def __init__(self) -> None:
        self.function = lambda: None


def test_an_error_that_cannot_be_sent_is_raised_on_every_rank_all_the_same(ranks: RankPool) -> None:
    assert ranks.run(fail_on_the_first, 2) == [["Unsendable()"] * 2] * 2


def fail_on_the_first(world: World) -> list[str]:
    def fail() -> None:
        raise Unsendable

    messages = []
    for together in (world.on_main, world.on_each_node):
        try:
            together(fail)
        except RuntimeError as error:
            messages.append(str(error))
    return messages

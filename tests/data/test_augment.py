"""Crop, flip, cutout, user-defined augmentation, mixup and cutmix."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from documented import modules_of
from helpers import config_of, make_trainer, random_dataset, random_split
from torch import Tensor
from torchvision import transforms

from ddp_cifar.config import AugmentConfig
from ddp_cifar.data.augment import Geometry, build_function, mix, soft_labels, transform
from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.data.loader import MicroBatch, TrainLoader
from ddp_cifar.data.normalization import VALUES, Normalization
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError

SHAPE = (3, 32, 32)
CIFAR = Normalization(**VALUES["cifar10"])


def geometry_of(**settings: Any) -> Geometry:
    return Geometry.of(AugmentConfig(**settings), SHAPE)


def test_crop_flip_and_normalization_match_torchvision() -> None:
    images, geometry = random_split(50).images, geometry_of()
    table = geometry.draw(50, SHAPE, seed=1, epoch=2)
    ours = CIFAR.normalize(geometry.crop_and_flip(images, table))
    finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CIFAR.mean, CIFAR.std)])
    for image, (top, left, flipped), result in zip(images, table.tolist(), ours, strict=True):
        picture = transforms.functional.to_pil_image(image)
        picture = transforms.functional.pad(picture, [4])
        picture = transforms.functional.crop(picture, top, left, 32, 32)
        picture = transforms.functional.hflip(picture) if flipped else picture
        assert torch.allclose(finish(picture), result, atol=1e-6)


def test_the_augmentation_of_an_image_depends_only_on_seed_epoch_and_id() -> None:
    geometry = geometry_of(cutout=8)
    table = geometry.draw(100, SHAPE, seed=1, epoch=2)
    assert torch.equal(table, geometry.draw(100, SHAPE, seed=1, epoch=2))
    assert not torch.equal(table, geometry.draw(100, SHAPE, seed=1, epoch=3))
    assert not torch.equal(table, geometry.draw(100, SHAPE, seed=2, epoch=2))
    # other settings do not change the crops
    assert torch.equal(table[:, :3], geometry_of().draw(100, SHAPE, seed=1, epoch=2))
    assert torch.equal(table[:, :2], geometry_of(flip=False).draw(100, SHAPE, seed=1, epoch=2)[:, :2])


def test_alternating_flips_show_both_sides_of_each_image_in_two_epochs() -> None:
    tables = [geometry_of(flip="alternate").draw(10_000, SHAPE, seed=1, epoch=epoch) for epoch in range(4)]
    flips = [table[:, 2] for table in tables]
    assert torch.equal(flips[0] + flips[1], torch.ones(10_000, dtype=torch.int32))
    assert torch.equal(flips[2], flips[0])
    assert torch.equal(flips[3], flips[1])
    assert 0.48 < flips[0].double().mean() < 0.52
    assert all(
        torch.equal(table[:, :2], geometry_of().draw(10_000, SHAPE, seed=1, epoch=epoch)[:, :2])
        for epoch, table in enumerate(tables)
    )
    corner_and_flip = torch.stack([tables[0][:, 0].double(), flips[0].double()])
    assert torch.corrcoef(corner_and_flip)[0, 1].abs() < 0.05


def test_all_crops_and_flips_are_equally_frequent() -> None:
    table = geometry_of(cutout=2).draw(81_000, SHAPE, seed=0, epoch=0).long()
    assert table[:, :2].amin() == 0
    assert table[:, :2].amax() == 8
    for column, kinds in ((0, 9), (1, 9), (2, 2), (3, 32), (4, 32)):
        counts = torch.bincount(table[:, column], minlength=kinds).double() / len(table)
        assert torch.allclose(counts, torch.full_like(counts, 1 / kinds), atol=0.01)


def test_held_out_training_images_keep_their_augmentation(alone: World) -> None:
    """Augmentation depends on the sample id, not on the index in the split."""
    dataset = random_dataset(40, val=10)
    loader = loader_of(alone, dataset)
    table = loader.augmentations(0)
    images, _, _ = loader.gather(torch.tensor([5]), table, 0)
    sample = int(dataset.train.sample_ids[5])
    whole = random_split(40).images
    cropped = loader.geometry.crop_and_flip(whole[sample : sample + 1], table[sample : sample + 1])
    assert torch.equal(images, loader.normalization.normalize(cropped))


def test_everything_can_be_turned_off() -> None:
    images, geometry = random_split(6).images, geometry_of(crop_padding=0, flip=False)
    scale, shift = CIFAR.scale_and_shift(32 * 32, torch.device("cpu"))
    table = geometry.draw(6, SHAPE, seed=0, epoch=0)
    found = transform(images, table, scale, shift, torch.contiguous_format, geometry)
    assert torch.equal(found, CIFAR.normalize(images))


def test_without_flip_the_crops_remain_and_no_image_is_mirrored() -> None:
    table = geometry_of(flip=False).draw(500, SHAPE, seed=0, epoch=0)
    assert table[:, 2].sum() == 0
    assert table[:, :2].amax() == 8


def test_cutout_sets_a_square_to_the_mean_and_clips_it_at_the_border() -> None:
    geometry = geometry_of(cutout=4)
    images = torch.ones(3, 1, 8, 12)
    table = torch.tensor([[0, 0, 0, 4, 5], [0, 0, 0, 0, 0], [0, 0, 0, 7, 11]], dtype=torch.int32)
    found = geometry.cut_out(images, table)
    expected = torch.ones(3, 1, 8, 12)
    expected[0, :, 2:6, 3:7] = expected[1, :, :2, :2] = expected[2, :, 5:, 9:] = 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(1, 8, 12), (4, 16, 8)])
def test_images_of_any_shape_and_channels_are_cropped_and_flipped(shape: tuple[int, int, int]) -> None:
    images = torch.randint(256, (5, *shape), dtype=torch.uint8)
    geometry = Geometry(padding=2, flip=True, cutout=0)
    table = torch.tensor([[2, 2, 0], [2, 2, 1], [0, 0, 0], [4, 3, 0], [2, 2, 1]], dtype=torch.int32)
    found = geometry.crop_and_flip(images, table)
    assert torch.equal(found[0], images[0])
    assert torch.equal(found[1], images[1].flip(2))
    assert torch.equal(found[2, :, 2:, 2:], images[2, :, :-2, :-2])
    assert torch.equal(found[3, :, :-2, :-1], images[3, :, 2:, 1:])


# -- mixup and cutmix


def test_mixup_blends_each_image_and_label_with_the_one_before() -> None:
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])
    mixed, share = mix(images, AugmentConfig(mixup=1.0), 0, 0, 0, 0)
    assert 0 < share < 1
    assert torch.allclose(mixed, share * images + (1 - share) * images.roll(1, 0))
    soft = soft_labels(labels, share, 3)
    expected = torch.tensor(
        [[share, 1 - share, 0], [1 - share, share, 0], [0, 1 - share, share], [0, share, 1 - share]]
    )
    assert torch.allclose(soft, expected)


def test_cutmix_pastes_a_box_whose_area_is_the_share() -> None:
    ones = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 10, 20)
    for place in range(20):
        mixed, share = mix(ones, AugmentConfig(cutmix=1.0), 0, place)
        pasted = mixed[1, 0] == 0
        assert share == pytest.approx(1 - pasted.float().mean().item())
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows.unsqueeze(1) & columns)  # a rectangle


def test_with_both_each_micro_batch_uses_one_of_them() -> None:
    images = torch.rand(2, 1, 8, 8)
    config = AugmentConfig(mixup=1.0, cutmix=1.0)
    kept = [(mix(images, config, 0, place).images == images).any().item() for place in range(100)]
    assert 30 < sum(kept) < 70  # cutmix keeps some pixels, mixup none


def test_the_mixture_depends_on_the_place_in_the_run() -> None:
    images, config = torch.rand(2, 1, 8, 8), AugmentConfig(mixup=0.4)
    assert mix(images, config, 1, 2).share == mix(images, config, 1, 2).share != mix(images, config, 1, 3).share


# -- user-defined augmentation


def half(images: Tensor) -> Tensor:
    return images[:, :, ::2]


def fails(images: Tensor) -> Tensor:
    raise ValueError(f"expected float, found {images.dtype}")


def seen(images: Tensor) -> Tensor:
    assert images.dtype == torch.float32
    assert images.amax() <= 1
    return images


def loader_of(world: World, dataset: DataSet, *arguments: str) -> TrainLoader:
    return make_trainer(
        world,
        config_of(
            "model.name=tiny", "train.global_batch_size=16", "train.micro_batch_size=4", *arguments, "precision=fp32"
        ),
        dataset,
    ).train_loader


def micro_batches(loader: TrainLoader, first_step: int = 0) -> Iterator[MicroBatch]:
    return (micro for step in loader.steps(0, first_step) for micro in step)


def test_a_user_defined_augmentation_is_the_same_on_any_rank_and_after_a_resume(alone: World) -> None:
    loader = loader_of(alone, random_dataset(40), "augment.name=helpers:noise", "augment.args.strength=0.5")
    whole = [micro.images for micro in micro_batches(loader)]
    torch.manual_seed(5)
    random.seed(5)
    rest = [micro.images for micro in micro_batches(loader, first_step=1)]
    assert len(whole) == 3 * 4
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    plain = [micro.images for micro in micro_batches(loader_of(alone, random_dataset(40)))]
    assert not any(torch.equal(a, b) for a, b in zip(whole, plain, strict=True))


def test_float_images_are_scaled_from_0_to_1() -> None:
    images = random_split(3).images
    function = build_function(AugmentConfig(name="test_augment:seen", dtype="float32"))
    assert function
    scale, shift = CIFAR.scale_and_shift(32 * 32, torch.device("cpu"))
    found = transform(images, None, scale, shift, torch.contiguous_format, geometry_of(), function)
    assert torch.allclose(found, CIFAR.normalize(images), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["augment.name=test_augment:half"],
            ["returned images (2, 3, 16, 32)", "for images (2, 3, 32, 32) of type uint8"],
        ),
        (
            ["augment.name=test_augment:fails"],
            ["test_augment:fails fails on images", "expected float, found torch.uint8"],
        ),
        (["augment.name=helpers:noise", "augment.args.size=3"], ["noise(images", "check augment.args"]),
    ],
)
def test_an_augmentation_that_cannot_be_used_is_rejected_before_training(
    arguments: Sequence[str], parts: Sequence[str], alone: World
) -> None:
    with pytest.raises(UserError) as caught:
        loader_of(alone, random_dataset(40), *arguments)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(("name", "dtype"), [("augmentations:strong", "uint8"), ("color:batch", "float32")])
def test_the_augmentations_of_the_page_differ_per_image(
    name: str, dtype: str, alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file, code in modules_of("docs/augmentation.md").items():
        (tmp_path / file).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    one = random_split(1).images[0]
    labels = torch.arange(16) % 2
    alike = DataSet(Split.of(one.expand(16, -1, -1, -1), labels), None, ("a", "b"))
    options = (f"augment.name={name}", f"augment.dtype={dtype}", "augment.crop_padding=0", "augment.flip=false")
    loader = loader_of(alone, alike, *options)
    images = torch.cat([micro.images for micro in micro_batches(loader)])
    again = torch.cat([micro.images for micro in micro_batches(loader)])
    assert torch.equal(images, again)
    assert len({image.numpy().tobytes() for image in images}) > 8

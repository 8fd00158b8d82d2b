"""Crop, flip and normalization."""

import torch
from helpers import random_dataset, random_split
from torchvision import transforms

from ddp_cifar.data.augment import MEAN, STD, augment, draw_augmentations, normalize
from ddp_cifar.data.loader import EvalLoader
from ddp_cifar.distributed.world import World


def test_crop_flip_and_normalization_match_torchvision() -> None:
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


def test_the_augmentation_of_an_image_depends_only_on_seed_epoch_and_id() -> None:
    table = draw_augmentations(100, seed=1, epoch=2)
    assert torch.equal(table, draw_augmentations(100, seed=1, epoch=2))
    assert not torch.equal(table, draw_augmentations(100, seed=1, epoch=3))
    assert not torch.equal(table, draw_augmentations(100, seed=2, epoch=2))


def test_all_crops_and_flips_are_equally_frequent() -> None:
    table = draw_augmentations(81_000, seed=0, epoch=0).long()
    assert table[:, :2].amin() == 0
    assert table[:, :2].amax() == 8
    for column, kinds in ((0, 9), (1, 9), (2, 2)):
        counts = torch.bincount(table[:, column], minlength=kinds).double() / len(table)
        assert torch.allclose(counts, torch.full_like(counts, 1 / kinds), atol=0.01)


def test_held_out_training_images_keep_their_augmentation(alone: World) -> None:
    """Augmentation depends on the sample id, not on the index in the split."""
    dataset = random_dataset(40, val=10)
    loader = EvalLoader(dataset.train, channels_last=False, device=alone.device)
    table = draw_augmentations(40, seed=0, epoch=0)
    images, _, _ = loader.gather(torch.tensor([5]), table)
    sample = int(dataset.train.sample_ids[5])
    whole = random_split(40).images
    assert torch.equal(images, normalize(augment(whole[sample : sample + 1], table[sample : sample + 1])))

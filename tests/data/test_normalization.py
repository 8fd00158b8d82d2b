"""Mean and standard deviation: presets, numbers, those of the data, and those of a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import config_of, make_trainer, random_dataset

from ddp_cifar.config import DataConfig
from ddp_cifar.data import DataSet, Split
from ddp_cifar.data.normalization import VALUES, Normalization, normalization_for, normalization_of
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError


def gray(num_images: int = 6) -> DataSet:
    images = torch.randint(256, (num_images, 1, 8, 8), dtype=torch.uint8)
    return DataSet(Split.of(images, torch.arange(num_images) % 2), None, ("a", "b"))


@pytest.mark.parametrize(
    ("settings", "mean"),
    [
        ({"name": "cifar10"}, (0.4914, 0.4822, 0.4465)),
        ({"name": "shapes"}, (0.4914, 0.4822, 0.4465)),
        ({"name": "imagefolder", "mean": "imagenet"}, (0.485, 0.456, 0.406)),
        ({"name": "imagefolder", "mean": 0.5}, (0.5, 0.5, 0.5)),
        ({"name": "imagefolder", "mean": [0.1, 0.2, 0.3]}, (0.1, 0.2, 0.3)),
    ],
)
def test_the_config_selects_the_mean(settings: dict[str, Any], mean: tuple[float, ...]) -> None:
    assert normalization_for(DataConfig(**settings), random_dataset(4)).mean == mean


@pytest.mark.parametrize("settings", [{"name": "imagefolder"}, {"name": "mine:data"}, {"mean": "auto", "std": "auto"}])
def test_other_data_are_normalized_by_their_own_statistics(settings: dict[str, Any]) -> None:
    dataset = random_dataset(40)
    normalized = normalization_for(DataConfig(**settings), dataset).normalize(dataset.train.images)
    assert torch.allclose(normalized.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(normalized.std((0, 2, 3)), torch.ones(3), atol=1e-4)


def test_grayscale_images_use_their_own_statistics_by_default_and_need_one_value() -> None:
    dataset = gray()
    found = normalization_for(DataConfig(name="shapes"), dataset)
    assert (found.mean, found.std) == (dataset.pixel_moments.mean, dataset.pixel_moments.std)
    with pytest.raises(UserError, match=r"data\.std=cifar10 has 3 values, but the images have 1 channels"):
        normalization_for(DataConfig(std="cifar10"), dataset)


@pytest.mark.parametrize(
    "argument", ["data.std=0", "data.std=[0.2,-1,1]", "data.mean=auto1", "data.mean=[]", "data.mean=x"]
)
def test_other_values_are_rejected(argument: str) -> None:
    with pytest.raises(UserError, match=r"is out of range: expected auto, cifar10, imagenet, a number"):
        config_of(argument)


def test_pixels_can_be_recovered() -> None:
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    normalization = Normalization(**VALUES["imagenet"])
    assert torch.equal(normalization.to_pixels(normalization.normalize(images)), images)


def test_a_resume_uses_the_checkpoints_normalization_also_that_of_an_older_version(
    alone: World, tmp_path: Path
) -> None:
    config = config_of("model.name=tiny", "train.global_batch_size=4", "data.name=imagefolder")
    dataset = random_dataset(8)
    trainer = make_trainer(alone, config, dataset)
    state = trainer.state_dict()
    assert state["image_shape"] == [3, 32, 32]
    own = normalization_for(config.data, dataset).state_dict()
    assert state["normalization"] == own
    trainer.load_state_dict(state | {"normalization": {"mean": [0.1] * 3, "std": [0.2] * 3}}, "here")
    images, _, _ = trainer.evaluator.held_out["test"].gather(torch.arange(2))
    expected = Normalization([0.1] * 3, [0.2] * 3).normalize(dataset.test.images[:2]) if dataset.test else None
    assert expected is not None
    assert torch.equal(images, expected)
    del state["normalization"]
    trainer.load_state_dict(state, "here")
    assert trainer.state_dict()["normalization"] == normalization_of({}).state_dict() != own

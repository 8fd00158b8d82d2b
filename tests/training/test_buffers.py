"""The model's buffers over a step."""

import torch
from helpers import (
    TEN_STEPS,
    config_of,
    make_trainer,
    random_dataset,
    take_step,
)

from ddp_cifar.distributed.world import World


def test_buffers_count_one_batch_per_step(alone: World) -> None:
    trainer = make_trainer(alone, config_of(*TEN_STEPS, "train.micro_batch_size=8"), random_dataset(96))
    trainer.fit()
    assert int(trainer.model.state_dict()["conv_layer.1.num_batches_tracked"]) == 10


def test_the_buffers_are_the_mean_over_micro_batches_weighted_by_images(alone: World) -> None:
    trainer = make_trainer(alone, config_of(*TEN_STEPS, "train.micro_batch_size=8"), random_dataset(37))
    trainer.model.train()
    batch = list(trainer.train_loader.steps(0))[-1]  # 5 images: micro-batches of 2, 1, 1 and 1
    assert [len(micro.labels) for micro in batch] == [2, 1, 1, 1]
    conv = trainer.model.conv_layer[0]
    with torch.no_grad():
        means = [conv(micro.images).mean(dim=(0, 2, 3)) * len(micro.labels) / 5 for micro in batch]
    take_step(trainer, batch)
    expected = 0.1 * sum(means)  # momentum 0.1, from 0
    assert torch.allclose(trainer.model.conv_layer[1].running_mean, expected, atol=1e-6)

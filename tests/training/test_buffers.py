"""The model's buffers over a step."""

import torch
from helpers import (
    TEN_STEPS,
    config_of,
    make_trainer,
    random_dataset,
    take_step,
)
from torch import nn

from ddp_cifar.distributed.world import World
from ddp_cifar.training.buffers import BufferMean, sum_rows


def test_buffers_count_one_batch_per_step(alone: World) -> None:
    trainer = make_trainer(alone, config_of(*TEN_STEPS, "train.micro_batch_size=8"), random_dataset(96))
    trainer.fit()
    assert int(trainer.model.state_dict()["conv_layer.1.num_batches_tracked"]) == 10


def test_each_buffer_is_aligned_and_keeps_its_value(alone: World) -> None:
    """Otherwise a compiled model gets no CUDA graph."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(5), nn.BatchNorm1d(2).half())
    model[1].running_mean.fill_(7)
    model[1].num_batches_tracked.fill_(3)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    mean = BufferMean(model, 2, sum_rows(alone))
    for name, buffer in model.named_buffers():
        assert buffer.data_ptr() % 16 == 0, name
        assert torch.equal(buffer, before[name])
        assert torch.equal(mean.at_last_step()[name], before[name])
    assert len(mean.flats) == 3


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


def test_complex_and_empty_buffers_are_averaged_too(alone: World) -> None:
    model = nn.Module()
    model.register_buffer("mean", torch.tensor([1 + 1j, 2 - 1j]))
    model.register_buffer("none", torch.zeros(0))
    mean = model.get_buffer("mean")
    buffers = BufferMean(model, 2, sum_rows(alone))
    buffers.begin_step(2)
    for index, change in enumerate([2 + 4j, 4 - 8j]):
        buffers.begin_micro_batch()
        mean.add_(change)
        buffers.end_micro_batch(index, weight=0.5)
    buffers.start_reducing()()
    buffers.end_step()
    assert mean.tolist() == [4 - 1j, 5 - 3j]

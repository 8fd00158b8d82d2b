"""Where images are stored during training, and the contents of batches."""

from typing import Any

import pytest
import torch
from helpers import SMALL, config_of, kernels_of, largest_difference, make_trainer, random_dataset, take_step, trained
from ranks import RankPool

from ddp_cifar.data.dataset import choose_data_device
from ddp_cifar.data.loader import EvalBatch
from ddp_cifar.distributed.world import World
from ddp_cifar.training.trainer import Trainer


def test_images_that_fit_are_stored_on_the_device(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = random_dataset(10, val=2)  # 12 images in one tensor
    size = dataset.train.images.numel()
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    for free, place in ((2 * size, cuda), (2 * size - 1, cpu)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10 * free))
        assert choose_data_device((dataset.train, dataset.val, None), cuda, "auto") == place
    assert choose_data_device([dataset.train], cuda, "host") == cpu
    assert choose_data_device([dataset.train], cuda, "device") == cuda
    assert choose_data_device([dataset.train], cpu, "auto") == cpu


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_images_from_the_host_give_bitwise_identical_results(ranks: RankPool, precision: str) -> None:
    arguments = (f"precision={precision}", "train.deterministic=true")
    (device,) = ranks.run(_trained_with_its_kernels, 1, "data.residency=device", *arguments, device="cuda")
    (host,) = ranks.run(_trained_with_its_kernels, 1, "data.residency=host", *arguments, device="cuda")
    assert largest_difference(device[0], host[0]) == 0
    assert device[1] == host[1]


def _trained_with_its_kernels(world: World, *arguments: str) -> tuple[dict[str, torch.Tensor], list[Any]]:
    with kernels_of(config_of(*arguments), world):
        return trained(world, *arguments)


@pytest.mark.gpu
def test_on_a_gpu_batches_out_of_order_are_correct(ranks: RankPool) -> None:
    (right,) = ranks.run(_batches_out_of_turn, 1, device="cuda")
    assert right


def _batches_out_of_turn(world: World) -> bool:
    trainer = make_trainer(world, config_of(*SMALL, "data.residency=host"), random_dataset(44))
    inturn = [micro.sample_ids.tolist() for step in trainer.train_loader.steps(0) for micro in step]
    steps = list(trainer.train_loader.steps(0))
    outofturn = [micro.sample_ids.tolist() for step in reversed(steps) for micro in step]
    return sorted(inturn) == sorted(outofturn) and inturn != outofturn


@pytest.mark.gpu
@pytest.mark.parametrize("residency", ["device", "host"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_steps_do_not_synchronize_with_the_device(ranks: RankPool, residency: str, precision: str) -> None:
    """With NCCL: gloo waits for the device in each exchange."""
    ranks.run(_steps_that_do_not_wait, 1, residency, precision, device="cuda")


def _steps_that_do_not_wait(world: World, residency: str, precision: str) -> None:
    assert world.backend == "nccl"
    arguments = (f"data.residency={residency}", f"precision={precision}", "train.log_every=1000")
    trainer = make_trainer(world, config_of(*SMALL, *arguments), random_dataset(16 * 8))
    steps = trainer.train_loader.steps(0)
    for _ in range(2):
        take_step(trainer, next(steps))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            take_step(trainer, next(steps))
            trainer.sync_ranks()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_evaluation_batches_contain_every_image_once(alone: World) -> None:
    trainer: Trainer = make_trainer(alone, config_of(*SMALL), random_dataset(44, test=10))
    assert trainer.evaluator.held_out["test"]
    batches = list(trainer.evaluator.held_out["test"].evaluation_batches(alone, 4))
    assert all(isinstance(batch, EvalBatch) for batch in batches)
    assert [i for batch in batches if batch for i in batch.indices.tolist()] == list(range(10))

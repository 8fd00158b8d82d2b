"""The precisions fp32, tf32, bf16 and fp16."""

import copy

import pytest
import torch
from helpers import (
    TEN_STEPS,
    config_of,
    largest_difference,
    make_trainer,
    random_dataset,
    take_step,
    without_dropout,
)
from torch.amp.grad_scaler import GradScaler

from ddp_cifar.data import build_dataset
from ddp_cifar.distributed.world import World
from ddp_cifar.training.precision import bf16_is_native

SETTINGS = (*TEN_STEPS, "train.micro_batch_size=16")


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_fp16_skips_an_update_that_overflows_and_continues(alone: World, name: str) -> None:
    """A skipped first update leaves no trace: the next update is small, although the moments were not initialized before."""
    config = config_of(*SETTINGS, "precision=fp16", f"optim.name={name}", "optim.momentum=0.9", "train.max_steps=4")
    trainer = make_trainer(alone, config, random_dataset(96, image_size=8))
    trainer.train_step.scaler = GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.model.train()
    steps = trainer.train_loader.steps(0)
    take_step(trainer, next(steps))
    assert torch.equal(trainer.model.state_dict()["fc_layer.6.weight"], before["fc_layer.6.weight"])
    assert trainer.train_step.scaler.get_scale() == 2.0**39
    trainer.train_step.scaler = GradScaler("cpu", init_scale=2.0**10)
    take_step(trainer, next(steps))
    assert not torch.equal(trainer.model.state_dict()["fc_layer.6.weight"], before["fc_layer.6.weight"])
    assert trainer.train_step.scaler.get_scale() == 2.0**10
    parameters = dict(trainer.model.named_parameters())
    assert 0 < largest_difference(parameters, {key: before[key] for key in parameters}) < 0.5


def test_fp16_keeps_the_buffers_of_an_update_that_it_skips(alone: World) -> None:
    """An image that is not finite would otherwise stay in the running statistics, and in their average, for ever."""
    config = config_of(*SETTINGS, "precision=fp16", "train.on_nonfinite=skip", "train.ema_decay=0.9")
    trainer = make_trainer(alone, config, random_dataset(96, image_size=8))
    trainer.model.train()
    steps = trainer.train_loader.steps(0)
    take_step(trainer, next(steps))
    before = copy.deepcopy(dict(trainer.model.named_buffers()))
    spoil = trainer.model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * float("nan"),))
    take_step(trainer, next(steps))
    spoil.remove()
    after = dict(trainer.model.named_buffers())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(bool(buffer.isfinite().all()) for buffer in trainer.train_step.eval_model.buffers())
    take_step(trainer, next(steps))
    assert not torch.equal(before["conv_layer.1.running_mean"], trainer.model.conv_layer[1].running_mean)


def test_fp16_gradients_equal_fp32_gradients_up_to_rounding(alone: World) -> None:
    gradients = {}
    for precision in ("fp32", "fp16"):
        trainer = make_trainer(alone, config_of(*SETTINGS, f"precision={precision}"), random_dataset(32, image_size=8))
        without_dropout(trainer.model)
        trainer.train_step.scaler = GradScaler("cpu", init_scale=2.0**10, enabled=precision == "fp16")
        trainer.model.train()
        take_step(trainer, next(trainer.train_loader.steps(0)))
        gradients[precision] = trainer.model.fc_layer[6].weight.grad
    difference = (gradients["fp16"] - gradients["fp32"]).norm() / gradients["fp32"].norm()
    assert 0 < difference < 0.01


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16"])
def test_a_cpu_with_bf16_is_recognized_by_every_torch(name: str, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: found}, raising=False)
    assert bf16_is_native(torch.device("cpu")) is found
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as before torch 2.11
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: name == "avx512_bf16" and found)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: name == "amx_bf16" and found)
    assert bf16_is_native(torch.device("cpu")) is found


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_precision_learns_on_a_gpu(precision: str) -> None:
    from ddp_cifar.distributed.rendezvous import open_world

    arguments = ("train.global_batch_size=64", "train.micro_batch_size=32", "train.epochs=8", "optim.warmup_epochs=0.5")
    with open_world("cuda") as world:
        config = config_of(*arguments, f"precision={precision}", "data.name=shapes", "data.shapes.train_images=2000")
        trainer = make_trainer(world, config, build_dataset(config.data, world))
        trainer.fit()
    assert trainer.progress.results["test/accuracy"] > 0.8

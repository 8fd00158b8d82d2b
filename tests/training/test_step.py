"""One update: averaged weights, label smoothing, gradient clipping and optimizers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    TEN_STEPS,
    config_of,
    evaluate,
    make_trainer,
    random_dataset,
    take_step,
    without_dropout,
)
from torch import nn

from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError
from ddp_cifar.run.checkpoint_file import digest

SETTINGS = (*TEN_STEPS, "train.micro_batch_size=16")


def test_the_averaged_weights_are_evaluated_and_saved(alone: World) -> None:
    config = config_of(*SETTINGS, "train.ema_decay=0.9", "train.max_steps=3")
    trainer = make_trainer(alone, config, random_dataset(96, test=40, image_size=8))
    seen = []
    trainer.train_step.optimizer.register_step_post_hook(
        lambda *_: seen.append(copy.deepcopy(trainer.model.state_dict()))
    )
    trainer.fit()
    name = "fc_layer.6.weight"
    average = seen[0][name]
    for weights in seen[1:]:
        average = 0.9 * average + 0.1 * weights[name]
    state = trainer.state_dict()
    assert torch.allclose(state["ema"][name], average, atol=1e-7)
    assert torch.equal(state["model"][name], seen[-1][name])
    assert int(state["ema"]["conv_layer.1.num_batches_tracked"]) == 3

    alike = make_trainer(alone, config_of(*SETTINGS), random_dataset(96, test=40, image_size=8))
    alike.model.load_state_dict(state["ema"])
    assert evaluate(alike) == evaluate(trainer)
    alike.model.load_state_dict(state["model"])
    assert evaluate(alike).loss != evaluate(trainer).loss


def test_training_smooths_labels_as_torch_does_and_evaluation_does_not(alone: World) -> None:
    config = config_of(*SETTINGS, "train.label_smoothing=0.2")
    trainer = make_trainer(alone, config, random_dataset(32, image_size=8))
    plain = make_trainer(alone, config_of(*SETTINGS), random_dataset(32, image_size=8))
    assert evaluate(trainer) == evaluate(plain)
    without_dropout(trainer.model)
    trainer.model.train()
    batch = next(trainer.train_loader.steps(0))
    loss = sum(
        F.cross_entropy(trainer.model(micro.images), micro.labels, reduction="sum", label_smoothing=0.2).item()
        for micro in batch
    )
    take_step(trainer, batch)
    assert trainer.metrics.counter.reduce(alone).loss == pytest.approx(loss, rel=1e-4)


def test_adamw_is_clamped_too(alone: World) -> None:
    adamw = ("optim.name=adamw", "optim.lr=0.01", "optim.weight_decay=0.1", "optim.step_clamp.after_epoch=0")
    config = config_of(*SETTINGS, *adamw, "optim.step_clamp.limit=5", "optim.step_clamp.reset_to=3")
    trainer = make_trainer(alone, config, random_dataset(96, image_size=8))
    assert type(trainer.train_step.optimizer) is torch.optim.AdamW
    trainer.fit()
    counts = {float(state["step"]) for state in trainer.train_step.optimizer.state.values()}
    assert counts == {4.0}, "10 updates: 1 ... 5, then 5 -> 3, 4, 5 -> 3, 4 ..."


def test_until_the_gradients_are_complete_nothing_that_a_checkpoint_holds_changes(alone: World) -> None:
    """Else survivors in different phases of a step would have different states."""
    trainer = make_trainer(alone, config_of(*TEN_STEPS, "optim.warmup_epochs=0.5"), random_dataset(96))
    trainer.model.train()
    steps = trainer.train_loader.steps(0)
    take_step(trainer, next(steps))
    before = digest(trainer.train_step.optimizer.state_dict())
    trainer.train_step.gradients(next(steps), 1, trainer.metrics)
    assert digest(trainer.train_step.optimizer.state_dict()) == before


def test_a_parameter_that_one_pass_does_not_use_is_found_before_the_update(alone: World) -> None:
    trainer = make_trainer(alone, config_of(*TEN_STEPS), random_dataset(96))
    trainer.model.train()
    steps = trainer.train_loader.steps(0)
    take_step(trainer, next(steps))
    last = trainer.model.fc_layer[6]
    trainer.model.fc_layer[6].forward = lambda inputs: F.linear(inputs, last.weight)  # without its bias
    before = digest(dict(trainer.model.named_parameters()))
    with pytest.raises(UserError, match="in step 2, the model did not use all parameters that need a gradient"):
        trainer.train_step.gradients(next(steps), 1, trainer.metrics)
    assert digest(dict(trainer.model.named_parameters())) == before


def test_clipping_bounds_the_gradient(alone: World) -> None:
    config = config_of(*TEN_STEPS, "train.micro_batch_size=32", "train.clip_norm=0.01")
    trainer = make_trainer(alone, config, random_dataset(96))
    trainer.model.train()
    take_step(trainer, next(trainer.train_loader.steps(0)))
    gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    assert float(trainer.metrics.norms[-1]) > 0.01
    assert float(nn.utils.get_total_norm(gradients)) == pytest.approx(0.01, rel=1e-3)

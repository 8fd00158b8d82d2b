"""The training loop: equal to the original script's, equal on any number of ranks, exact after a resume."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

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
from ranks import RankPool
from torch import Tensor, nn, optim

from ddp_cifar.distributed.world import World
from ddp_cifar.models.cnn import CNN
from ddp_cifar.run.checkpoint_file import digest
from ddp_cifar.training.trainer import Trainer


def original_loop(net: nn.Module, optimizer: optim.Optimizer, epochs: list[list[tuple[Tensor, Tensor]]]) -> None:
    """The original script's loop, except for the batches, the clamp's numbers, and `fill_`: torch now rejects an int."""
    criterion = nn.CrossEntropyLoss()
    for epoch, trainloader in enumerate(epochs):
        for _i, data in enumerate(trainloader, 0):
            inputs, labels = data
            optimizer.zero_grad()
            outputs = net(inputs)
            loss = criterion(outputs, labels)
            loss.backward()
            if epoch > 0:
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        state = optimizer.state[p]
                        if state["step"] >= 6:
                            state["step"].fill_(4)
            optimizer.step()


@pytest.mark.parametrize("implementation", ["default", "foreach", "fused"])
def test_training_gives_the_weights_of_the_original_script(alone: World, implementation: str) -> None:
    compare_with_the_original_script(alone, implementation, compared_after=12)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["default", "foreach", "fused", "capturable"])
def test_training_on_a_gpu_gives_the_weights_of_the_original_script(implementation: str) -> None:
    """For `fused`, only the first update is compared.

    The fused kernel's rounding depends on an element's position in memory, which in DDP is in a bucket. Adam amplifies such
    differences in the smallest gradients to whole steps (3e-3 after 12 updates).
    """
    from ddp_cifar.distributed.rendezvous import open_world

    torch.backends.cudnn.deterministic = True
    with open_world("cuda") as world:
        compare_with_the_original_script(world, implementation, compared_after=1 if implementation == "fused" else 12)


def compare_with_the_original_script(world: World, implementation: str, compared_after: int) -> None:
    config = config_of(
        "train.global_batch_size=16",
        "train.micro_batch_size=16",
        "train.epochs=3",
        "train.channels_last=false",
        "precision=fp32",
        "optim.lr=5e-4",
        "optim.weight_decay=5e-4",
        "optim.schedule=constant",
        "optim.warmup_epochs=0",
        f"optim.implementation={implementation}",
        "optim.step_clamp.after_epoch=1",
        "optim.step_clamp.limit=6",
        "optim.step_clamp.reset_to=4",
    )
    trainer = make_trainer(world, config, random_dataset(64))
    without_dropout(trainer.model)
    net = CNN().to(world.device)
    net.load_state_dict(trainer.model.state_dict())
    without_dropout(net)
    switches: dict[str, Any] = {"foreach": False, "fused": False, implementation: True}
    switches.pop("default", None)
    optimizer = optim.Adam(net.parameters(), lr=5e-4, weight_decay=5e-4, **switches)
    epochs = [
        [(micro.images, micro.labels) for step in trainer.train_loader.steps(epoch) for micro in step]
        for epoch in range(3)
    ]
    snapshots: dict[nn.Module, list[dict[str, Tensor]]] = {net: [], trainer.model: []}
    for module, updates in ((net, optimizer), (trainer.model, trainer.train_step.optimizer)):
        kept = snapshots[module]
        updates.register_step_post_hook(lambda *_, m=module, kept=kept: kept.append(copy.deepcopy(m.state_dict())))
    net.train()
    original_loop(net, optimizer, epochs)
    trainer.fit()
    ours, theirs = (snapshots[module][compared_after - 1] for module in (trainer.model, net))
    parameters = dict(net.named_parameters())  # without buffers: the hook runs before they are averaged
    assert largest_difference({k: ours[k] for k in parameters}, {k: theirs[k] for k in parameters}) <= 1e-6
    counts = {float(state["step"]) for state in trainer.train_step.optimizer.state.values()}
    # step counts of the 12 updates: 1 ... 6 without the clamp, then 6 -> 4, 5, 6 -> 4 ...
    assert counts == {float(state["step"]) for state in optimizer.state.values()} == {6.0}


def first_steps(world: World, arguments: tuple[str, ...]) -> dict[str, Any]:
    """Return an epoch's pixels, and the gradients and buffers of its first and its short last step, from the same weights."""
    config, dataset = config_of(*TEN_STEPS, *arguments), random_dataset(105, image_size=16)
    result: dict[str, Any] = {"pixels": {}}
    for name, step in (("first", 0), ("short", 3)):
        trainer = make_trainer(world, config, dataset)
        trainer.model.train()
        take_step(trainer, next(trainer.train_loader.steps(0, first_step=step)))
        gradients = {key: parameter.grad for key, parameter in trainer.model.named_parameters()}
        result[name] = {"gradients": gradients, "buffers": dict(trainer.model.named_buffers())}
    for step, batch in enumerate(trainer.train_loader.steps(epoch=1)):
        for micro in batch:
            result["pixels"][step, micro.index] = (micro.images, micro.labels)
    return result


@pytest.mark.parametrize("micro_batch_size", [8, 4])
def test_any_number_of_ranks_sees_the_same_pixels_and_computes_the_same_gradients(
    ranks: RankPool, micro_batch_size: int
) -> None:
    """With BatchNorm and dropout.

    8 images per micro-batch make 4 micro-batches per step (no gradient accumulation on 4 ranks); 4 images make 8. With 105
    images, the last step of an epoch has 9, so that its micro-batches have different sizes.
    """
    runs = {n: ranks.run(first_steps, n, (f"train.micro_batch_size={micro_batch_size}",)) for n in (1, 3, 4)}
    one = runs[1][0]
    for run in runs.values():
        pixels = {key: value for rank in run for key, value in rank["pixels"].items()}
        assert pixels.keys() == one["pixels"].keys()
        for key, (images, labels) in pixels.items():
            assert torch.equal(images, one["pixels"][key][0])
            assert torch.equal(labels, one["pixels"][key][1])
        for rank in run:
            for step in ("first", "short"):
                assert largest_difference(rank[step]["gradients"], one[step]["gradients"]) <= 1e-6
                assert largest_difference(rank[step]["buffers"], one[step]["buffers"]) <= 1e-6


class DoubleCNN(CNN):
    """The CNN in float64."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__(num_classes, image_size)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.double())


def train_ten_steps(world: World) -> tuple[dict[str, Tensor], str]:
    arguments = ("model.name=test_trainer:DoubleCNN", "train.global_batch_size=16", "train.micro_batch_size=2")
    trainer = make_trainer(world, config_of(*TEN_STEPS, *arguments), random_dataset(53, test=11))
    trainer.fit()
    assert trainer.progress.step == 10
    return trainer.model.state_dict(), digest(trainer.state_dict())


@pytest.mark.slow
def test_3_5_and_7_ranks_have_the_weights_of_one_rank_after_ten_steps(ranks: RankPool) -> None:
    """With 53 images, the last step of an epoch has 5, fewer than 7 ranks.

    The test uses float64 to compare the computation. In float32, rounding errors grow: a value near the threshold of a ReLU or
    a pooling can fall on the other side, which changes the gradient of its image. After ten steps, float32 weights differ by
    5e-6 to 9e-5, depending on the seed and the batch size.
    """
    ((one, _),) = ranks.run(train_ten_steps, 1)
    for world_size in (3, 5, 7):
        run = ranks.run(train_ten_steps, world_size)
        for weights, whole in run:
            assert largest_difference(weights, one) <= 1e-6
            assert whole == run[0][1], "the ranks of a run differ"


def train_two_epochs(world: World, num_images: int, global_batch_size: int, *arguments: str) -> tuple[int, str]:
    sizes = (f"train.global_batch_size={global_batch_size}", "train.epochs=2")
    trainer = make_trainer(world, config_of("model.name=tiny", *sizes, *arguments), random_dataset(num_images, test=11))
    trainer.fit()  # raises if the sample ledger does not count each image once
    return trainer.progress.step, digest(trainer.state_dict())


@pytest.mark.parametrize("global_batch_size", [7, 32, 500])
def test_any_batch_size_trains_on_any_number_of_ranks(ranks: RankPool, global_batch_size: int) -> None:
    """With 45 images, the last step of an epoch has 3, 13 or all of them."""
    for world_size in range(1, 8):
        results = ranks.run(train_two_epochs, world_size, 45, global_batch_size)
        assert results == [(2 * math.ceil(45 / global_batch_size), results[0][1])] * world_size


@pytest.mark.parametrize("more", [("precision=fp16",), ("train.on_nonfinite=skip", "train.ema_decay=0.9")])
def test_a_rank_without_images_in_the_first_step_takes_part(ranks: RankPool, more: tuple[str, ...]) -> None:
    results = ranks.run(train_two_epochs, 5, 3, 8, *more)
    assert results == [(2, results[0][1])] * 5


RESUMED = (
    "train.global_batch_size=16",
    "train.micro_batch_size=4",
    "train.epochs=2",
    "train.log_every=2",
    "optim.warmup_epochs=0.5",
    "optim.step_clamp.after_epoch=1",
    "optim.step_clamp.limit=5",
    "optim.step_clamp.reset_to=3",
)


def stop_and_resume(world: World, precision: str, stop_at: int) -> tuple[str, str]:
    """Return the digests of an uninterrupted run, and of one that stops at a step and resumes in a new trainer."""
    dataset = random_dataset(70)  # 5 steps per epoch
    arguments = (*RESUMED, f"precision={precision}")
    uninterrupted = make_trainer(world, config_of(*arguments), dataset)
    uninterrupted.fit()
    first = make_trainer(world, config_of(*arguments, f"train.max_steps={stop_at}"), dataset)
    first.fit()
    second = make_trainer(world, config_of(*arguments), dataset)
    second.load_state_dict(first.state_dict(), "the first half")
    second.fit()
    return digest(uninterrupted.state_dict()), digest(second.state_dict())


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("stop_at", [5, 7])
def test_a_resumed_run_is_bitwise_identical_to_an_uninterrupted_run(
    ranks: RankPool, world_size: int, stop_at: int
) -> None:
    """Stopped at the end of an epoch (step 5) and during an epoch (step 7)."""
    for uninterrupted, resumed in ranks.run(stop_and_resume, world_size, "bf16" if stop_at == 5 else "fp32", stop_at):
        assert resumed == uninterrupted


def test_a_contiguous_run_resumes_from_a_channels_last_checkpoint(alone: World) -> None:
    """The update's kernels read a moment in the memory order of its parameter, and ignore the moment's strides."""

    def trainer_of(channels_last: str) -> Trainer:
        config = config_of(
            *TEN_STEPS, "optim.name=adam", f"train.channels_last={channels_last}", "train.micro_batch_size=32"
        )
        return make_trainer(alone, config, random_dataset(96))

    first, second = trainer_of("true"), trainer_of("false")
    first.fit()
    second.load_state_dict(first.state_dict(), "the first half")
    assert digest(second.state_dict()["optimizer"]) == digest(first.state_dict()["optimizer"])
    strides = [first.model.conv_layer[3].weight.stride(), second.model.conv_layer[3].weight.stride()]
    assert strides[0] != strides[1]
    for parameter, state in second.train_step.optimizer.state.items():
        assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == parameter.stride()


def test_the_best_checkpoint_is_chosen_by_validation_accuracy(alone: World, tmp_path: Path) -> None:
    from ddp_cifar.run.checkpoint_file import load_checkpoint
    from ddp_cifar.run.checkpoint_store import Checkpoints

    tmp_path.joinpath("checkpoints").mkdir()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    config = config_of(
        "train.global_batch_size=16", "train.micro_batch_size=16", "train.epochs=4", "data.val_images=20"
    )
    trainer = make_trainer(alone, config, random_dataset(84, val=20), checkpoints=checkpoints)
    trainer.fit()
    best = load_checkpoint(checkpoints.folder / "best.pt")
    assert best["progress"]["results"]["val/accuracy"] == trainer.progress.best_val_accuracy
    assert len(checkpoints.paths()) <= 2, "keep=1 keeps the newest and the best"


def stop_and_resume_all_states(world: World) -> tuple[str, str]:
    """Like `stop_and_resume`, with all components that have a state, frozen layers and parameter groups."""
    frozen = ("model.freeze=[conv_layer.0.*, conv_layer.1.*]", "optim.groups=[{match: conv_layer.*, lr_factor: 0.5}]")
    more = ("precision=fp16", "train.ema_decay=0.9", "train.label_smoothing=0.1", "optim.name=adamw")
    arguments = (*RESUMED, *frozen, *more)
    dataset = random_dataset(70, image_size=8)
    uninterrupted = make_trainer(world, config_of(*arguments), dataset)
    uninterrupted.fit()
    first = make_trainer(world, config_of(*arguments, "train.max_steps=7"), dataset)
    first.fit()
    second = make_trainer(world, config_of(*arguments), dataset)
    second.load_state_dict(copy.deepcopy(first.state_dict()), "the first half")
    second.fit()
    assert {"ema", "scaler"} <= second.state_dict().keys()
    return digest(uninterrupted.state_dict()), digest(second.state_dict())


def test_averaged_weights_and_scaler_resume_bitwise_identical(ranks: RankPool) -> None:
    for uninterrupted, resumed in ranks.run(stop_and_resume_all_states, 2):
        assert resumed == uninterrupted


CONSTANT = (
    "model.name=tiny",
    "model.freeze=[1.*, 5.*]",
    "optim.lr=1e-12",
    "train.global_batch_size=16",
    "train.epochs=9",
)
"""A run whose validation accuracy does not change."""


def test_a_run_ends_early_without_a_better_validation_accuracy_also_after_a_resume(
    alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(*CONSTANT, "data.val_images=20", "train.patience_epochs=2")
    dataset = random_dataset(68, val=20)  # 3 steps per epoch
    whole = make_trainer(alone, config, dataset)
    shown: list[int] = []
    monkeypatch.setattr(
        whole.dashboard, "show_evaluation", lambda logits, step: shown.extend([step] if logits is not None else [])
    )
    assert whole.fit() == ""
    assert shown == [9], "the last evaluation has pictures"
    assert (whole.progress.epoch, whole.progress.step, whole.progress.best_step) == (3, 9, 3)
    assert whole.progress.is_finished(config)
    first = make_trainer(
        alone, dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=6)), dataset
    )
    first.fit()
    second = make_trainer(alone, config, dataset)
    second.load_state_dict(first.state_dict(), "the first half")
    second.fit()
    assert digest(second.state_dict()) == digest(whole.state_dict())

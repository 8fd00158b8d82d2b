"""The loop: equal to the article's, equal on any number of ranks, exact in evaluation, and able to go on."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import config_of, largest_difference, make_trainer, random_dataset, random_split, without_dropout
from ranks import RankPool
from torch import Tensor, nn, optim
from torch.amp.grad_scaler import GradScaler

from ddp_cifar.checkpoint import digest
from ddp_cifar.data import build_dataset
from ddp_cifar.data.dataset import DataSet
from ddp_cifar.distributed import World
from ddp_cifar.models import MODELS
from ddp_cifar.models.cnn import CNN
from ddp_cifar.trainer import Trainer

# -- the article's loop


def article_loop(net: nn.Module, optimizer: optim.Optimizer, epochs: list[list[tuple[Tensor, Tensor]]]) -> None:
    """As printed, but for the batches, the clamp's numbers, and `fill_` where a current torch refuses an int."""
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
def test_training_gives_the_weights_of_the_articles_loop(alone: World, implementation: str) -> None:
    equals_the_articles_loop(alone, implementation, compared_after=12)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["default", "foreach", "fused", "capturable"])
def test_training_on_a_gpu_gives_the_weights_of_the_articles_loop(implementation: str) -> None:
    """The fused kernel rounds an element by its place in memory, which in DDP is in a bucket; Adam makes whole steps of
    such differences in the smallest gradients (3e-3 after 12 updates). So its first update alone is compared.
    """
    from ddp_cifar.distributed import open_world

    torch.backends.cudnn.deterministic = True
    with open_world("cuda") as world:
        equals_the_articles_loop(world, implementation, compared_after=1 if implementation == "fused" else 12)


def equals_the_articles_loop(world: World, implementation: str, compared_after: int) -> None:
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
        [(micro.images, micro.labels) for step in trainer.train.steps(epoch) for micro in step] for epoch in range(3)
    ]
    snapshots: dict[nn.Module, list[dict[str, Tensor]]] = {net: [], trainer.model: []}
    for module, its in ((net, optimizer), (trainer.model, trainer.optimizer)):
        kept = snapshots[module]
        its.register_step_post_hook(lambda *_, m=module, kept=kept: kept.append(copy.deepcopy(m.state_dict())))
    net.train()
    article_loop(net, optimizer, epochs)
    trainer.fit()
    ours, theirs = (snapshots[module][compared_after - 1] for module in (trainer.model, net))
    parameters = dict(net.named_parameters())  # a hook runs before buffers are averaged
    assert largest_difference({k: ours[k] for k in parameters}, {k: theirs[k] for k in parameters}) <= 1e-6
    counts = {float(state["step"]) for state in trainer.optimizer.state.values()}
    # 12 updates: 1 ... 6 freely in step counts, then 6 -> 4, 5, 6 -> 4 ...
    assert counts == {float(state["step"]) for state in optimizer.state.values()} == {6.0}


# -- any number of ranks

TEN_STEPS = (
    "precision=fp32",
    "optim.name=sgd",
    "optim.momentum=0",
    "optim.lr=0.01",
    "optim.schedule=constant",
    "optim.warmup_epochs=0",
    "train.global_batch_size=32",
    "train.epochs=4",
    "train.max_steps=10",
)


def first_steps(world: World, arguments: tuple[str, ...]) -> dict[str, Any]:
    """An epoch's pixels, and gradients and buffers after its first and its last, short step, each from the same weights."""
    config, dataset = config_of(*TEN_STEPS, *arguments), random_dataset(105, image_size=16)
    result: dict[str, Any] = {"pixels": {}}
    for name, step in (("first", 0), ("short", 3)):
        trainer = make_trainer(world, config, dataset)
        trainer.model.train()
        trainer.train_step(next(trainer.train.steps(0, first_step=step)))
        gradients = {key: parameter.grad for key, parameter in trainer.model.named_parameters()}
        result[name] = {"gradients": gradients, "buffers": dict(trainer.model.named_buffers())}
    for step, batch in enumerate(trainer.train.steps(epoch=1)):
        for micro in batch:
            result["pixels"][step, micro.index] = (micro.images, micro.labels)
    return result


@pytest.mark.parametrize("micro_batch_size", [8, 4])
def test_1_2_and_4_ranks_see_the_same_pixels_and_compute_the_same_gradients(
    ranks: RankPool, micro_batch_size: int
) -> None:
    """With BatchNorm and dropout. 8 images a micro-batch are 4 micro-batches a step (none accumulated on 4 ranks), 4 are 8.

    Of 105 images, an epoch's last step has 9, so that micro-batches of unlike size meet.
    """
    runs = {n: ranks.run(first_steps, n, (f"train.micro_batch_size={micro_batch_size}",)) for n in (1, 2, 4)}
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
    MODELS["double_cnn"] = DoubleCNN
    arguments = ("model.name=double_cnn", "train.global_batch_size=16", "train.micro_batch_size=4")
    trainer = make_trainer(world, config_of(*TEN_STEPS, *arguments), random_dataset(53))
    trainer.fit()
    assert trainer.progress.step == 10
    return trainer.model.state_dict(), digest(trainer.state_dict())


def test_1_2_and_4_ranks_have_the_same_weights_after_ten_steps(ranks: RankPool) -> None:
    """In float64, where it is the computation that is compared. In float32 runs part faster than their sums round: a value
    at the brink of a ReLU or a pooling goes the other way in one of them, and its image's gradient with it; after ten steps
    weights differ by 5e-6 to 9e-5, by the seed and the batch size.
    """
    runs = {n: ranks.run(train_ten_steps, n) for n in (1, 2, 4)}
    for run in runs.values():
        for weights, whole in run:
            assert largest_difference(weights, runs[1][0][0]) <= 1e-6
            assert whole == run[0][1], "ranks of one run differ"


def test_buffers_count_one_batch_a_step(alone: World) -> None:
    trainer = make_trainer(alone, config_of(*TEN_STEPS, "train.micro_batch_size=8"), random_dataset(96))
    trainer.fit()
    assert int(trainer.model.state_dict()["conv_layer.1.num_batches_tracked"]) == 10


def test_the_buffers_are_the_mean_over_micro_batches_weighted_by_images(alone: World) -> None:
    trainer = make_trainer(alone, config_of(*TEN_STEPS, "train.micro_batch_size=8"), random_dataset(37))
    trainer.model.train()
    batch = list(trainer.train.steps(0))[-1]  # 5 images: micro-batches of 2, 1, 1 and 1
    assert [len(micro.labels) for micro in batch] == [2, 1, 1, 1]
    conv = trainer.model.conv_layer[0]
    with torch.no_grad():
        means = [conv(micro.images).mean(dim=(0, 2, 3)) * len(micro.labels) / 5 for micro in batch]
    trainer.train_step(batch)
    expected = 0.1 * sum(means)  # momentum 0.1, from 0
    assert torch.allclose(trainer.model.conv_layer[1].running_mean, expected, atol=1e-6)


# -- evaluation


def evaluate_1003(world: World) -> tuple[float, float, int]:
    config = config_of(
        "precision=fp32", "train.global_batch_size=12", "train.micro_batch_size=1", "eval.batch_size=100"
    )
    dataset = DataSet(random_split(24), random_split(1003, seed=2), tuple("abcdefghij"))
    trainer = make_trainer(world, config, dataset)
    totals = trainer.evaluate(trainer.test)
    return totals.mean_loss, totals.correct, totals.images


def test_evaluation_counts_every_image_once_at_any_number_of_ranks(ranks: RankPool) -> None:
    results = [result for n in (1, 2, 3, 4) for result in ranks.run(evaluate_1003, n)]
    loss, correct, _ = results[0]
    assert 0 < correct < 1003
    for result in results:
        assert result == (pytest.approx(loss, abs=1e-6), correct, 1003)


def test_more_ranks_than_images_evaluate_too(ranks: RankPool) -> None:
    assert set(ranks.run(evaluate_two_images, 4)) == {2}


def evaluate_two_images(world: World) -> int:
    config = config_of("train.global_batch_size=12", "train.micro_batch_size=null")
    trainer = make_trainer(world, config, random_dataset(24, test=2))
    return trainer.evaluate(trainer.test).images


def test_full_training_accuracy_is_over_augmented_images_in_eval_mode(alone: World) -> None:
    config = config_of(
        "train.global_batch_size=8", "train.micro_batch_size=8", "train.epochs=1", "eval.train_accuracy=full"
    )
    trainer = make_trainer(alone, config, random_dataset(24))
    trainer.fit()
    totals = trainer.evaluate(trainer.train, augmented=True)
    assert totals.images == 24
    plain = trainer.evaluate(trainer.train)
    assert totals.loss != plain.loss, "the images were not augmented"


# -- going on

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


def break_and_go_on(world: World, precision: str, stop_at: int) -> tuple[str, str]:
    """Digests of an unbroken run, and of one that stops at a step and goes on in a new trainer."""
    dataset = random_dataset(70)  # 5 steps an epoch
    arguments = (*RESUMED, f"precision={precision}")
    unbroken = make_trainer(world, config_of(*arguments), dataset)
    unbroken.fit()
    first = make_trainer(world, config_of(*arguments, f"train.max_steps={stop_at}"), dataset)
    first.fit()
    second = make_trainer(world, config_of(*arguments), dataset)
    second.load_state_dict(first.state_dict(), "the first half")
    second.fit()
    return digest(unbroken.state_dict()), digest(second.state_dict())


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("stop_at", [5, 7])
def test_going_on_gives_the_bits_of_an_unbroken_run(ranks: RankPool, world_size: int, stop_at: int) -> None:
    """After an epoch's end (step 5) and in its middle (step 7)."""
    for unbroken, resumed in ranks.run(break_and_go_on, world_size, "bf16" if stop_at == 5 else "fp32", stop_at):
        assert resumed == unbroken


def test_a_checkpoint_of_a_channels_last_run_goes_on_in_a_contiguous_one(alone: World) -> None:
    """The update's kernels read a moment in its parameter's memory order, whatever its own strides say."""

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
    for parameter, state in second.optimizer.state.items():
        assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == parameter.stride()


def test_the_best_checkpoint_goes_by_the_held_out_images(alone: World, tmp_path: Path) -> None:
    from ddp_cifar.checkpoint import Checkpoints, load_checkpoint

    tmp_path.joinpath("checkpoints").mkdir()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    config = config_of(
        "train.global_batch_size=16", "train.micro_batch_size=16", "train.epochs=4", "data.val_images=20"
    )
    trainer = make_trainer(alone, config, random_dataset(84, val=20), checkpoints=checkpoints)
    trainer.fit()
    best = load_checkpoint(checkpoints.folder / "best.pt")
    assert best["progress"]["results"]["val/accuracy"] == trainer.progress.best_val_accuracy
    assert len(checkpoints.paths()) <= 2, "keep=1 keeps the newest, and the best"


# -- averaged weights, smoothed labels, fp16

SHELF = (*TEN_STEPS, "train.micro_batch_size=16")


def test_the_running_average_is_what_is_evaluated_and_saved(alone: World) -> None:
    config = config_of(*SHELF, "train.ema_decay=0.9", "train.max_steps=3")
    trainer = make_trainer(alone, config, random_dataset(96, test=40, image_size=8))
    seen = []
    trainer.optimizer.register_step_post_hook(lambda *_: seen.append(copy.deepcopy(trainer.model.state_dict())))
    trainer.fit()
    name = "fc_layer.6.weight"
    average = seen[0][name]
    for weights in seen[1:]:
        average = 0.9 * average + 0.1 * weights[name]
    state = trainer.state_dict()
    assert torch.allclose(state["ema"][name], average, atol=1e-7)
    assert torch.equal(state["model"][name], seen[-1][name])
    assert int(state["ema"]["conv_layer.1.num_batches_tracked"]) == 3

    alike = make_trainer(alone, config_of(*SHELF), random_dataset(96, test=40, image_size=8))
    alike.model.load_state_dict(state["ema"])
    assert alike.test is not None
    assert trainer.test is not None
    assert alike.evaluate(alike.test) == trainer.evaluate(trainer.test)
    alike.model.load_state_dict(state["model"])
    assert alike.evaluate(alike.test).loss != trainer.evaluate(trainer.test).loss


def test_smoothed_labels_are_torchs_and_the_evaluations_are_not(alone: World) -> None:
    config = config_of(*SHELF, "train.label_smoothing=0.2")
    trainer = make_trainer(alone, config, random_dataset(32, image_size=8))
    plain = make_trainer(alone, config_of(*SHELF), random_dataset(32, image_size=8))
    assert trainer.test is not None
    assert plain.test is not None
    assert trainer.evaluate(trainer.test) == plain.evaluate(plain.test)
    without_dropout(trainer.model)
    trainer.model.train()
    batch = next(trainer.train.steps(0))
    loss = sum(
        F.cross_entropy(trainer.model(micro.images), micro.labels, reduction="sum", label_smoothing=0.2).item()
        for micro in batch
    )
    trainer.train_step(batch)
    assert trainer.counter.reduce(alone).loss == pytest.approx(loss, rel=1e-4)


def test_adamw_shrinks_weights_apart_from_the_gradient_and_is_clamped_too(alone: World) -> None:
    adamw = ("optim.name=adamw", "optim.lr=0.01", "optim.weight_decay=0.1", "optim.step_clamp.after_epoch=0")
    config = config_of(*SHELF, *adamw, "optim.step_clamp.limit=5", "optim.step_clamp.reset_to=3")
    trainer = make_trainer(alone, config, random_dataset(96, image_size=8))
    assert type(trainer.optimizer) is torch.optim.AdamW
    trainer.fit()
    counts = {float(state["step"]) for state in trainer.optimizer.state.values()}
    assert counts == {4.0}, "10 updates: 1 ... 5, then 5 -> 3, 4, 5 -> 3, 4 ..."


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_fp16_leaves_out_an_update_that_overflowed_and_goes_on(alone: World, name: str) -> None:
    """As if it had not been: the next update, from what were uninitialised moments, is small."""
    config = config_of(*SHELF, "precision=fp16", f"optim.name={name}", "optim.momentum=0.9", "train.max_steps=4")
    trainer = make_trainer(alone, config, random_dataset(96, image_size=8))
    trainer.scaler = GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.model.train()
    steps = trainer.train.steps(0)
    trainer.train_step(next(steps))
    assert torch.equal(trainer.model.state_dict()["fc_layer.6.weight"], before["fc_layer.6.weight"])
    assert trainer.scaler.get_scale() == 2.0**39
    trainer.scaler = GradScaler("cpu", init_scale=2.0**10)
    trainer.train_step(next(steps))
    assert not torch.equal(trainer.model.state_dict()["fc_layer.6.weight"], before["fc_layer.6.weight"])
    assert trainer.scaler.get_scale() == 2.0**10
    parameters = dict(trainer.model.named_parameters())
    assert 0 < largest_difference(parameters, {key: before[key] for key in parameters}) < 0.5


def test_fp16_gradients_are_those_of_fp32_but_for_rounding(alone: World) -> None:
    gradients = {}
    for precision in ("fp32", "fp16"):
        trainer = make_trainer(alone, config_of(*SHELF, f"precision={precision}"), random_dataset(32, image_size=8))
        without_dropout(trainer.model)
        trainer.scaler = GradScaler("cpu", init_scale=2.0**10, enabled=precision == "fp16")
        trainer.model.train()
        trainer.train_step(next(trainer.train.steps(0)))
        gradients[precision] = trainer.model.fc_layer[6].weight.grad
    difference = (gradients["fp16"] - gradients["fp32"]).norm() / gradients["fp32"].norm()
    assert 0 < difference < 0.01


def shelf_goes_on(world: World) -> tuple[str, str]:
    """As `break_and_go_on`, with all that has a state of its own."""
    arguments = (*RESUMED, "precision=fp16", "train.ema_decay=0.9", "train.label_smoothing=0.1", "optim.name=adamw")
    dataset = random_dataset(70, image_size=8)
    unbroken = make_trainer(world, config_of(*arguments), dataset)
    unbroken.fit()
    first = make_trainer(world, config_of(*arguments, "train.max_steps=7"), dataset)
    first.fit()
    second = make_trainer(world, config_of(*arguments), dataset)
    second.load_state_dict(copy.deepcopy(first.state_dict()), "the first half")
    second.fit()
    assert {"ema", "scaler"} <= second.state_dict().keys()
    return digest(unbroken.state_dict()), digest(second.state_dict())


def test_the_average_and_the_scaler_go_on_bit_for_bit(ranks: RankPool) -> None:
    for unbroken, resumed in ranks.run(shelf_goes_on, 2):
        assert resumed == unbroken


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_precision_learns_on_a_gpu(precision: str) -> None:
    from ddp_cifar.distributed import open_world

    arguments = ("train.global_batch_size=64", "train.micro_batch_size=32", "train.epochs=8", "optim.warmup_epochs=0.5")
    with open_world("cuda") as world:
        config = config_of(*arguments, f"precision={precision}", "data.name=shapes", "data.shapes.train_images=2000")
        trainer = make_trainer(world, config, build_dataset(config.data, world))
        trainer.fit()
    assert trainer.progress.results["test/accuracy"] > 0.8


def test_clipping_bounds_the_gradient(alone: World) -> None:
    config = config_of(*TEN_STEPS, "train.micro_batch_size=32", "train.clip_norm=0.01")
    trainer = make_trainer(alone, config, random_dataset(96))
    trainer.model.train()
    trainer.train_step(next(trainer.train.steps(0)))
    gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    assert float(trainer.norms[-1]) > 0.01
    assert float(nn.utils.get_total_norm(gradients)) == pytest.approx(0.01, rel=1e-3)

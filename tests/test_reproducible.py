"""train.reproducible: bitwise identical on any number of ranks, and if their number changes during a run."""

import random
import signal
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import Rows, config_of, kernels_of, make_trainer
from launched import SHORT, Result, Run, free_port, send, start
from ranks import RankPool

from ddp_cifar.data import build_dataset
from ddp_cifar.data.batch_plan import micro_batch_size_for
from ddp_cifar.distributed.world import World
from ddp_cifar.run.checkpoint_file import digest

CNN = (
    "data.name=shapes",
    "data.shapes.train_images=99",
    "data.shapes.test_images=30",
    "train.global_batch_size=32",
    "train.epochs=3",
    "train.log_every=2",
    "train.fingerprint_every=3",
    "train.ema_decay=0.9",
    "eval.batch_size=8",
    "optim.step_clamp.after_epoch=1",
    "optim.step_clamp.limit=7",
    "optim.step_clamp.reset_to=5",
)
"""The CNN with four steps per epoch, of which the last has 3 images. The clamp is active in the last two epochs."""


TINY = ("model.name=tiny",)
FINE_TUNING = (
    "model.freeze=[conv_layer.0.*, conv_layer.1.*]",
    'optim.groups=[{match: "conv_layer.*", lr_factor: 0.5}, {match: "*.bias", weight_decay: 0.1}]',
    "optim.decay_norm_bias=false",
    "optim.weight_decay=0.01",
)
"""Frozen layers, of which one is BatchNorm, and four parameter groups."""


def train_cnn(world: World, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """Return the sha256 of the whole state, and the rows of metrics."""
    config = config_of(*CNN, *arguments)
    trainer = make_trainer(world, config, build_dataset(config.data, world))
    rows = Rows()
    trainer.fit(rows)
    state = trainer.state_dict()
    parts = {name: state[name] for name in ("model", "optimizer", "progress", "ema")}
    return digest(parts), rows.rows


@pytest.mark.parametrize(
    ("precision", "micro_batches", "world_sizes", "more"),
    [
        ("fp32", 8, (3,), ()),
        ("bf16", 7, (2, 5), FINE_TUNING),
        pytest.param("fp32", 6, (4, 6), (), marks=pytest.mark.slow),
        pytest.param("bf16", 7, (1, 7), (), marks=pytest.mark.slow),
        pytest.param("fp32", 8, (5, 8), (), marks=pytest.mark.slow),
        pytest.param("bf16", 8, (2, 6), (), marks=pytest.mark.slow),
        # a small network with the same kinds of layers, on all numbers of ranks
        pytest.param("fp32", 6, range(2, 7), TINY, marks=pytest.mark.slow),
        pytest.param("bf16", 7, range(2, 8), TINY, marks=pytest.mark.slow),
        pytest.param("bf16", 8, range(2, 9), TINY, marks=pytest.mark.slow),
    ],
)
def test_the_cnn_is_bitwise_identical_on_any_number_of_ranks(
    ranks: RankPool, precision: str, micro_batches: int, world_sizes: Sequence[int], more: tuple[str, ...]
) -> None:
    """With BatchNorm, dropout, an active clamp, gradient accumulation, and fewer images than micro-batches in the last step."""
    micro = f"train.micro_batch_size={micro_batch_size_for(32, micro_batches)}"
    arguments = ("train.reproducible=true", f"precision={precision}", micro, *more)
    ((state, rows),) = ranks.run(train_cnn, 1, *arguments)
    assert [row["step"] for row in rows] == [2, 3, 4, 4, 6, 6, 8, 8, 9, 10, 12, 12, 12]
    assert all(torch.isfinite(torch.tensor(row["train/loss"])) for row in rows if "train/loss" in row)
    for world_size in world_sizes:
        for other_state, other_rows in ranks.run(train_cnn, world_size, *arguments):
            assert other_rows == rows, world_size
            assert other_state == state, world_size


EXTRAS = (
    "model.name=tiny",
    "data.channels=1",
    "data.oversample=true",
    "augment.name=helpers:noise",
    "augment.cutout=6",
    "augment.mixup=0.4",
    "augment.cutmix=1",
    "train.loss=helpers:focal_loss",
    "train.class_weights=balanced",
    "train.reproducible=true",
    "train.micro_batch_size=7",
    "precision=fp32",
)
"""Everything that draws random numbers or weighs images."""


def train_in_two_parts(world: World, stop: int, *arguments: str) -> str:
    """Train to step `stop`, resume in another trainer, and return the sha256 of the weights and the optimizer."""
    config = config_of(*CNN, *EXTRAS, f"train.max_steps={stop}", *arguments)
    dataset = build_dataset(config.data, world)
    first = make_trainer(world, config, dataset)
    first.fit()
    second = make_trainer(world, config_of(*CNN, *EXTRAS, *arguments), dataset)
    second.load_state_dict(first.state_dict(), "the first part")
    second.fit()
    state = second.state_dict()
    return digest({name: state[name] for name in ("model", "optimizer", "normalization", "ema")})


def test_augmentation_mixup_weights_and_grayscale_are_bitwise_identical_on_any_number_of_ranks(ranks: RankPool) -> None:
    (whole,) = ranks.run(train_in_two_parts, 1, 12)
    for world_size, stop in ((2, 5), (3, 7)):
        assert ranks.run(train_in_two_parts, world_size, stop) == [whole] * world_size
    assert ranks.run(train_in_two_parts, 1, 12, "augment.args.strength=0.9") != [whole]


@pytest.mark.slow
def test_resnet18_is_bitwise_identical_on_1_and_3_ranks(ranks: RankPool) -> None:
    short = ("model.name=resnet18", "train.max_steps=5", "train.micro_batch_size=6", "optim.name=sgd")
    arguments = ("train.reproducible=true", "precision=fp32", *short)
    (one,), three = ranks.run(train_cnn, 1, *arguments), ranks.run(train_cnn, 3, *arguments)
    assert three == [one] * 3


def train_cnn_with_its_kernels(world: World, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    with kernels_of(config_of(*CNN, *arguments), world):
        return train_cnn(world, *arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_a_repeated_run_and_two_ranks_are_bitwise_identical(ranks: RankPool, precision: str) -> None:
    arguments = ("train.reproducible=true", "train.micro_batch_size=4", f"precision={precision}")
    first, again, two = (ranks.run(train_cnn_with_its_kernels, n, *arguments, device="cuda") for n in (1, 1, 2))
    assert first == again
    assert two == first * 2


def test_without_train_reproducible_1_and_4_ranks_diverge(ranks: RankPool) -> None:
    """Shows that the tests above can fail."""
    one, four = (ranks.run(train_cnn, n, "precision=fp32", "train.micro_batch_size=8")[0] for n in (1, 4))
    assert one[0] != four[0]
    assert one[1] != four[1]


EIGHT = ("train.reproducible=true", "train.micro_batch_size=4")
"""8 micro-batches per step."""


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return Run(tmp_path_factory.mktemp("reproducible") / "run").finish(*EIGHT, ranks=1)


@pytest.mark.slow
def test_two_nodes_of_2_and_1_ranks_are_bitwise_identical_to_one_rank(run: Run, on_one_rank: Result) -> None:
    nodes = {"NNODES": "2", "HEAD": f"127.0.0.1:{free_port()}", "LOCAL_ADDR": "127.0.0.1"}
    agents = [start(run.path, n, *SHORT, *EIGHT, script="node.sh", **nodes) for n in (2, 1)]
    assert [agent.wait(300) for agent in agents] == [0, 0], run.terminal
    assert Result.of(run.path) == on_one_rank
    assert "reproducible: bitwise identical on 1 to 8 ranks" in run.terminal
    assert "3 ranks x 2 to 3 micro-batches of 4 images" in run.terminal


@pytest.mark.slow
def test_from_4_to_3_to_1_to_7_ranks_with_kills_is_bitwise_identical_to_one_rank(run: Run, on_one_rank: Result) -> None:
    for ranks in (4, 3, 1):
        run.start(*EIGHT, ranks=ranks)
        send([random.Random(ranks).choice(run.ranks())], signal.SIGKILL)
        assert run.end() != 0
    assert run.finish(*EIGHT, ranks=7) == on_one_rank

"""train.reproducible: the same bits on any number of ranks, through any change of their number."""

import dataclasses
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Rows, config_of, make_trainer
from launched import Result, Run, send
from ranks import RankPool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_cifar.buffers import BufferMean
from ddp_cifar.checkpoint import digest
from ddp_cifar.config import TrainConfig
from ddp_cifar.data import build_dataset
from ddp_cifar.data.sampler import check_batch_size
from ddp_cifar.distributed import World, open_world
from ddp_cifar.errors import UserError
from ddp_cifar.train import set_up_kernels
from ddp_cifar.tree_sum import TreeReduction, TreeSum


def tree(values: list[Tensor]) -> Tensor:
    """The sum that is meant, by recursion."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return tree(values[:half]) + tree(values[half:])


def test_a_binary_counter_adds_up_the_tree() -> None:
    for count in (1, 2, 4, 8, 16):
        values = list(torch.randn(count, 1000) * 10.0 ** torch.randint(-6, 6, (count, 1000)))
        summed = TreeSum()
        for value in values:
            summed.add([value.clone(), -value])
        assert len(summed.sums) == 1
        total = summed.take()
        assert torch.equal(total[0], tree(values))
        assert torch.equal(total[1], -tree(values))


def reduce_gradients(world: World, micro_batches: int, numbers: int) -> list[Tensor]:
    """Gradients (as they are of a sum of products) of a model in several buckets, of sizes that do not split over ranks."""
    torch.manual_seed(0)
    values = torch.randn(micro_batches, numbers) * 10.0 ** torch.randint(-6, 6, (micro_batches, numbers))
    model = nn.Module()
    sizes = [numbers // 2, numbers - numbers // 2 - 1, 1]
    for i, size in enumerate(sizes):
        model.register_parameter(f"weight{i}", nn.Parameter(torch.zeros(size)))
    model.forward = lambda value: sum(  # type: ignore[method-assign]
        (parameter * part).sum() for parameter, part in zip(model.parameters(), value.split(sizes), strict=True)
    )
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.001, gradient_as_bucket_view=True)
    reduction = TreeReduction(world, ddp)
    share = micro_batches // world.world_size
    for _ in range(2):  # DDP makes its buckets anew after the first
        model.zero_grad()
        for i in range(share):
            is_last = i == share - 1
            with ddp.no_sync() if not is_last else torch.enable_grad():
                ddp(values[world.rank * share + i]).backward()
            reduction.end_micro_batch(is_last=is_last)
    return [torch.cat([parameter.grad for parameter in model.parameters()]), tree(list(values))]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [4, 8])
def test_gradients_are_the_trees_sum_whatever_the_buckets(ranks: RankPool, world_size: int, micro_batches: int) -> None:
    for summed, expected in ranks.run(reduce_gradients, world_size, micro_batches, 1003):
        assert torch.equal(summed, expected)


CNN = (
    "data.name=shapes",
    "data.shapes.train_images=104",
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
"""The article's network, four steps an epoch of which the last has 8 images, and the clamp acting in the last two epochs."""


def train_cnn(world: World, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """The whole state's sha256, and the rows of metrics."""
    config = config_of(*CNN, *arguments)
    trainer = make_trainer(world, config, build_dataset(config.data, world))
    rows = Rows()
    trainer.fit(rows)
    state = trainer.state_dict()
    parts = {name: state[name] for name in ("model", "optimizer", "progress", "ema")}
    return digest(parts), rows.rows


@pytest.mark.parametrize(
    ("precision", "micro_batch_size"),  # 4 ranks compute one micro-batch of 8 images each, or two of 4
    [
        ("fp32", 4),
        ("bf16", 8),
        pytest.param("fp32", 8, marks=pytest.mark.slow),
        pytest.param("bf16", 4, marks=pytest.mark.slow),
    ],
)
def test_the_articles_network_has_the_same_bits_on_1_2_and_4_ranks(
    ranks: RankPool, precision: str, micro_batch_size: int
) -> None:
    arguments = (f"precision={precision}", f"train.micro_batch_size={micro_batch_size}")
    results = {n: ranks.run(train_cnn, n, "train.reproducible=true", *arguments) for n in (1, 2, 4)}
    state, rows = results[1][0]
    assert [row["step"] for row in rows] == [2, 3, 4, 4, 6, 6, 8, 8, 9, 10, 12, 12, 12]
    assert all(torch.isfinite(torch.tensor(row["train/loss"])) for row in rows if "train/loss" in row)
    for everyone in results.values():
        for other_state, other_rows in everyone:
            assert other_rows == rows
            assert other_state == state


def train_cnn_on_the_gpu(world: World, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """All ranks on one GPU, which gloo does not communicate for: its tensors go over the CPU."""
    world = dataclasses.replace(world, device=torch.device("cuda", 0))
    set_up_kernels(config_of(*CNN, *arguments).train, world)
    try:
        return train_cnn(world, *arguments)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_a_run_repeats_its_bits_and_two_ranks_have_them_too(ranks: RankPool, precision: str) -> None:
    arguments = ("train.reproducible=true", "train.micro_batch_size=4", f"precision={precision}")
    first, again, two = (ranks.run(train_cnn_on_the_gpu, n, *arguments) for n in (1, 1, 2))
    assert first == again
    assert two == first * 2


@pytest.mark.gpu
def test_on_nccl_the_sum_is_taken_on_a_stream() -> None:
    with open_world("cuda") as world:
        reduction = TreeReduction(world, DistributedDataParallel(nn.Linear(3, 3).to(world.device)))
        group = world.new_group()
        reduction.groups = (group, group)
        values = torch.randn(1001, device=world.device)
        expected = values.clone()
        reduction.start_sum(values)()
        assert torch.equal(values, expected)


def test_without_it_1_and_4_ranks_part(ranks: RankPool) -> None:
    """Else the test above could not fail."""
    one, four = (ranks.run(train_cnn, n, "precision=fp32", "train.micro_batch_size=8")[0] for n in (1, 4))
    assert one[0] != four[0]
    assert one[1] != four[1]


def test_buffers_are_summed_in_the_tree(alone: World) -> None:
    model = nn.BatchNorm1d(3)
    mean = BufferMean(model, 4, alone.start_sum)
    mean.begin_step()
    start, changes = mean.floats[0].clone(), []
    for _ in range(4):
        mean.begin_micro_batch()
        model(torch.randn(8, 3))
        changes.append((mean.floats[0] - start) * 0.25)
        mean.end_micro_batch(0.25)
    mean.start_reducing()()
    assert torch.equal(mean.floats[0], start + tree(changes))


@pytest.mark.parametrize(
    ("size", "micro", "world_size", "message"),
    [
        (512, None, 2, "train.micro_batch_size=null, by which results depend on the number of ranks: set"),
        (
            96,
            16,
            2,
            "found train.global_batch_size=96 / train.micro_batch_size=16 = 6: use train.micro_batch_size=96, 48, 24, 12",
        ),
        (100, 30, 2, "= 3.33333: use train.micro_batch_size=100, 50, 25, or another"),
        (512, 64, 3, "with 8 micro-batches a step serves 1, 2, 4, 8 ranks, found 3"),
        (512, 128, 8, "with 4 micro-batches a step serves 1, 2, 4 ranks, found 8: use one of these, or another"),
    ],
)
def test_what_the_tree_cannot_serve_is_refused_with_what_it_can(
    size: int, micro: int | None, world_size: int, message: str
) -> None:
    train = TrainConfig(global_batch_size=size, micro_batch_size=micro, reproducible=True)
    with pytest.raises(UserError) as error:
        check_batch_size(train, world_size)
    assert message in str(error.value)


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return Run(tmp_path_factory.mktemp("reproducible") / "run").finish("train.reproducible=true", ranks=1)


@pytest.mark.slow
def test_two_nodes_have_the_bits_of_one_rank(tmp_path: Path, on_one_rank: Result) -> None:
    run = Run(tmp_path / "run")
    run.launch("train.reproducible=true", ranks=2, NNODES="2", OMP_NUM_THREADS="2")
    assert run.end(300) == 0
    assert Result.of(run.path) == on_one_rank
    assert "reproducible: the same bits on 1, 2, 4 ranks" in run.terminal


@pytest.mark.slow
def test_from_4_to_2_to_1_to_4_ranks_with_kills_has_the_bits_of_one_rank(run: Run, on_one_rank: Result) -> None:
    for ranks in (4, 2, 1):
        run.start("train.reproducible=true", ranks=ranks)
        send([random.Random(ranks).choice(run.ranks())], signal.SIGKILL)
        assert run.end() != 0
    assert run.finish("train.reproducible=true", ranks=4) == on_one_rank

"""`python -m ddp_cifar.benchmark`: measurements and report."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL, config_of, make_trainer, random_dataset
from ranks import RankPool
from torch import nn

from ddp_cifar.distributed.world import World
from ddp_cifar.models.cnn import CNN
from ddp_cifar.training.throughput import computation, model_flops

Shell = Callable[..., Any]


def test_the_flops_of_the_cnn_match_a_calculation_by_hand() -> None:
    """Two FLOPs per multiply-add; twice as many products in backward as in forward, except for the first layer's images."""
    convolutions = [(3, 32, 32), (32, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8), (256, 256, 8)]
    forward = [2 * 9 * c_in * c_out * size**2 for c_in, c_out, size in convolutions]
    forward += [2 * a * b for a, b in ((4096, 1024), (1024, 512), (512, 10))]
    assert model_flops(CNN(), (3, 32, 32)) == 3 * sum(forward) - forward[0]


def computed_alone(world: World) -> tuple[list[int], list[int]]:
    """Images per pass of the benchmark's bare computation, and the sizes of this rank's micro-batches in the plan."""
    trainer = make_trainer(
        world, config_of("train.global_batch_size=23", "train.micro_batch_size=3"), random_dataset(46)
    )
    sizes: list[int] = []
    trainer.model.register_forward_hook(lambda _, __, logits: sizes.append(len(logits)))
    computation(trainer.train_step, num_classes=10, steps=1)()
    plan = trainer.plan
    return sizes, [plan.sizes(23)[m] for m in plan.shares(23)[world.rank]]


def test_each_pass_of_a_compiled_computation_starts_a_step_of_its_cuda_graphs(
    alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also keeps the tensors of the gradients. The compiler is replaced, as it needs a GPU."""
    gradients: list[set[int]] = []

    def compile_nothing(model: nn.Module, **_: object) -> None:
        def start_step() -> None:
            gradients.append({id(parameter.grad) for parameter in model.parameters()})

        monkeypatch.setattr("torch.compiler.cudagraph_mark_step_begin", start_step)

    monkeypatch.setattr(nn.Module, "compile", compile_nothing)
    trainer = make_trainer(alone, config_of(*SMALL, "model.name=tiny"), random_dataset(16))
    step = trainer.train_step
    step.config = dataclasses.replace(step.config, train=dataclasses.replace(step.config.train, compile="default"))
    computation(step, num_classes=10, steps=2)()
    assert len(gradients) == 8  # 2 steps of 4 micro-batches
    assert all(found == gradients[0] and len(found) > 1 for found in gradients)


def test_the_bare_computation_uses_each_ranks_own_micro_batches(ranks: RankPool) -> None:
    found = ranks.run(computed_alone, 3)
    assert all(computed == planned for computed, planned in found)
    assert sum(sum(computed) for computed, _ in found) == 23


@pytest.mark.slow
def test_the_benchmark_reports_what_it_measured(shell: Shell, tmp_path: Path) -> None:
    result_file = tmp_path / "result.json"
    small = ("train.global_batch_size=23", "train.micro_batch_size=3", "train.epochs=2")
    options = ("--rounds", "2", "--steps", "2", "--json", str(result_file))
    done = shell("torchrun", "--standalone", "--nproc_per_node=3", "-m", "ddp_cifar.benchmark", *small, *options)
    assert done.status == 0, done.err
    result = json.loads(result_file.read_text())
    assert (result["world_size"], result["num_micro_batches"], result["grad_accum_steps"]) == (3, 8, 3)
    assert (result["micro_batch_size"], result["rounds"]) == (3, 2)
    assert set(result["rates"]) == {
        "training",
        "computation",
        "without exchange",
        "matrix product 1024",
        "matrix product 2048",
    }
    assert all(min(rates) > 0 and len(rates) == 2 for rates in result["rates"].values())
    assert result["images_per_s_min"] <= result["images_per_s"] <= result["images_per_s_max"]
    assert sum(result["phases_s"].values()) == pytest.approx(result["step_s"], rel=0.5)
    assert 0 < result["utilization"] < 1
    assert f"| images/s | {result['images_per_s']:,.0f} (" in done.out
    assert "23 images per step in 8 micro-batches of 2 to 3, 2 to 3 per rank |" in done.out
    alone = shell("python", "-m", "ddp_cifar.benchmark", *small, "--rounds", "1", "--steps", "1")
    assert "| exposed communication | not measured with one rank" in alone.out, alone.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rounds", "0"], "--rounds 0 is out of range"),
        (["--json", "nowhere/a.json"], "the folder nowhere does not exist"),
        (["train.epoch=3"], "did you mean train.epochs"),
    ],
)
def test_an_invalid_argument_of_the_benchmark_gives_one_line(shell: Shell, arguments: list[str], expected: str) -> None:
    done = shell("python", "-m", "ddp_cifar.benchmark", *arguments)
    assert done.status == 2
    assert len(done.err.splitlines()) == 1
    assert expected in done.err

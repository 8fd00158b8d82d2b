"""Warm-up and compiled steps."""

import errno
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import SMALL, Rows, config_of, make_trainer, random_dataset
from ranks import RankPool
from test_mistakes import TINY

from ddp_cifar.data.batch_plan import plan_batches
from ddp_cifar.data.sampler import StepSampler
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError
from ddp_cifar.training import build, warmup


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_a_compiled_step_equals_an_eager_step_on_two_ranks(ranks: RankPool) -> None:
    """With DDP, gradient accumulation, a short batch and averaged weights. The check that rejects a CPU is disabled."""
    eager, compiled = (ranks.run(_compiled_on_the_cpu, 2, mode) for mode in ("off", "default"))
    assert compiled[0] == pytest.approx(eager[0], abs=1e-4)
    assert compiled[0] != eager[0], "the kernels differ"
    assert compiled[0] == compiled[1]


def _compiled_on_the_cpu(world: World, mode: str) -> list[float]:
    build.COMPILED_ON.add("cpu")
    try:
        return _first_losses(world, "train.ema_decay=0.9", f"train.compile={mode}")
    finally:
        build.COMPILED_ON.remove("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_on_a_gpu_a_compiled_step_equals_an_eager_step(ranks: RankPool, mode: str) -> None:
    """Equal up to rounding, with a short last batch and without dropout (torch.compile draws it in a different order)."""
    (eager,) = ranks.run(_first_losses, 1, "train.compile=off", device="cuda")
    ((compiled, skipped),) = ranks.run(_losses_and_skipped_graphs, 1, f"train.compile={mode}", device="cuda")
    assert compiled == pytest.approx(eager, abs=1e-3)
    assert skipped == 0


def _losses_and_skipped_graphs(world: World, *arguments: str) -> tuple[list[float], int]:
    """Also return how many graphs of the compiler did not become CUDA graphs, although `train.compile` asks for them."""
    from torch._dynamo.utils import counters

    counters.clear()
    return _first_losses(world, *arguments), counters["inductor"]["cudagraph_skips"]


def _first_losses(world: World, *arguments: str) -> list[float]:
    config = config_of(*SMALL, "precision=fp32", "model.name=resnet9", "optim.lr=1e-5", *arguments)
    trainer = make_trainer(world, config, random_dataset(44, test=10))
    rows = Rows()
    trainer.fit(rows)
    return [float(row[tag]) for row in rows.rows for tag in ("train/loss", "test/loss") if tag in row]


@pytest.mark.parametrize(
    ("batch", "micro", "sizes"),
    [(512, 64, [64, 42]), (128, 32, [32, 20]), (512, 512, [512, 336]), (500, 50, [50]), (512, 100, [86, 85, 56])],
)
def test_only_the_micro_batch_sizes_of_an_epoch_are_compiled(batch: int, micro: int, sizes: list[int]) -> None:
    train = config_of(f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}").train
    plan = plan_batches(train, 1, 50_000)
    assert plan.micro_batch_sizes() == sizes
    steps = StepSampler(plan, 0, seed=0).steps(0)
    assert sorted({len(m.indices) for step in steps for m in step.micro_batches}, reverse=True) == sizes


def test_each_batch_size_of_an_evaluation_is_compiled_before_training(
    alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("eval.batch_size=20", "eval.train_accuracy=full", "model.name=tiny")
    trainer = make_trainer(alone, config_of(*SMALL, *arguments), random_dataset(60, test=9, val=10))  # 50 to train on
    sizes: list[int] = []
    monkeypatch.setattr(warmup, "forward_pass", lambda *_, **__: lambda images: sizes.append(len(images)))
    warmup.warm_up_evaluation(trainer.train_step, trainer.train_loader, *trainer.evaluator.held_out.values(), None)
    assert sizes[::3] == sizes[1::3] == sizes[2::3]
    assert sorted(sizes[::3]) == [9, 10, 10, 20]


def test_torch_compile_needs_a_gpu(train: Callable[..., Any], tmp_path: Path) -> None:
    outcome = train(*TINY, "train.compile=default", "device=cpu", f"run_dir={tmp_path}/run")
    assert outcome.status == 2
    assert "train.compile=default needs a GPU, found device cpu; use train.compile=off" in outcome.err


def test_the_tensors_of_a_failed_pass_are_freed_before_the_search_for_a_size_that_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    monkeypatch.setattr(warmup, "out_of_memory", lambda step: f"freed: {kept[0]() is None}")

    def failing_pass() -> None:
        activations = torch.zeros(1)
        kept.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("out of memory")

    step: Any = SimpleNamespace(world=SimpleNamespace(device=torch.device("cuda"), rank=0))
    with pytest.raises(UserError, match="freed: True"), warmup.memory_advice(step, None):
        failing_pass()


def test_the_search_for_a_size_that_fits_does_not_compile(alone: World) -> None:
    trainer = make_trainer(alone, config_of(*SMALL, "model.name=tiny"), random_dataset(44))
    trainer.model._compiled_call_impl = lambda *_: pytest.fail("the compiled model was called")
    assert warmup.fits_in_memory(trainer.train_step, 4)


def test_the_state_of_a_gpus_memory_is_written_before_any_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Simulated: this machine may have no GPU."""
    calls: list[str] = []
    monkeypatch.setattr("torch.cuda.memory._dump_snapshot", calls.append)
    monkeypatch.setattr(warmup, "out_of_memory", lambda step: calls.append("freed") or "use a smaller size")
    monkeypatch.setattr(warmup.log, "propagate", True)

    def error_on(device: str, logs: Path | None) -> str:
        step: Any = SimpleNamespace(world=SimpleNamespace(device=torch.device(device), rank=3))
        with pytest.raises(UserError) as error, warmup.memory_advice(step, logs):
            raise torch.OutOfMemoryError("out of memory")
        return str(error.value)

    path = f"{tmp_path}/rank_3.memory.pickle"
    expected = f"use a smaller size; a snapshot of the memory is in {path}; open it at https://pytorch.org/memory_viz"
    assert error_on("cuda", tmp_path) == expected
    assert calls == [path, "freed"]
    assert error_on("cpu", tmp_path) == error_on("cuda", None) == "use a smaller size"
    assert calls == [path] + 3 * ["freed"]

    def full(path: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.cuda.memory._dump_snapshot", full)
    assert error_on("cuda", tmp_path) == "use a smaller size"
    assert (
        f"cannot write a snapshot of the memory to {path} (OSError: [Errno 28] No space left on device)" in caplog.text
    )
